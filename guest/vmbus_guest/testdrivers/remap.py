"""Test driver `remap`: memory that comes and goes. Rounds of echo requests whose data is transformed in place, in
memory that is mapped for the device before a round and unmapped after it.

So at any moment the device has just written to memory that it is about to lose, which is what a live save dislikes
most: a page that was written during the save and is not there any more cannot be copied again.

Parameters, besides those of `echo`:

    window   requests in a round
    pace     seconds to wait between two rounds
"""

from __future__ import annotations

from typing import Any

from vmbus_guest.pci import DmaBuffer
from vmbus_guest.testdrivers.context import Parameters
from vmbus_guest.testdrivers.echo import EchoWorkload, Slot
from vmbus_guest.testdrivers.workload import LONGEST_STEP

_SPAN = 4 << 20
"""Bytes mapped for a round: at least one whole huge page of them is nobody else's."""


class RemapWorkload(EchoWorkload):
    """See the module's text."""

    name = "remap"

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._external = 1.0
        self._pace = parameters.get("pace", 0.01, minimum=0.001, maximum=10)
        self._buffer: DmaBuffer | None = None
        self._packets = 0
        self.rounds = 0
        self.unmapped = 0

    def begin(self) -> None:
        """The first round begins with the first turn."""
        self._packets = min(self._window, self._count) if self._count else self._window
        for _ in range(self._packets):
            packet = self.channel.allocate_packet()
            packet.completion_routine = self._completed
            self._idle.append(packet)

    def tick(self, now: float) -> float:
        """A round is over when all its requests are answered."""
        if len(self._idle) < self._packets:
            return now + LONGEST_STEP
        self._take_back()
        if self._no_more():
            return now + LONGEST_STEP
        if now < self._next_send:
            return self._next_send
        self._next_send = now + self._pace
        self._round()
        return now + LONGEST_STEP

    def finished(self) -> bool:
        """All sent, all answered, all unmapped."""
        return self._buffer is None and super().finished()

    def _round(self) -> None:
        self._buffer = buffer = self.driver.allocate(_SPAN)
        stride = _SPAN // self._packets & ~63
        size = min(self._size, stride)
        packets, self._idle = self._idle, []
        with self.channel.batch():
            for index, packet in enumerate(packets):
                if self._no_more():
                    self._idle.append(packet)
                    continue
                start = index * stride
                packet.pointer = Slot(buffer.iova + start, buffer.view[start : start + size])
                self._issue(packet)

    def _take_back(self) -> None:
        if self._buffer is None:
            return
        for packet in self._idle:
            packet.pointer = None  # and with it the view of the memory
        self.driver.free(self._buffer)
        self._buffer = None
        self.unmapped += self.driver.trim()
        self.rounds += 1

    def counts(self) -> dict[str, Any]:
        return {**super().counts(), "rounds": self.rounds}

    def result(self) -> dict[str, Any]:
        """The final counts, with `rounds` and the number of pieces of memory that were `unmapped`."""
        return {**super().result(), "rounds": self.rounds, "unmapped": self.unmapped}


WORKLOAD = RemapWorkload
