"""Checks of the arrays in an HDF5 file, made before any of them is read into memory."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py

from dprl.utils.errors import UserError

NUMBERS = "fiub"  # dtype kinds that are read
MAX_RATIO = 1100  # most unpacked bytes per stored byte; the maximum of deflate is 1032
SMALL = 2**20  # unpacked bytes that are accepted from a file of any size


def dataset(group: h5py.Group, key: str, source: str) -> h5py.Dataset:
    """Return an array of a group without reading it.

    Links, virtual arrays and external storage are refused, since they would read other files.

    Args:
        group: An open HDF5 group.
        key: Name of the array in the group.
        source: Name of the file, for error messages.

    Returns:
        The array.

    Raises:
        UserError: If the entry is not an array of numbers that is stored in the file itself.
    """
    where, fix = f"{source}: '{key}'", "write the file with the array in it"
    link = group.get(key, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise UserError(
            f"{where} is a link",
            expected="an array in the file itself",
            got=getattr(link, "filename", getattr(link, "path", link)),
            fix=fix,
        )
    data: Any = group[key]
    if not isinstance(data, h5py.Dataset) or data.dtype.kind not in NUMBERS:
        got = data.dtype if isinstance(data, h5py.Dataset) else "a group"
        raise UserError(
            f"{where} is not an array of numbers",
            expected="floats, integers or booleans",
            got=got,
            fix="repair the file",
        )
    if data.is_virtual or data.external:
        raise UserError(
            f"{where} is stored in other files",
            expected="an array in the file itself",
            got="virtual or external storage",
            fix=fix,
        )
    return data


def check_size(arrays: Iterable[h5py.Dataset], path: Path, limit_gib: float) -> None:
    """Check that arrays fit into memory and into their file.

    Args:
        arrays: The arrays to read.
        path: The HDF5 file.
        limit_gib: Memory limit in GiB.

    Raises:
        UserError: If the arrays need more than `limit_gib`, or declare more data than the file can hold.
    """
    stored = needed = 0
    for data in arrays:
        size = math.prod(data.shape)
        chunk_bytes = math.prod(data.chunks) * data.dtype.itemsize if data.chunks else 0
        stored += size * data.dtype.itemsize
        needed += size * (data.dtype.itemsize + 4) + chunk_bytes
    file_bytes = path.stat().st_size
    if stored > MAX_RATIO * file_bytes + SMALL:
        raise UserError(
            f"{path} declares more data than it can hold",
            expected=f"arrays that fit into {file_bytes} bytes",
            got=f"{stored} bytes",
            fix="download or copy the file again",
        )
    if needed > limit_gib * 2**30:
        raise UserError(
            f"{path} is too large",
            expected=f"at most {limit_gib:g} GiB",
            got=f"{needed / 2**30:.2f} GiB",
            fix=f"data.limit_gib={math.ceil(needed / 2**30)}",
        )
