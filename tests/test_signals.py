"""What signals do to a run, in this process."""

import os
import signal

import pytest

from dprl import signals


def send(*names: str) -> None:
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", signals.NAMES)
def test_the_first_waits_for_a_safe_point_while_a_run_trains(name, capfd):
    before = signal.getsignal(getattr(signal, name))
    with signals.caught():
        with pytest.raises(signals.Interrupted, match=name), signals.deferred():
            send(name, "SIGTERM")  # schedulers repeat themselves
        assert signals.asked()
        assert f"{name}: stopping at the next safe point" in capfd.readouterr().err
    assert signal.getsignal(getattr(signal, name)) is before
    assert not signals.asked()


def test_any_ends_a_run_at_once_elsewhere():
    with signals.caught():
        with pytest.raises(signals.Interrupted, match="SIGUSR1"):
            send("SIGUSR1")
        with pytest.raises(signals.Interrupted, match="SIGUSR1"), signals.deferred():  # if what was under way swallowed it
            raise AssertionError


def test_a_second_ctrl_c_does_not_wait():
    with signals.caught(), pytest.raises(KeyboardInterrupt) as ended, signals.deferred():
        send("SIGINT", "SIGINT")
    assert not isinstance(ended.value, signals.Interrupted)


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.caught(), signals.deferred():
            send("SIGINT")
            assert not signals.asked()
    finally:
        signal.signal(signal.SIGINT, before)
