"""An array of a zarr store, read a few chunks at a time.

Shapes: M steps of all episodes, S values of a step, C H W channels, height and width of an image.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dprl.data.readers._codecs import unpacked_size
from dprl.utils.errors import UserError

if TYPE_CHECKING:
    from dprl.data.readers._zarr_store import Store

CHANNELS = (1, 3, 4)  # valid numbers of channels of an image
BLOCK_BYTES = 2**26  # read at a time
REPLACE = "download or copy the file again"


@dataclass(frozen=True)
class Array:
    """An array of a store, not read yet.

    Args:
        store: The store.
        name: Path of the array in the store.
        shape: Its shape.
        chunks: Shape of a chunk.
        dtype: Its dtype.
        codec: One of `COMPRESSORS`, or None.
        separator: Character between the indices in the file name of a chunk.
    """

    store: "Store"
    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    codec: str | None
    separator: str

    @property
    def grid(self) -> list[int]:
        """Number of chunks along each dimension."""
        return [-(-size // chunk) for size, chunk in zip(self.shape, self.chunks, strict=True)]

    @property
    def is_image(self) -> bool:
        """True if the array is [M, H, W, C]."""
        return len(self.shape) == 4 and self.shape[-1] in CHANNELS

    @property
    def memory_bytes(self) -> int:
        """Size in memory, including the chunk being read."""
        return math.prod(self.shape) * (1 if self.is_image else 4) + math.prod(self.chunks) * self.dtype.itemsize

    def files(self, first: int, stop: int) -> Iterator[str]:
        """Yield the files of the chunks that contain some steps.

        Args:
            first: First step.
            stop: Step after the last.

        Yields:
            File names in the store.
        """
        rows = range(first // self.chunks[0], -(-stop // self.chunks[0]))
        for index in itertools.product(rows, *map(range, self.grid[1:])):
            yield f"{self.store.root}{self.name}/{self.separator.join(map(str, index))}"

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Read the array a few chunks at a time, since a float copy of all images would not fit into memory.

        Yields:
            The steps of a block, and their values.

        Raises:
            UserError: If a chunk is larger than its metadata declare.
        """
        import zarr

        array = zarr.open_array(self.store.zarr, path=self.store.root + self.name, mode="r", zarr_format=2)
        step_bytes = max(1, math.prod(self.shape[1:]) * self.dtype.itemsize)
        rows = max(1, BLOCK_BYTES // step_bytes // self.chunks[0]) * self.chunks[0]
        for first in range(0, self.shape[0], rows):
            span = slice(first, min(first + rows, self.shape[0]))
            self._check_unpacked(span)
            yield span, array[span]  # type: ignore[misc]

    def _check_unpacked(self, span: slice) -> None:
        """Raise a `UserError` if a chunk of these steps unpacks to more than the size of a chunk."""
        if self.codec is None:
            return
        expected = math.prod(self.chunks) * self.dtype.itemsize
        for name in self.files(span.start, span.stop):
            size = unpacked_size(self.codec, self.store.read(name), expected)
            if size is None or size > expected:
                raise UserError(
                    f"{self.store.source}: '{name}' does not match its metadata",
                    expected=f"{expected} bytes after decompression",
                    got="more, or an unknown size",
                    fix=REPLACE,
                )

    def vectors(self, columns: slice = slice(None)) -> Tensor:
        """Read the array as vectors.

        Args:
            columns: Columns of the flattened steps to read.

        Returns:
            A float32 tensor [M, S].

        Raises:
            UserError: If there are no such columns, or a value is not finite.
        """
        size = len(range(math.prod(self.shape[1:]))[columns])
        if size == 0:
            raise UserError(
                f"{self.store.source}: '{self.name}' has no such columns",
                expected=f"some of {list(self.shape[1:])}",
                got=columns,
                fix="another range in data.observe, such as state[:2]",
            )
        out = torch.empty(self.shape[0], size)
        for span, block in self.blocks():
            part = block.reshape(len(block), -1)[:, columns].astype(np.float32)
            bad = ~np.isfinite(part).all(-1)
            if bad.any():
                raise UserError(
                    f"{self.store.source}: '{self.name}' is not finite",
                    expected="finite numbers",
                    got=f"NaN or inf, first at step {span.start + int(bad.argmax())}",
                    fix="drop or repair those episodes",
                )
            out[span] = torch.from_numpy(part)
        return out

    def images(self) -> Tensor:
        """Read the array [M, H, W, C], of values from 0 to 255 of any dtype, as images.

        Returns:
            A uint8 tensor [M, C, H, W].

        Raises:
            UserError: If a value is out of range, or all values are at most 1.
        """
        steps, height, width, channels = self.shape
        out, highest = torch.empty(steps, channels, height, width, dtype=torch.uint8), 0.0
        for span, block in self.blocks():
            low, high = float(block.min()), float(block.max())
            if not (low >= 0 and high <= 255):  # false for NaN too
                raise UserError(
                    f"{self.store.source}: '{self.name}' is not an image",
                    expected="0 to 255",
                    got=f"{low:g} to {high:g}",
                    fix="repair the file",
                )
            highest = max(highest, high)
            pixels = torch.from_numpy(np.rint(block).astype(np.uint8))  # [n, H, W, C]
            out[span] = pixels.permute(0, 3, 1, 2)
        if self.dtype.kind == "f" and highest <= 1:
            raise UserError(
                f"{self.store.source}: '{self.name}' has the wrong range",
                expected="0 to 255",
                got=f"0 to {highest:g}",
                fix="multiply it by 255",
            )
        return out
