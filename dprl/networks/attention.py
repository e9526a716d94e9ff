"""Attention among the steps of a chunk.

Letters: N batch, T tokens, W width.
"""

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dprl.errors import found


class SelfAttention(nn.Module):
    """Multi-head attention of tokens to each other, or, if ``causal``, to none after themselves: [N, T, W] -> [N, T, W].

    ``dropout`` of the attention's weights, in training alone.
    """

    def __init__(self, width: int, heads: int, *, causal: bool, dropout: float):
        super().__init__()
        if width % heads:
            raise found("the transformer's heads do not divide its width", f"a divisor of {width}", heads, "heads=4, or another width")
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.inputs = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [N, heads, T, W/heads]
        dropout = self.dropout if self.training else 0.0
        y = scaled_dot_product_attention(q, k, v, is_causal=self.causal, dropout_p=dropout)
        return self.out(y.transpose(1, 2).flatten(2))
