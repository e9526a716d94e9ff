"""Temporal U-Net of Diffusion Policy (Chi et al., 2023, section 3.1): convolutions over the steps of a chunk.

Shapes: N batch, H horizon, A action dim, To observed steps, O observation dim, C channels, L steps at one resolution,
F FiLM values of the whole network.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, addcmul, cat, nn, stack

from dprl.networks.embeddings import ObsLinear, sinusoid, vector_size
from dprl.networks.weight_cache import PackedLinear, timestep_embedding
from dprl.utils.errors import UserError
from dprl.utils.types import PositiveInt


def unfold1d(x: Tensor, reach: int, stride: int) -> Tensor:
    """Gather the neighbourhood of every `stride`-th step as a row, zero-padded at the ends.

    Args:
        x: Features [N, L, C].
        reach: Steps on each side.
        stride: Steps from one row's centre to the next one's.

    Returns:
        Rows [N, L / stride, (2 reach + 1) C].
    """
    x = nn.functional.pad(x, (0, 0, reach, reach))
    n, padded, size = x.shape
    kernel_size = 2 * reach + 1
    shape = (n, (padded - kernel_size) // stride + 1, kernel_size * size)
    return x.as_strided(shape, (padded * size, stride * size, 1)).contiguous()


class Unfold1d(torch.autograd.Function):
    """`unfold1d` with a gradient of its own; that of concatenated slices fills and adds a tensor per slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reach: int, stride: int) -> Tensor:
        """Apply `unfold1d`."""
        ctx.reach, ctx.stride, ctx.steps = reach, stride, x.shape[1]
        return unfold1d(x, reach, stride)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Add the gradient of each row to the steps that it was gathered from."""
        (grad,) = grads
        parts = grad.chunk(2 * ctx.reach + 1, -1)
        out = parts[0].new_zeros(len(grad), ctx.steps + 2 * ctx.reach, parts[0].shape[-1])
        for offset, part in enumerate(parts):
            out[:, offset : offset + ctx.steps : ctx.stride] += part
        return out[:, ctx.reach : ctx.reach + ctx.steps], None, None


class Conv1dAsMatmul(PackedLinear):
    """Convolution over steps as one matrix product, [N, L, inputs] -> [N, L / stride, outputs].

    On a CPU, bfloat16 speeds up this product and its gradient, but not the gradient of `nn.Conv1d`.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        reach: Steps on each side that the kernel covers; its size is 2 `reach` + 1.
        stride: Stride.
    """

    def __init__(self, inputs: int, outputs: int, reach: int, stride: int = 1):
        super().__init__((2 * reach + 1) * inputs, outputs)
        self.reach, self.stride = reach, stride

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `input` [N, L, inputs]."""
        # without gradients the plain function: for few rows the call through autograd takes longer than the gather
        unfold: Any = Unfold1d.apply if torch.is_grad_enabled() else unfold1d
        return super().forward(unfold(input, self.reach, self.stride))


class Upsample1d(PackedLinear):
    """Transposed convolution of stride 2 and kernel size 4, [N, L, C] -> [N, 2L, C].

    Each new step is computed from the two old steps beside it.

    Args:
        size: C.
    """

    def __init__(self, size: int):
        super().__init__(2 * size, 2 * size)

    def forward(self, input: Tensor) -> Tensor:
        """Upsample `input` [N, L, C]."""
        x = nn.functional.pad(input, (0, 0, 1, 1))
        odd, even = super().forward(cat([x[:, :-1], x[:, 1:]], -1)).chunk(2, -1)  # [N, L+1, C] each
        return stack([even[:, :-1], odd[:, 1:]], 2).flatten(1, 2)


class Norm(nn.GroupNorm):
    """`GroupNorm` with the channels last, [N, L, C] -> [N, L, C]."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input` [N, L, C] in float32."""
        h = input.float().unflatten(-1, (self.num_groups, -1)).transpose(1, 2)  # [N, groups, L, C/groups]
        h = nn.functional.layer_norm(h, h.shape[2:], eps=self.eps).transpose(1, 2).flatten(2)
        return addcmul(self.bias, h, self.weight).to(input.dtype)


def convolution(inputs: int, outputs: int, *, kernel_size: int, num_groups: int, activation: str) -> nn.Sequential:
    """Build a convolution, a GroupNorm and an activation, [N, L, inputs] -> [N, L, outputs].

    Args:
        inputs: Input channels.
        outputs: Output channels.
        kernel_size: Steps that an output depends on.
        num_groups: Groups of the GroupNorm.
        activation: Name of a class in `torch.nn`.
    """
    return nn.Sequential(
        Conv1dAsMatmul(inputs, outputs, kernel_size // 2), Norm(num_groups, outputs), getattr(nn, activation)()
    )


class Block(nn.Module):
    """Residual block of two convolutions with FiLM between them (Perez et al., 2018): `scale * h + shift` per channel.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        **settings: Arguments of `convolution`.
    """

    def __init__(self, inputs: int, outputs: int, **settings: Any):
        super().__init__()
        self.film = 2 * outputs  # size of the block's part of the condition
        self.before = convolution(inputs, outputs, **settings)
        self.after = convolution(outputs, outputs, **settings)
        self.shortcut = nn.Identity() if inputs == outputs else PackedLinear(inputs, outputs)

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """Apply the block to `x` [N, L, inputs] with scale and shift `film` [N, 2 outputs]."""
        scale, shift = film[:, None].chunk(2, -1)  # [N, 1, C]
        h = self.before(x)
        return self.after(addcmul(shift.to(h), scale.to(h), h)) + self.shortcut(x)


class UNetDenoiser(nn.Module):
    """U-Net over a chunk's steps, conditioned by FiLM.

    The chunk goes down through `channels`, each resolution half as long as the one before, and up again.

    A block's scale and shift are the paper's `W mish([t, obs]) + b`. Mish acts on each value alone, so this equals
    `W_t mish(t) + W_obs mish(obs) + b`: `encode` computes the second part for all blocks at once, and the first is a
    table of the timesteps. Each part of W is initialised as a layer of its own size, unlike in the paper's code.

    A chunk of any length is padded with zeros, as a convolution does at its ends, until it can be halved often enough.

    Args:
        channels: Channels of each resolution, multiples of `num_groups`.
        kernel_size: Kernel size of the convolutions, odd.
        num_groups: Groups of the GroupNorms.
        activation: Name of a class of `torch.nn`.
        time_embed_dim: Size of the sinusoidal timestep embedding.
        obs_shape: Shape of an observation, [O].
        obs_steps: To.
        act_dim: A.
        horizon: H.
        num_train_timesteps: Number of timesteps.

    Raises:
        UserError: If channels and groups do not fit, or the kernel size is even.
    """

    table: Tensor

    def __init__(
        self,
        *,
        channels: list[int],
        kernel_size: PositiveInt,
        num_groups: PositiveInt,
        activation: str,
        time_embed_dim: PositiveInt,
        obs_shape: list[int],
        obs_steps: int,
        act_dim: int,
        horizon: int,
        num_train_timesteps: int,
    ):
        super().__init__()
        if not channels or any(size % num_groups for size in channels):
            raise UserError(
                "policy.denoiser.channels and num_groups do not fit",
                expected=f"channels that are multiples of num_groups={num_groups}",
                got=channels,
                fix="policy.denoiser.num_groups=1, or other channels",
            )
        if kernel_size % 2 == 0:
            raise UserError(
                "policy.denoiser.kernel_size is even",
                expected="an odd number",
                got=kernel_size,
                fix=f"policy.denoiser.kernel_size={kernel_size + 1}",
            )

        settings: dict[str, Any] = dict(kernel_size=kernel_size, num_groups=num_groups, activation=activation)

        def pair(inputs: int, outputs: int) -> nn.ModuleList:
            return nn.ModuleList([Block(inputs, outputs, **settings), Block(outputs, outputs, **settings)])

        self.horizon, self.padding = horizon, -horizon % 2 ** (len(channels) - 1)
        self.down = nn.ModuleList(pair(*sizes) for sizes in pairwise([act_dim, *channels]))
        self.shrink = nn.ModuleList(Conv1dAsMatmul(size, size, 1, stride=2) for size in channels[:-1])
        self.middle = pair(channels[-1], channels[-1])
        self.up = nn.ModuleList(pair(2 * below, size) for below, size in pairwise(reversed(channels)))
        self.grow = nn.ModuleList(Upsample1d(size) for size in reversed(channels[:-1]))
        self.out = nn.Sequential(convolution(channels[0], channels[0], **settings), nn.Linear(channels[0], act_dim))

        stages = [*self.down, self.middle, *self.up]
        self.films = [block.film for stage in stages for block in stage]  # type: ignore[union-attr]
        self.register_buffer("table", sinusoid(num_train_timesteps, time_embed_dim), persistent=False)
        self.time = nn.Sequential(
            nn.Linear(time_embed_dim, 4 * time_embed_dim),
            nn.Mish(),
            nn.Linear(4 * time_embed_dim, time_embed_dim),
            nn.Mish(),
            nn.Linear(time_embed_dim, sum(self.films), bias=False),
        )
        self.obs = nn.Sequential(
            nn.Flatten(), nn.Mish(), ObsLinear(obs_steps * vector_size(obs_shape, self), sum(self.films))
        )

    def encode(self, obs: Tensor) -> Tensor:
        """Return the observation's part of all scales and shifts, [N, To, O] -> [N, F]."""
        return self.obs(obs)

    def forward(self, x: Tensor, t: Tensor | int, cond: Tensor) -> Tensor:
        """Predict the target for `x` [N, H, A] at timestep `t`; see `Denoiser`."""
        films = iter((cond + timestep_embedding(self.time, self.table, t)).split(self.films, -1))
        h, skips = nn.functional.pad(x, (0, 0, 0, self.padding)), []  # [N, H + padding, A]
        for stage, shrink in zip(self.down, [*self.shrink, nn.Identity()], strict=True):
            for block in stage:  # type: ignore[union-attr]
                h = block(h, next(films))
            skips.append(h)
            h = shrink(h)  # [N, L, C] -> [N, L/2, C]
        for block in self.middle:
            h = block(h, next(films))
        for stage, grow in zip(self.up, self.grow, strict=True):
            h = cat([h, skips.pop()], -1)  # [N, L, 2C]
            for block in stage:  # type: ignore[union-attr]
                h = block(h, next(films))
            h = grow(h)  # [N, L, C] -> [N, 2L, C]
        return self.out(h)[:, : self.horizon]  # [N, H, A]
