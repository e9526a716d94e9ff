"""Tables say what the results say."""

import subprocess
import sys

from conftest import ROOT


def test_tables_are_up_to_date():
    done = subprocess.run([sys.executable, str(ROOT / "scripts/results.py"), "--check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
