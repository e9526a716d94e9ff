"""Operations on batches of observations: arrays, or dictionaries of arrays.

Shapes: M rows.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def take_rows(values: Any, rows: slice) -> Any:
    """Return a slice of the rows of an array, or of every array of a dictionary.

    Args:
        values: Array `[M, ...]`, or a dictionary of such arrays.
        rows: Rows to return.

    Returns:
        Views of the same structure as `values`.
    """
    return {key: part[rows] for key, part in values.items()} if isinstance(values, dict) else values[rows]


def concatenate_rows(batches: Sequence[Any]) -> Any:
    """Concatenate batches along their first axis.

    Args:
        batches: Arrays, or dictionaries of arrays with the same keys.

    Returns:
        One batch of the same structure.
    """
    if isinstance(batches[0], dict):
        return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    return np.concatenate(batches)


def where_rows(mask: np.ndarray, new: Any, old: Any) -> Any:
    """Return `new` in the rows of the mask and `old` in the others.

    Args:
        mask: Rows to take from `new`, bool `[M]`.
        new: Array `[M, ...]`, or a dictionary of such arrays.
        old: Batch of the same structure as `new`.

    Returns:
        A batch of the same structure.
    """
    if isinstance(new, dict):
        return {key: where_rows(mask, new[key], old[key]) for key in new}
    return np.where(mask.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def first_non_finite(values: Any, name: str) -> tuple[str, int, float] | None:
    """Find the first NaN or infinity in a batch.

    Args:
        values: Array `[M, ...]`, or a dictionary of such arrays.
        name: Description of `values`, for the result.

    Returns:
        The name (with the key, for a dictionary), the row and the value; None if everything is finite.
    """
    for key, part in values.items() if isinstance(values, dict) else [(None, values)]:
        # A sum costs a fraction of an element-wise check, and is finite only if every element is.
        if part.dtype.kind != "f" or math.isfinite(np.add.reduce(part, None)):
            continue
        for index in np.argwhere(~np.isfinite(part)):  # empty if only the sum overflowed
            return name if key is None else f"{name} '{key}'", int(index[0]), float(part[tuple(index)])
    return None
