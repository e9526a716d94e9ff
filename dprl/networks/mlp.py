"""The residual MLP and the denoiser made of it.

Letters: N batch, H horizon, A action dim, To observed steps, O observation dim, K noise levels, W width.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dprl.errors import found


def vector_size(obs_shape: Any, reader: str) -> int:
    """How many numbers an observation is, or a ``UserError``: ``reader`` reads a vector, no images and no dictionary."""
    if isinstance(obs_shape, Mapping) or len(obs_shape) != 1:
        fix = "a policy=... that reads it, or a task=... that observes a vector"
        raise found(
            f"{reader} reads a vector", "an observation [size]", dict(obs_shape) if isinstance(obs_shape, Mapping) else obs_shape, fix
        )
    return obs_shape[0]


class Residual(nn.Module):
    """A pre-activation block: ``x + W2 act(W1 act(x))``."""

    def __init__(self, width: int, activation: str):
        super().__init__()
        act = getattr(nn, activation)
        self.inner = nn.Sequential(act(), nn.Linear(width, width), act(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def trunk(width: int, layers: int, activation: str) -> nn.Sequential:
    """``layers`` hidden layers counted as the literature does: the one before, and two a block. So 3 is one block."""
    if layers < 1 or layers % 2 == 0:
        raise ValueError(f"layers is {layers}; expected an odd number: one input layer and two a residual block")
    blocks = [Residual(width, activation) for _ in range((layers - 1) // 2)]
    return nn.Sequential(*blocks, getattr(nn, activation)())


def sinusoid(steps: int, size: int) -> Tensor:
    """Sines and cosines of 0 .. steps-1 at geometric frequencies, [steps, size] (Vaswani et al., 2017)."""
    frequency = torch.exp(-math.log(10_000) / (size // 2 - 1) * torch.arange(size // 2))
    angle = torch.arange(steps)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


class MLPDenoiser(nn.Module):
    """Chunk, level and observation through one residual MLP; the smallest denoiser, and the fastest.

    The first layer is kept as three, so that the observation's part is computed once a chunk (``encode``) and the
    level's once for each of the K levels.
    """

    table: Tensor

    def __init__(
        self,
        *,
        width: int,
        layers: int,
        activation: str,
        time_size: int,
        obs_shape: list[int],
        obs_steps: int,
        act_dim: int,
        horizon: int,
        levels: int,
    ):
        super().__init__()
        self.register_buffer("table", sinusoid(levels, time_size), persistent=False)
        self.time = nn.Sequential(
            nn.Linear(time_size, 2 * time_size),
            nn.Mish(),
            nn.Linear(2 * time_size, time_size),
            nn.Linear(time_size, width, bias=False),
        )
        self.obs = nn.Linear(obs_steps * vector_size(obs_shape, type(self).__name__), width)
        self.chunk = nn.Linear(horizon * act_dim, width, bias=False)
        self.trunk = trunk(width, layers, activation)
        self.out = nn.Linear(width, horizon * act_dim)

    def encode(self, obs: Tensor) -> Tensor:
        return self.obs(obs.flatten(1))  # [N, To, O] -> [N, W]

    def forward(self, x: Tensor, k: Tensor, cond: Tensor) -> Tensor:
        # not [k]: the gradient of an index adds up in another order each time when there are several threads
        level = self.time(self.table[k]) if k.dim() == 0 else nn.functional.embedding(k, self.time(self.table))  # [W] or [N, W]
        h = self.chunk(x.flatten(1)) + cond + level  # [N, W]
        return self.out(self.trunk(h)).view_as(x)  # [N, H, A]
