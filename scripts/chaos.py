"""Disturbs short runs at random moments, lets them go on, and compares them with undisturbed ones, bit for bit.

python scripts/chaos.py                                             # every fault on every program, 20 times each
python scripts/chaos.py --programs dppo --faults kill term --times 5

A run is disturbed, resumed, and disturbed again until it ends by itself; a disturbance is survived if that run ended as the
undisturbed one did. What goes wrong inside an environment (a process that dies or hangs, a NaN) changes what a run learns from: it
is survived if the run noticed it and ended well. Prints a table and writes results/chaos.json, where what earlier calls found of other
faults and programs stays. A new fault is a new row of FAULTS or INJECTED.
"""

import argparse
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dprl import checkpoint, log
from dprl.cli import FULL_STATUS
from dprl.files import read_json, write_json
from dprl.report import markdown
from dprl.signals import STATUS
from dprl.versions import versions

ROOT = Path(__file__).parent.parent
WATCHED = ["evaluation.num_envs=8", "evaluation.episodes=8", "evaluation.final_episodes=40", "threads=1"]
TUNED = ["finetune.py", *WATCHED, "policy_from=runs/base", "num_envs=8"]
CLONED = ["policy.denoiser.width=64", "policy.schedule.steps=5", *WATCHED, "train.batch=64", "train.log_every=100"]
PROGRAMS = {
    "pretrain": ["pretrain.py", *CLONED, "train.steps=2400", "train.save_every=400"],
    "dppo": [*TUNED, "algo=dppo", "evaluation.every=3", "algo.env_steps=20000", "algo.chunks=10", "algo.actor.tuned_steps=3"],
    "idql": [
        *[*TUNED, "algo=idql", "evaluation.every=3", "algo.offline_steps=200", "algo.updates=25", "algo.batch=64"],
        *["algo.critic_warmup=50", "algo.online_steps=3000", "algo.online_start=500", "algo.clone_lr=1e-4", "algo.utd=0.1"],
    ],
}


@dataclass(frozen=True)
class Fault:
    """What befalls a running process, and the statuses that it may end with then (0: it went on to its end)."""

    strike: Callable[[subprocess.Popen], None]
    statuses: tuple[int, ...]


def fill_disk(process: subprocess.Popen) -> None:
    """From now on no file of the process may grow: what it meets is a full disk."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))


FAULTS = {
    "kill": Fault(lambda process: process.kill(), (-signal.SIGKILL,)),
    "term": Fault(lambda process: process.terminate(), (0, STATUS, -signal.SIGTERM)),  # the last before anything is imported
    "disk": Fault(fill_disk, (0, FULL_STATUS)),
}

# what goes wrong once, in one environment of an algorithm's run at a random step (tests/faults.py); and what the run then says
FEW = ["num_envs=2", "evaluation.num_envs=2", "evaluation.final_episodes=10"]
INJECTED = {
    "worker dies": (["what=exit", "backend=async"], "restart 1 of"),
    "worker hangs": (["what=hang", "backend=async", "timeout=5"], "restart 1 of"),
    "NaN observed": (["what=observation"], "is nan at step"),
    "infinite reward": (["what=reward"], "is inf at step"),
}
WHERE = {"what": "+task.env.kwargs.what", "backend": "task.env.backend", "timeout": "guards.workers.timeout"}


@dataclass
class Tally:
    """Of one fault on one program."""

    tried: int = 0
    survived: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class Sitting:
    """A process of a program, in a folder."""

    def __init__(self, arguments: list[str], folder: Path):
        command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        said = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # no file, which could not grow
        self.process = subprocess.Popen(command, cwd=folder, env=environment, **said)  # type: ignore[call-overload]

    def end(self) -> tuple[int, str]:
        """Its status, and what it said."""
        said, _ = self.process.communicate(timeout=600)
        return self.process.returncode, said


def undisturbed(arguments: list[str], folder: Path) -> float:
    """Runs a program to its end; returns the seconds that took."""
    start = time.monotonic()
    status, said = Sitting(arguments, folder).end()
    if status:
        raise SystemExit(f"{' '.join(arguments)} ended with status {status}:\n{said}")
    return time.monotonic() - start


def phase(run: Path, whole: Path) -> str:
    """How far a run has come."""
    if not run.exists():
        return "starting"
    taken = checkpoint.steps(run)
    if not taken:
        return "before a checkpoint"
    return "training" if taken[-1] < checkpoint.steps(whole)[-1] else "ending"


def differences(run: Path, whole: Path) -> list[str]:
    """What of a run is other than in the undisturbed one; times and memory do not count."""

    def seen(folder: Path) -> dict[str, Any]:
        weights = {
            f"weights at {step}": (checkpoint.at(folder, step) / "model.safetensors").read_bytes() for step in checkpoint.steps(folder)
        }
        result = read_json(folder / "result.json")
        best = (folder / "best.json").read_bytes() if (folder / "best.json").exists() else b""
        metrics = [{key: value for key, value in line.items() if key != "seconds"} for line in log.read(folder)]
        told = {key: value for key, value in result.items() if key not in ("config", "train_seconds", "peak_megabytes")}
        return weights | {"best.json": best, "metrics.jsonl": metrics, "result.json": told}

    one, other = seen(whole), seen(run)
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def disturb(arguments: list[str], run: Path, whole: Path, fault: Fault, tally: Tally, most: int, longest: float) -> None:
    """One run, disturbed in every sitting but the last, which ends before its moment comes, or after ``most`` disturbances."""
    strikes = 0
    while True:
        sitting = Sitting([*arguments, f"out={run.relative_to(run.parent.parent)}", "resume=auto"], run.parent.parent)
        moment = time.monotonic() + random.uniform(0, longest)
        while sitting.process.poll() is None and (strikes == most or time.monotonic() < moment):
            time.sleep(0.005)
        struck = sitting.process.poll() is None
        if struck:
            tally.phases[phase(run, whole)] += 1
            strikes += 1
            fault.strike(sitting.process)
        status, said = sitting.end()
        expected = fault.statuses if struck else (0,)
        if status not in expected or "Traceback" in said:
            tally.failures.append(f"status {status} after {strikes}: {said[-2000:]}")
            break
        if status == 0:
            other = differences(run, whole)
            tally.failures += [f"after {strikes}: other {', '.join(other)}"] if other else []
            tally.survived += 0 if other else strikes
            break
    tally.tried += strikes


def inject(arguments: list[str], run: Path, name: str, tally: Tally) -> None:
    """One run in which something goes wrong in an environment, if it gets as far as that."""
    settings, said_then = INJECTED[name]
    marker, at = run.with_suffix(".struck"), random.randint(20, 600)
    given = [f"{WHERE[key]}={value}" for key, value in (setting.split("=") for setting in settings)]
    given += ["task.env.id=faults:Faulty-v0", "+task.env.kwargs.task=dprl/Avoid-v0", f"+task.env.kwargs.at={at}"]
    sitting = Sitting([*arguments, *FEW, *given, f"+task.env.kwargs.marker={marker}", f"out={run}"], run.parent.parent)
    status, said = sitting.end()
    if not marker.exists():
        return
    marker.unlink()
    tally.tried += 1
    well = status == 0 and (run / "result.json").is_file() and said_then in said and "Traceback" not in said
    tally.survived += well
    tally.phases["training" if "its episode is dropped" in said else "evaluation"] += 1
    if not well:
        tally.failures.append(f"status {status}, at step {at}: {said[-2000:]}")


def chaos(programs: list[str], faults: list[str], times: int, folder: Path) -> dict[str, dict[str, Tally]]:
    """Tallies by fault and program, from runs in ``folder``."""
    undisturbed(["scripts/demonstrations.py", "episodes=12"], folder)
    undisturbed([*PROGRAMS["pretrain"], "train.steps=800", "out=runs/base"], folder)
    tallies: dict[str, dict[str, Tally]] = {name: {} for name in faults}
    for program in programs:
        whole = folder / "runs" / program
        seconds = undisturbed([*PROGRAMS[program], f"out=runs/{program}"], folder)
        print(f"{program}: {seconds:.1f} s undisturbed", flush=True)
        for name in faults:
            if name in INJECTED and program == "pretrain":  # it steps no environment but to evaluate
                continue
            tally = tallies[name][program] = Tally()
            for number in itertools.count():
                if tally.tried >= times or (tally.failures and tally.tried == 0):
                    break
                run = folder / "runs" / f"{program}-{name.replace(' ', '-')}-{number}"
                if name in FAULTS:
                    disturb(PROGRAMS[program], run, whole, FAULTS[name], tally, times - tally.tried, seconds)
                else:
                    inject(PROGRAMS[program], run, name, tally)
                shutil.rmtree(run, ignore_errors=True)
            print(f"{program}, {name}: {tally.survived} of {tally.tried} survived, {dict(tally.phases)}", flush=True)
            for failure in tally.failures:
                print(f"  {failure}", flush=True)
    return tallies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="what is run")
    parser.add_argument("--faults", nargs="+", choices=[*FAULTS, *INJECTED], default=[*FAULTS, *INJECTED], help="what befalls it")
    parser.add_argument("--times", type=int, default=20, help="disturbances of each kind, of each program")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "chaos.json")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        tallies = chaos(arguments.programs, arguments.faults, arguments.times, Path(folder))
    told = read_json(arguments.out) if arguments.out.is_file() else {}
    rows = []
    for name, by_program in tallies.items():
        programs = told.get(name, {"programs": {}})["programs"] | {program: vars(tally) for program, tally in by_program.items()}
        totals = {key: sum(tally[key] for tally in programs.values()) for key in ("tried", "survived")}
        told[name] = totals | {"programs": programs}
        for program, tally in by_program.items():
            rows.append([name, program, f"{tally.survived}/{tally.tried}", ", ".join(f"{k}: {n}" for k, n in sorted(tally.phases.items()))])
    write_json(arguments.out, told | {"about": {"programs": PROGRAMS, "seed": arguments.seed, "versions": versions()}})
    print(f"\n{markdown(rows, ['fault', 'program', 'survived', 'struck while'])}\n{arguments.out}")
    if any(tally.survived < tally.tried for by_program in tallies.values() for tally in by_program.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
