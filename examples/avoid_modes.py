"""Draw the demonstrations of `avoid` and the paths of policies, and count the modes that each of them uses.

python examples/avoid_modes.py data/avoid-0.hdf5 BC=runs/avoid-bc-0 DPPO=runs/avoid-dppo-0

Every policy runs the same held-out episodes. Writes modes.png and modes.json to --out.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from dprl.data.readers import d4rl
from dprl.envs.tasks import avoid
from dprl.rollout.evaluation import Evaluation, evaluate
from dprl.training import checkpoint, factory, report
from dprl.training.run import load_config
from dprl.utils.errors import UserError
from dprl.utils.files import write_json
from dprl.utils.system import versions

POSITION = [2, 3]  # columns of the observation: x and y of the effector
FIRST_SEED = 50_000  # no run validates or reports on these seeds
EPISODES = 400


def demonstrations(path: Path) -> Evaluation:
    """Return logged episodes as if they had just been evaluated."""
    data = d4rl.load(path)
    traces = []
    for i, (start, end) in enumerate(zip(data.starts.tolist(), data.ends.tolist(), strict=True)):
        steps = [data.obs[start:end].numpy()]
        if data.last_obs is not None:
            steps.append(data.last_obs[i : i + 1].numpy())
        traces.append(np.concatenate(steps))
    success = np.array([trace[-1, POSITION[1]] > avoid.FINISH for trace in traces])
    modes = np.array([avoid.mode_of(trace[:, POSITION]) for trace in traces], float)
    lengths = np.array([len(trace) for trace in traces])
    return Evaluation(list(range(len(traces))), success.astype(float), lengths, success, {"mode": modes}, traces)


def rollouts(run: Path, episodes: int, trust: bool) -> Evaluation:
    """Return held-out episodes of a run's policy.

    Args:
        run: Folder of a run on `avoid`.
        episodes: Number of episodes.
        trust: Build classes that are not part of dprl, if the run names any.

    Raises:
        UserError: If `run` is a run of another task.
    """
    cfg = DictConfig(load_config(run, "task", trust=trust))
    if cfg.task.name != "avoid":
        raise UserError(f"{run} is a run of another task", expected="avoid", got=cfg.task.name, fix="a run of avoid")
    actor = checkpoint.load(run, trust=trust).actor
    envs = factory.environments(cfg, actor, num_envs=50, trace=True)
    try:
        return evaluate(actor, envs, range(FIRST_SEED, FIRST_SEED + episodes))
    finally:
        envs.close()


def draw(evaluations: dict[str, Evaluation], out: Path) -> dict[str, Any]:
    """Draw the paths of each evaluation to `out`; return the summaries."""
    rows = 2 if len(evaluations) > 4 else 1
    columns = math.ceil(len(evaluations) / rows)
    size = (3.6 * columns, 4.6 * rows)
    figure, axes = report.pyplot().subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(evaluations) :]:
        axis.axis("off")
    summaries = {}
    for axis, (name, evaluation) in zip(axes.flat, evaluations.items(), strict=False):
        report.paths(axis, evaluation, columns=POSITION, field=avoid.draw)
        summaries[name] = summary = evaluation.summary("mode")
        count, entropy = summary["modes"]["count"], abs(summary["modes"]["entropy"])
        modes = f"{count} mode{'s' if count != 1 else ''}"
        axis.set_title(f"{name}: {100 * summary['success']:.0f} %, {modes}, {entropy:.2f} nats", fontsize=9)
    report.save(figure, out)
    return summaries


def parse_runs(arguments: list[str]) -> dict[str, Path]:
    """Return the folders of `name=folder` arguments, by name."""
    runs = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not equals:
            raise UserError(f"{argument} has no name", expected="name=folder", got=argument, fix=f"BC={argument}")
        runs[name] = Path(folder)
    return runs


def main() -> None:
    """Evaluate the runs that the command line names, and print the table of their modes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="file of demonstrations")
    parser.add_argument("runs", nargs="+", help="name=folder of runs on avoid")
    parser.add_argument("--out", type=Path, default=Path("runs/modes"), help="folder of the figure and the numbers")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="episodes of each policy")
    parser.add_argument("--trust", action="store_true", help="build classes of your own that the runs name")
    arguments = parser.parse_args()
    try:
        evaluations = {"demonstrations": demonstrations(arguments.data)}
        for name, run in parse_runs(arguments.runs).items():
            evaluations[name] = rollouts(run, arguments.episodes, arguments.trust)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    figure, numbers = arguments.out / "modes.png", arguments.out / "modes.json"
    summaries = draw(evaluations, figure)
    write_json(numbers, {"versions": versions(), "first_seed": FIRST_SEED, "policies": summaries})
    rows = []
    for name, summary in summaries.items():
        modes = summary["modes"]
        cells = [report.measure(summary), str(modes["count"]), f"{abs(modes['entropy']):.2f}", str(summary["n"])]
        rows.append([name, *cells])
    print(report.markdown(rows, ["policy", "success, 95 % CI", "modes", "entropy, nats", "episodes"]))
    print(f"figure:  {figure}\nnumbers: {numbers}")


if __name__ == "__main__":
    main()
