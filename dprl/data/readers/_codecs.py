"""Unpacked sizes of compressed chunks, found without unpacking more than a given limit."""

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any

COMPRESSORS = ("blosc", "zstd", "zlib", "gzip", "bz2", "lzma", "lz4")
FILTERS = ("shuffle", "delta")  # filters that do not change the number of values
STREAMS: dict[str, Callable[[], Any]] = {
    "zlib": lambda: zlib.decompressobj(47),  # 47: accept the headers of both zlib and gzip
    "gzip": lambda: zlib.decompressobj(47),
    "bz2": bz2.BZ2Decompressor,
    "lzma": lzma.LZMADecompressor,
}


def unpacked_size(codec: str, packed: bytes, limit: int) -> int | None:
    """Return the size of a chunk after decompression.

    Args:
        codec: One of `COMPRESSORS`.
        packed: The compressed chunk.
        limit: Largest valid size in bytes.

    Returns:
        The size in bytes: as declared in the header, or for a stream, as counted up to just above `limit`. None if the
        header does not declare it.
    """
    if codec in STREAMS:
        return _count(STREAMS[codec], packed, limit)
    if codec == "zstd":
        return _zstd_size(packed)
    field = slice(4, 8) if codec == "blosc" else slice(0, 4)  # otherwise lz4, as numcodecs writes it
    return int.from_bytes(packed[field], "little") if len(packed) >= field.stop else None


def _count(make_stream: Callable[[], Any], packed: bytes, limit: int) -> int:
    total = 0
    while packed:
        stream = make_stream()
        total += len(stream.decompress(packed, limit + 1 - total))
        if total > limit or not stream.eof:
            break
        packed = stream.unused_data
    return total


def _zstd_size(packed: bytes) -> int | None:
    """Return the content size in the frame header (RFC 8878, 3.1.1.1)."""
    if len(packed) < 6 or packed[:4] != b"\x28\xb5\x2f\xfd":
        return None
    size_flag, single_segment, dictionary_flag = packed[4] >> 6, packed[4] >> 5 & 1, packed[4] & 3
    size_bytes = (single_segment, 2, 4, 8)[size_flag]
    start = 6 - single_segment + (0, 1, 2, 4)[dictionary_flag]
    if size_bytes == 0 or len(packed) < start + size_bytes:
        return None
    return int.from_bytes(packed[start : start + size_bytes], "little") + (256 if size_bytes == 2 else 0)
