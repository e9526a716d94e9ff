"""A file from the network, when a user asks for it: resumed where it stopped, and checked by size."""

import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dprl.errors import found
from dprl.files import read_json, write_json

PIECE = 1 << 20  # bytes


def fetch(url: str, path: Path) -> Path:
    """Downloads ``url`` to ``path``. What has come stays in ``<path>.partial``; the next call goes on from there if the
    server still has the same file."""
    partial, about = path.with_name(path.name + ".partial"), path.with_name(path.name + ".partial.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = read_json(about) if about.is_file() and partial.is_file() else {}
        have = partial.stat().st_size if begun.get("url") == url and begun.get("tag") else 0
        whole = have and have == begun["size"]  # cut off before it was moved to its place
        size = have if whole else _receive(url, partial, about, have, begun)
    except urllib.error.HTTPError as error:
        what = f"the server says {error.code} {error.reason}"
        raise found(f"{url} cannot be downloaded: {what}", "the file", "none", "data.url=..., or data.path=...") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        kept = f"what has come, kept in {partial}" if partial.is_file() else "nothing"
        fix = "connect to the network and start again, or bring the file yourself: data.path=..."
        raise found(f"{url} cannot be downloaded: {reason}", "the whole file", kept, fix) from None
    got = partial.stat().st_size
    if size is not None and got != size:
        raise found(f"{url} came incomplete", f"{size} bytes", f"{got}, in {partial}", "start again: it goes on from there if it can")
    partial.replace(path)
    about.unlink(missing_ok=True)
    return path


def _receive(url: str, partial: Path, about: Path, have: int, begun: dict[str, Any]) -> int | None:
    """Takes what is missing behind the first ``have`` bytes; returns the size that the whole should have, if known."""
    headers = {"Range": f"bytes={have}-", "If-Range": begun["tag"]} if have else {}  # the rest, or all of a file that changed
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        if answer.status != 206:
            have = 0
        rest = answer.headers.get("Content-Length")
        size = None if rest is None else have + int(rest)
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        write_json(about, {"url": url, "tag": tag, "size": size})
        bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=partial.stem)
        with bar, partial.open("ab" if have else "wb") as file:
            while piece := answer.read(PIECE):
                file.write(piece)
                bar.update(len(piece))
            file.flush()
            os.fsync(file.fileno())
    return size
