"""Logged data as an algorithm wants it: checked against the task, and rewarded by the configured reward."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dprl import rewards, setup
from dprl.data.episodes import Episodes
from dprl.envs.vector import VecEnv, check_fits
from dprl.errors import UserError, found
from dprl.rewards import TASK_ONLY, Transition, WeightedSum

TOLERANCE = 1e-3  # of an action's range: how far outside its bounds rounding may put it


def load(*, data: Any, reward: Mapping[str, Mapping[str, Any]], env: Any) -> Episodes:
    """The episodes that ``data`` (a node of the config) reads, with rewards by ``reward`` (``reward.terms``), fit for the
    environments that ``env`` makes (``task.env``)."""
    episodes: Episodes = setup.construct(data, "data")
    one = setup.construct(env, "task.env", num_envs=1, obs_steps=1, act_steps=1, reward=TASK_ONLY)
    try:
        check_sizes(one, episodes)
        check_actions(one, episodes)
    finally:
        one.close()
    return relabel(episodes, rewards.from_config(reward))


def check_sizes(envs: VecEnv, episodes: Episodes) -> None:
    """Raises a ``UserError`` unless the data's observations and actions have the task's sizes."""
    check_fits(envs, obs_shape=episodes.obs_shape, act_dim=episodes.act.shape[-1], source=episodes.source)


def outside(episodes: Episodes, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Which dimensions of the actions leave the task's bounds [A]."""
    slack = TOLERANCE * (high - low).nan_to_num(posinf=0.0)
    return ((episodes.act < low - slack) | (episodes.act > high + slack)).any(0)


def check_actions(envs: VecEnv, episodes: Episodes) -> None:
    """Raises a ``UserError`` unless the data's actions keep the task's bounds."""
    low, high = (torch.from_numpy(side) for side in envs.bounds)
    beyond = outside(episodes, low, high)
    if bool(beyond.any()):
        d = int(beyond.nonzero()[0])
        column = episodes.act[:, d]
        raise found(
            f"{episodes.source}: 'actions' leave the task's bounds in dimension {d}",
            f"{float(low[d]):.4g} to {float(high[d]):.4g}",
            f"{float(column.min()):.4g} to {float(column.max()):.4g}",
            "data of this task, in its units; or clip or rescale the file's actions",
        )


def relabel(episodes: Episodes, reward: WeightedSum) -> Episodes:
    """``episodes`` with every step's reward as ``reward`` gives it: the same that the environments will give."""
    try:
        total = [reward(transition) for transition in transitions(episodes)]
    except UserError as error:
        blind = isinstance(error.__cause__, TypeError | AttributeError) and "NoneType" in str(error.__cause__)
        if episodes.rew is not None and not blind:
            raise UserError(f"{episodes.source} cannot be rewarded: {error}") from None  # which has the house form
        lacks = "rewards" if episodes.rew is None else "`info`: what an environment says besides"
        raise found(
            f"{episodes.source} cannot be rewarded: {error}",
            "a reward of what logged data hold: obs, act, prev_act, next_obs, rew, terminated, truncated",
            f"data without {lacks}",
            "another reward=..., or other data",
        ) from None
    return replace(episodes, rew=torch.from_numpy(np.concatenate(total)))


def transitions(episodes: Episodes) -> Iterator[Transition]:
    """One ``Transition`` an episode. Where a source lacks the observation after a recording's end, the last is repeated;
    where it lacks rewards, they are NaN."""
    for e, (start, end) in enumerate(zip(episodes.starts.tolist(), episodes.ends.tolist(), strict=True)):
        obs, act = episodes.obs[start:end], episodes.act[start:end].numpy()
        last = obs[-1:] if episodes.last_obs is None else episodes.last_obs[e : e + 1]
        ends = np.arange(start, end) == end - 1
        terminated = bool(episodes.terminated[e])
        yield Transition(
            obs=obs.numpy(),
            act=act,
            prev_act=np.concatenate([act[:1], act[:-1]]),
            next_obs=torch.cat([obs[1:], last]).numpy(),
            rew=np.full(len(act), np.nan, np.float32) if episodes.rew is None else episodes.rew[start:end].numpy(),
            terminated=ends & terminated,
            truncated=ends & (not terminated),
            info=None,
        )
