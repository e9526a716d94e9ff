"""The border to a user's environment: what it returns is checked and copied, and what it raises is named."""

import copy
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from dprl.envs.observation import Observe
from dprl.utils.errors import UserError

MUTABLE = (np.ndarray, list, dict, set)
NUMBERS = (float, int, np.number)


class CheckedEnv(gym.Wrapper):
    """Environment whose observations are converted, and that shares no array with its caller.

    Args:
        env: The environment.
        index: Position in the vector of environments, for messages.
        observe: Conversion of its observations (see `dprl/envs/observation.py`).

    Raises:
        UserError: By `reset` and `step`, if the environment raises an exception, or returns what does not fit its
            spaces or gymnasium's interface. The message names the environment and the step of the episode.
    """

    def __init__(self, env: gym.Env, *, index: int, observe: Observe):
        super().__init__(env)
        self.observation_space, self.observe = observe(env.observation_space)
        name = env.spec.id if env.spec is not None else type(env.unwrapped).__name__
        self.name, self.steps = f"environment {index} ({name})", 0

    @property
    def when(self) -> str:
        """Place in the episode, for messages."""
        return f"at step {self.steps} of its episode" if self.steps else "in reset"

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Reset the environment; return the observation and an empty info."""
        self.steps = 0
        result = self._call(self.env.reset, seed=seed, options=options)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise self._wrong("a reset", "a pair of observation and info", shown(result))
        return self._observation(result[0]), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step the environment once with a copy of `action`; return what it returns, in the types of gymnasium."""
        self.steps += 1
        result = self._call(self.env.step, action.copy())
        if not (isinstance(result, tuple) and len(result) == 5):
            raise self._wrong("a step", "five values: obs, reward, terminated, truncated, info", shown(result))
        obs, rew, terminated, truncated, info = result
        if not is_number(rew):
            raise self._wrong("a reward", "one number", shown(rew))
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            if not is_flag(flag):
                raise self._wrong(f"'{name}'", "true or false", shown(flag))
        if not isinstance(info, Mapping):
            raise self._wrong("an info", "a dictionary", shown(info))
        copied = {key: copy_of(value) if isinstance(value, MUTABLE) else value for key, value in info.items()}
        return self._observation(obs), float(rew), bool(terminated), bool(truncated), copied

    def _observation(self, obs: Any) -> Any:
        out, space = self._call(self.observe, obs), self.observation_space
        if not isinstance(space, spaces.Dict):
            return self._array(out, space, "an observation")
        if not isinstance(out, Mapping) or out.keys() != space.spaces.keys():
            raise self._wrong("an observation", f"a dictionary of {', '.join(space.spaces)}", shown(out))
        return {key: self._array(out[key], part, f"observation '{key}'") for key, part in space.items()}

    def _array(self, value: Any, space: Any, what: str) -> np.ndarray:
        array = np.array(value)
        fits = array.dtype == space.dtype or np.can_cast(array.dtype, space.dtype, "same_kind")
        if array.shape != space.shape or not fits:
            kind = "shape {} and type {}".format
            expected, got = (kind(list(side.shape), side.dtype) for side in (space, array))
            raise self._wrong(what, f"{expected}, those of its space", got)
        return array

    def _call(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call a user's function, and turn an exception into a `UserError`."""
        try:
            return function(*args, **kwargs)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"{self.name} raised {type(error).__name__} {self.when}",
                expected="an environment that runs",
                got=f"{error} ({frame.filename}:{frame.lineno}, in {frame.name})",
                fix="correct the environment; debug=true shows the traceback",
            ) from error

    def _wrong(self, what: str, expected: str, got: str) -> UserError:
        return UserError(
            f"{self.name} returned {what} of the wrong kind {self.when}",
            expected=expected,
            got=got,
            fix="correct the environment, or wrap it",
        )


def copy_of(value: Any) -> Any:
    """Copy a value of an info that the environment may change later."""
    try:
        return copy.deepcopy(value)
    except Exception:  # it holds an object that cannot be copied
        return value


def shown(value: Any) -> str:
    """Return a value and its type for a message."""
    return f"{type(value).__name__}: {str(value)[:200]}"


def is_number(value: Any) -> bool:
    """Return True for a single number, of any library; booleans count."""
    if isinstance(value, NUMBERS):
        return True
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):
        return False
    return array.ndim == 0 and array.dtype.kind in "fiub"


def is_flag(value: Any) -> bool:
    """Return True for a boolean, 0 or 1."""
    return value is True or value is False or (is_number(value) and value in (0, 1))


def success_value(value: Any, key: str) -> bool:
    """Return the value that an info has at `task.env.success_key`.

    Raises:
        UserError: If it is no boolean, 0 or 1.
    """
    if not is_flag(value):
        raise UserError(
            f"task.env.success_key={key}: the environment's info has neither true nor false there",
            expected="a boolean, 0 or 1",
            got=shown(value),
            fix="another key, or a wrapper of the environment that decides on success",
        )
    return bool(value)


def metric_value(value: Any, key: str) -> float:
    """Return the value that an info has at a key of `task.env.info_keys` or `task.env.metrics`.

    Raises:
        UserError: If it is no number.
    """
    if not is_number(value):
        raise UserError(
            f"task.env.info_keys, task.env.metrics: the environment's info has no number at '{key}'",
            expected="one number",
            got=shown(value),
            fix="another key",
        )
    return float(value)


def missing_key(setting: str, form: str, key: str, info: Mapping[str, Any]) -> UserError:
    """Describe a required key that no step of an episode has had in its info.

    Args:
        setting: The setting that names the key.
        form: Its value in the fix, such as `[<key>]`.
        key: The key.
        info: The info of one step.
    """
    return UserError(
        f"{setting} is not in the environment's info",
        expected=f"a key of info: {sorted(map(str, info))}",
        got=key,
        fix=f"{setting}={form}",
    )
