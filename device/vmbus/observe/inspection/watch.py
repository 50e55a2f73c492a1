"""Looking at a running device server again and again, and noticing when it is another one.

A VM ends, is started again, migrates away and comes back: a watch goes on through all of it, and says what happened.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import msgspec

from vmbus.errors import EnvironmentProblem, VmbusError, WaitTimeout
from vmbus.observe.inspection.document import Inspection
from vmbus.observe.inspection.target import Running


class View(msgspec.Struct, kw_only=True):
    """One look; as JSON a line of `inspect --watch --json`.

    Attributes:
        at: when, by the wall clock.
        notices: what has happened since the last look, in sentences.
        problem: why there is nothing to be seen.
        rates: what the counters of each channel did in a second, since the last look at the same server.
        document: what was seen; None while there is no server, or it does not answer.
    """

    at: float = msgspec.field(default_factory=time.time)
    notices: list[str]
    problem: str = ""
    rates: dict[str, dict[str, float]] = {}
    document: Inspection | None = msgspec.field(default=None, name="inspection")


def rates(before: Inspection, after: Inspection, seconds: float) -> dict[str, dict[str, float]]:
    """By channel and counter, per second; only what moved. A counter that fell belongs to a channel made anew."""
    found: dict[str, dict[str, float]] = {}
    earlier = {channel.name: channel.counters for channel in before.channels}
    for channel in after.channels:
        counters = earlier.get(channel.name)
        if not counters or not channel.counters or seconds <= 0:
            continue
        moved = {
            name: (value - counters[name]) / seconds
            for name, value in channel.counters.items()
            if value > counters.get(name, value)
        }
        if moved:
            found[channel.name] = moved
    return found


class Watch:
    """Looks at one VM's device server."""

    def __init__(self, running: Running, *, packets: int, channels: Sequence[str] | None = None) -> None:
        self._running = running
        self._packets = packets
        self._channels = channels
        self._last: tuple[Inspection, float] | None = None
        self._lost = ""

    async def view(self) -> View:
        """One look. Raises only what cannot get better by itself: a server of another version."""
        try:
            document = await self._running.look(self._packets, self._channels)
        except (EnvironmentProblem, WaitTimeout) as error:
            return self._nothing(error)
        now = time.monotonic()
        notices = self._compare(document)
        moved = {}
        if self._last is not None and not notices:
            moved = rates(self._last[0], document, now - self._last[1])
        self._last = (document, now)
        self._lost = ""
        return View(document=document, notices=notices, rates=moved)

    def _nothing(self, error: VmbusError) -> View:
        if isinstance(error, WaitTimeout):
            problem = f"the device server of {self._running.name!r} does not answer: {error}"
        elif self._last is None:
            problem = f"{self._running.name!r} is not running; waiting for it"
        else:
            problem = f"{self._running.name!r} has ended; waiting for it to come back"
        notices = [problem] if problem != self._lost else []
        self._lost = problem
        return View(notices=notices, problem=problem)

    def _compare(self, document: Inspection) -> list[str]:
        """What has happened since the last look."""
        if self._last is None:
            return []
        before, after = self._last[0].server, document.server
        assert before is not None and after is not None
        name = self._running.name
        if before.pid != after.pid:
            return [f"{name!r} was started again: its device server is process {after.pid}, was {before.pid}"]
        if self._lost:
            return [f"{name!r} answers again"]
        notices = []
        if before.phase != after.phase:
            notices.append(f"the device is {after.phase}, was {before.phase}")
        if before.life != after.life:
            notices.append("the device was given a saved state")
        elif before.resets != after.resets:
            notices.append("the device was reset")
        return notices

    async def views(self, seconds: float, count: int | None = None) -> AsyncIterator[View]:
        """A look every `seconds`, `count` of them (None: without end). A look that takes longer delays the next."""
        due = time.monotonic()
        number = 0
        while count is None or number < count:
            yield await self.view()
            number += 1
            if number == count:
                return
            due = max(due + seconds, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
