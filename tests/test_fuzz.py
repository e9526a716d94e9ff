"""Damaged files, by ``tests/fuzz.py`` in a process of its own: libraries in C may do worse than raise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

CASES = int(os.environ.get("DPRL_FUZZ", "60"))  # of each kind; DPRL_FUZZ=20000 for a night


@pytest.mark.timeout(60 + CASES)
@pytest.mark.parametrize("kind", ["hdf5", "zarr", "zip", "checkpoint", "minari"])
def test_a_damaged_file_is_read_or_refused(kind):
    if kind in ("zarr", "zip"):
        pytest.importorskip("zarr")
    here = Path(__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(here)])}
    command = [sys.executable, str(here / "fuzz.py"), "--kind", kind, "--cases", str(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stderr[-3000:]}"
    counts = json.loads(done.stdout)
    assert counts["refused"] > 0 and sum(counts.values()) == CASES
