"""What one request of a guest's makes necessary, and what may be too much for one turn of the event loop.

A guest can have 2,047 channels, and lose them all by one message. So such work is given here piece by piece: it is done
at once while the turn that it began in is short, and the rest, in order, in turns of its own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vmbus.util.pieces import TURN_SECONDS


class Backlog:
    """See the module's text. Outside of `turn`, or with `at_once`, everything is done at once."""

    def __init__(self, schedule: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> None:
        """`schedule`: have `run` called soon."""
        self._schedule = schedule
        self._clock = clock
        self.at_once = False
        self._until: float | None = None
        self._waiting: deque[Callable[[], None]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Requests of the guest's are handled inside."""
        if self._until is not None:
            yield
            return
        self._until = self._clock() + TURN_SECONDS
        try:
            yield
        finally:
            self._until = None

    def do(self, piece: Callable[[], None]) -> None:
        """Now, or after all that waits."""
        if not self._waiting and (self.at_once or self._until is None or self._clock() < self._until):
            piece()
            return
        if not self._waiting:
            self._schedule()
        self._waiting.append(piece)

    def run(self) -> None:
        """As much as fits into a turn: one of its own, also inside of another one, whose owner waits."""
        if not self._waiting:
            return
        before, self._until = self._until, self._clock() + TURN_SECONDS
        try:
            self._run(lambda: self._until is not None and self._clock() < self._until)
        finally:
            self._until = before

    def finish(self) -> None:
        self._run(lambda: True)

    def clear(self) -> None:
        """What waits is not needed any more."""
        self._waiting.clear()

    def _run(self, there_is_time: Callable[[], bool]) -> None:
        try:
            while self._waiting and there_is_time():
                self._waiting.popleft()()
        finally:
            if self._waiting:
                self._schedule()
