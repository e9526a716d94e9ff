"""What a denoiser is told besides the chunk: the noise level, and the observation.

Letters: N batch, K noise levels.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from dprl.errors import found


def sinusoid(steps: int, size: int) -> Tensor:
    """Sines and cosines of 0 .. steps-1 at geometric frequencies, [steps, size] (Vaswani et al., 2017)."""
    if size < 4 or size % 2:
        raise found("an embedding by sines and cosines has no such size", "an even number, 4 or more", size, "another size")
    frequency = torch.exp(-math.log(10_000) / (size // 2 - 1) * torch.arange(size // 2))
    angle = torch.arange(steps)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


class Kept(local):
    """What was made of the K levels inside ``each_level_once``, by the table that it was made of."""

    rows: dict[int, Tensor] | None = None


KEPT = Kept()


@contextmanager
def each_level_once() -> Iterator[None]:
    """For a chain of reverse steps, in which weights stay as they are: ``by_level`` asks its net once, for all levels."""
    before, KEPT.rows = KEPT.rows, {}
    try:
        yield
    finally:
        KEPT.rows = before


def by_level(net: Callable[[Tensor], Tensor], table: Tensor, k: Tensor | int) -> Tensor:
    """What ``net`` makes of the levels ``k`` in ``table`` [K, size]: [...] of one level for all rows, or [N, ...] of one a row.

    Of many, ``net`` sees each of the K levels once, and never a row twice.
    """
    if KEPT.rows is None:
        # not [k]: the gradient of an index adds up in another order each time when there are several threads
        return net(table[k]) if isinstance(k, int) else embedding(k, net(table))
    if id(table) not in KEPT.rows:
        KEPT.rows[id(table)] = net(table)
    rows = KEPT.rows[id(table)]
    return rows[k] if isinstance(k, int) else embedding(k, rows)


def vector(obs_shape: Any, reader: nn.Module) -> int:
    """The size of an observation that is a vector; a ``UserError`` for any other, since ``reader`` reads no such thing."""
    if not isinstance(obs_shape, list) or len(obs_shape) != 1:
        fix = "a task that observes one (task.env.observe), or a policy that sees, policy=unet_image_small; no critic does"
        raise found(f"{type(reader).__name__} reads vectors", "an observation [size]", obs_shape, fix)
    return obs_shape[0]
