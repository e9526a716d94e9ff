"""Zarr v2 stores whose arrays are checked before they are read: their size, completeness, codecs and types."""

import json
import math
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dprl.data.readers._codecs import COMPRESSORS, FILTERS
from dprl.data.readers._zarr_array import REPLACE, Array
from dprl.utils.errors import UserError

NUMBERS = re.compile(r"[<>|](f[248]|[iu][1248]|b1)")  # dtypes that are read; an object array would be unpickled
MAX_METADATA_BYTES = 2**20


class Store:
    """The files of the folder that contains `meta/episode_ends`, anywhere in a folder or a .zip.

    Args:
        path: A folder, or a .zip of one.
        hint: Suggested fix in the error message if the layout is another.

    Raises:
        UserError: If there is not exactly one set of zarr v2 arrays, or a symbolic link leads out of the folder.
    """

    def __init__(self, path: Path, hint: str):
        from zarr.storage import LocalStore, ZipStore

        self.source, self.archive = str(path), None
        if path.is_dir():
            base, files = _files(path)
            self.sizes = {file.relative_to(base).as_posix(): file.stat().st_size for file in files}
            self.read: Callable[[str], bytes] = lambda name: (base / name).read_bytes()
            self.zarr: Any = LocalStore(base, read_only=True)
        else:
            self.archive = zipfile.ZipFile(path)
            self.sizes = {info.filename: info.file_size for info in self.archive.infolist() if not info.is_dir()}
            self.read = self.archive.read
            self.zarr = ZipStore(path, mode="r")
        found = [name for name in self.sizes if re.search(r"(^|/)meta/episode_ends/(\.zarray|zarr\.json)$", name)]
        if len(found) != 1 or found[0].endswith("zarr.json"):
            got = "no meta/episode_ends" if not found else "zarr v3" if len(found) == 1 else f"{len(found)} such sets"
            raise UserError(
                f"{self.source} is not in Diffusion Policy's layout",
                expected="data/<array> and meta/episode_ends, in zarr v2",
                got=got,
                fix=hint,
            )
        self.root = found[0].removesuffix("meta/episode_ends/.zarray")
        self.arrays = sorted(
            name.removeprefix(self.root).removesuffix("/.zarray")
            for name in self.sizes
            if name.startswith(self.root) and name.endswith("/.zarray")
        )

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error: object) -> None:
        self.zarr.close()
        if self.archive is not None:
            self.archive.close()

    def array(self, name: str) -> Array:
        """Return an array that is complete and safe to read, without reading it.

        Args:
            name: Path of the array in the store.

        Returns:
            The array.

        Raises:
            UserError: If there is no such array, its metadata are invalid, or chunks are missing or too large.
        """
        where = f"{self.source}: '{name}'"
        if name not in self.arrays:
            raise UserError(
                f"{self.source} lacks '{name}'",
                expected="an array of that name",
                got=self.arrays,
                fix="data.observe=[...], or other data",
            )
        metadata = self._metadata(name, where)
        try:
            shape, chunks = [int(n) for n in metadata["shape"]], [int(n) for n in metadata["chunks"]]
            dtype = metadata["dtype"]
            codec = None if metadata["compressor"] is None else metadata["compressor"]["id"]
            filters = [entry["id"] for entry in metadata["filters"] or ()]
            version = metadata["zarr_format"]
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise _unreadable(where, error) from None
        if version != 2 or len(shape) != len(chunks) or not shape or min(shape) < 0 or min(chunks) <= 0:
            raise UserError(
                f"{where} has invalid metadata",
                expected="sizes, and chunks of at least 1",
                got=f"shape {shape}, chunks {chunks}",
                fix=REPLACE,
            )
        if not isinstance(dtype, str) or not NUMBERS.fullmatch(dtype):
            raise UserError(
                f"{where} is not an array of numbers",
                expected="floats or integers",
                got=f"dtype {dtype}",
                fix="write it as numbers",
            )
        unsupported = [id for id in filters if id not in FILTERS]
        if codec is not None and codec not in COMPRESSORS:
            unsupported.append(codec)
        if unsupported:
            raise UserError(
                f"{where} has an unsupported codec",
                expected=f"one of {', '.join(COMPRESSORS)}, after {' or '.join(FILTERS)}",
                got=unsupported,
                fix="write the file with a supported codec",
            )
        separator = metadata.get("dimension_separator") or "."
        if separator not in (".", "/"):
            raise UserError(
                f"{where} has invalid metadata",
                expected="'.' or '/' as dimension_separator",
                got=separator,
                fix=REPLACE,
            )
        array = Array(self, name, tuple(shape), tuple(chunks), np.dtype(dtype), codec, separator)
        self._check_chunks(array, raw=codec is None and not filters)
        return array

    def _metadata(self, name: str, where: str) -> Any:
        zarray = f"{self.root}{name}/.zarray"
        for file in (zarray, f"{self.root}{name}/.zattrs"):
            if self.sizes.get(file, 0) > MAX_METADATA_BYTES:
                raise UserError(
                    f"{where} has too large metadata",
                    expected=f"at most {MAX_METADATA_BYTES} bytes",
                    got=self.sizes[file],
                    fix=REPLACE,
                )
        try:
            return json.loads(self.read(zarray))
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            raise _unreadable(where, error) from None

    def _check_chunks(self, array: Array, raw: bool) -> None:
        """Raise a `UserError` unless every chunk exists (a missing one would read as zeros) and none is too large.

        A writer may leave out chunks of zeros on purpose, but nothing in the file distinguishes them from lost ones.
        """
        expected, where = math.prod(array.chunks) * array.dtype.itemsize, f"{self.source}: '{array.name}'"
        count = math.prod(array.grid)
        names = array.files(0, array.shape[0]) if count <= len(self.sizes) else ()
        sizes = [self.sizes[name] for name in names if name in self.sizes]
        if len(sizes) != count:
            raise UserError(
                f"{where} is incomplete",
                expected=f"{count} chunks for {list(array.shape)}",
                got=f"{len(sizes)} of them",
                fix=f"{REPLACE}, or write it with write_empty_chunks",
            )
        if any(size != expected if raw else size > 2 * expected + 4096 for size in sizes):
            raise UserError(
                f"{where} does not match its metadata",
                expected=f"chunks of {expected} bytes",
                got=f"one of {max(sizes)}",
                fix=REPLACE,
            )


def _unreadable(where: str, error: Exception) -> UserError:
    return UserError(
        f"{where} has unreadable metadata",
        expected="zarr v2's .zarray",
        got=f"{type(error).__name__}: {error}",
        fix=REPLACE,
    )


def _files(path: Path) -> tuple[Path, list[Path]]:
    """Return the folder that contains `meta/episode_ends`, and its files; no files unless there is one."""
    found = [match.parent.parent for match in (*path.glob("meta/episode_ends"), *path.glob("*/meta/episode_ends"))]
    base = found[0] if len(found) == 1 else path
    files = [file for file in base.rglob("*") if file.is_file()] if found else []
    for file in files:
        if file.is_symlink() and not file.resolve().is_relative_to(base.resolve()):
            raise UserError(
                f"{file} leads out of {path}",
                expected="files in the folder itself",
                got=file.resolve(),
                fix="replace the link by a copy of its target",
            )
    return base, files
