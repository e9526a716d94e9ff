"""The time-series diffusion transformer of Diffusion Policy (Chi et al., 2023, section 3.1).

Letters: N batch, H horizon, A action dim, To observed steps, O observation dim, K noise levels, W width, B layers.
"""

import torch
from torch import Tensor, nn

from dprl.networks.attention import SelfAttention, attend
from dprl.networks.inputs import Observed, sinusoid, vector
from dprl.networks.kept import Linear, by_level

SPREAD = 0.02  # standard deviation of weights and positions before training


class Layer(nn.Module):
    """Pre-norm: attention among actions, attention of actions to the memory, and a step of its own for each action."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.drop = nn.Dropout(dropout)
        self.among = SelfAttention(width, heads, causal=True, dropout=dropout)
        self.query, self.answer = Linear(width, width), Linear(width, width)
        self.each = nn.Sequential(Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), Linear(4 * width, width))

    def remember(self, x: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [N, heads, H, W/heads]
        dropout = self.dropout if self.training else 0.0
        return self.answer(attend(q, keys, values, seen, dropout=dropout))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        """``x`` [N, H, W], the memory's ``keys`` and ``values`` [N, heads, 1+To, W/heads], who sees which [H, 1+To]."""
        x = x + self.drop(self.among(self.norms[0](x)))
        x = x + self.drop(self.remember(self.norms[1](x), keys, values, seen))
        return x + self.drop(self.each(self.norms[2](x)))


class TransformerDenoiser(nn.Module):
    """A token an action. It attends to itself and the actions before it, and to a memory of the level and the observed steps,
    of which the first action sees the first, the second two, and so on.

    A memory token goes through an MLP of its own, so keys and values of the observed steps, for all layers, are computed by
    ``encode``, and those of the level are a table of the K levels.

    ``dropout`` of attention weights and of what each part of a layer adds; ``token_dropout`` of tokens as they enter. Neither
    is active in eval mode.
    """

    table: Tensor
    seen: Tensor

    def __init__(
        self,
        *,
        width: int,
        layers: int,
        heads: int,
        dropout: float,
        token_dropout: float,
        obs_shape: list[int],
        obs_steps: int,
        act_dim: int,
        horizon: int,
        levels: int,
    ):
        super().__init__()
        self.register_buffer("table", sinusoid(levels, width), persistent=False)
        past = torch.arange(horizon)[:, None] >= torch.arange(obs_steps)  # both begin with the first observed step
        self.register_buffer("seen", nn.functional.pad(past, (1, 0), value=True), persistent=False)  # [H, 1+To] the level by all
        self.chunk, self.obs = nn.Linear(act_dim, width), Observed(vector(obs_shape, self), width)
        self.places = nn.Parameter(torch.zeros(horizon, width))
        self.memory_places = nn.Parameter(torch.zeros(1 + obs_steps, width))
        self.drop = nn.Dropout(token_dropout)
        self.memory = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        self.keys_values = nn.Linear(width, layers * 2 * width)
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(layers))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, act_dim))
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=SPREAD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def remembered(self, tokens: Tensor) -> Tensor:
        """Keys and values of all layers for memory ``tokens``: [..., W] -> [..., 2 B W]."""
        return self.keys_values(self.memory(self.drop(tokens)))

    def encode(self, obs: Tensor) -> Tensor:
        return self.remembered(self.obs(obs) + self.memory_places[1:])  # [N, To, O] -> [N, To, 2 B W]

    def forward(self, x: Tensor, k: Tensor | int, cond: Tensor) -> Tensor:
        level = by_level(lambda rows: self.remembered(rows + self.memory_places[0]), self.table, k)  # [2 B W] or [N, 2 B W]
        memory = torch.cat([level.expand(len(x), -1)[:, None], cond], 1)  # [N, 1+To, 2 B W]
        split = memory.unflatten(-1, (len(self.layers), 2, self.layers[0].heads, -1))  # type: ignore[arg-type]
        h = self.drop(self.chunk(x) + self.places)  # [N, H, W]
        for layer, (keys, values) in zip(self.layers, split.permute(2, 3, 0, 4, 1, 5), strict=True):
            h = layer(h, keys, values, self.seen)
        return self.out(h)  # [N, H, A]
