"""Environment with an injected fault, for tests of the guards.

    task.env.id=tests.helpers.faults:Faulty-v0 task.env.kwargs.task=dprl/Avoid-v0 task.env.kwargs.what=exit \
        task.env.kwargs.at=100 task.env.kwargs.marker=/tmp/happened
"""

import math
import os
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

FAULTS = ("observation", "reward", "reset", "raise", "exit", "hang")


class Faulty(gym.Wrapper):
    """Environment that fails at a given step.

    The first chunk of an environment is only a validation by `make_vec`, so `at` should be larger than its length.

    Args:
        task: gymnasium id of the wrapped environment.
        what: `observation`: NaN in the observation; `reward`: an infinite reward; `reset`: NaN in the observation of
            the next reset; `raise`: an exception; `exit`: the process ends as by `kill -9`; `hang`: the step never
            returns.
        at: Step at which the fault occurs, counted from 1 over all episodes of this environment.
        marker: File by which several environments share one fault: the first to reach step `at` creates it and fails.
            None: the fault occurs at every step from `at` on.
        **kwargs: Arguments of the wrapped environment.
    """

    def __init__(self, task: str, what: str, at: int, marker: str | None = None, **kwargs: Any):
        super().__init__(gym.make(task, disable_env_checker=True, **kwargs))
        assert what in FAULTS, what
        self.what, self.at, self.marker, self.steps = what, at, None if marker is None else Path(marker), 0

    def due(self) -> bool:
        """Return true if the fault occurs now."""
        if self.steps < self.at:
            return False
        if self.marker is None:
            return True
        try:
            self.marker.open("x").close()
        except FileExistsError:
            return False
        return True

    def reset(self, **arguments: Any) -> Any:
        obs, info = self.env.reset(**arguments)
        return (with_nan(obs) if self.what == "reset" and self.due() else obs), info

    def step(self, action: Any) -> Any:
        self.steps += 1
        obs, rew, *rest = self.env.step(action)
        if self.what == "reset" or not self.due():
            return obs, rew, *rest
        if self.what == "raise":
            raise ZeroDivisionError("the simulator's own mistake")
        if self.what == "exit":
            os._exit(9)
        while self.what == "hang":
            time.sleep(1)
        return (with_nan(obs), rew, *rest) if self.what == "observation" else (obs, math.inf, *rest)


def with_nan(obs: Any) -> Any:
    """Return an observation with NaN as the first element of its first vector."""
    if isinstance(obs, dict):
        name = next(key for key, part in obs.items() if np.issubdtype(part.dtype, np.floating))
        return obs | {name: with_nan(obs[name])}
    return np.where(np.arange(obs.size).reshape(obs.shape) == 0, np.nan, obs)


gym.register("Faulty-v0", "tests.helpers.faults:Faulty", max_episode_steps=100_000)  # the task's own limit comes first
