"""Burst once more, written against `vmbus.kmcl.ddi` alone: a VSP that keeps to the DDI's names, statuses and callbacks,
as one that was carried over from C would. On the wire it is the provider `burst`, and the guest's test driver of that
name drives it.

The books of a run, which know no KMCL, are those of `burst`. What the VSP itself must save of a packet, its number and
the digest that the guest has to answer, travels through EvtVmbChannelSavePacket and EvtVmbChannelRestorePacket.
"""

from collections.abc import Iterator, Mapping
from typing import Any
from uuid import UUID

import msgspec

from vmbus.errors import UsageError
from vmbus.kmcl import ddi
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.status import Status
from vmbus.providers.base import Host
from vmbus.providers.burst import SAVED_TRANSACTION, BurstRuns, Transaction
from vmbus.providers.saved import TallyState, saved_run
from vmbus.providers.slices import PIECE
from vmbus.util.records import U32, U64, Count
from vmbus.wire import workload


class _State(msgspec.Struct, frozen=True):
    run: tuple[U32, U64, U32] | None
    issued: U64
    next_answer: U64
    tally: TallyState
    restored: Count
    runs: Count


_decoder = msgspec.msgpack.Decoder(_State)


def _check(status: int, call: str) -> None:
    if not ddi.NT_SUCCESS(status):
        raise UsageError(f"{call} failed: {Status(status).name}")


class DdiBurstProvider(BurstRuns):
    """See the module's text."""

    kind = "ddi-burst"

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        self._moves = False
        status, channel = ddi.VmbChannelAllocate(None, True)
        _check(status, "VmbChannelAllocate")
        assert channel is not None
        self.channel: Channel = channel

    def start(self) -> None:
        channel = self.channel
        callbacks = ddi.VMB_CHANNEL_STATE_CHANGE_CALLBACKS()
        ddi.VMB_CHANNEL_STATE_CHANGE_CALLBACKS_INIT(callbacks)
        callbacks.EvtChannelOpened = self._evt_opened
        callbacks.EvtChannelClosed = self._evt_closed
        callbacks.EvtChannelStarted = self._evt_started
        callbacks.EvtChannelSuspend = self._evt_suspend
        for call, arguments in (
            (ddi.VmbChannelInitSetFriendlyName, (self.name,)),
            (ddi.VmbChannelInitSetStateChangeCallbacks, (callbacks,)),
            (ddi.VmbChannelInitSetProcessPacketCallbacks, (self._evt_process_packet,)),
            (ddi.VmbServerChannelInitSetTargetInterfaceId, (workload.BURST_TYPE, self.instance)),
            (
                ddi.VmbServerChannelInitSetSaveRestorePacketCallbacks,
                (self._evt_save_packet, self._evt_restore_packet),
            ),
            (ddi.VmbServerChannelInitSetVmbusHandle, (self.host,)),
            (ddi.VmbChannelEnable, ()),
            (ddi.VmbChannelStart, ()),
        ):
            _check(call(channel, *arguments), call.__name__)

    # ---- a run -------------------------------------------------------------------------------------------------

    def _evt_opened(self, _: Channel) -> int:
        self._run = None
        return Status.SUCCESS

    def _evt_closed(self, _: Channel) -> None:
        self._run = None

    def _evt_process_packet(self, _: Channel, completion: Completion, buffer: bytes, length: int, flags: int) -> None:
        if workload.is_burst_stop(buffer[:length]):
            ddi.VmbChannelPacketComplete(completion, workload.STATUS_OK.to_bytes(4, "little"))
            if self._run is not None:
                self._run = self._run._replace(packets=self._issued)
                self._finish_if_done()
            return
        start = workload.parse_burst_start(buffer[:length])
        if start is None or self._run is not None or flags & ddi.VMBUS_CHANNEL_PROCESS_PACKET_FLAG_EXTERNAL_DATA:
            ddi.VmbChannelPacketComplete(completion, workload.STATUS_MALFORMED.to_bytes(4, "little"))
            return
        ddi.VmbChannelPacketComplete(completion, workload.STATUS_OK.to_bytes(4, "little"))
        self._begin(start)
        self._fill()
        self._finish_if_done()

    def _evt_started(self, _: Channel) -> None:
        self._moves = True
        self._fill()

    def _evt_suspend(self, _: Channel) -> None:
        self._moves = False

    def _filled(self) -> Iterator[int]:
        try:
            while self._moves and self._run is not None and self._has_room():
                self._issue(ddi.VmbPacketAllocate(self.channel))
                yield PIECE + self._run.size
        finally:
            self._filling = False

    def _issue(self, packet: Packet) -> None:
        """Send the next packet of the run, with a fresh packet object or one that has come back."""
        transaction, payload = self._next()
        ddi.VmbPacketSetPointer(packet, transaction)
        ddi.VmbPacketSetCompletionRoutine(packet, self._evt_completed)
        status = ddi.VmbPacketSend(packet, payload, None, ddi.VMBUS_CHANNEL_FORMAT_FLAG_WAIT_FOR_COMPLETION)
        _check(status, "VmbPacketSend")

    def _evt_completed(self, packet: Packet, status: int, buffer: bytes, length: int) -> None:
        if not ddi.NT_SUCCESS(status):
            ddi.VmbPacketFree(packet)
            return
        self._answered(ddi.VmbPacketGetPointer(packet), buffer[:length])
        if self._run is not None and self._slices.open and self._has_room():
            self._slices.spend(PIECE + self._run.size)
            self._issue(packet)
        else:
            ddi.VmbPacketFree(packet)
            self._fill()
            self._finish_if_done()

    def _finish_if_done(self) -> None:
        report = self._over()
        if report is not None:
            # The packet's default completion routine frees it.
            _check(ddi.VmbPacketSend(ddi.VmbPacketAllocate(self.channel), report, None, 0), "VmbPacketSend")

    # ---- save and restore --------------------------------------------------------------------------------------

    def _evt_save_packet(self, _: Channel, packet: Packet, save_buf: memoryview, save_buf_size: int) -> tuple[int, int]:
        transaction: Transaction | None = ddi.VmbPacketGetPointer(packet)
        if transaction is None:
            return Status.SUCCESS, 0
        if save_buf_size < SAVED_TRANSACTION.size:
            return Status.BUFFER_TOO_SMALL, SAVED_TRANSACTION.size
        SAVED_TRANSACTION.pack_into(save_buf, 0, transaction.sequence, transaction.digest)
        return Status.SUCCESS, SAVED_TRANSACTION.size

    def _evt_restore_packet(
        self, channel: Channel, lib_buf: bytes, lib_buf_size: int, save_buf: bytes, save_buf_size: int
    ) -> int:
        packet = ddi.VmbPacketAllocate(channel)
        status = ddi.VmbPacketRestore(packet, lib_buf[:lib_buf_size])
        if not ddi.NT_SUCCESS(status) or not save_buf_size:
            return status
        if save_buf_size != SAVED_TRANSACTION.size:
            return Status.DATA_ERROR
        ddi.VmbPacketSetPointer(packet, Transaction(*SAVED_TRANSACTION.unpack(save_buf)))
        ddi.VmbPacketSetCompletionRoutine(packet, self._evt_completed)
        self.restored += 1
        return Status.SUCCESS

    def save(self) -> bytes:
        return msgspec.msgpack.encode(_State(**self._books()))

    def _decoded(self, state: bytes) -> tuple[_State, workload.BurstStart | None]:
        saved = self.decoded(_decoder, state)
        return saved, saved_run(saved.run, 0, saved.issued)

    def check(self, state: bytes) -> None:
        self._decoded(state)

    def restore(self, state: bytes) -> None:
        self._take_books(*self._decoded(state))
