"""How fast this machine is just now, and waits whose bounds follow that.

Bounds of tests are written for a quiet machine of two cores. Each process of a run measures at its start, and again
before each VM test, how much longer a fixed piece of work takes here, and a small file on its way to the disk: slow and
busy are the same to it. Bounds are multiplied by the larger of the two, and are never endless. What a test counts or
compares does not change.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vmbus.errors import WaitTimeout
from vmbus.util.patience import factor

PIECE = 20_000
"""Turns of the loop that is measured."""
USUAL = 0.00075
"""Seconds that these take where nothing else runs, on a machine that needs a third of each bound at most."""
FILE_BYTES = 1 << 20
USUAL_FILE = 0.1
"""Seconds for as many bytes, on the disk. VMs that are saved write some hundred times as much."""
LARGEST = 6.0
"""Beyond that no wait is longer: one test that hangs on a slow machine must not take all the time of a run."""


def _work() -> int:
    found = 0
    for turn in range(PIECE):
        found = (found * 31 + turn) & 0xFFFF
    return found


def measure(seconds: float) -> float:
    """How many times longer than usual the work takes; looked at for about so many seconds, busy or not."""
    begun = now = time.perf_counter()
    pieces = 0
    while now - begun < seconds:
        _work()
        pieces += 1
        now = time.perf_counter()
    return (now - begun) / pieces / USUAL


def measure_disk() -> float:
    """How many times longer than usual a small file takes to be on the disk; less than 1 on most. 1 if it cannot be."""
    try:
        with tempfile.TemporaryFile() as file:
            begun = time.perf_counter()
            file.write(bytes(FILE_BYTES))
            file.flush()
            os.fsync(file.fileno())
            return (time.perf_counter() - begun) / USUAL_FILE
    except OSError:
        return 1.0


class Pace:
    """What a process of a test run knows of the machine. `factor`: 1 to `LARGEST`. `fullest`: of all waits since
    `begin` the one that used most of its bound: which share, and in words."""

    def __init__(self) -> None:
        # In a process that a test has started: what the test has.
        self.factor = self.at_start = factor()
        self.fullest: tuple[float, str] = (0.0, "")

    def start(self) -> None:
        """Measures, at the start of a run."""
        self.factor = self.at_start = min(max(measure(0.2), measure_disk(), 1.0), LARGEST)

    def look(self) -> None:
        """Measures again, cheaply: never less than at the start, since a busy machine is idle at times."""
        self.factor = min(max(measure(0.03), measure_disk(), self.at_start), LARGEST)

    def begin(self) -> None:
        self.fullest = (0.0, "")

    def used(self, what: str, took: float, bound: float) -> None:
        if took / bound > self.fullest[0]:
            self.fullest = (took / bound, f"{took:.1f} of {bound:.0f} s for {what}")


PACE = Pace()


def seconds(usual: float) -> float:
    """A bound of so many seconds on a usual machine, for this one."""
    return usual * PACE.factor


@contextmanager
def bounded(usual: float, what: str) -> Iterator[float]:
    """Notes how much of the bound, which is given, what is done inside takes. Whoever is inside keeps to it."""
    bound = seconds(usual)
    begun = time.monotonic()
    try:
        yield bound
    finally:
        PACE.used(what, time.monotonic() - begun, bound)


def until(condition: Callable[[], Any], what: str, usual: float = 20.0, *, every: float = 0.005) -> None:
    """Waits until `condition` is true. Raises WaitTimeout."""
    with bounded(usual, what) as bound:
        deadline = time.monotonic() + bound
        while not condition():
            if time.monotonic() > deadline:
                raise WaitTimeout(what, bound)
            time.sleep(every)


async def eventually(condition: Callable[[], Any], what: str, usual: float = 20.0, *, every: float = 0.02) -> None:
    """As `until`, for a condition that may be a coroutine function, with the event loop running meanwhile."""
    with bounded(usual, what) as bound:
        deadline = time.monotonic() + bound
        while True:
            found = condition()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return
            if time.monotonic() > deadline:
                raise WaitTimeout(what, bound)
            await asyncio.sleep(every)
