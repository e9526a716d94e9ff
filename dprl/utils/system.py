"""The machine: processors and threads, memory, package versions, and settings of a program's process."""

import ctypes
import logging
import os
import platform
import sys
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

QUOTAS = ("cpu.max", "cpu/cpu.cfs_quota_us")  # files of a container's quota: cgroup version 2, and version 1
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # environment variables that torch reads itself
PACKAGES = ("dprl", "torch", "gymnasium", "mujoco", "torchrl", "tensordict", "numpy", "hydra-core")
MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
MMAP_THRESHOLD = 2**25  # bytes; the largest threshold that glibc chooses by itself


def cores(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the number of logical processors that this process may use.

    These are the processors that it is bound to, or fewer if its container has a smaller quota.

    Args:
        root: The cgroup file system.
    """
    affinity = hasattr(os, "sched_getaffinity")  # not every system has it
    bound = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(bound, *(_quota(root / name) for name in QUOTAS)))


def physical_cores(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return the number of physical cores that this process may use: hyper-threads of one core count once.

    Args:
        root: The file system folder that describes the processors.
    """
    siblings = set()
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        try:
            siblings.add((root / f"cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            siblings.add(str(cpu))
    return min(cores(), len(siblings) or cores())


def default_threads() -> int | None:
    """Return the number of threads to set in torch, or None if environment variables already set it."""
    return None if any(os.environ.get(name) for name in THREAD_VARIABLES) else physical_cores()


def _quota(path: Path) -> int:
    """Return the processors that a container may keep busy, rounded up; `sys.maxsize` if there is no limit."""
    try:
        quota, *period = path.read_text().split()
        microseconds = int(period[0] if period else path.with_name("cpu.cfs_period_us").read_text())
        return -(-int(quota) // microseconds) if int(quota) > 0 else sys.maxsize
    except (OSError, ValueError):  # no such file, or "max"
        return sys.maxsize


def machine() -> dict[str, str | int]:
    """Return the processor, the usable cores, the memory, and the GPU if there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    out: dict[str, str | int] = {"processor": models[0] if models else platform.machine(), "cores": cores()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        out["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    if torch.cuda.is_available():
        out["gpu"] = torch.cuda.get_device_name()
    return out


def peak_megabytes() -> int | None:
    """Return the peak memory of this process without its children, in MB, or None where it is not known.

    For a resumed run it covers the time since it was resumed.
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6)


def versions(*others: str) -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed.

    Args:
        *others: Names of further packages.
    """
    out = {"python": platform.python_version()}
    for name in (*PACKAGES, *others):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def set_up_libraries() -> None:
    """Change what a program needs in its process: malloc, the lock of tqdm, the log level of torchrl.

    Programs call it when they start; importing dprl changes none of these.
    """
    from tqdm import tqdm

    tune_malloc()
    # tqdm's own lock is a semaphore shared between processes; a signal to the process group ends its resource tracker
    tqdm.set_lock(threading.RLock())
    # torchrl logs each storage that it creates; it reads the variable when it is imported
    level = os.environ.setdefault("RL_LOGGING_LEVEL", "WARNING")
    if "torchrl" in sys.modules:
        logging.getLogger("torchrl").setLevel(level)


def tune_malloc() -> None:
    """Make glibc keep up to 64 MB of freed memory at the top of the heap instead of returning it to the system.

    A gradient step allocates and frees the same few megabytes each time. Returned to the system in between, their pages
    are cleared and mapped again, which can take a tenth of a small network's step. glibc may or may not reach these
    thresholds by itself. Without effect on other systems, or if environment variables configure malloc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and not any(os.environ.get(name) for name in MALLOC_VARIABLES):
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, 2 * MMAP_THRESHOLD)
