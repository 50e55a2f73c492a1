"""How long the turns of the event loop are: while one lasts, neither the guest nor a tool is answered.

A turn is one call that the loop makes: requests of the transport, the turns of channels, a timer, a call for a
descriptor or for work that has ended, one step of a command. It is measured where it begins, not for each packet.
A call that waits (`DeviceServer.wait`) counts with all that is done inside of it.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")

RECENT = 60.0
"""Seconds that count as lately."""
_PIECE = 5.0  # seconds of which only the longest turn is remembered; so lately is up to so much longer


class Turn(NamedTuple):
    """One turn: how long it was, in seconds, and what was done."""

    seconds: float
    what: str


_NONE = Turn(0.0, "")


class Turns:
    """The longest turns of one event loop. `clock` gives seconds and never goes backwards."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._longest = _NONE
        self._recent: deque[tuple[float, Turn]] = deque()  # (end of its piece, the longest in it), oldest first
        self._piece_ends = float("-inf")
        self._to_beat = 0.0  # in this piece

    def run(self, what: str, call: Callable[[], T]) -> T:
        """Make the call: it is a turn, or a part of one that can be named better. Raises what it raises."""
        began = self._clock()
        try:
            return call()
        finally:
            self.note(what, began)

    def note(self, what: str, began: float) -> None:
        """What began at `began`, by our clock, has ended just now."""
        now = self._clock()
        seconds = now - began
        if seconds <= self._to_beat and now < self._piece_ends:
            return
        turn = Turn(seconds, what)
        if now >= self._piece_ends:
            self._piece_ends = now + _PIECE
            self._forget(now)
            self._recent.append((self._piece_ends, turn))
        else:
            self._recent[-1] = (self._piece_ends, turn)
        self._to_beat = seconds
        if seconds > self._longest.seconds:
            self._longest = turn

    async def steps(self, what: str, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, each of whose steps, from one wait to the next, is a turn."""
        return await _Steps(self, what, work)

    def summary(self) -> dict[str, Any]:
        """The longest turn since the start, and lately: `seconds` and `what` of each; 0 and "" if there was none."""
        self._forget(self._clock())
        recent = max((turn for _, turn in self._recent), default=_NONE)
        return {**self._longest._asdict(), "last_minute": recent._asdict()}

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0][0] <= now - RECENT:
            self._recent.popleft()


class _Steps(Generic[T]):
    def __init__(self, turns: Turns, what: str, work: Coroutine[Any, Any, T]) -> None:
        self._turns = turns
        self._what = what
        self._work = work

    def __await__(self) -> Generator[Any, Any, T]:
        step: Callable[[], Any] = functools.partial(self._work.send, None)
        while True:
            try:
                waits_for = self._turns.run(self._what, step)
            except StopIteration as end:
                result: T = end.value
                return result
            try:
                yield waits_for
            except BaseException as error:  # such as a cancellation: the work's to deal with
                step = functools.partial(self._work.throw, error)
            else:
                step = functools.partial(self._work.send, None)
