"""How long something takes."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

Work = Callable[[], Any]
Clock = Callable[[], float]  # time.process_time: of one thread, on a machine that others use too


def median_seconds(work: Work, *, repeats: int, least: float) -> float:
    """The median of ``repeats`` timings of a call, each of at least ``least`` seconds of calls, after two to warm up."""
    return interleaved_seconds([work], repeats=repeats, least=least)[0]


def interleaved_seconds(works: Sequence[Work], *, repeats: int, least: float, clock: Clock = time.perf_counter) -> list[float]:
    """``median_seconds`` of each of ``works``, timed in turn, so that what slows the machine for a while slows them all."""
    calls = []
    for work in works:
        work()
        calls.append(max(1, round(least / seconds(work, 1, clock))))
    taken = [[seconds(work, count, clock) for work, count in zip(works, calls, strict=True)] for _ in range(repeats)]
    return [statistics.median(each) for each in zip(*taken, strict=True)]


def seconds(work: Work, calls: int, clock: Clock = time.perf_counter) -> float:
    """The mean of so many calls."""
    start = clock()
    for _ in range(calls):
        work()
    return (clock() - start) / calls
