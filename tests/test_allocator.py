"""Freed memory is kept."""

import subprocess
import sys

import pytest
from conftest import ENV

from dprl.allocator import NAMED

PROGRAM = """
import ctypes, resource
from dprl.allocator import keep_freed
keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def step():
    blocks = [libc.malloc(2**20) for _ in range(10)]
    for block in blocks:
        ctypes.memset(block, 1, 2**20)
    for block in blocks:
        libc.free(block)

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> int:
    named = {key: value for key, value in ENV.items() if key not in NAMED} | environment
    return int(subprocess.run([sys.executable, "-c", PROGRAM], env=named, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_what_is_freed_is_there_for_the_next_step_unless_the_user_says_otherwise():
    assert faults() < 100  # of 25,600 pages
    assert faults(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072") > 20_000
