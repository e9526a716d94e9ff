"""What glibc does with memory that is freed."""

import ctypes
import os

TRIM, MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
NAMED = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")  # where a user says it otherwise
LARGE = 2**25  # bytes; the most that glibc takes for a threshold by itself


def keep_freed() -> None:
    """Has the process keep what it frees, up to 64 MB at the top of its heap, for what it takes next. A gradient step takes
    and frees the same few megabytes every time; handed back to the system in between, their pages are cleared and mapped
    again, which can take a tenth of a small network's step. glibc comes to these thresholds by itself or not, as it happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and not any(os.environ.get(name) for name in NAMED):
        mallopt(MMAP, LARGE)
        mallopt(TRIM, 2 * LARGE)
