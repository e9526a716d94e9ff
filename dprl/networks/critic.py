"""Critics. They read observations that the policy's normaliser has already scaled."""

from torch import Tensor, nn

from dprl.networks.mlp import trunk


class StateValue(nn.Module):
    """V(s): a residual MLP on the observed steps, [N, To, O] -> [N]."""

    def __init__(self, *, width: int, layers: int, activation: str, obs_shape: list[int], obs_steps: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(obs_steps * obs_shape[-1], width),
            trunk(width, layers, activation),
            nn.Linear(width, 1),
        )

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)
