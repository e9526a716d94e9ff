"""Random number generators: torch's, which dprl draws from, and NumPy's and Python's for the code of users."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed(value: int) -> None:
    """Seed all generators."""
    torch.manual_seed(value)
    seed_others(value)


def seed_others(value: int) -> None:
    """Seed the generators of Python and NumPy, from which dprl itself never draws."""
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002  for the code of users


def state() -> dict[str, Any]:
    """Return the state of all generators, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    version, words, gauss = random.getstate()
    out = {
        "cpu": torch.get_rng_state(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": [version, list(words), gauss],
    }
    if torch.cuda.is_available():
        out["cuda"] = torch.cuda.get_rng_state_all()
    return out


def set_state(state: dict[str, Any]) -> None:
    """Restore the generators to a state that `state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


@contextlib.contextmanager
def forked(value: int) -> Iterator[None]:
    """Seed all generators by `value` inside the block, and restore their state after it."""
    before = state()
    try:
        seed(value)
        yield
    finally:
        set_state(before)


def seeds(count: int, *entropy: int) -> list[int]:
    """Return environment seeds as a function of `entropy`.

    Args:
        count: Number of seeds.
        *entropy: Integers such as a run's seed and the present step.
    """
    return [int(s) for s in np.random.SeedSequence(entropy).generate_state(count)]
