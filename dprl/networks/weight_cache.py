"""Cache of tensors derived from weights, valid while the weights do not change.

A chain of reverse steps, a rollout and an evaluation run under `cached_weights`: there the timestep embeddings are
computed once for all timesteps, and in bfloat16 linear layers pack their weights once.

Shapes: N batch, K timesteps.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from threading import local
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

CALLS_BEFORE_PACKING = 10  # packing a matrix costs about as much as it saves in so many calls
MAX_ROWS = 1024  # rows up to which packing pays, for matrices of any size


class Cache(local):
    """Entries of the current thread's block; None outside a block."""

    entries: dict[Hashable, Any] | None = None


CACHE = Cache()


@contextmanager
def cached_weights() -> Iterator[None]:
    """Cache tensors derived from weights inside the block, in which no weight may change.

    Nested blocks share the outermost block's cache.
    """
    with nullcontext() if CACHE.entries is not None else fresh_cache():
        yield


@contextmanager
def fresh_cache() -> Iterator[None]:
    """Start an empty cache for the block, also inside another block."""
    outer, CACHE.entries = CACHE.entries, {}
    try:
        yield
    finally:
        CACHE.entries = outer


def timestep_embedding(net: Callable[[Tensor], Tensor], table: Tensor, t: Tensor | int) -> Tensor:
    """Apply a network to embeddings of timesteps.

    The network sees each timestep at most once per call, and once per `cached_weights` block. It computes in float32:
    products as small as these take several times as long in bfloat16.

    Args:
        net: A function of the rows of `table`.
        table: Embeddings of all timesteps [K, size].
        t: Timestep, one for all rows or one per row [N].

    Returns:
        The network's output, [...] for a single timestep and [N, ...] for one per row.
    """
    rows = None if CACHE.entries is None else CACHE.entries.get(table)
    if rows is None:
        with torch.autocast(table.device.type, enabled=False):
            if CACHE.entries is None and isinstance(t, int):
                return net(table[t])
            rows = net(table)
    if CACHE.entries is not None:
        CACHE.entries[table] = rows
    # not rows[t]: with several threads the gradient of indexing is summed in a different order each time
    return rows[t] if isinstance(t, int) else embedding(t, rows)


class PackedLinear(nn.Linear):
    """Linear layer for repeated calls with few rows in bfloat16, as in denoising chains.

    On a CPU such a product spends much of its time reordering the weights for the kernel. Inside a `cached_weights`
    block the layer reorders them once, after `CALLS_BEFORE_PACKING` calls with as many rows.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to `input` [..., in_features]."""
        entries = CACHE.entries
        if entries is None or torch.compiler.is_compiling():
            return super().forward(input)
        key = (self, input.numel(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled())
        entry = entries.get(key, 0)  # the number of calls so far, then the function to call
        if isinstance(entry, int):
            entry = entries[key] = entry + 1 if entry < CALLS_BEFORE_PACKING else _packed(self, input)
        return super().forward(input) if isinstance(entry, int) else entry(input)


# The operators of torch.ops.mkldnn below are private, but torch has no public way to reuse reordered weights in eager
# mode. benchmarks/README.md has what they gain; in float32 they gain nothing, so only bfloat16 matrices are packed.


def packs_bfloat16() -> bool:
    """Return whether oneDNN packs bfloat16 matrices here; x86 processors need AVX-512 for it."""
    mkldnn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return mkldnn and torch.get_autocast_dtype("cpu") == torch.bfloat16


def _packed(layer: PackedLinear, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a packed equivalent of `layer` for the row count of `x`, or its plain forward if packing is not faster."""
    rows, weight, bias = x.numel() // layer.in_features, layer.weight, layer.bias
    usable = x.device.type == "cpu" and not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    if not usable or rows > MAX_ROWS or not packs_bfloat16():
        return partial(nn.Linear.forward, layer)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), rows)
    bias_bf16 = None if bias is None else bias.bfloat16()
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.bfloat16(), packed, bias_bf16, "none", [], "")
