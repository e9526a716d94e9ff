"""The default task: steer a planar effector through a field of six obstacles, 24 ways through.

Geometry of the "avoiding" task of D3IL (Jia et al., 2024), on MuJoCo with two slide joints. Registered as
``dprl/Avoid-v0``. Any contact ends the episode as a failure; crossing ``FINISH`` ends it as a success.
"""

from pathlib import Path
from typing import Any, ClassVar

import mujoco
import numpy as np
from gymnasium import spaces
from gymnasium.envs.mujoco import MujocoEnv

ROWS = (  # obstacles by row: y, then the x of each, metres
    (-0.10, (0.500,)),
    (0.08, (0.425, 0.575)),
    (0.26, (0.350, 0.500, 0.650)),
)
RADII = (0.030, 0.025, 0.025)  # of the obstacles, by row
EFFECTOR = 0.015  # radius of the effector
START = np.array([0.525, -0.28])
JITTER = np.array([0.08, 0.02])  # the start is uniform within +- this
FINISH = 0.35  # y of the finishing line
MAX_STEP = 0.016  # furthest the command moves in a step of 35 ms
OBSTACLES = np.array([(x, y, r) for (y, xs), r in zip(ROWS, RADII, strict=True) for x in xs])  # [6, 3]


def clearance(xy: np.ndarray) -> np.ndarray:
    """Distance in metres between the effector at ``xy`` [..., 2] and the nearest obstacle; negative inside."""
    gap = np.linalg.norm(np.asarray(xy)[..., None, :] - OBSTACLES[:, :2], axis=-1) - OBSTACLES[:, 2]
    return gap.min(-1) - EFFECTOR


def route(path: np.ndarray) -> int:
    """The way that ``path`` [L, 2] takes through the field, 0..23 for 2 x 3 x 4 gaps; -1 if it does not cross every row."""
    way = 0
    for y, obstacles in ROWS:
        crossed = np.flatnonzero((path[:-1, 1] < y) & (path[1:, 1] >= y))
        if not len(crossed):
            return -1
        way = way * (len(obstacles) + 1) + int(np.sum(path[crossed[-1] + 1, 0] > np.array(obstacles)))
    return way


def circles() -> list[list[float]]:
    """The obstacles: x, y, radius of each."""
    return OBSTACLES.tolist()


class AvoidEnv(MujocoEnv):
    """Observation: commanded xy, actual xy. Action: change of the command in metres, a step of 35 ms.

    ``info`` holds ``success`` and, once the line is crossed, ``route`` in 0..23: which gap was taken in each
    row (2 x 3 x 4 ways); -1 before. The reward is 1 on crossing the line, else 0.
    """

    metadata: ClassVar = {"render_modes": ["human", "rgb_array", "depth_array"], "render_fps": 29}

    def __init__(self, render_mode: str | None = None, width: int = 480, height: int = 560):
        super().__init__(
            str(Path(__file__).parent / "assets" / "avoid.xml"),
            frame_skip=5,
            observation_space=spaces.Box(-1.0, 1.0, (4,), np.float64),
            render_mode=render_mode,
            camera_name="top",
            width=width,
            height=height,
        )
        self.command = START.copy()
        self.path: list[np.ndarray] = []  # where the effector has been

    def _set_action_space(self):
        self.action_space = spaces.Box(-MAX_STEP, MAX_STEP, (2,), np.float32)
        return self.action_space

    def reset_model(self) -> np.ndarray:
        self.command = START + self.np_random.uniform(-JITTER, JITTER)
        self.set_state(self.command.copy(), np.zeros(2))
        self.path = [self.data.qpos.copy()]
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        move = np.clip(action, -MAX_STEP, MAX_STEP)
        self.command = np.clip(self.command + move, *self.model.actuator_ctrlrange.T)
        self.data.ctrl[:] = self.command
        contact = False
        for _ in range(self.frame_skip):  # looked at after every physics step: a graze must not be missed
            mujoco.mj_step(self.model, self.data)  # type: ignore[attr-defined]
            contact = contact or self.data.ncon > 0
        self.path.append(self.data.qpos.copy())
        success = bool(self.data.qpos[1] > FINISH and not contact)
        info = {"success": success, "route": route(np.array(self.path)) if success else -1}
        if self.render_mode == "human":
            self.render()
        return self._observe(), float(success), success or contact, False, info

    def _observe(self) -> np.ndarray:
        return np.concatenate([self.command, self.data.qpos])


def draw(ax) -> None:
    """Draws the field on a matplotlib axis: obstacles grown by the effector's radius, and the line."""
    from matplotlib.patches import Circle

    for x, y, radius in OBSTACLES:
        ax.add_patch(Circle((x, y), radius + EFFECTOR, color="#e6c3bf", lw=0))
        ax.add_patch(Circle((x, y), radius, color="#b5524a", lw=0))
    ax.axhline(FINISH, color="#3b8a56", lw=1.5)
    ax.set(xlim=(0.17, 0.83), ylim=(-0.34, 0.42), aspect="equal", xticks=[], yticks=[])
