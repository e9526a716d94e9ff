"""Push-T (Chi et al., 2023): push a block onto the T that is drawn under it. Registered as ``dprl/PushT-v0``.

The simulator is gym-pusht's (the extra ``pusht``), imported when an environment is made. Positions are in pixels of a
field of 512, y downwards; angles in radians.
"""

import os
from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from dprl.errors import found

SIZE = 512.0
GOAL = (256.0, 256.0, np.pi / 4)  # x, y and angle of the block where it should be
ENOUGH = 0.95  # share of the goal that must be covered, for success and for a full score
PARTS = (  # corners of the block's bar and stem, in its own frame
    np.array([(-60.0, 0.0), (60.0, 0.0), (60.0, 30.0), (-60.0, 30.0)]),
    np.array([(-15.0, 30.0), (15.0, 30.0), (15.0, 120.0), (-15.0, 120.0)]),
)
KEYPOINTS = np.array(  # of the block, in its own frame: those that the published demonstrations recorded, in their order
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
OBSERVED = {  # what can be observed -> what the simulator is asked for
    "state": "state",
    "keypoints": "state",
    "pixels": "pixels_agent_pos",
}


def placed(points: np.ndarray, pose: Sequence[float]) -> np.ndarray:
    """``points`` [P, 2] of the block's frame, on the field where the block has this ``pose`` (x, y, angle)."""
    x, y, angle = pose
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]]) + (x, y)


class PushT(gym.Env):
    """Observes the ``state`` (agent x y, block x y, angle); or a dictionary of ``agent_pos`` and, by choice, the block's
    ``keypoints`` [9, 2] or ``pixels`` [96, 96, 3]. Action: where the agent should go; 10 steps a second.

    ``info`` holds besides gym-pusht's own ``max_coverage``, the field's score: the share of the goal that was covered,
    over 0.95, at most 1, and the most of it since the episode began. More than 0.95 covered is ``is_success``, and ends the
    episode. That is rare even in the demonstrations; so report both. The reward is the present score.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, *, observe: str, render_mode: str | None = None):
        if observe not in OBSERVED:
            raise found("unknown task.env.kwargs.observe", f"one of {', '.join(OBSERVED)}", observe, "task.env.kwargs.observe=state")
        self.kind, self.render_mode = observe, render_mode
        self.sim = _simulator(obs_type=OBSERVED[observe])
        self.action_space = self.sim.action_space
        field = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        parts: dict[str, spaces.Space] = {"agent_pos": field, "keypoints": spaces.Box(-np.inf, np.inf, KEYPOINTS.shape, np.float64)}
        self.observation_space = spaces.Dict(parts) if observe == "keypoints" else self.sim.observation_space
        self.best = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.best = 0.0
        obs, info = self.sim.reset(seed=seed)
        return self._seen(obs), info | {"max_coverage": 0.0}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, rew, terminated, truncated, info = self.sim.step(np.asarray(action, np.float64))
        self.best = max(self.best, min(1.0, info["coverage"] / ENOUGH))
        return self._seen(obs), float(rew), bool(terminated), truncated, info | {"max_coverage": self.best}

    def restore(self, state: np.ndarray) -> Any:
        """Begins an episode in a recorded ``state`` [5], everything at rest, and returns what is observed there. The angle
        comes first: setting it turns the block about its centre of mass, and so moves what is called its position."""
        x, y, block_x, block_y, angle = (float(value) for value in state)
        self.sim._setup()
        self.sim.agent.position = x, y
        self.sim.block.angle = angle
        self.sim.block.position = block_x, block_y
        for body in (self.sim.agent, self.sim.block):
            self.sim.space.reindex_shapes_for_body(body)  # contacts and pictures go by the shapes
        self.best = 0.0
        return self._seen(self.sim.get_obs())

    def render(self) -> Any:
        return self.sim.render()

    def close(self) -> None:
        self.sim.close()

    def _seen(self, obs: Any) -> Any:
        if self.kind != "keypoints":
            return obs
        return {"agent_pos": obs[:2], "keypoints": placed(KEYPOINTS, obs[2:])}


def _simulator(**settings: Any) -> Any:
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pictures are drawn to memory: there need be no screen
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        from gym_pusht.envs.pusht import PushTEnv
    except ImportError as error:
        raise found("Push-T wants a package", "one that can be imported", error, "pip install 'dprl[pusht]'") from None
    return PushTEnv(**settings)


def draw(axis: Any) -> None:
    """Draws the goal on a matplotlib axis, as large as the field."""
    from matplotlib.patches import Polygon

    for part in PARTS:
        axis.add_patch(Polygon(placed(part, GOAL), color="#cde8c9", lw=0))
    axis.set(xlim=(0, SIZE), ylim=(SIZE, 0), aspect="equal", xticks=[], yticks=[])
