"""A custom environment, its task file and its scripted expert: move a point to a goal.

The task is examples/configs/task/point.yaml, which names the environment as `module:Id`. Run from the root of the
repository:

    dprl demos --config-dir=examples/configs task=point episodes=50
    dprl pretrain --config-dir=examples/configs task=point
    dprl finetune --config-dir=examples/configs task=point algo=dppo algo.env_steps=100000

Any gymnasium environment with continuous actions works in the same way. Without an expert, pretrain from your own data:
`data.path=<an HDF5 file in D4RL's layout>`.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

RADIUS = 0.05  # of the goal
MAX_STEP = 0.1  # largest move in each direction


class PointReach(gym.Env):
    """A point in the square [-1, 1] x [-1, 1] that must reach a goal.

    Observation `[4]`: x and y of the point and of the goal. Action `[2]`: the move. The reward is 1 at the goal.
    """

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (4,), np.float64)
        self.action_space = spaces.Box(-MAX_STEP, MAX_STEP, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Draw the point and the goal."""
        super().reset(seed=seed)
        self.point, self.goal = self.np_random.uniform(-1, 1, (2, 2))
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move the point."""
        self.point = np.clip(self.point + np.clip(action, -MAX_STEP, MAX_STEP), -1, 1)
        success = bool(np.linalg.norm(self.point - self.goal) < RADIUS)
        return self._observe(), float(success), success, False, {"success": success}

    def _observe(self) -> np.ndarray:
        return np.concatenate([self.point, self.goal])


class Expert:
    """An expert that moves towards the goal, with noise.

    Args:
        seed: Seed of the noise.
        noise: Standard deviation of the noise, in units of the observation.
    """

    def __init__(self, *, seed: int, noise: float):
        self.rng = np.random.default_rng(seed)
        self.noise = noise

    def reset(self) -> None:
        """Begin an episode."""

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Return the action `[2]` for an observation `[4]`."""
        return obs[2:] - obs[:2] + self.noise * self.rng.normal(size=2)


gym.register("PointReach-v0", "examples.custom_env:PointReach", max_episode_steps=60)
