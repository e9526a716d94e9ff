"""Attention among the steps of a chunk.

Letters: N batch, T tokens, W width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dprl.errors import found
from dprl.networks.kept import Linear


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, *, causal: bool = False, dropout: float) -> Tensor:
    """Attention of ``q`` [N, heads, T, W/heads] to ``k`` and ``v``, who sees which in ``seen``, with the heads joined: [N, T, W].

    On a CPU always in float32: there the fused kernel is far slower in bfloat16.
    """
    if q.device.type == "cpu":
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast(q.device.type, enabled=q.device.type != "cpu" and torch.is_autocast_enabled(q.device.type)):
        return scaled_dot_product_attention(q, k, v, seen, is_causal=causal, dropout_p=dropout).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head attention of tokens to each other, or, if ``causal``, to none after themselves: [N, T, W] -> [N, T, W].

    ``dropout`` of the attention's weights, in training alone.
    """

    def __init__(self, width: int, heads: int, *, causal: bool, dropout: float):
        super().__init__()
        if width % heads:
            raise found("the transformer's heads do not divide its width", f"a divisor of {width}", heads, "heads=4, or another width")
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.inputs, self.out = Linear(width, 3 * width), Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [N, heads, T, W/heads]
        dropout = self.dropout if self.training else 0.0
        return self.out(attend(q, k, v, causal=self.causal, dropout=dropout))
