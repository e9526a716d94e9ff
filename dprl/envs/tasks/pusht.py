"""Push-T: push a T-shaped block onto a target (Chi et al., 2023). Registered as `dprl/PushT-v0`.

The simulator is that of gym-pusht (the extra `pusht`), imported when an environment is constructed. Positions are in
pixels of a field of 512 x 512, y downwards; angles are in radians.

Shapes: P points.
"""

import os
from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from dprl.utils.errors import UserError

SIZE = 512.0
GOAL = (256.0, 256.0, np.pi / 4)  # target pose of the block: x, y, angle
SUCCESS_COVERAGE = 0.95  # fraction of the target that must be covered, for success and for a full score
PARTS = (  # corners of the block's bar and stem, in its own frame
    np.array([(-60.0, 0.0), (60.0, 0.0), (60.0, 30.0), (-60.0, 30.0)]),
    np.array([(-15.0, 30.0), (15.0, 30.0), (15.0, 120.0), (-15.0, 120.0)]),
)
KEYPOINTS = np.array(  # of the block in its own frame, as in the published demonstrations
    [
        (9.2698, 90.0410),
        (-60.9835, -1.1867),
        (60.9128, -1.3934),
        (-0.2705, 25.5436),
        (-14.0649, 122.8159),
        (39.0027, 32.8574),
        (-39.9664, 32.7297),
        (-16.8243, 62.8632),
        (23.5415, -1.7003),
    ]
)
SIMULATOR_OBS = {"state": "state", "keypoints": "state", "pixels": "pixels_agent_pos"}  # obs_type of gym-pusht


def transform_points(points: np.ndarray, pose: Sequence[float]) -> np.ndarray:
    """Transform points from the block's frame to the field.

    Args:
        points: Points in the block's frame `[P, 2]`, in pixels.
        pose: x, y and angle of the block.

    Returns:
        Points on the field `[P, 2]`, in pixels.
    """
    x, y, angle = pose
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]]) + (x, y)


class PushT(gym.Env):
    """Push-T with a choice of observations, 10 steps per second.

    Observation: the `state` `[5]` (agent x y, block x y, angle), or a dictionary of `agent_pos` `[2]` and either
    `keypoints` `[9, 2]` of the block or `pixels` `[96, 96, 3]`. Action `[2]`: target position of the agent, in pixels.

    The score is the covered fraction of the target, over 0.95 and at most 1. The reward is the present score. Beside
    gym-pusht's own entries the info holds `max_coverage`, the best score of the episode. A coverage above 0.95 is
    `is_success` and ends the episode; since that is rare even in the demonstrations, report both.

    Args:
        observe: `state`, `keypoints` or `pixels`.
        render_mode: gymnasium's render mode; None does not render.

    Raises:
        UserError: If `observe` is unknown, or gym-pusht is not installed.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}  # type: ignore[misc]

    def __init__(self, *, observe: str, render_mode: str | None = None):
        if observe not in SIMULATOR_OBS:
            raise UserError(
                "unknown task.env.kwargs.observe",
                expected=f"one of {', '.join(SIMULATOR_OBS)}",
                got=observe,
                fix="task.env.kwargs.observe=state",
            )
        self.observe, self.render_mode = observe, render_mode
        self.sim = _simulator(obs_type=SIMULATOR_OBS[observe])
        self.action_space = self.sim.action_space
        parts: dict[str, spaces.Space] = {
            "agent_pos": spaces.Box(-np.inf, np.inf, (2,), np.float64),
            "keypoints": spaces.Box(-np.inf, np.inf, KEYPOINTS.shape, np.float64),
        }
        self.observation_space = spaces.Dict(parts) if observe == "keypoints" else self.sim.observation_space
        self.best = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode from a random state."""
        super().reset(seed=seed)
        self.best = 0.0
        obs, info = self.sim.reset(seed=seed)
        return self._convert(obs), info | {"max_coverage": 0.0}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Move the agent towards `action` `[2]` for 0.1 s."""
        obs, rew, terminated, truncated, info = self.sim.step(np.asarray(action, np.float64))
        self.best = max(self.best, min(1.0, info["coverage"] / SUCCESS_COVERAGE))
        return self._convert(obs), float(rew), bool(terminated), truncated, info | {"max_coverage": self.best}

    def restore(self, state: np.ndarray) -> Any:
        """Start an episode from a recorded state, at rest.

        Args:
            state: Agent x y, block x y and angle `[5]`.

        Returns:
            The observation.
        """
        x, y, block_x, block_y, angle = (float(value) for value in state)
        self.sim._setup()
        self.sim.agent.position = x, y
        self.sim.block.angle = angle  # before the position: it turns the block about its centre of mass
        self.sim.block.position = block_x, block_y
        for body in (self.sim.agent, self.sim.block):
            self.sim.space.reindex_shapes_for_body(body)  # contacts and images depend on the shapes
        self.best = 0.0
        return self._convert(self.sim.get_obs())

    def render(self) -> Any:
        """Return an image of the field."""
        return self.sim.render()

    def close(self) -> None:
        """Close the simulator."""
        self.sim.close()

    def _convert(self, obs: Any) -> Any:
        if self.observe != "keypoints":
            return obs
        return {"agent_pos": obs[:2], "keypoints": transform_points(KEYPOINTS, obs[2:])}


def _simulator(**settings: Any) -> Any:
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # render to memory: no display is needed
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        from gym_pusht.envs.pusht import PushTEnv
    except ImportError as error:
        raise UserError(
            "Push-T requires a package", expected="an importable package", got=error, fix="pip install 'dprl[pusht]'"
        ) from None
    return PushTEnv(**settings)


def draw(axis: Any) -> None:
    """Draw the target, and scale an axis to the field.

    Args:
        axis: matplotlib axis.
    """
    from matplotlib.patches import Polygon

    for part in PARTS:
        axis.add_patch(Polygon(transform_points(part, GOAL), color="#cde8c9", lw=0))
    axis.set(xlim=(0, SIZE), ylim=(SIZE, 0), aspect="equal", xticks=[], yticks=[])
