"""A file from the network, when a user asks for it: resumed where it stopped, and checked by size."""

import os
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from dprl.errors import UserError, found

PIECE = 1 << 20  # bytes


def fetch(url: str, path: Path) -> Path:
    """Downloads ``url`` to ``path``. What has come stays in ``<path>.partial``; the next call goes on from there."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        have = partial.stat().st_size if partial.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=30) as answer:
            if have and answer.status != 206:  # the server begins anew
                have = 0
            rest = answer.headers.get("Content-Length")
            size = None if rest is None else have + int(rest)
            bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=path.name)
            with bar, partial.open("ab" if have else "wb") as file:
                while piece := answer.read(PIECE):
                    file.write(piece)
                    bar.update(len(piece))
                file.flush()
                os.fsync(file.fileno())
    except urllib.error.HTTPError as error:
        raise UserError(f"{url} cannot be downloaded: the server says {error.code} {error.reason}\n  fix:      data.url=...") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{url} cannot be downloaded: {reason}\n  kept:     what has come, in {partial}\n"
            f"  fix:      connect to the network and start again, or bring the file yourself: data.path=..."
        ) from None
    got = partial.stat().st_size
    if size is not None and got != size:
        raise found(f"{url} came incomplete", f"{size} bytes", f"{got}, in {partial}", "start again: it goes on from there")
    partial.replace(path)
    return path
