"""Signals that end a run early: SIGTERM, SIGUSR1 (which schedulers send before they reclaim a machine) and Ctrl-C.

While a run trains (`deferred`), the first signal waits for the next safe point, which checks `requested()`. At any
other time a signal ends the run at once, because everything of value is on disk. A second Ctrl-C always ends it at
once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

STATUS = 75  # EX_TEMPFAIL of sysexits.h: no error, and the run can be resumed
NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")


class Interrupted(KeyboardInterrupt):
    """Raised when a signal ends the run. The message is the signal's name."""


class _State:
    requested_by: str | None = None  # name of the signal that requested the end of the run
    deferred = False


_state = _State()


def requested() -> str | None:
    """Return the name of the signal that has requested the end of the run, or None."""
    return _state.requested_by


def stop() -> None:
    """End the run if a signal has requested it; called at safe points.

    Raises:
        Interrupted: If a signal has requested the end of the run.
    """
    if _state.requested_by is not None:
        raise Interrupted(_state.requested_by)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Make the first signal inside the block wait for `stop`."""
    stop()
    _state.deferred = True
    try:
        yield
    finally:
        _state.deferred = False
    stop()


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Handle the signals inside the block.

    A signal that the process was started to ignore, as by `nohup`, stays ignored.
    """
    previous: dict[int, Any] = {}
    process, _state.requested_by = os.getpid(), None

    def handle(number: int, frame: Any) -> None:
        if os.getpid() != process:  # a forked worker that has not called `leave_to_parent` yet
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        repeated, name = _state.requested_by is not None, signal.Signals(number).name
        _state.requested_by = _state.requested_by or name
        if repeated and number == signal.SIGINT:
            raise KeyboardInterrupt
        if _state.deferred and not repeated:
            os.write(2, f"\n{name}: stopping at the next safe point (Ctrl-C again: at once)\n".encode())
        elif not repeated:
            raise Interrupted(name)

    if threading.current_thread() is threading.main_thread():
        for name in NAMES:
            number = getattr(signal, name, None)  # not every system has all of them
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _state.requested_by = None


def leave_to_parent() -> None:
    """Make a worker process ignore signals sent to the process group; the training process handles them."""
    for name in NAMES:
        number = getattr(signal, name, None)
        if number is not None:
            signal.signal(number, signal.SIG_DFL if name == "SIGTERM" else signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # SIGTERM still ends a worker, so it must not arrive with the group's
