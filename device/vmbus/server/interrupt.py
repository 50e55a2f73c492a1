"""A bound for code of providers that the event loop has to wait for.

A callback that hangs would hold up the event loop, and with it the control socket: nobody could tell the server to go
on. The bound interrupts it, wherever it hangs in Python code or in a system call, as Ctrl-C would. It cannot interrupt
what hangs inside of native code, and it works on the main thread only, where signals arrive.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from vmbus.errors import WaitTimeout

_CALLS = 4  # that the error names
_AGAIN = 1.0  # seconds after which code that went on all the same is interrupted once more


class _Interrupted(BaseException):
    """Not an Exception, so that a callback that catches those does not catch this one."""


def _where(frame: FrameType | None) -> str:
    """The innermost calls, the last one first."""
    calls: list[str] = []
    while frame is not None and len(calls) < _CALLS:
        calls.append(f"{frame.f_code.co_qualname} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})")
        frame = frame.f_back
    return ", called by ".join(calls) or "code that cannot be named"


@contextlib.contextmanager
def bounded(seconds: float, what: str, left: float | None = None) -> Iterator[None]:
    """Interrupts the block after `seconds` with WaitTimeout, which says `what` was waited for and where it hung.

    `left`: seconds that are left of them, if earlier blocks have taken the others.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    place = ""
    armed = True

    def strike(_: int, frame: FrameType | None) -> None:
        nonlocal place
        if armed:
            place = place or _where(frame)
            raise _Interrupted

    before = signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, max(seconds if left is None else left, 0.001), _AGAIN)
    try:
        try:
            yield
        finally:
            armed = False
    except _Interrupted:
        pass
    finally:
        armed = False  # again: the blow may have fallen just before it was said above
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if place:
        raise WaitTimeout(f"{what}; it was interrupted in {place}", seconds)
