"""Gradient of a user's objective, with an explanation of every mistake that the function can contain.

Shapes: M chunks, H horizon, A action dim.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor

from dprl.utils.errors import UserError


def objective_gradient(objective: Tensor, x: Tensor, *, name: str) -> Tensor:
    """Compute the gradient of an objective with respect to chunks.

    Args:
        objective: Values of the objective, `[M]`.
        x: Chunks `[M, H, A]` that `objective` was computed from, with `requires_grad` set.
        name: Name of the objective, for messages.

    Returns:
        The gradient `[M, H, A]`.

    Raises:
        UserError: If `objective` is not a tensor `[M]`, not differentiable, or independent of `x`.
    """
    if not isinstance(objective, Tensor):
        raise UserError(
            f"the value {name} returns no tensor",
            expected="one number per chunk, in torch",
            got=type(objective).__name__,
            fix="no numpy, no .item()",
        )
    if objective.shape != x.shape[:1]:
        raise UserError(
            f"the value {name} returns the wrong shape",
            expected=f"[{len(x)}]: one number per chunk",
            got=list(objective.shape),
            fix="reduce it over steps and action dimensions",
        )
    if not objective.requires_grad:
        raise UserError(
            f"the value {name} is not differentiable",
            expected="a function of the chunk, in torch",
            got="no gradient",
            fix="no .detach(), no numpy",
        )
    (gradient,) = torch.autograd.grad(objective.sum(), x, allow_unused=True)
    if gradient is None:
        raise UserError(
            f"the value {name} does not depend on the chunk",
            expected="a gradient",
            got="none",
            fix="use its argument act",
        )
    return gradient


@contextmanager
def explain_failure(name: str) -> Iterator[None]:
    """Turn any exception of a user's objective into a `UserError` that names it.

    Args:
        name: Name of the objective.

    Raises:
        UserError: If the block raises any exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a user's function can raise anything
        raise UserError(
            f"the value {name} failed: {type(error).__name__}: {error}",
            expected="a number per chunk",
            got="an error",
            fix="correct it: f(obs, act) -> [N]",
        ) from error


def raise_not_finite(source: str) -> NoReturn:
    """Raise a `UserError` that `source` produced values that are not finite."""
    raise UserError(
        f"{source} is not finite",
        expected="finite numbers",
        got="NaN or inf",
        fix="guard square roots, divisions and logarithms; no NaN in observations",
    )
