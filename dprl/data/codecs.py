"""How much a packed chunk unpacks to, found out without unpacking more than it may."""

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any

COMPRESSORS = ("blosc", "zstd", "zlib", "gzip", "bz2", "lzma", "lz4")
FILTERS = ("shuffle", "delta")  # which leave as many numbers as they find
STREAMS: dict[str, Callable[[], Any]] = {
    "zlib": lambda: zlib.decompressobj(47),  # 47: with a header of zlib's or gzip's
    "gzip": lambda: zlib.decompressobj(47),
    "bz2": bz2.BZ2Decompressor,
    "lzma": lzma.LZMADecompressor,
}


def unpacks_to(codec: str, packed: bytes, most: int) -> int | None:
    """Bytes that ``packed`` says it unpacks to, or for a stream, that it does, counted to just beyond ``most``; None: not told."""
    if codec in STREAMS:
        return _counted(STREAMS[codec], packed, most)
    if codec == "zstd":
        return _zstandard(packed)
    place = slice(4, 8) if codec == "blosc" else slice(0, 4)  # lz4, as numcodecs writes it
    return int.from_bytes(packed[place], "little") if len(packed) >= place.stop else None


def _counted(make: Callable[[], Any], packed: bytes, most: int) -> int:
    total = 0
    while packed:
        stream = make()
        total += len(stream.decompress(packed, most + 1 - total))
        if total > most or not stream.eof:
            break
        packed = stream.unused_data
    return total


def _zstandard(packed: bytes) -> int | None:
    """The content size of a frame's header (RFC 8878, 3.1.1.1)."""
    if len(packed) < 6 or packed[:4] != b"\x28\xb5\x2f\xfd":
        return None
    flag, single, dictionary = packed[4] >> 6, packed[4] >> 5 & 1, packed[4] & 3
    size = (single, 2, 4, 8)[flag]
    start = 6 - single + (0, 1, 2, 4)[dictionary]
    if size == 0 or len(packed) < start + size:
        return None
    return int.from_bytes(packed[start : start + size], "little") + (256 if size == 2 else 0)
