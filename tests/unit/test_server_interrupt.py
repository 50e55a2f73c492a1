"""Code of providers that hangs is interrupted, and what it returns too late does not count."""

from __future__ import annotations

import contextlib
import signal
import threading
import time

import pytest

from vmbus.errors import WaitTimeout
from vmbus.server.interrupt import bounded


def hang() -> None:
    threading.Event().wait()


def spin() -> None:
    while True:
        pass


@pytest.mark.parametrize("how", [hang, spin])
def test_what_hangs_is_interrupted_and_named(how: object) -> None:
    assert callable(how)
    before = signal.getsignal(signal.SIGALRM)
    with (
        pytest.raises(
            WaitTimeout, match=rf"waited 0.05 s in vain for a state; it was interrupted in .*{how.__name__} \(test"
        ),
        bounded(0.05, "a state"),
    ):
        how()
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_swallows_the_interruption_counts_as_hung_all_the_same() -> None:
    with pytest.raises(WaitTimeout), bounded(0.05, "a state"), contextlib.suppress(BaseException):
        hang()


def test_what_is_in_time_is_left_alone() -> None:
    with bounded(5.0, "a state"):
        time.sleep(0.01)
    with pytest.raises(ZeroDivisionError), bounded(5.0, "a state"):
        raise ZeroDivisionError
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_other_threads_are_not_bounded() -> None:
    done = []

    def work() -> None:
        with bounded(0.01, "a state"):
            time.sleep(0.05)
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(5)
    assert done == [True]
