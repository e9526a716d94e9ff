"""Run the pipelines behind the tables, one after another, and copy their results to results/.

python scripts/reproduce.py avoid                           # about 10 minutes on two cores
python scripts/reproduce.py predict                         # after avoid: the other prediction types
python scripts/reproduce.py modes                           # after avoid: DPPO with the regulariser
python scripts/reproduce.py online                          # after avoid: IDQL offline and online, guidance, baselines
python scripts/reproduce.py compared                        # after avoid and modes: LSTM-GMM, implicit BC and BeT
python scripts/reproduce.py hopper --data <folder>          # about 30 minutes
python scripts/reproduce.py idql --data <folder>            # about 60 minutes
python scripts/reproduce.py returns --data <folder>         # return-conditioned policies
python scripts/reproduce.py pusht --data <folder>           # about 3 hours of one core: U-Net, transformer and sweeps
python scripts/reproduce.py pusht_compared --data <folder>  # about 70 minutes of one core: 5 policies, 10 minutes each
python scripts/reproduce.py pusht_image --data <folder>     # about an hour of one core: with and without images

`<folder>` holds D4RL-layout files (hopper-medium.hdf5, hopper-medium-replay.hdf5, halfcheetah-medium.hdf5); for Push-T,
pusht_cchi_v7_replay.zarr.zip. Every run is an experiment of configs/experiment/. Completed runs are skipped and
interrupted ones are resumed.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dprl.training import logging, report
from dprl.utils.files import read_json

ROOT = Path(__file__).parent.parent
RESULTS, FIGURES = ROOT / "results", ROOT / "docs" / "figures"
Step = Callable[[int, Path], None]  # step(seed, data folder)


class Pipeline(NamedTuple):
    """Steps to run for each seed; `data` describes the files that --data must hold."""

    steps: list[Step]
    seeds: tuple[int, ...] = (0, 1, 2)
    data: str | None = None


def execute(*command: str) -> None:
    """Run Python with `command` and raise if it fails."""
    subprocess.run([sys.executable, *command], check=True)


def copy(source: str, target: Path) -> None:
    """Copy a file to `target`, creating the folder if needed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def train(program: str, task: str, name: str, *overrides: str, experiment: str | None = None) -> Step:
    """Return a step that trains in runs/<task>-<name>-<seed> and copies the result.

    Args:
        program: `pretrain` or `finetune`.
        task: The task.
        name: Name of the run.
        *overrides: Settings, in which {seed} and {data} are replaced.
        experiment: The recipe; None for `<task>_<name>`.
    """
    run = f"{task}-{name}"

    def step(seed: int, data: Path) -> None:
        out = f"runs/{run}-{seed}"
        if not Path(out, "result.json").is_file():
            settings = [f"experiment={experiment or f'{task}_{name}'}", f"name={name}", f"seed={seed}", f"out={out}"]
            settings += [override.format(seed=seed, data=data) for override in overrides]
            execute("-m", "dprl", program, *settings, "resume=auto")
        copy(f"{out}/result.json", RESULTS / f"{run}-{seed}.json")

    return step


pretrain, finetune = partial(train, "pretrain"), partial(train, "finetune")


def baseline(name: str, env_steps: int) -> Step:
    """Return a step that trains a Stable-Baselines3 baseline on `avoid`."""

    def step(seed: int, data: Path) -> None:
        out = f"runs/avoid-{name}-{seed}"
        if not Path(out, "result.json").is_file():
            execute(
                "-m", "dprl", "baseline", f"baseline={name}", f"env_steps={env_steps}", f"seed={seed}", f"out={out}"
            )
        copy(f"{out}/result.json", RESULTS / f"avoid-{name}-{seed}.json")

    return step


def demonstrations(seed: int, data: Path) -> None:
    """Record demonstrations of `avoid` unless they exist."""
    if not Path(f"data/avoid-{seed}.hdf5").is_file():
        execute("-m", "dprl", "demos", f"seed={seed}")


def sweep(run: str, *arguments: str) -> Step:
    """Return a step that evaluates a run's policy with other settings of its actor."""

    def step(seed: int, data: Path) -> None:
        execute("-m", "dprl", "sweep", f"runs/{run}-{seed}", *arguments)
        copy(f"runs/{run}-{seed}/sweep.json", RESULTS / "sweeps" / f"{run}-{seed}.json")

    return step


def figure(name: str, run: str, file: str = "comparison") -> Step:
    """Return a step that copies a figure of the first seed's run to the documentation."""
    return first_seed(lambda seed, data: copy(f"runs/{run}-{seed}/{file}.png", FIGURES / f"{name}.png"))


def learning_figure(name: str, **runs: str) -> Step:
    """Return a step that draws coverage along training of `label=run`."""

    def step(seed: int, data: Path) -> None:
        curves = {label.replace("_", "-"): logging.read(Path(f"runs/{run}-{seed}")) for label, run in runs.items()}
        report.save(report.curves(curves, "evaluation/max_coverage"), FIGURES / f"{name}.png")

    return step


def sweep_figure(name: str, run: str, key: str) -> Step:
    """Return a step that draws the rows of a run's sweep that set `key`."""

    def step(seed: int, data: Path) -> None:
        rows = [row for row in read_json(Path(f"runs/{run}-{seed}/sweep.json"))["rows"] if key in row["settings"]]
        report.save(report.sweep(rows, key), FIGURES / f"{name}.png")

    return step


def modes(seed: int, data: Path) -> None:
    """Count the modes of `avoid` that each policy uses, and draw their paths."""
    runs = {
        "MSE regression": "regression",
        "LSTM-GMM": "lstm_gmm",
        "implicit BC": "ibc",
        "BeT": "bet",
        "diffusion": "bc",
    }
    runs |= {"diffusion + DPPO": "dppo", "diffusion + DPPO + KL": "dppo_modes"}
    named = [f"{label}=runs/avoid-{name}-{seed}" for label, name in runs.items()]
    out = f"runs/avoid-modes-{seed}"
    execute(str(ROOT / "examples" / "avoid_modes.py"), f"data/avoid-{seed}.hdf5", *named, "--out", out)
    copy(f"{out}/modes.json", RESULTS / "sweeps" / f"avoid-modes-{seed}.json")


def first_seed(step: Step) -> Step:
    """Return `step` restricted to seed 0."""

    def only_first(seed: int, data: Path) -> None:
        if seed == 0:
            step(seed, data)

    return only_first


def logged(task: str, dataset: str) -> list[Step]:
    """Return behavior cloning, IDQL and guidance from one file of logged data."""
    path = f"data.path={{data}}/{task}-{dataset.replace('_', '-')}.hdf5"
    policy, critic = (f"runs/{task}-{name}_{dataset}-{{seed}}" for name in ("bc", "idql"))
    guidance = (path, f"policy_from={policy}", f"algo.critic_from={critic}")
    return [
        pretrain(task, f"bc_{dataset}", path, experiment=f"{task}_bc_small"),
        finetune(task, f"idql_{dataset}", path, f"policy_from={policy}", experiment=f"{task}_idql"),
        finetune(task, f"guided_{dataset}", *guidance, experiment=f"{task}_guided"),
        finetune(task, f"guided_ranked_{dataset}", *guidance, experiment=f"{task}_guided_ranked"),
        figure(f"{task}_guided_{dataset}", f"{task}-guided_{dataset}", "choices"),
    ]


def candidates(run: str) -> list[Step]:
    """Return sweeps over the number of candidates and their selection."""
    return [
        sweep(run, "candidates=1,2,4,8,16,32,64", "select=argmax"),
        sweep(run, "candidates=8,32,64", "select=softmax", "temperature=0.03,0.1"),
    ]


def pusht(task: str, name: str) -> Step:
    """Return a step of behavior cloning on Push-T."""
    return pretrain(task, name, "data.path={data}/pusht_cchi_v7_replay.zarr.zip")


keypoints = partial(pusht, "pusht_keypoints")
UNET = "pusht_keypoints-unet_small"
ACTING = ("threads=1", "n=100")
D4RL, ZARR = "D4RL-layout HDF5 files", "the demonstrations of Push-T"
PIPELINES = {
    "avoid": Pipeline(
        [
            demonstrations,
            pretrain("avoid", "bc"),
            pretrain("avoid", "regression"),
            finetune("avoid", "dppo"),
            finetune("avoid", "dppo_fp32"),
            figure("avoid", "avoid-dppo"),
        ]
    ),
    "predict": Pipeline([pretrain("avoid", "bc_epsilon"), pretrain("avoid", "bc_v_prediction")]),
    "modes": Pipeline(
        [
            finetune("avoid", "dppo_modes"),
            finetune("avoid", "dppo_modes_bf16"),
            figure("avoid_modes", "avoid-dppo_modes"),
        ]
    ),
    "compared": Pipeline(
        [
            pretrain("avoid", "lstm_gmm"),
            pretrain("avoid", "ibc"),
            pretrain("avoid", "bet"),
            modes,
            figure("avoid_policies", "avoid-modes", "modes"),
        ]
    ),
    "online": Pipeline(
        [
            finetune("avoid", "idql"),
            finetune("avoid", "guided_keep_out"),
            figure("avoid_guided", "avoid-guided_keep_out"),
            finetune("avoid", "guided"),
            finetune("avoid", "guided_ranked"),
            finetune("avoid", "guided_rollouts"),
            baseline("sac", 100_000),
            baseline("ppo", 400_000),
        ]
    ),
    "hopper": Pipeline(
        [
            pretrain("hopper", "bc", "data.path={data}/hopper-medium.hdf5"),
            finetune("hopper", "dppo"),
            finetune("hopper", "dppo_fp32"),
        ],
        seeds=(0, 1),
        data=D4RL,
    ),
    "idql": Pipeline(
        [
            *logged("hopper", "medium_replay"),
            sweep("hopper-guided_medium_replay", "normalize=sample,data", "scale=0.05,0.1,0.2,0.3,0.4"),
            *candidates("hopper-idql_medium_replay"),
            *logged("hopper", "medium"),
            # long episodes: the sweep takes longer than training
            *map(first_seed, candidates("hopper-idql_medium")),
            *logged("halfcheetah", "medium"),
            sweep("halfcheetah-idql_medium", "candidates=1,2,4,8,32", "select=argmax", "n=50"),
            sweep("halfcheetah-idql_medium", "candidates=8", "select=softmax", "temperature=0.03", "n=50"),
        ],
        data=D4RL,
    ),
    "returns": Pipeline(
        [
            pretrain("hopper", "bc_return", "data.path={data}/hopper-medium-replay.hdf5"),
            sweep("hopper-bc_return", "condition.weight=0,1,1.5,2,3", "condition.target=0.7,0.9,1.1"),
        ],
        data=D4RL,
    ),
    "pusht": Pipeline(
        [
            keypoints("unet_small"),
            *map(
                first_seed,
                [
                    keypoints("transformer_small"),
                    sweep(UNET, "act_steps=1,2,4,8,16", *ACTING),
                    sweep(UNET, "schedule.num_inference_steps=16,8,4,2", "schedule.eta=0.0", *ACTING),
                    sweep(UNET, "schedule.num_inference_steps=100", "schedule.eta=1.0", *ACTING),
                    learning_figure("pusht_learning", U_Net=UNET, transformer="pusht_keypoints-transformer_small"),
                    sweep_figure("pusht_act_steps", UNET, "act_steps"),
                    sweep_figure("pusht_inference_steps", UNET, "schedule.num_inference_steps"),
                ],
            ),
        ],
        seeds=(0, 1),
        data=ZARR,
    ),
    "pusht_compared": Pipeline(
        [
            keypoints("short_unet_small"),
            keypoints("short_regression"),
            keypoints("short_lstm_gmm"),
            keypoints("short_ibc"),
            keypoints("short_bet"),
        ],
        seeds=(0,),
        data=ZARR,
    ),
    "pusht_image": Pipeline([pusht("pusht_image", "unet_small"), keypoints("blind")], seeds=(0,), data=ZARR),
}


def main() -> None:
    """Run the pipeline that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", choices=PIPELINES, help="pipeline to run")
    parser.add_argument("--data", type=Path, help="folder of the files that the pipeline learns from")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds to run (default: all)")
    arguments = parser.parse_args()
    pipeline = PIPELINES[arguments.pipeline]
    if pipeline.data and not arguments.data:
        parser.error(f"{arguments.pipeline} requires --data <a folder of {pipeline.data}>")
    for seed in arguments.seeds or pipeline.seeds:
        for step in pipeline.steps:
            step(seed, arguments.data)


if __name__ == "__main__":
    main()
