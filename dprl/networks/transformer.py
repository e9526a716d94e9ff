"""Time-series diffusion transformer of Diffusion Policy (Chi et al., 2023, section 3.1).

Shapes: N batch, H horizon, A action dim, To observed steps, O observation dim, W hidden dim, B layers.
"""

import torch
from torch import Tensor, nn

from dprl.networks.attention import SelfAttention, attend
from dprl.networks.embeddings import ObsLinear, sinusoid, vector_size
from dprl.networks.weight_cache import PackedLinear, timestep_embedding
from dprl.utils.types import PositiveInt

INIT_STD = 0.02  # of weights and position embeddings


class TransformerBlock(nn.Module):
    """Pre-norm decoder layer: causal self-attention, cross-attention to the memory, and an MLP.

    Args:
        hidden_dim: W.
        num_heads: Number of attention heads.
        dropout: Dropout of attention weights and of the output of each part.
    """

    def __init__(self, hidden_dim: PositiveInt, num_heads: PositiveInt, dropout: float):
        super().__init__()
        self.heads, self.dropout = num_heads, dropout
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_dim) for _ in range(3))
        self.drop = nn.Dropout(dropout)
        self.self_attn = SelfAttention(hidden_dim, num_heads, causal=True, dropout=dropout)
        self.query, self.out_proj = PackedLinear(hidden_dim, hidden_dim), PackedLinear(hidden_dim, hidden_dim)
        self.mlp = nn.Sequential(
            PackedLinear(hidden_dim, 4 * hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            PackedLinear(4 * hidden_dim, hidden_dim),
        )

    def cross_attn(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attend from `x` [N, H, W] to the memory; arguments as in `forward`."""
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [N, heads, H, W/heads]
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(attend(q, keys, values, mask, dropout=dropout))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: Tokens [N, H, W].
            keys: Keys of the memory [N, heads, 1+To, W/heads].
            values: Values of the memory, of the same shape.
            mask: [H, 1+To], true where a token attends to a memory token.

        Returns:
            Tokens [N, H, W].
        """
        x = x + self.drop(self.self_attn(self.norms[0](x)))
        x = x + self.drop(self.cross_attn(self.norms[1](x), keys, values, mask))
        return x + self.drop(self.mlp(self.norms[2](x)))


class TransformerDenoiser(nn.Module):
    """Causal transformer with a token per action and a memory of the timestep and the observed steps.

    An action attends to itself and earlier actions, to the timestep, and to the observed steps up to its own: the first
    action to the first observed step, the second to two, and so on.

    Memory tokens pass through an MLP each, without attention among them. So `encode` computes the keys and values of
    the observed steps for all layers, and those of the timesteps are a table.

    Args:
        hidden_dim: W.
        num_layers: B.
        num_heads: Number of attention heads, a divisor of `hidden_dim`.
        dropout: Dropout of attention weights and of the output of each part of a layer, in training only.
        token_dropout: Dropout of the tokens at the input, in training only.
        obs_shape: Shape of an observation, [O].
        obs_steps: To.
        act_dim: A.
        horizon: H.
        num_train_timesteps: Number of timesteps.
    """

    table: Tensor
    memory_mask: Tensor

    def __init__(
        self,
        *,
        hidden_dim: PositiveInt,
        num_layers: PositiveInt,
        num_heads: PositiveInt,
        dropout: float,
        token_dropout: float,
        obs_shape: list[int],
        obs_steps: int,
        act_dim: int,
        horizon: int,
        num_train_timesteps: int,
    ):
        super().__init__()
        self.register_buffer("table", sinusoid(num_train_timesteps, hidden_dim), persistent=False)
        obs_mask = torch.arange(horizon)[:, None] >= torch.arange(obs_steps)  # both start with the first observed step
        memory_mask = nn.functional.pad(obs_mask, (1, 0), value=True)  # [H, 1+To]; all attend to the timestep
        self.register_buffer("memory_mask", memory_mask, persistent=False)
        self.chunk, self.obs = nn.Linear(act_dim, hidden_dim), ObsLinear(vector_size(obs_shape, self), hidden_dim)
        self.pos_emb = nn.Parameter(torch.zeros(horizon, hidden_dim))
        self.memory_pos_emb = nn.Parameter(torch.zeros(1 + obs_steps, hidden_dim))
        self.drop = nn.Dropout(token_dropout)
        self.memory = nn.Sequential(
            nn.Linear(hidden_dim, 4 * hidden_dim), nn.Mish(), nn.Linear(4 * hidden_dim, hidden_dim)
        )
        self.keys_values = nn.Linear(hidden_dim, num_layers * 2 * hidden_dim)
        self.layers = nn.ModuleList(TransformerBlock(hidden_dim, num_heads, dropout) for _ in range(num_layers))
        self.out = nn.Sequential(nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, act_dim))
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def memory_keys_values(self, tokens: Tensor) -> Tensor:
        """Return keys and values of all layers for memory `tokens`, [..., W] -> [..., 2 B W]."""
        return self.keys_values(self.memory(self.drop(tokens)))

    def encode(self, obs: Tensor) -> Tensor:
        """Return keys and values of the observed steps, [N, To, O] -> [N, To, 2 B W]."""
        return self.memory_keys_values(self.obs(obs) + self.memory_pos_emb[1:])

    def _encode_time(self, embedding: Tensor) -> Tensor:
        """Return keys and values of timesteps, [..., W] -> [..., 2 B W]."""
        return self.memory_keys_values(embedding + self.memory_pos_emb[0])

    def forward(self, x: Tensor, t: Tensor | int, cond: Tensor) -> Tensor:
        """Predict the target for `x` [N, H, A] at timestep `t`; see `Denoiser`."""
        time = timestep_embedding(self._encode_time, self.table, t)  # [2 B W] or [N, 2 B W]
        memory = torch.cat([time.expand(len(x), -1)[:, None], cond], 1)  # [N, 1+To, 2 B W]
        split = memory.unflatten(-1, (len(self.layers), 2, self.layers[0].heads, -1))  # type: ignore[arg-type]
        h = self.drop(self.chunk(x) + self.pos_emb)  # [N, H, W]
        for layer, (keys, values) in zip(self.layers, split.permute(2, 3, 0, 4, 1, 5), strict=True):
            h = layer(h, keys, values, self.memory_mask)
        return self.out(h)  # [N, H, A]
