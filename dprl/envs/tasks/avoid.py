"""The default task: move a planar effector through a field of six obstacles, with 24 modes.

The geometry is that of the task "avoiding" of D3IL (Jia et al., 2024), in MuJoCo with two slide joints. Registered as
`dprl/Avoid-v0`. Any contact ends the episode as a failure; crossing `FINISH` ends it as a success.

Shapes: L steps.
"""

from pathlib import Path
from typing import Any, ClassVar

import mujoco
import numpy as np
from gymnasium import spaces
from gymnasium.envs.mujoco import MujocoEnv

ROWS = (  # obstacles by row: y, then the x of each, in metres
    (-0.10, (0.500,)),
    (0.08, (0.425, 0.575)),
    (0.26, (0.350, 0.500, 0.650)),
)
RADII = (0.030, 0.025, 0.025)  # of the obstacles in metres, by row
EFFECTOR = 0.015  # radius of the effector in metres
START = np.array([0.525, -0.28])
JITTER = np.array([0.08, 0.02])  # the start is uniform within +- these
FINISH = 0.35  # y of the finishing line
MAX_STEP = 0.016  # largest change of the command in metres, per step of 35 ms
OBSTACLES = np.array([(x, y, r) for (y, xs), r in zip(ROWS, RADII, strict=True) for x in xs])  # [6, 3]: x, y, radius


def clearance(xy: np.ndarray) -> np.ndarray:
    """Compute the distance between the effector and the nearest obstacle.

    Args:
        xy: Positions of the effector `[..., 2]`, in metres.

    Returns:
        Distances `[...]` in metres, negative in contact.
    """
    gap = np.linalg.norm(np.asarray(xy)[..., None, :] - OBSTACLES[:, :2], axis=-1) - OBSTACLES[:, 2]
    return gap.min(-1) - EFFECTOR


def mode_of(path: np.ndarray) -> int:
    """Identify the gaps through which a path crosses the rows of obstacles.

    Args:
        path: Positions of the effector `[L, 2]`, in metres.

    Returns:
        Mode 0..23, for 2 x 3 x 4 gaps, by the last crossing of each row; -1 if a row is not crossed.
    """
    mode = 0
    for y, obstacles in ROWS:
        crossed = np.flatnonzero((path[:-1, 1] < y) & (path[1:, 1] >= y))
        if not len(crossed):
            return -1
        mode = mode * (len(obstacles) + 1) + int(np.sum(path[crossed[-1] + 1, 0] > np.array(obstacles)))
    return mode


def circles() -> list[list[float]]:
    """Return x, y and radius of each obstacle, in metres."""
    return OBSTACLES.tolist()


class AvoidEnv(MujocoEnv):
    """Planar obstacle field with a position-controlled effector.

    Observation `[4]`: commanded x and y, actual x and y, in metres. Action `[2]`: change of the command in metres, per
    step of 35 ms. The reward is 1 on crossing the finishing line, else 0. The info holds `success`, and `mode`: 0..23
    (see `mode_of`) on success, else -1.

    Args:
        render_mode: gymnasium's render mode; None does not render.
        width: Width of rendered images, in pixels.
        height: Height of rendered images, in pixels.
    """

    metadata: ClassVar = {"render_modes": ["human", "rgb_array", "depth_array"], "render_fps": 29}  # type: ignore[misc]

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
        self.path: list[np.ndarray] = []  # positions of the effector in this episode

    def _set_action_space(self):
        self.action_space = spaces.Box(-MAX_STEP, MAX_STEP, (2,), np.float32)
        return self.action_space

    def reset_model(self) -> np.ndarray:
        """Move the effector to a random start; return the observation."""
        self.command = START + self.np_random.uniform(-JITTER, JITTER)
        self.set_state(self.command.copy(), np.zeros(2))
        self.path = [self.data.qpos.copy()]
        return self._observe()

    def step(  # type: ignore[override]
        self, action: np.ndarray
    ) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move the command by `action` [2] and simulate 35 ms."""
        move = np.clip(action, -MAX_STEP, MAX_STEP)
        self.command = np.clip(self.command + move, *self.model.actuator_ctrlrange.T)
        self.data.ctrl[:] = self.command
        contact = False
        for _ in range(self.frame_skip):  # checked after every physics step, so that no brief contact is missed
            mujoco.mj_step(self.model, self.data)  # type: ignore[attr-defined]
            contact = contact or self.data.ncon > 0
        self.path.append(self.data.qpos.copy())
        success = bool(self.data.qpos[1] > FINISH and not contact)
        info = {"success": success, "mode": mode_of(np.array(self.path)) if success else -1}
        if self.render_mode == "human":
            self.render()
        return self._observe(), float(success), success or contact, False, info

    def _observe(self) -> np.ndarray:
        return np.concatenate([self.command, self.data.qpos])


def draw(ax) -> None:
    """Draw the obstacles, enlarged by the effector's radius, and the finishing line.

    Args:
        ax: matplotlib axis.
    """
    from matplotlib.patches import Circle

    for x, y, radius in OBSTACLES:
        ax.add_patch(Circle((x, y), radius + EFFECTOR, color="#e6c3bf", lw=0))
        ax.add_patch(Circle((x, y), radius, color="#b5524a", lw=0))
    ax.axhline(FINISH, color="#3b8a56", lw=1.5)
    ax.set(xlim=(0.17, 0.83), ylim=(-0.34, 0.42), aspect="equal", xticks=[], yticks=[])
