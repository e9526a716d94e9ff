"""Embeddings of a denoiser's conditioning: the timestep and the observation."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dprl.utils.errors import UserError


def sinusoid(steps: int, size: int) -> Tensor:
    """Return sinusoidal embeddings of 0 .. steps-1 (Vaswani et al., 2017).

    Args:
        steps: Number of positions.
        size: Embedding size, even and at least 4: sines, then cosines, of geometric frequencies.

    Returns:
        The table [steps, size].

    Raises:
        UserError: If the size is odd or too small.
    """
    if size < 4 or size % 2:
        raise UserError(
            "invalid size of a sinusoidal embedding (time_embed_dim, or a transformer's hidden_dim)",
            expected="an even number, 4 or more",
            got=size,
            fix=f"policy.denoiser.time_embed_dim={max(4, size + size % 2)}, or hidden_dim likewise",
        )
    frequency = torch.exp(-math.log(10_000) / (size // 2 - 1) * torch.arange(size // 2))
    angle = torch.arange(steps)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


class ObsLinear(nn.Linear):
    """Linear input layer for observations that computes in float32 under autocast as well.

    Of a position in -1..1, bfloat16 keeps 8 bits, with the same error in every row of a state, and these errors add up
    in PPO's gradient (docs/performance.md). The output is rounded as any layer's: those errors differ from unit to unit
    and average out.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer in float32 and return the output in the autocast dtype."""
        device = input.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(input)
        with torch.autocast(device, enabled=False):
            return super().forward(input.float()).to(torch.get_autocast_dtype(device))


def vector_size(obs_shape: Any, reader: nn.Module) -> int:
    """Return the size of a vector observation.

    Args:
        obs_shape: Shape of an observation.
        reader: The module that reads it, named in the message.

    Returns:
        O, for the shape [O].

    Raises:
        UserError: If the observation is not a vector.
    """
    if not isinstance(obs_shape, list) or len(obs_shape) != 1:
        raise UserError(
            f"{type(reader).__name__} reads vectors",
            expected="an observation of shape [size]",
            got=obs_shape,
            fix="a task with vector observations (task.env.observe), or an image policy, policy=unet_image_small; "
            "critics take vectors only",
        )
    return obs_shape[0]
