"""A station of the lab: a primary channel with sub-channels, which does what it is asked for on any of them.

What must outlive a save: the books of each channel, which packets were pushed (their numbers travel with them), which
GPADLs are mapped. A mapping itself ends with the process; it is made again before the next packet is taken.

Requests are done in slices (`vmbus.providers.slices`), one after the other for the whole lab: one can ask for hundreds
of sub-channels, thousands of packets or megabytes of data, and a ring is full of them. What all stations together may
have is in `Shared`.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from struct import Struct
from typing import Annotated
from zlib import crc32

import msgspec

from vmbus.bus.gpadl import MAX_GPADLS
from vmbus.errors import StateError, UsageError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.server import ServerChannel
from vmbus.kmcl.status import KmclError
from vmbus.kmcl.status import Status as PacketStatus
from vmbus.memory.guest import Grant, first_bytes
from vmbus.providers.base import Bound, Host
from vmbus.providers.saved import TallyState
from vmbus.providers.slices import BEHIND, PIECE, STEP, Slices, transformed
from vmbus.util.records import U32, U64, Count
from vmbus.wire import workload
from vmbus.wire.lab import (
    HANDLE,
    HEAD,
    KEEP,
    MAXIMUM_PUSH,
    MAXIMUM_PUSH_SIZE,
    MAXIMUM_SUBCHANNELS,
    MOST_LAB_SUBCHANNELS,
    MOST_PUSHED,
    MOST_PUSHED_BYTES,
    REPLY,
    SIZE,
    Op,
    Stats,
    Status,
    pushed_data,
)

_SAVED_PACKET = Struct("<QI")
_IN_USE = frozenset({ChannelState.OPENED, ChannelState.ACTIVE, ChannelState.CLOSING})


_OFFER = 32 << 10
"""What it costs to offer or withdraw a channel."""

Reply = bytes | Generator[int, None, bytes]


class Shared:
    """What the stations of a lab have in common: the work that waits, and what they may have of anything.

    Attributes:
        packets, data: pushed packets that wait for their answers, those among them that are still to be sent, and their
            bytes. subchannels: that are offered. busy: how often more was asked for than there may be.
    """

    def __init__(self, host: Host) -> None:
        self.slices = Slices(host)
        self.packets = 0
        self.data = 0
        self.subchannels = 0
        self.busy = 0

    def take(self, packets: int, size: int) -> bool:
        """Take room for so many packets of that size; whether there was."""
        if self.packets + packets > MOST_PUSHED or self.data + packets * size > MOST_PUSHED_BYTES:
            self.busy += 1
            return False
        self.give(-packets, size)
        return True

    def give(self, packets: int, size: int) -> None:
        self.packets -= packets
        self.data -= packets * size

    def bounds(self) -> dict[str, Bound]:
        return {
            "pushed packets": Bound(self.packets, MOST_PUSHED, self.busy),
            "pushed bytes": Bound(self.data, MOST_PUSHED_BYTES, self.busy),
            "sub-channels": Bound(self.subchannels, MOST_LAB_SUBCHANNELS, self.busy),
            "work in a turn": Bound(self.slices.waiting, None, self.slices.reached),
        }


class LineState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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
    def __init__(self, station: "Station", index: int) -> None:
        self._station = station
        self._shared = station.shared
        self.index = index
        self.channel = station.make_channel(index)
        self.channel.set_process_packet_callbacks(self._process)
        self.channel.set_state_change_callbacks(opened=self._opened, started=self._started, closed=self._closed)
        self.channel.set_save_restore_packet_callbacks(self._save_packet, self._take_packet)
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
        """Have the guest know it. Repeating it does nothing. Raises UsageError when there are too many channels."""
        if self.channel.state is ChannelState.DISABLED:
            shared = self._shared
            if self.index and shared.subchannels >= MOST_LAB_SUBCHANNELS:
                raise UsageError(
                    f"channel {self.channel.name}: the lab has {MOST_LAB_SUBCHANNELS} sub-channels already"
                )
            self._station.host.add_channel(self.channel)
            self.channel.enable()
            shared.subchannels += bool(self.index)
            self.channel.start()

    def rest(self) -> None:
        """Take no more requests: it is about to be withdrawn."""
        if self.channel.state is not ChannelState.DISABLED:
            self.channel.begin_pause()

    def withdraw(self) -> None:
        """Rescind it. Repeating it does nothing."""
        if self.channel.state is not ChannelState.DISABLED:
            self.channel.disable()
            self._shared.subchannels -= bool(self.index)

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

    def _closed(self, channel: Channel) -> None:
        self._shared.slices.drop(channel)
        for handle, grant in self._mapped.items():
            if grant is not None:
                self.channel.unmap_gpadl(handle)
        self._mapped.clear()
        if not self.index:
            self._station.was_closed()

    def _process(self, channel: Channel, completion: Completion, payload: bytes) -> None:
        self._shared.slices.do(channel, self._request(completion, payload))

    def _request(self, completion: Completion, payload: bytes) -> Iterator[int]:
        yield PIECE + len(payload)
        try:
            if len(payload) < HEAD.size:
                completion.complete(REPLY.pack(Status.MALFORMED, 0))
                return
            op, argument = HEAD.unpack_from(payload)
            if op == Op.ECHO:
                yield from self._echo(completion, payload[HEAD.size :])
                return
            handler = _HANDLERS.get(op)
            if handler is None:
                completion.complete(REPLY.pack(Status.MALFORMED, 0))
                return
            reply = handler(self, argument, payload[HEAD.size :])
            completion.complete(reply if isinstance(reply, bytes) else (yield from reply))
        except Exception as error:
            # It may be a later turn, in which nobody else would know whose request this was.
            if self.channel.on_owner_error is not None:
                self.channel.on_owner_error("process_packet", error)
            self.channel.fail(f"packet {completion.transaction}: {error!r}")

    # ---- requests ------------------------------------------------------------------------------------------------

    def _echo(self, completion: Completion, body: bytes) -> Iterator[int]:
        views: Sequence[memoryview] | None = None
        if completion.has_external_data:
            try:
                views = completion.external_data().views
            except KmclError:
                completion.complete(workload.ECHO_REPLY.pack(0, 0, 0, workload.STATUS_MALFORMED, 0))
                return
        completion.complete((yield from self.answer(body, views)))

    def answer(self, body: bytes, views: Sequence[memoryview] | None) -> Generator[int, None, bytes]:
        """The reply to an echo request; data in `views`, if any, is transformed in place."""
        self.tally.started += 1
        if len(body) < workload.ECHO_REQUEST.size:
            self.tally.corrupted += 1
            return workload.ECHO_REPLY.pack(0, 0, 0, workload.STATUS_MALFORMED, 0)
        sequence, length, crc = workload.ECHO_REQUEST.unpack_from(body)
        self._sequence.arrived(sequence)
        start = workload.ECHO_REQUEST.size
        answer: bytes = b""
        found: int | None = None
        if views is not None:
            found = yield from transformed(first_bytes(views, length), length, crc, sequence)
        else:
            data = body[start : start + length]
            room = self.channel.largest_payload - workload.ECHO_REPLY.size
            if len(data) == length <= room and crc32(data) == crc:
                answer = workload.transform(data, sequence)
                found = crc32(answer)
        if found is None:
            self.tally.corrupted += 1
            return workload.ECHO_REPLY.pack(sequence, 0, 0, workload.STATUS_CORRUPT, 0)
        self.tally.completed += 1
        return workload.ECHO_REPLY.pack(sequence, length, found, workload.STATUS_OK, 0) + answer

    def _which(self, argument: int, body: bytes) -> Reply:
        return REPLY.pack(Status.OK, self._station.number)

    def _subchannels(self, argument: int, body: bytes) -> Reply:
        if self.index or argument > MAXIMUM_SUBCHANNELS:
            return REPLY.pack(Status.MALFORMED, 0)
        return self._subchannels_set(argument)

    def _subchannels_set(self, count: int) -> Generator[int, None, bytes]:
        try:
            yield from self._station.set_subchannels(count)
        except UsageError:
            self._shared.busy += 1
            return REPLY.pack(Status.BUSY, count)
        return REPLY.pack(Status.OK, count)

    def _withdraw(self, argument: int, body: bytes) -> Reply:
        if self.index or not 0 < argument <= MAXIMUM_SUBCHANNELS:
            return REPLY.pack(Status.NOT_THERE, argument)
        return self._withdrawn(self._station, [self._station.line(argument)], argument)

    def _offer(self, argument: int, body: bytes) -> Reply:
        if self.index or not 0 < argument <= MAXIMUM_SUBCHANNELS:
            return REPLY.pack(Status.NOT_THERE, argument)
        return self._offered(self._station.line(argument).offer, argument)

    def _unplug(self, argument: int, body: bytes) -> Reply:
        other = self._station.other(argument)
        if not isinstance(other, Station):
            return REPLY.pack(other, argument)
        return self._withdrawn(other, [*reversed(other.lines.values())], argument)

    def _plug(self, argument: int, body: bytes) -> Reply:
        other = self._station.other(argument)
        if not isinstance(other, Station):
            return REPLY.pack(other, argument)
        return self._offered(partial(other.plug, True), argument)

    def _withdrawn(self, station: "Station", lines: list["Line"], argument: int) -> Generator[int, None, bytes]:
        yield from station.withdraw(lines)
        return REPLY.pack(Status.OK, argument)

    def _offered(self, offer: Callable[[], None], argument: int) -> Generator[int, None, bytes]:
        try:
            offer()
        except UsageError:
            self._shared.busy += 1
            return REPLY.pack(Status.BUSY, argument)
        yield _OFFER
        return REPLY.pack(Status.OK, argument)

    def _gpadl(self, argument: int, body: bytes) -> Reply:
        if len(body) < HANDLE.size:
            return REPLY.pack(Status.MALFORMED, 0)
        return self._gpadl_transformed(argument, body)

    def _gpadl_transformed(self, argument: int, body: bytes) -> Generator[int, None, bytes]:
        handle, _ = HANDLE.unpack_from(body)
        kept = self._mapped.get(handle)
        try:
            grant = kept or self.channel.map_gpadl(handle)
        except KmclError:
            return workload.ECHO_REPLY.pack(0, 0, 0, workload.STATUS_MALFORMED, 0)
        reply = yield from self.answer(body[HANDLE.size :], grant.views)
        if argument & KEEP:
            self._mapped[handle] = grant
        elif kept is None:
            self.channel.unmap_gpadl(handle)
        return reply

    def _unmap(self, argument: int, body: bytes) -> Reply:
        if self._mapped.pop(argument, None) is None:
            return REPLY.pack(Status.NOT_THERE, argument)
        self.channel.unmap_gpadl(argument)
        return REPLY.pack(Status.OK, argument)

    def _stats(self, argument: int, body: bytes) -> Reply:
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

    def _push(self, argument: int, body: bytes) -> Reply:
        size = SIZE.unpack_from(body)[0] if len(body) >= SIZE.size else 0
        room = self.channel.largest_payload - workload.ECHO_REQUEST.size
        if argument > MAXIMUM_PUSH or not 0 < size <= min(MAXIMUM_PUSH_SIZE, room):
            return REPLY.pack(Status.MALFORMED, 0)
        return self._push_all(argument, size)

    def _push_all(self, count: int, size: int) -> Generator[int, None, bytes]:
        """Send so many packets, in steps; also while the device comes to rest: then they queue."""
        if not self._shared.take(count, size):
            return REPLY.pack(Status.BUSY, count)
        left = count
        try:
            while left and self._sends:
                cost = 0
                with self.channel.batch():
                    while left and cost < STEP and self._sends:
                        self._push_one(size)
                        left -= 1
                        cost += PIECE + size
                yield cost
        finally:
            self._shared.give(left, size)  # the channel has closed meanwhile
        return REPLY.pack(Status.OK, count)

    @property
    def _sends(self) -> bool:
        return self.channel.state in (ChannelState.OPENED, ChannelState.ACTIVE)

    def _push_one(self, size: int) -> None:
        sequence = self.pushed
        packet = self.channel.allocate_packet()
        packet.pointer = (sequence, size)
        packet.completion_routine = self._push_completed
        packet.send(workload.echo_request(sequence, pushed_data(sequence, size), inline=True))
        self.pushed += 1
        self.push_tally.started += 1

    def _push_completed(self, packet: Packet, status: int, reply: bytes) -> None:
        sequence, size = packet.pointer
        packet.free()
        self._shared.give(1, size)
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

    def _take_packet(self, channel: ServerChannel, lib_buf: bytes, save_buf: bytes) -> None:
        self._restore_packet(channel, lib_buf, save_buf)
        self._shared.give(-1, _SAVED_PACKET.unpack(save_buf)[1])

    def save(self) -> LineState:
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
        state.tally.load_into(self.tally)
        self._sequence.next = state.next_sequence
        self.pushed = state.pushed
        state.push_tally.load_into(self.push_tally)
        self._answers.next = state.next_answer
        self._mapped = dict.fromkeys(state.mapped)


_HANDLERS: dict[int, Callable[[Line, int, bytes], Reply]] = {
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
        shared: Shared,
        number: int,
        make_channel: Callable[[int], ServerChannel],
        find: Callable[[int], "Station | None"],
    ) -> None:
        """`find(number)` is a station of the lab."""
        self.host = host
        self.shared = shared
        self.number = number
        self.make_channel = make_channel
        self._find = find
        self.lines: dict[int, Line] = {0: Line(self, 0)}

    def start(self) -> None:
        self.lines[0].offer()

    def other(self, number: int) -> "Station | Status":
        """Another one of the lab. A station cannot withdraw itself: who asked would never hear of it."""
        return Status.MALFORMED if number == self.number else self._find(number) or Status.NOT_THERE

    def line(self, index: int) -> Line:
        """The channel with that index; made if need be, and then not offered yet."""
        if index not in self.lines:
            self.lines[index] = Line(self, index)
        return self.lines[index]

    @property
    def plugged(self) -> bool:
        return self.lines[0].channel.state is not ChannelState.DISABLED

    def plug(self, plugged: bool) -> None:
        """Offer the station, or rescind it with its sub-channels. Repeating it does nothing."""
        if plugged:
            self.lines[0].offer()
            return
        for line in reversed(self.lines.values()):
            line.withdraw()

    def set_subchannels(self, count: int) -> Iterator[int]:
        """Sub-channels 1 to `count` are offered, others withdrawn, in steps. Raises UsageError for too many."""
        yield from self.withdraw([line for index, line in self.lines.items() if index > count])
        for index in range(1, count + 1):
            self.line(index).offer()
            yield _OFFER

    def withdraw(self, lines: Sequence["Line"]) -> Iterator[int]:
        """Withdraw channels, in steps: what was asked for on them before is answered first."""
        there = [line for line in lines if line.channel.state is not ChannelState.DISABLED]
        for line in there:
            line.rest()
        if any(line.channel.outstanding for line in there):
            yield BEHIND
        for line in there:
            line.withdraw()
            yield _OFFER

    def was_closed(self) -> None:
        """The guest has closed the primary channel: the next one asks for sub-channels of its own."""
        self.host.call_soon(self._tidy)

    def _tidy(self) -> None:
        if self.lines[0].channel.state not in _IN_USE:
            self.shared.slices.do(self, self.set_subchannels(0))

    @property
    def open(self) -> int:
        return sum(line.channel.state in _IN_USE for line in self.lines.values())

    def save(self) -> StationState:
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
