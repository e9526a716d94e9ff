"""Value networks. They take observations and chunks that are already normalised.

Shapes: N batch, n chunks per observation, Ta executed steps, To observed steps, O observation dim, A action dim,
W hidden dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dprl.networks.embeddings import sinusoid, vector_size
from dprl.networks.input_gradient import gradient_function
from dprl.networks.mlp import trunk
from dprl.utils.types import PositiveInt


class StateValue(nn.Module):
    """V(s) as a residual MLP on the observed steps.

    Args:
        hidden_dim: Width of the hidden layers.
        num_layers: Number of hidden layers, odd (see `dprl.networks.mlp.trunk`).
        activation: Name of a class of `torch.nn`.
        obs_shape: Shape of an observation, [O].
        obs_steps: To.
    """

    def __init__(
        self, *, hidden_dim: PositiveInt, num_layers: PositiveInt, activation: str, obs_shape: list[int], obs_steps: int
    ):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(obs_steps * vector_size(obs_shape, self), hidden_dim),
            trunk(hidden_dim, num_layers, activation),
            nn.Linear(hidden_dim, 1),
        )

    def forward(self, obs: Tensor) -> Tensor:
        """Return V [N] of `obs` [N, To, O]."""
        return self.net(obs).squeeze(-1)


def hidden_layers(hidden_dim: int, num_layers: int, activation: str, layer_norm: bool) -> nn.Sequential:
    """Build the rest of an MLP after its first linear layer.

    Args:
        hidden_dim: Width of the layers.
        num_layers: Number of hidden layers, including the first, whose linear part is the caller's.
        activation: Name of a class of `torch.nn`.
        layer_norm: Apply a LayerNorm before every activation.

    Returns:
        The module, [..., W] -> [..., W].
    """
    layers: list[nn.Module] = []
    for i in range(num_layers):
        linear = nn.Linear(hidden_dim, hidden_dim)  # unused for i = 0, but drawn: seeds keep their meaning
        if i > 0:
            layers.append(linear)
        if layer_norm:
            layers.append(nn.LayerNorm(hidden_dim))
        layers.append(getattr(nn, activation)())
    return nn.Sequential(*layers)


class PlainValue(nn.Module):
    """V(s) as a plain MLP on the observed steps.

    Args:
        hidden_dim: Width of the hidden layers.
        num_layers: Number of hidden layers.
        activation: Name of a class of `torch.nn`.
        layer_norm: Apply a LayerNorm before every activation.
        obs_shape: Shape of an observation, [O].
        obs_steps: To.
    """

    def __init__(
        self,
        *,
        hidden_dim: PositiveInt,
        num_layers: PositiveInt,
        activation: str,
        layer_norm: bool,
        obs_shape: list[int],
        obs_steps: int,
    ):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(obs_steps * vector_size(obs_shape, self), hidden_dim),
            hidden_layers(hidden_dim, num_layers, activation, layer_norm),
            nn.Linear(hidden_dim, 1),
        )

    def forward(self, obs: Tensor) -> Tensor:
        """Return V [N] of `obs` [N, To, O]."""
        return self.net(obs).squeeze(-1)


class ChunkValue(nn.Module):
    """Q(s, chunk) as a plain MLP.

    The first layer is split in two, so that many chunks of one observation share its part.

    Args:
        hidden_dim: Width of the hidden layers.
        num_layers: Number of hidden layers.
        activation: Name of a class of `torch.nn`.
        layer_norm: Apply a LayerNorm before every activation.
        obs_shape: Shape of an observation, [O].
        obs_steps: To.
        act_dim: A.
        act_steps: Ta.
    """

    def __init__(
        self,
        *,
        hidden_dim: PositiveInt,
        num_layers: PositiveInt,
        activation: str,
        layer_norm: bool,
        obs_shape: list[int],
        obs_steps: int,
        act_dim: int,
        act_steps: int,
    ):
        super().__init__()
        self.obs = nn.Linear(obs_steps * vector_size(obs_shape, self), hidden_dim)
        self.chunk = nn.Linear(act_steps * act_dim, hidden_dim, bias=False)
        self.rest = nn.Sequential(
            hidden_layers(hidden_dim, num_layers, activation, layer_norm), nn.Linear(hidden_dim, 1)
        )

    def encode(self, obs: Tensor) -> Tensor:
        """Return the observation's part of the first layer, [N, To, O] -> [N, W]."""
        return self.obs(obs.flatten(1))

    def forward(self, cond: Tensor, act: Tensor) -> Tensor:
        """Return Q [N, n] of chunks `act` [N, n, Ta, A], given `cond` [N, W] from `encode`."""
        return self.rest(self.chunk(act.flatten(2)) + cond[:, None]).squeeze(-1)

    def action_gradient(self, cond: Tensor) -> Callable[[Tensor], Tensor]:
        """Return dQ/dx as a function of chunks x, computed in closed form.

        Args:
            cond: [N, W] from `encode`.

        Returns:
            A function from chunks [N, n, Ta, A] to the gradient, of the same shape.
        """
        hidden, last = self.rest
        rest_gradient = gradient_function([*hidden, last])  # type: ignore[misc]
        weight = self.chunk.weight

        def gradient(x: Tensor) -> Tensor:
            rows = x.flatten(2).flatten(0, 1)  # [N n, Ta A]
            row_cond = cond if x.shape[1] == 1 else cond.repeat_interleave(x.shape[1], 0)
            return (rest_gradient(torch.addmm(row_cond, rows, weight.T)) @ weight).view_as(x)

        return gradient


class NoisedValue(nn.Module):
    """Value of a noisy chunk: a plain MLP on observation, chunk and timestep.

    Args:
        hidden_dim: Width of the hidden layers.
        time_embed_dim: Size of the sinusoidal timestep embedding.
        num_train_timesteps: Number of timesteps.
        **sizes: The other arguments of `ChunkValue`.
    """

    table: Tensor

    def __init__(self, *, hidden_dim: PositiveInt, time_embed_dim: PositiveInt, num_train_timesteps: int, **sizes: Any):
        super().__init__()
        self.register_buffer("table", sinusoid(num_train_timesteps, time_embed_dim), persistent=False)
        self.time = nn.Linear(time_embed_dim, hidden_dim, bias=False)
        self.rest = ChunkValue(hidden_dim=hidden_dim, **sizes)

    def encode(self, obs: Tensor) -> Tensor:
        """Return the observation's part of the first layer, [N, To, O] -> [N, W]."""
        return self.rest.encode(obs)

    def forward(self, cond: Tensor, act: Tensor, t: Tensor | int) -> Tensor:
        """Return the value [N, n] of noisy chunks `act` [N, n, Ta, A].

        Args:
            cond: [N, W] from `encode`.
            act: Noisy chunks.
            t: Timestep, one for all rows or one per row [N].

        Returns:
            Values [N, n].
        """
        return self.rest(cond + self.time(self.table[t]), act)
