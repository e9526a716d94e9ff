"""Evaluation of an actor on whole episodes with fixed seeds.

Shapes: E episodes, N environments, To observed steps, Ta executed steps, O observation dim, A action dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dprl.data.rollout import to_torch
from dprl.envs.vector_env import VecEnv, VecStep
from dprl.networks.normalizer import Obs
from dprl.networks.weight_cache import cached_weights
from dprl.rollout.statistics import bootstrap, wilson
from dprl.utils import seeding
from dprl.utils.errors import UserError
from dprl.utils.metrics import warn
from dprl.utils.modules import device_of

FINAL_SEED_OFFSET = 10_000  # from the validation seeds of a run to the seeds of its final episodes


@dataclass
class Evaluation:
    """Results of E episodes, in the order of their seeds.

    Args:
        seeds: Seeds of the episodes.
        returns: Sums of the task's own rewards `[E]`.
        lengths: Numbers of environment steps `[E]`.
        success: Successful episodes, bool `[E]`; None if the task has no notion of success.
        info: From each of `task.env.info_keys` and `task.env.metrics` to the last values of the episodes `[E]`.
        traces: Observed vectors of each episode, `[length, O]`, if the environments return them.
        values: Return that the actor predicted for the first chunk `[E]`, if it predicts returns.
        discounted: Discounted return of the configured reward `[E]`, if the actor predicts returns.
        measures: Metrics of the task (`task.env.metrics`) `[E]`.
        dropped: Number of episodes that failed with a non-finite observation or reward.
    """

    seeds: list[int]
    returns: np.ndarray
    lengths: np.ndarray
    success: np.ndarray | None
    info: dict[str, np.ndarray] = field(default_factory=dict)
    traces: list[np.ndarray] = field(default_factory=list)
    values: np.ndarray | None = None
    discounted: np.ndarray | None = None
    measures: dict[str, np.ndarray] = field(default_factory=dict)
    dropped: int = 0

    def score(self) -> float:
        """Return the score by which the best checkpoint is chosen: the success rate, or the return without success.

        Equal success rates are ordered by the return.
        """
        scale = max(1.0, float(np.abs(self.returns).max()))
        mean = float(self.returns.mean())
        return mean if self.success is None else float(self.success.mean()) + 1e-3 * mean / scale

    def mode_entropy_score(self, key: str, floor: float) -> float:
        """Return the score by which a checkpoint that keeps several modes is chosen.

        Args:
            key: Key of the info that identifies the mode of an episode.
            floor: Success rate from which the modes count.

        Returns:
            1 plus the entropy of the modes in nats if the success rate is at least `floor`, else the success rate.
        """
        assert self.success is not None
        rate = float(self.success.mean())
        return 1 + self.modes(key)["entropy"] if rate >= floor else rate

    def metrics(self, prefix: str, *, intervals: bool = False) -> dict[str, float]:
        """Return the results as metrics for the log.

        Args:
            prefix: Prefix of the names, such as `validation`.
            intervals: Add the ends of the 95 % intervals of success, return and the task's metrics.

        Returns:
            From `<prefix>/<name>` to the mean over episodes.
        """
        summary = self.summary()
        names = ("return", "length", "success", "value", "discounted", *self.measures)
        present = [name for name in names if summary.get(name) is not None]
        out = {f"{prefix}/{name}": float(summary[name]) for name in present}
        if self.dropped:
            out[f"{prefix}/dropped_episodes"] = float(self.dropped)
        if intervals:
            for name in ("success", "return", *self.measures):
                if name in present:
                    out[f"{prefix}/{name}_low"], out[f"{prefix}/{name}_high"] = summary[f"{name}_ci95"]
        return out

    def describe(self) -> str:
        """Return one line for the terminal."""
        summary = self.summary()

        def interval(name: str, number: str) -> str:
            low, high = summary[f"{name}_ci95"]
            return f"{name} {summary[name]:{number}} [{low:{number}}, {high:{number}}]"

        parts = [] if self.success is None else [interval("success", ".3f")]
        parts += [interval(name, ".4g") for name in ("return", *self.measures)]
        if self.dropped:
            parts.append(f"{self.dropped} failed with non-finite values")
        return ", ".join([*parts, f"{summary['n']} episodes"])

    def summary(self, modes: str | None = None) -> dict[str, Any]:
        """Summarise the results.

        Args:
            modes: Key of the info that identifies the mode of an episode; None leaves out the modes.

        Returns:
            `success`, `success_ci95`, `return`, `return_ci95`, `return_std`, `length` and `n`; if there are any,
            `dropped_episodes`, `value`, `discounted`, each metric of the task with its `<name>_ci95`, and `modes`.
        """
        out: dict[str, Any] = {
            "success": None if self.success is None else float(self.success.mean()),
            "success_ci95": None if self.success is None else wilson(int(self.success.sum()), len(self.success)),
            "return": float(self.returns.mean()),
            "return_ci95": bootstrap(self.returns),
            "return_std": float(self.returns.std()),
            "length": float(self.lengths.mean()),
            "n": len(self.seeds),
        }
        if self.dropped:
            out["dropped_episodes"] = self.dropped
        if self.values is not None:
            out["value"] = float(self.values.mean())
        if self.discounted is not None:
            out["discounted"] = float(self.discounted.mean())
        out |= {name: float(values.mean()) for name, values in self.measures.items()}
        out |= {f"{name}_ci95": bootstrap(values) for name, values in self.measures.items()}
        if modes is not None:
            out["modes"] = self.modes(modes)
        return out

    def modes(self, key: str) -> dict[str, Any]:
        """Count the modes of the successful episodes.

        Args:
            key: Key of the info that identifies the mode of an episode by a number.

        Returns:
            `key`, `count` of different modes, `entropy` in nats, and `episodes` by mode.
        """
        solved = np.ones(len(self.seeds), bool) if self.success is None else self.success
        modes, counts = np.unique(self.info[key][solved].astype(int), return_counts=True)
        share = counts / max(1, counts.sum())
        return {
            "key": key,
            "count": len(modes),
            "entropy": float(-(share * np.log(share)).sum()),
            "episodes": {str(mode): int(count) for mode, count in zip(modes, counts, strict=True)},
        }


def final_seeds(first: int, episodes: int) -> range:
    """Return the seeds of a run's final episodes.

    Args:
        first: First seed of its validation episodes.
        episodes: Number of final episodes.
    """
    return range(first + FINAL_SEED_OFFSET, first + FINAL_SEED_OFFSET + episodes)


def evaluate(actor: nn.Module, envs: VecEnv, seeds: Sequence[int]) -> Evaluation:
    """Run one whole episode for each seed.

    An episode with a non-finite observation or reward has failed: it is no success, and for its return and metrics it
    gets the lowest value of its own, up to that step, and of all other episodes. An episode whose process was lost is
    run again.

    The actor is in `eval` mode meanwhile. Its sampling noise is seeded by `seeds`, and the state of all generators is
    restored, so that an evaluation does not affect training.

    Args:
        actor: Actor to evaluate, whose chunks fit the environments.
        envs: Environments; N episodes run at a time.
        seeds: Seeds of the episodes.

    Returns:
        Results in the order of the seeds.

    Raises:
        UserError: If every episode fails with a non-finite value.
    """
    device = device_of(actor)
    was_training = actor.training
    actor.eval()
    try:
        with seeding.forked(seeds[0]), cached_weights():
            return _run_episodes(actor, envs, list(seeds), device)
    finally:
        actor.train(was_training)


def _run_episodes(actor: nn.Module, envs: VecEnv, seeds: list[int], device: torch.device) -> Evaluation:
    """Run the episodes; an environment that has finished one continues with the next that has not started."""
    n, total = envs.num_envs, len(seeds)
    results = _EpisodeResults(actor, envs, total)
    episode = np.arange(n)  # [N] episode that each environment runs; `total` or more: frozen
    next_episode = n
    env_obs = envs.reset(seeds=[seeds[e] if e < total else 0 for e in episode])
    if n > total:
        envs.freeze_finished(episode >= total)
    while (episode < total).any():
        obs = to_torch(env_obs, device)
        with torch.no_grad():
            act, _ = actor(obs)
            results.add_predictions(episode, obs, act)
        step = envs.step(act.cpu().numpy())
        env_obs = step.obs
        results.add(episode, step)
        for i, reason in step.faults.items():
            e = int(episode[i])
            warn(f"evaluation: seed {seeds[e]}, environment {i}: {reason}; the episode counts as failed")
            results.failed.append(e)
        lost = np.zeros(n, bool)
        lost[[i for i in step.lost if episode[i] < total]] = True
        results.discard(episode[lost])
        ended = step.done & (episode < total) & ~lost
        for i in np.flatnonzero(ended).tolist():
            results.finish(episode[i], step, i)
            episode[i], next_episode = next_episode, next_episode + 1
        idle = ended & (episode >= total)
        if idle.any():
            envs.freeze_finished(idle)
        restart = (ended & (episode < total)) | lost
        if restart.any():
            reset_seeds = [seeds[e] if begins else None for e, begins in zip(episode, restart, strict=True)]
            env_obs = envs.reset(seeds=reset_seeds, mask=restart)
    return results.evaluation(seeds)


class _EpisodeResults:
    """Accumulated results of the episodes of an evaluation.

    `episode` [N] is the episode that each environment runs; entries from `total` on are ignored.
    """

    def __init__(self, actor: nn.Module, envs: VecEnv, total: int):
        self.actor, self.envs, self.total = actor, envs, total
        self.returns, self.lengths = np.zeros(total), np.zeros(total, int)
        self.success = np.zeros(total, bool)
        self.info = {key: np.full(total, np.nan) for key in (*envs.info_keys, *envs.metrics)}
        self.values = np.zeros(total) if hasattr(actor, "predicted_return") else None
        self.gamma: float | None = getattr(actor, "discount", None)  # of an actor that predicts returns
        self.discounted = None if self.gamma is None else np.zeros(total)
        self.trace_chunks: list[list[np.ndarray]] = [[] for _ in range(total)]
        self.failed: list[int] = []

    def add_predictions(self, episode: np.ndarray, obs: Obs, act: Tensor) -> None:
        """Record the predicted returns of first chunks, before they are executed.

        Args:
            episode: Number of the episode of each row.
            obs: First observations.
            act: First chunks.
        """
        if self.values is None:
            return
        running = np.flatnonzero(episode < self.total)
        first = running[self.lengths[episode[running]] == 0]
        if len(first):
            predicted = self.actor.predicted_return(obs[first], act[first])  # type: ignore[operator, index]
            self.values[episode[first]] = predicted.cpu().numpy()

    def add(self, episode: np.ndarray, step: VecStep) -> None:
        """Add a chunk of every environment."""
        running = np.flatnonzero(episode < self.total)
        episodes = episode[running]
        if self.gamma is not None and self.discounted is not None:
            powers = self.gamma ** np.arange(self.envs.act_steps)
            self.discounted[episodes] += self.gamma ** self.lengths[episodes] * (step.rew[running] @ powers)
        self.returns[episodes] += step.task_return[running]
        self.lengths[episodes] += step.length[running]
        self.success[episodes] |= step.success[running]
        if step.trace is not None:
            for i in running:
                self.trace_chunks[episode[i]].append(step.trace[i, : step.length[i]])

    def discard(self, episodes: np.ndarray) -> None:
        """Delete what was added to episodes that will be run again."""
        for e in episodes:
            self.returns[e], self.lengths[e], self.success[e] = 0.0, 0, False
            self.trace_chunks[e].clear()
            if self.discounted is not None:
                self.discounted[e] = 0.0

    def finish(self, episode: int, step: VecStep, i: int) -> None:
        """Record the info at the end of an `episode`, whose last `step` environment `i` ran."""
        for key, values in self.info.items():
            values[episode] = step.info[key][i]

    def evaluation(self, seeds: list[int]) -> Evaluation:
        """Return the results of all episodes."""
        measures = {key: self.info[key] for key in self.envs.metrics}
        if self.failed:
            if len(self.failed) == self.total:
                raise UserError(
                    "every episode of an evaluation ended with a non-finite value",
                    expected="finite observations and rewards",
                    got=f"{self.total} failed episodes, with the warnings above",
                    fix="repair the environment",
                )
            for values in (self.returns, *measures.values(), *([] if self.discounted is None else [self.discounted])):
                values[self.failed] = np.nanmin(values)
            self.success[self.failed] = False
        return Evaluation(
            seeds,
            self.returns,
            self.lengths,
            self.success if self.envs.has_success else None,
            self.info,
            [np.concatenate(chunks) for chunks in self.trace_chunks] if self.trace_chunks[0] else [],
            self.values,
            self.discounted,
            measures,
            len(self.failed),
        )
