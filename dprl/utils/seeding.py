"""Random number generators: torch's, which dprl draws from, and NumPy's and Python's for the code of users."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.random import mtrand


def seed(value: int) -> None:
    """Seed all generators."""
    torch.manual_seed(value)
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


class OwnGenerators:
    """Generators of one environment, which are the global ones while its code runs.

    An environment or a reward that draws from the global generators of NumPy, Python or torch then draws the same
    numbers whatever else runs in its process.

    Args:
        value: First seed.

    Example:
        >>> own = OwnGenerators(0)
        >>> with own:
        ...     x = np.random.rand()  # the same number each time
    """

    def __init__(self, value: int):
        self.draws_from_python = False  # so far; if not, its state, which takes longest, stays unless `watch` is set
        self.watch = True
        self.seed(value)

    def seed(self, value: int) -> None:
        """Seed them."""
        self.numpy = np.random.MT19937(value)
        self.python = random.Random(value).getstate()
        self.torch = torch.Generator().manual_seed(value).get_state()

    def __enter__(self) -> None:
        """Make them the global generators."""
        self.outer_numpy, self.outer_torch = mtrand.get_bit_generator(), torch.get_rng_state()
        mtrand.set_bit_generator(self.numpy)
        torch.set_rng_state(self.torch)
        self.outer_python = random.getstate() if self.watch or self.draws_from_python else None
        if self.outer_python is not None:
            random.setstate(self.python)

    def __exit__(self, *error: object) -> None:
        """Restore the global generators."""
        mtrand.set_bit_generator(self.outer_numpy)
        self.torch = torch.get_rng_state()
        torch.set_rng_state(self.outer_torch)
        if self.outer_python is not None:
            state = random.getstate()
            self.draws_from_python |= state != self.python
            self.python = state
            random.setstate(self.outer_python)


def seeds(count: int, *entropy: int) -> list[int]:
    """Return environment seeds as a function of `entropy`.

    Args:
        count: Number of seeds.
        *entropy: Integers such as a run's seed and the present step.
    """
    return [int(s) for s in np.random.SeedSequence(entropy).generate_state(count)]
