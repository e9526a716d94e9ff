"""Vectors of chunked environments, in this process, in worker processes or in EnvPool's threads.

Shapes: N environments, Ta executed steps, To observed steps, O observation dim, A action dim.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from dprl.envs.async_env import AsyncVecEnv
from dprl.envs.chunk_env import ChunkEnv, make_chunk_env
from dprl.envs.observation import Observe
from dprl.rewards import WeightedSum
from dprl.utils.errors import UserError
from dprl.utils.system import cores

# Names of an evaluation's own results, which task.env.metrics must not reuse.
RESERVED_METRICS = ("success", "return", "return_std", "length", "n", "value", "discounted", "modes", "loss")
MEASURE_SECONDS = 0.3  # duration of stepping, per backend
MIN_SPEEDUP = 1.2  # of processes over a single process, to be worth their memory and startup time


@dataclass(frozen=True)
class VecStep:
    """Result of one chunk in every environment.

    A dropped chunk is truncated, has length 0, and its successor is the observation before it.

    Args:
        obs: Observations after the chunk `[N, To, O]`: the true successors, never those of a reset.
        rew: Reward of each step `[N, Ta]`, zero after the chunk stopped.
        length: Number of steps that the chunk ran `[N]`.
        terminated: Whether the episode ended `[N]`.
        truncated: Whether a time limit or a fault cut the episode off `[N]`.
        success: Whether a step of the chunk was a success `[N]`.
        task_return: Sum of the task's own rewards `[N]`.
        terms: Sum of each reward term `[N, terms]`.
        info: From each of `info_keys` and `metrics` to its last values `[N]`; NaN where the environment has none.
        trace: Observed vectors of each step `[N, Ta, O]`, if requested.
        faults: By environment, the reason why a chunk with a non-finite value was dropped.
        lost: By environment, the reason why a chunk was dropped with the process that ran it.
    """

    obs: Any
    rew: np.ndarray
    length: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: np.ndarray
    task_return: np.ndarray
    terms: np.ndarray
    info: dict[str, np.ndarray]
    trace: np.ndarray | None
    faults: dict[int, str]
    lost: dict[int, str]

    @property
    def done(self) -> np.ndarray:
        """Episodes that ended with this chunk, bool `[N]`."""
        return self.terminated | self.truncated


class VecEnv:
    """N chunked environments that are stepped together and reset explicitly.

    gymnasium's automatic resets are off, because they replace the true successor of an episode's last step.

    Args:
        envs: Vector of `ChunkEnv`.
        terms: Names of the reward terms.
        has_success: Whether the task has a notion of success.
        info_keys: Keys of the info that a step returns.
        metrics: Keys of the info that a step returns and an evaluation averages.
        max_episode_steps: Time limit of an episode, if it is known.

    Attributes:
        seeds_episodes: Whether `reset` can seed some of the environments; if not, only all of them together.
    """

    def __init__(
        self,
        envs: SyncVectorEnv | AsyncVecEnv,
        *,
        terms: Sequence[str],
        has_success: bool,
        info_keys: Sequence[str],
        metrics: Sequence[str],
        max_episode_steps: int | None = None,
    ):
        self.envs, self.max_episode_steps = envs, max_episode_steps
        self.terms, self.has_success = tuple(terms), has_success
        self.info_keys, self.metrics = tuple(info_keys), tuple(metrics)
        self.num_envs = envs.num_envs
        self.seeds_episodes = getattr(envs, "seeds_episodes", True)
        self.act_steps, self.act_dim = envs.single_action_space.shape  # type: ignore[misc]
        self.obs_shape = observation_shape(envs.single_observation_space)

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and the largest action, `[A]` each."""
        space = self.envs.single_action_space
        return space.low[0], space.high[0]  # type: ignore[attr-defined]

    def reset(self, *, seeds: Sequence[int | None] | None = None, mask: np.ndarray | None = None) -> Any:
        """Start new episodes.

        Args:
            seeds: Seed of each environment; None keeps its generator.
            mask: Environments to reset, bool `[N]`; None resets all.

        Returns:
            Observations of all environments `[N, To, O]`.
        """
        options = None if mask is None else {"reset_mask": mask}
        obs, _ = self.envs.reset(seed=None if seeds is None else list(seeds), options=options)
        return obs

    def freeze_finished(self, mask: np.ndarray) -> None:
        """Freeze finished environments until their next reset: their chunks have length 0.

        Args:
            mask: Environments to freeze, bool `[N]`.
        """
        self.envs.reset(options={"reset_mask": mask, "freeze": True})

    def step(self, act: np.ndarray) -> VecStep:
        """Execute a chunk in every environment.

        Args:
            act: Chunks of actions `[N, Ta, A]`, in environment units. An environment whose episode has ended has to
                be reset or frozen before.

        Returns:
            The results.

        Raises:
            UserError: If an action is not finite, or an environment failed.
        """
        self.start(act)
        return self.finish()

    def start(self, act: np.ndarray) -> None:
        """Start a step, which worker processes execute in the background. Call `finish` before any other method.

        Args:
            act: Chunks of actions `[N, Ta, A]`, in environment units.

        Raises:
            UserError: If an action is not finite.
        """
        if not np.isfinite(act).all():
            i, t, a = (int(x) for x in np.argwhere(~np.isfinite(act))[0])
            raise UserError(
                "the policy produced a non-finite action",
                expected="finite actions",
                got=f"{act[i, t, a]} for environment {i}, in step {t + 1} of the chunk, dimension {a}",
                fix="an earlier checkpoint, or smaller learning rates",
            )
        if isinstance(self.envs, AsyncVecEnv):
            self.envs.send(act)
        else:
            self._act = act

    def finish(self) -> VecStep:
        """Wait for the step that was started, and return its results."""
        obs, _, terminated, truncated, info = (
            self.envs.receive() if isinstance(self.envs, AsyncVecEnv) else self.envs.step(self._act)
        )
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
            faults={i: reason for i, reason in enumerate(info.get("fault", ())) if reason},
            lost=info.get("lost", {}),
        )

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()


def observation_shape(space: Any) -> Any:
    """Return the shape of one observation of a chunked space, without the To axis.

    Args:
        space: `single_observation_space` of a vector of `ChunkEnv`.

    Returns:
        A list of sizes, or a dictionary from key to such a list.
    """
    if hasattr(space, "spaces"):
        return {key: observation_shape(part) for key, part in space.spaces.items()}
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
    """Make a vector of chunked environments from any gymnasium environment with continuous actions.

    Args:
        id: gymnasium id, for example `Hopper-v5`; `module:Id-v0` imports `module` first.
        kwargs: Arguments of the environment.
        max_episode_steps: Time limit in environment steps; None keeps that of the registration.
        observe: Conversion of the observations, for example `dprl.envs.observation.flatten` with its `keys`.
        success_key: Key of the info that is true on success; None if the task has no success. Steps may lack it, but
            not whole episodes.
        info_keys: Keys of the info whose last value in an episode is returned; NaN where it has none.
        metrics: Like `info_keys`, for numbers whose mean an evaluation reports; each episode must have them.
        backend: `sync` steps the environments in this process, `async` in worker processes, `envpool` in EnvPool's
            threads, and `auto` selects the faster of the first two by measuring both.
        num_envs: Number N of environments.
        obs_steps: Observed steps To.
        act_steps: Steps Ta of a chunk.
        reward: Reward that replaces the task's own.
        trace: Return the observed vectors of every step, for figures of paths; not with `envpool`.
        workers: Arguments of `AsyncVecEnv` (`processes`, `timeout`, `restarts`); None neither limits the time of
            worker processes nor replaces them.
        first: Index of the first environment, if this vector is a part of a larger one.

    Returns:
        The environments, not yet reset.

    Raises:
        UserError: If a setting is invalid, an environment cannot be made, or its first chunk fails.

    Example:
        >>> envs = make_vec(
        ...     id="Hopper-v5", kwargs={}, max_episode_steps=None, observe=partial(flatten, keys=None),
        ...     success_key=None, info_keys=[], metrics=[], backend="sync", num_envs=4, obs_steps=1, act_steps=4,
        ...     reward=TASK_ONLY,
        ... )
        >>> obs = envs.reset(seeds=range(4))  # [4, 1, 11]
        >>> step = envs.step(np.zeros((4, 4, 3)))  # step.obs: [4, 1, 11], step.rew: [4, 4]
    """
    if num_envs < 1:
        raise UserError(
            "too few environments", expected="num_envs of at least 1", got=num_envs, fix="num_envs=1 or more"
        )
    if backend not in ("sync", "async", "envpool", "auto"):
        raise UserError(
            "unknown task.env.backend",
            expected="sync, async, envpool or auto",
            got=backend,
            fix="task.env.backend=sync",
        )
    reserved = sorted(set(metrics) & set(RESERVED_METRICS))
    if reserved:
        raise UserError(
            "task.env.metrics has a reserved name",
            expected=f"none of {', '.join(RESERVED_METRICS)}",
            got=reserved,
            fix="another key of info",
        )
    settings: dict[str, Any] = dict(
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
    )
    names: dict[str, Any] = dict(
        terms=reward.names, has_success=success_key is not None, info_keys=info_keys, metrics=metrics
    )
    if backend == "envpool":
        from dprl.envs.envpool_env import EnvPoolVecEnv

        pool = EnvPoolVecEnv(**settings, num_envs=num_envs)
        pool.validate()
        return VecEnv(pool, max_episode_steps=max_episode_steps, **names)  # type: ignore[arg-type]
    env_fns = [partial(make_chunk_env, **settings, trace=trace, index=i) for i in range(first, first + num_envs)]
    limit = _validate(env_fns[0]())
    if backend == "auto":
        backend = faster_backend(env_fns[0], num_envs, f"{id} {kwargs} {act_steps}")
    if backend == "sync":
        envs = SyncVectorEnv(env_fns, autoreset_mode=AutoresetMode.DISABLED)
    else:
        envs = AsyncVecEnv(env_fns, **(workers or dict(processes=None, timeout=None, restarts=0)))
    return VecEnv(envs, max_episode_steps=limit, **names)


def _validate(env: ChunkEnv) -> int | None:
    """Run one chunk in this process, so that a mistake in the task or the reward is reported before a run starts.

    If the info lacks a key that must occur in each episode, the episode continues to its end.

    Returns:
        The time limit of an episode.
    """
    env.reset(seed=0)
    act = np.zeros(env.action_space.shape, np.float32)  # type: ignore[arg-type]
    *_, info = env.step(act)
    while env.missing_keys() and not env.done:
        *_, info = env.step(act)
    env.close()
    if "fault" in info:
        raise UserError(
            "the environment returns a value that is not finite",
            expected="finite observations and rewards",
            got=info["fault"],
            fix="guard its divisions and logarithms",
        )
    return None if env.spec is None else env.spec.max_episode_steps


def check_fits(envs: VecEnv, *, obs_shape: Any, act_dim: int, source: str) -> None:
    """Check that environments have the sizes of a policy or of data.

    Args:
        envs: Environments of the task.
        obs_shape: Shape of one observation, a list or a dictionary of lists.
        act_dim: Action dim A.
        source: Policy or data with these sizes, for the message.

    Raises:
        UserError: If a size differs.
    """
    for kind, expected, got in (("observation", envs.obs_shape, obs_shape), ("action", envs.act_dim, act_dim)):
        if expected != got:
            raise UserError(
                f"{source} does not fit the task: another {kind} size",
                expected=f"{expected}, the task's",
                got=f"{got}, in {source}",
                fix="set the task or the data that it was made with: task=... data.path=...",
            )


_measured_backends: dict[str, Literal["sync", "async"]] = {}  # results of `faster_backend` in this process, by name


def faster_backend(env_fn: Callable[[], ChunkEnv], num_envs: int, name: str) -> Literal["sync", "async"]:
    """Measure which backend steps more chunks per second with a random action.

    Both backends return the same results.

    Args:
        env_fn: Constructor of an environment.
        num_envs: Number of environments.
        name: Key under which the result is reused in this process.

    Returns:
        `async` if worker processes are faster by the factor `MIN_SPEEDUP`, else `sync`.
    """
    processes = min(num_envs, cores())
    if processes == 1:
        return "sync"
    if name not in _measured_backends:
        sync = chunks_per_second(SyncVectorEnv([env_fn], autoreset_mode=AutoresetMode.DISABLED))
        parallel = chunks_per_second(AsyncVecEnv([env_fn] * num_envs, processes=None, timeout=None, restarts=0))
        _measured_backends[name] = "async" if parallel > MIN_SPEEDUP * sync else "sync"
        print(
            f"task.env.backend=auto: {_measured_backends[name]} "
            f"({sync:.0f} chunks/s in this process, {parallel:.0f} in {processes} others)"
        )
    return _measured_backends[name]


def chunks_per_second(envs: SyncVectorEnv | AsyncVecEnv) -> float:
    """Step environments for `MEASURE_SECONDS`, close them, and return the number of chunks per second."""
    envs.action_space.seed(0)
    seeds: list[int | None] = [0] * envs.num_envs
    envs.reset(seed=seeds)
    act = envs.action_space.sample()
    chunks, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < MEASURE_SECONDS:
        _, _, terminated, truncated, _ = envs.step(act)
        chunks += envs.num_envs
        if (done := terminated | truncated).any():
            envs.reset(options={"reset_mask": np.asarray(done)})
    envs.close()
    return chunks / elapsed
