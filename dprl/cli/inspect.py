"""`dprl inspect`: the contents of a data set, as text and as a figure.

dprl inspect                                           # data/avoid-0.hdf5
dprl inspect task=hopper data.path=hopper-medium.hdf5
dprl inspect task=hopper data=minari data.id=mujoco/hopper/medium-v0

Shapes: M steps, O observation dim, A action dim.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from dprl.data.episodes import Episodes, keyed
from dprl.data.relabel import check_sizes, longer_than_the_limit, outside_bounds
from dprl.networks.normalizer import SMALLEST_RANGE
from dprl.rewards import TASK_ONLY
from dprl.training import factory, report
from dprl.utils.metrics import warn

OUTLIER = 8.0  # standard deviations from the mean
SAMPLED_IMAGES = 1_000
PLOTTED_STEPS = 20_000

Line = tuple[str, str]  # a name and its description


def inspect(cfg: DictConfig, overrides: list[str]) -> None:
    """Print the facts of the configured data and write the figure.

    Args:
        cfg: The config of `dprl inspect`.
        overrides: The overrides of the command line; not used.

    Raises:
        UserError: If the data cannot be read or do not fit the task.
    """
    factory.require_simulator(cfg)
    episodes: Episodes = factory.construct(cfg.data, "data")
    envs = factory.construct(cfg.task.env, "task.env", num_envs=1, obs_steps=1, act_steps=1, reward=TASK_ONLY)
    low, high = (torch.from_numpy(bound) for bound in envs.bounds)
    envs.close()
    check_sizes(envs, episodes)
    if too_long := longer_than_the_limit(envs, episodes):
        warn(str(too_long))
    lines = facts(episodes, low, high, cfg.task.reference)
    width = max(len(name) for name, _ in lines)
    for name, description in lines:
        print(f"{name:<{width}}  {description}")
    report.save(draw(episodes), Path(cfg.out))
    print(f"{'figure':<{width}}  {cfg.out}")


def normalized_score(value: float, reference: Any) -> float:
    """Return D4RL's normalized score: 0 is the return of a random policy, 100 that of an expert.

    Args:
        value: The return.
        reference: The returns `random` and `expert`.
    """
    return 100 * (value - reference.random) / (reference.expert - reference.random)


def facts(episodes: Episodes, low: Tensor, high: Tensor, reference: Any) -> list[Line]:
    """Describe a data set.

    Args:
        episodes: The data.
        low: Lower bounds [A] of the task's actions.
        high: Upper bounds [A] of the task's actions.
        reference: Returns of a random policy and of an expert for D4RL's score, or None.

    Returns:
        Pairs of a name and its description.
    """
    return [
        *_describe_episodes(episodes),
        *_describe_rewards(episodes, reference),
        *_describe_actions(episodes, low, high),
        *_describe_observations(episodes),
    ]


def _describe_episodes(episodes: Episodes) -> list[Line]:
    lengths, count = episodes.lengths.double(), len(episodes)
    terminations = int(episodes.terminated.sum())
    known = episodes.last_obs is not None
    span = f"{int(lengths.min())} to {int(lengths.max())} steps, mean {float(lengths.mean()):.1f}"
    return [
        ("source", episodes.source),
        ("episodes", f"{count:,}, of {span}"),
        ("steps", f"{len(episodes.act):,}"),
        ("ends", f"{terminations:,} terminations, {count - terminations:,} truncations (or ends of the recording)"),
        ("last observations", "known" if known else "unknown: each truncated episode counts as one step shorter"),
    ]


def _describe_rewards(episodes: Episodes, reference: Any) -> list[Line]:
    if episodes.rew is None:
        return [("rewards", "none")]
    returns, rew = episodes.returns.double(), episodes.rew
    mean, std = float(returns.mean()), float(returns.std(correction=0))
    lines = [
        ("rewards", f"{float(rew.min()):.4g} to {float(rew.max()):.4g}, mean {float(rew.mean()):.4g} per step"),
        ("returns", f"{mean:.4g} +- {std:.4g}, {float(returns.min()):.4g} to {float(returns.max()):.4g}"),
    ]
    if reference is not None:
        lines.append(("D4RL-normalised", f"{normalized_score(mean, reference):.1f}"))
    return lines


def _describe_actions(episodes: Episodes, low: Tensor, high: Tensor) -> list[Line]:
    lines, outside = [], outside_bounds(episodes, low, high)
    for d, column in enumerate(episodes.act.T):
        span = f"{float(column.min()):.4g} to {float(column.max()):.4g}"
        bounds = f"task {float(low[d]):.4g} to {float(high[d]):.4g}"
        warning = ", OUT OF RANGE" if bool(outside[d]) else ""
        lines.append((f"action {d}", f"{span}, {bounds}{_constant(column)}{warning}"))
    return lines


def _describe_observations(episodes: Episodes) -> list[Line]:
    lines: list[Line] = []
    for key, obs in keyed(episodes.obs, "observation").items():
        lines += _describe_vector(key, obs) if obs.dim() == 2 else [(key, _describe_images(obs))]
    return lines


def _describe_vector(name: str, obs: Tensor) -> list[Line]:
    lines = []
    for d, column in enumerate(obs.T):
        span = f"{float(column.min()):.4g} to {float(column.max()):.4g}"
        moments = f"mean {float(column.mean()):.4g}, std {float(column.std()):.4g}"
        outliers = int(((column - column.mean()).abs() > OUTLIER * column.std().clamp(min=1e-9)).sum())
        warning = f", {outliers} values beyond {OUTLIER:g} std" if outliers else ""
        lines.append((f"{name} {d}", f"{span}, {moments}{_constant(column)}{warning}"))
    return lines


def _describe_images(obs: Tensor) -> str:
    mean = float(obs[:: max(1, len(obs) // SAMPLED_IMAGES)].double().mean())
    return f"images {list(obs.shape[1:])} of {obs.dtype}, {int(obs.min())} to {int(obs.max())}, mean {mean:.4g}"


def _constant(column: Tensor) -> str:
    return ", CONSTANT" if float(column.max() - column.min()) < SMALLEST_RANGE else ""


def draw(episodes: Episodes) -> Any:
    """Plot returns, lengths, and the spread of every dimension of the actions and of vector observations.

    Args:
        episodes: The data.

    Returns:
        A matplotlib figure.
    """
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
    _draw_spread(actions, episodes.act, "action dimension")
    _draw_spread(observations, _standardized_obs(episodes), "observation dimension (standardised)")
    return figure


def _standardized_obs(episodes: Episodes) -> Tensor:
    vectors = [value for value in keyed(episodes.obs, "observation").values() if value.dim() == 2]
    obs = torch.cat(vectors, -1) if vectors else torch.zeros(len(episodes.act), 0)
    return (obs - obs.mean(0)) / obs.std(0).clamp(min=1e-6)


def _draw_spread(axis: Any, data: Tensor, label: str) -> None:
    """Draw quantiles of each column of `data` [M, D]."""
    rows = torch.linspace(0, len(data) - 1, min(len(data), PLOTTED_STEPS)).long()
    lowest, low, median, high, highest = np.quantile(data[rows].numpy(), [0, 0.05, 0.5, 0.95, 1], axis=0)
    x = np.arange(data.shape[1])
    axis.vlines(x, lowest, highest, color=report.SOLVED, lw=1)
    axis.vlines(x, low, high, color=report.SOLVED, lw=5, alpha=0.6)
    axis.plot(x, median, "_", color="black", ms=9)
    axis.set(xlabel=label, ylabel="all, 5 to 95 %, median")
    axis.grid(alpha=0.3)
