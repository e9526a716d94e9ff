"""Residual MLP and the denoiser built from it.

Shapes: N batch, H horizon, A action dim, To observed steps, O observation dim, W hidden dim.
"""

from torch import Tensor, nn

from dprl.networks.embeddings import ObsLinear, sinusoid, vector_size
from dprl.networks.weight_cache import PackedLinear, timestep_embedding
from dprl.utils.errors import UserError
from dprl.utils.types import PositiveInt


class ResidualBlock(nn.Module):
    """Pre-activation residual block, `x + W2 act(W1 act(x))`.

    The backward pass does not need the linear layers' outputs, so the inner ReLU and the residual sum run in place.

    Args:
        hidden_dim: W.
        activation: Name of a class of `torch.nn`.
    """

    def __init__(self, hidden_dim: PositiveInt, activation: str):
        super().__init__()
        act = getattr(nn, activation)
        inner_act = nn.ReLU(inplace=True) if act is nn.ReLU else act()
        self.inner = nn.Sequential(
            act(), PackedLinear(hidden_dim, hidden_dim), inner_act, PackedLinear(hidden_dim, hidden_dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block, [..., W] -> [..., W]."""
        return self.inner(x).add_(x)


def trunk(hidden_dim: int, num_layers: int, activation: str) -> nn.Sequential:
    """Build the hidden layers of a residual MLP, after the input layer and up to the last activation.

    Args:
        hidden_dim: W.
        num_layers: Number of hidden layers, odd: the input layer, which is the caller's, and two per residual block.
        activation: Name of a class of `torch.nn`.

    Returns:
        The module, [..., W] -> [..., W].

    Raises:
        UserError: If `num_layers` is even or less than 1.
    """
    if num_layers < 1 or num_layers % 2 == 0:
        raise UserError(
            "num_layers of a residual MLP is invalid",
            expected="an odd number: one input layer, and two per residual block",
            got=num_layers,
            fix=f"num_layers={max(1, num_layers + 1)}",
        )
    blocks = [ResidualBlock(hidden_dim, activation) for _ in range((num_layers - 1) // 2)]
    return nn.Sequential(*blocks, getattr(nn, activation)())


class MLPDenoiser(nn.Module):
    """Residual MLP over chunk, timestep and observation: the smallest and fastest denoiser.

    The first layer is split in three, so that the observation's part is computed once per chunk (`encode`) and the
    timestep's part once for each timestep.

    Args:
        hidden_dim: W.
        num_layers: Number of hidden layers, odd (see `trunk`).
        activation: Name of a class of `torch.nn`.
        time_embed_dim: Size of the sinusoidal timestep embedding.
        obs_shape: Shape of an observation, [O].
        obs_steps: To.
        act_dim: A.
        horizon: H.
        num_train_timesteps: Number of timesteps.
    """

    table: Tensor

    def __init__(
        self,
        *,
        hidden_dim: PositiveInt,
        num_layers: PositiveInt,
        activation: str,
        time_embed_dim: PositiveInt,
        obs_shape: list[int],
        obs_steps: int,
        act_dim: int,
        horizon: int,
        num_train_timesteps: int,
    ):
        super().__init__()
        self.register_buffer("table", sinusoid(num_train_timesteps, time_embed_dim), persistent=False)
        self.time = nn.Sequential(
            nn.Linear(time_embed_dim, 2 * time_embed_dim),
            nn.Mish(),
            nn.Linear(2 * time_embed_dim, time_embed_dim),
            nn.Linear(time_embed_dim, hidden_dim, bias=False),
        )
        self.obs = ObsLinear(obs_steps * vector_size(obs_shape, self), hidden_dim)
        self.chunk = PackedLinear(horizon * act_dim, hidden_dim, bias=False)
        self.trunk = trunk(hidden_dim, num_layers, activation)
        self.out = PackedLinear(hidden_dim, horizon * act_dim)

    def encode(self, obs: Tensor) -> Tensor:
        """Return the observation's part of the first layer, [N, To, O] -> [N, W]."""
        return self.obs(obs.flatten(1))

    def forward(self, x: Tensor, t: Tensor | int, cond: Tensor) -> Tensor:
        """Predict the target for `x` [N, H, A] at timestep `t`; see `Denoiser`."""
        h = self.chunk(x.flatten(1)).add_(cond).add_(timestep_embedding(self.time, self.table, t))  # [N, W]
        return self.out(self.trunk(h)).view_as(x)  # [N, H, A]
