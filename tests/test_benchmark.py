"""scripts/benchmark.py runs, at sizes that tell nothing, and what it writes makes a table and a figure."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import bench_memory
import bench_rows
import bench_table
import benchmark

from dprl.files import read_json

KEYS = {"name", "unit", "dprl", "textbook", "ratio", "reference", "against", "gigaflops"}


def bench(tmp_path, *arguments: str) -> list[dict]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "scripts/benchmark.py", "--tiny", "--repeats", "1", "--least", "0.001", "--threads", "1", *arguments]
    out = tmp_path / "bench.json"
    done = subprocess.run([*command, "--out", out], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    result = read_json(out)
    assert {"processor", "cores", "threads", "memory"} <= set(result["machine"])
    assert "diffusers" in result["versions"]
    assert all(row["name"] in done.stdout for row in result["rows"])
    assert not list(tmp_path.glob("*.partial"))
    return result["rows"]


def test_a_row_of_both_sides(tmp_path):
    rows = bench(tmp_path, "--only", "1 observation (256")
    assert [row["name"].split()[0] for row in rows] == ["sampling", "ranking", "guided"]
    for row in rows:
        assert set(row) == KEYS and row["ratio"] == pytest.approx(row["textbook"] / row["dprl"])
    assert {row["against"] for row in rows} == {None, rows[0]["name"]}


def test_a_row_that_fails_loses_no_other(tmp_path, monkeypatch):
    given = ["--tiny", "--only", "1 observation (256", "--out", str(tmp_path / "bench.json")]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *given])
    monkeypatch.setattr(os, "environ", dict(os.environ))  # it says there how many threads
    row = dict(unit="ms", dprl=1.0, textbook=2.0, ratio=2.0, reference=None, against=None, gigaflops=100.0)

    def measured(asked, options):
        assert not asked.name.startswith("guided"), "fails"
        return row | {"name": asked.name}

    monkeypatch.setattr(benchmark, "measured", measured)
    with pytest.raises(AssertionError, match="fails"):
        benchmark.main()
    assert [row["name"].split()[0] for row in read_json(tmp_path / "bench.partial")["rows"]] == ["sampling", "ranking"]
    assert not (tmp_path / "bench.json").exists()
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--only", "no such row"])
    with pytest.raises(SystemExit):
        benchmark.main()


@pytest.mark.slow
def test_every_row_runs(tmp_path):
    rows = bench(tmp_path)
    assert [row["name"] for row in rows] == [row.name for row in bench_rows.rows(tiny=True)]
    assert all(row["dprl"] > 0 for row in rows)
    alone = {row["name"] for row in rows if row["textbook"] is None}
    assert alone == {row.name for row in bench_rows.rows(tiny=True) if row.kind == "command"}
    assert not any(row["reference"] for row in rows)


def test_names_are_unique_and_costs_are_against_rows_that_exist():
    rows = bench_rows.rows()
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert {row.against for row in rows} - {None} <= set(names)
    pool = importlib.util.find_spec("envpool") is not None
    assert [len([row for row in rows if threads in row.reference]) for threads in (1, 2)] == [10, 12 + pool]
    assert [row.name for row in bench_rows.rows(precisions=["fp32"])] == [name for name in names if "bf16" not in name]


def test_ratios_and_the_figure(tmp_path):
    row = dict(name="work", unit="ms", dprl=2.0, textbook=10.0, ratio=5.0, reference=None, against=None)
    result = dict(rows=[row, row | dict(name="others", unit="steps/s", textbook=None, reference=1.0)])
    assert [bench_table.better(row, "textbook") for row in result["rows"]] == [5.0, None]
    assert bench_table.better(result["rows"][1], "reference") == 2.0
    path = tmp_path / "figure.svg"
    assert not bench_table.current(path, result)
    bench_table.draw(path, result)
    assert bench_table.current(path, result)
    assert not bench_table.current(path, dict(rows=[row]))
    first = path.read_bytes()
    bench_table.draw(path, result)
    assert path.read_bytes() == first


CHILDREN = """
import os, time
held = b"x" * {before}
for _ in range({children}):
    if not os.fork():
        own = b"x" * int({after})
        time.sleep(1)
        os._exit(0)
time.sleep(1)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="wants Linux")
def test_memory_counts_children_and_what_they_share_once():
    def peak(**how: int) -> float:
        return bench_memory.peak_megabytes([sys.executable, "-c", CHILDREN.format(**how)])

    assert 40 < peak(children=0, before=40_000_000, after=0) < 60
    assert 40 < peak(children=3, before=40_000_000, after=0) < 80
    assert 160 < peak(children=3, before=40_000_000, after=40_000_000) < 200
