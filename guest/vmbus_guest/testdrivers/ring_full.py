"""Test driver `ring-full`: far more requests outstanding than the rings of a channel of the lab hold, both ways, and
pauses in which the guest reads nothing, so that packets and answers queue at both ends.

Parameters, besides those of `echo`:

    pause_every    answers between two pauses; 0: no pauses
    pause_seconds  how long one lasts
    push           packets that the host is asked to send before each pause
    push_size      bytes of data in one of them
"""

from __future__ import annotations

from typing import Any

from vmbus.wire.lab import LAB_TYPE, MAXIMUM_PUSH_SIZE
from vmbus_guest.channel_driver import ChannelDriver
from vmbus_guest.testdrivers.context import Parameters
from vmbus_guest.testdrivers.echo import EchoDefaults, EchoWorkload
from vmbus_guest.testdrivers.requests import ECHO, Pushes


class RingFullWorkload(EchoWorkload):
    """See the module's text."""

    name = "ring-full"
    interface_type = LAB_TYPE
    provider = "lab"
    defaults = EchoDefaults(window=200, size=700, minimum_size=1)
    default_pages = 1
    head = ECHO

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._pause_every = parameters.get("pause_every", 200, minimum=0)
        self._pause_seconds = parameters.get("pause_seconds", 0.02, minimum=0, maximum=10)
        self._push = parameters.get("push", 32, minimum=0, maximum=1024)
        self._push_size = parameters.get("push_size", 500, minimum=1, maximum=MAXIMUM_PUSH_SIZE)
        self.pushes = Pushes(self.moved)
        self.pauses = 0
        self._paused_until: float | None = None
        self._paused_at = 0

    def prepare(self) -> None:
        """Take what the host pushes."""
        self.channel.set_process_packet_callbacks(self.pushes.process)

    def tick(self, now: float) -> float:
        """Pause when it is time, and go on."""
        if self._paused_until is not None:
            if now < self._paused_until:
                return self._paused_until
            self._paused_until = None
            self.channel.start()
            self.moved()
        completed = self.tally.completed
        if self._pause_every and completed - self._paused_at >= self._pause_every and not self._no_more():
            self._paused_at = completed
            self.pauses += 1
            if self._push:
                self.pushes.ask(self.channel, self._push, self._push_size)
            self.channel.begin_pause()
            self._paused_until = now + self._pause_seconds
            return self._paused_until
        return super().tick(now)

    def trouble_now(self, now: float, driver: ChannelDriver) -> str | None:
        """A pause of ours is none."""
        return None if self._paused_until is not None else super().trouble_now(now, driver)

    def clock_jumped(self, seconds: float) -> None:
        """So has the end of a pause."""
        super().clock_jumped(seconds)
        if self._paused_until is not None:
            self._paused_until += seconds

    def finished(self) -> bool:
        """All answered, in both directions."""
        return self._paused_until is None and self.pushes.complete and super().finished()

    def result(self) -> dict[str, Any]:
        """The final counts; `queued` had to wait for room in the ring."""
        queued = self.channel.counters["queued"]
        pushed = self.pushes.tally.completed
        return {**super().result(), "pushed": pushed, "pauses": self.pauses, "queued": queued}

    def good(self) -> bool:
        """As `echo`, for both directions."""
        pushes = self.pushes
        return super().good() and pushes.tally.good and pushes.tally.completed == pushes.asked


WORKLOAD = RingFullWorkload
