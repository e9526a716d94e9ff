"""One environment stepped a chunk of actions at a time.

Letters: Ta steps of a chunk, To observed steps, O observation dim, A action dim, L steps that a chunk really ran.
"""

import math
import sys
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from dprl.envs.observe import Observe, vectors
from dprl.errors import UserError, found
from dprl.rewards import NotFinite, Transition, WeightedSum


class Infos(Mapping):
    """What the environment said at each step, stacked by key when a reward asks for it."""

    def __init__(self, steps: list[dict[str, Any]]):
        self.steps = steps

    def __getitem__(self, key: str) -> np.ndarray:
        return np.stack([step[key] for step in self.steps])

    def __iter__(self) -> Iterator[str]:
        return iter(self.steps[0])

    def __len__(self) -> int:
        return len(self.steps[0])


class ChunkEnv(gym.Wrapper):
    """Observes the last To observations, acts Ta actions, stops where the episode stops, and applies the reward.

    ``step`` returns the chunk's summed reward and, in ``info``: ``rew`` [Ta], zero after the chunk stopped; ``length``;
    ``success`` within the chunk; ``task_return``, the task's own reward summed; ``terms``, each reward term summed;
    the last value of each of ``info_keys`` and ``metrics`` as ``info/<key>``, NaN for one of ``info_keys`` that the
    environment does not say; and ``trace`` [Ta, O], the vectors observed, if asked for, NaN after the chunk stopped.
    Actions are cut to the environment's bounds. After ``reset(options={"rest": True})`` a step does nothing and has
    length 0.

    A chunk with an observation or a reward that is not finite is dropped: it has length 0, is truncated, and its successor
    is the observation before it; ``fault`` in ``info`` names what was wrong. So is the first chunk after a reset whose
    observation is not finite (zeros stand for it). What the environment raises becomes a ``UserError`` that names
    ``index``, its place in the vector, and the step.
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
        super().__init__(env)
        if not isinstance(env.action_space, spaces.Box) or len(env.action_space.shape) != 1:
            raise found("the environment's actions", "a vector (Box) of continuous actions", env.action_space, "another task")
        self.single_space, self.observe = observe(env.observation_space)
        self.observation_space = batch_space(self.single_space, obs_steps)
        low, high = env.action_space.low, env.action_space.high
        self.low, self.high = low, high
        self.action_space = batch_space(spaces.Box(low, high, dtype=np.float32), act_steps)
        self.index, self.act_steps, self.reward = index, act_steps, reward
        self.success_key, self.info_keys, self.metrics = success_key, info_keys, metrics
        self.traced = vectors(self.single_space) if trace else None
        self.history: deque = deque(maxlen=obs_steps)
        self.prev_act: np.ndarray | None = None
        self.done = True
        self.steps = 0  # of the episode, before the chunk
        self.fault: str | None = None  # of the observation that the episode began with

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        if options is not None and options.get("rest"):
            self.done = True
            return self._stacked(), {}
        try:
            obs, _ = self.env.reset(seed=seed, options=options)
        except Exception as error:
            raise self._raised(error, "in its reset") from error
        first, self.fault = self.observe(obs), None
        wrong = _not_finite(self._stack([first]))
        if wrong is not None:
            self.fault = f"{wrong[0]} is {wrong[2]} after a reset"
            first = next(iter(iterate(batch_space(self.single_space, 1), create_empty_array(self.single_space, 1))))
        self.history.extend([first] * self.history.maxlen)  # type: ignore[operator]
        self.prev_act, self.done, self.steps = None, False, 0
        return self._stacked(), {}

    def step(self, chunk: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.done:
            return self._stacked(), 0.0, False, False, self._nothing()
        if self.fault is not None:
            return self._dropped(list(self.history), self.fault)
        before = list(self.history)
        acts, observed, rews, infos = [], [self.history[-1]], [], []
        terminated = truncated = False
        for act in np.clip(chunk, self.low, self.high):
            try:
                obs, rew, terminated, truncated, info = self.env.step(act)
            except Exception as error:
                raise self._raised(error, f"at step {self.steps + len(acts) + 1} of its episode") from error
            self.history.append(self.observe(obs))
            acts.append(act)
            observed.append(self.history[-1])
            rews.append(rew)
            infos.append(info)
            if terminated or truncated:
                self.done = True
                break
        transition = self._transition(acts, observed, rews, bool(terminated), bool(truncated), infos)
        wrong = _not_finite(transition.next_obs) or _not_finite(transition.rew, "the task's reward")
        if wrong is None:
            try:
                parts = self.reward.parts(transition)
            except NotFinite as error:
                wrong = f"reward term '{error.term}'", error.step, error.value
        if wrong is not None:
            name, step, value = wrong
            return self._dropped(before, f"{name} is {value} at step {self.steps + step + 1} of its episode")
        self.steps += len(acts)
        info = self._info(rews, parts, infos, observed[1:])
        return self._stacked(), float(parts.sum()), bool(terminated), bool(truncated), info

    def _dropped(self, before: list, fault: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.history.extend(before)
        self.done, self.fault = True, None
        return self._stacked(), 0.0, False, True, self._nothing() | {"fault": fault}

    def _raised(self, error: Exception, when: str) -> UserError:
        if isinstance(error, UserError):
            return error
        frame = traceback.extract_tb(error.__traceback__)[-1]
        name = self.env.spec.id if self.env.spec is not None else type(self.env.unwrapped).__name__
        what = f"environment {self.index} ({name}) raised {type(error).__name__} {when}"
        where = f"{error} ({frame.filename}:{frame.lineno}, in {frame.name})"
        return found(what, "an environment that runs", where, "correct it; debug=true shows more")

    def _nothing(self) -> dict[str, Any]:
        return self._info([], np.zeros((0, len(self.reward.names))), [], [])

    def _transition(self, acts: list, observed: list, rews: list, terminated: bool, truncated: bool, infos: list) -> Transition:
        act = np.asarray(acts)  # [L, A]
        before = act[:1] if self.prev_act is None else self.prev_act[None]
        self.prev_act = act[-1]
        ends = np.zeros(len(act), bool)
        ends[-1] = True
        every = self._stack(observed)  # [L+1, ...]
        return Transition(
            obs=rows_of(every, slice(None, -1)),
            act=act,
            prev_act=np.concatenate([before, act[:-1]]),
            next_obs=rows_of(every, slice(1, None)),
            rew=np.asarray(rews, np.float32),
            terminated=ends & terminated,
            truncated=ends & truncated,
            info=Infos(infos),
        )

    def _info(self, rews: list, parts: np.ndarray, infos: list[dict], observed: list) -> dict[str, Any]:
        rew = np.zeros(self.act_steps, np.float32)
        rew[: len(parts)] = parts.sum(-1)
        out: dict[str, Any] = dict(
            rew=rew,
            length=len(parts),
            success=any(self._success(info) for info in infos),
            task_return=float(np.sum(rews)),
            terms=parts.sum(0),
        )
        for key in self.info_keys:
            out[f"info/{key}"] = float(infos[-1].get(key, np.nan)) if infos else np.nan
        for key in self.metrics:
            out[f"info/{key}"] = float(said(infos[-1], key, "task.env.metrics", "[<key>]")) if infos else np.nan
        if self.traced is not None:
            size, take = self.traced
            out["trace"] = np.full((self.act_steps, size), np.nan, np.float32)
            if observed:
                out["trace"][: len(observed)] = [take(obs) for obs in observed]
        return out

    def _success(self, info: dict) -> bool:
        if self.success_key is None:
            return False
        return bool(said(info, self.success_key, "task.env.success_key", "<key> or null"))

    def _stack(self, items: list) -> Any:
        return concatenate(self.single_space, items, create_empty_array(self.single_space, len(items)))

    def _stacked(self) -> Any:
        return self._stack(list(self.history))


def rows_of(values: Any, rows: slice) -> Any:
    """Those of an array, or of a dictionary of them."""
    return {key: part[rows] for key, part in values.items()} if isinstance(values, dict) else values[rows]


def _not_finite(values: Any, name: str = "the observation") -> tuple[str, int, float] | None:
    """The first of ``values`` [L, ...], an array or a dictionary of them, that is NaN or inf: of what, in which row, which."""
    for key, part in values.items() if isinstance(values, dict) else [(None, values)]:
        if part.dtype.kind != "f" or math.isfinite(np.add.reduce(part, None)):  # a fraction of the time of looking at each
            continue
        for where in np.argwhere(~np.isfinite(part)):  # none, if only the sum was too large
            return name if key is None else f"{name} '{key}'", int(where[0]), float(part[tuple(where)])
    return None


def said(info: dict, key: str, setting: str, form: str) -> Any:
    """``info[key]``, or a ``UserError`` about the setting that names it."""
    if key not in info:
        raise found(f"{setting} names nothing", f"a key of info: {sorted(info)}", key, f"{setting}={form}")
    return info[key]


def _say_once(message: str, said: set[str] = set()) -> None:  # noqa: B006  one memory for the process
    """MuJoCo's warnings, each once: it repeats them for every environment that is made."""
    if message not in said:
        said.add(message)
        print(f"mujoco: {message.splitlines()[0]}", file=sys.stderr)


def make_one(*, id: str, kwargs: dict[str, Any], max_episode_steps: int | None, **chunk) -> ChunkEnv:
    """Makes the gymnasium environment ``id`` (``module:Id-v0`` too) and wraps it; arguments as ``ChunkEnv``'s."""
    import mujoco

    import dprl.envs  # noqa: F401  registers dprl's tasks in a worker process too

    if mujoco.get_mju_user_warning() is None:  # type: ignore[attr-defined]
        mujoco.set_mju_user_warning(_say_once)  # type: ignore[attr-defined]
    try:
        env = gym.make(id, disable_env_checker=True, max_episode_steps=max_episode_steps, **kwargs)
    except UserError:
        raise
    except Exception as error:  # whatever an environment's constructor raises
        fix = f"check the id, its package and task.env.kwargs={kwargs}; debug=true shows where"
        what = f"{type(error).__name__}: {error}"
        raise found(f"task.env.id={id} cannot be made", "an environment of gymnasium, or module:Id-v0", what, fix) from error
    if env.spec is None or env.spec.max_episode_steps is None:
        raise found(f"{id} has no time limit", "an episode that ends", "no max_episode_steps", "task.env.max_episode_steps=1000")
    return ChunkEnv(env, **chunk)
