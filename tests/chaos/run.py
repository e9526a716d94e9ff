"""Interrupt short runs at random moments, resume them, and compare the results with uninterrupted runs, bit for bit.

python tests/chaos/run.py                                             # every fault on every program, 20 times each
python tests/chaos/run.py --programs dppo --faults kill term --times 5

A run is interrupted, resumed and interrupted again until it ends by itself. It survived if its result equals that of
the uninterrupted run. A fault inside an environment (a worker that dies or hangs, a NaN) changes the training data; the
run survived if it reported the fault and ended with a result. Prints a table and updates results/chaos.json, where the
results of faults and programs that this call does not run stay. A new fault is a row of `FAULTS` or `INJECTED`.
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

from dprl.cli.program import FULL_STATUS
from dprl.training import checkpoint, logging
from dprl.training.report import markdown
from dprl.utils.files import read_json, write_json
from dprl.utils.signals import STATUS
from dprl.utils.system import versions

ROOT = Path(__file__).parent.parent.parent
EVALUATION = ["evaluation.num_envs=8", "evaluation.episodes=8", "evaluation.final_episodes=40", "threads=1"]
POLICY = ["policy.denoiser.hidden_dim=64", "policy.schedule.num_train_timesteps=5"]
FINETUNE = ["finetune.py", *EVALUATION, "policy_from=runs/base", "num_envs=8", "evaluation.every=3"]
DPPO = ["algo=dppo", "algo.env_steps=20000", "algo.chunks=10", "algo.actor.ft_denoising_steps=3"]
IDQL = ["algo=idql", "algo.offline_steps=200", "algo.updates=25", "algo.batch_size=64", "algo.critic_warmup=50"]
IDQL += ["algo.online_steps=3000", "algo.online_start=500", "algo.bc_lr=1e-4", "algo.utd=0.1"]
TRAIN = ["train.batch_size=64", "train.log_every=100", "train.steps=2400", "train.save_every=400"]
PROGRAMS = {
    "pretrain": ["pretrain.py", *POLICY, *EVALUATION, *TRAIN],
    "dppo": [*FINETUNE, *DPPO],
    "idql": [*FINETUNE, *IDQL],
}


@dataclass(frozen=True)
class Fault:
    """A fault that hits a running process.

    Args:
        strike: Applies the fault to the process.
        statuses: Exit statuses that are allowed after it; 0 if the process may complete.
    """

    strike: Callable[[subprocess.Popen], None]
    statuses: tuple[int, ...]


def fill_disk(process: subprocess.Popen) -> None:
    """Forbid the process to extend any file, as on a full disk."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))


FAULTS = {
    "kill": Fault(lambda process: process.kill(), (-signal.SIGKILL,)),
    # -SIGTERM: the signal arrived before the program had installed its handler
    "term": Fault(lambda process: process.terminate(), (0, STATUS, -signal.SIGTERM)),
    "disk": Fault(fill_disk, (0, FULL_STATUS)),
}

# Faults that occur once, in one environment at a random step (tests/helpers/faults.py): settings, and the message that
# the run must print.
FEW_ENVS = ["num_envs=2", "evaluation.num_envs=2", "evaluation.final_episodes=10"]
ASYNC = "task.env.backend=async"
INJECTED = {
    "worker dies": (["+task.env.kwargs.what=exit", ASYNC], "restart 1 of"),
    "worker hangs": (["+task.env.kwargs.what=hang", ASYNC, "guards.workers.timeout=5"], "restart 1 of"),
    "NaN observed": (["+task.env.kwargs.what=observation"], "is nan at step"),
    "infinite reward": (["+task.env.kwargs.what=reward"], "is inf at step"),
}


@dataclass
class Tally:
    """Results of one fault on one program."""

    tried: int = 0
    survived: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def start(arguments: list[str], folder: Path) -> subprocess.Popen:
    """Start a program of the repository in `folder`."""
    command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # a pipe, since a file could not grow on a full disk
    output: Any = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=folder, env=environment, **output)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Wait for a process; return its status and output."""
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def undisturbed(arguments: list[str], folder: Path) -> float:
    """Run a program to its end; return the seconds it took."""
    begin = time.monotonic()
    status, output = finish(start(arguments, folder))
    if status:
        raise SystemExit(f"{' '.join(arguments)} ended with status {status}:\n{output}")
    return time.monotonic() - begin


def phase(run: Path, whole: Path) -> str:
    """Return the phase that a run has reached; `whole` is the undisturbed run."""
    if not run.exists():
        return "starting"
    steps = checkpoint.steps(run)
    if not steps:
        return "before a checkpoint"
    return "training" if steps[-1] < checkpoint.steps(whole)[-1] else "ending"


def contents(run: Path) -> dict[str, Any]:
    """Return what must be equal in two runs: everything but times and memory."""
    out: dict[str, Any] = {}
    for step in checkpoint.steps(run):
        out[f"weights at {step}"] = (checkpoint.at(run, step) / "model.safetensors").read_bytes()
    out["best.json"] = (run / "best.json").read_bytes() if (run / "best.json").exists() else b""
    out["metrics.jsonl"] = [{k: v for k, v in line.items() if k != "seconds"} for line in logging.read(run)]
    ignored = ("config", "train_seconds", "peak_megabytes")
    out["result.json"] = {k: v for k, v in read_json(run / "result.json").items() if k not in ignored}
    return out


def differences(run: Path, whole: Path) -> list[str]:
    """Return the names of contents in which a run differs from the undisturbed one."""
    one, other = contents(whole), contents(run)
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def disturb(
    arguments: list[str], run: Path, whole: Path, fault: Fault, tally: Tally, limit: int, longest: float
) -> None:
    """Run a program with faults at random moments until it completes before the next fault, or after `limit` faults.

    Args:
        arguments: The program and its settings.
        run: Folder of the run.
        whole: Folder of the undisturbed run.
        fault: The fault.
        tally: Receives the results.
        limit: Number of faults at most.
        longest: Largest delay of a fault, in seconds.
    """
    strikes = 0
    while True:
        folder = run.parent.parent
        process = start([*arguments, f"out={run.relative_to(folder)}", "resume=auto"], folder)
        moment = time.monotonic() + random.uniform(0, longest)
        while process.poll() is None and (strikes == limit or time.monotonic() < moment):
            time.sleep(0.005)
        struck = process.poll() is None
        if struck:
            tally.phases[phase(run, whole)] += 1
            strikes += 1
            fault.strike(process)
        status, output = finish(process)
        if status not in (fault.statuses if struck else (0,)) or "Traceback" in output:
            tally.failures.append(f"status {status} after {strikes}: {output[-2000:]}")
            break
        if status == 0:
            different = differences(run, whole)
            if different:
                tally.failures.append(f"after {strikes}: different {', '.join(different)}")
            else:
                tally.survived += strikes
            break
    tally.tried += strikes


def inject(arguments: list[str], run: Path, name: str, tally: Tally) -> None:
    """Run a program with a fault in an environment; it does not count if the run ends before the fault."""
    settings, message = INJECTED[name]
    marker, at = run.with_suffix(".struck"), random.randint(20, 600)
    faulty = ["task.env.id=tests.helpers.faults:Faulty-v0", "+task.env.kwargs.task=dprl/Avoid-v0"]
    faulty += [f"+task.env.kwargs.at={at}", f"+task.env.kwargs.marker={marker}", *settings]
    status, output = finish(start([*arguments, *FEW_ENVS, *faulty, f"out={run}"], run.parent.parent))
    if not marker.exists():
        return
    marker.unlink()
    tally.tried += 1
    survived = status == 0 and (run / "result.json").is_file() and message in output and "Traceback" not in output
    tally.survived += survived
    tally.phases["training" if "its episode is dropped" in output else "evaluation"] += 1
    if not survived:
        tally.failures.append(f"status {status}, at step {at}: {output[-2000:]}")


def chaos(programs: list[str], faults: list[str], times: int, folder: Path) -> dict[str, dict[str, Tally]]:
    """Run all faults on all programs; return the tallies by fault and program."""
    undisturbed(["dprl/__main__.py", "demos", "episodes=12"], folder)
    undisturbed([*PROGRAMS["pretrain"], "train.steps=800", "out=runs/base"], folder)
    tallies: dict[str, dict[str, Tally]] = {name: {} for name in faults}
    for program in programs:
        whole = folder / "runs" / program
        seconds = undisturbed([*PROGRAMS[program], f"out=runs/{program}"], folder)
        print(f"{program}: {seconds:.1f} s undisturbed", flush=True)
        for name in faults:
            if name in INJECTED and program == "pretrain":  # it steps environments only to evaluate
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


def save(out: Path, tallies: dict[str, dict[str, Tally]], seed: int) -> None:
    """Update the file of results with new tallies."""
    results = read_json(out) if out.is_file() else {}
    for name, by_program in tallies.items():
        programs = results.get(name, {"programs": {}})["programs"]
        programs |= {program: vars(tally) for program, tally in by_program.items()}
        totals = {key: sum(tally[key] for tally in programs.values()) for key in ("tried", "survived")}
        results[name] = totals | {"programs": programs}
    write_json(out, results | {"about": {"programs": PROGRAMS, "seed": seed, "versions": versions()}})


def table(tallies: dict[str, dict[str, Tally]]) -> str:
    """Return a row for each fault and program."""
    rows = []
    for name, by_program in tallies.items():
        for program, tally in by_program.items():
            phases = ", ".join(f"{key}: {count}" for key, count in sorted(tally.phases.items()))
            rows.append([name, program, f"{tally.survived}/{tally.tried}", phases])
    return markdown(rows, ["fault", "program", "survived", "phase of the run"])


def main() -> None:
    """Run the faults that the command line names; exit with status 1 if a run did not survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="programs to run")
    faults = [*FAULTS, *INJECTED]
    parser.add_argument("--faults", nargs="+", choices=faults, default=faults, help="faults to apply")
    parser.add_argument("--times", type=int, default=20, help="number of faults of each kind, for each program")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "chaos.json", help="file to update")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        tallies = chaos(arguments.programs, arguments.faults, arguments.times, Path(folder))
    save(arguments.out, tallies, arguments.seed)
    print(f"\n{table(tallies)}\n{arguments.out}")
    if any(tally.survived < tally.tried for by_program in tallies.values() for tally in by_program.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
