"""What a program runs on, and how much memory it took."""

import os
import platform
import sys
from pathlib import Path

import torch

from dprl.cores import cores


def machine() -> dict[str, str | int]:
    """Its processor, how many of its cores this process may use, its memory, and its GPU if it has one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    out: dict[str, str | int] = {"processor": models[0] if models else platform.machine(), "cores": cores()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        out["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    return out | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def peak_megabytes() -> int | None:
    """The most memory that this process has had, without those it started; of a resumed run, since it was resumed."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(most * (1 if sys.platform == "darwin" else 1024) / 1e6)
