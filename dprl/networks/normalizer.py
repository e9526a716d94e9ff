"""Normalisers of observations and actions.

Their statistics are buffers of the policy, so that a checkpoint is self-sufficient.

Shapes: N batch, To observed steps, O observation dim.
"""

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

SMALLEST_RANGE = 1e-4  # a dimension whose range in the data is smaller is shifted but not scaled

Obs = Tensor | TensorDictBase  # [N, To, O], or such a tensor per key


class MinMax(nn.Module):
    """Linear map of each dimension from its range in the data to [-1, 1].

    Args:
        size: Number of dimensions.
        limit: Normalised values are clamped to +-limit, so that a state far from the data cannot dominate the others.
            None: no clamp.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, size: int, *, limit: float | None = None):
        super().__init__()
        self.limit = limit
        self.register_buffer("offset", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    @torch.no_grad()
    def fit(self, data: Tensor) -> None:
        """Set offset and scale from the range of `data` [..., size]."""
        low, high = data.flatten(0, -2).aminmax(dim=0)
        constant = high - low < SMALLEST_RANGE
        self.offset.copy_((high + low) / 2)
        self.scale.copy_(torch.where(constant, 1.0, (high - low) / 2))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., size]."""
        x = (x - self.offset) / self.scale
        return x if self.limit is None else x.clamp(-self.limit, self.limit)

    def inverse(self, x: Tensor) -> Tensor:
        """Map normalised `x` [..., size] back to the units of the data."""
        return x * self.scale + self.offset


class Pixels(nn.Module):
    """Map of uint8 images to floats in [-1, 1]."""

    def fit(self, data: Tensor) -> None:
        """Do nothing: the range of pixels is known."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise images `x` [..., C, H, W]."""
        return x.float() / 127.5 - 1.0


class PerKey(nn.Module):
    """A normaliser per key of a dictionary observation.

    Args:
        parts: The normalisers, by key.
    """

    def __init__(self, parts: dict[str, nn.Module]):
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def fit(self, data: TensorDictBase) -> None:
        """Fit each normaliser to its key of `data`."""
        for key, part in self.parts.items():
            part.fit(data[key])  # type: ignore[operator]

    def forward(self, obs: TensorDictBase) -> TensorDictBase:
        """Normalise each key of `obs`."""
        return TensorDict({key: part(obs[key]) for key, part in self.parts.items()}, obs.batch_size)


def normalizer(shape: Any, *, limit: float | None = None) -> nn.Module:
    """Build the normaliser of an observation.

    Args:
        shape: A list of sizes, [O] of a vector or [C, H, W] of an image, or a mapping from key to such a list.
        limit: See `MinMax`.

    Returns:
        A module with `fit(data)` and `forward(obs)`.
    """
    if hasattr(shape, "items"):
        return PerKey({key: normalizer(part, limit=limit) for key, part in shape.items()})
    return Pixels() if len(shape) == 3 else MinMax(shape[-1], limit=limit)
