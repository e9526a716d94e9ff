"""Scripted expert for `dprl/Avoid-v0` that demonstrates all of its 24 modes."""

import itertools
from collections.abc import Iterator

import numpy as np

from dprl.envs.tasks.avoid import EFFECTOR, FINISH, MAX_STEP, RADII, ROWS

MARGIN = 0.008  # distance in metres between the effector and an obstacle at a waypoint
OUTER = 0.06  # width in metres that is used of a gap that is open to one side
MODES = tuple(itertools.product(*(range(len(xs) + 1) for _, xs in ROWS)))  # one gap per row


def waypoints(mode: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Draw a path through given gaps.

    Args:
        mode: Gap of each row, counted from the left.
        rng: Generator of the positions within the gaps.

    Returns:
        Points `[7, 2]` in metres: before and behind each row, and beyond the finishing line.
    """
    points = []
    for (y, xs), radius, gap in zip(ROWS, RADII, mode, strict=True):
        near = radius + EFFECTOR + MARGIN
        low = xs[gap - 1] + near if gap > 0 else xs[0] - near - OUTER
        high = xs[gap] - near if gap < len(xs) else xs[-1] + near + OUTER
        x = rng.uniform(low, high)
        points += [(x, y - 0.055), (x, y + 0.055)]
    return np.array([*points, (points[-1][0], FINISH + 0.08)])


class Expert:
    """Expert that follows waypoints, with correlated noise on its actions.

    Every episode has another mode; each pass visits all modes once, in random order.

    Args:
        seed: Seed of the modes, the waypoints and the noise.
        noise: Standard deviation of the noise, in units of `MAX_STEP`.
    """

    def __init__(self, *, seed: int, noise: float):
        self.rng = np.random.default_rng(seed)
        self.noise = noise
        self.modes = self._cycle()
        self.reset()

    def _cycle(self) -> Iterator[tuple[int, ...]]:
        while True:
            yield from (MODES[i] for i in self.rng.permutation(len(MODES)))

    def reset(self) -> None:
        """Start an episode with the next mode."""
        self.points = list(waypoints(next(self.modes), self.rng))
        self.drift = np.zeros(2)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Return the next action `[2]` for an observation `[4]` of `AvoidEnv`, in metres."""
        command = obs[:2]
        while len(self.points) > 1 and np.linalg.norm(self.points[0] - command) < MAX_STEP:
            self.points.pop(0)
        offset = self.points[0] - command
        move = 0.85 * MAX_STEP * offset / max(float(np.linalg.norm(offset)), 1e-9)
        self.drift = 0.8 * self.drift + 0.6 * self.rng.normal(size=2) * self.noise * MAX_STEP
        return np.clip(move + self.drift, -MAX_STEP, MAX_STEP)
