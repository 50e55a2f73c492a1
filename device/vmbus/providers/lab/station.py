"""A station of the lab: a primary channel with sub-channels, which does what it is asked for on any of them.

What must outlive a save: the books of each channel, which packets were pushed (their numbers travel with them), which
GPADLs are mapped. A mapping itself ends with the process; it is made again before the next packet is taken.
"""

from collections.abc import Callable, Sequence
from struct import Struct
from typing import Annotated
from zlib import crc32

import msgspec

from vmbus import workload
from vmbus.bus.gpadl import MAX_GPADLS
from vmbus.errors import StateError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.server import ServerChannel
from vmbus.kmcl.states import ChannelState
from vmbus.kmcl.status import KmclError
from vmbus.kmcl.status import Status as PacketStatus
from vmbus.memory import Grant
from vmbus.providers.base import Host
from vmbus.providers.saved import TallyState
from vmbus.records import U32, U64, Count
from vmbus.wire.lab import (
    HANDLE,
    HEAD,
    KEEP,
    MAXIMUM_PUSH,
    MAXIMUM_PUSH_SIZE,
    MAXIMUM_SUBCHANNELS,
    REPLY,
    SIZE,
    Op,
    Stats,
    Status,
    pushed_data,
)

_SAVED_PACKET = Struct("<QI")
_IN_USE = frozenset({ChannelState.OPENED, ChannelState.ACTIVE, ChannelState.CLOSING})


class LineState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is saved of one channel."""

    index: Annotated[int, msgspec.Meta(ge=0, le=MAXIMUM_SUBCHANNELS)]
    next_sequence: U64
    tally: TallyState
    pushed: Count
    next_answer: U64
    push_tally: TallyState
    mapped: Annotated[list[U32], msgspec.Meta(max_length=MAX_GPADLS)]


class StationState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is saved of a station: whether it is offered, and the channels that exist."""

    plugged: bool
    lines: Annotated[list[LineState], msgspec.Meta(max_length=MAXIMUM_SUBCHANNELS + 1)]

    def check(self) -> None:
        """Raises StateError for a channel that is there twice, or sub-channels of a station that is not offered."""
        present = [line.index for line in self.lines]
        if len(set(present)) != len(present) or (present and 0 not in present):
            raise StateError(f"a station of a lab was saved with channels {present}")


class Line:
    """One channel of a station, and its books."""

    def __init__(self, station: "Station", index: int) -> None:
        self._station = station
        self.index = index
        self.channel = station.make_channel(index)
        self.channel.set_process_packet_callbacks(self._process)
        self.channel.set_state_change_callbacks(opened=self._opened, started=self._started, closed=self._closed)
        self.channel.set_save_restore_packet_callbacks(self._save_packet, self._restore_packet)
        self._mapped: dict[int, Grant | None] = {}  # None: mapped at the save, and to be mapped again
        self._reset()

    def _reset(self) -> None:
        self.tally = workload.Tally()
        self._sequence = workload.Sequence(self.tally)
        self.pushed = 0
        self.push_tally = workload.Tally()
        self._answers = workload.Sequence(self.push_tally)
        self._queued_before = self.channel.counters["queued"]

    def offer(self) -> None:
        """Have the guest know it. Repeating it does nothing."""
        if self.channel.state is ChannelState.DISABLED:
            self._station.host.add_channel(self.channel)
            self.channel.enable()
            self.channel.start()

    def withdraw(self) -> None:
        """Rescind it. Repeating it does nothing."""
        if self.channel.state is not ChannelState.DISABLED:
            self.channel.disable()

    # ---- the channel ---------------------------------------------------------------------------------------------

    def _opened(self, _: Channel) -> None:
        self._mapped.clear()
        self._reset()

    def _started(self, _: Channel) -> None:
        for handle in [handle for handle, grant in self._mapped.items() if grant is None]:
            try:
                self._mapped[handle] = self.channel.map_gpadl(handle)
            except KmclError:
                del self._mapped[handle]  # the guest was taking it back when the device was saved

    def _closed(self, _: Channel) -> None:
        for handle, grant in self._mapped.items():
            if grant is not None:
                self.channel.unmap_gpadl(handle)
        self._mapped.clear()
        if not self.index:
            self._station.was_closed()

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        if len(payload) < HEAD.size:
            completion.complete(REPLY.pack(Status.MALFORMED, 0))
            return
        op, argument = HEAD.unpack_from(payload)
        if op == Op.ECHO:
            self._echo(completion, payload[HEAD.size :])
            return
        try:
            handler = _HANDLERS[op]
        except KeyError:
            completion.complete(REPLY.pack(Status.MALFORMED, 0))
            return
        completion.complete(handler(self, argument, payload[HEAD.size :]))

    # ---- requests ------------------------------------------------------------------------------------------------

    def _echo(self, completion: Completion, body: bytes) -> None:
        views: Sequence[memoryview] | None = None
        if completion.has_external_data:
            try:
                views = completion.external_data().views
            except KmclError:
                completion.complete(workload.ECHO_REPLY.pack(0, 0, 0, workload.STATUS_MALFORMED, 0))
                return
        completion.complete(self.answer(body, views))

    def answer(self, body: bytes, views: Sequence[memoryview] | None) -> bytes:
        """The reply to an echo request; data in `views`, if any, is transformed in place."""
        self.tally.started += 1
        if len(body) < workload.ECHO_REQUEST.size:
            self.tally.corrupted += 1
            return workload.ECHO_REPLY.pack(0, 0, 0, workload.STATUS_MALFORMED, 0)
        sequence, length, crc = workload.ECHO_REQUEST.unpack_from(body)
        self._sequence.arrived(sequence)
        start = workload.ECHO_REQUEST.size
        data = body[start : start + length] if views is None else b"".join(views)[:length]
        if len(data) != length or crc32(data) != crc:
            self.tally.corrupted += 1
            return workload.ECHO_REPLY.pack(sequence, 0, 0, workload.STATUS_CORRUPT, 0)
        answer = workload.transform(data, sequence)
        self.tally.completed += 1
        reply = workload.ECHO_REPLY.pack(sequence, length, crc32(answer), workload.STATUS_OK, 0)
        if views is None:
            return reply + answer
        done = 0
        for view in views:
            part = answer[done : done + len(view)]
            view[: len(part)] = part
            done += len(part)
        return reply

    def _which(self, argument: int, body: bytes) -> bytes:
        return REPLY.pack(Status.OK, self._station.number)

    def _subchannels(self, argument: int, body: bytes) -> bytes:
        if self.index or argument > MAXIMUM_SUBCHANNELS:
            return REPLY.pack(Status.MALFORMED, 0)
        self._station.set_subchannels(argument)
        return REPLY.pack(Status.OK, argument)

    def _withdraw(self, argument: int, body: bytes) -> bytes:
        return self._one_subchannel(argument, Line.withdraw)

    def _offer(self, argument: int, body: bytes) -> bytes:
        return self._one_subchannel(argument, Line.offer)

    def _one_subchannel(self, index: int, action: Callable[["Line"], None]) -> bytes:
        if self.index or not 0 < index <= MAXIMUM_SUBCHANNELS:
            return REPLY.pack(Status.NOT_THERE, index)
        action(self._station.line(index))
        return REPLY.pack(Status.OK, index)

    def _unplug(self, argument: int, body: bytes) -> bytes:
        return REPLY.pack(self._station.plug_another(argument, False), argument)

    def _plug(self, argument: int, body: bytes) -> bytes:
        return REPLY.pack(self._station.plug_another(argument, True), argument)

    def _gpadl(self, argument: int, body: bytes) -> bytes:
        if len(body) < HANDLE.size:
            return REPLY.pack(Status.MALFORMED, 0)
        handle, _ = HANDLE.unpack_from(body)
        kept = self._mapped.get(handle)
        try:
            grant = kept or self.channel.map_gpadl(handle)
        except KmclError:
            return workload.ECHO_REPLY.pack(0, 0, 0, workload.STATUS_MALFORMED, 0)
        reply = self.answer(body[HANDLE.size :], grant.views)
        if argument & KEEP:
            self._mapped[handle] = grant
        elif kept is None:
            self.channel.unmap_gpadl(handle)
        return reply

    def _unmap(self, argument: int, body: bytes) -> bytes:
        if self._mapped.pop(argument, None) is None:
            return REPLY.pack(Status.NOT_THERE, argument)
        self.channel.unmap_gpadl(argument)
        return REPLY.pack(Status.OK, argument)

    def _stats(self, argument: int, body: bytes) -> bytes:
        tally, push = self.tally, self.push_tally
        return Stats(
            tally.started,
            tally.lost + tally.duplicated + tally.reordered + tally.corrupted,
            self.pushed,
            push.completed,
            push.lost + push.duplicated + push.reordered + push.corrupted,
            self.channel.counters["queued"] - self._queued_before,
        ).pack()

    # ---- packets of the host's -------------------------------------------------------------------------------------

    def _push(self, argument: int, body: bytes) -> bytes:
        size = SIZE.unpack_from(body)[0] if len(body) >= SIZE.size else 0
        if argument > MAXIMUM_PUSH or not 0 < size <= MAXIMUM_PUSH_SIZE:
            return REPLY.pack(Status.MALFORMED, 0)
        with self.channel.batch():
            for _ in range(argument):
                sequence = self.pushed
                packet = self.channel.allocate_packet()
                packet.pointer = (sequence, size)
                packet.completion_routine = self._push_completed
                self.pushed += 1
                self.push_tally.started += 1
                packet.send(workload.echo_request(sequence, pushed_data(sequence, size), inline=True))
        return REPLY.pack(Status.OK, argument)

    def _push_completed(self, packet: Packet, status: int, reply: bytes) -> None:
        sequence, size = packet.pointer
        packet.free()
        if status != PacketStatus.SUCCESS:
            return
        self.push_tally.completed += 1
        self._answers.arrived(sequence)
        answer = workload.parse_echo_reply(reply)
        if (
            answer is None
            or (answer.sequence, answer.status) != (sequence, workload.STATUS_OK)
            or answer.data != workload.transform(pushed_data(sequence, size), sequence)
        ):
            self.push_tally.corrupted += 1

    # ---- save and restore ----------------------------------------------------------------------------------------

    def _save_packet(self, _: ServerChannel, packet: Packet, buffer: memoryview) -> int:
        if len(buffer) >= _SAVED_PACKET.size:
            _SAVED_PACKET.pack_into(buffer, 0, *packet.pointer)
        return _SAVED_PACKET.size

    def _restore_packet(self, channel: ServerChannel, lib_buf: bytes, save_buf: bytes) -> None:
        packet = channel.allocate_packet()
        channel.restore_packet(packet, lib_buf)
        packet.pointer = _SAVED_PACKET.unpack(save_buf)
        packet.completion_routine = self._push_completed

    def save(self) -> LineState:
        """What a restore needs."""
        return LineState(
            index=self.index,
            next_sequence=self._sequence.next,
            tally=TallyState.of(self.tally),
            pushed=self.pushed,
            next_answer=self._answers.next,
            push_tally=TallyState.of(self.push_tally),
            mapped=list(self._mapped),
        )

    def restore(self, state: LineState) -> None:
        """It again."""
        state.tally.load_into(self.tally)
        self._sequence.next = state.next_sequence
        self.pushed = state.pushed
        state.push_tally.load_into(self.push_tally)
        self._answers.next = state.next_answer
        self._mapped = dict.fromkeys(state.mapped)


_HANDLERS: dict[int, Callable[[Line, int, bytes], bytes]] = {
    Op.STATION: Line._which,
    Op.SUBCHANNELS: Line._subchannels,
    Op.WITHDRAW: Line._withdraw,
    Op.OFFER: Line._offer,
    Op.UNPLUG: Line._unplug,
    Op.PLUG: Line._plug,
    Op.GPADL: Line._gpadl,
    Op.UNMAP: Line._unmap,
    Op.PUSH: Line._push,
    Op.STATS: Line._stats,
}


class Station:
    """One station. `lines`: its channels by sub-channel index, those that are withdrawn included."""

    def __init__(
        self,
        host: Host,
        number: int,
        make_channel: Callable[[int], ServerChannel],
        plug_another: Callable[[int, bool], Status],
    ) -> None:
        """`plug_another(number, whether)` plugs or unplugs another station of the lab."""
        self.host = host
        self.number = number
        self.make_channel = make_channel
        self._plug_another = plug_another
        self.lines: dict[int, Line] = {0: Line(self, 0)}

    def start(self) -> None:
        """Offer it."""
        self.lines[0].offer()

    def plug_another(self, number: int, plugged: bool) -> Status:
        """Plug or unplug another one. A station cannot withdraw itself: who asked would never hear of it."""
        return Status.MALFORMED if number == self.number else self._plug_another(number, plugged)

    def line(self, index: int) -> Line:
        """The channel with that index; made if need be, and then not offered yet."""
        if index not in self.lines:
            self.lines[index] = Line(self, index)
        return self.lines[index]

    @property
    def plugged(self) -> bool:
        """Whether it is offered."""
        return self.lines[0].channel.state is not ChannelState.DISABLED

    def plug(self, plugged: bool) -> None:
        """Offer the station, or rescind it with its sub-channels. Repeating it does nothing."""
        if plugged:
            self.lines[0].offer()
            return
        self.set_subchannels(0)
        self.lines[0].withdraw()

    def set_subchannels(self, count: int) -> None:
        """Sub-channels 1 to `count` are offered, others withdrawn."""
        for index in range(1, count + 1):
            self.line(index).offer()
        for index, line in self.lines.items():
            if index > count:
                line.withdraw()

    def was_closed(self) -> None:
        """The guest has closed the primary channel: the next one asks for sub-channels of its own."""
        self.host.call_soon(self._tidy)

    def _tidy(self) -> None:
        if self.lines[0].channel.state not in _IN_USE:
            self.set_subchannels(0)

    @property
    def open(self) -> int:
        """How many of its channels the guest has open."""
        return sum(line.channel.state in _IN_USE for line in self.lines.values())

    def save(self) -> StationState:
        """What a restore needs."""
        present = [line for line in self.lines.values() if line.channel.state is not ChannelState.DISABLED]
        return StationState(self.plugged, [line.save() for line in present])

    def restore(self, state: StationState) -> None:
        """It again; sub-channels are made anew."""
        for saved in state.lines:
            line = self.line(saved.index)
            line.offer()
            line.restore(saved)
        if not state.plugged:
            self.lines[0].withdraw()
