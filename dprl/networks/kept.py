"""What is made of weights once, while they stay as they are: through a chain of reverse steps, a rollout, an evaluation.

Letters: N batch, K noise levels.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from threading import local
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

PATIENCE = 10  # products after which a matrix is packed: packing costs about as much as it saves in so many
FEWEST, MOST = 8, 128  # rows for which a packed matrix is faster in float32
SMALLEST = 128 * 128  # numbers of such a matrix
MOST_BF16 = 1024  # rows in bfloat16, where even a small matrix gains


class Kept(local):
    """What was made inside ``weights_stay``, by what it was made of."""

    made: dict[Hashable, Any] | None = None


KEPT = Kept()


@contextmanager
def weights_stay() -> Iterator[None]:
    """While no weight changes ``by_level`` asks its net once, for all levels, and ``Linear`` packs its weights once. Inside
    another such block this one adds nothing."""
    with nullcontext() if KEPT.made is not None else made_anew():
        yield


@contextmanager
def made_anew() -> Iterator[None]:
    """``weights_stay`` that knows nothing of what was made before."""
    before, KEPT.made = KEPT.made, {}
    try:
        yield
    finally:
        KEPT.made = before


def by_level(net: Callable[[Tensor], Tensor], table: Tensor, k: Tensor | int) -> Tensor:
    """What ``net`` makes of the levels ``k`` in ``table`` [K, size]: [...] of one level for all rows, or [N, ...] of one a row.

    Of many, ``net`` sees each of the K levels once, and never a row twice. It computes in float32: a product as small as these
    takes several times as long in bfloat16.
    """
    rows = None if KEPT.made is None else KEPT.made.get(table)
    if rows is None:
        with torch.autocast(table.device.type, enabled=False):
            if KEPT.made is None and isinstance(k, int):
                return net(table[k])
            rows = net(table)
    if KEPT.made is not None:
        KEPT.made[table] = rows
    # not [k]: the gradient of an index adds up in another order each time when there are several threads
    return rows[k] if isinstance(k, int) else embedding(k, rows)


class Linear(nn.Linear):
    """A linear layer that chains call again and again.

    Of a product of few rows, most time on a CPU goes into bringing the weights into the order that its kernel reads them in.
    While weights stay, that is done once.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__(inputs, outputs, bias)
        fewest = FEWEST if inputs * outputs >= SMALLEST else MOST + 1
        self.sizes = (fewest * inputs, MOST * inputs), (0, MOST_BF16 * inputs)  # of what it is worth for, in either precision

    def forward(self, x: Tensor) -> Tensor:
        half = torch.is_autocast_enabled("cpu")
        least, most = self.sizes[half]
        if KEPT.made is None or not least <= x.numel() <= most or not _can_pack(x):
            return super().forward(x)
        rows = x.numel() // self.in_features
        key = (self, rows, half)
        packed = KEPT.made.get(key, 0)
        if isinstance(packed, int):
            if packed < PATIENCE:
                KEPT.made[key] = packed + 1
                return super().forward(x)
            packed = KEPT.made[key] = _packed_bf16(self, rows) if half else _packed(self, rows)
        return packed(x)


def _can_pack(x: Tensor) -> bool:
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.backends.mkldnn.is_available()
    return x.dtype == torch.float32 and torch.backends.mkl.is_available()


def _packed(layer: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    """The layer in float32, for so many rows."""
    weight, bias = layer.weight, layer.bias
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkl._mkl_linear(x, packed, weight, bias, rows)


def _packed_bf16(layer: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    """The layer in bfloat16, as autocast has it."""
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.bfloat16(), rows)
    bias = None if layer.bias is None else layer.bias.bfloat16()
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.bfloat16(), packed, bias, "none", [], "")
