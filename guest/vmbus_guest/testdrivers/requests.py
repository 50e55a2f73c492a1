"""Building blocks of test drivers that use the lab: requests, the host's packets, and books of both.

Each object here is about one session of one channel, from its opening to its end: every request is answered once, in
order, with the right bytes, or cancelled when the channel goes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

from vmbus.errors import PeerError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.status import Status as PacketStatus
from vmbus.wire.lab import LAB_TYPE, SIZE, Op, Stats, Status, parse_reply, parse_stats, pushed_data, request
from vmbus.wire.workload import (
    ECHO_REPLY,
    ECHO_REQUEST,
    STATUS_OK,
    Pattern,
    Sequence,
    Tally,
    echo_request,
    parse_echo_reply,
    transform,
)
from vmbus_guest.testdrivers.workload import Workload

ECHO = request(Op.ECHO)

_PATTERN = Pattern(1)


def right_answer(reply: bytes, sequence: int, data: bytes) -> bool:
    """Whether the reply to an echo request with its data inside is as it must be."""
    parsed = parse_echo_reply(reply)
    return (
        parsed is not None
        and (parsed.status, parsed.sequence, parsed.length) == (STATUS_OK, sequence, len(data))
        and parsed.data == transform(data, sequence)
        and zlib.crc32(parsed.data) == parsed.crc
    )


class Books:
    """Counts of several sessions of channels, for results."""

    def __init__(self) -> None:
        self.issued = 0
        self.cancelled = 0
        self.tally = Tally()

    def add(self, session: Requests) -> None:
        """One more session, ended or not. What was neither answered nor cancelled of one that has ended is lost."""
        self.issued += session.issued
        self.cancelled += session.cancelled
        for name, count in session.tally.as_dict().items():
            setattr(self.tally, name, getattr(self.tally, name) + count)

    def as_dict(self) -> dict[str, Any]:
        tally = self.tally
        return {
            "sent": self.issued,
            "completed": tally.completed,
            "cancelled": self.cancelled,
            "lost": tally.lost,
            "duplicated": tally.duplicated,
            "reordered": tally.reordered,
            "corrupted": tally.corrupted,
        }


class Requests:
    """A window of numbered echo requests on one open channel of the lab. Sizes vary from 1 to `size`."""

    def __init__(
        self, channel: ClientChannel, *, window: int, size: int, count: int = 0, moved: Callable[[], None]
    ) -> None:
        """`count` 0: until `stop`. `moved`: called at every answer."""
        self.channel = channel
        self.tally = Tally()
        self.issued = 0
        self.cancelled = 0
        self._sequence = Sequence(self.tally)
        self._window = window
        self._size = size
        self._count = count
        self._moved = moved
        self._stopped = False

    def begin(self) -> None:
        with self.channel.batch():
            for _ in range(self._window):
                if not self._no_more:
                    self._issue(self.channel.allocate_packet())

    def stop(self) -> None:
        """Send nothing new."""
        self._stopped = True

    @property
    def _no_more(self) -> bool:
        return self._stopped or (self._count > 0 and self.issued >= self._count)

    @property
    def finished(self) -> bool:
        """Nothing more will be sent, and nothing is outstanding."""
        return self._no_more and self.tally.completed + self.cancelled >= self.issued

    def end(self) -> None:
        """The channel is closed: what is neither answered nor cancelled now is lost."""
        self._stopped = True
        self.tally.lost += max(0, self.issued - self.cancelled - self._sequence.next)

    def _issue(self, packet: Packet) -> None:
        sequence = self.issued
        self.issued += 1
        data = _PATTERN.data(sequence, 1 + (sequence * 2654435761 & 0xFFFFFFFF) % self._size)
        packet.pointer = (sequence, data)
        packet.completion_routine = self._completed
        packet.send(ECHO + echo_request(sequence, data, inline=True))

    def _completed(self, packet: Packet, status: int, reply: bytes) -> None:
        sequence, data = packet.pointer
        if status != PacketStatus.SUCCESS:
            self.cancelled += 1
            packet.free()
            return
        self._moved()
        self.tally.completed += 1
        self._sequence.arrived(sequence)
        # An answer after a cancellation would belong to another session of the channel.
        if self.cancelled or not right_answer(reply, sequence, data):
            self.tally.corrupted += 1
        if self._no_more:
            packet.free()
        else:
            self._issue(packet)


class Pushes:
    """Takes the packets that the host was asked to push over one channel; checks and answers each."""

    def __init__(self, moved: Callable[[], None]) -> None:
        self.tally = Tally()
        self.asked = 0
        self._sequence = Sequence(self.tally)
        self._moved = moved

    def ask(self, channel: ClientChannel, count: int, size: int) -> None:
        """Have `count` more packets with `size` bytes pushed."""
        self.asked += count
        post(channel, request(Op.PUSH, count, SIZE.pack(size)))

    @property
    def complete(self) -> bool:
        """Whether all that were asked for have come."""
        return self.tally.completed >= self.asked

    def process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        """The channel's packet callback."""
        completion.complete(self.take(payload))

    def take(self, payload: bytes) -> bytes:
        """Check one packet; the answer to it."""
        self._moved()
        self.tally.started += 1
        if len(payload) < ECHO_REQUEST.size:
            self.tally.corrupted += 1
            return b""
        sequence, length, crc = ECHO_REQUEST.unpack_from(payload)
        data = payload[ECHO_REQUEST.size : ECHO_REQUEST.size + length]
        self._sequence.arrived(sequence)
        self.tally.completed += 1
        if zlib.crc32(data) != crc or data != pushed_data(sequence, length):
            self.tally.corrupted += 1
        answer = transform(data, sequence)
        return ECHO_REPLY.pack(sequence, length, zlib.crc32(answer), STATUS_OK, 0) + answer


def post(
    channel: ClientChannel, payload: bytes, answered: Callable[[int, bytes], None] = lambda status, reply: None
) -> None:
    """Send one request; `answered(status, reply)` is called with its completion (or cancellation), and goes on."""

    def completed(packet: Packet, status: int, reply: bytes) -> None:
        packet.free()
        answered(status, reply)

    packet = channel.allocate_packet()
    packet.completion_routine = completed
    packet.send(payload)


def ask(channel: ClientChannel, op: Op, argument: int = 0, body: bytes = b"", *, timeout: float = 30.0) -> int:
    """Ask the lab, and wait for the answer's value. Raises PeerError when it refuses, KmclError as a synchronous
    request."""
    reply = channel.send_synchronous_request(request(op, argument, body), timeout=timeout)
    status, value = parse_reply(reply)
    if status != Status.OK:
        raise PeerError(f"the lab refused {op.name} {argument} on channel {channel.name}: status {status}")
    return value


def host_books(channel: ClientChannel, *, timeout: float = 30.0) -> Stats:
    """The host's books about a channel. Raises as `ask`."""
    found = parse_stats(channel.send_synchronous_request(request(Op.STATS), timeout=timeout))
    if found is None:
        raise PeerError(f"the lab's books about channel {channel.name} are no books")
    return found


class LabWorkload(Workload):
    """A workload that uses a station of the lab: `channel` is its primary channel."""

    interface_type = LAB_TYPE
    provider = "lab"

    def ask(self, op: Op, argument: int = 0, body: bytes = b"") -> int:
        return ask(self.channel, op, argument, body, timeout=self.stall_seconds)
