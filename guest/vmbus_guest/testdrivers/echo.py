"""Test driver `echo`: a window of numbered requests at the echo provider; every answer is checked.

Parameters, besides the common ones of `Workload`:

    count         requests in all; 0: until stopped
    window        requests outstanding at any moment
    size          bytes of data in a request
    minimum_size  the least; sizes vary between the two (default: `size`)
    external      share (0 to 1) of the requests whose data is in external memory and transformed in place
    seed          of data, sizes and choices
    pace          seconds to wait between two requests (0: none), so that a short run lasts
"""

from __future__ import annotations

import time
import zlib
from typing import Any

from vmbus.errors import UsageError
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.status import Status
from vmbus.wire.workload import (
    ECHO_TYPE,
    STATUS_OK,
    Pattern,
    echo_request,
    parse_echo_reply,
    transform,
)
from vmbus_guest.testdrivers.context import Parameters
from vmbus_guest.testdrivers.workload import LONGEST_STEP, CountedWorkload

LARGEST = 60000
"""Bytes of data in a request at most."""

_ALIGNMENT = 64


class EchoDefaults:
    """What parameters are when they are not given. `minimum_size` 0: as `size`."""

    __slots__ = ("external", "minimum_size", "size", "window")

    def __init__(self, *, window: int = 64, size: int = 64, minimum_size: int = 0, external: float = 0.0) -> None:
        self.window = window
        self.size = size
        self.minimum_size = minimum_size
        self.external = external


class Slot:
    """What belongs to one packet object of the window."""

    __slots__ = ("data", "external", "iova", "sequence", "view")

    def __init__(self, iova: int, view: memoryview) -> None:
        self.iova = iova
        self.view = view
        self.sequence = 0
        self.data = b""
        self.external = False


class EchoWorkload(CountedWorkload):
    """See the module's text."""

    name = "echo"
    interface_type = ECHO_TYPE
    provider = "echo"
    defaults = EchoDefaults()
    head = b""
    """What comes before every request."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._window = parameters.get("window", self.defaults.window, minimum=1, maximum=65536)
        self._size = parameters.get("size", self.defaults.size, minimum=1, maximum=LARGEST)
        least = min(self.defaults.minimum_size or self._size, self._size)
        self._minimum_size = parameters.get("minimum_size", least, minimum=1, maximum=LARGEST)
        self._external = parameters.get("external", self.defaults.external, minimum=0, maximum=1)
        self._pace = parameters.get("pace", 0.0, minimum=0, maximum=10)
        seed = parameters.get("seed", 1)
        if self._minimum_size > self._size:
            raise UsageError(f"parameter 'minimum_size' {self._minimum_size} is larger than 'size' {self._size}")
        self._seed = seed
        self._pattern = Pattern(seed)
        self.bytes = 0
        """Of data sent."""
        self._idle: list[Packet] = []
        self._next_send = 0.0

    def begin(self) -> None:
        stride = -(-self._size // _ALIGNMENT) * _ALIGNMENT
        window = min(self._window, self._count) if self._count else self._window
        buffer = None
        if self._external:
            buffer = self.driver.allocate(-(-window * stride // 4096) * 4096)
        for index in range(window):
            packet = self.channel.allocate_packet()
            packet.completion_routine = self._completed
            start = index * stride
            packet.pointer = (
                Slot(0, memoryview(b""))
                if buffer is None
                else Slot(buffer.iova + start, buffer.view[start : start + self._size])
            )
            self._idle.append(packet)
        self._idle.reverse()
        if not self._pace:
            with self.channel.batch():
                while self._idle:
                    self._issue(self._idle.pop())

    def tick(self, now: float) -> float:
        """With a pace: send what is due."""
        if not self._pace or self._no_more():
            return now + LONGEST_STEP
        if self._idle and now >= self._next_send:
            self._next_send = now + self._pace
            self._issue(self._idle.pop())
        return self._next_send if self._idle else now + LONGEST_STEP

    def counts(self) -> dict[str, Any]:
        return {
            **super().counts(),
            "in_flight": {"queued": self.channel.packets_queued, "sent": self.channel.packets_sent},
        }

    def result(self) -> dict[str, Any]:
        tally = self.tally
        return {
            "sent": self._issued,
            "completed": tally.completed,
            "lost": tally.lost + self._issued - self._sequence.next,
            "duplicated": tally.duplicated,
            "reordered": tally.reordered,
            "corrupted": tally.corrupted,
        }

    def _issue(self, packet: Packet) -> None:
        slot: Slot = packet.pointer
        slot.sequence = sequence = self._issued
        self._issued = sequence + 1
        # A cheap mix of seed and number, the same in every run.
        mixed = ((sequence + self._seed) * 2654435761) & 0xFFFFFFFF
        length = self._minimum_size + mixed % (self._size - self._minimum_size + 1)
        slot.data = data = self._pattern.data(sequence, length)
        self.bytes += length
        slot.external = self._external > 0 and (mixed >> 8) / (1 << 24) < self._external
        if slot.external:
            slot.view[:length] = data
            packet.send(self.head + echo_request(sequence, data, inline=False), external=[(slot.iova, length)])
        else:
            packet.send(self.head + echo_request(sequence, data, inline=True))

    def _completed(self, packet: Packet, status: int, reply: bytes) -> None:
        if status != Status.SUCCESS:
            return  # the channel is going; what is outstanding will be counted as lost
        self.moved_at = time.monotonic()
        slot: Slot = packet.pointer
        self.tally.completed += 1
        self._sequence.arrived(slot.sequence)
        if not self._right(slot, reply):
            self.tally.corrupted += 1
        if self._pace:
            self._idle.append(packet)
        elif not self._no_more():
            self._issue(packet)

    def _right(self, slot: Slot, reply: bytes) -> bool:
        parsed = parse_echo_reply(reply)
        if parsed is None or parsed.status != STATUS_OK or parsed.sequence != slot.sequence:
            return False
        answer = bytes(slot.view[: len(slot.data)]) if slot.external else parsed.data
        return (
            parsed.length == len(slot.data)
            and answer == transform(slot.data, slot.sequence)
            and zlib.crc32(answer) == parsed.crc
        )


WORKLOAD = EchoWorkload
