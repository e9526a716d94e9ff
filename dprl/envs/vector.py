"""Several chunked environments as one.

Letters: N environments, Ta steps of a chunk, To observed steps, O observation dim, A action dim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from dprl.envs.chunk import ChunkEnv, make_one
from dprl.envs.observe import Observe
from dprl.envs.probe import faster
from dprl.envs.workers import Workers
from dprl.errors import found
from dprl.rewards import WeightedSum

TAKEN = ("success", "return", "return_std", "length", "n", "value", "discounted", "modes", "loss")  # what an evaluation tells anyway


@dataclass(frozen=True)
class VecStep:
    """What one chunk brought in each environment. ``obs`` is the true successor, never the observation of a reset.

    ``faults`` and ``lost`` tell, by environment, why its chunk was dropped: for a number that is not finite, or with the
    process that it ran in. Such a chunk is truncated, has length 0, and its successor is the observation before it.
    """

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
    faults: dict[int, str]
    lost: dict[int, str]

    @property
    def done(self) -> np.ndarray:
        return self.terminated | self.truncated


class VecEnv:
    """Chunked environments stepped together, reset when told to (gymnasium's automatic resets hide successors)."""

    def __init__(
        self,
        envs: SyncVectorEnv | Workers,
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
        self.start(act)
        return self.finish()

    def start(self, act: np.ndarray) -> None:
        """Begins to act the chunks, which environments in processes do while this one does something else; ``finish`` is to follow
        before anything else is asked of them."""
        if not np.isfinite(act).all():
            i, t, a = (int(x) for x in np.argwhere(~np.isfinite(act))[0])
            got = f"{act[i, t, a]} for environment {i}, in step {t + 1} of the chunk, dimension {a}"
            raise found("the policy acts what is no number", "finite actions", got, "an earlier checkpoint, or smaller learning rates")
        if isinstance(self.envs, Workers):
            self.envs.send(act)
        else:
            self._act = act

    def finish(self) -> VecStep:
        """What the chunks that were begun brought."""
        obs, _, terminated, truncated, info = self.envs.receive() if isinstance(self.envs, Workers) else self.envs.step(self._act)
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
            faults={i: why for i, why in enumerate(info.get("fault", ())) if why},
            lost=info.get("lost", {}),
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
    backend: Literal["sync", "async", "envpool", "auto"],
    num_envs: int,
    obs_steps: int,
    act_steps: int,
    reward: WeightedSum,
    trace: bool = False,
    workers: Mapping[str, Any] | None = None,
    first: int = 0,
) -> VecEnv:
    """A vector of any gymnasium environment, in this process (``sync``), in processes (``async``), whichever of the two is
    measured to be faster (``auto``) or, of those that EnvPool has, in its threads (``envpool``).

    ``info_keys`` and ``metrics`` are keys of ``info`` whose last value in an episode is kept: ``metrics`` are numbers that
    an evaluation takes the mean of. ``workers`` is how processes are watched (see ``Workers``); None: they are not. ``first`` is
    the number of the first environment, where this is a part of a larger vector.
    """
    if num_envs < 1:
        raise found("too few environments", "num_envs of at least 1", num_envs, "num_envs=1 or more")
    if backend not in ("sync", "async", "envpool", "auto"):
        raise found("unknown task.env.backend", "sync, async, envpool or auto", backend, "task.env.backend=sync")
    if set(metrics) & set(TAKEN):
        taken = sorted(set(metrics) & set(TAKEN))
        raise found("task.env.metrics takes a name that means something else", f"none of {', '.join(TAKEN)}", taken, "another key of info")
    chunk = dict(obs_steps=obs_steps, act_steps=act_steps, observe=observe, reward=reward)
    chunk |= dict(success_key=success_key, info_keys=info_keys, metrics=metrics)
    chunk |= dict(id=id, kwargs=kwargs, max_episode_steps=max_episode_steps)
    told: dict[str, Any] = dict(terms=reward.names, has_success=success_key is not None, info_keys=info_keys, metrics=metrics)
    if backend == "envpool":
        from dprl.envs.pool import ChunkPool

        pool = ChunkPool(**chunk, num_envs=num_envs)  # type: ignore[arg-type]
        pool.try_out()
        return VecEnv(pool, **told)  # type: ignore[arg-type]
    makes = [partial(make_one, **chunk, trace=trace, index=i) for i in range(first, first + num_envs)]  # type: ignore[arg-type]
    _try_out(makes[0]())
    if backend == "auto":
        backend = faster(makes[0], num_envs, f"{id} {kwargs} {act_steps}")
    if backend == "sync":
        envs = SyncVectorEnv(makes, autoreset_mode=AutoresetMode.DISABLED)
    else:
        envs = Workers(makes, **(workers or dict(processes=None, timeout=None, restarts=0)))
    return VecEnv(envs, **told)


def _try_out(env: ChunkEnv) -> None:
    """One chunk, so that a mistake in the task or the reward is told before a run begins, and in this process."""
    env.reset(seed=0)
    *_, info = env.step(np.zeros(env.action_space.shape, np.float32))  # type: ignore[arg-type]
    env.close()
    if "fault" in info:
        raise found("what the environment tells is not finite", "numbers", info["fault"], "guard its divisions and logarithms")


def check_fits(envs: VecEnv, *, obs_shape, act_dim: int, source: str) -> None:
    """Raises a ``UserError`` unless observations and actions have the sizes that ``source`` was made for."""
    for what, expected, got in (("observation", envs.obs_shape, obs_shape), ("action", envs.act_dim, act_dim)):
        if expected != got:
            fix = "name the task or the data it was made with: task=... data.path=..."
            raise found(f"{source} does not fit the task: another {what} size", f"{expected}, the task's", f"{got}, in {source}", fix)
