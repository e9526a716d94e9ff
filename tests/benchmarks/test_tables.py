"""Tests of scripts/tables.py: the tables of the documentation are those of the results."""

import subprocess
import sys

from tests.helpers.small import ROOT


def test_tables_are_up_to_date():
    command = [sys.executable, str(ROOT / "scripts/tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
