"""Where a run's time went."""

import json
import time

import pytest
import torch

from dprl.errors import UserError
from dprl.profile import Clock, NoClock, clock, timed, traced
from dprl.report import parts

CPU = torch.device("cpu")


def test_a_part_inside_another_is_taken_out_of_it():
    spent = Clock(CPU)
    begun = time.perf_counter()
    with spent("outer"):
        time.sleep(0.02)
        with spent("inner"):
            time.sleep(0.05)
    time.sleep(0.01)
    told = spent.told()
    assert abs(sum(told.values()) - (time.perf_counter() - begun)) < 0.01
    assert list(told) == ["inner", "outer", "other"]
    assert 0.05 <= told["inner"] < 0.09
    assert 0.02 <= told["outer"] < 0.05
    assert "inner" in parts(told)


def test_a_part_that_fails_is_left():
    spent = Clock(CPU)
    with pytest.raises(ValueError, match="no"), spent("part"):
        raise ValueError("no")
    assert spent.inside == ["other"]


def test_items_are_timed_and_one_is_traced(tmp_path):
    def items():
        for i in range(3):
            time.sleep(0.02)
            torch.ones(3) @ torch.ones(3)
            yield i

    spent = Clock(CPU)
    got = []
    for item in timed(items(), spent, "update", tmp_path / "trace.json"):
        got.append(item)
        time.sleep(0.01)
    assert got == [0, 1, 2]
    assert spent.told()["update"] >= 0.06
    assert spent.told()["other"] >= 0.03
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert "aten::dot" in names
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_what_profile_asks_for():
    assert isinstance(clock(True, CPU), Clock)
    assert isinstance(clock(False, CPU), NoClock)
    with NoClock()("anything"):
        pass
    assert NoClock().told() == {}
    with pytest.raises(UserError, match="null, true or trace"):
        clock("yes", CPU)


def test_a_trace_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="no"), traced(tmp_path / "trace.json"):
        raise ValueError("no")
    assert not list(tmp_path.iterdir())
