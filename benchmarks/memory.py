"""Peak memory of a program, including all the processes that it starts. Requires Linux."""

import contextlib
import subprocess
import time
from pathlib import Path

INTERVAL = 0.05  # seconds between two samples


def peak_megabytes(command: list[str], cwd: Path | None = None) -> float:
    """Run `command` and return the peak memory of it and its children.

    Counted are the private pages of every process, plus the shared pages of the process that shares the most (the
    parent of forked processes). For a single process this is its resident set size. A sum of resident set sizes would
    count shared pages once per process; proportional set sizes would depend on what else runs on the machine.

    Args:
        command: program and arguments.
        cwd: working directory of the program.

    Returns:
        Megabytes (10^6 bytes).

    Raises:
        SystemExit: if the program fails.
    """
    program = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=cwd)
    peak = 0
    while program.poll() is None:
        usage = [_resident_bytes(pid) for pid in _descendants(program.pid)]
        if usage:
            peak = max(peak, sum(private for private, _ in usage) + max(shared for _, shared in usage))
        time.sleep(INTERVAL)
    if program.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {program.returncode}")
    return peak / 1e6


def _descendants(pid: int) -> list[int]:
    """Return the process id and those of all processes below it."""
    pids = [pid]
    for parent in pids:
        with contextlib.suppress(OSError):  # a process may end meanwhile
            for task in Path(f"/proc/{parent}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
    return pids


def _resident_bytes(pid: int) -> tuple[int, int]:
    """Return the bytes of private and of shared resident pages of a process."""
    private = shared = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.startswith("Private_"):
                private += int(value.split()[0]) * 1024
            elif key.startswith("Shared_"):
                shared += int(value.split()[0]) * 1024
    return private, shared
