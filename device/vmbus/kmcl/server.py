"""The server endpoint (VSP): offers a channel, and saves and restores its packets.

What is saved is every outgoing packet object in use: sent and not completed, in the order of the sends, then queued.
Incoming packets are never saved: before a save the channel is paused and the owner completes what it holds.
"""

import time
from collections.abc import Callable, Sequence
from struct import Struct
from threading import get_ident
from typing import NamedTuple, Protocol, cast
from uuid import UUID

from vmbus.errors import PeerError, StateError
from vmbus.kmcl.channel import DEFAULT_TIMEOUT, Channel, Link
from vmbus.kmcl.packet import Packet, PacketState
from vmbus.kmcl.saved import (
    MAX_SAVE_BUF,
    VERSION,
    ChannelChunk,
    Chunk,
    CompletionChunk,
    LibBuf,
    PacketChunk,
    decode_chunk,
    decode_lib,
    encode,
)
from vmbus.kmcl.states import ChannelEvent, ChannelState
from vmbus.kmcl.status import ChannelStateError, KmclError, Status
from vmbus.kmcl.threads import own_thread
from vmbus.memory import Grant
from vmbus.wire.messages import OfferFlag
from vmbus.wire.packet import packet_size

SERVER_FLAG_LOOPBACK_OFFER = 0x1
SERVER_FLAG_ENUMERATE_DEVICE_INTERFACE = 0x2
SERVER_FLAG_OFFER_AS_PIPE = 0x4
SERVER_FLAG_FORCE_NEW_CHANNEL = 0x8
SERVER_FLAG_TLNPI_PROVIDER_OFFER = 0x10
SERVER_FLAGS = 0x1F
_WIRE_FLAGS = {
    SERVER_FLAG_LOOPBACK_OFFER: OfferFlag.LOOPBACK_OFFER,
    SERVER_FLAG_ENUMERATE_DEVICE_INTERFACE: OfferFlag.ENUMERATE_DEVICE_INTERFACE,
    SERVER_FLAG_OFFER_AS_PIPE: OfferFlag.NAMED_PIPE_MODE,
    SERVER_FLAG_TLNPI_PROVIDER_OFFER: OfferFlag.TLNPI_PROVIDER_OFFER,
}

NIL = UUID(int=0)  # an interface id that has not been set

_FRAME = Struct("<I")

SavePacket = Callable[["ServerChannel", Packet, memoryview], int]
RestorePacket = Callable[["ServerChannel", bytes, bytes], None]


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


class HostLink(Protocol):
    """What a server channel needs of its link beyond `vmbus.kmcl.channel.Link`. Both raise PeerError."""

    def map_gpadl(self, handle: int, read_only: bool) -> Grant:
        """The memory of a GPADL of this channel."""

    def unmap_gpadl(self, handle: int) -> None:
        """End the mapping."""


class ServerChannel(Channel):
    """A channel that is offered to the guest as (`interface_type`, `interface_instance`).

    Attributes:
        subchannel_index: 0 for the primary channel of an instance.
        offer_flags: bits of `vmbus.wire.messages.OfferFlag`.
        user_defined: up to 120 bytes that travel in the offer.
        force_new_channel: after a restore of the VM, this channel is rescinded and offered anew; its packets are gone.
        loopback_offer: offered inside this process instead of to the guest.
        mmio_megabytes, mmio_megabytes_optional: travel in the offer; nothing here provides such memory.
    """

    def __init__(
        self,
        interface_type: UUID = NIL,
        interface_instance: UUID = NIL,
        *,
        name: str = "",
        subchannel_index: int = 0,
    ) -> None:
        super().__init__(name or str(interface_instance))
        self.interface_type = interface_type
        self.interface_instance: UUID = interface_instance
        self.subchannel_index = subchannel_index
        self.offer_flags = 0
        self.user_defined = b""
        self.force_new_channel = False
        self.loopback_offer = False
        self.mmio_megabytes = 0
        self.mmio_megabytes_optional = 0
        self._save_context: _SaveContext | None = None
        self._restore_frames: list[bytes] = []
        self._save_packet: SavePacket | None = None
        self._restore_packet: RestorePacket | None = None
        self._restoring: list[Packet] | None = None
        self._restored: set[int] = set()
        self.restored_started = False
        self._on_enable: Callable[[ServerChannel], None] | None = None
        self._on_disable: Callable[[ServerChannel], None] | None = None

    def set_server_flags(self, flags: int) -> None:
        """How the channel is offered, SERVER_FLAG bits (VmbServerChannelInitSetFlags)."""
        self._require_disabled("set_server_flags")
        if flags & ~SERVER_FLAGS:
            raise self.refuse(f"server flags {flags:#x}; {SERVER_FLAGS:#x} exist", Status.INVALID_PARAMETER_2)
        self.offer_flags = sum(wire for flag, wire in _WIRE_FLAGS.items() if flags & flag)
        self.force_new_channel = bool(flags & SERVER_FLAG_FORCE_NEW_CHANNEL)
        self.loopback_offer = bool(flags & SERVER_FLAG_LOOPBACK_OFFER)

    def set_mmio_megabytes(self, megabytes: int, optional: int = 0) -> None:
        """Memory-mapped I/O space that the guest should set aside (VmbServerChannelInitSetMmioMegabytes)."""
        self._require_disabled("set_mmio_megabytes")
        both = (megabytes, optional)
        if not any(both) or min(both) < 0 or max(both) > 0xFFFF:
            raise self.refuse(f"{megabytes} and {optional} MB of MMIO space", Status.INVALID_PARAMETER)
        self.mmio_megabytes = megabytes
        self.mmio_megabytes_optional = optional

    def set_target_interface_id(self, interface_type: UUID, interface_instance: UUID) -> None:
        """What the channel is offered as (VmbServerChannelInitSetTargetInterfaceId)."""
        self._require_disabled("set_target_interface_id")
        self.interface_type = interface_type
        self.interface_instance = interface_instance

    def set_target_vtl(self, vtl: int) -> None:
        """Only 0: there are no virtual trust levels here (VmbServerChannelInitSetTargetVtl)."""
        self._require_disabled("set_target_vtl")
        if vtl:
            raise self.refuse(f"target VTL {vtl}; only VTL 0 exists here", Status.INVALID_PARAMETER_2)

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

    def bind(self, on_enable: Callable[["ServerChannel"], None], on_disable: Callable[["ServerChannel"], None]) -> None:
        """Tie the channel to one VM's bus (VmbServerChannelInitSetVmbusHandle): who offers it, who withdraws it."""
        self.flow.thread = get_ident()  # from here on this is the channel's own thread
        self._require_disabled("bind")
        self._on_enable = on_enable
        self._on_disable = on_disable

    @own_thread
    def enable(self) -> None:
        """Offer the channel (VmbChannelEnable). The guest opens it whenever it likes."""
        self._require_usable("enable")
        if NIL in (self.interface_type, self.interface_instance):
            raise ChannelStateError(f"channel {self.name} has no interface ids; set_target_interface_id() first")
        if self._on_enable is None:
            raise ChannelStateError(f"channel {self.name} is bound to no bus; bind() it first")
        self._move(ChannelEvent.ENABLE)
        try:
            self._on_enable(self)
        except BaseException:
            if self.state is ChannelState.CLOSED:
                self._move(ChannelEvent.DISABLE)
            raise

    @own_thread
    def disable(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Withdraw the offer (VmbChannelDisable): waits for incoming packets that are held, then closes the channel.

        Raises WaitTimeout naming the packets (the channel is then paused), ChannelStateError in a state callback.
        """
        self._refuse_in_state_callback("disable")
        if self.state in (ChannelState.OPENED, ChannelState.ACTIVE, ChannelState.CLOSING):
            wish = self.started
            self.pause(timeout)
            self.started = wish
        # Withdrawing closes an open channel: the guest is told that it is gone.
        if self._on_disable is not None and self.state is not ChannelState.DISABLED:
            self._on_disable(self)
        self._move(ChannelEvent.DISABLE)

    # ---- GPADLs ------------------------------------------------------------------------------------------------

    def map_gpadl(self, handle: int, *, read_only: bool = False) -> Grant:
        """The memory of a GPADL that the guest created on this channel, as memoryviews (VmbChannelMapGpadl).

        One mapping of a GPADL at a time. With `read_only` the views cannot be written, and the memory is not in the
        dirty log. Raises KmclError (INVALID_PARAMETER) for a handle that does not exist or is mapped already.
        """
        try:
            return self._host_link("map_gpadl").map_gpadl(handle, read_only)
        except PeerError as error:
            raise self.refuse(f"GPADL {handle:#x}: {error}", Status.INVALID_PARAMETER) from error

    def unmap_gpadl(self, handle: int) -> None:
        """End a mapping (VmbChannelUnmapGpadl); a guest that waits to take its memory back goes on. At the latest in
        the closed callback. Raises KmclError (INVALID_PARAMETER) for a handle that is not mapped."""
        try:
            self._host_link("unmap_gpadl", closing=True).unmap_gpadl(handle)
        except PeerError as error:
            raise self.refuse(f"GPADL {handle:#x}: {error}", Status.INVALID_PARAMETER) from error

    def _host_link(self, call: str, *, closing: bool = False) -> HostLink:
        return cast(HostLink, self.open_link(call, closing=closing))

    # ---- save --------------------------------------------------------------------------------------------------

    @own_thread
    def save(self) -> list[bytes]:
        """The whole channel as chunks; the same as `save_begin`, `save_continue` and `save_end` in one.

        Raises as `save_begin`.
        """
        self.save_begin()
        try:
            assert self._save_context is not None
            return list(self._save_context.chunks)
        finally:
            self.save_end()

    @own_thread
    def save_begin(self) -> None:
        """Set up a save (VmbChannelSaveBegin). The channel must be quiescent, and stays as it is.

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
        entries: list[Chunk] = [self._save_one(packet) for packet in self.flow.sent.values()]
        for entry in self.outgoing.queue:
            if isinstance(entry, Packet):
                entries.append(self._save_one(entry))
            else:
                entries.append(CompletionChunk(transaction=entry.transaction, body=entry.body))
        head = ChannelChunk(
            version=VERSION,
            started=self.started,
            next_transaction=self.flow.next_transaction,
            entries=len(entries),
        )
        self._save_context = _SaveContext([encode(head), *map(encode, entries)])

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

    def _save_one(self, packet: Packet) -> PacketChunk:
        if not self.force_new_channel:
            # Refused here and not at the restore, when it would be too late.
            self._require_restore_callback()
        lib = LibBuf(
            version=VERSION,
            transaction=packet.transaction,
            queued=packet.state is PacketState.QUEUED,
            kind=packet.kind,
            offset8=packet.offset8,
            flags=packet.flags,
            body=bytes(packet.body) if packet.state is PacketState.QUEUED else b"",
        )
        return PacketChunk(lib=encode(lib), save=self._ask_owner(packet))

    def _ask_owner(self, packet: Packet) -> bytes:
        """The two-call protocol of EvtVmbChannelSavePacket."""
        if self._save_packet is None:
            return b""
        where = f"the save callback of channel {self.name}, for packet {packet.transaction},"
        try:
            needed = self._save_packet(self, packet, memoryview(bytearray()))
            if needed == 0:
                return b""
            if not 0 < needed <= MAX_SAVE_BUF:
                raise KmclError(
                    f"{where} asked for {needed} bytes; 0 to {MAX_SAVE_BUF} can be saved", Status.UNSUCCESSFUL
                )
            buffer = bytearray(needed)
            written = self._save_packet(self, packet, memoryview(buffer))
        except KmclError:
            raise
        except Exception as error:
            raise KmclError(f"{where} raised {error!r}", Status.UNSUCCESSFUL) from error
        if not 0 <= written <= needed:
            raise KmclError(
                f"{where} asked for {needed} bytes and then for {written}; both calls must agree",
                Status.BUFFER_TOO_SMALL,
            )
        return bytes(buffer[:written])

    # ---- restore -----------------------------------------------------------------------------------------------

    @own_thread
    def reopen(self, link: Link) -> None:
        """Put a restored channel back on its rings, not active. The guest did not open it again, so `opened` is not
        called; packets are restored next, then `start` if the saved channel was started."""
        self._attach(link)
        self.observe("resumed")

    @own_thread
    def restore(self, chunks: Sequence[bytes]) -> bool:
        """Rebuild the packets of a saved channel, in order, through the owner's restore callback.

        Returns whether the channel was started when it was saved: start it when everything is restored. Raises
        StateError for bad chunks and KmclError for a callback that fails or does not keep to its contract; packets
        restored so far are then given up.
        """
        decoded = [decode_chunk(data) for data in chunks]
        head = decoded[0] if decoded else None
        if not isinstance(head, ChannelChunk) or head.entries != len(decoded) - 1:
            raise StateError(f"the saved state of channel {self.name} does not start with a channel chunk or is cut")
        if decoded[1:] and self.state is not ChannelState.OPENED:
            raise StateError(f"packets were saved for channel {self.name}, which is {self.state.value}")
        if self.flow.sent or self.outgoing.queue:
            raise ChannelStateError(
                f"channel {self.name} has packets {[packet.transaction for packet in self.packets_in_use][:8]} in use "
                "already; its state is restored before anything is sent, and once"
            )
        self._restored = set()
        try:
            for chunk in decoded[1:]:
                self._restore_one(chunk, head.next_transaction)
        except BaseException:
            self.outgoing.give_up()
            raise
        self.flow.next_transaction = self.outgoing.first_own = head.next_transaction
        return head.started

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

    def _restore_one(self, chunk: Chunk, limit: int) -> None:
        if isinstance(chunk, ChannelChunk):
            raise StateError(f"a second channel chunk in the state of channel {self.name}")
        if isinstance(chunk, CompletionChunk):
            self._check_fits(chunk.transaction, chunk.body)
            self.outgoing.put_back_reply(chunk.transaction, chunk.body)
            return
        lib = decode_lib(chunk.lib)
        if lib.transaction >= limit:
            raise StateError(f"packet {lib.transaction} of channel {self.name} is newer than the channel's state")
        self._check_fits(lib.transaction, lib.body)
        restore_packet = self._require_restore_callback()
        where = f"the restore callback of channel {self.name}, for packet {lib.transaction},"
        self._restoring = []
        try:
            restore_packet(self, chunk.lib, chunk.save)
        except (KmclError, StateError):
            raise
        except Exception as error:
            raise KmclError(f"{where} raised {error!r}", Status.UNSUCCESSFUL) from error
        finally:
            restored, self._restoring = self._restoring, None
        if len(restored) != 1 or restored[0].transaction != lib.transaction:
            raise KmclError(
                f"{where} restored packets {[packet.transaction for packet in restored]}; it must pass its lib_buf to "
                "restore_packet() of one fresh packet",
                Status.UNSUCCESSFUL,
            )

    def _require_restore_callback(self) -> RestorePacket:
        if self._restore_packet is None:
            raise KmclError(
                f"channel {self.name} has saved packets and no restore callback; "
                "set_save_restore_packet_callbacks() before enable()",
                Status.INVALID_DEVICE_REQUEST,
            )
        return self._restore_packet

    def _check_fits(self, transaction: int, body: bytes) -> None:
        if self.link is not None and packet_size(len(body)) > self.link.writer.largest:
            raise StateError(
                f"packet {transaction} of channel {self.name} takes {packet_size(len(body))} ring bytes, and can never "
                f"fit into a ring of {self.link.writer.size}"
            )

    @own_thread
    def restore_packet(self, packet: Packet, lib_buf: bytes) -> None:
        """Give a fresh packet the library's saved state (VmbPacketRestore). Only inside the restore callback.

        Afterwards the packet is QUEUED or SENT as it was, with its old transaction id. Raises ChannelStateError
        elsewhere or for a packet in use, StateError for a damaged buffer or a transaction restored before.
        """
        if self._restoring is None:
            raise ChannelStateError(
                f"restore_packet() on channel {self.name} outside of its restore callback",
                Status.INVALID_DEVICE_REQUEST,
            )
        if packet.channel is not self or packet.state is not PacketState.IDLE:
            raise ChannelStateError(
                f"restore_packet() on channel {self.name} needs a fresh packet of this channel, not one that is "
                f"{packet.state.value} on {packet.channel.name}",
                Status.INVALID_PARAMETER_1,
            )
        lib = decode_lib(lib_buf)
        if lib.transaction in self._restored:
            raise StateError(f"packet {lib.transaction} of channel {self.name} is restored twice")
        packet.transaction = lib.transaction
        packet.kind = lib.kind
        packet.offset8 = lib.offset8
        packet.flags = lib.flags
        packet.since = time.monotonic()
        self._restoring.append(packet)
        self._restored.add(lib.transaction)
        if lib.queued:
            packet.body = lib.body
            packet.state = PacketState.QUEUED
        else:
            packet.state = PacketState.SENT
        self.outgoing.put_back(packet)
