"""Statistics as buffers. They live inside the policy, so that a checkpoint is self-sufficient.

Letters: N batch, To observed steps, O observation dim.
"""

import torch
from torch import Tensor, nn

from dprl.lean import TensorDict, TensorDictBase

SMALLEST_RANGE = 1e-4  # a dimension that moves less than this is shifted, never stretched

Obs = Tensor | TensorDictBase  # [N, To, O], or one such tensor a key


class MinMax(nn.Module):
    """Maps each of the last dimension's ``size`` numbers from its range in the data to [-1, 1].

    ``limit``: normalised values are held within +-limit, so that a state far from the data cannot drown the others.
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
        """Takes the range of ``data`` [..., size]."""
        low, high = data.flatten(0, -2).aminmax(dim=0)
        constant = high - low < SMALLEST_RANGE
        self.offset.copy_((high + low) / 2)
        self.scale.copy_(torch.where(constant, 1.0, (high - low) / 2))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.offset) / self.scale
        return x if self.limit is None else x.clamp(-self.limit, self.limit)

    def inverse(self, x: Tensor) -> Tensor:
        return x * self.scale + self.offset


class Pixels(nn.Module):
    """Images of uint8 to floats in [-1, 1]; nothing to fit."""

    def fit(self, data: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return x.float() / 127.5 - 1.0


class PerKey(nn.Module):
    """One normaliser a key of a dictionary observation."""

    def __init__(self, parts: dict[str, nn.Module]):
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def fit(self, data: TensorDictBase) -> None:
        for key, part in self.parts.items():
            part.fit(data[key])  # type: ignore[operator]

    def forward(self, obs: TensorDictBase) -> TensorDictBase:
        return TensorDict({key: part(obs[key]) for key, part in self.parts.items()}, obs.batch_size)


def normalizer(shape, *, limit: float | None = None) -> nn.Module:
    """The normaliser of an observation of ``shape``: a list of sizes, or a mapping from key to one.

    One size is a vector, three are an image [C, H, W].
    """
    if hasattr(shape, "items"):
        return PerKey({key: normalizer(part, limit=limit) for key, part in shape.items()})
    return Pixels() if len(shape) == 3 else MinMax(shape[-1], limit=limit)
