"""Several chunked environments as one.

Letters: N environments, Ta steps of a chunk, To observed steps, O observation dim, A action dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from dprl.envs.chunk import ChunkEnv, make_one
from dprl.envs.observe import Observe
from dprl.errors import UserError, found
from dprl.rewards import WeightedSum

TAKEN = ("success", "return", "return_std", "length", "n", "value", "discounted", "modes", "loss")  # what an evaluation tells anyway


@dataclass(frozen=True)
class VecStep:
    """What one chunk brought in each environment. ``obs`` is the true successor, never the observation of a reset."""

    obs: Any  # [N, To, O]
    rew: np.ndarray  # [N, Ta]
    length: np.ndarray  # [N]
    terminated: np.ndarray  # [N]
    truncated: np.ndarray  # [N]
    success: np.ndarray  # [N]
    task_return: np.ndarray  # [N]
    terms: np.ndarray  # [N, terms]
    info: dict[str, np.ndarray]  # [N] a key; NaN where an environment said nothing
    trace: np.ndarray | None  # [N, Ta, O] the vectors observed

    @property
    def done(self) -> np.ndarray:
        return self.terminated | self.truncated


class VecEnv:
    """Chunked environments stepped together, reset when told to (gymnasium's automatic resets hide successors)."""

    def __init__(
        self,
        envs: SyncVectorEnv | AsyncVectorEnv,
        *,
        terms: Sequence[str],
        has_success: bool,
        info_keys: Sequence[str],
        metrics: Sequence[str],
    ):
        self.envs = envs
        self.terms, self.has_success = tuple(terms), has_success
        self.info_keys, self.metrics = tuple(info_keys), tuple(metrics)
        self.num_envs = envs.num_envs
        self.act_steps, self.act_dim = envs.single_action_space.shape  # type: ignore[misc]
        self.obs_shape = shapes(envs.single_observation_space)

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The least and the largest action: [A], [A]."""
        space = self.envs.single_action_space
        return space.low[0], space.high[0]  # type: ignore[attr-defined]

    def reset(self, *, seeds: Sequence[int | None] | None = None, mask: np.ndarray | None = None) -> Any:
        """Begins new episodes, in the environments of ``mask`` [N] only if given; returns all observations."""
        options = None if mask is None else {"reset_mask": mask}
        obs, _ = self.envs.reset(seed=None if seeds is None else list(seeds), options=options)
        return obs

    def rest(self, mask: np.ndarray) -> None:
        """Leaves the finished environments of ``mask`` [N] as they are: their further chunks have length 0."""
        self.envs.reset(options={"reset_mask": mask, "rest": True})

    def step(self, act: np.ndarray) -> VecStep:
        """Acts the chunks [N, Ta, A]. An environment whose episode has ended wants ``reset`` or ``rest`` first."""
        obs, _, terminated, truncated, info = self.envs.step(act)
        return VecStep(
            obs=obs,
            rew=info["rew"],
            length=info["length"],
            terminated=terminated.copy(),
            truncated=truncated.copy(),
            success=info["success"],
            task_return=info["task_return"],
            terms=info["terms"],
            info={key: info[f"info/{key}"] for key in (*self.info_keys, *self.metrics)},
            trace=info.get("trace"),
        )

    def close(self) -> None:
        self.envs.close()


def shapes(space) -> Any:
    """Sizes of one observation of a chunked ``space``, without the To axis: a list, or a mapping from key to one."""
    if hasattr(space, "spaces"):
        return {key: shapes(part) for key, part in space.spaces.items()}
    return list(space.shape[1:])


def make_vec(
    *,
    id: str,
    kwargs: dict[str, Any],
    max_episode_steps: int | None,
    observe: Observe,
    success_key: str | None,
    info_keys: list[str],
    metrics: list[str],
    backend: Literal["sync", "async"],
    num_envs: int,
    obs_steps: int,
    act_steps: int,
    reward: WeightedSum,
    trace: bool = False,
) -> VecEnv:
    """A vector of any gymnasium environment, in this process (``sync``) or a process each (``async``).

    ``info_keys`` and ``metrics`` are keys of ``info`` whose last value in an episode is kept: ``metrics`` are numbers that
    an evaluation takes the mean of.
    """
    if num_envs < 1:
        raise found("too few environments", "num_envs of at least 1", num_envs, "num_envs=1 or more")
    if backend not in ("sync", "async"):
        raise found("unknown task.env.backend", "sync or async", backend, "task.env.backend=sync")
    if set(metrics) & set(TAKEN):
        taken = sorted(set(metrics) & set(TAKEN))
        raise found("task.env.metrics takes a name that means something else", f"none of {', '.join(TAKEN)}", taken, "another key of info")
    make = partial(
        make_one,
        id=id,
        kwargs=kwargs,
        max_episode_steps=max_episode_steps,
        obs_steps=obs_steps,
        act_steps=act_steps,
        observe=observe,
        reward=reward,
        success_key=success_key,
        info_keys=info_keys,
        metrics=metrics,
        trace=trace,
    )
    try:
        _try_out(make())
    except UserError:
        raise
    except Exception as error:  # whatever an environment raises
        what = f"{type(error).__name__}: {error}"
        raise found(f"task.env.id={id} fails at its first steps", "one that runs", what, "correct it; debug=true shows where") from error
    if backend == "sync":
        envs = SyncVectorEnv([make] * num_envs, autoreset_mode=AutoresetMode.DISABLED)
    else:
        envs = AsyncVectorEnv([make] * num_envs, autoreset_mode=AutoresetMode.DISABLED)
    return VecEnv(envs, terms=reward.names, has_success=success_key is not None, info_keys=info_keys, metrics=metrics)


def _try_out(env: ChunkEnv) -> None:
    """One chunk, so that a mistake in the task or the reward is told before a run begins, and in this process."""
    env.reset(seed=0)
    env.step(np.zeros(env.action_space.shape, np.float32))  # type: ignore[arg-type]
    env.close()


def check_fits(envs: VecEnv, *, obs_shape, act_dim: int, source: str) -> None:
    """Raises a ``UserError`` unless observations and actions have the sizes that ``source`` was made for."""
    for what, expected, got in (("observation", envs.obs_shape, obs_shape), ("action", envs.act_dim, act_dim)):
        if expected != got:
            fix = "name the task or the data it was made with: task=... data.path=..."
            raise found(f"{source} does not fit the task: another {what} size", f"{expected}, the task's", f"{got}, in {source}", fix)
