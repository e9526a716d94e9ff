"""The temporal U-Net of Diffusion Policy (Chi et al., 2023, section 3.1): convolutions over the chunk's steps.

Letters: N batch, H horizon, A action dim, To observed steps, O observation dim, K noise levels, C channels, L steps at one
resolution, F numbers that condition the whole net.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, addcmul, cat, nn, stack

from dprl.errors import found
from dprl.networks.inputs import Observed, sinusoid, vector
from dprl.networks.kept import Linear, by_level


def rows(x: Tensor, reach: int, every: int) -> Tensor:
    """What lies within ``reach`` of every ``every``-th step, zeros behind the ends: [N, L, C] -> [N, L / every, (2 reach + 1) C]."""
    x = nn.functional.pad(x, (0, 0, reach, reach))
    n, padded, size = x.shape
    wide = 2 * reach + 1
    return x.as_strided((n, (padded - wide) // every + 1, wide * size), (padded * size, every * size, 1)).contiguous()


class Rows(torch.autograd.Function):
    """``rows`` with its own gradient, since that of as many slices joined fills and adds a tensor for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reach: int, every: int) -> Tensor:
        ctx.reach, ctx.every, ctx.steps = reach, every, x.shape[1]
        return rows(x, reach, every)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        parts = grad.chunk(2 * ctx.reach + 1, -1)
        out = parts[0].new_zeros(len(grad), ctx.steps + 2 * ctx.reach, parts[0].shape[-1])
        for at, part in enumerate(parts):
            out[:, at : at + ctx.steps : ctx.every] += part
        return out[:, ctx.reach : ctx.reach + ctx.steps], None, None


class Window(Linear):
    """A convolution as one matrix product: what lies within ``reach`` steps of each kept step, zeros behind the ends, is a row.
    [N, L, inputs] -> [N, L / every, outputs]. On a CPU bfloat16 speeds it up, and ``Conv1d``'s gradient it does not."""

    def __init__(self, inputs: int, outputs: int, reach: int, every: int = 1):
        super().__init__((2 * reach + 1) * inputs, outputs)
        self.reach, self.every = reach, every

    def forward(self, x: Tensor) -> Tensor:
        around: Any = Rows.apply if torch.is_grad_enabled() else rows  # a chain's small ones wait longer for autograd than for this
        return super().forward(around(x, self.reach, self.every))


class Double(Linear):
    """A transposed convolution of stride 2 and kernel 4, each new step made of the two old ones beside it: [N, L, C] -> [N, 2L, C]."""

    def __init__(self, size: int):
        super().__init__(2 * size, 2 * size)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, 0, 1, 1))
        odd, even = super().forward(cat([x[:, :-1], x[:, 1:]], -1)).chunk(2, -1)  # [N, L+1, C] each
        return stack([even[:, :-1], odd[:, 1:]], 2).flatten(1, 2)


class Norm(nn.GroupNorm):
    """``GroupNorm`` with the channels last: [N, L, C] -> [N, L, C]."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.float().unflatten(-1, (self.num_groups, -1)).transpose(1, 2)  # [N, groups, L, C/groups]
        h = nn.functional.layer_norm(h, h.shape[2:], eps=self.eps).transpose(1, 2).flatten(2)
        return addcmul(self.bias, h, self.weight).to(x.dtype)


def convolution(inputs: int, outputs: int, *, kernel: int, groups: int, activation: str) -> nn.Sequential:
    """[N, L, inputs] -> [N, L, outputs]."""
    return nn.Sequential(Window(inputs, outputs, kernel // 2), Norm(groups, outputs), getattr(nn, activation)())


class Block(nn.Module):
    """Two convolutions and a residual. Between them FiLM (Perez et al., 2018): each channel's ``scale * h + shift``."""

    def __init__(self, inputs: int, outputs: int, **how: Any):
        super().__init__()
        self.film = 2 * outputs  # numbers of the condition that it takes
        self.before = convolution(inputs, outputs, **how)
        self.after = convolution(outputs, outputs, **how)
        self.past = nn.Identity() if inputs == outputs else Linear(inputs, outputs)

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        scale, shift = film[:, None].chunk(2, -1)  # [N, 1, C]
        h = self.before(x)
        return self.after(addcmul(shift.to(h), scale.to(h), h)) + self.past(x)


class UNetDenoiser(nn.Module):
    """Chunk down ``channels``, each half as long as the one before, and up again; level and observation enter by FiLM.

    A block's scale and shift are the paper's ``W mish([level, observation]) + b``. Mish acts on each number alone, so this is
    ``W_level mish(level) + W_obs mish(observation) + b`` exactly: ``encode`` computes the second part of all blocks at once,
    and the first is a table of the K levels.

    A chunk of any length is filled up with zeros, as a convolution does at its ends, until it can be halved often enough.
    Differs from the paper's code in how W begins: each part as a layer of its own size.
    """

    table: Tensor

    def __init__(
        self,
        *,
        channels: list[int],
        kernel: int,
        groups: int,
        activation: str,
        time_size: int,
        obs_shape: list[int],
        obs_steps: int,
        act_dim: int,
        horizon: int,
        levels: int,
    ):
        super().__init__()
        if not channels or any(size % groups for size in channels):
            raise found("the U-Net's channels do not fit its groups", f"multiples of {groups}", channels, "groups=1, or other channels")
        if kernel % 2 == 0:
            raise found("the U-Net's kernel has no middle", "an odd number", kernel, f"kernel={kernel + 1}")

        how: dict[str, Any] = dict(kernel=kernel, groups=groups, activation=activation)

        def pair(inputs: int, outputs: int) -> nn.ModuleList:
            return nn.ModuleList([Block(inputs, outputs, **how), Block(outputs, outputs, **how)])

        self.horizon, self.filling = horizon, -horizon % 2 ** (len(channels) - 1)
        self.down = nn.ModuleList(pair(*sizes) for sizes in pairwise([act_dim, *channels]))
        self.shrink = nn.ModuleList(Window(size, size, 1, every=2) for size in channels[:-1])
        self.middle = pair(channels[-1], channels[-1])
        self.up = nn.ModuleList(pair(2 * below, size) for below, size in pairwise(reversed(channels)))
        self.grow = nn.ModuleList(Double(size) for size in reversed(channels[:-1]))
        self.out = nn.Sequential(convolution(channels[0], channels[0], **how), nn.Linear(channels[0], act_dim))

        stages = [*self.down, self.middle, *self.up]
        self.films = [block.film for stage in stages for block in stage]  # type: ignore[union-attr]
        self.register_buffer("table", sinusoid(levels, time_size), persistent=False)
        self.level = nn.Sequential(
            nn.Linear(time_size, 4 * time_size),
            nn.Mish(),
            nn.Linear(4 * time_size, time_size),
            nn.Mish(),
            nn.Linear(time_size, sum(self.films), bias=False),
        )
        self.obs = nn.Sequential(nn.Flatten(), nn.Mish(), Observed(obs_steps * vector(obs_shape, self), sum(self.films)))

    def encode(self, obs: Tensor) -> Tensor:
        return self.obs(obs)  # [N, To, O] -> [N, F]

    def forward(self, x: Tensor, k: Tensor | int, cond: Tensor) -> Tensor:
        films = iter((cond + by_level(self.level, self.table, k)).split(self.films, -1))
        h, left = nn.functional.pad(x, (0, 0, 0, self.filling)), []  # [N, H + filling, A]
        for stage, shrink in zip(self.down, [*self.shrink, nn.Identity()], strict=True):
            for block in stage:  # type: ignore[union-attr]
                h = block(h, next(films))
            left.append(h)
            h = shrink(h)  # [N, L, C] -> [N, L/2, C]
        for block in self.middle:
            h = block(h, next(films))
        for stage, grow in zip(self.up, self.grow, strict=True):
            h = cat([h, left.pop()], -1)  # [N, L, 2C]
            for block in stage:  # type: ignore[union-attr]
                h = block(h, next(films))
            h = grow(h)  # [N, L, C] -> [N, 2L, C]
        return self.out(h)[:, : self.horizon]  # [N, H, A]
