"""Diffusion transformer (Peebles and Xie, 2023) over action chunks.

Shapes: N batch, H horizon, A action dim, To observed steps, O observation dim, W hidden dim, B layers,
F conditioning values of the whole network, 6 B W + 2 W.
"""

from torch import Tensor, nn

from dprl.networks.attention import SelfAttention
from dprl.networks.embeddings import ObsLinear, sinusoid, vector_size
from dprl.networks.weight_cache import PackedLinear, timestep_embedding
from dprl.utils.types import PositiveInt


def _unscaled_norm(hidden_dim: int) -> nn.LayerNorm:
    """Build a LayerNorm without parameters; scale and shift come from the condition."""
    return nn.LayerNorm(hidden_dim, elementwise_affine=False, eps=1e-6)


class DiTBlock(nn.Module):
    """Transformer layer with adaLN conditioning.

    Self-attention, then an MLP, each as `x + gate * part(scale * norm(x) + shift)`.

    Args:
        hidden_dim: W.
        num_heads: Number of attention heads.
    """

    def __init__(self, hidden_dim: PositiveInt, num_heads: PositiveInt):
        super().__init__()
        self.norm = _unscaled_norm(hidden_dim)
        self.self_attn = SelfAttention(hidden_dim, num_heads, causal=False, dropout=0.0)
        self.mlp = nn.Sequential(
            PackedLinear(hidden_dim, 4 * hidden_dim),
            nn.GELU(approximate="tanh"),
            PackedLinear(4 * hidden_dim, hidden_dim),
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Apply the layer to `x` [N, H, W] with `condition` [N, 6 W]."""
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = condition[:, None].chunk(6, -1)  # [N, 1, W]
        x = x + attn_gate * self.self_attn(self.norm(x) * (1 + attn_scale) + attn_shift)
        return x + mlp_gate * self.mlp(self.norm(x) * (1 + mlp_scale) + mlp_shift)


class DiTDenoiser(nn.Module):
    """Diffusion transformer with a token per action, conditioned by adaLN-Zero.

    Every action attends to all. Timestep and observation set scale, shift and gate of each part of each layer; all of
    these and the output layer are initialised to zero, so that a layer starts as the identity and the network as zero.

    It differs from the paper so that the observation's part is computed once per chunk: the condition is
    `W_t silu(t) + W_obs silu(obs) + b` in place of `W silu(t + obs) + b`.

    Args:
        hidden_dim: W.
        num_layers: B.
        num_heads: Number of attention heads, a divisor of `hidden_dim`.
        time_embed_dim: Size of the sinusoidal timestep embedding.
        obs_shape: Shape of an observation, [O].
        obs_steps: To.
        act_dim: A.
        horizon: H.
        num_train_timesteps: Number of timesteps.
    """

    table: Tensor
    pos_emb: Tensor

    def __init__(
        self,
        *,
        hidden_dim: PositiveInt,
        num_layers: PositiveInt,
        num_heads: PositiveInt,
        time_embed_dim: PositiveInt,
        obs_shape: list[int],
        obs_steps: int,
        act_dim: int,
        horizon: int,
        num_train_timesteps: int,
    ):
        super().__init__()
        self.register_buffer("table", sinusoid(num_train_timesteps, time_embed_dim), persistent=False)
        self.register_buffer("pos_emb", sinusoid(horizon, hidden_dim), persistent=False)
        self.sizes = [*[6 * hidden_dim] * num_layers, 2 * hidden_dim]  # of each layer's condition and the last norm's

        def embedding(linear: type[nn.Linear], size: int, bias: bool) -> nn.Sequential:
            return nn.Sequential(
                linear(size, hidden_dim),
                nn.SiLU(),
                nn.Linear(hidden_dim, hidden_dim),
                nn.SiLU(),
                nn.Linear(hidden_dim, sum(self.sizes), bias=bias),
            )

        self.time = embedding(nn.Linear, time_embed_dim, bias=False)
        self.obs = embedding(ObsLinear, obs_steps * vector_size(obs_shape, self), bias=True)
        self.chunk = nn.Linear(act_dim, hidden_dim)
        self.layers = nn.ModuleList(DiTBlock(hidden_dim, num_heads) for _ in range(num_layers))
        self.norm, self.out = _unscaled_norm(hidden_dim), nn.Linear(hidden_dim, act_dim)
        for zero in (self.time[-1].weight, self.obs[-1].weight, self.obs[-1].bias, self.out.weight, self.out.bias):
            nn.init.zeros_(zero)  # type: ignore[arg-type]

    def encode(self, obs: Tensor) -> Tensor:
        """Return the observation's part of the condition, [N, To, O] -> [N, F]."""
        return self.obs(obs.flatten(1))

    def forward(self, x: Tensor, t: Tensor | int, cond: Tensor) -> Tensor:
        """Predict the target for `x` [N, H, A] at timestep `t`; see `Denoiser`."""
        *conditions, last = (cond + timestep_embedding(self.time, self.table, t)).split(self.sizes, -1)
        h = self.chunk(x) + self.pos_emb  # [N, H, W]
        for layer, condition in zip(self.layers, conditions, strict=True):
            h = layer(h, condition)
        shift, scale = last[:, None].chunk(2, -1)  # [N, 1, W]
        return self.out(self.norm(h) * (1 + scale) + shift)  # [N, H, A]
