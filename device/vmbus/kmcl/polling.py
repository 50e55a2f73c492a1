"""Looking on for a little while before a channel goes idle: who finds the next packet that way needs no signal for it.

A signal costs the guest a way out of its processor, and us a wake-up; but to look on costs processor time, too, and is
in vain when nothing comes. So it is done only while packets come soon after each other, as they have lately: on average
within half of the time that it may take at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

MOST_SECONDS = 0.001
"""That may be looked on at a time: nothing else is done meanwhile."""
_NEW = 0.25  # the weight of the last gap in the average


class Source(Protocol):
    """The reading end of a ring."""

    def available(self) -> int:
        """Bytes that wait."""


def _let_others() -> None:
    time.sleep(0)  # other threads may want the interpreter, and other processes the processor


class Polling:
    """Of one channel. `seconds`: to look on at most, each time.

    Attributes:
        found, in_vain: how often a packet came while it was looked on, and how often none did.
    """

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[], None] = _let_others,
    ) -> None:
        self.seconds = seconds
        self._clock = clock
        self._pause = pause
        self._gap = 0.0  # from the end of one turn's packets to the next packet, on average
        self._since: float | None = None  # when everything was done last
        self._received = 0
        self.found = 0
        self.in_vain = 0

    def comes(self, source: Source, received: int, turn_began: float) -> bool:
        """Everything is done, `received` packets in all, in a turn that began at `turn_began`: whether another one came
        while it was looked on. Raises what `source.available` raises."""
        if received == self._received:
            return False  # nothing was there
        self._received = received
        if self._since is not None:
            self._learn(turn_began - self._since)
            self._since = None
        now = began = self._clock()
        if self._gap <= self.seconds / 2:
            until = began + self.seconds
            while now < until:
                if source.available():
                    self._learn(now - began)
                    self.found += 1
                    return True
                self._pause()
                now = self._clock()
            self.in_vain += 1
        self._since = began
        return False

    def _learn(self, gap: float) -> None:
        self._gap += _NEW * (min(gap, 4 * self.seconds) - self._gap)
