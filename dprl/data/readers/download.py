"""Downloads of dataset files: resumable, and checked by size."""

import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dprl.utils.errors import UserError
from dprl.utils.files import read_json, write_json

BLOCK_SIZE = 1 << 20  # bytes


def fetch(url: str, path: Path) -> Path:
    """Download a file.

    An incomplete download is kept as `<path>.partial`. The next call resumes it if the server still has the same file.

    Args:
        url: Address of the file.
        path: Where to save it.

    Returns:
        `path`.

    Raises:
        UserError: If the file cannot be downloaded, or is incomplete.
    """
    partial, record = path.with_name(path.name + ".partial"), path.with_name(path.name + ".partial.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        previous = read_json(record) if record.is_file() and partial.is_file() else {}
        present = partial.stat().st_size if previous.get("url") == url and previous.get("tag") else 0
        complete = present and present == previous["size"]  # interrupted before the file was renamed
        size = present if complete else _receive(url, partial, record, present, previous)
    except urllib.error.HTTPError as error:
        reason = f"the server answered {error.code} {error.reason}"
        raise UserError(
            f"{url} cannot be downloaded: {reason}",
            expected="the file",
            got="none",
            fix="data.url=<another address>, or data.path=<a local file>",
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{url} cannot be downloaded: {reason}",
            expected="the whole file",
            got=f"a part, in {partial}" if partial.is_file() else "nothing",
            fix="connect to the network and start again, or copy the file to this machine: data.path=<a local file>",
        ) from None
    received = partial.stat().st_size
    if size is not None and received != size:
        raise UserError(
            f"the download of {url} is incomplete",
            expected=f"{size} bytes",
            got=f"{received}, in {partial}",
            fix="start again to resume it",
        )
    partial.replace(path)
    record.unlink(missing_ok=True)
    return path


def _receive(url: str, partial: Path, record: Path, present: int, previous: dict[str, Any]) -> int | None:
    """Append the bytes after the first `present`; return the size of the whole file, if known."""
    # If-Range: the server sends the rest, or the whole file if it has changed.
    headers = {"Range": f"bytes={present}-", "If-Range": previous["tag"]} if present else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as response:
        if response.status != 206:
            present = 0
        remaining = response.headers.get("Content-Length")
        size = None if remaining is None else present + int(remaining)
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
        write_json(record, {"url": url, "tag": tag, "size": size})
        progress = tqdm(total=size, initial=present, unit="B", unit_scale=True, desc=partial.stem)
        with progress, partial.open("ab" if present else "wb") as file:
            while block := response.read(BLOCK_SIZE):
                file.write(block)
                progress.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    return size
