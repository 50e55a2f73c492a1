"""The server endpoint (VSP): offers a channel, and saves and restores its packets.

What is saved is every outgoing packet object in use: sent and not completed, in the order of the sends, then queued.
Incoming packets are never saved: before a save the channel is paused and the owner completes what it holds.
"""

from collections.abc import Callable, Sequence
from uuid import UUID

from vmbus.errors import StateError
from vmbus.kmcl.channel import Channel, Link, _QueuedCompletion
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
from vmbus.wire.packet import packet_size

SavePacket = Callable[["ServerChannel", Packet, memoryview], int]
RestorePacket = Callable[["ServerChannel", bytes, bytes], None]


class ServerChannel(Channel):
    """A channel that is offered to the guest as (`interface_type`, `interface_instance`).

    Attributes:
        offer_flags: bits of `vmbus.wire.messages.OfferFlag`.
        user_defined: up to 120 bytes that travel in the offer.
    """

    def __init__(self, interface_type: UUID, interface_instance: UUID, *, name: str = "") -> None:
        super().__init__(name or str(interface_instance))
        self.interface_type = interface_type
        self.interface_instance = interface_instance
        self.offer_flags = 0
        self.user_defined = b""
        self._save_packet: SavePacket | None = None
        self._restore_packet: RestorePacket | None = None
        self._restoring: list[Packet] | None = None
        self._on_enable: Callable[[ServerChannel], None] | None = None
        self._on_disable: Callable[[ServerChannel], None] | None = None

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
        self._require_disabled("bind")
        self._on_enable = on_enable
        self._on_disable = on_disable

    def enable(self) -> None:
        """Offer the channel (VmbChannelEnable). The guest opens it whenever it likes."""
        if self._on_enable is None:
            raise ChannelStateError(f"channel {self.name} is bound to no bus; bind() it first")
        self._move(ChannelEvent.ENABLE)
        self._on_enable(self)

    def disable(self) -> None:
        """Withdraw the offer (VmbChannelDisable). The channel must be closed."""
        self._move(ChannelEvent.DISABLE)
        if self._on_disable is not None:
            self._on_disable(self)

    # ---- save --------------------------------------------------------------------------------------------------

    def save(self) -> list[bytes]:
        """The channel as chunks. It must be quiescent, and stays as it is.

        Raises ChannelStateError when it is active or incoming packets are outstanding, KmclError when the owner's save
        callback fails.
        """
        if not self.quiescent:
            raise ChannelStateError(
                f"channel {self.name} cannot be saved: it is {self.state.value}, and incoming packets "
                f"{self.outstanding} are not completed; pause() it and complete them"
            )
        entries: list[Chunk] = [self._save_one(packet) for packet in self._sent.values()]
        for entry in self._queue:
            if isinstance(entry, Packet):
                entries.append(self._save_one(entry))
            else:
                entries.append(CompletionChunk(transaction=entry.transaction, body=entry.body))
        head = ChannelChunk(
            version=VERSION, started=self.started, next_transaction=self._next_transaction, entries=len(entries)
        )
        return [encode(head), *map(encode, entries)]

    def _save_one(self, packet: Packet) -> PacketChunk:
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
            needed = self._save_packet(self, packet, memoryview(b""))
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

    def reopen(self, link: Link) -> None:
        """Put a restored channel back on its rings, not active. The guest did not open it again, so `opened` is not
        called; packets are restored next, then `start` if the saved channel was started."""
        self._move(ChannelEvent.OPEN)
        self._link = link
        self._generation += 1

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
        try:
            for chunk in decoded[1:]:
                self._restore_one(chunk, head.next_transaction)
        except BaseException:
            self._sent.clear()
            self._queue.clear()
            raise
        self._next_transaction = head.next_transaction
        return head.started

    def _restore_one(self, chunk: Chunk, limit: int) -> None:
        if isinstance(chunk, ChannelChunk):
            raise StateError(f"a second channel chunk in the state of channel {self.name}")
        if isinstance(chunk, CompletionChunk):
            self._check_fits(chunk.transaction, chunk.body)
            self._queue.append(_QueuedCompletion(chunk.transaction, chunk.body))
            return
        lib = decode_lib(chunk.lib)
        if lib.transaction >= limit:
            raise StateError(f"packet {lib.transaction} of channel {self.name} is newer than the channel's state")
        self._check_fits(lib.transaction, lib.body)
        if self._restore_packet is None:
            raise KmclError(
                f"channel {self.name} has saved packets and no restore callback; "
                "set_save_restore_packet_callbacks() before enable()",
                Status.INVALID_DEVICE_REQUEST,
            )
        where = f"the restore callback of channel {self.name}, for packet {lib.transaction},"
        self._restoring = []
        try:
            self._restore_packet(self, chunk.lib, chunk.save)
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

    def _check_fits(self, transaction: int, body: bytes) -> None:
        if self._link is not None and packet_size(len(body)) > self._link.writer.largest:
            raise StateError(
                f"packet {transaction} of channel {self.name} takes {packet_size(len(body))} ring bytes, and can never "
                f"fit into a ring of {self._link.writer.size}"
            )

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
        known = lib.transaction in self._sent or any(
            isinstance(entry, Packet) and entry.transaction == lib.transaction for entry in self._restoring
        )
        if known:
            raise StateError(f"packet {lib.transaction} of channel {self.name} is restored twice")
        packet.transaction = lib.transaction
        packet.kind = lib.kind
        packet.offset8 = lib.offset8
        packet.flags = lib.flags
        self._restoring.append(packet)
        if lib.queued:
            packet.body = lib.body
            packet.state = PacketState.QUEUED
            self._queue.append(packet)
        else:
            packet.state = PacketState.SENT
            self._sent[lib.transaction] = packet
