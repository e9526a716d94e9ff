"""A planner that draws demonstrations of ``dprl/Avoid-v0`` through all of its 24 ways."""

import itertools
from collections.abc import Iterator

import numpy as np

from dprl.envs.avoid import EFFECTOR, FINISH, MAX_STEP, RADII, ROWS

MARGIN = 0.008  # metres kept between the effector and an obstacle at a way-point
OUTER = 0.06  # width used of the gaps that are open to one side
WAYS = tuple(itertools.product(*(range(len(xs) + 1) for _, xs in ROWS)))


def waypoints(way: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Points [7, 2] that lead through the gaps ``way`` (one a row): in and out of each, and over the line."""
    points = []
    for (y, xs), radius, gap in zip(ROWS, RADII, way, strict=True):
        near = radius + EFFECTOR + MARGIN
        low = xs[gap - 1] + near if gap > 0 else xs[0] - near - OUTER
        high = xs[gap] - near if gap < len(xs) else xs[-1] + near + OUTER
        x = rng.uniform(low, high)
        points += [(x, y - 0.055), (x, y + 0.055)]
    return np.array([*points, (points[-1][0], FINISH + 0.08)])


class Expert:
    """Follows way-points with correlated noise on its actions. One pass through ``WAYS`` before any repeats.

    ``__call__(obs)`` gives the next action; ``reset()`` begins the next way.
    """

    def __init__(self, *, seed: int, noise: float):
        self.rng = np.random.default_rng(seed)
        self.noise = noise
        self.ways = self._cycle()
        self.reset()

    def _cycle(self) -> Iterator[tuple[int, ...]]:
        while True:
            yield from (WAYS[i] for i in self.rng.permutation(len(WAYS)))

    def reset(self) -> None:
        self.points = list(waypoints(next(self.ways), self.rng))
        self.drift = np.zeros(2)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        command = obs[:2]
        while len(self.points) > 1 and np.linalg.norm(self.points[0] - command) < MAX_STEP:
            self.points.pop(0)
        towards = self.points[0] - command
        move = 0.85 * MAX_STEP * towards / max(float(np.linalg.norm(towards)), 1e-9)
        self.drift = 0.8 * self.drift + 0.6 * self.rng.normal(size=2) * self.noise * MAX_STEP
        return np.clip(move + self.drift, -MAX_STEP, MAX_STEP)
