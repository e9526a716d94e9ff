"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

from dprl.utils.system import MALLOC_VARIABLES
from tests.helpers.small import ENV

PROGRAM = """
import ctypes, resource
from dprl.utils.system import tune_malloc
tune_malloc()
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
    named = {key: value for key, value in ENV.items() if key not in MALLOC_VARIABLES} | environment
    return int(
        subprocess.run([sys.executable, "-c", PROGRAM], env=named, capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_reused_unless_the_user_configures_malloc():
    assert faults() < 100  # of 25,600 pages
    assert faults(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072") > 20_000
