"""Small helpers for modules and batches."""

import copy
from typing import Any, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def frozen(module: Module) -> Module:
    """Return a copy of `module` in eval mode whose parameters require no gradient."""
    return copy.deepcopy(module).eval().requires_grad_(False)


def device_of(module: nn.Module) -> torch.device:
    """Return the device of the module's parameters."""
    return next(module.parameters()).device


def repeated(rows: Any, n: int) -> Any:
    """Return each row `n` times in sequence: `[N, ...]` to `[N * n, ...]`.

    Args:
        rows: A tensor, or a TensorDict of tensors, with the batch dimension first.
        n: Number of copies. For 1, `rows` itself is returned.
    """
    return rows if n == 1 else rows.repeat_interleave(n, 0)
