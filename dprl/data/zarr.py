"""Diffusion Policy's zarr layout: ``data/<array>`` of all steps and ``meta/episode_ends``, a folder or a .zip of one.

Letters: M steps in all, S numbers of a step, C H W an image's channels, height and width.
"""

import itertools
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dprl.data.codecs import COMPRESSORS, FILTERS, unpacks_to
from dprl.data.episodes import Episodes, check
from dprl.errors import UserError, found
from dprl.lean import TensorDict
from dprl.normalize import Obs

NUMBERS = re.compile(r"[<>|](f[248]|[iu][1248]|b1)")  # the dtypes that are read; an object array would be unpickled
SOURCE = re.compile(r"([\w.-]+)(?:\[(-?\d*):(-?\d*)\])?")
CHANNELS = (1, 3, 4)
BLOCK = 2**26  # bytes read at a time
LARGEST = 2**20  # bytes of a description
Sources = str | list[str]


def load(path: str | os.PathLike, *, observe: Sources | dict[str, Sources], hint: str, limit_gib: float) -> Episodes:
    """Reads one set of demonstrations; nothing is written, and nothing but numbers is decoded.

    ``observe`` says what an observation is made of: ``[state]``; several arrays joined to one vector, with columns
    chosen, ``[keypoint, "state[:2]"]``; or a mapping from key to such a list. An array [M, H, W, C] is an image, with a
    key of its own, and becomes uint8 [M, C, H, W]. An episode ends where the recording was ended, so none is
    ``terminated``. ``hint`` is said when there is no file; ``limit_gib`` is the most memory that the data may take.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise found("no data file", "a folder in Diffusion Policy's zarr layout, or a .zip of it", f"nothing at {path}", hint)
    try:
        import zarr  # noqa: F401
    except ImportError:
        raise found(f"{path} wants a package to be read", "zarr, 3 or later", "none", "pip install 'dprl[pusht]'") from None
    try:
        with _Store(path, hint) as store:
            return check(_read(store, observe, limit_gib))
    except UserError:
        raise
    except Exception as error:  # the libraries raise whatever their codecs and archives raise
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise found(f"{path} cannot be read", "Diffusion Policy's zarr layout", what, "bring the file again") from None


def _read(store: "_Store", observe: Sources | dict[str, Sources], limit_gib: float) -> Episodes:
    action = store.array("data/action")
    steps, wanted = action.shape[0], {"action": action}
    for name in _names(observe):
        wanted[name] = store.array(f"data/{name}")
    if "data/reward" in store.arrays:
        wanted["reward"] = store.array("data/reward")
    for name, array in wanted.items():
        if array.shape[0] != steps:
            raise found(f"{store.source}: '{name}' has another length", f"{steps} steps, as 'action'", array.shape[0], "repair the file")
    if steps == 0:
        raise found(f"{store.source} holds no data", "at least one step", "none", "name another file")
    episode_ends = store.array("meta/episode_ends")
    gib = sum(array.kept for array in (*wanted.values(), episode_ends)) / 2**30
    if gib > limit_gib:
        raise found(f"{store.source} is too large", f"at most {limit_gib:g} GiB", f"{gib:.2f} GiB", "data.limit_gib=..., or observe less")
    ends = _ends(episode_ends, steps)
    if isinstance(observe, dict):
        obs: Obs = TensorDict({key: _observed(wanted, sources, key) for key, sources in observe.items()}, [steps])
    else:
        obs = _observed(wanted, observe, None)
    return Episodes(
        obs=obs,
        act=wanted["action"].vectors(),
        rew=wanted["reward"].vectors()[:, 0] if "reward" in wanted else None,
        ends=torch.from_numpy(ends),
        terminated=torch.zeros(len(ends), dtype=torch.bool),
        last_obs=None,
        source=store.source,
    )


def _listed(sources: Sources) -> list[str]:
    return [sources] if isinstance(sources, str) else sources


def _names(observe: Sources | dict[str, Sources]) -> list[str]:
    """The arrays that ``observe`` names."""
    groups = list(observe.values()) if isinstance(observe, dict) else [observe]
    if not groups or not all(groups):
        raise found("data.observe names nothing", "arrays, such as [state]", observe, "data.observe=[state]")
    return [_parse(source)[0] for group in groups for source in _listed(group)]


def _parse(source: Any) -> tuple[str, slice]:
    match = SOURCE.fullmatch(source) if isinstance(source, str) else None
    if match is None:
        raise found("data.observe is not understood", "an array's name, or some columns of it, such as state[:2]", source, "write it so")
    first, last = (int(part) if part else None for part in match.groups()[1:])
    return match[1], slice(first, last)


def _observed(arrays: dict[str, "_Array"], sources: Sources, key: str | None) -> Tensor:
    """What one key of the observation is made of: an image [M, C, H, W], or a vector [M, S]."""
    parsed = [_parse(source) for source in _listed(sources)]
    images = [name for name, _ in parsed if arrays[name].is_image]
    if not images:
        return torch.cat([arrays[name].vectors(columns) for name, columns in parsed], -1)
    if key is None or len(parsed) > 1 or parsed[0][1] != slice(None):
        example = f"data.observe={{image: {images[0]}, ...}}"
        raise found(f"'{images[0]}' is an image", "a key of its own, whole", list(_listed(sources)), example)
    return arrays[images[0]].images()


def _ends(array: "_Array", steps: int) -> np.ndarray:
    where = f"{array.store.source}: '{array.name}'"
    if len(array.shape) != 1 or array.dtype.kind not in "iu":
        raise found(f"{where} has the wrong type", "whole numbers [E]", f"{array.dtype} {list(array.shape)}", "repair the file")
    ends = np.concatenate([block for _, block in array.blocks()] or [np.zeros(0)]).astype(np.int64)
    if len(ends) == 0 or (np.diff(ends, prepend=0) <= 0).any() or ends[-1] != steps:
        raise found(
            f"{where} does not cut the data into episodes",
            f"increasing numbers, the last of them {steps}, the data's length",
            ends[:8].tolist() + (["...", int(ends[-1])] if len(ends) > 8 else []),
            "repair the file",
        )
    return ends


class _Store:
    """The files below the folder that holds ``meta/episode_ends``, wherever in ``path`` that is."""

    def __init__(self, path: Path, hint: str):
        from zarr.storage import LocalStore, ZipStore

        self.source, self.archive = str(path), None
        if path.is_dir():
            held = [place.parent.parent for place in (*path.glob("meta/episode_ends"), *path.glob("*/meta/episode_ends"))]
            base = held[0] if len(held) == 1 else path
            files = [place for place in base.rglob("*") if place.is_file()] if held else []
            for link in (place for place in files if place.is_symlink()):
                if not link.resolve().is_relative_to(base.resolve()):
                    raise found(f"{link} leads out of {path}", "files in the folder itself", link.resolve(), "copy what it leads to")
            self.sizes = {place.relative_to(base).as_posix(): place.stat().st_size for place in files}
            self.read: Callable[[str], bytes] = lambda name: (base / name).read_bytes()
            self.zarr: Any = LocalStore(base, read_only=True)
        else:
            self.archive = zipfile.ZipFile(path)
            self.sizes = {info.filename: info.file_size for info in self.archive.infolist() if not info.is_dir()}
            self.read = self.archive.read
            self.zarr = ZipStore(path, mode="r")
        metas = [name for name in self.sizes if re.search(r"(^|/)meta/episode_ends/(\.zarray|zarr\.json)$", name)]
        layout = "data/<array> and meta/episode_ends, in zarr v2"
        if len(metas) != 1 or metas[0].endswith("zarr.json"):
            got = "zarr v3" if len(metas) == 1 else f"{len(metas)} such sets" if metas else "no meta/episode_ends"
            raise found(f"{self.source} is not in Diffusion Policy's layout", layout, got, hint)
        self.root = metas[0].removesuffix("meta/episode_ends/.zarray")
        self.arrays = sorted(
            name.removeprefix(self.root).removesuffix("/.zarray")
            for name in self.sizes
            if name.startswith(self.root) and name.endswith("/.zarray")
        )

    def __enter__(self) -> "_Store":
        return self

    def __exit__(self, *error: object) -> None:
        self.zarr.close()
        if self.archive is not None:
            self.archive.close()

    def array(self, name: str) -> "_Array":
        """What the file says of an array, once it is known that reading it is safe and that all of it is there."""
        where = f"{self.source}: '{name}'"
        if name not in self.arrays:
            raise found(f"{self.source} lacks '{name}'", "an array of that name", self.arrays, "data.observe=[...], or other data")
        described = f"{self.root}{name}/.zarray"
        for about in (described, f"{self.root}{name}/.zattrs"):
            if self.sizes.get(about, 0) > LARGEST:
                raise found(f"{where} is described by too large a file", f"{LARGEST} bytes", self.sizes[about], "bring the file again")
        try:
            about = json.loads(self.read(described))
            shape, chunks, dtype = [int(n) for n in about["shape"]], [int(n) for n in about["chunks"]], about["dtype"]
            codec = None if about["compressor"] is None else about["compressor"]["id"]
            filters = [each["id"] for each in about["filters"] or ()]
            good = about["zarr_format"] == 2 and len(shape) == len(chunks) > 0 and min(shape) >= 0 and min(chunks) > 0
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            what = f"{type(error).__name__}: {error}"
            raise found(f"{where} has a description that cannot be read", "zarr v2's .zarray", what, "bring the file again") from None
        if not good:
            what = f"shape {shape}, chunks {chunks}"
            raise found(f"{where} has a description that makes no sense", "sizes, and chunks of at least 1", what, "bring the file again")
        if not isinstance(dtype, str) or not NUMBERS.fullmatch(dtype):
            raise found(f"{where} is no array of numbers", "floats or whole numbers", f"dtype {dtype}", "write it as numbers")
        unknown = [each for each in filters if each not in FILTERS] + ([] if codec in (None, *COMPRESSORS) else [codec])
        if unknown:
            known = f"one of {', '.join(COMPRESSORS)}, after {' or '.join(FILTERS)}"
            raise found(f"{where} is coded in a way that is not read", known, unknown, "write the file anew")
        separator = about.get("dimension_separator") or "."
        if separator not in (".", "/"):
            raise found(f"{where} has a description that makes no sense", "'.' or '/' between numbers", separator, "bring the file again")
        array = _Array(self, name, tuple(shape), tuple(chunks), np.dtype(dtype), codec, separator)
        self._complete(array, raw=codec is None and not filters)
        return array

    def _complete(self, array: "_Array", raw: bool) -> None:
        """Every chunk must be there, since one that lacks would read as zeros, and none larger than what it decodes to.

        A writer may leave out chunks of zeros on purpose; nothing in the file tells that from a loss.
        """
        most, where = math.prod(array.chunks) * array.dtype.itemsize, f"{self.source}: '{array.name}'"
        count = math.prod(array.grid)
        names = array.files(0, array.shape[0]) if count <= len(self.sizes) else ()
        sizes = [self.sizes[name] for name in names if name in self.sizes]
        if len(sizes) != count:
            fix = "bring the file again, or write it with write_empty_chunks"
            raise found(f"{where} is incomplete", f"{count} chunks for {list(array.shape)}", f"{len(sizes)} of them", fix)
        if any(size != most if raw else size > 2 * most + 4096 for size in sizes):
            raise found(f"{where} does not fit its description", f"chunks of {most} bytes", f"one of {max(sizes)}", "bring the file again")


@dataclass(frozen=True)
class _Array:
    """An array of the file, not read yet."""

    store: _Store
    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    codec: str | None
    separator: str

    @property
    def grid(self) -> list[int]:
        """How many chunks there are along each dimension."""
        return [-(-size // chunk) for size, chunk in zip(self.shape, self.chunks, strict=True)]

    def files(self, first: int, stop: int) -> Iterator[str]:
        """The files of the chunks that hold these steps."""
        rows = range(first // self.chunks[0], -(-stop // self.chunks[0]))
        for index in itertools.product(rows, *map(range, self.grid[1:])):
            yield f"{self.store.root}{self.name}/{self.separator.join(map(str, index))}"

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 4 and self.shape[-1] in CHANNELS

    @property
    def kept(self) -> int:
        """Bytes it takes in memory, with those of the chunk being read."""
        return math.prod(self.shape) * (1 if self.is_image else 4) + math.prod(self.chunks) * self.dtype.itemsize

    def open(self) -> Any:
        import zarr

        return zarr.open_array(self.store.zarr, path=self.store.root + self.name, mode="r", zarr_format=2)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """A few chunks of steps after another: a float copy of all images would not fit into memory."""
        array, step = self.open(), max(1, math.prod(self.shape[1:]) * self.dtype.itemsize)
        rows = max(1, BLOCK // step // self.chunks[0]) * self.chunks[0]
        for first in range(0, self.shape[0], rows):
            span = slice(first, min(first + rows, self.shape[0]))
            self._unpacked(span)
            yield span, array[span]

    def _unpacked(self, span: slice) -> None:
        """Raises a ``UserError`` if a chunk of these steps unpacks to more than a chunk."""
        if self.codec is None:
            return
        most = math.prod(self.chunks) * self.dtype.itemsize
        for name in self.files(span.start, span.stop):
            size = unpacks_to(self.codec, self.store.read(name), most)
            if size is None or size > most:
                got = "more, or it does not say"
                raise found(f"{self.store.source}: '{name}' does not fit its description", f"{most} bytes, unpacked", got, "bring it again")

    def vectors(self, columns: slice = slice(None)) -> Tensor:
        """[M, ...] -> float32 [M, S], of which these columns."""
        size = len(range(math.prod(self.shape[1:]))[columns])
        if size == 0:
            raise found(f"{self.store.source}: '{self.name}' has no such columns", f"some of {list(self.shape[1:])}", columns, "state[:2]")
        out = torch.empty(self.shape[0], size)
        for span, block in self.blocks():
            part = block.reshape(len(block), -1)[:, columns].astype(np.float32)
            bad = ~np.isfinite(part).all(-1)
            if bad.any():
                what = f"NaN or inf, first at step {span.start + int(bad.argmax())}"
                raise found(f"{self.store.source}: '{self.name}' is not finite", "numbers", what, "drop or repair those episodes")
            out[span] = torch.from_numpy(part)
        return out

    def images(self) -> Tensor:
        """[M, H, W, C] of 0..255, whatever the type -> uint8 [M, C, H, W]."""
        steps, height, width, channels = self.shape
        out, highest = torch.empty(steps, channels, height, width, dtype=torch.uint8), 0.0
        for span, block in self.blocks():
            low, high = float(block.min()), float(block.max())
            if not (low >= 0 and high <= 255):  # false for NaN too
                raise found(f"{self.store.source}: '{self.name}' is no image", "0 to 255", f"{low:g} to {high:g}", "repair the file")
            highest = max(highest, high)
            out[span] = torch.from_numpy(np.rint(block).astype(np.uint8)).permute(0, 3, 1, 2)  # [n, H, W, C] -> [n, C, H, W]
        if self.dtype.kind == "f" and highest <= 1:
            raise found(f"{self.store.source}: '{self.name}' is dark throughout", "0 to 255", f"0 to {highest:g}", "multiply it by 255")
        return out
