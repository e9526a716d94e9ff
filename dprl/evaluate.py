"""Whole episodes on fixed seeds, and what can be said from them.

Letters: E episodes, N environments.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from dprl import rng
from dprl.envs.collect import to_torch
from dprl.envs.vector import VecEnv
from dprl.errors import UserError
from dprl.log import warn
from dprl.networks.kept import weights_stay
from dprl.policy import device_of

Z95 = 1.959963984540054  # the standard normal's 97.5 % quantile; scipy, for this alone, would take 14 MB
FINALS = 10_000  # a run's final episodes are seeded this far after those it was watched or chosen by


@dataclass
class Evaluation:
    """One entry an episode, in the order of the seeds [E]. ``success`` is None where the task has no such notion."""

    seeds: list[int]
    returns: np.ndarray
    lengths: np.ndarray
    success: np.ndarray | None
    info: dict[str, np.ndarray] = field(default_factory=dict)
    traces: list[np.ndarray] = field(default_factory=list)  # [length, O] each
    values: np.ndarray | None = None  # what the actor predicted for its first chunk, if it predicts
    discounted: np.ndarray | None = None  # and the discounted return, of the configured reward, that came
    measures: dict[str, np.ndarray] = field(default_factory=dict)  # what the task measures besides (task.env.metrics)
    dropped: int = 0  # episodes that ended in a number that is not finite: failed

    def score(self) -> float:
        """What a best checkpoint is chosen by: success, ties by return; or return alone."""
        scale = max(1.0, float(np.abs(self.returns).max()))
        mean = float(self.returns.mean())
        return mean if self.success is None else float(self.success.mean()) + 1e-3 * mean / scale

    def breadth(self, key: str, floor: float) -> float:
        """What a checkpoint is chosen by where the ways told apart by ``info[key]`` are to be kept: their entropy, once success
        has reached ``floor``; until then, success."""
        assert self.success is not None
        rate = float(self.success.mean())
        return 1 + self.modes(key)["entropy"] if rate >= floor else rate

    def metrics(self, prefix: str, *, intervals: bool = False) -> dict[str, float]:
        """For the log; with ``intervals``, the ends of the 95 % intervals of success, return and measures too."""
        s = self.summary()
        keys = [key for key in ("return", "length", "success", "value", "discounted", *self.measures) if s.get(key) is not None]
        out = {f"{prefix}/{key}": float(s[key]) for key in keys}
        if self.dropped:
            out[f"{prefix}/dropped_episodes"] = float(self.dropped)
        if intervals:
            for key in ("success", "return", *self.measures):
                if key in keys:
                    out |= {f"{prefix}/{key}_{side}": end for side, end in zip(("low", "high"), s[f"{key}_ci95"], strict=True)}
        return out

    def describe(self) -> str:
        """One line for the terminal."""
        s = self.summary()
        rate = "" if s["success"] is None else "success {:.3f} [{:.3f}, {:.3f}], ".format(s["success"], *s["success_ci95"])
        rest = "".join(", {} {:.4g} [{:.4g}, {:.4g}]".format(key, s[key], *s[f"{key}_ci95"]) for key in self.measures)
        rest += f", {self.dropped} failed by numbers that are not finite" if self.dropped else ""
        return rate + "return {:.4g} [{:.4g}, {:.4g}]{}, {} episodes".format(s["return"], *s["return_ci95"], rest, s["n"])

    def summary(self, modes: str | None = None) -> dict[str, Any]:
        """``success success_ci95 return return_ci95 return_std length n``, each measure and its ``_ci95``, and ``modes`` told
        apart by that info key."""
        rate = None if self.success is None else float(self.success.mean())
        return {
            "success": rate,
            "success_ci95": None if self.success is None else wilson(int(self.success.sum()), len(self.success)),
            "return": float(self.returns.mean()),
            "return_ci95": bootstrap(self.returns),
            "return_std": float(self.returns.std()),
            "length": float(self.lengths.mean()),
            "n": len(self.seeds),
            **({"dropped_episodes": self.dropped} if self.dropped else {}),
            **({} if self.values is None else {"value": float(self.values.mean())}),
            **({} if self.discounted is None else {"discounted": float(self.discounted.mean())}),
            **{key: float(values.mean()) for key, values in self.measures.items()},
            **{f"{key}_ci95": bootstrap(values) for key, values in self.measures.items()},
        } | ({} if modes is None else {"modes": self.modes(modes)})

    def modes(self, key: str) -> dict[str, Any]:
        """How many ways the successful episodes used, by the number that ``info[key]`` gives each: count, entropy (nats)."""
        solved = np.ones(len(self.seeds), bool) if self.success is None else self.success
        ways, counts = np.unique(self.info[key][solved].astype(int), return_counts=True)
        share = counts / max(1, counts.sum())
        return {
            "key": key,
            "count": len(ways),
            "entropy": float(-(share * np.log(share)).sum()),
            "episodes": {str(way): int(count) for way, count in zip(ways, counts, strict=True)},
        }


def final_seeds(first: int, episodes: int) -> range:
    """Seeds of a run's final episodes; ``first`` is that of those it is watched or chosen by."""
    return range(first + FINALS, first + FINALS + episodes)


def evaluate(actor: nn.Module, envs: VecEnv, seeds: Sequence[int]) -> Evaluation:
    """Runs one whole episode for each of ``seeds``, as many at a time as there are environments.

    An episode with an observation or a reward that is not finite is a failure: no success, and of return and of what the task
    measures the least of its own (up to there) and all others'. Its seed is named. One whose process was lost is run again.

    The actor is put into ``eval`` mode and back. The sampling noise is seeded from ``seeds``, and the generators are
    left as they were found: evaluating never disturbs training.
    """
    device = device_of(actor)
    was_training = actor.training
    actor.eval()
    try:
        with rng.forked(seeds[0]), torch.no_grad(), weights_stay():
            return _episodes(actor, envs, list(seeds), device)
    finally:
        actor.train(was_training)


def _episodes(actor: nn.Module, envs: VecEnv, seeds: list[int], device: torch.device) -> Evaluation:
    n, total = envs.num_envs, len(seeds)
    episode = np.arange(n)  # [N] which episode each environment runs; past the last it rests
    returns, lengths, success = np.zeros(total), np.zeros(total, int), np.zeros(total, bool)
    info = {key: np.full(total, np.nan) for key in (*envs.info_keys, *envs.metrics)}
    values = np.zeros(total) if hasattr(actor, "promise") else None  # of an actor that expects something of its chunks
    gamma = getattr(actor, "discount", None)  # an actor that predicts returns says what it discounts them by
    discounted, powers = (None, 0.0) if gamma is None else (np.zeros(total), gamma ** np.arange(envs.act_steps))
    pieces: list[list[np.ndarray]] = [[] for _ in range(total)]
    obs = envs.reset(seeds=[seeds[e] if e < total else 0 for e in episode])
    if n > total:
        envs.rest(episode >= total)
    following, failed = n, []
    while (episode < total).any():
        seen = to_torch(obs, device)
        act, _ = actor(seen)
        live = np.flatnonzero(episode < total)
        running = episode[live]
        first = live[lengths[running] == 0]
        if values is not None and len(first):
            values[episode[first]] = actor.promise(seen[first], act[first]).cpu().numpy()  # type: ignore[operator]
        step = envs.step(act.cpu().numpy())
        if discounted is not None:
            discounted[running] += gamma ** lengths[running] * (step.rew[live] @ powers)  # type: ignore[operator]
        returns[running] += step.task_return[live]
        lengths[running] += step.length[live]
        success[running] |= step.success[live]
        if step.trace is not None:
            for i in live:
                pieces[episode[i]].append(step.trace[i, : step.length[i]])
        obs = step.obs
        for i, why in step.faults.items():
            warn(f"evaluation, seed {seeds[episode[i]]}, environment {i}: {why}; the episode counts as failed")
            failed.append(int(episode[i]))
        lost = np.zeros(n, bool)
        lost[[i for i in step.lost if episode[i] < total]] = True
        for e in episode[lost]:
            returns[e], lengths[e], success[e] = 0.0, 0, False
            pieces[e].clear()
            if discounted is not None:
                discounted[e] = 0.0
        ended = step.done & (episode < total) & ~lost
        for i in np.flatnonzero(ended):
            for key in info:
                info[key][episode[i]] = step.info[key][i]
            episode[i], following = following, following + 1
        again, idle = (ended & (episode < total)) | lost, ended & (episode >= total)
        if idle.any():
            envs.rest(idle)
        if again.any():
            obs = envs.reset(seeds=[seeds[e] if a else None for e, a in zip(episode, again, strict=True)], mask=again)
    traces = [np.concatenate(part) for part in pieces] if pieces[0] else []
    measures = {key: info[key] for key in envs.metrics}
    if failed:
        if len(failed) == total:
            raise UserError("every episode of an evaluation ended in a number that is not finite\n  fix:      repair the environment")
        for kind in (returns, *measures.values(), *([] if discounted is None else [discounted])):
            kind[failed] = np.nanmin(kind)
        success[failed] = False
    shown = success if envs.has_success else None
    return Evaluation(seeds, returns, lengths, shown, info, traces, values, discounted, measures, len(failed))


def wilson(successes: int, n: int) -> list[float]:
    """95 % interval of a success rate (Wilson, 1927)."""
    rate, z2 = successes / n, Z95**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n**2))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def bootstrap(values: np.ndarray, *, draws: int = 2000) -> list[float]:
    """95 % percentile interval of a mean, from ``draws`` resamples with a fixed seed."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (draws, len(values))).mean(1)
    return [float(q) for q in np.quantile(means, [0.025, 0.975])]


def difference(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Mean of ``after - before`` on the same seeds, with a paired bootstrap interval."""
    gain = after.astype(float) - before.astype(float)
    return {"mean": float(gain.mean()), "ci95": bootstrap(gain)}
