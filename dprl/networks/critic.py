"""Critics. They read observations that the policy's normaliser has already scaled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dprl.errors import check_numbers
from dprl.networks import slope
from dprl.networks.inputs import sinusoid, vector
from dprl.networks.mlp import trunk


class StateValue(nn.Module):
    """V(s): a residual MLP on the observed steps, [N, To, O] -> [N]."""

    def __init__(self, *, width: int, layers: int, activation: str, obs_shape: list[int], obs_steps: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(obs_steps * vector(obs_shape, self), width),
            trunk(width, layers, activation),
            nn.Linear(width, 1),
        )

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)


def hidden(width: int, layers: int, activation: str, layer_norm: bool) -> nn.Sequential:
    """What comes after a first linear layer: its norm and activation, then ``layers - 1`` hidden layers likewise."""
    check_numbers("", least=1, width=width)
    parts: list[nn.Module] = []
    for layer in range(layers):
        parts += [nn.Linear(width, width)] * (layer > 0) + [nn.LayerNorm(width)] * layer_norm + [getattr(nn, activation)()]
    return nn.Sequential(*parts)


class PlainValue(nn.Module):
    """V(s): a plain MLP on the observed steps, [N, To, O] -> [N]."""

    def __init__(self, *, width: int, layers: int, activation: str, layer_norm: bool, obs_shape: list[int], obs_steps: int):
        super().__init__()
        first = nn.Linear(obs_steps * vector(obs_shape, self), width)
        self.net = nn.Sequential(nn.Flatten(), first, hidden(width, layers, activation, layer_norm), nn.Linear(width, 1))

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)


class ChunkValue(nn.Module):
    """Q(s, chunk): a plain MLP whose first layer is kept as two, so that many chunks of one observation share its part."""

    def __init__(
        self,
        *,
        width: int,
        layers: int,
        activation: str,
        layer_norm: bool,
        obs_shape: list[int],
        obs_steps: int,
        act_dim: int,
        act_steps: int,
    ):
        super().__init__()
        self.obs = nn.Linear(obs_steps * vector(obs_shape, self), width)
        self.chunk = nn.Linear(act_steps * act_dim, width, bias=False)
        self.rest = nn.Sequential(hidden(width, layers, activation, layer_norm), nn.Linear(width, 1))

    def encode(self, obs: Tensor) -> Tensor:
        return self.obs(obs.flatten(1))  # [N, To, O] -> [N, W]

    def forward(self, cond: Tensor, act: Tensor) -> Tensor:
        """``act`` [N, n, Ta, A], n chunks for each ``cond`` [N, W]: [N, n]."""
        return self.rest(self.chunk(act.flatten(2)) + cond[:, None]).squeeze(-1)

    def slope(self, cond: Tensor) -> Callable[[Tensor], Tensor]:
        """dQ(x) / dx, without autograd, as a function of ``x`` [N, n, Ta, A], which it is shaped as. ``cond`` [N, W] is what
        ``encode`` made of the observation."""
        rest, weight = slope.of([*self.rest[0], self.rest[1]]), self.chunk.weight  # type: ignore[misc]

        def of(x: Tensor) -> Tensor:
            rows = x.flatten(2).flatten(0, 1)  # [N n, Ta A]
            seen = cond if x.shape[1] == 1 else cond.repeat_interleave(x.shape[1], 0)
            return (rest(torch.addmm(seen, rows, weight.T)) @ weight).view_as(x)

        return of


class NoisedValue(nn.Module):
    """A value of a noisy chunk: a plain MLP on observation, chunk and noise level, [N, To, O], [N, n, Ta, A], k -> [N, n]."""

    table: Tensor

    def __init__(
        self,
        *,
        width: int,
        time_size: int,
        levels: int,
        **sizes: Any,  # as of a ChunkValue
    ):
        super().__init__()
        self.register_buffer("table", sinusoid(levels, time_size), persistent=False)
        self.time = nn.Linear(time_size, width, bias=False)
        self.rest = ChunkValue(width=width, **sizes)

    def encode(self, obs: Tensor) -> Tensor:
        return self.rest.encode(obs)

    def forward(self, cond: Tensor, act: Tensor, k: Tensor | int) -> Tensor:
        """``cond`` [N, W] from ``encode``; ``k`` one level for all, or one a row [N]."""
        return self.rest(cond + self.time(self.table[k]), act)
