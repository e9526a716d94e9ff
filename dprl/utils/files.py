"""Atomic writes, removal of folders, and reading of JSON."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dprl.utils.errors import UserError

LARGEST_JSON = 2**27  # bytes
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # error numbers of a disk or quota that is full
RESTORE = "restore the file from its source"


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and move it to `path` if the block succeeds.

    The block writes a file or a folder there. A file replaces an existing `path`; a folder does not.

    Args:
        path: The final path. Its parent folders are created.

    Raises:
        FileExistsError: If a folder was written and `path` exists.
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
    """Set `path` as the file name of an `OSError` that has none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def to_disk(path: Path) -> None:
    """Flush a file to the disk, or the entries of a folder where the system supports it."""
    if path.is_dir():
        with contextlib.suppress(OSError):
            _sync(path)
    else:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tidy(folder: Path) -> None:
    """Remove the temporary folders that an interrupted write or removal left in `folder`."""
    for path in (*folder.glob(".*.partial"), *folder.glob(".*.removed")):
        _remove(path)


def discard(folder: Path) -> None:
    """Remove a folder. It is renamed first, so that it never looks complete with files missing."""
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


def check_plain(folder: Path) -> None:
    """Check that a folder, if it exists, holds plain files and folders only, without opening any of them.

    A link could lead a run to write outside its folder, and a pipe or a device could be read forever. wandb's folder is
    not searched, because wandb keeps links there.

    Raises:
        UserError: If the folder holds a link, a pipe, a socket or a device.
    """
    for entry in os.scandir(folder) if folder.is_dir() else ():
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            if entry.name != "wandb":
                check_plain(Path(entry.path))
        elif not stat.S_ISREG(mode):
            raise UserError(
                f"{entry.path} is no plain file",
                expected="plain files and folders",
                got="a link" if stat.S_ISLNK(mode) else "a pipe, socket or device",
                fix="replace it by a copy of the file, or delete it",
            )


_locks: dict[tuple[int, int], IO[str]] = {}  # the files that this process has locked, by device and inode


def lock(folder: Path) -> None:
    """Make this process the owner of a folder until it ends, also if it is killed; its children do not own it.

    Args:
        folder: An existing folder, which gets the file `lock`.

    Raises:
        UserError: If another process is the owner.
    """
    path = folder / "lock"
    if path.exists():
        status = path.stat()
        if (status.st_dev, status.st_ino) in _locks:  # opening the file again would end the lock
            return
    with naming(path):
        file = os.fdopen(
            os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644), "r+", errors="replace"
        )
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = "".join(filter(str.isprintable, file.read(200)))
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks
        raise UserError(
            f"{folder} is in use",
            expected="one process for each run",
            got=owner or "another process",
            fix="wait until it ends, or out=runs/<another name>",
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    status = os.fstat(file.fileno())
    _locks[status.st_dev, status.st_ino] = file


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as JSON, atomically. NaN and infinities are written as null, since JSON has none."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_without_nan(value), indent=2) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None  # the comparison is false for NaN too
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return value


def read_json(path: str | os.PathLike) -> Any:
    """Return the content of a JSON file.

    Raises:
        UserError: If the file is missing, too large, or not valid JSON.
    """
    try:
        size = Path(path).stat().st_size
        if size > LARGEST_JSON:
            raise ValueError(f"{size} bytes")
        return json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, too many digits
        raise UserError(f"{path} cannot be read", expected="a JSON file", got=error, fix=RESTORE) from None


def read_mapping(path: str | os.PathLike, *keys: str) -> dict[str, Any]:
    """Return the content of a JSON file that must hold a mapping.

    Args:
        path: The file.
        *keys: Keys that the mapping must have.

    Raises:
        UserError: If the file cannot be read, holds another type, or lacks a key.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(
            f"{path} holds no mapping", expected="a JSON object", got=f"a {type(value).__name__}", fix=RESTORE
        )
    missing = [key for key in keys if key not in value]
    if missing:
        raise UserError(
            f"{path} lacks '{missing[0]}'",
            expected=f"the keys {', '.join(keys)}",
            got=sorted(value)[:20],
            fix=RESTORE,
        )
    return value
