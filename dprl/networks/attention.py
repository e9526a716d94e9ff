"""Attention among the steps of a chunk.

Shapes: N batch, T tokens, W hidden dim.
"""

from math import gcd

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dprl.networks.weight_cache import PackedLinear
from dprl.utils.errors import UserError
from dprl.utils.types import PositiveInt


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False, dropout: float
) -> Tensor:
    """Compute multi-head attention and join the heads.

    On a CPU it always computes in float32, where the fused kernel is far faster than in bfloat16.

    Args:
        q: Queries [N, heads, T, W/heads].
        k: Keys [N, heads, S, W/heads].
        v: Values, of the shape of the keys.
        mask: [T, S], true where a query attends to a key. None: everywhere.
        causal: Each token attends to itself and those before it.
        dropout: Probability of dropping an attention weight.

    Returns:
        The attended values [N, T, W].
    """
    device = q.device.type
    if device == "cpu":
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast(device, enabled=device != "cpu" and torch.is_autocast_enabled(device)):
        out = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, dropout_p=dropout)
        return out.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head self-attention, [N, T, W] -> [N, T, W].

    Args:
        hidden_dim: W.
        num_heads: Number of heads, a divisor of `hidden_dim`.
        causal: Tokens do not attend to later ones.
        dropout: Dropout of the attention weights, in training only.

    Raises:
        UserError: If the heads do not divide the hidden dim.
    """

    def __init__(self, hidden_dim: PositiveInt, num_heads: PositiveInt, *, causal: bool, dropout: float):
        super().__init__()
        if hidden_dim % num_heads:
            raise UserError(
                "policy.denoiser.num_heads does not divide hidden_dim",
                expected=f"a divisor of {hidden_dim}",
                got=num_heads,
                fix=f"policy.denoiser.num_heads={gcd(hidden_dim, num_heads)}",
            )
        self.heads, self.causal, self.dropout = num_heads, causal, dropout
        self.inputs, self.out = PackedLinear(hidden_dim, 3 * hidden_dim), PackedLinear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend among the tokens `x` [N, T, W]."""
        q, k, v = self.inputs(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [N, heads, T, W/heads]
        dropout = self.dropout if self.training else 0.0
        return self.out(attend(q, k, v, causal=self.causal, dropout=dropout))
