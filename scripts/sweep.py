"""Evaluates a run's policy with other settings of its actor: nothing is trained.

python scripts/sweep.py runs/hopper-idql-0 candidates=1,2,4,8,16,32,64 select=argmax,softmax
python scripts/sweep.py runs/hopper-idql-0 candidates=8 --episodes 400 --validation

Every combination runs the same whole episodes, the run's held-out ones unless --validation is given. Writes sweep.json
and sweep.png beside the run, with the time from one observation to a chunk; a sweep that was cut off goes on, and one with
more values adds to the file.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from dprl import checkpoint, report, setup
from dprl import trust as trusting
from dprl.envs.collect import to_torch
from dprl.envs.vector import VecEnv
from dprl.errors import UserError, check_numbers, found
from dprl.evaluate import evaluate, final_seeds
from dprl.files import read_json, read_mapping, write_json
from dprl.policy import device_of
from dprl.timing import median_seconds
from dprl.versions import versions


def value(text: str) -> Any:
    """A number, true, false, null, or the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse(arguments: list[str]) -> dict[str, list[Any]]:
    """``key=a,b,c`` to the values of each key."""
    out = {}
    for argument in arguments:
        key, equals, values = argument.partition("=")
        if not equals or not values:
            raise found("a sweep is written key=value,value", "such as candidates=1,4,16", argument, "write it so")
        out[key] = [value(part) for part in values.split(",")]
    return out


def sweep(
    run: Path, grid: dict[str, list[Any]], *, episodes: int | None, validation: bool, best: bool, trust: bool
) -> list[dict[str, Any]]:
    """A row a combination: its settings and the summary of its episodes."""
    if not (run / "config.json").is_file():
        raise found(f"{run} is no run", "a run's folder", "no config.json in it", "name a run of finetune.py")
    config = read_mapping(run / "config.json", "task", "evaluation")
    trusting.check(config, run / "config.json", trust=trust)
    cfg = DictConfig(config)
    e = cfg.evaluation
    check_numbers("--", least=1, episodes=episodes)
    count = episodes or (e.episodes if validation else e.final_episodes)
    seeds = range(e.seed, e.seed + count) if validation else final_seeds(e.seed, count)
    chosen = checkpoint.resolve(run)
    path = chosen if best else checkpoint.at(run, checkpoint.steps(run)[-1])
    out = run / "sweep.json"
    rows = read_json(out)["rows"] if out.is_file() else []
    wanted = []
    envs: VecEnv | None = None
    for combination in itertools.product(*grid.values()):
        settings = dict(zip(grid, combination, strict=True))
        asked = {"settings": settings, "checkpoint": path.name, "first_seed": seeds[0], "episodes": count}
        wanted.append(asked)
        if any(asked.items() <= row.items() for row in rows):
            continue
        actor = checkpoint.load(path, changes=settings, trust=trust).actor
        if envs is None or envs.act_steps != actor.act_steps:  # another length of chunks wants other environments
            envs = setup.environments(cfg, actor, num_envs=min(cfg.evaluation.num_envs, count))
        evaluation = evaluate(actor, envs, seeds)
        rows.append(asked | evaluation.summary() | {"chunk_ms": 1000 * latency(actor, envs), "threads": torch.get_num_threads()})
        write_json(out, {"task": cfg.task.name, "run": run.name, "rows": rows, "versions": versions()})
        print(f"{', '.join(f'{k}={v}' for k, v in settings.items())}: {evaluation.describe()}", flush=True)
    if envs:
        envs.close()
    return [row for row in rows if any(asked.items() <= row.items() for asked in wanted)]


@torch.no_grad()
def latency(actor: Any, envs: VecEnv) -> float:
    """Seconds from one observation to a chunk."""
    obs = to_torch(envs.reset(seeds=[0] * envs.num_envs), device_of(actor))[:1]
    return median_seconds(lambda: actor(obs), repeats=5, least=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("grid", nargs="+", help="key=value,value of the actor's settings")
    parser.add_argument("--episodes", type=int, help="how many (default: as the run's own)")
    parser.add_argument("--validation", action="store_true", help="on the validation seeds instead of the held-out ones")
    parser.add_argument("--best", action="store_true", help="the best checkpoint instead of the last")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--trust", action="store_true", help="build whatever the run's files name, your own classes too")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        grid = parse(arguments.grid)
        how = dict(episodes=arguments.episodes, validation=arguments.validation, best=arguments.best, trust=arguments.trust)
        rows = sweep(arguments.run, grid, **how)
        report.save(report.sweep(rows, next(iter(grid))), arguments.run / "sweep.png")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"\nnumbers: {arguments.run / 'sweep.json'}\nfigure:  {arguments.run / 'sweep.png'}")


if __name__ == "__main__":
    main()
