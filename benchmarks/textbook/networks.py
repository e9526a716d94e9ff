"""Networks of the textbook, written as in the papers' code: module by module, everything computed at every call.

They have the same sizes as dprl's networks.

Shapes: N batch, H horizon, A action dim, To observation steps, O observation dim.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


class SinusoidalEmbedding(nn.Module):
    """Sines and cosines of timesteps."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, t: Tensor) -> Tensor:
        """Embed timesteps `t` [N] -> [N, size]."""
        half = self.size // 2
        frequency = torch.exp(torch.arange(half, device=t.device) * -(math.log(10_000) / (half - 1)))
        angle = t[:, None] * frequency[None]
        return torch.cat([angle.sin(), angle.cos()], -1)


class ResidualMLP(nn.Module):
    """Trunk of the denoiser and of the value function: one residual block of two pre-activation layers."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, activation: type[nn.Module]):
        super().__init__()
        self.first = nn.Linear(in_dim, hidden_dim)
        self.block = nn.Sequential(
            activation(), nn.Linear(hidden_dim, hidden_dim), activation(), nn.Linear(hidden_dim, hidden_dim)
        )
        self.last = nn.Sequential(activation(), nn.Linear(hidden_dim, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [N, in_dim] -> [N, out_dim]."""
        x = self.first(x)
        return self.last(x + self.block(x))


class MLPDenoiser(nn.Module):
    """MLP denoiser: chunk, timestep and observation concatenated, through a residual MLP."""

    def __init__(self, *, obs_dim: int, act_dim: int, horizon: int, hidden_dim: int, time_embed_dim: int):
        super().__init__()
        self.time = nn.Sequential(
            SinusoidalEmbedding(time_embed_dim),
            nn.Linear(time_embed_dim, 2 * time_embed_dim),
            nn.Mish(),
            nn.Linear(2 * time_embed_dim, time_embed_dim),
        )
        size = horizon * act_dim
        self.net = ResidualMLP(size + time_embed_dim + obs_dim, hidden_dim, size, nn.ReLU)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Denoise `x` [N, H, A] at timesteps `t` [N], given `cond` [N, To, O] -> [N, H, A]."""
        return self.net(torch.cat([x.flatten(1), self.time(t), cond.flatten(1)], -1)).view_as(x)


class Value(nn.Module):
    """State value: a residual MLP."""

    def __init__(self, *, obs_dim: int, hidden_dim: int):
        super().__init__()
        self.net = ResidualMLP(obs_dim, hidden_dim, 1, nn.Mish)

    def forward(self, obs: Tensor) -> Tensor:
        """Return V of `obs` [N, To, O]: [N]."""
        return self.net(obs.flatten(1)).squeeze(-1)


def mlp(in_dim: int, hidden_dim: int) -> nn.Sequential:
    """Return an MLP with layer norms and a scalar output: Q and V of IDQL."""
    hidden = [
        nn.Linear(in_dim, hidden_dim),
        nn.LayerNorm(hidden_dim),
        nn.SiLU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.LayerNorm(hidden_dim),
        nn.SiLU(),
    ]
    return nn.Sequential(*hidden, nn.Linear(hidden_dim, 1))


class ConvBlock(nn.Sequential):
    """Conv1d, GroupNorm and activation."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int, groups: int = 8):
        super().__init__(
            nn.Conv1d(in_dim, out_dim, kernel_size, padding=kernel_size // 2), nn.GroupNorm(groups, out_dim), nn.SiLU()
        )


class FilmBlock(nn.Module):
    """Residual block of two convolutions, with the condition's scale and shift between them (FiLM)."""

    def __init__(self, in_dim: int, out_dim: int, cond_dim: int, kernel_size: int):
        super().__init__()
        self.blocks = nn.ModuleList([ConvBlock(in_dim, out_dim, kernel_size), ConvBlock(out_dim, out_dim, kernel_size)])
        self.cond = nn.Sequential(nn.Mish(), nn.Linear(cond_dim, 2 * out_dim))
        self.residual = nn.Conv1d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Map `x` [N, in_dim, L], given `cond` [N, cond_dim] -> [N, out_dim, L]."""
        out = self.blocks[0](x)
        scale, shift = self.cond(cond)[..., None].chunk(2, 1)
        return self.blocks[1](scale * out + shift) + self.residual(x)


class UNetDenoiser(nn.Module):
    """Conditional 1-D U-Net of Diffusion Policy (Chi et al., 2023)."""

    def __init__(
        self, *, obs_dim: int, obs_steps: int, act_dim: int, channels: list[int], kernel_size: int, time_embed_dim: int
    ):
        super().__init__()
        self.time = nn.Sequential(
            SinusoidalEmbedding(time_embed_dim),
            nn.Linear(time_embed_dim, 4 * time_embed_dim),
            nn.Mish(),
            nn.Linear(4 * time_embed_dim, time_embed_dim),
        )
        cond = time_embed_dim + obs_steps * obs_dim

        def block(in_dim: int, out_dim: int) -> FilmBlock:
            return FilmBlock(in_dim, out_dim, cond, kernel_size)

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, (in_dim, out_dim) in enumerate(pairwise([act_dim, *channels])):
            downsample = nn.Conv1d(out_dim, out_dim, 3, 2, 1) if i < len(channels) - 1 else nn.Identity()
            self.down.append(nn.ModuleList([block(in_dim, out_dim), block(out_dim, out_dim), downsample]))
        self.middle = nn.ModuleList([block(channels[-1], channels[-1]), block(channels[-1], channels[-1])])
        for below, size in pairwise(reversed(channels)):
            self.up.append(
                nn.ModuleList([block(2 * below, size), block(size, size), nn.ConvTranspose1d(size, size, 4, 2, 1)])
            )
        self.out = nn.Sequential(ConvBlock(channels[0], channels[0], kernel_size), nn.Conv1d(channels[0], act_dim, 1))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Denoise `x` [N, H, A] at timesteps `t` [N], given `cond` [N, To, O] -> [N, H, A]."""
        cond = torch.cat([self.time(t), cond.flatten(1)], -1)
        x, skips = x.transpose(1, 2), []
        for first, second, downsample in self.down:  # type: ignore[misc]
            x = second(first(x, cond), cond)
            skips.append(x)
            x = downsample(x)
        for block in self.middle:
            x = block(x, cond)
        for first, second, upsample in self.up:  # type: ignore[misc]
            x = upsample(second(first(torch.cat([x, skips.pop()], 1), cond), cond))
        return self.out(x).transpose(1, 2)


class TransformerDenoiser(nn.Module):
    """Transformer of Diffusion Policy: a decoder over the actions, with timestep and observations as its memory."""

    def __init__(
        self,
        *,
        obs_dim: int,
        obs_steps: int,
        act_dim: int,
        horizon: int,
        hidden_dim: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
    ):
        super().__init__()
        self.time = SinusoidalEmbedding(hidden_dim)
        self.obs, self.act = nn.Linear(obs_dim, hidden_dim), nn.Linear(act_dim, hidden_dim)
        self.pos_emb = nn.Parameter(torch.zeros(1, horizon, hidden_dim))
        self.memory_pos_emb = nn.Parameter(torch.zeros(1, 1 + obs_steps, hidden_dim))
        self.memory = nn.Sequential(
            nn.Linear(hidden_dim, 4 * hidden_dim), nn.Mish(), nn.Linear(4 * hidden_dim, hidden_dim)
        )
        layer = nn.TransformerDecoderLayer(
            hidden_dim, num_heads, 4 * hidden_dim, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, num_layers)
        self.out = nn.Sequential(nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, act_dim))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(horizon))
        hidden = torch.arange(horizon)[:, None] < torch.arange(1 + obs_steps) - 1
        self.register_buffer("memory_mask", torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Denoise `x` [N, H, A] at timesteps `t` [N], given `cond` [N, To, O] -> [N, H, A]."""
        memory = self.memory(torch.cat([self.time(t)[:, None], self.obs(cond)], 1) + self.memory_pos_emb)
        h = self.decoder(self.act(x) + self.pos_emb, memory, tgt_mask=self.mask, memory_mask=self.memory_mask)
        return self.out(h)


class ResidualConv(nn.Module):
    """ResNet block of two 3 x 3 convolutions, with GroupNorm in place of BatchNorm."""

    def __init__(self, in_dim: int, out_dim: int, stride: int):
        super().__init__()
        groups = max(1, out_dim // 16)
        self.conv1, self.norm1 = nn.Conv2d(in_dim, out_dim, 3, stride, 1, bias=False), nn.GroupNorm(groups, out_dim)
        self.conv2, self.norm2 = nn.Conv2d(out_dim, out_dim, 3, 1, 1, bias=False), nn.GroupNorm(groups, out_dim)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_dim != out_dim:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_dim, out_dim, 1, stride, bias=False), nn.GroupNorm(groups, out_dim)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [N, in_dim, h, w] -> [N, out_dim, h / stride, w / stride]."""
        out = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(out)) + self.shortcut(x)).relu()


class SpatialSoftmax(nn.Module):
    """Expected coordinates of each channel under its softmax (keypoints)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [N, C, h, w] -> [N, 2 C], in [-1, 1]."""
        rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in x.shape[-2:]), indexing="ij")
        weight = x.flatten(2).softmax(-1)
        return torch.stack([(weight * columns.flatten()).sum(-1), (weight * rows.flatten()).sum(-1)], -1).flatten(1)


class ResNet(nn.Sequential):
    """ResNet-18 with `channels` in its first stage, keypoints, and a linear layer to `feature_dim` numbers."""

    def __init__(self, *, channels: int, num_keypoints: int, feature_dim: int):
        stages: list[nn.Module] = []
        for in_dim, out_dim, stride in zip([1, 1, 2, 4], [1, 2, 4, 8], [1, 2, 2, 2], strict=True):
            stages += [
                ResidualConv(channels * in_dim, channels * out_dim, stride),
                ResidualConv(channels * out_dim, channels * out_dim, 1),
            ]
        stem = [nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.GroupNorm(max(1, channels // 16), channels), nn.ReLU()]
        head = [nn.Conv2d(8 * channels, num_keypoints, 1), SpatialSoftmax(), nn.Linear(2 * num_keypoints, feature_dim)]
        super().__init__(*stem, nn.MaxPool2d(3, 2, 1), *stages, *head)


class ImageUNet(nn.Module):
    """U-Net conditioned on a ResNet's features of the images, and on vectors.

    Args:
        encoder: arguments of `ResNet`.
        vector_dim: size of the vector observed at a step.
        unet: further arguments of `UNetDenoiser`.
    """

    def __init__(self, *, encoder: dict[str, int], vector_dim: int, **unet: Any):
        super().__init__()
        self.encoder = ResNet(**encoder)
        self.unet = UNetDenoiser(obs_dim=encoder["feature_dim"] + vector_dim, **unet)

    def forward(self, x: Tensor, t: Tensor, cond: tuple[Tensor, Tensor]) -> Tensor:
        """Denoise `x` [N, H, A] at `t` [N], given images [N, To, 3, h, w] and vectors [N, To, vector_dim]."""
        image, vector = cond
        features = self.encoder(image.flatten(0, 1)).unflatten(0, image.shape[:2])
        return self.unet(x, t, torch.cat([features, vector], -1))
