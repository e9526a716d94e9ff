"""What a denoiser is told besides the chunk: the noise level, and the observation."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dprl.errors import found


def sinusoid(steps: int, size: int) -> Tensor:
    """Sines and cosines of 0 .. steps-1 at geometric frequencies, [steps, size] (Vaswani et al., 2017)."""
    if size < 4 or size % 2:
        raise found("an embedding by sines and cosines has no such size", "an even number, 4 or more", size, "another size")
    frequency = torch.exp(-math.log(10_000) / (size // 2 - 1) * torch.arange(size // 2))
    angle = torch.arange(steps)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


class Observed(nn.Linear):
    """The layer that an observation enters by. It computes in float32 where others compute in bfloat16 too: of a position in
    -1..1, bfloat16 keeps 8 bits, the same wrong ones in every row of a state, and the errors add up in PPO's gradient
    (docs/performance.md). What it says is rounded as any layer's: those errors differ from unit to unit, and average out.
    """

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(x)
        with torch.autocast(device, enabled=False):
            return super().forward(x.float()).to(torch.get_autocast_dtype(device))


def vector(obs_shape: Any, reader: nn.Module) -> int:
    """The size of an observation that is a vector; a ``UserError`` for any other, since ``reader`` reads no such thing."""
    if not isinstance(obs_shape, list) or len(obs_shape) != 1:
        fix = "a task that observes one (task.env.observe), or a policy that sees, policy=unet_image_small; no critic does"
        raise found(f"{type(reader).__name__} reads vectors", "an observation [size]", obs_shape, fix)
    return obs_shape[0]
