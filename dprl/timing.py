"""How long something takes."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def median_seconds(work: Callable[[], Any], *, repeats: int, least: float) -> float:
    """The median of ``repeats`` timings of a call, each of at least ``least`` seconds of calls, after two to warm up."""
    work()
    start = time.perf_counter()
    work()
    calls = max(1, round(least / (time.perf_counter() - start)))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        seconds.append((time.perf_counter() - start) / calls)
    return statistics.median(seconds)
