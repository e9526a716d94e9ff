"""benchmarks.precision measures the effect of bfloat16, and its results make tables."""

import json
import subprocess
import sys

import pytest

from benchmarks import tables
from tests.helpers.small import ENV


@pytest.mark.slow
def test_the_effect_of_bfloat16_is_measured(cloned):
    settings = [
        "num_envs=3",
        "algo.chunks=8",
        "algo.batch_size=12",
        "algo.actor.ft_denoising_steps=2",
        "algo.env_steps=1200",
    ]
    flags = ["--iterations", "1", "--repeats", "1", "--min-run-time", "0.001", "--out", "precision.json"]
    for more in ([], ["--seeds", "1"]):
        command = [sys.executable, "-m", "benchmarks.precision", "runs/avoid-bc-0"]
        subprocess.run([*command, *more, *flags, "--settings", *settings], cwd=cloned, env=ENV, check=True)
    result = json.loads((cloned / "precision.json").read_text())
    entry = result["tasks"]["avoid"]
    assert entry["ratios"]["both"]["rms"] < 1e-5 < entry["ratios"]["scored"]["rms"]
    assert 0.9 < entry["cosines"]["policy"] < 1
    assert [run["precision"] for run in entry["learning"]] == ["fp32", "bf16"]
    filled = tables.precision_tables(result)
    assert all("avoid" in filled[marker] for marker in ("ratios", "gradients", "times", "learning"))


def test_the_table_of_compilation_shows_when_it_pays():
    row = dict(policy="MLP", precision="fp32", compiling=8.0, plain=0.004, compiled=0.002)
    assert "| 4,000 " in tables.compiling({"compile": [row]})
    assert "never" in tables.compiling({"compile": [row | {"compiled": 0.005}]})
    assert tables.precision_tables({"tasks": {}, "compile": [row]})["compiling"] == tables.compiling({"compile": [row]})
