"""`dprl sweep`: a run's policy with other settings of its actor. Nothing is trained."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import benchmark

from dprl.cli import renamed
from dprl.cli.arguments import LAST, VALIDATION, is_setting
from dprl.cli.saved_run import SavedRun, open_run, start
from dprl.data.rollout import to_torch
from dprl.envs.vector_env import VecEnv
from dprl.rollout.evaluation import evaluate, final_seeds
from dprl.training import checkpoint as checkpoints
from dprl.training import factory, report
from dprl.utils.errors import UserError
from dprl.utils.files import read_json, write_json
from dprl.utils.modules import device_of
from dprl.utils.system import versions

TIMING_SECONDS = 0.5  # of calls, for a chunk's time

Row = dict[str, Any]


def sweep(
    words: Sequence[str],
    *,
    n: int | None,
    seeds: str,
    num_envs: int | None,
    checkpoint: str | None,
    device: str | None,
    threads: int | None,
    trust: bool,
) -> None:
    """Evaluate every combination of an actor's settings, and write `sweep.json` and `sweep.png`.

    Combinations that `sweep.json` has already are not evaluated again.

    Args:
        words: The run's folder, and `key=value,value` for each setting.
        n: Number of episodes of each combination; None for the run's.
        seeds: `final` or `validation`, the run's episodes to repeat.
        num_envs: Environments that run at a time; None for the run's.
        checkpoint: Which checkpoint of the run: `best`, `last` or a step; None for the last.
        device: `auto`, `cpu` or `cuda`; None for the run's.
        threads: Threads of torch; None for the run's.
        trust: Allow any name in the files.

    Raises:
        UserError: If there is no such run or setting, or a setting is invalid.
    """
    path, grid = parse(words)
    run = open_run(path, checkpoint, default=LAST, trust=trust)
    settings = run.cfg.evaluation
    if seeds == VALIDATION:
        episodes = range(settings.seed, settings.seed + (n or settings.episodes))
    else:
        episodes = final_seeds(settings.seed, n or settings.final_episodes)
    chosen_device = start(run.cfg, device=device, threads=threads)
    envs_at_a_time = min(num_envs or settings.num_envs, len(episodes))
    rows = evaluate_grid(run, grid, episodes, num_envs=envs_at_a_time, device=chosen_device, trust=trust)
    report.save(report.sweep(rows, next(iter(grid))), run.folder / "sweep.png")
    print(f"\nnumbers: {run.folder / 'sweep.json'}\nfigure:  {run.folder / 'sweep.png'}")


def parse(words: Sequence[str]) -> tuple[Path, dict[str, list[Any]]]:
    """Return the run's folder, and the values of each setting.

    Args:
        words: The folder, and `key=value,value` for each setting.

    Raises:
        UserError: If there is not one folder and at least one setting.
    """
    paths = [word for word in words if not is_setting(word)]
    grid_words = [word for word in words if is_setting(word)]
    if len(paths) != 1 or not grid_words or any(word.endswith("=") for word in grid_words):
        raise UserError(
            "a sweep takes one run, and settings of its actor",
            expected="a folder, and one or more key=value,value",
            got=" ".join(words) or "nothing",
            fix="dprl sweep runs/<run> candidates=1,4,16",
        )
    renamed.check(grid_words, "policy.", "algo.actor.")
    grid = {}
    for word in grid_words:
        key, _, values = word.partition("=")
        grid[key] = [_value(text) for text in values.split(",")]
    return Path(paths[0]), grid


def evaluate_grid(
    run: SavedRun,
    grid: dict[str, list[Any]],
    seeds: range,
    *,
    num_envs: int,
    device: torch.device,
    trust: bool,
) -> list[Row]:
    """Evaluate every combination of settings that the run's `sweep.json` lacks, and add them to it.

    Args:
        run: The run and the checkpoint.
        grid: The values of each setting.
        seeds: Seeds of the episodes.
        num_envs: Environments that run at a time.
        device: Where the policy runs.
        trust: Allow any name in the checkpoint's config.

    Returns:
        A row for each combination: its settings and the summary of its episodes.
    """
    out = run.folder / "sweep.json"
    rows: list[Row] = read_json(out)["rows"] if out.is_file() else []
    combinations: list[Row] = []
    envs: VecEnv | None = None
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        combination = {
            "settings": settings,
            "checkpoint": run.checkpoint.name,
            "first_seed": seeds[0],
            "episodes": len(seeds),
        }
        combinations.append(combination)
        if _matching([combination], rows):
            continue
        actor = checkpoints.load(run.checkpoint, changes=settings, device=device, trust=trust).actor
        if envs is None or envs.act_steps != actor.act_steps:
            if envs is not None:
                envs.close()
            envs = factory.environments(run.cfg, actor, num_envs=num_envs)
        evaluation = evaluate(actor, envs, seeds)
        timing = {"chunk_ms": 1000 * chunk_seconds(actor, envs), "threads": torch.get_num_threads()}
        rows.append(combination | evaluation.summary() | timing)
        write_json(out, {"task": run.cfg.task.name, "run": run.folder.name, "rows": rows, "versions": versions()})
        print(f"{', '.join(f'{key}={value}' for key, value in settings.items())}: {evaluation.describe()}", flush=True)
    if envs is not None:
        envs.close()
    return _matching(combinations, rows)


@torch.no_grad()
def chunk_seconds(actor: Any, envs: VecEnv) -> float:
    """Return the median time from one observation to a chunk of actions.

    Args:
        actor: The actor.
        envs: Environments to take the observation from.
    """
    obs = to_torch(envs.reset(seeds=[0] * envs.num_envs), device_of(actor))[:1]
    timer = benchmark.Timer("actor(obs)", globals={"actor": actor, "obs": obs}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=TIMING_SECONDS).median


def _matching(combinations: list[Row], rows: list[Row]) -> list[Row]:
    return [row for row in rows if any(combination.items() <= row.items() for combination in combinations)]


def _value(text: str) -> Any:
    """Return a number, true, false or null as such, and any other text as it is."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
