"""`dprl evaluate`: whole episodes of the policies of runs or checkpoints.

By default the episodes are those of the run's final evaluation, so that its results are repeated.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from dprl.cli.arguments import BEST, EVALUATE
from dprl.cli.saved_run import SavedRun, open_run, start
from dprl.envs.vector_env import check_fits
from dprl.rewards import TASK_ONLY
from dprl.rollout.evaluation import Evaluation, evaluate, final_seeds
from dprl.training import checkpoint as checkpoints
from dprl.training import factory, report
from dprl.training.run import check_out
from dprl.utils.errors import UserError
from dprl.utils.files import write_json
from dprl.utils.system import machine, versions


def evaluate_runs(
    paths: Sequence[str],
    *,
    n: int | None,
    seed: int | None,
    num_envs: int | None,
    checkpoint: str | None,
    device: str | None,
    threads: int | None,
    trust: bool,
    out: str | None,
) -> None:
    """Evaluate runs or checkpoints, print a table, and write a file for each.

    Args:
        paths: Folders of runs or checkpoints.
        n: Number of episodes; None for that of the run's final evaluation.
        seed: Seed of the first episode; None for that of the run's final evaluation.
        num_envs: Environments that run at a time; None for the run's.
        checkpoint: Which checkpoint of a run: `best`, `last` or a step; None for the best.
        device: `auto`, `cpu` or `cuda`; None for the run's.
        threads: Threads of torch; None for the run's.
        trust: Allow any name in the files.
        out: Folder for the files; None for `evaluations` in the run's folder.

    Raises:
        UserError: If a path or a setting is invalid.
    """
    EVALUATE.reject(paths)
    if not paths:
        raise UserError("no run is given", expected="folders of runs", got="none", fix="dprl evaluate runs/<run>")
    runs = {path: open_run(Path(path), checkpoint, default=BEST, trust=trust) for path in paths}
    results, files = {}, []
    for path, run in runs.items():
        finals = final_seeds(run.cfg.evaluation.seed, run.cfg.evaluation.final_episodes)
        first = finals[0] if seed is None else seed
        seeds = range(first, first + (n or len(finals)))
        name = f"{run.checkpoint.name}-seed{first}-n{len(seeds)}.json"
        file = Path(out) / f"{run.folder.name}-{name}" if out else run.folder / "evaluations" / name
        check_out(file)
        chosen_device = start(run.cfg, device=device, threads=threads)
        envs_at_a_time = num_envs or run.cfg.evaluation.num_envs
        evaluation = evaluate_run(run, seeds, num_envs=envs_at_a_time, device=chosen_device, trust=trust)
        print(f"{run.checkpoint}: {evaluation.describe()}", flush=True)
        summary = evaluation.summary(factory.modes(run.cfg))
        settings = {
            "task": run.cfg.task.name,
            "algo": run.cfg.name,
            "run": str(run.folder),
            "checkpoint": run.checkpoint.name,
            "first_seed": first,
            "num_envs": envs_at_a_time,
            "device": str(chosen_device),
            "threads": torch.get_num_threads(),
        }
        write_json(file, settings | {"evaluation": summary, "versions": versions(), "machine": machine()})
        results[path] = {"finetuned": summary, "env_steps": None, "train_seconds": None}
        files.append(file)
    print(f"\n{report.table(results)}")
    for file in files:
        print(f"numbers: {file}")


def evaluate_run(
    run: SavedRun, seeds: Sequence[int], *, num_envs: int, device: torch.device, trust: bool
) -> Evaluation:
    """Run whole episodes of a saved policy, with the task and the reward of its run.

    Args:
        run: The run and the checkpoint.
        seeds: Seeds of the episodes.
        num_envs: Environments that run at a time.
        device: Where the policy runs.
        trust: Allow any name in the checkpoint's config.
    """
    actor = checkpoints.load(run.checkpoint, device=device, trust=trust).actor
    reward = factory.reward(run.cfg) if "reward" in run.cfg else TASK_ONLY
    envs = factory.environments(run.cfg, actor, num_envs=num_envs, reward=reward)
    try:
        check_fits(envs, obs_shape=actor.obs_shape, act_dim=actor.act_dim, source=str(run.checkpoint))
        return evaluate(actor, envs, seeds)
    finally:
        envs.close()
