"""Test driver `idle`: a channel of the lab that is open, and on which nothing happens, but for a sign of life now and
then.

Parameters:

    seconds   how long; 0: until stopped
    interval  seconds between two signs of life; 0: only one at the end
"""

from __future__ import annotations

from typing import Any

from vmbus.kmcl.status import Status as PacketStatus
from vmbus.wire.workload import Pattern, Sequence, Tally, echo_request
from vmbus_guest.channel_driver import ChannelDriver, SteadyClock
from vmbus_guest.testdrivers.context import Parameters
from vmbus_guest.testdrivers.requests import ECHO, LabWorkload, post, right_answer

_SIZE = 100
_PATTERN = Pattern(19)


class IdleWorkload(LabWorkload):
    """See the module's text."""

    name = "idle"
    default_pages = 1

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._seconds = parameters.get("seconds", 2.0, minimum=0)
        self._interval = parameters.get("interval", 0.5, minimum=0)
        self.tally = Tally()
        self._sequence = Sequence(self.tally)
        self._sent = 0
        self._waiting = False
        self._last = False
        self._next = self._interval

    def begin(self) -> None:
        self._clock = SteadyClock()

    def tick(self, now: float) -> float:
        """Nothing, most of the time."""
        elapsed = self._clock.elapsed()
        over = self._stopped or (self._seconds > 0 and elapsed >= self._seconds)
        if self._waiting:
            return super().tick(now)
        if over and not self._last:
            self._last = True
            self._sign_of_life()
        elif self._interval and elapsed >= self._next and not self._last:
            self._next = elapsed + self._interval
            self._sign_of_life()
        return now + max(0.0, self._next - elapsed) if self._interval else super().tick(now)

    def _sign_of_life(self) -> None:
        sequence = self._sent
        data = _PATTERN.data(sequence, _SIZE)
        self._sent += 1
        self.tally.started += 1
        self._waiting = True
        self.moved()

        def answered(status: int, reply: bytes) -> None:
            if status != PacketStatus.SUCCESS:
                return
            self._waiting = False
            self.tally.completed += 1
            self._sequence.arrived(sequence)
            if not right_answer(reply, sequence, data):
                self.tally.corrupted += 1

        post(self.channel, ECHO + echo_request(sequence, data, inline=True), answered)

    def trouble_now(self, now: float, driver: ChannelDriver) -> str | None:
        """Only what was asked can be late."""
        if not self._waiting:
            self.moved_at = now
        return super().trouble_now(now, driver)

    def finished(self) -> bool:
        """The last sign of life was answered."""
        return self._last and not self._waiting

    def counts(self) -> dict[str, Any]:
        return {"sent": self._sent, **self.tally.as_dict()}

    def result(self) -> dict[str, Any]:
        self.tally.lost += self._sent - self._sequence.next
        return self.counts()

    def good(self) -> bool:
        """Each sign of life was answered right."""
        return self.finished() and self.tally.good and self.tally.completed == self._sent > 0


WORKLOAD = IdleWorkload
