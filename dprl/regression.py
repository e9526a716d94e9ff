"""Mean-squared-error regression: the baseline that averages where demonstrations disagree."""

from torch import Tensor, nn

from dprl.networks.inputs import Observed, vector
from dprl.networks.mlp import trunk
from dprl.normalize import Obs
from dprl.policy import ChunkPolicy, masked_mse


class RegressionPolicy(ChunkPolicy):
    """A residual MLP from the observed steps straight to the chunk."""

    def __init__(self, *, width: int, layers: int, activation: str, **sizes):
        super().__init__(**sizes)
        self.net = nn.Sequential(
            nn.Flatten(),
            Observed(self.obs_steps * vector(self.obs_shape, self), width),
            trunk(width, layers, activation),
            nn.Linear(width, self.horizon * self.act_dim),
            nn.Unflatten(1, (self.horizon, self.act_dim)),
        )

    def predict(self, obs: Obs) -> Tensor:
        return self.net(self.obs_norm(obs))  # [N, To, O] -> [N, H, A]

    def loss(self, obs: Obs, act: Tensor, mask: Tensor) -> Tensor:
        return masked_mse(self.predict(obs), self.act_norm(act), mask)

    def forward(self, obs: Obs) -> tuple[Tensor, dict[str, Tensor]]:
        return self.to_env(self.predict(obs)), {}
