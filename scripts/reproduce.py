"""Runs the pipelines behind the tables, one after another, and puts their results into results/.

    python scripts/reproduce.py avoid                                   # about 10 minutes on two cores
    python scripts/reproduce.py predict                                 # after avoid: the other prediction targets
    python scripts/reproduce.py long                                    # after avoid: cloned for three times as long
    python scripts/reproduce.py ways                                    # after avoid: tuned with the regulariser
    python scripts/reproduce.py hopper --data hopper-medium.hdf5        # about 30 minutes

A run that ended is not run again, and one that was interrupted goes on.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SEEDS = {"avoid": (0, 1, 2), "predict": (0, 1, 2), "long": (0, 1, 2), "ways": (0, 1, 2), "hopper": (0, 1)}


def program(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / name), *arguments], check=True)


def run(name: str, task: str, algo: str, seed: int, *arguments: str) -> None:
    """One run and its result, unless it is there."""
    out = Path(f"runs/{task}-{algo}-{seed}")
    if not (out / "result.json").is_file():
        program(name, f"task={task}", f"seed={seed}", f"out={out}", "resume=auto", *arguments)
    (ROOT / "results").mkdir(exist_ok=True)
    shutil.copy(out / "result.json", ROOT / "results" / f"{out.name}.json")


def figure(name: str, out: Path, seed: int) -> None:
    """The first seed's figure, for the documentation."""
    if seed == 0:
        (ROOT / "docs" / "figures").mkdir(exist_ok=True)
        shutil.copy(out / "comparison.png", ROOT / "docs" / "figures" / f"{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=SEEDS, help="which pipelines")
    parser.add_argument("--data", help="for hopper: a D4RL-layout HDF5 file")
    parser.add_argument("--seeds", type=int, nargs="+", help="these only")
    arguments = parser.parse_args()
    what, data = arguments.what, arguments.data
    if what == "hopper" and not data:
        parser.error("hopper wants --data <a D4RL-layout HDF5 file>")
    for seed in arguments.seeds or SEEDS[what]:
        if what == "hopper":
            run("pretrain.py", "hopper", "bc", seed, f"data.path={data}")
            run("finetune.py", "hopper", "dppo", seed, "algo=dppo")
        elif what == "predict":
            for target in ("noise", "v"):
                run("pretrain.py", "avoid", f"bc_{target}", seed, f"policy.predict={target}", f"name=bc_{target}")
        elif what == "long":
            run("pretrain.py", "avoid", "bc_long", seed, "train.steps=45000", "train.save_every=15000", "name=bc_long")
        elif what == "ways":
            run("finetune.py", "avoid", "dppo_ways", seed, "algo=dppo_ways")
            figure("avoid_ways", Path(f"runs/avoid-dppo_ways-{seed}"), seed)
        else:
            if not Path(f"data/avoid-{seed}.hdf5").is_file():
                program("scripts/demonstrations.py", f"seed={seed}")
            run("pretrain.py", "avoid", "bc", seed)
            run("pretrain.py", "avoid", "mse", seed, "policy=regression", "name=mse")
            run("finetune.py", "avoid", "dppo", seed, "algo=dppo")
            figure("avoid", Path(f"runs/avoid-dppo-{seed}"), seed)


if __name__ == "__main__":
    main()
