"""Time by part of a run.

`profile=true` reports it in `result.json` and on the terminal; `profile=trace` also writes a Chrome trace.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from dprl.utils.errors import UserError
from dprl.utils.files import replacing

Item = TypeVar("Item")

TRACED = 2  # number of the iteration that is traced; the first one warms up


class Timer:
    """Seconds by part of a run.

    The time of a nested part does not count for the part around it; time outside all parts is `other`.

    Args:
        device: The device of the run; a GPU is synchronized at the borders of parts.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.parts = ["other"]  # the nested parts that are open, the innermost last
        self.since = time.perf_counter()

    def _close_interval(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self.parts[-1]] = self.seconds.get(self.parts[-1], 0.0) + now - self.since
        self.since = now

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the time of the block as `part`."""
        self._close_interval()
        self.parts.append(part)
        try:
            yield
        finally:
            self._close_interval()
            self.parts.pop()

    def report(self) -> dict[str, float]:
        """Return the seconds of each part so far, the longest first."""
        self._close_interval()
        return dict(sorted(self.seconds.items(), key=lambda item: -item[1]))


class NullTimer:
    """The timer of a run that is not profiled. It measures nothing."""

    def __call__(self, part: str) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return nullcontext()

    def report(self) -> dict[str, float]:
        """Return an empty dictionary."""
        return {}


def make_timer(profile: Any, device: torch.device) -> Timer | NullTimer:
    """Return the timer of a run.

    Args:
        profile: The setting `profile`: null, false, true or `trace`.
        device: The device of the run.

    Raises:
        UserError: If `profile` has another value.
    """
    if profile not in (None, False, True, "trace"):
        raise UserError("unknown value of profile", expected="null, true or trace", got=profile, fix="profile=true")
    return Timer(device) if profile else NullTimer()


def timed(items: Iterator[Item], timer: Timer | NullTimer, part: str, trace: Path | None) -> Iterator[Item]:
    """Yield from `items`, counting the time that each takes as `part`.

    Args:
        items: The iterator to time.
        timer: The run's timer.
        part: Name of the part.
        trace: File for a Chrome trace of the second item, or None.
    """
    for number in itertools.count(1):
        with traced(trace) if trace and number == TRACED else nullcontext(), timer(part):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


@contextmanager
def traced(path: Path) -> Iterator[None]:
    """Write a Chrome trace (for chrome://tracing or Perfetto) of the block to `path`."""
    from torch.profiler import profile

    with profile() as recorded:  # of the CPU, and of CUDA if available
        yield
    with replacing(path) as temporary:
        recorded.export_chrome_trace(str(temporary))
    print(f"trace: {path}")
