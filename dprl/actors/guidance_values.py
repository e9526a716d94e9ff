"""Differentiable objectives that guide a policy without training.

An objective is any function `f(obs, act) -> [N]` of tensors in environment units, where larger is better. Use your own
with `algo.actor.value._target_`.

Shapes: N batch, To observed steps, O observation dim, Ta executed steps, A action dim, P position dims, C circles.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def smoothness(obs: Tensor, act: Tensor) -> Tensor:
    """Return minus the summed squared change of action between consecutive steps of the chunk.

    Args:
        obs: Observations `[N, To, O]`.
        act: Chunks `[N, Ta, A]`.

    Returns:
        Objective `[N]`.
    """
    return -act.diff(dim=1).square().sum((1, 2))


def goal(obs: Tensor, act: Tensor, *, columns: Sequence[int], goal: Sequence[float]) -> Tensor:
    """Return minus the distance to `goal` after the chunk, for actions that are changes of position.

    Args:
        obs: Observations `[N, To, O]`.
        act: Chunks `[N, Ta, A]` with A = P.
        columns: The P columns of the observation that hold the position.
        goal: Target position, P numbers.

    Returns:
        Objective `[N]`.
    """
    return -torch.linalg.vector_norm(_positions(obs, act, columns)[:, -1] - act.new_tensor(goal), dim=-1)


def keep_out(
    obs: Tensor, act: Tensor, *, columns: Sequence[int], circles: Sequence[Sequence[float]], margin: float
) -> Tensor:
    """Return minus the summed squared depth by which the chunk's path enters the margin around circles.

    Args:
        obs: Observations `[N, To, O]`.
        act: Chunks `[N, Ta, A]` of changes of position, with A = P = 2.
        columns: The two columns of the observation that hold the position.
        circles: C circles as (x, y, radius).
        margin: Distance to keep from each circle.

    Returns:
        Objective `[N]`.
    """
    zones = act.new_tensor(circles)  # [C, 3]
    offset = _positions(obs, act, columns)[:, :, None] - zones[:, :2]  # [N, Ta, C, P]
    distance = torch.linalg.vector_norm(offset, dim=-1) - zones[:, 2]  # [N, Ta, C]
    return -(margin - distance).clamp(min=0).square().sum((1, 2))


def _positions(obs: Tensor, act: Tensor, columns: Sequence[int]) -> Tensor:
    """Return the position after each step of the chunk: `[N, Ta, P]`."""
    return obs[:, -1:, list(columns)] + act.cumsum(1)
