"""Runs the pipelines behind the tables, one after another, and puts their results into results/.

    python scripts/reproduce.py avoid                        # about 10 minutes on two cores
    python scripts/reproduce.py predict                      # after avoid: the other prediction targets
    python scripts/reproduce.py ways                         # after avoid: tuned with the regulariser
    python scripts/reproduce.py online                       # after avoid: IDQL offline and online, guidance, baselines
    python scripts/reproduce.py hopper --data <folder>       # about 30 minutes
    python scripts/reproduce.py idql --data <folder>         # about 60 minutes
    python scripts/reproduce.py asking --data <folder>       # policies that are asked for a return

``<folder>`` holds D4RL-layout files: hopper-medium.hdf5, hopper-medium-replay.hdf5, halfcheetah-medium.hdf5. A run that
ended is not run again, and one that was interrupted goes on.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SEEDS = {
    "avoid": (0, 1, 2),
    "predict": (0, 1, 2),
    "ways": (0, 1, 2),
    "online": (0, 1, 2),
    "hopper": (0, 1),
    "idql": (0, 1, 2),
    "asking": (0, 1, 2),
}
LOGGED = {"medium_replay": "hopper", "medium": "hopper", "halfcheetah_medium": "halfcheetah"}  # data: the task
# a policy for ranking: five reverse steps of a small network, so that many candidates cost little
SMALL = ("width=256", "policy.schedule.sample_steps=5", "train.steps=16000", "train.save_every=8000")
GUIDED = ("num_envs=1", "evaluation.num_envs=50", "evaluation.episodes=50", "evaluation.final_episodes=100")
MANY = "algo.actor.candidates=32"
FEW = "algo.actor.candidates=4"  # that are guided
ONLINE = (MANY, "num_envs=16", "algo.offline_steps=2000", "algo.online_steps=20000", "evaluation.every=6")
ROLLOUTS = ("algo.critic=monte_carlo", "algo.actor.candidates=4", "name=guided_rollouts", "num_envs=16", "algo.offline_steps=5000")
OFFLINE = ("num_envs=1", "evaluation.every=10", "evaluation.choose=last", "evaluation.num_envs=50", "evaluation.final_episodes=100")


def program(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / name), *arguments], check=True)


def run(name: str, task: str, algo: str, seed: int, *arguments: str) -> None:
    """One run and its result, unless it is there."""
    out = Path(f"runs/{task}-{algo}-{seed}")
    if not (out / "result.json").is_file():
        program(name, f"task={task}", f"seed={seed}", f"out={out}", "resume=auto", *arguments)
    shutil.copy(out / "result.json", ROOT / "results" / f"{out.name}.json")


def swept(run: str, *grid: str) -> None:
    """A run's policy with other settings, and the numbers of all its sweeps."""
    program("scripts/sweep.py", f"runs/{run}", *grid)
    shutil.copy(f"runs/{run}/sweep.json", ROOT / "results" / "sweeps" / f"{run}.json")


def figure(name: str, out: Path, seed: int, which: str = "comparison") -> None:
    """The first seed's figure, for the documentation."""
    if seed == 0:
        (ROOT / "docs" / "figures").mkdir(exist_ok=True)
        shutil.copy(out / f"{which}.png", ROOT / "docs" / "figures" / f"{name}.png")


def logged(folder: str, data: str, seed: int) -> None:
    """Cloning and IDQL on one file, and what else could have been ranked."""
    task = LOGGED[data]
    name = data.removeprefix(f"{task}_")
    path = f"data.path={Path(folder) / f'{task}-{name}.hdf5'.replace('_', '-')}"
    run("pretrain.py", task, f"bc_{name}", seed, path, f"name=bc_{name}", *SMALL)
    base = f"policy_from=runs/{task}-bc_{name}-{seed}"
    ranked = "algo.actor.candidates=8" if task == "halfcheetah" else MANY
    run("finetune.py", task, f"idql_{name}", seed, "algo=idql", ranked, path, base, f"name=idql_{name}", *OFFLINE)
    guided = ["algo=guided", path, f"name=guided_{name}", base, f"algo.critic_from=runs/{task}-idql_{name}-{seed}", *GUIDED]
    run("finetune.py", task, f"guided_{name}", seed, *guided)
    run("finetune.py", task, f"both_{name}", seed, *guided, FEW, f"name=both_{name}")
    if data == "medium_replay":
        swept(f"{task}-guided_{name}-{seed}", "normalize=sample,data", "scale=0.05,0.1,0.2,0.3,0.4")
    figure(f"{task}_guided_{name}", Path(f"runs/{task}-guided_{name}-{seed}"), seed, "choices")
    if seed and data == "medium":  # a sweep of long episodes takes longer than the training; its first seed shows the shape
        return
    many = (["candidates=1,2,4,8,16,32,64", "select=argmax"], ["candidates=8,32,64", "select=softmax", "temperature=0.03,0.1"])
    few = (
        ["candidates=1,2,4,8,32", "select=argmax", "--episodes", "50"],
        ["candidates=8", "select=softmax", "temperature=0.03", "--episodes", "50"],
    )
    for grid in few if task == "halfcheetah" else many:
        swept(f"{task}-idql_{name}-{seed}", *grid)


def asking(folder: str, seed: int) -> None:
    """A policy conditioned on the return, and what it does as more is asked for."""
    path = f"data.path={Path(folder) / 'hopper-medium-replay.hdf5'}"
    run("pretrain.py", "hopper", "bc_return", seed, path, "name=bc_return", "policy/condition=return", *SMALL)
    swept(f"hopper-bc_return-{seed}", "condition.weight=0,1,1.5,2,3", "condition.target=0.7,0.9,1.1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=SEEDS, help="which pipelines")
    parser.add_argument("--data", help="for hopper and idql: a folder of D4RL-layout HDF5 files")
    parser.add_argument("--files", nargs="+", choices=LOGGED, default=LOGGED, help="for idql: these only")
    parser.add_argument("--seeds", type=int, nargs="+", help="these only")
    arguments = parser.parse_args()
    what, data = arguments.what, arguments.data
    if what in ("hopper", "idql", "asking") and not data:
        parser.error(f"{what} wants --data <a folder of D4RL-layout HDF5 files>")
    (ROOT / "results" / "sweeps").mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds or SEEDS[what]:
        if what == "hopper":
            run("pretrain.py", "hopper", "bc", seed, f"data.path={Path(data) / 'hopper-medium.hdf5'}")
            run("finetune.py", "hopper", "dppo", seed, "algo=dppo")
        elif what == "idql":
            for file in arguments.files:
                logged(data, file, seed)
        elif what == "asking":
            asking(data, seed)
        elif what == "predict":
            for target in ("noise", "v"):
                run("pretrain.py", "avoid", f"bc_{target}", seed, f"policy.predict={target}", f"name=bc_{target}")
        elif what == "online":
            run("finetune.py", "avoid", "idql", seed, "algo=idql", *ONLINE)
            run("finetune.py", "avoid", "guided_clear", seed, "algo=guided_clear", "num_envs=1")
            figure("avoid_guided", Path(f"runs/avoid-guided_clear-{seed}"), seed)
            critic = f"algo.critic_from=runs/avoid-idql-{seed}"
            run("finetune.py", "avoid", "guided", seed, "algo=guided", critic, "num_envs=1")
            run("finetune.py", "avoid", "both", seed, "algo=guided", critic, FEW, "name=both", "num_envs=1")
            run("finetune.py", "avoid", "guided_rollouts", seed, "algo=guided", *ROLLOUTS)
            for baseline, steps in (("sac", 100_000), ("ppo", 400_000)):
                out = f"runs/avoid-{baseline}-{seed}"
                if not Path(out, "result.json").is_file():
                    program("scripts/baseline_sb3.py", f"baseline={baseline}", f"env_steps={steps}", f"seed={seed}", f"out={out}")
                shutil.copy(f"{out}/result.json", ROOT / "results" / f"avoid-{baseline}-{seed}.json")
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
