"""A single environment that executes a chunk of actions per step.

Shapes: Ta executed steps, To observed steps, O observation dim, A action dim, L steps that a chunk really ran.
"""

import sys
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from dprl.envs.checked_env import CheckedEnv, metric_value, missing_key, success_value
from dprl.envs.nested import first_non_finite, take_rows
from dprl.envs.observation import Observe, vectors
from dprl.rewards import NonFiniteReward, Transition, WeightedSum
from dprl.utils import seeding
from dprl.utils.errors import UserError


class StackedInfos(Mapping):
    """Read-only view of the infos of L steps as arrays `[L, ...]`, stacked when a key is read.

    Args:
        steps: The environment's info of each step.
    """

    def __init__(self, steps: list[dict[str, Any]]):
        self.steps = steps

    def __getitem__(self, key: str) -> np.ndarray:
        return np.stack([step[key] for step in self.steps])

    def __iter__(self) -> Iterator[str]:
        return iter(self.steps[0])

    def __len__(self) -> int:
        return len(self.steps[0])


class ChunkEnv(gym.Wrapper):
    """Environment that executes chunks of actions and returns the last To observations.

    A chunk stops where the episode stops. Actions are clipped to the environment's bounds. `reset(options={"freeze":
    True})` freezes the environment: until the next reset its chunks do nothing and have length 0.

    A chunk with a non-finite observation or reward is dropped: it has length 0, is truncated, and its successor is the
    observation before it; `fault` in the info gives the reason. If the first observation of an episode is not finite,
    `reset` returns zeros in its place, and the first chunk is dropped.

    The environment and the reward have global generators of their own, which a seed of `reset` seeds too.

    Args:
        env: Environment with a continuous action vector.
        index: Position in the vector of environments.
        obs_steps: Observed steps To. The first observation of an episode fills its own past.
        act_steps: Steps Ta of a chunk.
        observe: Conversion of the environment's observations (see `dprl/envs/observation.py`).
        reward: Reward that replaces the task's own.
        success_key: Key of the info that is true on success; None if the task has no success.
        info_keys: Keys of the info whose last value in an episode is returned; NaN without any.
        metrics: Like `info_keys`, for keys that must occur in every episode. So must `success_key`; a step whose info
            lacks it is no success.
        trace: Return the observed vectors of every step.

    Raises:
        UserError: If the action space is not a vector; by `reset` and `step`, see `CheckedEnv`.
    """

    def __init__(
        self,
        env: gym.Env,
        *,
        index: int,
        obs_steps: int,
        act_steps: int,
        observe: Observe,
        reward: WeightedSum,
        success_key: str | None,
        info_keys: list[str],
        metrics: list[str],
        trace: bool,
    ):
        super().__init__(checked := CheckedEnv(env, index=index, observe=observe))
        if not isinstance(env.action_space, spaces.Box) or len(env.action_space.shape) != 1:
            raise UserError(
                "unsupported actions of the environment",
                expected="a vector (Box) of continuous actions",
                got=env.action_space,
                fix="another task",
            )
        self.single_space = checked.observation_space
        self.observation_space = batch_space(self.single_space, obs_steps)
        low, high = env.action_space.low, env.action_space.high
        self.low, self.high = low, high
        self.action_space = batch_space(spaces.Box(low, high, dtype=np.float32), act_steps)
        self.act_steps, self.reward = act_steps, reward
        self.success_key, self.info_keys, self.metrics = success_key, info_keys, metrics
        self.trace_vectors = vectors(self.single_space) if trace else None
        self.generators = seeding.OwnGenerators(index)
        self.history: deque = deque(maxlen=obs_steps)
        self.prev_act: np.ndarray | None = None
        self.done = True
        self.steps = 0  # of the episode, before the present chunk
        self.fault: str | None = None  # of the first observation of the episode
        self.last_values: dict[str, float] = {}  # of `info_keys` and `metrics`, in the episode
        self.has_success = False  # the episode's info has had `success_key`

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Start an episode, or freeze the environment.

        Args:
            seed: Seed of the environment's generator; None keeps it.
            options: `{"freeze": True}`, or options of the wrapped environment.

        Returns:
            Observations `[To, O]`, and an empty info.
        """
        if options is not None and options.get("freeze"):
            self.done = True
            return self._stacked_history(), {}
        if seed is not None:
            self.generators.seed(seed)
        self.generators.watch = True
        with self.generators:
            first, _ = self.env.reset(seed=seed, options=options)
        self.fault = None
        non_finite = first_non_finite(self._stack([first]), "the observation")
        if non_finite is not None:
            self.fault = f"{non_finite[0]} is {non_finite[2]} after a reset"
            first = next(iter(iterate(batch_space(self.single_space, 1), create_empty_array(self.single_space, 1))))
        self.history.extend([first] * self.history.maxlen)  # type: ignore[operator]
        self.prev_act, self.done, self.steps = None, False, 0
        self.last_values, self.has_success = {}, False
        return self._stacked_history(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Execute a chunk of actions.

        Args:
            action: A chunk of actions `[Ta, A]`, in environment units.

        Returns:
            Observations `[To, O]`, the summed reward, terminated, truncated, and an info with the entries

            - `rew` `[Ta]`: reward of each step, zero after the chunk stopped;
            - `length`: number of steps that the chunk ran;
            - `success`: true if any of these steps was a success;
            - `task_return`: sum of the task's own rewards;
            - `terms`: sum of each reward term;
            - `info/<key>`: last value in the episode so far of each of `info_keys` and `metrics`, NaN without any;
            - `trace` `[Ta, O]`, if requested: observed vectors, NaN after the chunk stopped;
            - `fault`, if the chunk was dropped: the reason.
        """
        if self.done:
            return self._stacked_history(), 0.0, False, False, self._empty_info()
        if self.fault is not None:
            return self._drop(list(self.history), self.fault)
        self.generators.watch = self.steps == 0
        with self.generators:
            return self._execute(action)

    def _execute(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Execute a chunk of an episode that runs; see `step`."""
        history = list(self.history)
        acts, observed, rews, infos = [], [self.history[-1]], [], []
        terminated = truncated = False
        for act in np.clip(action, self.low, self.high):
            obs, rew, terminated, truncated, info = self.env.step(act)
            self.history.append(obs)
            acts.append(act)
            observed.append(obs)
            rews.append(rew)
            infos.append(info)
            if terminated or truncated:
                self.done = True
                break
        transition = self._transition(acts, observed, rews, terminated, truncated, infos)
        parts, non_finite = self._rewards(transition)
        if non_finite is not None:
            name, step, value = non_finite
            return self._drop(history, f"{name} is {value} at step {self.steps + step + 1} of its episode")
        self.steps += len(acts)
        info = self._info(rews, parts, infos, observed[1:])
        if self.done and (missing := self.missing_keys()):
            raise missing_key(*missing[0], infos[-1])
        return self._stacked_history(), float(parts.sum()), terminated, truncated, info

    def missing_keys(self) -> list[tuple[str, str, str]]:
        """Return the required keys that the info of the present episode has not had: setting, its form, and key."""
        missing = [("task.env.metrics", "[<key>]", key) for key in self.metrics if key not in self.last_values]
        if self.success_key is not None and not self.has_success:
            missing.append(("task.env.success_key", "<key> or null", self.success_key))
        return missing

    def _rewards(self, transition: Transition) -> tuple[np.ndarray, tuple[str, int, float] | None]:
        """Return the weighted terms [L, terms] of a chunk, and the first non-finite value in it or them, if any."""
        non_finite = first_non_finite(transition.next_obs, "the observation")
        non_finite = non_finite or first_non_finite(transition.rew, "the task's reward")
        if non_finite is None:
            try:
                return self.reward.parts(transition), None
            except NonFiniteReward as error:
                non_finite = f"reward term '{error.term}'", error.step, error.value
        return np.zeros((0, len(self.reward.names))), non_finite

    def _drop(self, history: list, fault: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Return a dropped chunk whose successor is `history`, and end the episode."""
        self.history.extend(history)
        self.done, self.fault = True, None
        return self._stacked_history(), 0.0, False, True, self._empty_info() | {"fault": fault}

    def _empty_info(self) -> dict[str, Any]:
        return self._info([], np.zeros((0, len(self.reward.names))), [], [])

    def _transition(
        self, acts: list, observed: list, rews: list, terminated: bool, truncated: bool, infos: list
    ) -> Transition:
        act = np.asarray(acts)  # [L, A]
        before = act[:1] if self.prev_act is None else self.prev_act[None]
        self.prev_act = act[-1].copy()
        last = np.zeros(len(act), bool)
        last[-1] = True
        obs = self._stack(observed)  # [L+1, O]
        return Transition(
            obs=take_rows(obs, slice(None, -1)),
            act=act,
            prev_act=np.concatenate([before, act[:-1]]),
            next_obs=take_rows(obs, slice(1, None)),
            rew=np.asarray(rews, np.float32),
            terminated=last & terminated,
            truncated=last & truncated,
            info=StackedInfos(infos),
        )

    def _info(self, rews: list, parts: np.ndarray, infos: list[dict], observed: list) -> dict[str, Any]:
        """Return the info of a chunk of L steps; see `step`."""
        rew = np.zeros(self.act_steps, np.float32)
        rew[: len(parts)] = parts.sum(-1)
        out: dict[str, Any] = dict(
            rew=rew,
            length=len(parts),
            success=any(self._success(info) for info in infos),
            task_return=float(np.sum(rews)),
            terms=parts.sum(0),
        )
        for key in (*self.info_keys, *self.metrics):
            for info in infos:
                if key in info:
                    self.last_values[key] = metric_value(info[key], key)
            out[f"info/{key}"] = self.last_values.get(key, np.nan)
        if self.trace_vectors is not None:
            size, to_vector = self.trace_vectors
            out["trace"] = np.full((self.act_steps, size), np.nan, np.float32)
            if observed:
                out["trace"][: len(observed)] = [to_vector(obs) for obs in observed]
        return out

    def _success(self, info: dict) -> bool:
        if self.success_key is None or self.success_key not in info:
            return False
        self.has_success = True
        return success_value(info[self.success_key], self.success_key)

    def _stack(self, items: list) -> Any:
        return concatenate(self.single_space, items, create_empty_array(self.single_space, len(items)))

    def _stacked_history(self) -> Any:
        return self._stack(list(self.history))


_mujoco_warnings: set[str] = set()  # printed in this process


def _print_once(message: str) -> None:
    """Print a warning of MuJoCo once; it is repeated for every environment that is constructed."""
    if message not in _mujoco_warnings:
        _mujoco_warnings.add(message)
        print(f"mujoco: {message.splitlines()[0]}", file=sys.stderr)


def make_chunk_env(*, id: str, kwargs: dict[str, Any], max_episode_steps: int | None, **chunk) -> ChunkEnv:
    """Make a gymnasium environment and wrap it.

    Args:
        id: gymnasium id; `module:Id-v0` imports `module` first.
        kwargs: Arguments of the environment.
        max_episode_steps: Time limit in environment steps; None keeps that of the registration.
        **chunk: Arguments of `ChunkEnv`.

    Returns:
        The wrapped environment.

    Raises:
        UserError: If the environment cannot be made, or has no time limit.
    """
    import mujoco

    import dprl.envs  # noqa: F401  registers dprl's tasks in a worker process too

    if mujoco.get_mju_user_warning() is None:  # type: ignore[attr-defined]
        mujoco.set_mju_user_warning(_print_once)  # type: ignore[attr-defined]
    try:
        with seeding.forked(chunk["index"]):
            env = gym.make(id, disable_env_checker=True, max_episode_steps=max_episode_steps, **kwargs)
    except UserError:
        raise
    except Exception as error:  # a constructor may raise anything
        raise UserError(
            f"task.env.id={id} cannot be made",
            expected="an environment of gymnasium, or module:Id-v0",
            got=f"{type(error).__name__}: {error}",
            fix=f"check the id, its package and task.env.kwargs={kwargs}; debug=true shows the traceback",
        ) from error
    if env.spec is None or env.spec.max_episode_steps is None:
        raise UserError(
            f"{id} has no time limit",
            expected="an episode that ends",
            got="no max_episode_steps",
            fix="task.env.max_episode_steps=1000",
        )
    return ChunkEnv(env, **chunk)
