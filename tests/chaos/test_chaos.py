"""A short chaos test: every fault on `pretrain.py`, once."""

import json

import pytest


@pytest.mark.slow
def test_faults_do_not_change_the_result(command, cloned):
    out = cloned / "chaos.json"
    done = command("tests/chaos/run.py", "--programs", "pretrain", "--times", "1", "--out", str(out))
    assert done.stdout.count("1/1") == 3
    results = json.loads(out.read_text())
    assert all(results[fault]["tried"] == results[fault]["survived"] == 1 for fault in ("kill", "term", "disk"))
