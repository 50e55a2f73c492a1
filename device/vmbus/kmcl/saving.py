"""How a server's channel saves and restores itself.

What is saved is every outgoing packet object in use: sent and not completed, in the order of the sends, then queued.
Incoming packets are never saved: before a save the channel is paused and the owner completes what it holds.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from struct import Struct
from typing import Any, NamedTuple
from uuid import UUID

from vmbus.errors import PeerError, StateError
from vmbus.kmcl.channel import Channel, Link, QueuedCompletion
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.packet import Packet, PacketState
from vmbus.kmcl.saved import (
    MAX_ENTRIES,
    MAX_SAVE_BUF,
    VERSION,
    ChannelChunk,
    ChannelRecord,
    CompletionChunk,
    LibBuf,
    PacketChunk,
    RingRecord,
    SavedChannel,
    SavedPacket,
    decode_channel,
    decode_chunk,
    decode_lib,
    encode,
)
from vmbus.kmcl.status import ChannelStateError, KmclError, Status
from vmbus.kmcl.threads import own_thread
from vmbus.ring import RingCorrupt, RingReader, RingWriter
from vmbus.wire.packet import packet_size

_FRAME = Struct("<I")
_IDLE = PacketState.IDLE
_QUEUED = PacketState.QUEUED
_SENT = PacketState.SENT
_NO_ROOM = memoryview(bytearray())

# The channel that is passed is a ServerChannel.
SavePacket = Callable[[Any, Packet, memoryview], int]
RestorePacket = Callable[[Any, bytes, bytes], None]


class SaveStep(NamedTuple):
    """What `save_continue` gave: `data`, whole chunks; `more`, whether others are left; `required`, the bytes that the
    next chunk needs (0 when none is left). No data and `more`: not even one chunk fitted."""

    data: bytes
    more: bool
    required: int


class _SaveContext:
    """The chunks of a save, and how far they have been taken."""

    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = chunks
        self._next = 0

    def take(self, size: int) -> SaveStep:
        taken: list[bytes] = []
        left = size
        while self._next < len(self.chunks):
            chunk = self.chunks[self._next]
            needed = _FRAME.size + len(chunk)
            if needed > left:
                return SaveStep(b"".join(taken), True, needed)
            taken += (_FRAME.pack(len(chunk)), chunk)
            left -= needed
            self._next += 1
        return SaveStep(b"".join(taken), False, 0)


def split_frames(data: bytes) -> list[bytes]:
    """The chunks in bytes of `save_continue`. Raises StateError when one is cut."""
    chunks = []
    position = 0
    while position < len(data):
        if position + _FRAME.size > len(data):
            raise StateError("saved channel state ends inside a chunk's length")
        (length,) = _FRAME.unpack_from(data, position)
        position += _FRAME.size
        if position + length > len(data):
            raise StateError(f"saved channel state ends inside a chunk of {length} bytes")
        chunks.append(data[position : position + length])
        position += length
    return chunks


def _ring_record(ring: RingReader | RingWriter) -> RingRecord:
    words = ring.describe()
    return RingRecord(
        size=words["size"],
        write_index=words["write_index"],
        read_index=words["read_index"],
        interrupt_mask=words["interrupt_mask"],
        pending_send_size=words["pending_send_size"],
        own_index=ring.own_index,
    )


class _Rebuilding:
    """A restore under way. Nothing of it is the channel's before all packets are back.

    `entry`: whose restore callback runs; `packet`: what that has restored so far.
    """

    __slots__ = ("entry", "now", "packet", "queue", "sent")

    def __init__(self) -> None:
        self.entry: SavedPacket | None = None
        self.packet: Packet | None = None
        self.sent: dict[int, Packet] = {}
        self.queue: list[Packet | QueuedCompletion] = []
        self.now = time.monotonic()


class SavingChannel(Channel):
    """The part of `ServerChannel` that saves and restores.

    Attributes:
        force_new_channel: after a restore of the VM, this channel is rescinded, and offered anew if its owner makes it
            again; its packets are gone.
        restored_started: after `restore_from_buffer`: whether the channel was started when it was saved.
    """

    interface_instance: UUID
    subchannel_index: int

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.force_new_channel = False
        self.restored_started = False
        self._save_context: _SaveContext | None = None
        self._restore_frames: list[bytes] = []
        self._save_packet: SavePacket | None = None
        self._restore_packet: RestorePacket | None = None
        self._rebuilding: _Rebuilding | None = None

    def set_save_restore_packet_callbacks(self, save: SavePacket, restore: RestorePacket) -> None:
        """Who saves and rebuilds packets (VmbServerChannelInitSetSaveRestorePacketCallbacks).

        `save(channel, packet, buffer)` returns how many bytes of its own state the owner has for the packet. It is
        called first with a buffer of no bytes; returning 0 then means that there is nothing to save. Otherwise it is
        called again with a buffer of that size (at least), writes its state and returns its size. Raising fails the
        save.

        `restore(channel, lib_buf, save_buf)` is called once per saved packet, in their order. It allocates a packet
        with `allocate_packet`, passes `lib_buf` to `restore_packet`, and rebuilds its own state from `save_buf`: the
        completion routine and the context pointer, which no file can carry. Raising fails the restore.
        """
        self._require_disabled("set_save_restore_packet_callbacks")
        self._save_packet = save
        self._restore_packet = restore

    # ---- what saves read and restores put back: nothing else here looks into the channel's sending half ----------

    def _entries(self) -> Iterator[Packet | QueuedCompletion]:
        """What is in use, in the order in which it left or will leave."""
        yield from self.flow.sent.values()
        yield from self.outgoing.queue

    def _put_back(self, rebuilt: _Rebuilding, next_transaction: int) -> None:
        self.outgoing.put_back(rebuilt.sent, rebuilt.queue, next_transaction)

    # ---- rings ---------------------------------------------------------------------------------------------------

    def check_rings(self) -> None:
        """Before a save: a channel whose rings could not be taken up again, since a word in them is not what we wrote
        or cannot be what the other end wrote, fails, alone and now."""
        rings = self.rings
        if rings is None:
            return
        reader, writer = rings
        try:
            for what, word, own in (
                ("read index", reader.describe()["read_index"], reader.own_index),
                ("write index", writer.describe()["write_index"], writer.own_index),
            ):
                if word != own:
                    raise RingCorrupt(f"{what} is {word:#x} in the ring, and {own:#x} was written there")
            reader.available()
            writer.free()
        except PeerError as error:
            self.fail(str(error))

    # ---- save ----------------------------------------------------------------------------------------------------

    def record(self, *, anew: bool = False) -> ChannelRecord:
        """The channel for a saved state; `check_rings` was called before. Raises as `save_begin`."""
        incoming, outgoing = self.rings or (None, None)
        return ChannelRecord(
            self.interface_instance.bytes_le,
            self.save(anew=anew),
            self.subchannel_index,
            None if incoming is None else _ring_record(incoming),
            None if outgoing is None else _ring_record(outgoing),
        )

    @own_thread
    def save(self, *, anew: bool = False) -> list[bytes]:
        """The whole channel as chunks; the same as `save_begin`, `save_continue` and `save_end` in one.

        Raises as `save_begin`.
        """
        self.save_begin(anew=anew)
        try:
            assert self._save_context is not None
            return list(self._save_context.chunks)
        finally:
            self.save_end()

    @own_thread
    def save_begin(self, *, anew: bool = False) -> None:
        """Set up a save (VmbChannelSaveBegin). The channel must be quiescent, and stays as it is. `anew`: as with
        `force_new_channel`, it will be another one after the restore.

        Raises ChannelStateError when it is active, incoming packets are outstanding, or a save is going on; KmclError
        when the owner's save callback fails, or packets are in use and there is no callback to restore them.
        """
        if not self.quiescent:
            raise ChannelStateError(
                f"channel {self.name} cannot be saved: it is {self.state.value}, and incoming packets "
                f"{self.outstanding} are not completed; pause() it and complete them"
            )
        if self._save_context is not None:
            raise ChannelStateError(f"channel {self.name} is being saved already; save_end() abandons that")
        entries = list(self._entries())
        anew |= self.force_new_channel
        if anew:
            # Made anew at the restore, it has no packets: nobody is asked to save any.
            entries.clear()
        if len(entries) > MAX_ENTRIES:
            raise KmclError(
                f"channel {self.name} has {len(entries)} packets in use; {MAX_ENTRIES} can be saved",
                Status.UNSUCCESSFUL,
            )
        head = ChannelChunk(
            version=VERSION,
            started=self.started,
            next_transaction=self.next_transaction,
            entries=len(entries),
            force_new=anew,
            left_queued=self.packets_queued if anew else 0,
            left_sent=self.packets_sent if anew else 0,
        )
        self._save_context = _SaveContext([encode(head), *map(self._save_one, entries)])

    @own_thread
    def save_continue(self, size: int) -> SaveStep:
        """The next whole chunks that fit into `size` bytes (VmbChannelSaveContinue); goes on where it stopped.

        Each chunk is preceded by its length, u32. Raises ChannelStateError without `save_begin`.
        """
        if self._save_context is None:
            raise ChannelStateError(f"channel {self.name} is not being saved; save_begin() first")
        return self._save_context.take(size)

    @own_thread
    def save_end(self) -> None:
        """Drop the save, finished or not (VmbChannelSaveEnd). Harmless without one."""
        self._save_context = None

    def _save_one(self, entry: Packet | QueuedCompletion) -> bytes:
        if not isinstance(entry, Packet):
            return encode(CompletionChunk(entry.transaction, entry.body))
        if self._restore_packet is None:
            # Refused here and not at the restore, when it would be too late.
            raise self._no_restore_callback()
        queued = entry.state is _QUEUED
        body = bytes(entry.body) if queued else b""
        lib = LibBuf(VERSION, entry.transaction, queued, entry.kind, entry.offset8, entry.flags, body)
        return encode(PacketChunk(encode(lib), self._ask_owner(entry)))

    def _ask_owner(self, packet: Packet) -> bytes:
        """The two-call protocol of EvtVmbChannelSavePacket."""
        save_packet = self._save_packet
        if save_packet is None:
            return b""
        try:
            needed = save_packet(self, packet, _NO_ROOM)
            if needed == 0:
                return b""
            if not 0 < needed <= MAX_SAVE_BUF:
                raise KmclError(
                    f"{self._where('save', packet.transaction)} asked for {needed} bytes; 0 to {MAX_SAVE_BUF} can be "
                    "saved",
                    Status.UNSUCCESSFUL,
                )
            buffer = bytearray(needed)
            written = save_packet(self, packet, memoryview(buffer))
            if written == needed:
                return bytes(buffer)
        except KmclError:
            raise
        except Exception as error:
            raise KmclError(
                f"{self._where('save', packet.transaction)} raised {error!r}", Status.UNSUCCESSFUL
            ) from error
        if not 0 <= written <= needed:
            raise KmclError(
                f"{self._where('save', packet.transaction)} asked for {needed} bytes and then for {written}; both "
                "calls must agree",
                Status.BUFFER_TOO_SMALL,
            )
        return bytes(buffer) if written == needed else bytes(buffer[:written])

    def _where(self, callback: str, transaction: int) -> str:
        return f"the {callback} callback of channel {self.name}, for packet {transaction},"

    def _no_restore_callback(self) -> KmclError:
        return KmclError(
            f"channel {self.name} has saved packets and no restore callback; "
            "set_save_restore_packet_callbacks() before enable()",
            Status.INVALID_DEVICE_REQUEST,
        )

    # ---- restore -------------------------------------------------------------------------------------------------

    @own_thread
    def reopen(self, link: Link) -> None:
        """Put a restored channel back on its rings, not active. The guest did not open it again, so `opened` is not
        called; packets are restored next, then `start` if the saved channel was started."""
        self._attach(link)
        self.observe("resumed")

    @own_thread
    def restore(self, saved: SavedChannel | Sequence[bytes]) -> bool:
        """Rebuild the packets of a saved channel, in order, through the owner's restore callback.

        Returns whether the channel was started when it was saved: start it when everything is restored. Raises
        StateError for bad chunks and KmclError for a callback that fails or does not keep to its contract; packets
        restored so far are then given up.
        """
        if not isinstance(saved, SavedChannel):
            saved = decode_channel(saved, self.name)
        entries = [*saved.sent, *saved.queue]
        if entries and self.state is not ChannelState.OPENED:
            raise StateError(f"packets were saved for channel {self.name}, which is {self.state.value}")
        if next(self._entries(), None) is not None:
            raise ChannelStateError(
                f"channel {self.name} has packets {[packet.transaction for packet in self.packets_in_use][:8]} in use "
                "already; its state is restored before anything is sent, and once"
            )
        saved.check_fits(self.name, packet_size(self.largest_payload))
        self._rebuilding = rebuilding = _Rebuilding()
        try:
            self._rebuild(rebuilding, entries)
        finally:
            self._rebuilding = None
        self._put_back(rebuilding, saved.head.next_transaction)
        return saved.head.started

    def _rebuild(self, rebuilding: _Rebuilding, entries: list[SavedPacket | CompletionChunk]) -> None:
        restore_packet = self._restore_packet
        for entry in entries:
            if isinstance(entry, CompletionChunk):
                rebuilding.queue.append(QueuedCompletion(entry.transaction, entry.body, rebuilding.now))
                continue
            lib = entry.lib
            if restore_packet is None:
                raise self._no_restore_callback()
            rebuilding.entry, rebuilding.packet = entry, None
            try:
                restore_packet(self, entry.lib_buf, entry.save)
            except (KmclError, StateError):
                raise
            except Exception as error:
                raise KmclError(
                    f"{self._where('restore', lib.transaction)} raised {error!r}", Status.UNSUCCESSFUL
                ) from error
            packet = rebuilding.packet
            if packet is None or packet.transaction != lib.transaction:
                raise KmclError(
                    f"{self._where('restore', lib.transaction)} restored packets "
                    f"{[] if packet is None else [packet.transaction]}; it must pass its lib_buf to restore_packet() "
                    "of one fresh packet",
                    Status.UNSUCCESSFUL,
                )

    @own_thread
    def restore_packet(self, packet: Packet, lib_buf: bytes) -> None:
        """Give a fresh packet the library's saved state (VmbPacketRestore). Only inside the restore callback.

        Afterwards the packet is QUEUED or SENT as it was, with its old transaction id. Raises ChannelStateError
        elsewhere or for a packet in use, StateError for a damaged buffer or a transaction restored before.
        """
        rebuilding = self._rebuilding
        if rebuilding is None or rebuilding.entry is None:
            raise ChannelStateError(
                f"restore_packet() on channel {self.name} outside of its restore callback",
                Status.INVALID_DEVICE_REQUEST,
            )
        if packet.channel is not self or packet.state is not _IDLE:
            raise ChannelStateError(
                f"restore_packet() on channel {self.name} needs a fresh packet of this channel, not one that is "
                f"{packet.state.value} on {packet.channel.name}",
                Status.INVALID_PARAMETER_1,
            )
        entry = rebuilding.entry
        lib = entry.lib if lib_buf is entry.lib_buf or lib_buf == entry.lib_buf else decode_lib(lib_buf)
        if rebuilding.packet is not None:
            raise StateError(f"packet {lib.transaction} of channel {self.name} is restored twice")
        packet.transaction = lib.transaction
        packet.kind = lib.kind
        packet.offset8 = lib.offset8
        packet.flags = lib.flags
        packet.since = rebuilding.now
        rebuilding.packet = packet
        if lib.queued:
            packet.body = lib.body
            packet.state = _QUEUED
            rebuilding.queue.append(packet)
        else:
            packet.state = _SENT
            rebuilding.sent[lib.transaction] = packet

    @own_thread
    def restore_from_buffer(self, data: bytes) -> bool:
        """Restore from `save_continue`'s bytes, any whole number of chunks at a time (VmbChannelRestoreFromBuffer).

        Returns True when the channel is complete (`start` it if it was started: `restored_started`), False when more
        chunks exist. Raises as `restore`; what came so far is then forgotten.
        """
        if self.state is ChannelState.DISABLED:
            raise ChannelStateError(f"channel {self.name} is disabled: enable() it before its state is restored")
        try:
            self._restore_frames += split_frames(data)
            head = decode_chunk(self._restore_frames[0]) if self._restore_frames else None
            if head is not None and not isinstance(head, ChannelChunk):
                raise StateError(f"the saved state of channel {self.name} does not start with a channel chunk")
            if head is None or len(self._restore_frames) <= head.entries:
                return False
            frames, self._restore_frames = self._restore_frames, []
            self.restored_started = self.restore(frames)
        except BaseException:
            self._restore_frames = []
            raise
        return True
