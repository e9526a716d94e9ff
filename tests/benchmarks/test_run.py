"""benchmarks.run works, at tiny sizes, and its results make a table and a figure."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import cases, memory, run, tables, timing
from dprl.utils.files import read_json
from tests.helpers.small import ROOT

KEYS = {"name", "unit", "dprl", "textbook", "ratio", "reference", "against", "gigaflops"}


def bench(tmp_path, *arguments: str) -> list[dict]:
    out = tmp_path / "bench.json"
    flags = ["--tiny", "--repeats", "1", "--min-run-time", "0.001", "--threads", "1", "--out", out]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", *flags, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
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
    flags = ["--tiny", "--only", "1 observation (256", "--out", str(tmp_path / "bench.json")]
    monkeypatch.setattr(sys, "argv", ["run", *flags])
    monkeypatch.setattr(os, "environ", dict(os.environ))  # main sets the number of threads there
    row = dict(unit="ms", dprl=1.0, textbook=2.0, ratio=2.0, reference=None, against=None, gigaflops=100.0)

    def measure(case, options):
        assert not case.name.startswith("guided"), "fails"
        return row | {"name": case.name}

    monkeypatch.setattr(run, "measure", measure)
    with pytest.raises(AssertionError, match="fails"):
        run.main()
    assert [row["name"].split()[0] for row in read_json(tmp_path / "bench.partial")["rows"]] == ["sampling", "ranking"]
    assert not (tmp_path / "bench.json").exists()


def test_rows_that_do_not_exist_are_an_error(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", "--only", "no such row"])
    with pytest.raises(SystemExit):
        run.main()


@pytest.mark.slow
def test_every_row_runs(tmp_path):
    rows = bench(tmp_path)
    assert [row["name"] for row in rows] == [case.name for case in cases.cases(tiny=True)]
    assert all(row["dprl"] > 0 for row in rows)
    one_sided = {row["name"] for row in rows if row["textbook"] is None}
    assert one_sided == {case.name for case in cases.cases(tiny=True) if case.kind == "command"}
    assert not any(row["reference"] for row in rows)


def test_names_are_unique_and_costs_are_against_rows_that_exist():
    all_cases = cases.cases()
    names = [case.name for case in all_cases]
    assert len(set(names)) == len(names)
    assert {case.against for case in all_cases} - {None} <= set(names)
    envpool = importlib.util.find_spec("envpool") is not None
    counts = [len([case for case in all_cases if threads in case.reference]) for threads in (1, 2)]
    assert counts == [10, 12 + envpool]
    assert [case.name for case in cases.cases(precisions=["fp32"])] == [name for name in names if "bf16" not in name]


def test_timing_takes_turns_and_keeps_the_number_of_threads():
    threads = []

    def work() -> None:
        threads.append(torch.get_num_threads())
        time.sleep(0.002)

    seconds = timing.interleaved_seconds([work, lambda: time.sleep(0.01)], repeats=3, min_run_time=0.01)
    assert 0.002 <= seconds[0] < 0.01 <= seconds[1] < 0.05
    assert set(threads) == {torch.get_num_threads()}
    (busy,) = timing.interleaved_seconds([work], repeats=1, min_run_time=0.001, clock=time.process_time)
    assert busy < 0.002


def test_ratios_and_the_figure(tmp_path):
    row = dict(name="work", unit="ms", dprl=2.0, textbook=10.0, ratio=5.0, reference=None, against=None)
    result = dict(rows=[row, row | dict(name="others", unit="steps/s", textbook=None, reference=1.0)])
    assert [tables.better(row, "textbook") for row in result["rows"]] == [5.0, None]
    assert tables.better(result["rows"][1], "reference") == 2.0
    path = tmp_path / "figure.svg"
    assert not tables.current(path, result)
    tables.draw(path, result)
    assert tables.current(path, result)
    assert not tables.current(path, dict(rows=[row]))
    first = path.read_bytes()
    tables.draw(path, result)
    assert path.read_bytes() == first


CHILDREN = """
import os, time
shared = b"x" * {before}
for _ in range({children}):
    if not os.fork():
        private = b"x" * int({after})
        time.sleep(1)
        os._exit(0)
time.sleep(1)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="requires Linux")
def test_memory_counts_children_and_shared_pages_once():
    def peak(**settings: int) -> float:
        return memory.peak_megabytes([sys.executable, "-c", CHILDREN.format(**settings)])

    assert 40 < peak(children=0, before=40_000_000, after=0) < 60
    assert 40 < peak(children=3, before=40_000_000, after=0) < 80
    assert 160 < peak(children=3, before=40_000_000, after=40_000_000) < 200
