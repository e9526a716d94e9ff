"""Check that two commits produce the same numbers, to the bit.

    python scripts/same_numbers.py 82df9de HEAD --data <folder>

Checks both commits out, runs the same short pipelines in each (cloning, DPPO in float32, IDQL, guidance; on Hopper
cloning and 30,000 environment steps of DPPO if `--data` holds hopper-medium.hdf5), and compares every metric of every
line and the results. Each commit receives the names of settings that it knows.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from dprl.training import legacy

ROOT = Path(__file__).parent.parent
RENAMED = {  # of a commit that has scripts/demonstrations.py: names before version 0.2
    "algo.actor.ft_denoising_steps": "algo.actor.tuned_steps",
    "algo.batch_size": "algo.batch",
    "train.batch_size": "train.batch",
    "algo.bc_lr": "algo.clone_lr",
}
SHORT = ("threads=1", "evaluation.num_envs=10", "evaluation.final_episodes=20", "evaluation.episodes=10")
CLONE = (*SHORT, "train.steps=3000", "train.save_every=1000", "train.log_every=100")
TUNE = (*SHORT, "evaluation.every=5")
IDQL = ("algo=idql", "algo.offline_steps=1000", "algo.updates=200", "algo.online_steps=4000", "algo.bc_lr=1e-4")
GUIDED = ("algo=guided", "algo.offline_steps=1000", "algo.scales=[0,0.1,0.2]")
PIPELINES: dict[str, list[tuple[str, ...]]] = {
    "avoid": [
        ("demos", "out=data/avoid.hdf5"),
        ("pretrain", *CLONE, "data.path=data/avoid.hdf5", "out=runs/bc"),
        (
            "finetune",
            *TUNE,
            "policy_from=runs/bc",
            "algo=dppo",
            "algo.precision=fp32",
            "algo.env_steps=60000",
            "out=runs/dppo",
        ),
        ("finetune", *TUNE, "policy_from=runs/bc", "data.path=data/avoid.hdf5", *IDQL, "out=runs/idql"),
        ("finetune", *TUNE, "policy_from=runs/bc", "data.path=data/avoid.hdf5", *GUIDED, "out=runs/guided"),
        (
            *(
                "finetune",
                *TUNE,
                "policy_from=runs/bc",
                "data.path=data/avoid.hdf5",
                *GUIDED,
                "algo.critic=monte_carlo",
            ),
            *("algo.actor.at=noised", "algo.energy_steps=50", "algo.updates=500", "out=runs/guided_energy"),
        ),
    ],
    "hopper": [
        ("pretrain", *CLONE, "task=hopper", "data.path={data}/hopper-medium.hdf5", "out=runs/hopper_bc"),
        (
            *("finetune", *TUNE, "task=hopper", "policy_from=runs/hopper_bc", "algo=dppo", "algo.precision=fp32"),
            *("algo.env_steps=30000", "algo.chunks=20", "out=runs/hopper_dppo"),
        ),
    ],
}


def run(checkout: Path, folder: Path, command: tuple[str, ...], data: str | None) -> None:
    """Run one command of a checkout in `folder`, unless its run is complete."""
    program, *arguments = (part.format(data=data) for part in command)
    out = folder / next(part.removeprefix("out=") for part in arguments if part.startswith("out="))
    if (out / "result.json").is_file() or out.is_file():
        return
    before = (checkout / "scripts/demonstrations.py").is_file()
    if before:
        arguments = [old_name(argument) for argument in arguments]
    script = "scripts/demonstrations.py" if program == "demos" and before else f"{program}.py"
    words = [str(checkout / script)] if before or program != "demos" else ["-m", "dprl", "demos"]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words, *arguments], cwd=folder, env=environment, check=True, capture_output=True)


def old_name(argument: str) -> str:
    """Return a setting in the names before version 0.2."""
    key, equals, value = argument.partition("=")
    return RENAMED.get(key, key) + equals + value


def numbers(run: Path) -> tuple[list[dict], dict]:
    """Return the metrics of a run without times, and its results."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    result = legacy.upgrade_result(json.loads((run / "result.json").read_text()))
    kept = ("pretrained", "finetuned", "env_steps", "evaluation_env_steps", "best_iteration")
    summaries = {
        key: dict(result[key]) if isinstance(result[key], dict) else result[key] for key in kept if key in result
    }
    for side in ("pretrained", "finetuned"):
        if "modes" in summaries.get(side, {}):
            summaries[side]["modes"] = {key: value for key, value in summaries[side]["modes"].items() if key != "key"}
    return metrics, summaries


def main() -> int:
    """Run and compare; return 1 if any number differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs=2, help="an older and a newer commit")
    parser.add_argument("--data", type=Path, help="folder with hopper-medium.hdf5")
    parser.add_argument("--folder", type=Path, help="folder for checkouts and runs, kept (default: a temporary one)")
    arguments = parser.parse_args()
    data = None if arguments.data is None else str(arguments.data.resolve())
    different = 0
    with tempfile.TemporaryDirectory() as temporary:
        base = (arguments.folder or Path(temporary)).resolve()
        for number, commit in enumerate(arguments.commits):
            checkout = base / f"checkout{number}"
            if not checkout.exists():
                subprocess.run(["git", "worktree", "add", "--detach", str(checkout), commit], cwd=ROOT, check=True)
        try:
            for name, commands in PIPELINES.items():
                if name == "hopper" and data is None:
                    continue
                for command in commands:
                    for number in range(2):
                        (base / f"runs{number}").mkdir(exist_ok=True)
                        run(base / f"checkout{number}", base / f"runs{number}", command, data)
                    out = next(part.removeprefix("out=") for part in command if part.startswith("out="))
                    if not out.startswith("runs/"):
                        continue
                    old, new = (numbers(base / f"runs{number}" / out) for number in range(2))
                    same = old == new
                    different += not same
                    print(
                        f"{out}: {len(old[0])} lines of metrics, {'equal to the bit' if same else 'DIFFERENT'}",
                        flush=True,
                    )
        finally:
            if arguments.folder is None:
                for number in range(2):
                    checkout = str(base / f"checkout{number}")
                    subprocess.run(["git", "worktree", "remove", "--force", checkout], cwd=ROOT, check=False)
    return int(different > 0)


if __name__ == "__main__":
    raise SystemExit(main())
