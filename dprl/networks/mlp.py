"""The residual MLP and the denoiser made of it.

Letters: N batch, H horizon, A action dim, To observed steps, O observation dim, K noise levels, W width.
"""

from torch import Tensor, nn

from dprl.errors import check_numbers
from dprl.networks.inputs import Observed, sinusoid, vector
from dprl.networks.kept import Linear, by_level


class Residual(nn.Module):
    """A pre-activation block: ``x + W2 act(W1 act(x))``.

    What a linear layer says, its gradient does not want: a sum, or a ReLU, which wants only its own output, overwrites it.
    """

    def __init__(self, width: int, activation: str):
        super().__init__()
        act = getattr(nn, activation)
        between = nn.ReLU(inplace=True) if act is nn.ReLU else act()
        self.inner = nn.Sequential(act(), Linear(width, width), between, Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).add_(x)


def trunk(width: int, layers: int, activation: str) -> nn.Sequential:
    """``layers`` hidden layers counted as the literature does: the one before, and two a block. So 3 is one block."""
    if layers < 1 or layers % 2 == 0:
        raise ValueError(f"layers is {layers}; expected an odd number: one input layer and two a residual block")
    check_numbers("", least=1, width=width)
    blocks = [Residual(width, activation) for _ in range((layers - 1) // 2)]
    return nn.Sequential(*blocks, getattr(nn, activation)())


class MLPDenoiser(nn.Module):
    """Chunk, level and observation through one residual MLP; the smallest denoiser, and the fastest.

    The first layer is kept as three, so that the observation's part is computed once a chunk (``encode``) and the
    level's once for each of the K levels.
    """

    table: Tensor

    def __init__(
        self,
        *,
        width: int,
        layers: int,
        activation: str,
        time_size: int,
        obs_shape: list[int],
        obs_steps: int,
        act_dim: int,
        horizon: int,
        levels: int,
    ):
        super().__init__()
        self.register_buffer("table", sinusoid(levels, time_size), persistent=False)
        self.time = nn.Sequential(
            nn.Linear(time_size, 2 * time_size),
            nn.Mish(),
            nn.Linear(2 * time_size, time_size),
            nn.Linear(time_size, width, bias=False),
        )
        self.obs = Observed(obs_steps * vector(obs_shape, self), width)
        self.chunk = Linear(horizon * act_dim, width, bias=False)
        self.trunk = trunk(width, layers, activation)
        self.out = Linear(width, horizon * act_dim)

    def encode(self, obs: Tensor) -> Tensor:
        return self.obs(obs.flatten(1))  # [N, To, O] -> [N, W]

    def forward(self, x: Tensor, k: Tensor | int, cond: Tensor) -> Tensor:
        h = self.chunk(x.flatten(1)).add_(cond).add_(by_level(self.time, self.table, k))  # [N, W]
        return self.out(self.trunk(h)).view_as(x)  # [N, H, A]
