"""Wall-clock and CPU time of callables, by `torch.utils.benchmark`."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.benchmark import Timer

Work = Callable[[], Any]


def interleaved_seconds(
    works: Sequence[Work],
    *,
    repeats: int,
    min_run_time: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Return the seconds per call of each callable, measured in turn (A B A B ...).

    Taking turns makes a temporary slowdown of the machine affect all of them alike. Every measurement is preceded by
    warm-up calls.

    Args:
        works: callables without arguments.
        repeats: measurements of each callable; the median counts.
        min_run_time: minimum duration of one measurement, in seconds. Its mean counts, so that what happens only
            every few calls is included.
        clock: `time.process_time` for CPU time, on a machine that other programs use.

    Returns:
        Seconds per call, one number for each callable.
    """
    timers = [
        Timer("work()", globals={"work": work}, timer=clock, num_threads=torch.get_num_threads()) for work in works
    ]
    rounds = [[timer.blocked_autorange(min_run_time=min_run_time).mean for timer in timers] for _ in range(repeats)]
    return [statistics.median(seconds) for seconds in zip(*rounds, strict=True)]
