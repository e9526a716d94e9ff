"""Files that appear whole or not at all."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dprl.errors import found

LARGEST_JSON = 2**27  # bytes

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # why a disk takes no more


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a path beside ``path`` to write to (a file, or a folder); moved to ``path`` if the block succeeds.

    A folder replaces nothing: ``path`` must not exist then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    _remove(temporary)
    try:
        with naming(path):
            yield temporary
            for part in (*temporary.rglob("*"), temporary):
                to_disk(part)
            if temporary.is_dir() and path.exists():
                raise FileExistsError(f"{path} exists")
            temporary.replace(path)
            to_disk(path.parent)
    finally:
        _remove(temporary)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts ``path`` on an ``OSError`` that does not say what could not be written."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def to_disk(path: Path) -> None:
    """Has the system write a file, or the list of a folder's files where it can, before anything else is done."""
    if path.is_dir():
        with contextlib.suppress(OSError):
            _sync(path)
    else:
        _sync(path)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def tidy(folder: Path) -> None:
    """Removes what an interruption has left of folders that were being written or removed here."""
    for path in (*folder.glob(".*.partial"), *folder.glob(".*.removed")):
        _remove(path)


def discard(folder: Path) -> None:
    """Removes a folder, which at no moment looks whole with parts of it gone."""
    removed = folder.with_name(f".{folder.name}.removed")
    _remove(removed)
    if folder.exists():
        folder.rename(removed)
        _remove(removed)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes ``value`` as JSON, whole or not at all. NaN is written as null: JSON has none."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_finite(value), indent=2) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None  # false for NaN too
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file, or raises a ``UserError`` that names it."""
    try:
        size = Path(path).stat().st_size
        if size > LARGEST_JSON:
            raise ValueError(f"{size} bytes")
        return json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, a number of too many digits
        raise found(f"{path} cannot be read", "a JSON file", error, "bring the file again") from None


def read_mapping(path: str | os.PathLike, *keys: str) -> dict[str, Any]:
    """Reads a JSON file that must hold a mapping with these ``keys``."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise found(f"{path} holds no mapping", "a JSON object", f"a {type(value).__name__}", "bring the file again")
    missing = [key for key in keys if key not in value]
    if missing:
        raise found(f"{path} lacks '{missing[0]}'", f"the keys {', '.join(keys)}", sorted(value)[:20], "bring the file again")
    return value
