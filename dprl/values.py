"""Differentiable functions of an observation and a chunk that guide a policy without any training.

A value is any function ``f(obs, act) -> [N]`` on tensors in environment units, ``obs`` [N, To, O] and ``act`` [N, Ta, A];
more is better. Name yours by ``algo.actor.value._target_``.

Letters: N batch, Ta steps of a chunk, A action dim, P dimensions of a position, C circles.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def smoothness(obs: Tensor, act: Tensor) -> Tensor:
    """Minus the squared change of action between steps of the chunk, summed."""
    return -act.diff(dim=1).square().sum((1, 2))


def goal(obs: Tensor, act: Tensor, *, columns: Sequence[int], goal: Sequence[float]) -> Tensor:
    """Minus the distance to ``goal`` after the chunk, where actions are changes of the position in ``columns``."""
    return -torch.linalg.vector_norm(_path(obs, act, columns)[:, -1] - act.new_tensor(goal), dim=-1)


def keep_out(obs: Tensor, act: Tensor, *, columns: Sequence[int], circles: Sequence[Sequence[float]], margin: float) -> Tensor:
    """Minus how far the chunk's path enters the ``margin`` around ``circles`` (x, y, radius), squared and summed over it.

    Actions are changes of the position in ``columns`` of the observation.
    """
    zones = act.new_tensor(circles)  # [C, 3]
    gap = torch.linalg.vector_norm(_path(obs, act, columns)[:, :, None] - zones[:, :2], dim=-1) - zones[:, 2]  # [N, Ta, C]
    return -(margin - gap).clamp(min=0).square().sum((1, 2))


def _path(obs: Tensor, act: Tensor, columns: Sequence[int]) -> Tensor:
    """Where each step of the chunk leads: [N, Ta, P]."""
    return obs[:, -1:, list(columns)] + act.cumsum(1)
