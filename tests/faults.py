"""An environment in which something goes wrong, to see that it is noticed.

    task.env.id=faults:Faulty-v0 task.env.kwargs.task=dprl/Avoid-v0 task.env.kwargs.what=exit task.env.kwargs.at=100 \
        task.env.kwargs.marker=/tmp/happened

with this file's folder on PYTHONPATH.
"""

import math
import os
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

WHAT = ("observation", "reward", "reset", "raise", "exit", "hang")


class Faulty(gym.Wrapper):
    """``task``, any gymnasium id, whose step number ``at`` of all that this environment takes (from 1) goes wrong:

    observation: NaN in what is observed; reward: an infinite one; reset: NaN in what the next reset observes, from the first after
    that step on; raise: an exception; exit: the process ends (as ``kill -9`` would end it); hang: it answers no more.
    With ``marker``, a file, it goes wrong once in all environments that share it: the first to get there makes the file.
    Without, at every step from ``at`` on. What is made to try a task out takes one chunk: ``at`` should be larger.
    """

    def __init__(self, task: str, what: str, at: int, marker: str | None = None, **kwargs: Any):
        super().__init__(gym.make(task, disable_env_checker=True, **kwargs))
        assert what in WHAT, what
        self.what, self.at, self.marker, self.taken = what, at, None if marker is None else Path(marker), 0

    def due(self) -> bool:
        if self.taken < self.at:
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
        return (broken(obs) if self.what == "reset" and self.due() else obs), info

    def step(self, action: Any) -> Any:
        self.taken += 1
        obs, rew, *rest = self.env.step(action)
        if self.what == "reset" or not self.due():
            return obs, rew, *rest
        if self.what == "raise":
            raise ZeroDivisionError("the simulator's own mistake")
        if self.what == "exit":
            os._exit(9)
        while self.what == "hang":
            time.sleep(1)
        return (broken(obs), rew, *rest) if self.what == "observation" else (obs, math.inf, *rest)


def broken(obs: Any) -> Any:
    """``obs`` with NaN in its first vector."""
    if isinstance(obs, dict):
        name = next(key for key, part in obs.items() if np.issubdtype(part.dtype, np.floating))
        return obs | {name: broken(obs[name])}
    return np.where(np.arange(obs.size).reshape(obs.shape) == 0, np.nan, obs)


gym.register("Faulty-v0", "faults:Faulty", max_episode_steps=100_000)  # the task's own limit comes first
