"""How much of the machine this process may use."""

import os
import sys
from pathlib import Path

QUOTAS = ("cpu.max", "cpu/cpu.cfs_quota_us")  # of a container: cgroup's version 2, and version 1
NAMED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # variables that torch takes its threads from


def cores(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Logical processors: those that it is bound to, or fewer where a container's quota is of fewer."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not every system tells
    return max(1, min(bound, *(_quota(root / name) for name in QUOTAS)))


def physical(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """The same without counting a core's second hyper-thread, which has no arithmetic of its own."""
    found = set()
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        try:
            found.add((root / f"cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            found.add(str(cpu))
    return min(cores(), len(found) or cores())


def threads() -> int | None:
    """How many torch is best given; None where the environment says it to torch itself."""
    return None if any(os.environ.get(name) for name in NAMED) else physical()


def _quota(path: Path) -> int:
    """Processors that a container may keep busy; fractions count as what is begun."""
    try:
        quota, *period = path.read_text().split()
        whole = int(period[0] if period else path.with_name("cpu.cfs_period_us").read_text())
        return -(-int(quota) // whole) if int(quota) > 0 else sys.maxsize
    except (OSError, ValueError):  # none, or "max"
        return sys.maxsize
