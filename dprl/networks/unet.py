"""The temporal U-Net of Diffusion Policy (Chi et al., 2023, section 3.1): convolutions over the chunk's steps.

Letters: N batch, H horizon, A action dim, To observed steps, O observation dim, K noise levels, C channels, L steps at one
resolution, F numbers that condition the whole net.
"""

from itertools import pairwise

from torch import Tensor, cat, nn

from dprl.errors import found
from dprl.networks.inputs import by_level, sinusoid, vector


def convolution(inputs: int, outputs: int, kernel: int, groups: int) -> nn.Sequential:
    """[N, inputs, L] -> [N, outputs, L]."""
    return nn.Sequential(nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2), nn.GroupNorm(groups, outputs), nn.Mish())


class Block(nn.Module):
    """Two convolutions and a residual. Between them FiLM (Perez et al., 2018): each channel's ``scale * h + shift``."""

    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int):
        super().__init__()
        self.film = 2 * outputs  # numbers of the condition that it takes
        self.before = convolution(inputs, outputs, kernel, groups)
        self.after = convolution(outputs, outputs, kernel, groups)
        self.past = nn.Identity() if inputs == outputs else nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        scale, shift = film[..., None].chunk(2, 1)  # [N, C, 1]
        return self.after(scale * self.before(x) + shift) + self.past(x)


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

        def pair(inputs: int, outputs: int) -> nn.ModuleList:
            return nn.ModuleList([Block(inputs, outputs, kernel, groups), Block(outputs, outputs, kernel, groups)])

        self.horizon, self.filling = horizon, -horizon % 2 ** (len(channels) - 1)
        self.down = nn.ModuleList(pair(*sizes) for sizes in pairwise([act_dim, *channels]))
        self.shrink = nn.ModuleList(nn.Conv1d(size, size, 3, stride=2, padding=1) for size in channels[:-1])
        self.middle = pair(channels[-1], channels[-1])
        self.up = nn.ModuleList(pair(2 * below, size) for below, size in pairwise(reversed(channels)))
        self.grow = nn.ModuleList(nn.ConvTranspose1d(size, size, 4, stride=2, padding=1) for size in reversed(channels[:-1]))
        self.out = nn.Sequential(convolution(channels[0], channels[0], kernel, groups), nn.Conv1d(channels[0], act_dim, 1))

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
        self.obs = nn.Sequential(nn.Flatten(), nn.Mish(), nn.Linear(obs_steps * vector(obs_shape, self), sum(self.films)))

    def encode(self, obs: Tensor) -> Tensor:
        return self.obs(obs)  # [N, To, O] -> [N, F]

    def forward(self, x: Tensor, k: Tensor, cond: Tensor) -> Tensor:
        films = iter((cond + by_level(self.level, self.table, k)).split(self.films, -1))
        h, left = nn.functional.pad(x.transpose(1, 2), (0, self.filling)), []  # [N, A, H + filling]
        for stage, shrink in zip(self.down, [*self.shrink, nn.Identity()], strict=True):
            for block in stage:  # type: ignore[union-attr]
                h = block(h, next(films))
            left.append(h)
            h = shrink(h)  # [N, C, L] -> [N, C, L/2]
        for block in self.middle:
            h = block(h, next(films))
        for stage, grow in zip(self.up, self.grow, strict=True):
            h = cat([h, left.pop()], 1)  # [N, 2C, L]
            for block in stage:  # type: ignore[union-attr]
                h = block(h, next(films))
            h = grow(h)  # [N, C, L] -> [N, C, 2L]
        return self.out(h)[..., : self.horizon].transpose(1, 2)  # [N, H, A]
