"""One channel of a NIC: frames on their way to the guest, in batches, as packets that wait for their completion.

A packet in flight is an outgoing packet of KMCL's, so a save takes it along: its content lies in the guest's memory,
or, while it queues, in the library's part of the state. Ours is how much of the window it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from struct import Struct
from struct import error as StructError

from vmbus.errors import StateError
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.server import ServerChannel
from vmbus.kmcl.status import Status
from vmbus.wire.network import BATCH_BYTES, FRAMES_MAXIMUM, Link, message_size, pack_frames

_SAVED = Struct("<HHII")  # version, kind, frames (a LINK: whether it is up), bytes
_VERSION = 1


class Kind(IntEnum):
    """What a packet to the guest carries."""

    FRAMES = 1
    LINK = 2


def describe_saved(saved: bytes) -> dict[str, object]:
    """What `Queue.save_packet` wrote, for people. Raises ValueError or struct.error for other bytes."""
    _, number, count, size = _SAVED.unpack(saved)
    kind = Kind(number)
    if kind is Kind.LINK:
        return {"kind": "link", "up": bool(count)}
    return {"kind": "frames", "frames": count, "bytes": size}


class Sent:
    """What is known of a packet in flight. `size`: bytes of frames; of a LINK packet, `count` is the link."""

    __slots__ = ("count", "kind", "size")

    def __init__(self, kind: Kind, count: int, size: int) -> None:
        self.kind = kind
        self.count = count
        self.size = size


class Queue:
    """Frames to the guest on one channel.

    Attributes:
        outstanding: bytes of frames that the guest has not taken yet, those that wait to be sent included.
        filled: how often the window was full. counters: what happened so far.
    """

    def __init__(
        self, index: int, channel: ServerChannel, window: int, told: Callable[[Queue, Sent, int], None]
    ) -> None:
        """`window`: bytes that may be outstanding. `told` is called when the guest has completed a packet, or the
        channel was closed, with the packet's record and its status."""
        self.index = index
        self.channel = channel
        self.window = window
        self.outstanding = 0
        self.filled = 0
        self.counters = {"frames": 0, "bytes": 0, "packets": 0, "lost": 0}
        self._told = told
        self._batch: list[bytes] = []
        self._batch_size = 0

    @property
    def open(self) -> bool:
        """Whether packets can be sent (they queue while the device is paused)."""
        return self.channel.state in (ChannelState.OPENED, ChannelState.ACTIVE)

    @property
    def has_room(self) -> bool:
        """Whether the window has room for a frame."""
        return self.outstanding < self.window

    def add(self, frame: bytes) -> None:
        """One more frame, with its header; it goes out with the next `flush` at the latest."""
        size = len(frame)
        batch = self._batch
        if batch:
            whole = message_size(len(batch) + 1, self._batch_size + size)
            if whole > min(BATCH_BYTES, self.channel.largest_payload) or len(batch) >= FRAMES_MAXIMUM:
                self.flush()
        self._batch.append(frame)
        self._batch_size += size
        self.outstanding += size
        self.filled += not self.has_room

    def flush(self) -> None:
        """Send what was added."""
        frames, size = self._batch, self._batch_size
        if not frames:
            return
        self._batch, self._batch_size = [], 0
        if not self.open or message_size(len(frames), size) > self.channel.largest_payload:
            # The guest's rings are smaller than what it agreed to.
            self.outstanding -= size
            self.counters["lost"] += len(frames)
            return
        self.counters["packets"] += 1
        self.counters["frames"] += len(frames)
        self.counters["bytes"] += size
        self._send(pack_frames(frames), Sent(Kind.FRAMES, len(frames), size))

    def send_link(self, up: bool) -> None:
        """Tell the guest of the link."""
        self._send(Link(up).pack(), Sent(Kind.LINK, int(up), 0))

    def _send(self, message: bytes, sent: Sent) -> None:
        packet = self.channel.allocate_packet()
        packet.pointer = sent
        packet.completion_routine = self._completed
        packet.send(message)

    def _completed(self, packet: Packet, status: int, _: bytes) -> None:
        sent: Sent = packet.pointer
        packet.free()
        self.outstanding -= sent.size
        if status != Status.SUCCESS and sent.kind is Kind.FRAMES:
            self.counters["lost"] += sent.count
        self._told(self, sent, status)

    # ---- save and restore ----------------------------------------------------------------------------------------

    def save_packet(self, _: ServerChannel, packet: Packet, buffer: memoryview) -> int:
        """KMCL's save callback."""
        sent: Sent = packet.pointer
        if len(buffer) >= _SAVED.size:
            _SAVED.pack_into(buffer, 0, _VERSION, sent.kind, sent.count, sent.size)
        return _SAVED.size

    def restore_packet(self, channel: ServerChannel, lib_buf: bytes, save_buf: bytes) -> None:
        """KMCL's restore callback."""
        where = f"a packet of channel {channel.name}"
        try:
            version, kind, count, size = _SAVED.unpack(save_buf)
            if version != _VERSION:
                raise StateError(f"{where} was saved in version {version}; known: {_VERSION}")
            sent = Sent(Kind(kind), count, size)
        except (StructError, ValueError) as error:
            raise StateError(f"{where} was saved as something unknown: {save_buf.hex()}") from error
        packet = channel.allocate_packet()
        channel.restore_packet(packet, lib_buf)
        packet.pointer = sent
        packet.completion_routine = self._completed
        self.outstanding += size
        self._told(self, sent, Status.PENDING)
