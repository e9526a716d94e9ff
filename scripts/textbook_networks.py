"""The textbook's networks, as the papers' code has them: one module after another, everything at every call.

Of the same sizes as dprl's. Letters: N batch, H horizon, A action dim, To observed steps, O observation dim.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


class Sinusoid(nn.Module):
    """Noise levels [N] to sines and cosines [N, size]."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, t: Tensor) -> Tensor:
        half = self.size // 2
        frequency = torch.exp(torch.arange(half, device=t.device) * -(math.log(10_000) / (half - 1)))
        angle = t[:, None] * frequency[None]
        return torch.cat([angle.sin(), angle.cos()], -1)


class ResidualMLP(nn.Module):
    """The trunk of both the denoiser and the critic: one block is two pre-activation layers."""

    def __init__(self, inputs: int, width: int, outputs: int, activation: type[nn.Module]):
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.block = nn.Sequential(activation(), nn.Linear(width, width), activation(), nn.Linear(width, width))
        self.last = nn.Sequential(activation(), nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.block(x))


class MLPDenoiser(nn.Module):
    """Chunk, level and observation joined, through a residual MLP."""

    def __init__(self, *, obs_dim: int, act_dim: int, horizon: int, width: int, time_size: int):
        super().__init__()
        self.time = nn.Sequential(Sinusoid(time_size), nn.Linear(time_size, 2 * time_size), nn.Mish(), nn.Linear(2 * time_size, time_size))
        size = horizon * act_dim
        self.net = ResidualMLP(size + time_size + obs_dim, width, size, nn.ReLU)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """``x`` [N, H, A], ``t`` [N], ``cond`` [N, O] -> [N, H, A]."""
        return self.net(torch.cat([x.flatten(1), self.time(t), cond.flatten(1)], -1)).view_as(x)


class Value(nn.Module):
    """V(s): a residual MLP."""

    def __init__(self, *, obs_dim: int, width: int):
        super().__init__()
        self.net = ResidualMLP(obs_dim, width, 1, nn.Mish)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs.flatten(1)).squeeze(-1)


def mlp(inputs: int, width: int) -> nn.Sequential:
    """A plain MLP to one number, with layer norms: Q and V of IDQL."""
    hidden = [nn.Linear(inputs, width), nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU()]
    return nn.Sequential(*hidden, nn.Linear(width, 1))


class ConvBlock(nn.Sequential):
    """Conv1d, GroupNorm, activation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int = 8):
        super().__init__(nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2), nn.GroupNorm(groups, outputs), nn.SiLU())


class FilmBlock(nn.Module):
    """Two convolutions, the condition's scale and shift between them, and a residual."""

    def __init__(self, inputs: int, outputs: int, cond_dim: int, kernel: int):
        super().__init__()
        self.blocks = nn.ModuleList([ConvBlock(inputs, outputs, kernel), ConvBlock(outputs, outputs, kernel)])
        self.cond = nn.Sequential(nn.Mish(), nn.Linear(cond_dim, 2 * outputs))
        self.residual = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        out = self.blocks[0](x)
        scale, shift = self.cond(cond)[..., None].chunk(2, 1)
        return self.blocks[1](scale * out + shift) + self.residual(x)


class UNetDenoiser(nn.Module):
    """The conditional 1-D U-Net of Diffusion Policy."""

    def __init__(self, *, obs_dim: int, obs_steps: int, act_dim: int, channels: list[int], kernel: int, time_size: int):
        super().__init__()
        self.time = nn.Sequential(Sinusoid(time_size), nn.Linear(time_size, 4 * time_size), nn.Mish(), nn.Linear(4 * time_size, time_size))
        cond = time_size + obs_steps * obs_dim

        def block(inputs: int, outputs: int) -> FilmBlock:
            return FilmBlock(inputs, outputs, cond, kernel)

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, (inputs, outputs) in enumerate(pairwise([act_dim, *channels])):
            shrink = nn.Conv1d(outputs, outputs, 3, 2, 1) if i < len(channels) - 1 else nn.Identity()
            self.down.append(nn.ModuleList([block(inputs, outputs), block(outputs, outputs), shrink]))
        self.middle = nn.ModuleList([block(channels[-1], channels[-1]), block(channels[-1], channels[-1])])
        for below, size in pairwise(reversed(channels)):
            self.up.append(nn.ModuleList([block(2 * below, size), block(size, size), nn.ConvTranspose1d(size, size, 4, 2, 1)]))
        self.out = nn.Sequential(ConvBlock(channels[0], channels[0], kernel), nn.Conv1d(channels[0], act_dim, 1))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """``x`` [N, H, A], ``t`` [N], ``cond`` [N, To, O] -> [N, H, A]."""
        cond = torch.cat([self.time(t), cond.flatten(1)], -1)
        x, left = x.transpose(1, 2), []
        for first, second, shrink in self.down:  # type: ignore[misc]
            x = second(first(x, cond), cond)
            left.append(x)
            x = shrink(x)
        for block in self.middle:
            x = block(x, cond)
        for first, second, grow in self.up:  # type: ignore[misc]
            x = grow(second(first(torch.cat([x, left.pop()], 1), cond), cond))
        return self.out(x).transpose(1, 2)


class TransformerDenoiser(nn.Module):
    """The transformer of Diffusion Policy: a decoder over the actions, with level and observed steps as its memory."""

    def __init__(self, *, obs_dim: int, obs_steps: int, act_dim: int, horizon: int, width: int, layers: int, heads: int, dropout: float):
        super().__init__()
        self.time, self.obs, self.act = Sinusoid(width), nn.Linear(obs_dim, width), nn.Linear(act_dim, width)
        self.places = nn.Parameter(torch.zeros(1, horizon, width))
        self.memory_places = nn.Parameter(torch.zeros(1, 1 + obs_steps, width))
        self.memory = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        layer = nn.TransformerDecoderLayer(width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, layers)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, act_dim))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(horizon))
        unseen = torch.arange(horizon)[:, None] < torch.arange(1 + obs_steps) - 1
        self.register_buffer("memory_mask", torch.zeros(unseen.shape).masked_fill(unseen, -torch.inf))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """``x`` [N, H, A], ``t`` [N], ``cond`` [N, To, O] -> [N, H, A]."""
        memory = self.memory(torch.cat([self.time(t)[:, None], self.obs(cond)], 1) + self.memory_places)
        h = self.decoder(self.act(x) + self.places, memory, tgt_mask=self.mask, memory_mask=self.memory_mask)
        return self.out(h)


class ResidualConv(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, with GroupNorm in place of BatchNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        groups = max(1, outputs // 16)
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(groups, outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.GroupNorm(groups, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(groups, outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(out)) + self.shortcut(x)).relu()


class SpatialSoftmax(nn.Module):
    """The mean place of each channel under its soft-max: [N, C, H, W] -> [N, 2 C]."""

    def forward(self, x: Tensor) -> Tensor:
        down, across = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in x.shape[-2:]), indexing="ij")
        weight = x.flatten(2).softmax(-1)
        return torch.stack([(weight * across.flatten()).sum(-1), (weight * down.flatten()).sum(-1)], -1).flatten(1)


class ResNet(nn.Sequential):
    """ResNet-18 with ``channels`` in its first stage, to ``features`` numbers."""

    def __init__(self, *, channels: int, points: int, features: int):
        stages: list[nn.Module] = []
        for inputs, outputs, stride in zip([1, 1, 2, 4], [1, 2, 4, 8], [1, 2, 2, 2], strict=True):
            stages += [ResidualConv(channels * inputs, channels * outputs, stride), ResidualConv(channels * outputs, channels * outputs, 1)]
        stem = [nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.GroupNorm(max(1, channels // 16), channels), nn.ReLU()]
        ends = [nn.Conv2d(8 * channels, points, 1), SpatialSoftmax(), nn.Linear(2 * points, features)]
        super().__init__(*stem, nn.MaxPool2d(3, 2, 1), *stages, *ends)


class SeeingUNet(nn.Module):
    """The U-Net behind a ResNet: a cropped image and a vector a step."""

    def __init__(self, *, encoder: dict[str, int], vector: int, **unet: Any):
        super().__init__()
        self.encoder = ResNet(**encoder)
        self.unet = UNetDenoiser(obs_dim=encoder["features"] + vector, **unet)

    def forward(self, x: Tensor, t: Tensor, cond: tuple[Tensor, Tensor]) -> Tensor:
        """``cond``: images [N, To, 3, H, W] and vectors [N, To, size]."""
        image, vector = cond
        features = self.encoder(image.flatten(0, 1)).unflatten(0, image.shape[:2])
        return self.unet(x, t, torch.cat([features, vector], -1))
