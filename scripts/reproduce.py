"""Runs the pipelines behind the tables, one after another, and puts their results into results/.

    python scripts/reproduce.py avoid                        # about 10 minutes on two cores
    python scripts/reproduce.py predict                      # after avoid: the other prediction targets
    python scripts/reproduce.py ways                         # after avoid: tuned with the regulariser
    python scripts/reproduce.py online                       # after avoid: IDQL offline and online, guidance, baselines
    python scripts/reproduce.py hopper --data <folder>       # about 30 minutes
    python scripts/reproduce.py idql --data <folder>         # about 60 minutes
    python scripts/reproduce.py asking --data <folder>       # policies that are asked for a return
    python scripts/reproduce.py compared                     # after avoid and ways: LSTM-GMM, implicit BC, BeT; the figure of ways
    python scripts/reproduce.py pusht --data <folder>        # about 3 hours of a core: U-Net and transformer, and other ways to act
    python scripts/reproduce.py pusht_compared --data <folder>  # about 70 minutes of a core: policies of every kind, 10 minutes each
    python scripts/reproduce.py pusht_image --data <folder>  # about an hour of a core: from pictures, and blind

``<folder>`` holds D4RL-layout files: hopper-medium.hdf5, hopper-medium-replay.hdf5, halfcheetah-medium.hdf5; for Push-T
pusht_cchi_v7_replay.zarr.zip. A run that ended is not run again, and one that was interrupted goes on.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dprl import log, report
from dprl.files import read_json

ROOT = Path(__file__).parent.parent
LOGGED = {"medium_replay": "hopper", "medium": "hopper", "halfcheetah_medium": "halfcheetah"}  # data: the task
# a policy for ranking: five reverse steps of a small network, so that many candidates cost little
SMALL = ("width=256", "policy.schedule.sample_steps=5", "train.steps=16000", "train.save_every=8000")
GUIDED = ("num_envs=1", "evaluation.num_envs=50", "evaluation.episodes=50", "evaluation.final_episodes=100")
MANY = "algo.actor.candidates=32"
FEW = "algo.actor.candidates=4"  # that are guided
ONLINE = (MANY, "num_envs=16", "algo.offline_steps=2000", "algo.online_steps=20000", "evaluation.every=6")
ROLLOUTS = ("algo.critic=monte_carlo", "algo.actor.candidates=4", "name=guided_rollouts", "num_envs=16", "algo.offline_steps=5000")
OFFLINE = ("num_envs=1", "evaluation.every=10", "evaluation.choose=last", "evaluation.num_envs=50", "evaluation.final_episodes=100")
# one thread, so that two runs can go on at a time on two cores
PUSHT = ("threads=1", "train.precision=bf16", "train.batch=128", "train.lr=5e-4", "train.lr_final=0.0", "train.warmup=0.02")
PUSHT += ("train.ema=0.999", "train.log_every=250", "evaluation.episodes=50", "evaluation.final_episodes=200")
FAST = ("policy.predict=clean", "policy.schedule.sample_steps=16", "policy.schedule.eta=0.0")
LONG = ("policy.horizon=20",)  # so that 16 actions can be executed
COMPARED = {"lstm_gmm": 6000, "implicit": 3200, "bet": 4000}  # policies, and their gradient steps: about 4 minutes of a core each
EACH = ("threads=1", "train.log_every=200", "train.save_every=1000")
# a step at a time, told from chunks all over the range: negatives that slopes brought near taught nothing in this time
IMPLICIT = ("policy.obs_steps=1", "policy.horizon=1", "policy.act_steps=1", "policy.negatives=128", "policy.langevin_negatives=0")
IMPLICIT += ("policy.inference=derivative_free", "policy.samples=128", "policy.derivative_free.steps=4")
# what makes ten minutes of a core of each kind of policy on Push-T; the smallest network is faster in float32
SAME_TIME = {
    "unet_small": ("train.steps=5600", *FAST, *LONG, "train.save_every=1400"),
    "regression": ("train.steps=56000", "width=1024", "train.save_every=14000"),
    "lstm_gmm": ("train.steps=40000", "train.save_every=10000"),
    "implicit": ("train.steps=4200", "width=512", "train.batch=64", *IMPLICIT, "train.save_every=2100"),
    "bet": ("train.steps=10000", "train.precision=fp32", "train.save_every=2500"),
}
BLIND = ("task.env.observe.keys=[agent_pos]", 'data.observe=["state[:2]"]')  # the agent's place alone


class Pipeline(NamedTuple):
    """``work`` of a seed and the folder of data, which ``wants`` says what it must hold."""

    work: Callable[[int, Path], None]
    seeds: tuple[int, ...]
    wants: str | None = None


def learning(name: str, runs: dict[str, str]) -> None:
    """The figure of coverage along training."""
    lines = {label: log.read(Path("runs") / run) for label, run in runs.items()}
    report.save(report.curves(lines, "evaluation/max_coverage"), ROOT / "docs" / "figures" / f"{name}.png")


def acting(name: str, run: str, key: str) -> None:
    """The figure of what a policy does with other settings of ``key``."""
    rows = [row for row in read_json(Path("runs") / run / "sweep.json")["rows"] if key in row["settings"]]
    report.save(report.sweep(rows, key), ROOT / "docs" / "figures" / f"{name}.png")


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


def avoid(seed: int, data: Path) -> None:
    """Cloning, regression and DPPO on the default task."""
    if not Path(f"data/avoid-{seed}.hdf5").is_file():
        program("scripts/demonstrations.py", f"seed={seed}")
    run("pretrain.py", "avoid", "bc", seed)
    run("pretrain.py", "avoid", "mse", seed, "policy=regression", "name=mse")
    run("finetune.py", "avoid", "dppo", seed, "algo=dppo")
    run("finetune.py", "avoid", "dppo_fp32", seed, "algo=dppo", "algo.precision=fp32", "name=dppo_fp32")
    figure("avoid", Path(f"runs/avoid-dppo-{seed}"), seed)


def predict(seed: int, data: Path) -> None:
    """The other prediction targets."""
    for target in ("noise", "v"):
        run("pretrain.py", "avoid", f"bc_{target}", seed, f"policy.predict={target}", f"name=bc_{target}")


def ways(seed: int, data: Path) -> None:
    """DPPO that is held to the ways of the cloned policy."""
    run("finetune.py", "avoid", "dppo_ways", seed, "algo=dppo_ways")
    run("finetune.py", "avoid", "dppo_ways_bf16", seed, "algo=dppo_ways", "algo.precision=bf16", "name=dppo_ways_bf16")
    figure("avoid_ways", Path(f"runs/avoid-dppo_ways-{seed}"), seed)


def compared(seed: int, data: Path) -> None:
    """The policies that Diffusion Policy is compared with, on the default task; and which ways each takes."""
    for policy, steps in COMPARED.items():
        run("pretrain.py", "avoid", policy, seed, f"policy={policy}", f"name={policy}", f"train.steps={steps}", *EACH)
    shown = {"MSE regression": "mse", "LSTM-GMM": "lstm_gmm", "implicit BC": "implicit", "BeT": "bet", "diffusion": "bc"}
    shown |= {"diffusion + DPPO": "dppo", "diffusion + DPPO, held": "dppo_ways"}
    named = [f"{name}=runs/avoid-{algo}-{seed}" for name, algo in shown.items()]
    program("scripts/ways.py", f"data/avoid-{seed}.hdf5", *named, "--out", f"runs/ways-{seed}")
    shutil.copy(f"runs/ways-{seed}/ways.json", ROOT / "results" / "sweeps" / f"avoid-ways-{seed}.json")
    figure("avoid_policies", Path(f"runs/ways-{seed}"), seed, "ways")


def online(seed: int, data: Path) -> None:
    """IDQL offline and then online, guidance, and the baselines."""
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


def hopper(seed: int, data: Path) -> None:
    """Cloning and DPPO on Hopper."""
    run("pretrain.py", "hopper", "bc", seed, f"data.path={data / 'hopper-medium.hdf5'}")
    run("finetune.py", "hopper", "dppo", seed, "algo=dppo")
    run("finetune.py", "hopper", "dppo_fp32", seed, "algo=dppo", "algo.precision=fp32", "name=dppo_fp32")


def idql(seed: int, data: Path) -> None:
    """Cloning, IDQL and guidance on every file."""
    for file in LOGGED:
        logged(data, file, seed)


def logged(folder: Path, data: str, seed: int) -> None:
    """Cloning and IDQL on one file, and what else could have been ranked."""
    task = LOGGED[data]
    name = data.removeprefix(f"{task}_")
    path = f"data.path={folder / f'{task}-{name}.hdf5'.replace('_', '-')}"
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


def asking(seed: int, data: Path) -> None:
    """A policy conditioned on the return, and what it does as more is asked for."""
    path = f"data.path={data / 'hopper-medium-replay.hdf5'}"
    run("pretrain.py", "hopper", "bc_return", seed, path, "name=bc_return", "policy/condition=return", *SMALL)
    swept(f"hopper-bc_return-{seed}", "condition.weight=0,1,1.5,2,3", "condition.target=0.7,0.9,1.1")


def cloned(name: str, seed: int, data: Path, *arguments: str, task: str = "pusht_keypoints", policy: str | None = None) -> str:
    """A policy on Push-T, called as its configuration unless told otherwise; returns the run's name."""
    given = (f"data.path={data / 'pusht_cchi_v7_replay.zarr.zip'}", "data=pusht", f"policy={policy or name}", f"name={name}")
    run("pretrain.py", task, name, seed, *given, *PUSHT, *arguments)
    return f"{task}-{name}-{seed}"


def pusht(seed: int, data: Path) -> None:
    """The small U-Net; and once the small transformer, and what the U-Net does when it acts otherwise."""
    net = cloned("unet_small", seed, data, "train.steps=8000", *FAST, *LONG, "train.save_every=2000")
    if seed:
        return
    long = ("train.steps=32000", "train.save_every=5000", "policy.denoiser.dropout=0.0")
    other = cloned("transformer_small", seed, data, *FAST, *LONG, *long)
    swept(net, "act_steps=1,2,4,8,16", "--threads", "1", "--episodes", "100")
    swept(net, "schedule.sample_steps=16,8,4,2", "schedule.eta=0.0", "--threads", "1", "--episodes", "100")
    swept(net, "schedule.sample_steps=100", "schedule.eta=1.0", "--threads", "1", "--episodes", "100")
    learning("pusht_learning", {"U-Net": net, "transformer": other})
    acting("pusht_steps", net, "act_steps")
    acting("pusht_levels", net, "schedule.sample_steps")


def pusht_compared(seed: int, data: Path) -> None:
    """The diffusion policy and policies of other kinds, ten minutes of a core each."""
    for policy, arguments in SAME_TIME.items():
        cloned(f"short_{policy}", seed, data, *arguments, policy=policy)


def pusht_image(seed: int, data: Path) -> None:
    """From pictures and the agent's place, and from that alone."""
    same = ("train.steps=6000", "train.save_every=1500", "train.batch=64", "profile=true", *FAST)
    cloned("unet_image_small", seed, data, *same, task="pusht_image")
    cloned("blind", seed, data, *same, *BLIND, policy="unet_small")


PIPELINES = {
    "avoid": Pipeline(avoid, (0, 1, 2)),
    "predict": Pipeline(predict, (0, 1, 2)),
    "ways": Pipeline(ways, (0, 1, 2)),
    "compared": Pipeline(compared, (0, 1, 2)),
    "online": Pipeline(online, (0, 1, 2)),
    "hopper": Pipeline(hopper, (0, 1), "D4RL-layout HDF5 files"),
    "idql": Pipeline(idql, (0, 1, 2), "D4RL-layout HDF5 files"),
    "asking": Pipeline(asking, (0, 1, 2), "D4RL-layout HDF5 files"),
    "pusht": Pipeline(pusht, (0, 1), "Push-T's demonstrations"),
    "pusht_compared": Pipeline(pusht_compared, (0,), "Push-T's demonstrations"),
    "pusht_image": Pipeline(pusht_image, (0,), "Push-T's demonstrations"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=PIPELINES, help="which pipeline")
    parser.add_argument("--data", type=Path, help="a folder of what the pipeline learns from, if it is not made here")
    parser.add_argument("--seeds", type=int, nargs="+", help="these only")
    arguments = parser.parse_args()
    pipeline = PIPELINES[arguments.what]
    if pipeline.wants and not arguments.data:
        parser.error(f"{arguments.what} wants --data <a folder of {pipeline.wants}>")
    (ROOT / "results" / "sweeps").mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds or pipeline.seeds:
        pipeline.work(seed, arguments.data)


if __name__ == "__main__":
    main()
