"""A diffusion transformer (Peebles & Xie, 2023) over action chunks.

Letters: N batch, H horizon, A action dim, To observed steps, O observation dim, K noise levels, W width, B layers,
F numbers that condition the whole net, 6 B W + 2 W.
"""

from torch import Tensor, nn

from dprl.networks.attention import SelfAttention
from dprl.networks.inputs import Observed, sinusoid, vector
from dprl.networks.kept import Linear, by_level


def bare_norm(width: int) -> nn.LayerNorm:
    """Without a scale and shift of its own: the condition gives them."""
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class Layer(nn.Module):
    """``x + gate part(scale norm(x) + shift)`` for each of two parts: attention among actions, and an MLP on each action."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm = bare_norm(width)
        self.among = SelfAttention(width, heads, causal=False, dropout=0.0)
        self.each = nn.Sequential(Linear(width, 4 * width), nn.GELU(approximate="tanh"), Linear(4 * width, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``x`` [N, H, W], ``condition`` [N, 6 W]."""
        shift, scale, gate, shift_each, scale_each, gate_each = condition[:, None].chunk(6, -1)  # [N, 1, W]
        x = x + gate * self.among(self.norm(x) * (1 + scale) + shift)
        return x + gate_each * self.each(self.norm(x) * (1 + scale_each) + shift_each)


class DiTDenoiser(nn.Module):
    """A token an action, each attends to all; level and observation enter by adaLN-Zero: shift, scale and gate of every part.

    All of them begin as zero, and so does the last layer: a layer begins as the identity, the net as zero.

    Differs from the paper to be able to compute the observation's part once a chunk: the condition is
    ``W_level silu(level) + W_obs silu(observation) + b``, and not ``W silu(level + observation) + b``.
    """

    table: Tensor
    places: Tensor

    def __init__(
        self,
        *,
        width: int,
        layers: int,
        heads: int,
        time_size: int,
        obs_shape: list[int],
        obs_steps: int,
        act_dim: int,
        horizon: int,
        levels: int,
    ):
        super().__init__()
        self.register_buffer("table", sinusoid(levels, time_size), persistent=False)
        self.register_buffer("places", sinusoid(horizon, width), persistent=False)
        self.sizes = [*[6 * width] * layers, 2 * width]  # of the condition: each layer's, and the last norm's

        def embedded(first: type[nn.Linear], size: int, bias: bool) -> nn.Sequential:
            parts = [first(size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, sum(self.sizes), bias=bias)]
            return nn.Sequential(*parts)

        self.level = embedded(nn.Linear, time_size, bias=False)
        self.obs = embedded(Observed, obs_steps * vector(obs_shape, self), bias=True)
        self.chunk = nn.Linear(act_dim, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm, self.out = bare_norm(width), nn.Linear(width, act_dim)
        for zero in (self.level[-1].weight, self.obs[-1].weight, self.obs[-1].bias, self.out.weight, self.out.bias):
            nn.init.zeros_(zero)  # type: ignore[arg-type]

    def encode(self, obs: Tensor) -> Tensor:
        return self.obs(obs.flatten(1))  # [N, To, O] -> [N, F]

    def forward(self, x: Tensor, k: Tensor | int, cond: Tensor) -> Tensor:
        *conditions, last = (cond + by_level(self.level, self.table, k)).split(self.sizes, -1)
        h = self.chunk(x) + self.places  # [N, H, W]
        for layer, condition in zip(self.layers, conditions, strict=True):
            h = layer(h, condition)
        shift, scale = last[:, None].chunk(2, -1)  # [N, 1, W]
        return self.out(self.norm(h) * (1 + scale) + shift)  # [N, H, A]
