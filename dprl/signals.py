"""What ends a run early: SIGTERM, SIGUSR1 (what schedulers send before they take a machine away) and Ctrl-C.

While a run trains (``deferred``) the first of them waits for a safe point, which asks ``asked()``. At any other time it ends
the run at once: all that counts is on disk then. A second Ctrl-C ends it at once wherever it is.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

STATUS = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same run can go on
NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; the message is its name."""


class _State:
    by: str | None = None  # the signal that asked the run to end
    deferred = False


_state = _State()


def asked() -> bool:
    """Whether a signal has asked the run to end."""
    return _state.by is not None


def stop() -> None:
    """Ends the run if a signal has asked for that; for safe points."""
    if _state.by is not None:
        raise Interrupted(_state.by)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, the first signal waits for ``stop``."""
    stop()
    _state.deferred = True
    try:
        yield
    finally:
        _state.deferred = False
    stop()


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Inside, the signals are caught; one that this process was started to ignore, as by ``nohup``, stays ignored."""
    before: dict[int, Any] = {}
    process, _state.by = os.getpid(), None

    def handle(number: int, frame: Any) -> None:
        if os.getpid() != process:  # a worker that has not said yet what it leaves to this process
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        repeated, name = _state.by is not None, signal.Signals(number).name
        _state.by = _state.by or name
        if repeated and number == signal.SIGINT:
            raise KeyboardInterrupt
        if _state.deferred and not repeated:
            os.write(2, f"\n{name}: stopping at the next safe point (Ctrl-C again: at once)\n".encode())
        elif not repeated:
            raise Interrupted(name)

    if threading.current_thread() is threading.main_thread():
        for name in NAMES:
            number = getattr(signal, name, None)  # not every system has each
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _state.by = None


def leave_to_parent() -> None:
    """For a worker process: what is sent to the whole group of processes is for the one that trains to answer."""
    for name in NAMES:
        number = getattr(signal, name, None)
        if number is not None:
            signal.signal(number, signal.SIG_DFL if name == "SIGTERM" else signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # SIGTERM stays the way to end a worker, so it must not come with the group's
