"""Calls that providers have asked for, now or later: kept by us, so that they can also run inside a blocking wait.

An event loop cannot be entered a second time from one of its callbacks. A provider that waits in a callback still
needs its own timers, and those of others: `run_due` runs them from wherever the waiting is done.
"""

import asyncio
import heapq
import itertools
from collections.abc import Callable

from vmbus.providers.faults import naming
from vmbus.server.turns import Turns
from vmbus.util.complaints import bounded_log

log = bounded_log(__name__)


Raised = Callable[[str, BaseException], None]

_FEW = 64  # entries of the heap that are not worth tidying


def _log(what: str, error: BaseException) -> None:
    log.error("%s raised", what, exc_info=error)


class TimerEntry:
    """A call that has been scheduled: implements `vmbus.providers.base.Timer`. `raised`: told when it raises."""

    __slots__ = ("_timers", "call", "raised", "when")

    def __init__(self, timers: "Timers", when: float, call: Callable[[], None], raised: Raised) -> None:
        self._timers = timers
        self.when = when
        self.call: Callable[[], None] | None = call
        self.raised = raised

    def cancel(self) -> None:
        """Do not call. Harmless afterwards."""
        if self.call is not None:
            self.call = None
            self._timers.cancelled()


class Timers:
    """Scheduled calls in the order of their times; equal times in the order of asking."""

    def __init__(self, loop: asyncio.AbstractEventLoop, turns: Turns | None = None) -> None:
        self._loop = loop
        self._turns = turns or Turns()
        self._heap: list[tuple[float, int, TimerEntry]] = []
        self._numbers = itertools.count()
        self._armed: asyncio.TimerHandle | None = None
        self._closed = False
        self._frozen = False
        self._cancelled = 0  # at most so many entries of the heap are

    @property
    def kept(self) -> int:
        """Entries that are kept, cancelled ones among them."""
        return len(self._heap)

    def cancelled(self) -> None:
        """One entry more was cancelled. They do not pile up: a guest may make a provider set one for each request."""
        self._cancelled += 1
        if self._cancelled > _FEW and 2 * self._cancelled > len(self._heap):
            self._heap = [one for one in self._heap if one[2].call is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def call_later(self, seconds: float, call: Callable[[], None], raised: Raised = _log) -> TimerEntry:
        """Call after `seconds`, 0 or more: not from inside this call. `raised` is told what the call raises."""
        entry = TimerEntry(self, self._loop.time() + max(seconds, 0.0), call, raised)
        if self._closed:
            return entry
        heapq.heappush(self._heap, (entry.when, next(self._numbers), entry))
        self._arm()
        return entry

    def next_in(self) -> float | None:
        """Seconds until the next call is due (0: one is), None when there is none, or all are frozen."""
        if self._frozen:
            return None
        while self._heap and self._heap[0][2].call is None:
            heapq.heappop(self._heap)
        return max(self._heap[0][0] - self._loop.time(), 0.0) if self._heap else None

    def run_due(self) -> bool:
        """Run what is due now, not what that asks for. Returns whether there was anything."""
        if self._frozen:
            return False
        now = self._loop.time()
        due: list[TimerEntry] = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap)[2])
        for entry in due:
            call, entry.call = entry.call, None
            if call is None:
                continue
            try:
                self._turns.run(f"timer {getattr(call, '__qualname__', type(call).__name__)}", call)
            except Exception as error:
                entry.raised(naming("a scheduled call", call), error)
        return bool(due)

    def freeze(self) -> None:
        """Nothing is called before `thaw`; what gets due meanwhile is called then."""
        self._frozen = True
        if self._armed is not None:
            self._armed.cancel()
            self._armed = None

    def thaw(self) -> None:
        """End `freeze`. Harmless without one."""
        self._frozen = False
        self._arm()

    def close(self) -> None:
        """Nothing is called any more, nor what is asked for later."""
        self._closed = True
        self._heap.clear()
        if self._armed is not None:
            self._armed.cancel()
            self._armed = None

    def _arm(self) -> None:
        if not self._heap or self._frozen:
            return
        when = self._heap[0][0]
        if self._armed is not None:
            if self._armed.when() <= when and not self._armed.cancelled():
                return
            self._armed.cancel()
        self._armed = self._loop.call_at(when, self._fire)

    def _fire(self) -> None:
        self._armed = None
        try:
            self.run_due()
        finally:
            self._arm()
