"""Test driver `many`: many sub-channels of one station of the lab, all busy at once in both directions.

Parameters:

    channels  sub-channels, each with rings of its own
    count     requests on each of them; 0: until stopped
    window    requests outstanding on each
    size      most bytes of data in a request
    push      packets that the host sends at a time on each, and again when they are answered; 0: none
"""

from __future__ import annotations

from typing import Any

from vmbus.kmcl.client import ClientChannel
from vmbus.wire.lab import MAXIMUM_SUBCHANNELS, Op, Stats
from vmbus_guest.channel_driver import ChannelDriver
from vmbus_guest.testdrivers.context import Parameters
from vmbus_guest.testdrivers.requests import Books, LabWorkload, Pushes, Requests, host_books


class Line:
    def __init__(self, channel: ClientChannel, requests: Requests, pushes: Pushes) -> None:
        self.channel = channel
        self.requests = requests
        self.pushes = pushes
        self.host: Stats | None = None
        """The host's books, at the end."""


class ManyWorkload(LabWorkload):
    """See the module's text."""

    name = "many"
    default_pages = 1

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._channels = parameters.get("channels", 16, minimum=1, maximum=MAXIMUM_SUBCHANNELS)
        self._count = parameters.get("count", 50, minimum=0)
        self._window = parameters.get("window", 8, minimum=1, maximum=1024)
        self._size = parameters.get("size", 200, minimum=1, maximum=4000)
        self._push = parameters.get("push", 16, minimum=0, maximum=1024)
        self.lines: list[Line] = []

    def begin(self) -> None:
        """Open them all, then start them all."""
        self.ask(Op.SUBCHANNELS, self._channels)
        for index in range(1, self._channels + 1):
            pushes = Pushes(self.moved)
            channel = self.new_channel(subchannel_index=index, name=f"{self.name}.{index}")
            channel.set_process_packet_callbacks(pushes.process)
            self.driver.enable(channel)
            requests = Requests(channel, window=self._window, size=self._size, count=self._count, moved=self.moved)
            self.lines.append(Line(channel, requests, pushes))
        self.moved()
        for line in self.lines:
            line.requests.begin()

    def tick(self, now: float) -> float:
        """Have the host push again, where all has come; at the end ask for its books."""
        for line in self.lines:
            if not line.requests.finished:
                if self._push and line.pushes.complete and not self._stopped:
                    line.pushes.ask(line.channel, self._push, self._size)
            elif line.pushes.complete and line.host is None:
                line.requests.end()
                line.host = host_books(line.channel, timeout=self.stall_seconds)
        return super().tick(now)

    def trouble_now(self, now: float, driver: ChannelDriver) -> str | None:
        """Any of the channels may be gone."""
        gone = [line.channel for line in self.lines if not line.channel.active]
        if gone:
            return f"channel {gone[0].name} is {gone[0].state.value}; {'; '.join(driver.failures)}"
        return super().trouble_now(now, driver)

    def finished(self) -> bool:
        return len(self.lines) == self._channels and all(line.host is not None for line in self.lines)

    def stop(self) -> None:
        """Send nothing new."""
        self._stopped = True
        for line in self.lines:
            line.requests.stop()

    def counts(self) -> dict[str, Any]:
        """All channels together."""
        books = Books()
        for line in self.lines:
            books.add(line.requests)
        pushed = sum(line.pushes.tally.completed for line in self.lines)
        return {"channels": len(self.lines), **books.as_dict(), "pushed": pushed}

    def result(self) -> dict[str, Any]:
        """All channels together, and what the host found wrong."""
        wrong = sum(line.host.wrong + line.host.push_wrong for line in self.lines if line.host is not None)
        return {**self.counts(), "host_wrong": wrong}

    def good(self) -> bool:
        """Everything was answered once and right, on every channel, in both directions, in the books of both sides."""
        return self.finished() and all(_good(line) for line in self.lines)


def _good(line: Line) -> bool:
    host, requests, pushes = line.host, line.requests, line.pushes
    return (
        host is not None
        and requests.tally.good
        and pushes.tally.good
        and requests.tally.completed == requests.issued == host.requests
        and pushes.tally.completed == pushes.asked == host.pushed == host.push_answers
        and host.wrong == host.push_wrong == requests.cancelled == 0
    )


WORKLOAD = ManyWorkload
