"""The generators that a run draws from: torch's, and numpy's and Python's own, which code of users may draw from."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed(value: int) -> None:
    """Seeds all of them."""
    torch.manual_seed(value)
    seed_others(value)


def seed_others(value: int) -> None:
    """Seeds those that dprl itself leaves alone."""
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002  dprl draws from torch alone; this is for the code of users


def state() -> dict[str, Any]:
    """Where they all are, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    version, words, gauss = random.getstate()
    out = {"cpu": torch.get_rng_state(), "numpy": [kind, np.asarray(keys).tolist(), *rest], "python": [version, list(words), gauss]}
    return out | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def set_state(state: dict[str, Any]) -> None:
    """Undoes what was drawn since ``state``."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


@contextlib.contextmanager
def forked(value: int) -> Iterator[None]:
    """Inside, all are seeded by ``value``; afterwards they go on as if nothing had been drawn."""
    before = state()
    try:
        seed(value)
        yield
    finally:
        set_state(before)
