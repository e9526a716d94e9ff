"""Draws the demonstrations of `avoid` beside what policies make of them, and counts the ways that each uses.

python scripts/ways.py data/avoid-0.hdf5 MSE=runs/avoid-mse-0 diffusion=runs/avoid-bc-0 tuned=runs/avoid-dppo-0

Every policy runs the same held-out episodes. Writes ways.png and ways.json to --out.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from dprl import checkpoint, report, setup
from dprl import trust as trusting
from dprl.data import d4rl
from dprl.envs.avoid import FINISH, route
from dprl.errors import UserError, found
from dprl.evaluate import Evaluation, evaluate
from dprl.files import read_mapping, write_json
from dprl.versions import versions

PATH = [2, 3]  # the effector's place in an observation
FIRST_SEED = 50_000  # no run is watched, chosen or reported by these
EPISODES = 400


def demonstrations(path: Path) -> Evaluation:
    """Logged episodes as if they had just been run."""
    data = d4rl.load(path)
    obs = data.obs if data.last_obs is None else None
    traces = []
    for i, (start, end) in enumerate(zip(data.starts.tolist(), data.ends.tolist(), strict=True)):
        steps = [data.obs[start:end].numpy()] + ([] if obs is not None else [data.last_obs[i : i + 1].numpy()])  # type: ignore[index]
        traces.append(np.concatenate(steps))
    solved = np.array([trace[-1, PATH[1]] > FINISH for trace in traces])
    ways = np.array([route(trace[:, PATH]) for trace in traces], float)
    lengths = np.array([len(trace) for trace in traces])
    return Evaluation(list(range(len(traces))), solved.astype(float), lengths, solved, {"route": ways}, traces)


def rollouts(run: Path, episodes: int, trust: bool) -> Evaluation:
    """Episodes of a run's policy."""
    if not (run / "config.json").is_file():
        raise found(f"{run} is no run", "a run's folder", "no config.json in it", "name=runs/<run>")
    config = read_mapping(run / "config.json", "task")
    trusting.check(config, run / "config.json", trust=trust)
    cfg = DictConfig(config)
    if cfg.task.name != "avoid":
        raise found(f"{run} is a run of another task", "avoid", cfg.task.name, "a run of avoid")
    actor = checkpoint.load(run, trust=trust).actor
    envs = setup.environments(cfg, actor, num_envs=50, trace=True)  # type: ignore[arg-type]
    result = evaluate(actor, envs, range(FIRST_SEED, FIRST_SEED + episodes))
    envs.close()
    return result


def draw(shown: dict[str, Evaluation], out: Path) -> dict[str, Any]:
    """The figure; returns what it says in numbers."""
    from dprl.envs import avoid

    columns = math.ceil(len(shown) / 2) if len(shown) > 4 else len(shown)
    figure, axes = report.pyplot().subplots(
        math.ceil(len(shown) / columns), columns, figsize=(3.6 * columns, 4.6 * math.ceil(len(shown) / columns)), layout="constrained"
    )
    numbers = {}
    for axis in np.ravel(axes)[len(shown) :]:
        axis.axis("off")
    for axis, (name, evaluation) in zip(np.ravel(axes), shown.items(), strict=False):
        report.paths(axis, evaluation, columns=PATH, field=avoid.draw)
        numbers[name] = summary = evaluation.summary("route")
        modes = summary["modes"]
        ways = f"{modes['count']} way{'s' if modes['count'] != 1 else ''}"
        axis.set_title(f"{name}: {100 * summary['success']:.0f} %, {ways}, {abs(modes['entropy']):.2f} nats", fontsize=9)
    report.save(figure, out / "ways.png")
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a file of demonstrations")
    parser.add_argument("runs", nargs="+", help="name=folder of runs of avoid")
    parser.add_argument("--out", type=Path, default=Path("runs/ways"), help="folder for the figure and the numbers")
    parser.add_argument("--episodes", type=int, default=EPISODES)
    parser.add_argument("--trust", action="store_true", help="build whatever the runs' files name, your own classes too")
    arguments = parser.parse_args()
    try:
        shown = {"demonstrations": demonstrations(arguments.data)}
        for run in arguments.runs:
            name, equals, folder = run.partition("=")
            if not equals:
                raise found("a run is written name=folder", "such as BC=runs/avoid-bc-0", run, "write it so")
            shown[name] = rollouts(Path(folder), arguments.episodes, arguments.trust)
        numbers = draw(shown, arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    write_json(arguments.out / "ways.json", {"versions": versions(), "first_seed": FIRST_SEED, "policies": numbers})
    lines = [
        [name, report.measure(s), str(s["modes"]["count"]), f"{abs(s['modes']['entropy']):.2f}", str(s["n"])] for name, s in numbers.items()
    ]
    print(report.markdown(lines, ["policy", "success, 95 % CI", "ways", "entropy, nats", "episodes"]))
    print(f"figure: {arguments.out / 'ways.png'}")


if __name__ == "__main__":
    main()
