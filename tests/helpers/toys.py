"""Small environments with known results."""

import random

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces


class Counter(gym.Env):
    """Observes (episode, step) and rewards the number of the step. Terminates after `end` steps, if given."""

    def __init__(self, end: int | None = None):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.end, self.episode, self.steps = end, -1, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.steps = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action):
        self.steps += 1
        terminated = self.steps == self.end
        return self._obs(), float(self.steps), terminated, False, {"success": terminated, "act": float(action[0])}

    def _obs(self):
        return np.array([self.episode, self.steps], float)


class Aim(gym.Env):
    """Four steps. The reward is 1 on success: every action was within `tolerance` of the observed number."""

    def __init__(self, tolerance: float = 0.3):
        self.observation_space = spaces.Box(-1, 1, (1,), np.float64)
        self.action_space = spaces.Box(-2, 2, (1,), np.float32)
        self.tolerance = tolerance

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal, self.steps, self.good = self.np_random.uniform(-1, 1, 1), 0, True
        return self.goal, {}

    def step(self, action):
        self.steps += 1
        self.good &= bool(abs(action[0] - self.goal[0]) < self.tolerance)
        success = self.good and self.steps == 4
        return self.goal, float(success), self.steps == 4, False, {"success": success}


class Drawing(Aim):
    """`Aim` with rewards drawn from numpy's global generator."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, np.random.rand(), *rest  # noqa: NPY002


class Dice(Aim):
    """Draws its observation, its reward and its end from the global generators of numpy, torch and Python."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.random.uniform(-1, 1, 1), {}  # noqa: NPY002

    def step(self, action):
        obs = np.random.uniform(-1, 1, 1)  # noqa: NPY002
        return obs, torch.rand(1).item(), random.random() < 0.3, False, {"success": False}


class Named(gym.Env):
    """Observes a dictionary of constant vectors."""

    def __init__(self):
        box = spaces.Box(-1, 1, (2,), np.float64)
        self.observation_space = spaces.Dict({"place": box, "goal": box, "unused": box})
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action):
        return self._obs(), 0.0, False, False, {"success": False}

    def _obs(self):
        return {"place": np.array([1.0, 2.0]), "goal": np.array([3.0, 4.0]), "unused": np.array([5.0, 6.0])}


class Camera(Aim):
    """`Aim` whose number is the brightness of an image [8, 8, 3], beside an uninformative `place`."""

    def __init__(self, tolerance: float = 0.3):
        super().__init__(tolerance)
        image, place = spaces.Box(0, 255, (8, 8, 3), np.uint8), spaces.Box(-1, 1, (2,), np.float64)
        self.observation_space = spaces.Dict({"pixels": image, "place": place})

    def reset(self, *, seed=None, options=None):
        goal, info = super().reset(seed=seed)
        return camera_obs(goal[0]), info

    def step(self, action):
        goal, *rest = super().step(action)
        return camera_obs(goal[0]), *rest


def camera_obs(goal: float) -> dict[str, np.ndarray]:
    """Return the observation of `Camera` for a goal."""
    return {"pixels": np.full((8, 8, 3), round((goal + 1) / 2 * 255), np.uint8), "place": np.array([goal > 2, 0.5])}


gym.register("Counter-v0", "tests.helpers.toys:Counter", max_episode_steps=10)
gym.register("Endless-v0", Counter)
gym.register("Aim-v0", Aim, max_episode_steps=10)
gym.register("Drawing-v0", "tests.helpers.toys:Drawing", max_episode_steps=10)
gym.register("Dice-v0", "tests.helpers.toys:Dice", max_episode_steps=10)
gym.register("Named-v0", Named, max_episode_steps=10)
gym.register("Camera-v0", Camera, max_episode_steps=10)
