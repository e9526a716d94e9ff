"""Where a run's time went: ``profile=true`` tells it in ``result.json`` and on the terminal, ``profile=trace`` writes a Chrome
trace too."""

import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from dprl.errors import found
from dprl.files import replacing

Item = TypeVar("Item")

TRACED = 2  # the iteration, or the stretch between two lines of the log, that a trace is of; the first one warms up


class Clock:
    """Seconds by part of a run. A part inside another is taken out of it; what no part covers is ``other``."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.inside = ["other"]
        self.since = time.perf_counter()

    def _turn(self) -> None:
        if self.device.type == "cuda":  # what was asked for is not done yet
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self.inside[-1]] = self.seconds.get(self.inside[-1], 0.0) + now - self.since
        self.since = now

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._turn()
        self.inside.append(part)
        try:
            yield
        finally:
            self._turn()
            self.inside.pop()

    def told(self) -> dict[str, float]:
        """Seconds of every part so far, the longest first."""
        self._turn()
        return dict(sorted(self.seconds.items(), key=lambda item: -item[1]))


class NoClock:
    """What a run has that is not profiled."""

    def __call__(self, part: str) -> AbstractContextManager[None]:
        return nullcontext()

    def told(self) -> dict[str, float]:
        return {}


def clock(asked: Any, device: torch.device) -> Clock | NoClock:
    """What ``profile=`` asks for: null, true or trace."""
    if asked not in (None, False, True, "trace"):
        raise found("profile is no such thing", "null, true or trace", asked, "profile=true")
    return Clock(device) if asked else NoClock()


def timed(items: Iterator[Item], clock: Clock | NoClock, part: str, trace: Path | None) -> Iterator[Item]:
    """``items``, with the time that each takes to come counted as ``part``, and a trace of one of them."""
    for number in itertools.count(1):
        with traced(trace) if trace and number == TRACED else nullcontext(), clock(part):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


@contextmanager
def traced(path: Path) -> Iterator[None]:
    """Writes a Chrome trace (chrome://tracing, or Perfetto) of what happens inside."""
    from torch.profiler import profile

    with profile() as recorded:  # CPU, and CUDA where there is one
        yield
    with replacing(path) as temporary:
        recorded.export_chrome_trace(str(temporary))
    print(f"trace: {path}")
