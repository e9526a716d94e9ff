"""What logged data hold, in words and as a figure.

Letters: M steps, E episodes, O observation dim, A action dim.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from dprl import report, setup
from dprl.data.episodes import Episodes, keyed
from dprl.data.offline import check_sizes, outside
from dprl.normalize import SMALLEST_RANGE
from dprl.rewards import TASK_ONLY

FAR = 8.0  # standard deviations: an observation further off than this is worth a look


def score(value: float, reference: Any) -> float:
    """D4RL's normalised score: 0 is a random policy's return, 100 an expert's."""
    return 100 * (value - reference.random) / (reference.expert - reference.random)


def facts(episodes: Episodes, low: Tensor, high: Tensor, reference: Any) -> list[tuple[str, str]]:
    """Lines to print: what, and its value. ``low`` and ``high`` [A] bound the task's actions."""
    length, n = episodes.lengths.double(), len(episodes)
    ended = int(episodes.terminated.sum())
    out = [
        ("source", episodes.source),
        ("episodes", f"{n:,}, of {int(length.min())} to {int(length.max())} steps, mean {float(length.mean()):.1f}"),
        ("steps", f"{len(episodes.act):,}"),
        ("ends", f"{ended:,} terminations, {n - ended:,} truncations (or ends of the recording)"),
        ("last observations", "unknown: each cut episode counts as one step shorter" if episodes.last_obs is None else "known"),
    ]
    if episodes.rew is None:
        out.append(("rewards", "none"))
    else:
        returns, rew = episodes.returns.double(), episodes.rew
        out.append(("rewards", f"{float(rew.min()):.4g} to {float(rew.max()):.4g}, mean {float(rew.mean()):.4g} a step"))
        spread = f" +- {float(returns.std(correction=0)):.4g}, {float(returns.min()):.4g} to {float(returns.max()):.4g}"
        out.append(("returns", f"{float(returns.mean()):.4g}{spread}"))
        if reference is not None:
            out.append(("D4RL-normalised", f"{score(float(returns.mean()), reference):.1f}"))
    beyond = outside(episodes, low, high)
    for d, column in enumerate(episodes.act.T):
        words = f"{float(column.min()):.4g} to {float(column.max()):.4g}, task {float(low[d]):.4g} to {float(high[d]):.4g}"
        out.append((f"action {d}", words + _constant(column) + (", OUT OF RANGE" if bool(beyond[d]) else "")))
    for key, observed in keyed(episodes.obs, "observation").items():
        out += _vector(key, observed) if observed.dim() == 2 else [(key, _images(observed))]
    return out


def _vector(name: str, observed: Tensor) -> list[tuple[str, str]]:
    out = []
    for d, column in enumerate(observed.T):
        words = f"{float(column.min()):.4g} to {float(column.max()):.4g}, mean {float(column.mean()):.4g}, std {float(column.std()):.4g}"
        far = int(((column - column.mean()).abs() > FAR * column.std().clamp(min=1e-9)).sum())
        out.append((f"{name} {d}", words + _constant(column) + (f", {far} values beyond {FAR:g} std" if far else "")))
    return out


def _images(observed: Tensor) -> str:
    mean = float(observed[:: max(1, len(observed) // 1000)].double().mean())  # of a thousand
    return f"images {list(observed.shape[1:])} of {observed.dtype}, {int(observed.min())} to {int(observed.max())}, mean {mean:.4g}"


def _constant(column: Tensor) -> str:
    return ", CONSTANT" if float(column.max() - column.min()) < SMALLEST_RANGE else ""


def draw(episodes: Episodes) -> Any:
    """Returns, lengths, and the spread of every action and observation dimension (of vectors, not of images)."""
    figure, axes = report.pyplot().subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    (returns, lengths), (actions, observations) = axes
    if episodes.rew is None:
        returns.set_title("no rewards", fontsize=10)
    else:
        returns.hist(episodes.returns.numpy(), bins=50, color=report.SOLVED)
    returns.set(xlabel="return of an episode", ylabel="episodes")
    lengths.hist(
        [episodes.lengths[episodes.terminated].numpy(), episodes.lengths[~episodes.terminated].numpy()],
        bins=50,
        stacked=True,
        color=[report.FAILED, report.SOLVED],
        label=["terminated", "truncated"],
    )
    lengths.set(xlabel="steps of an episode", ylabel="episodes")
    lengths.legend(fontsize=8)
    vectors = [value for value in keyed(episodes.obs, "observation").values() if value.dim() == 2]
    observed = torch.cat(vectors, -1) if vectors else torch.zeros(len(episodes.act), 0)
    scaled = (observed - observed.mean(0)) / observed.std(0).clamp(min=1e-6)
    for axis, data, label in ((actions, episodes.act, "action dimension"), (observations, scaled, "observation dimension (standardised)")):
        bands = np.quantile(data[torch.linspace(0, len(data) - 1, min(len(data), 20_000)).long()].numpy(), [0, 0.05, 0.5, 0.95, 1], axis=0)
        x = np.arange(data.shape[1])
        axis.vlines(x, bands[0], bands[4], color=report.SOLVED, lw=1)
        axis.vlines(x, bands[1], bands[3], color=report.SOLVED, lw=5, alpha=0.6)
        axis.plot(x, bands[2], "_", color="black", ms=9)
        axis.set(xlabel=label, ylabel="all, 5 to 95 %, median")
        axis.grid(alpha=0.3)
    return figure


def inspect(cfg: DictConfig, overrides: list[str]) -> None:
    """``scripts/inspect_data.py``: prints ``facts`` and writes ``draw`` to ``cfg.out``."""
    episodes: Episodes = setup.construct(cfg.data, "data")
    envs = setup.construct(cfg.task.env, "task.env", num_envs=1, obs_steps=1, act_steps=1, reward=TASK_ONLY)
    low, high = (torch.from_numpy(side) for side in envs.bounds)
    envs.close()
    check_sizes(envs, episodes)
    lines = facts(episodes, low, high, cfg.task.reference)
    width = max(len(name) for name, _ in lines)
    for name, words in lines:
        print(f"{name:<{width}}  {words}")
    report.save(draw(episodes), Path(cfg.out))
    print(f"{'figure':<{width}}  {cfg.out}")
