"""One channel of a card: RNDIS messages on their way to the guest, in parts of its receive buffer.

A packet hands parts over as transfer pages, and they are the guest's until it completes it. It is an outgoing packet of
KMCL's, so a save takes it along; what it carries lies in the guest's memory. Ours is which part of the buffer it has.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from struct import Struct
from struct import error as StructError

from vmbus.errors import PeerError, StateError
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.server import ServerChannel
from vmbus.kmcl.status import KmclError, Status
from vmbus.providers.network.lent import Arena, Lent
from vmbus.wire import nvsp
from vmbus.wire.packet import TransferPages

_SAVED = Struct("<HHIQQ")  # version, kind, messages, its part of the arena: begin, end
_VERSION = 1

_DATA = nvsp.rndis(nvsp.DATA_CHANNEL)
_CONTROL = nvsp.rndis(nvsp.CONTROL_CHANNEL)


class Kind(IntEnum):
    """What a packet to the guest carries, and so, of which arena its part is."""

    FRAMES = 1
    CONTROL = 2
    LINK = 3  # the same, and it tells of the link


def describe_saved(saved: bytes) -> dict[str, object]:
    """What `Queue.save_packet` wrote, for people. Raises ValueError or struct.error for other bytes."""
    _, number, count, begin, end = _SAVED.unpack(saved)
    return {"kind": Kind(number).name.lower(), "messages": count, "bytes": end - begin}


class Sent:
    """What is known of a packet in flight. `arena`: where it has its part; not the queue's any more if the guest has
    taken back that buffer since."""

    __slots__ = ("arena", "begin", "count", "end", "kind")

    def __init__(self, kind: Kind, count: int, arena: Arena, part: tuple[int, int]) -> None:
        self.kind = kind
        self.count = count
        self.arena = arena
        self.begin, self.end = part

    def __str__(self) -> str:
        what = "data" if self.kind is Kind.FRAMES else "control"
        return f"RNDIS {what}, {self.count} messages, {self.end - self.begin} bytes of the receive buffer"


class Parts:
    """A queue's parts of the receive buffer: for frames, and, of the primary one, for control messages."""

    def __init__(self, buffer: Lent, page_set: int, frames: Arena, control: Arena) -> None:
        self.buffer = buffer
        self.page_set = page_set
        self.frames = frames
        self.control = control

    def arena(self, kind: Kind) -> Arena:
        """That of a kind of packet."""
        return self.frames if kind is Kind.FRAMES else self.control


class Queue:
    """See the module's text.

    Attributes:
        parts: of the receive buffer; None while there is none.
        limit: bytes of the longest message with a frame. most_packets: that may be in flight, since the guest keeps as
            many completions.
        filled: how often there was no room. counters: what happened so far.
    """

    def __init__(self, index: int, channel: ServerChannel, told: Callable[[Queue, Sent, int], None]) -> None:
        """`told` is called when the guest has completed a packet, or the channel was closed, with the packet's record
        and its status; PENDING: a restore has brought it back."""
        self.index = index
        self.channel = channel
        self.parts: Parts | None = None
        self.limit = 0
        self.most_packets = 1
        self.filled = 0
        self.counters = {"frames": 0, "bytes": 0, "packets": 0, "lost": 0}
        self._told = told
        self._ranges: list[tuple[int, int]] = []

    @property
    def open(self) -> bool:
        """Whether packets can be sent (they queue while the device is paused)."""
        return self.channel.state in (ChannelState.OPENED, ChannelState.ACTIVE)

    @property
    def in_flight(self) -> int:
        """Packets that the guest has not completed."""
        return self.channel.packets_sent + self.channel.packets_queued

    @property
    def has_room(self) -> bool:
        """Whether a frame can be handed over, however long it is."""
        parts = self.parts
        if parts is None or not parts.frames.fits(self.limit):
            return False
        # As many completions does the guest keep; some of them are for control messages.
        return self.in_flight + bool(self._ranges) < self.most_packets - min(16, self.most_packets // 4)

    def has_control_room(self, length: int) -> bool:
        return self.parts is not None and self.parts.control.fits(length) and self.in_flight < self.most_packets

    def add(self, message: bytes) -> None:
        """One more frame's message; it goes out with the next `flush`. Without room it is lost."""
        parts, counters = self.parts, self.counters
        place = None if parts is None else parts.frames.take(len(message))
        if parts is None or place is None or len(message) > self.limit:
            counters["lost"] += 1
            return
        try:
            parts.buffer.write(place, message)
        except (PeerError, KmclError, ValueError):
            counters["lost"] += 1  # the guest has made its memory unreachable, and gets nothing any more
            return
        self._ranges.append((place, len(message)))
        counters["frames"] += 1
        counters["bytes"] += len(message)
        self.filled += not parts.frames.fits(self.limit)

    def flush(self) -> None:
        parts, ranges = self.parts, self._ranges
        if parts is None or not ranges:
            return
        self._ranges = []
        part = parts.frames.finish()
        self.counters["packets"] += 1
        self._send(Sent(Kind.FRAMES, len(ranges), parts.frames, part), _DATA, TransferPages(parts.page_set, ranges))

    def control(self, message: bytes, kind: Kind) -> None:
        """Send a control message, for which `has_control_room` has said that there is room."""
        parts = self.parts
        place = None if parts is None else parts.control.take(len(message))
        if parts is None or place is None:
            return
        try:
            parts.buffer.write(place, message)
        except (PeerError, KmclError, ValueError):
            return
        sent = Sent(kind, 1, parts.control, parts.control.finish())
        self._send(sent, _CONTROL, TransferPages(parts.page_set, [(place, len(message))]))

    def _send(self, sent: Sent, payload: bytes, pages: TransferPages) -> None:
        packet = self.channel.allocate_packet()
        packet.pointer = sent
        packet.completion_routine = self._completed
        packet.send(payload, transfer_pages=pages)

    def _completed(self, packet: Packet, status: int, _: bytes) -> None:
        sent: Sent = packet.pointer
        packet.free()
        sent.arena.give_back(sent.end)
        if status != Status.SUCCESS and sent.kind is Kind.FRAMES:
            self.counters["lost"] += sent.count
        self._told(self, sent, status)

    def forget(self) -> None:
        """The guest has taken its receive buffer back, or has never lent one."""
        self.parts = None
        self._ranges.clear()

    @property
    def used(self) -> int:
        """Bytes of its part that the guest has."""
        return 0 if self.parts is None else self.parts.frames.used

    @property
    def window(self) -> int:
        """Bytes that it may have."""
        return 0 if self.parts is None else self.parts.frames.size

    # ---- save and restore ----------------------------------------------------------------------------------------

    def save_packet(self, _: ServerChannel, packet: Packet, buffer: memoryview) -> int:
        sent: Sent = packet.pointer
        if len(buffer) >= _SAVED.size:
            # A part of a buffer that the guest has taken back since is none of the next one.
            here = self.parts is not None and sent.arena is self.parts.arena(sent.kind)
            begin, end = (sent.begin, sent.end) if here else (0, 0)
            _SAVED.pack_into(buffer, 0, _VERSION, sent.kind, sent.count, begin, end)
        return _SAVED.size

    def restore_packet(self, channel: ServerChannel, lib_buf: bytes, save_buf: bytes) -> None:
        where = f"a packet of channel {channel.name}"
        try:
            version, number, count, begin, end = _SAVED.unpack(save_buf)
            kind = Kind(number)
        except (StructError, ValueError) as error:
            raise StateError(f"{where} was saved as something unknown: {save_buf.hex()}") from error
        if version != _VERSION:
            raise StateError(f"{where} was saved in version {version}; known: {_VERSION}")
        arena = Arena(0, 0)
        if end:
            if self.parts is None or not self.parts.arena(kind).restore(begin, end):
                raise StateError(f"{where} has a part of the receive buffer that cannot be its own: {begin} to {end}")
            arena = self.parts.arena(kind)
        packet = channel.allocate_packet()
        channel.restore_packet(packet, lib_buf)
        packet.pointer = sent = Sent(kind, count, arena, (begin, end))
        packet.completion_routine = self._completed
        self._told(self, sent, Status.PENDING)
