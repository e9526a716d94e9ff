"""Logged data prepared for reinforcement learning: checks against the task, and rewards by the configured reward."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dprl.data.episodes import Episodes
from dprl.envs.vector_env import VecEnv, check_fits
from dprl.rewards import Transition, WeightedSum
from dprl.utils.errors import UserError

TOLERANCE = 1e-3  # share of an action's range by which rounding may exceed the bounds


def check_sizes(envs: VecEnv, episodes: Episodes) -> None:
    """Check that the observations and actions of the data have the task's sizes.

    Args:
        envs: Environments of the task.
        episodes: The logged data.

    Raises:
        UserError: If a size differs.
    """
    check_fits(envs, obs_shape=episodes.obs_shape, act_dim=episodes.act.shape[-1], source=episodes.source)


def outside_bounds(episodes: Episodes, low: Tensor, high: Tensor) -> Tensor:
    """Return which action dimensions exceed the task's bounds.

    Args:
        episodes: The logged data.
        low: Smallest action [A], in environment units.
        high: Largest action [A], in environment units.

    Returns:
        A boolean mask [A].
    """
    slack = TOLERANCE * (high - low).nan_to_num(posinf=0.0)
    return ((episodes.act < low - slack) | (episodes.act > high + slack)).any(0)


def check_actions(envs: VecEnv, episodes: Episodes) -> None:
    """Check that the actions of the data are within the task's bounds.

    Args:
        envs: Environments of the task.
        episodes: The logged data.

    Raises:
        UserError: If an action dimension exceeds its bounds.
    """
    low, high = (torch.from_numpy(bound) for bound in envs.bounds)
    exceeded = outside_bounds(episodes, low, high)
    if bool(exceeded.any()):
        d = int(exceeded.nonzero()[0])
        column = episodes.act[:, d]
        raise UserError(
            f"{episodes.source}: 'actions' exceed the task's bounds in dimension {d}",
            expected=f"{float(low[d]):.4g} to {float(high[d]):.4g}",
            got=f"{float(column.min()):.4g} to {float(column.max()):.4g}",
            fix="data of this task, in its units; or clip or rescale the file's actions",
        )


def longer_than_the_limit(envs: VecEnv, episodes: Episodes) -> UserError | None:
    """Describe data with an episode that is longer than the task's time limit; None if there is none.

    Such data usually lack marks of the ends of episodes, so that several of them are read as one.

    Args:
        envs: Environments of the task.
        episodes: The logged data.
    """
    longest, limit = int(episodes.lengths.max()), envs.max_episode_steps
    if limit is None or longest <= limit:
        return None
    return UserError(
        f"{episodes.source} has an episode that is longer than the task's time limit",
        expected=f"at most {limit} steps",
        got=f"{longest} steps",
        fix=f"mark the ends of episodes in the file, cut episodes (data.max_episode_steps={limit}), or another task",
    )


def relabel(episodes: Episodes, reward: WeightedSum) -> Episodes:
    """Replace the rewards of the data by those of the configured reward, which the environments use too.

    Args:
        episodes: The logged data.
        reward: The reward function.

    Returns:
        The episodes with new rewards.

    Raises:
        UserError: If the reward fails on the data, for example because it reads rewards or `info` that the data lack.
    """
    try:
        rewards = [reward(transition) for transition in transitions(episodes)]
    except UserError as error:
        reads_info = isinstance(error.__cause__, TypeError | AttributeError) and "NoneType" in str(error.__cause__)
        if episodes.rew is not None and not reads_info:
            # The message has the expected, found and fix lines already.
            raise UserError(f"{episodes.source} cannot be relabelled: {error}") from None
        missing = "rewards" if episodes.rew is None else "`info`, which only an environment returns"
        raise UserError(
            f"{episodes.source} cannot be relabelled: {error}",
            expected="a reward of the fields of logged data: obs, act, prev_act, next_obs, rew, terminated, truncated",
            got=f"data without {missing}",
            fix="another reward=..., or other data",
        ) from None
    return replace(episodes, rew=torch.from_numpy(np.concatenate(rewards)))


def transitions(episodes: Episodes) -> Iterator[Transition]:
    """Yield one `Transition` for each episode.

    Args:
        episodes: The logged data. Without `last_obs`, the last observation of each episode is repeated as its
            successor; without rewards, they are NaN.

    Yields:
        All steps of an episode, as numpy arrays.
    """
    for e, (start, end) in enumerate(zip(episodes.starts.tolist(), episodes.ends.tolist(), strict=True)):
        obs, act = episodes.obs[start:end], episodes.act[start:end].numpy()
        last = obs[-1:] if episodes.last_obs is None else episodes.last_obs[e : e + 1]
        is_last = np.arange(start, end) == end - 1
        terminated = bool(episodes.terminated[e])
        yield Transition(
            obs=obs.numpy(),
            act=act,
            prev_act=np.concatenate([act[:1], act[:-1]]),
            next_obs=torch.cat([obs[1:], last]).numpy(),
            rew=np.full(len(act), np.nan, np.float32) if episodes.rew is None else episodes.rew[start:end].numpy(),
            terminated=is_last & terminated,
            truncated=is_last & (not terminated),
            info=None,
        )
