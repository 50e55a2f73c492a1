"""Test driver `maximum`: the largest requests that there are, of three kinds by turns: as much data in the ring as a
packet can have; one large piece of memory; as many pieces of memory as a packet can describe. Uses the lab.

Parameters:

    count          requests in all; 0: until stopped
    size           bytes of data in the ring; 0: as many as fit into a packet and into these rings
    external_size  bytes of the one large piece of memory
    pieces         how many pieces of memory
"""

from __future__ import annotations

from typing import Any

from vmbus.errors import UsageError
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.status import Status as PacketStatus
from vmbus.wire.packet import MAX_PACKET_SIZE, MAX_RANGES
from vmbus.wire.workload import (
    ECHO_REPLY,
    STATUS_OK,
    Pattern,
    echo_request,
    parse_echo_reply,
    transform,
)
from vmbus_guest.pci import DmaBuffer
from vmbus_guest.testdrivers.context import Parameters
from vmbus_guest.testdrivers.requests import ECHO, LabWorkload, right_answer
from vmbus_guest.testdrivers.workload import CountedWorkload

_BLOCK = 1 << 16
_PIECE = 64
_STRIDE = 128


class Slot:
    """One kind of request: a packet, and its memory, if any."""

    def __init__(self, packet: Packet, size: int, buffer: DmaBuffer | None, pieces: list[tuple[int, int]]) -> None:
        """`pieces`: (offset in the buffer, bytes)."""
        self.packet = packet
        self.size = size
        self.buffer = buffer
        self.pieces = pieces
        self.sequence = 0
        self.data = b""


class MaximumWorkload(CountedWorkload, LabWorkload):
    """See the module's text."""

    name = "maximum"
    default_pages = 130
    default_count = 15

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._size = parameters.get("size", 0, minimum=0, maximum=MAX_PACKET_SIZE)
        self._external_size = parameters.get("external_size", 1 << 20, minimum=1, maximum=16 << 20)
        self._pieces = parameters.get("pieces", MAX_RANGES, minimum=1, maximum=MAX_RANGES)
        self._pattern = Pattern(9)
        self.bytes = 0
        self.largest = 0
        """Bytes of data in the ring."""

    def prepare(self) -> None:
        """By default a channel takes less."""
        self.channel.set_maximum_packet_size(MAX_PACKET_SIZE)

    def begin(self) -> None:
        """One request of each kind."""
        channel = self.channel
        room = min(channel.largest_payload, self._pages_in * 4096 - 40)
        self.largest = self._size or room - ECHO_REPLY.size
        if ECHO_REPLY.size + self.largest > room:
            raise UsageError(f"parameter 'size' is {self._size}; at most {room - ECHO_REPLY.size} fit into these rings")
        memory = self.driver.allocate(-(-self._external_size // 4096) * 4096)
        scattered = self.driver.allocate(-(-self._pieces * _STRIDE // 4096) * 4096)
        one = [(0, self._external_size)]
        many = [(index * _STRIDE, _PIECE) for index in range(self._pieces)]
        for size, buffer, pieces in (
            (self.largest, None, []),
            (self._external_size, memory, one),
            (_PIECE * self._pieces, scattered, many),
        ):
            packet = channel.allocate_packet()
            packet.pointer = Slot(packet, size, buffer, pieces)
            packet.completion_routine = self._completed
            if not self._no_more():
                self._issue(packet.pointer)

    def _data(self, sequence: int, length: int) -> bytes:
        parts = [
            self._pattern.data(sequence + start, min(_BLOCK, length - start)) for start in range(0, length, _BLOCK)
        ]
        return b"".join(parts)

    def _issue(self, slot: Slot) -> None:
        slot.sequence = sequence = self._issued
        self._issued += 1
        self.tally.started += 1
        slot.data = data = self._data(sequence, slot.size)
        if slot.buffer is None:
            slot.packet.send(ECHO + echo_request(sequence, data, inline=True))
            return
        done = 0
        for offset, length in slot.pieces:
            slot.buffer.view[offset : offset + length] = data[done : done + length]
            done += length
        where = [(slot.buffer.iova + offset, length) for offset, length in slot.pieces]
        slot.packet.send(ECHO + echo_request(sequence, data, inline=False), external=where)

    def _completed(self, packet: Packet, status: int, reply: bytes) -> None:
        if status != PacketStatus.SUCCESS:
            return
        self.moved()
        slot: Slot = packet.pointer
        self.tally.completed += 1
        self._sequence.arrived(slot.sequence)
        self.bytes += len(slot.data)
        if not self._right(slot, reply):
            self.tally.corrupted += 1
        if not self._no_more():
            self._issue(slot)

    def _right(self, slot: Slot, reply: bytes) -> bool:
        if slot.buffer is None:
            return right_answer(reply, slot.sequence, slot.data)
        parsed = parse_echo_reply(reply)
        view = slot.buffer.view
        answer = b"".join(view[offset : offset + length] for offset, length in slot.pieces)
        return (
            parsed is not None
            and (parsed.status, parsed.sequence) == (STATUS_OK, slot.sequence)
            and answer == transform(slot.data, slot.sequence)
        )

    def counts(self) -> dict[str, Any]:
        return {**super().counts(), "bytes": self.bytes}

    def result(self) -> dict[str, Any]:
        return {**super().result(), "largest": self.largest}


WORKLOAD = MaximumWorkload
