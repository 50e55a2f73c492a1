"""A capture: what a server's channels tell of their packets, on the event loop; `sink` writes it.

While no capture runs, channels call nothing. While one runs, what is done per batch of packets is to keep its ring
bytes, which exist anyway, with the time; per packet with external data, to copy some of that. All else is the thread's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

import msgspec

import vmbus
from vmbus.device.observing import DeviceObserver
from vmbus.errors import PeerError, UsageError
from vmbus.kmcl.client import NIL
from vmbus.observe.capture import record as r
from vmbus.observe.capture.pcapng import Interface, interface_block, packet_block, section_block, statistics_block
from vmbus.observe.capture.sink import QUEUE_BYTES, Sink, open_output
from vmbus.observe.words import describe
from vmbus.wire.gpa import extents_of
from vmbus.wire.packet import PacketType, RawPacket, parse_gpa_direct, split_packets

if TYPE_CHECKING:
    from vmbus.kmcl.channel import Channel, Link
    from vmbus.kmcl.observer import How, Lent

DEFAULT_SNAPLEN = 1 << 20
"""Bytes kept of a record; more than any packet has, with its headers and with `DEFAULT_EXTERNAL`."""
DEFAULT_EXTERNAL = 64 << 10
"""Bytes copied of a packet's external data."""
DEFAULT_LIMIT = 1 << 30
"""Bytes of a capture's file."""
LEAST_SNAPLEN = r.HEADER.size + r.MAX_EVENT
_MOST = 1 << 40

_GPA_DIRECT = int(PacketType.GPA_DIRECT)
_COMPLETION = int(PacketType.COMPLETION)
_TRANSFER_PAGES = int(PacketType.TRANSFER_PAGES)

_COMMENT = "Packets of VMBus-like channels; each begins with a header of 40 bytes, see docs/capture.md."


class CaptureOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is captured, and how much of it.

    channels: patterns, see `Interface.selected`; none: every channel that the guest is offered.
    snaplen: bytes of a record; what is beyond is cut. external: bytes copied of each packet's external data.
    limit: bytes of the file; the capture ends there.
    """

    channels: tuple[str, ...] = ()
    snaplen: int = DEFAULT_SNAPLEN
    external: int = DEFAULT_EXTERNAL
    limit: int = DEFAULT_LIMIT

    def check(self) -> None:
        """Raises UsageError for figures that make no sense."""
        if not LEAST_SNAPLEN <= self.snaplen <= DEFAULT_SNAPLEN * 8:
            raise UsageError(
                f"a snap length of {self.snaplen} bytes; {LEAST_SNAPLEN} to {DEFAULT_SNAPLEN * 8} are possible"
            )
        if not 0 <= self.external <= self.snaplen:
            raise UsageError(
                f"{self.external} bytes of external data; 0 to the snap length, {self.snaplen}, can be kept"
            )
        if not 4096 <= self.limit <= _MOST:
            raise UsageError(f"a limit of {self.limit} bytes; 4096 to {_MOST} are possible")


class _Copy(NamedTuple):
    """Memory that one packet describes or refers to, as far as it was copied."""

    size: int
    data: bytes
    bits: int


_NO_COPY = _Copy(0, b"", 0)


class _Traffic:
    """One life of a channel, from its opening (or the beginning of the capture) to its close: a `LifeObserver`."""

    def __init__(self, capture: Capture, channel: Channel, link: Link, interface: int) -> None:
        self.capture = capture
        self.channel = channel
        self.link = link
        self.interface = interface
        self.close_at = 0
        self._looking = False
        self._copies: dict[int, _Copy] = {}  # of packets about to be handed over, by their end in the batch
        self._replies: dict[int, _Copy] = {}  # of completions about to be published, by their end
        self._given: dict[int, tuple[list[tuple[int, int]], int, int]] = {}  # by transaction: extents, size, digest

    # ---- to the host -----------------------------------------------------------------------------------------------

    def about_to_take(self, packets: Sequence[RawPacket], offset: int) -> None:
        """Copy the memory that they describe or refer to, as the guest left it."""
        self._looking = True
        self._copies.clear()
        lent = self.channel.lent
        for packet in packets:
            copy = self._external(packet) if packet.kind == _GPA_DIRECT else None
            if lent is not None:
                copy = self._with_lent(lent, packet, copy)
            if copy is not None:
                self._copies[packet.end - offset] = copy

    def _external(self, packet: RawPacket) -> _Copy:
        channel = self.channel
        try:
            extents = extents_of(parse_gpa_direct(packet.body, max_bytes=channel.maximum_external_data))
        except PeerError:
            return _Copy(0, b"", r.MALFORMED)
        size = sum(length for _, length in extents)
        copy = self._read(extents, size)
        if packet.flags:  # else no completion will ever take it out again
            self._given[packet.transaction] = (extents, size, hash(copy.data))
        return copy

    def _with_lent(self, lent: Lent, packet: RawPacket, described: _Copy | None = None) -> _Copy | None:
        """What a packet refers to in memory that was lent, and behind it what it describes."""
        most = self.capture.options.external
        try:
            found = lent(packet, most)
        except PeerError:
            return _Copy(0, b"", r.UNREADABLE) if described is None else described
        if found is None:
            return described
        size, data = found
        if described is None:
            return _Copy(size, data, 0)
        more = described.data if len(data) == size else b""
        return _Copy(size + described.size, (data + more)[:most], described.bits)

    def _read(self, extents: Sequence[tuple[int, int]], size: int) -> _Copy:
        left = self.capture.options.external
        parts = []
        try:
            for address, length in extents:
                if not left:
                    break
                part = min(left, length)
                parts.append(self.link.memory.read(address, part))
                left -= part
        except PeerError:
            return _Copy(size, b"", r.UNREADABLE)
        return _Copy(size, b"".join(parts), 0)

    def taken(self, data: bytes) -> None:
        """They were handed over."""
        self._looking = False
        copies, self._copies = self._copies, {}
        if data:
            self.capture.batch(self, r.TO_HOST, data, copies)
        if self.close_at:
            self.capture.end(self)

    # ---- to the guest ----------------------------------------------------------------------------------------------

    def about_to_put(self, data: bytes) -> None:
        """Copy the memory that answered packets describe, if that has changed, and what is handed over."""
        lent = self.channel.lent
        if not self._given and lent is None:
            return
        for packet in split_packets(data)[0]:
            if packet.kind == _TRANSFER_PAGES and lent is not None:
                if (pages := self._with_lent(lent, packet)) is not None:
                    self._replies[packet.end] = pages
            elif packet.kind == _COMPLETION and (given := self._given.pop(packet.transaction, None)) is not None:
                extents, size, digest = given
                copy = self._read(extents, size)
                if not copy.bits and hash(copy.data) == digest:
                    copy = _Copy(size, b"", r.UNCHANGED)
                self._replies[packet.end] = copy

    def put(self, data: bytes) -> None:
        """They are published."""
        replies, self._replies = self._replies, {}
        self.capture.batch(self, r.TO_GUEST, data, replies)

    def withdrawn(self, transaction: int) -> None:
        """It was never in the ring, so it is not in the capture."""

    def failed(self, reason: str, breach: bool) -> None:
        """Something that people want to know."""
        self.capture.noted(self, "failed", reason)

    def closed(self) -> None:
        """The channel lets go of its rings. Packets that are just being handed over are told first."""
        self.close_at = time.time_ns()
        if not self._looking:
            self.capture.end(self)


class _Count:
    """Packets of one interface. `lost` since the last one that is in the file."""

    __slots__ = ("dropped", "lost", "seen")

    def __init__(self) -> None:
        self.seen = 0
        self.dropped = 0
        self.lost = 0


class Capture(DeviceObserver):
    """A running capture, over all sessions of a server. All methods are called on the event loop, and none raises
    because of the file.

    `status` tells how it goes.
    """

    def __init__(self, path: Path, options: CaptureOptions, *, queue_bytes: int = QUEUE_BYTES) -> None:
        """Makes the file. Raises UsageError or EnvironmentProblem."""
        options.check()
        self.options = options
        self.path = path
        self._began = time.time_ns()
        self._stopped = False
        self._sink = Sink(open_output(path), str(path), limit=options.limit, queue_bytes=queue_bytes)
        self._interfaces: dict[Interface, int] = {}
        self._counts: list[_Count] = []
        self._open: dict[int, _Traffic] = {}  # by the id of the channel, which the traffic keeps
        application = f"vmbus-device {vmbus.__version__}"
        self._sink.put(lambda: section_block(application, _COMMENT), 0, urgent=True)

    # ---- what channels tell ----------------------------------------------------------------------------------------

    def opened(self, channel: Channel, link: Link, how: How) -> _Traffic | None:
        """A channel is open on these rings. An `Observer`."""
        if self._stopped:
            return None
        before = self._open.pop(id(channel), None)
        if before is not None:
            self.end(before)
        interface = self._interface(channel)
        if interface is None:
            return None
        traffic = self._open[id(channel)] = _Traffic(self, channel, link, interface)
        details = {"ring_to_host": link.reader.size, "ring_to_guest": link.writer.size}
        self._event(traffic.interface, how, time.time_ns(), **details)
        return traffic

    def noted(self, traffic: _Traffic, event: str, reason: str) -> None:
        """Something happened to a channel that people want to know."""
        if not self._stopped:
            self._event(traffic.interface, event, time.time_ns(), reason=reason[:4096])

    def note(self, event: str) -> None:
        """Something happened to the device: an event on each channel that is open."""
        now = time.time_ns()
        for traffic in self._open.values():
            self._event(traffic.interface, event, now)

    def end(self, traffic: _Traffic) -> None:
        """For the traffic of a channel that is closed: all of it was told."""
        if self._open.get(id(traffic.channel)) is traffic:
            del self._open[id(traffic.channel)]
        if not self._stopped:
            self._event(traffic.interface, "closed", traffic.close_at or time.time_ns())

    # ---- into the file ---------------------------------------------------------------------------------------------

    def _interface(self, channel: Channel) -> int | None:
        subchannel = int(getattr(channel, "subchannel_index", 0))
        interface = Interface(
            f"{channel.name}/{subchannel}" if subchannel else channel.name,
            getattr(channel, "interface_type", NIL),
            channel.interface_instance or NIL,
            subchannel,
        )
        if not interface.selected(self.options.channels):
            return None
        number = self._interfaces.get(interface)
        if number is None:
            number = self._interfaces[interface] = len(self._counts)
            self._counts.append(_Count())
            self._sink.put(lambda: interface_block(interface, self.options.snaplen), 0, urgent=True)
        return number

    def _event(self, interface: int, event: str, at: int, **details: Any) -> None:
        payload = json.dumps({"event": event, **details}).encode()[: r.MAX_EVENT]
        data = r.Record(r.EVENT, r.TO_HOST, 0, 0, 0, 0, b"", payload, 0, b"").pack()
        self._sink.put(lambda: packet_block(interface, at, data, len(data), r.TO_HOST), len(data), urgent=True)

    def batch(self, traffic: _Traffic, direction: int, data: bytes, copies: dict[int, _Copy]) -> None:
        """These packets were taken or published, in one piece: whole packets, at least one."""
        if self._sink.ended:
            self.let_go()  # what cannot be written costs nothing any more, either
            return
        at = time.time_ns()
        interface = traffic.interface
        count = self._counts[interface]
        lost = count.lost
        snaplen = self.options.snaplen
        type_: UUID = getattr(traffic.channel, "interface_type", NIL)
        size = len(data) + sum(len(copy.data) for copy in copies.values())

        def make() -> bytes:
            return _blocks(interface, type_, at, direction, data, copies, snaplen, lost)

        number = _count(data)
        count.seen += number
        if self._sink.put(make, size):
            count.lost = 0
        else:
            count.dropped += number
            count.lost += number

    # ---- the end ---------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """How it goes, as plain data."""
        return {
            "path": str(self.path),
            "running": not self._stopped and not self._sink.ended,
            "ended": self._sink.ended,
            "full": self._sink.full,
            "bytes": self._sink.written,
            "packets": sum(count.seen - count.dropped for count in self._counts),
            "dropped": sum(count.dropped for count in self._counts),
            "channels": [
                {
                    "name": one.channel,
                    "type": str(one.type),
                    "instance": str(one.instance),
                    "subchannel": one.subchannel,
                    "packets": count.seen - count.dropped,
                    "dropped": count.dropped,
                }
                for one, count in zip(self._interfaces, self._counts, strict=True)
            ],
        }

    def let_go(self) -> Callable[[], None]:
        """Nothing more is captured. Returns what writes the rest, bounded, on any thread."""
        if self._stopped:
            return lambda: None
        self._stopped = True
        for traffic in self._open.values():
            channel = traffic.channel
            channel.observing = [one for one in channel.observing if one is not traffic]
        self._open.clear()
        now = time.time_ns()
        figures = [(count.seen, count.dropped) for count in self._counts]

        def last() -> bytes:
            return b"".join(
                statistics_block(interface, self._began, now, seen, dropped)
                for interface, (seen, dropped) in enumerate(figures)
            )

        return lambda: self._sink.close(last)

    def stop(self) -> None:
        """`let_go`, and write the rest here and now."""
        self.let_go()()


def _count(data: bytes) -> int:
    """How many packets there are in ring bytes, which are whole packets."""
    at = number = 0
    end = len(data)
    while at < end:
        at += (int.from_bytes(data[at + 4 : at + 6], "little") + 1) << 3
        number += 1
    return number


def _blocks(
    interface: int, type_: UUID, at: int, direction: int, data: bytes, copies: dict[int, _Copy], snaplen: int, lost: int
) -> bytes:
    blocks = []
    for one in split_packets(data)[0]:
        copy = copies.get(one.end, _NO_COPY)
        head = (r.PACKET, direction, copy.bits, one.kind, one.flags, one.transaction)
        record = r.Record(*head, one.body, one.payload, copy.size, copy.data)
        packed = record.pack()
        original = len(packed) - len(copy.data) + copy.size
        comment = describe(type_, record.seen())
        blocks.append(packet_block(interface, at, packed[:snaplen], original, direction, lost, comment))
        lost = 0
    return b"".join(blocks)
