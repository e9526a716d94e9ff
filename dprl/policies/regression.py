"""Mean-squared-error regression, a baseline that averages where demonstrations disagree.

Shapes: N batch, H horizon, Ta executed steps, To observed steps, A action dim, O observation dim.
"""

from typing import Any

from torch import Tensor, nn

from dprl.networks.embeddings import ObsLinear, vector_size
from dprl.networks.mlp import trunk
from dprl.networks.normalizer import Obs
from dprl.policies.base import ChunkPolicy, masked_mse
from dprl.utils.types import PositiveInt


class RegressionPolicy(ChunkPolicy):
    """Residual MLP from the observed steps to the chunk.

    Args:
        hidden_dim: Width of the hidden layers.
        num_layers: Number of hidden layers, odd (see `dprl.networks.mlp.trunk`).
        activation: Name of a class of `torch.nn`.
        **sizes: Arguments of `ChunkPolicy`.
    """

    def __init__(self, *, hidden_dim: PositiveInt, num_layers: PositiveInt, activation: str, **sizes: Any):
        super().__init__(**sizes)
        self.net = nn.Sequential(
            nn.Flatten(),
            ObsLinear(self.obs_steps * vector_size(self.obs_shape, self), hidden_dim),
            trunk(hidden_dim, num_layers, activation),
            nn.Linear(hidden_dim, self.horizon * self.act_dim),
            nn.Unflatten(1, (self.horizon, self.act_dim)),
        )

    def predict(self, obs: Obs) -> Tensor:
        """Return normalised chunks [N, H, A] for `obs` [N, To, O]."""
        return self.net(self.obs_norm(obs))

    def loss(self, obs: Obs, act: Tensor, mask: Tensor) -> Tensor:
        """Return the mean squared error of the normalised actions; see `ChunkPolicy.loss`."""
        return masked_mse(self.predict(obs), self.act_norm(act), mask)

    def forward(self, obs: Obs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the chunk [N, Ta, A] for `obs` [N, To, O]."""
        return self.to_env(self.predict(obs)), {}
