"""Damaged files are read by `tests.helpers.fuzz` in a process of its own, since a C library might crash."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.small import ENV, ROOT

CASES = int(os.environ.get("DPRL_FUZZ", "60"))  # of each kind; set DPRL_FUZZ=20000 for a long run


@pytest.mark.timeout(60 + CASES)
@pytest.mark.parametrize("kind", ["hdf5", "zarr", "zip", "checkpoint", "minari"])
def test_a_damaged_file_is_read_or_refused(kind):
    if kind in ("zarr", "zip"):
        pytest.importorskip("zarr")
    command = [sys.executable, "-m", "tests.helpers.fuzz", "--kind", kind, "--cases", str(CASES)]
    done = subprocess.run(command, env=ENV, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stderr[-3000:]}"
    counts = json.loads(done.stdout)
    assert counts["refused"] > 0 and sum(counts.values()) == CASES
