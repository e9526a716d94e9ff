"""What is made of weights once, while they stay as they are: through a chain of reverse steps, a rollout, an evaluation.

Letters: N batch, K noise levels.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
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

    def forward(self, x: Tensor) -> Tensor:
        made = KEPT.made
        if made is None or torch.compiler.is_compiling():
            return super().forward(x)
        key = (self, x.numel(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled())
        said = made.get(key, 0)
        if isinstance(said, int):  # so many times, so far
            said = made[key] = said + 1 if said < PATIENCE else _packed(self, x)
        return super().forward(x) if isinstance(said, int) else said(x)


def packs_bfloat16() -> bool:
    """Whether oneDNN packs matrices in bfloat16 here: an x86 processor without AVX-512 rounds to it, but has no such order."""
    mkldnn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return mkldnn and torch.get_autocast_dtype("cpu") == torch.bfloat16


def _packed(layer: Linear, x: Tensor) -> Callable[[Tensor], Tensor]:
    """What says the same as ``layer`` of as many rows as ``x`` has: itself, if nothing is won."""
    rows, half, backends = x.numel() // layer.in_features, torch.is_autocast_enabled("cpu"), torch.backends
    weight, bias = layer.weight, layer.bias
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        if not half and x.dtype == torch.float32 and backends.mkl.is_available():
            if FEWEST <= rows <= MOST and weight.numel() >= SMALLEST:
                order = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
                return lambda x: torch.ops.mkl._mkl_linear(x, order, weight, bias, rows)
        elif half and rows <= MOST_BF16 and packs_bfloat16():
            order = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), rows)
            rounded = None if bias is None else bias.bfloat16()
            return lambda x: torch.ops.mkldnn._linear_pointwise(x.bfloat16(), order, rounded, "none", [], "")
    return partial(nn.Linear.forward, layer)
