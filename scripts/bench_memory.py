"""How much memory a program takes, with all the processes that it starts."""

import contextlib
import subprocess
import time
from pathlib import Path

EVERY = 0.05  # seconds between two looks


def peak_megabytes(command: list[str]) -> float:
    """The most that ``command`` and its children hold at a time, in megabytes (10^6 bytes).

    That is every process's own pages, and the pages that they share once: those of the process that shares the most, which is
    the parent of forked ones. For a single process it is its resident set. A sum of resident sets would count what is shared
    once a process; the proportional set would depend on what else runs on the machine.
    """
    program = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = 0
    while program.poll() is None:
        held = [mapped(pid) for pid in family(program.pid)]
        if held:
            most = max(most, sum(own for own, _ in held) + max(shared for _, shared in held))
        time.sleep(EVERY)
    if program.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {program.returncode}")
    return most / 1e6


def family(pid: int) -> list[int]:
    """A process and all below it."""
    out = [pid]
    for parent in out:
        with contextlib.suppress(OSError):  # it may end while it is looked at
            for task in Path(f"/proc/{parent}/task").iterdir():
                out += map(int, (task / "children").read_text().split())
    return out


def mapped(pid: int) -> tuple[int, int]:
    """Bytes of resident pages of a process: its own, and shared."""
    own = shared = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            key, _, rest = line.partition(":")
            if key.startswith("Private_"):
                own += int(rest.split()[0]) * 1024
            elif key.startswith("Shared_"):
                shared += int(rest.split()[0]) * 1024
    return own, shared
