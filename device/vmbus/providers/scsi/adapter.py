"""The controller as a guest's driver sees it: its channels, the packets that come over them, and their answers.

Whatever a guest sends is answered, with 64 bytes and with values that Linux knows: it waits for ever for what is not.
"""

from collections.abc import Sequence
from functools import partial
from typing import Protocol
from uuid import UUID

from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.server import ServerChannel
from vmbus.kmcl.status import KmclError
from vmbus.memory.guest import first_bytes
from vmbus.providers.base import Host
from vmbus.providers.disk.disk import MAXIMUM_DATA
from vmbus.providers.disk.request import Op, Request, Status
from vmbus.providers.scsi.at_once import move_at_once
from vmbus.providers.scsi.commands import (
    READS,
    REPORTS_NO_ATTENTION,
    WITH_PARAMETERS,
    WRITES,
    Command,
    Data,
    Facts,
    Work,
    absent,
    decide,
    sense_of,
    transfer,
)
from vmbus.providers.scsi.handshake import STEPS, Handshake, Phase
from vmbus.providers.scsi.unit import Unit
from vmbus.util.complaints import bounded_log
from vmbus.wire import scsi
from vmbus.wire.scsi import Sense
from vmbus.wire.storvsp import (
    STORVSP_TYPE,
    Operation,
    ScsiStatus,
    Srb,
    SrbStatus,
    pack_answer,
    pack_good,
    pack_packet,
    parse_operation,
    parse_srb,
)
from vmbus.wire.storvsp import Status as NtStatus

log = bounded_log(__name__)

_MOVES = READS | WRITES
_EXECUTE_SRB = int(Operation.EXECUTE_SRB)
_READY = Phase.READY
_RESETS = frozenset({Operation.RESET_LUN, Operation.RESET_ADAPTER, Operation.RESET_BUS})
_OPEN = frozenset({ChannelState.OPENED, ChannelState.ACTIVE})
_NOBODY = Facts(0, 512, False, bytes(16), MAXIMUM_DATA, 0)


class Target(Protocol):
    """What the adapter asks for logical units."""

    @property
    def units(self) -> dict[int, Unit]:
        """Those that are there for the guest, by their numbers."""

    def forget(self, channel: Channel) -> None:
        """A channel is closed: nobody waits for what came over it."""

    def go(self) -> None:
        """Requests may come."""

    def rest(self) -> None:
        """None come any more."""


class Asked:
    """A request to disks that is to be answered; a token of `Disk.submit`.

    Attributes:
        views: its memory. left: how many disk requests are still to be done. op: theirs. status: the first failure.
        moved: bytes of data, for the answer.
    """

    __slots__ = ("completion", "left", "moved", "op", "payload", "status", "views")

    def __init__(
        self, completion: Completion, payload: bytes, views: Sequence[memoryview], op: int, moved: int, left: int
    ) -> None:
        self.completion = completion
        self.payload = payload
        self.views = views
        self.op = op
        self.moved = moved
        self.left = left
        self.status = Status.OK


class Adapter:
    """One controller. `counters`: what happened so far."""

    def __init__(
        self,
        host: Host,
        name: str,
        instance: UUID,
        target: Target,
        *,
        sub_channels: int,
        queue_depth: int,
        poll_seconds: float = 0.0,
    ) -> None:
        self._host = host
        self._name = name
        self._instance = instance
        self._target = target
        self._queue_depth = queue_depth
        self._poll_seconds = poll_seconds
        self.handshake = Handshake(sub_channels, MAXIMUM_DATA)
        self.counters = {"requests": 0, "refused": 0, "failed": 0, "notices": 0, "resets": 0}
        self.channels: dict[int, ServerChannel] = {}
        self._going: set[int] = set()  # sub-channels that are being withdrawn
        self._notice: Packet | None = None  # that waits for room in the ring
        self.full = 0

    # ---- channels ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._offer(0)

    def _offer(self, index: int) -> None:
        channel = self.channels.get(index)
        if channel is None:
            name = f"{self._name}.{index}" if index else self._name
            channel = ServerChannel(STORVSP_TYPE, self._instance, name=name, subchannel_index=index)
            channel.set_maximum_external_data(MAXIMUM_DATA)
            channel.set_process_packet_callbacks(self._process)
            if index:
                channel.set_state_change_callbacks(closed=self._sub_closed)
            else:
                channel.set_state_change_callbacks(
                    opened=self._opened, closed=self._closed, started=self._started, suspend=self._suspend
                )
            channel.set_save_restore_packet_callbacks(self._save_packet, self._restore_packet)
            channel.set_transaction_quota(self._queue_depth)
            channel.set_polling(self._poll_seconds)
            self.channels[index] = channel
        self._host.add_channel(channel)
        channel.enable()
        channel.start()

    @property
    def sub_channels(self) -> list[int]:
        """Indices of those that are offered."""
        return [
            index for index, channel in self.channels.items() if index and channel.state is not ChannelState.DISABLED
        ]

    @property
    def open(self) -> bool:
        """Whether the guest has the primary channel open."""
        return self.channels[0].state in _OPEN

    @property
    def outstanding(self) -> int:
        """Requests that are not answered yet."""
        return sum(len(channel.outstanding) for channel in self.channels.values())

    @property
    def answers_read(self) -> bool:
        """Whether the guest has taken all that was put into its rings."""
        words = [rings[1].describe() for channel in self.channels.values() if (rings := channel.rings) is not None]
        return all(ring["read_index"] == ring["write_index"] for ring in words)

    def _opened(self, _: Channel) -> None:
        self.handshake.reset()
        self._notice = None

    def _closed(self, channel: Channel) -> None:
        self.handshake.reset()
        self._notice = None
        self._target.forget(channel)
        self._host.call_soon(self.arrange)

    def _sub_closed(self, channel: Channel) -> None:
        self._target.forget(channel)

    def _started(self, _: Channel) -> None:
        self._target.go()

    def _suspend(self, _: Channel) -> None:
        self._target.rest()

    @property
    def untidy(self) -> bool:
        """Whether other sub-channels are there than the guest has asked for, after a restore."""
        there = self.sub_channels
        stopped = any(not self.channels[index].started for index in there)
        return stopped or set(there) != set(range(1, self.handshake.sub_channels + 1))

    def arrange(self) -> None:
        """Withdraw sub-channels that the guest has not asked for on the open primary one, and offer those that it has.

        One that still has requests goes when they are answered.
        """
        wanted = range(1, self.handshake.sub_channels + 1)
        for index in self.sub_channels:
            if index not in wanted and index not in self._going:
                channel = self.channels[index]
                self._going.add(index)
                channel.begin_pause()
                channel.when_quiet(partial(self._host.call_soon, partial(self._withdraw, index)))
        for index in wanted:
            if index not in self.sub_channels:
                self._offer(index)
            elif index not in self._going and not self.channels[index].started:
                self.channels[index].start()  # saved while it was being withdrawn

    def _withdraw(self, index: int) -> None:
        self._going.discard(index)
        self.channels[index].disable()
        self.arrange()

    # ---- notices -------------------------------------------------------------------------------------------------

    def notify(self) -> None:
        """Have the guest look which logical units there are. If it has not come that far, it will look by itself."""
        if self.handshake.phase is not Phase.READY or not self.open or self._notice is not None:
            return
        packet = self.channels[0].allocate_packet()
        packet.completion_routine = self._noticed
        self._notice = packet
        self.counters["notices"] += 1
        packet.send(pack_packet(Operation.ENUMERATE_BUS), wait_for_completion=False, transaction=0)

    def _noticed(self, packet: Packet, _: int, __: bytes) -> None:
        self._notice = None
        packet.free()

    def _save_packet(self, _: ServerChannel, packet: Packet, buffer: memoryview) -> int:
        buffer[:4] = Operation.ENUMERATE_BUS.to_bytes(4, "little")[: len(buffer)]
        return 4

    def _restore_packet(self, channel: ServerChannel, lib_buf: bytes, _: bytes) -> None:
        packet = channel.allocate_packet()
        channel.restore_packet(packet, lib_buf)
        packet.completion_routine = self._noticed
        self._notice = packet

    # ---- packets of the guest's ------------------------------------------------------------------------------------

    def _process(self, channel: Channel, completion: Completion, payload: bytes) -> None:
        self.counters["requests"] += 1
        operation = parse_operation(payload)
        if operation == _EXECUTE_SRB:
            if self.handshake.phase is not _READY or not move_at_once(self._target.units, completion, payload):
                self._execute(completion, payload)
        elif operation in STEPS and channel is self.channels[0]:
            before = self.handshake.sub_channels
            completion.complete(self.handshake.step(operation, payload))
            if self.handshake.sub_channels != before:
                self._host.call_soon(self.arrange)
        elif operation in _RESETS:
            # What runs goes on, and is answered: that is all that Linux waits for.
            self.counters["resets"] += 1
            completion.complete(pack_packet(Operation.COMPLETE_IO))
        else:
            self.counters["refused"] += 1
            status = NtStatus.NOT_SUPPORTED if operation else NtStatus.INVALID_PARAMETER
            completion.complete(pack_packet(Operation.COMPLETE_IO, status))

    def _execute(self, completion: Completion, payload: bytes) -> None:
        # By their places in the packet (`storvsp.Srb`): this is done for each read and write.
        unit = self._target.units.get(payload[19]) if not (payload[17] or payload[18]) else None
        opcode = payload[28]
        if self.handshake.phase is not Phase.READY:
            self._refuse(completion, payload, SrbStatus.INVALID_REQUEST)
        elif unit is None:
            self._nobody(completion, payload)
        elif not unit.disk.active:
            self._refuse(completion, payload, SrbStatus.INVALID_REQUEST)
        elif unit.grown and opcode not in REPORTS_NO_ATTENTION:
            unit.grown = False
            self._check(completion, payload, scsi.CAPACITY_HAS_CHANGED)
        elif opcode in _MOVES:
            self._move(completion, payload, unit)
        else:
            self._command(completion, payload, unit)

    def _move(self, completion: Completion, payload: bytes, unit: Unit) -> None:
        """READ and WRITE."""
        disk = unit.disk
        core = disk.core
        assert core is not None
        cdb: bytes | None = payload[28:44]
        if payload[20] != 16:
            cdb = parse_srb(payload).command
        if cdb is None:
            self._refuse(completion, payload, SrbStatus.INVALID_REQUEST)
            return
        request = transfer(cdb, core.geometry.block_size, MAXIMUM_DATA)
        if isinstance(request, Sense):
            self._check(completion, payload, request)
            return
        op, _, offset, length = request
        room = int.from_bytes(payload[24:28], "little")
        if not length:
            self._finish(completion, payload, scsi.LBA_OUT_OF_RANGE if offset > core.geometry.size else None)
            return
        status = core.check(request)
        if status is not Status.OK:
            self._check(completion, payload, sense_of(op, status))
            return
        if length > room:
            self._check(completion, payload, scsi.INVALID_FIELD_IN_CDB)
            return
        views = self._memory(completion, room, length, read_only=op == Op.WRITE)
        if views is None:
            self._refuse(completion, payload, SrbStatus.INVALID_REQUEST)
            return
        disk.submit(request, Asked(completion, payload, views, op, length, 1))
        if core.under_way >= self._queue_depth:
            self.full += 1

    def _command(self, completion: Completion, payload: bytes, unit: Unit) -> None:
        """Any other command for a logical unit that is there."""
        srb = parse_srb(payload)
        cdb = srb.command
        if cdb is None:
            self._refuse(completion, payload, SrbStatus.INVALID_REQUEST)
            return
        views: Sequence[memoryview] | None = ()
        if cdb[0] in WITH_PARAMETERS and completion.has_external_data:
            views = self._memory(completion, srb.data_length, srb.data_length, read_only=True)
        if views is None:
            self._refuse(completion, payload, SrbStatus.INVALID_REQUEST)
            return
        parameters = lambda most: _copied(views, most)  # noqa: E731
        verdict = decide(Command(cdb, unit.facts, sorted(self._target.units), parameters))
        if isinstance(verdict, Data):
            self._give(completion, payload, srb, verdict.data)
        elif isinstance(verdict, Work):
            self._work(completion, payload, unit, verdict.requests, srb.data_length if views else 0)
        else:
            self._check(completion, payload, verdict)

    def _work(self, completion: Completion, payload: bytes, unit: Unit, requests: list[Request], moved: int) -> None:
        disk = unit.disk
        core = disk.core
        assert core is not None
        for request in requests:
            status = core.check(request)
            if status is not Status.OK:
                self._check(completion, payload, sense_of(request.op, status))
                return
        if not requests:
            completion.complete(pack_good(payload, moved))
            return
        asked = Asked(completion, payload, (), requests[0].op, moved, len(requests))
        for request in requests:
            disk.submit(request, asked)
        if core.under_way >= self._queue_depth:
            self.full += 1

    def _nobody(self, completion: Completion, payload: bytes) -> None:
        """There is no such logical unit, target or path."""
        srb = parse_srb(payload)
        cdb = srb.command
        if cdb is not None:
            luns = sorted(self._target.units) if srb.path == srb.target == 0 else []
            data = absent(Command(cdb, _NOBODY, luns, lambda most: b""))
            if data is not None:
                self._give(completion, payload, srb, data.data)
                return
        completion.complete(pack_answer(srb, SrbStatus.INVALID_LUN, ScsiStatus.CHECK_CONDITION))

    def _memory(
        self, completion: Completion, room: int, length: int, *, read_only: bool
    ) -> Sequence[memoryview] | None:
        """The first `length` bytes of a request's memory, which is to have `room`; None when it has not."""
        if not completion.has_external_data:
            return None
        try:
            grant = completion.external_data(read_only=read_only)
        except KmclError as error:
            log.debug("controller %s: %s", self._name, error)
            return None
        size = grant.size
        if size < room or room < length:
            return None
        return grant.views if size == length else first_bytes(grant.views, length)

    def _give(self, completion: Completion, payload: bytes, srb: Srb, data: bytes) -> None:
        """Success, with as much of `data` as there is room for."""
        room = min(len(data), srb.data_length) if completion.has_external_data else 0
        if room:
            views = self._memory(completion, srb.data_length, room, read_only=False)
            if views is None:
                self._refuse(completion, payload, SrbStatus.INVALID_REQUEST)
                return
            at = 0
            for view in views:
                view[:] = data[at : at + len(view)]
                at += len(view)
        completion.complete(pack_good(payload, room))

    # ---- answers -------------------------------------------------------------------------------------------------

    def answer(self, asked: Asked, status: Status) -> None:
        if status is not Status.OK and asked.status is Status.OK:
            asked.status = status
        asked.left -= 1
        if asked.left:
            return
        if asked.status is Status.OK:
            asked.completion.complete(pack_good(asked.payload, asked.moved))
        else:
            self.counters["failed"] += 1
            self._check(asked.completion, asked.payload, sense_of(asked.op, asked.status))

    def _finish(self, completion: Completion, payload: bytes, sense: Sense | None) -> None:
        if sense is None:
            completion.complete(pack_good(payload, 0))
        else:
            self._check(completion, payload, sense)

    def _check(self, completion: Completion, payload: bytes, sense: Sense) -> None:
        """CHECK CONDITION."""
        self.counters["refused"] += 1
        completion.complete(
            pack_answer(parse_srb(payload), SrbStatus.ERROR, ScsiStatus.CHECK_CONDITION, sense=sense.pack())
        )

    def _refuse(self, completion: Completion, payload: bytes, status: SrbStatus) -> None:
        """An error of the adapter's."""
        self.counters["refused"] += 1
        completion.complete(pack_answer(parse_srb(payload), status))

    # ---- save and restore ------------------------------------------------------------------------------------------

    def restore_sub_channels(self, indices: Sequence[int]) -> None:
        """Those that were offered at the save, again."""
        for index in indices:
            self._offer(index)


def _copied(views: Sequence[memoryview], most: int) -> bytes:
    """A private copy of at most `most` bytes of a guest's memory."""
    return b"".join(bytes(view) for view in first_bytes(views, most))
