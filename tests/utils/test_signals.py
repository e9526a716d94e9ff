"""The effect of signals on a run, in this process."""

import os
import signal

import pytest

from dprl.utils import signals


def send(*names: str) -> None:
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", signals.NAMES)
def test_the_first_waits_for_a_safe_point_while_a_run_trains(name, capfd):
    before = signal.getsignal(getattr(signal, name))
    with signals.caught():
        with pytest.raises(signals.Interrupted, match=name), signals.deferred():
            send(name, "SIGTERM")  # schedulers send it repeatedly
        assert signals.requested()
        assert f"{name}: stopping at the next safe point" in capfd.readouterr().err
    assert signal.getsignal(getattr(signal, name)) is before
    assert not signals.requested()


def test_any_signal_ends_a_run_at_once_elsewhere():
    with signals.caught():
        with pytest.raises(signals.Interrupted, match="SIGUSR1"):
            send("SIGUSR1")
        with pytest.raises(signals.Interrupted, match="SIGUSR1"), signals.deferred():  # if the exception was caught
            raise AssertionError


def test_a_second_ctrl_c_does_not_wait():
    with signals.caught(), pytest.raises(KeyboardInterrupt) as ended, signals.deferred():
        send("SIGINT", "SIGINT")
    assert not isinstance(ended.value, signals.Interrupted)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.caught(), signals.deferred():
            send("SIGINT")
            assert not signals.requested()
    finally:
        signal.signal(signal.SIGINT, before)
