"""Time by part of a run."""

import json
import time

import pytest
import torch

from dprl.training.report import profile_table
from dprl.utils.errors import UserError
from dprl.utils.timer import NullTimer, Timer, make_timer, timed, traced

CPU = torch.device("cpu")


def test_a_nested_part_does_not_count_for_the_outer_one():
    timer = Timer(CPU)
    start = time.perf_counter()
    with timer("outer"):
        time.sleep(0.02)
        with timer("inner"):
            time.sleep(0.05)
    time.sleep(0.01)
    seconds = timer.report()
    assert abs(sum(seconds.values()) - (time.perf_counter() - start)) < 0.01
    assert list(seconds) == ["inner", "outer", "other"]
    assert 0.05 <= seconds["inner"] < 0.09
    assert 0.02 <= seconds["outer"] < 0.05
    assert "inner" in profile_table(seconds)


def test_a_part_that_fails_is_closed():
    timer = Timer(CPU)
    with pytest.raises(ValueError, match="no"), timer("part"):
        raise ValueError("no")
    assert timer.parts == ["other"]


def test_items_are_timed_and_one_is_traced(tmp_path):
    def items():
        for i in range(3):
            time.sleep(0.02)
            torch.ones(3) @ torch.ones(3)
            yield i

    timer = Timer(CPU)
    got = []
    for item in timed(items(), timer, "update", tmp_path / "trace.json"):
        got.append(item)
        time.sleep(0.01)
    assert got == [0, 1, 2]
    assert timer.report()["update"] >= 0.06
    assert timer.report()["other"] >= 0.03
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert "aten::dot" in names
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_profile_selects_the_timer():
    assert isinstance(make_timer(True, CPU), Timer)
    assert isinstance(make_timer(False, CPU), NullTimer)
    with NullTimer()("anything"):
        pass
    assert NullTimer().report() == {}
    with pytest.raises(UserError, match="null, true or trace"):
        make_timer("yes", CPU)


def test_a_trace_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="no"), traced(tmp_path / "trace.json"):
        raise ValueError("no")
    assert not list(tmp_path.iterdir())
