"""What an HDF5 file says of its arrays, before any of them takes memory."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py

from dprl.errors import found

NUMBERS = "fiub"  # kinds of dtype; HDF5 has others, that no learner reads
PACKED = 1100  # numbers that one stored byte may stand for: deflate's most is 1032
SMALL = 2**20  # bytes that are given to any file


def dataset(group: h5py.Group, key: str, source: str) -> h5py.Dataset:
    """The array at ``key``; refused unless it is one of numbers, kept in the file itself: a link, a virtual array or external
    storage would read other files."""
    where, again = f"{source}: '{key}'", "write the file with the array in it"
    link = group.get(key, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise found(f"{where} is a link", "an array in the file itself", getattr(link, "filename", getattr(link, "path", link)), again)
    data: Any = group[key]
    if not isinstance(data, h5py.Dataset) or data.dtype.kind not in NUMBERS:
        got = data.dtype if isinstance(data, h5py.Dataset) else "a group"
        raise found(f"{where} is no array of numbers", "floats, whole numbers or booleans", got, "repair the file")
    if data.is_virtual or data.external:
        raise found(f"{where} is kept in other files", "an array in the file itself", "virtual or external storage", again)
    return data


def check_size(arrays: Iterable[h5py.Dataset], path: Path, limit_gib: float) -> None:
    """Raises a ``UserError`` if reading ``arrays`` would take more than ``limit_gib``, or more than so small a file can hold."""
    stored = kept = 0
    for data in arrays:
        size = math.prod(data.shape)
        stored += size * data.dtype.itemsize
        kept += size * (data.dtype.itemsize + 4) + (math.prod(data.chunks) * data.dtype.itemsize if data.chunks else 0)
    if stored > PACKED * path.stat().st_size + SMALL:
        raise found(
            f"{path} says that it holds more than it can", f"{path.stat().st_size} bytes' worth", f"{stored} bytes", "bring it again"
        )
    if kept > limit_gib * 2**30:
        raise found(f"{path} is too large", f"at most {limit_gib:g} GiB", f"{kept / 2**30:.2f} GiB", "data.limit_gib=...")
