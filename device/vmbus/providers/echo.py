"""Echo: answers each request with a transform of its data, inline or in place in the guest's memory.

With `hold` it keeps that many requests back, oldest first out, as a device that works on them would: so there are
incoming packets to be finished when the device is paused. When no request has come for `hold_seconds` to twice that
time, those that are held are answered anyway. A request whose answer could never fit into the guest's ring is refused.

Data in the guest's memory is transformed in slices, since a request may describe much of it; requests behind such a one
wait for their turn.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Annotated, Any
from uuid import UUID
from zlib import crc32

import msgspec

from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.server import ServerChannel
from vmbus.kmcl.status import KmclError
from vmbus.providers.base import Bound, Host, Provider, Timer
from vmbus.providers.saved import TallyState
from vmbus.providers.slices import PIECE, Slices, transformed
from vmbus.util.records import U64, Count
from vmbus.wire import workload
from vmbus.wire.workload import STATUS_CORRUPT, STATUS_MALFORMED, STATUS_OK, TABLES

_REQUEST_SIZE = workload.ECHO_REQUEST.size
_REPLY_SIZE = workload.ECHO_REPLY.size
_unpack_request = workload.ECHO_REQUEST.unpack_from
_pack_reply = workload.ECHO_REPLY.pack
_LAST = workload.LAST


class EchoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`hold`: requests kept back; `hold_seconds`: until when no more came."""

    hold: Annotated[int, msgspec.Meta(ge=0, le=65536)] = 0
    hold_seconds: Annotated[float, msgspec.Meta(gt=0, le=10)] = 0.05


class _State(msgspec.Struct, frozen=True):
    next_sequence: U64
    tally: TallyState
    finished_at_suspend: Count


_decoder = msgspec.msgpack.Decoder(_State)


class EchoProvider(Provider):
    """See the module's text."""

    kind = "echo"
    Options = EchoOptions

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        self.tally = workload.Tally()
        self.finished_at_suspend = 0
        self._sequence = workload.Sequence(self.tally)
        self._held: deque[tuple[Completion, bytes]] = deque()
        self._timer: Timer | None = None
        self._arrivals_at_timer = 0
        self._hold: int = self.options.hold
        self._slices = Slices(host)
        self.channel = ServerChannel(workload.ECHO_TYPE, instance, name=name)

    def start(self) -> None:
        self.channel.set_process_packet_callbacks(self._keep if self._hold else self._process)
        self.channel.set_state_change_callbacks(opened=self._opened, closed=self._closed, suspend=self._suspend)
        self.host.add_channel(self.channel)
        self.channel.enable()
        self.channel.start()

    def stop(self) -> None:
        self._cancel_timer()

    def _opened(self, _: Channel) -> None:
        # A new open is a new run: the guest numbers from 0 again.
        self._sequence.next = 0
        self._held.clear()

    def _closed(self, channel: Channel) -> None:
        self._slices.drop(channel)

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        self._answer(completion, payload)

    def _keep(self, _: Channel, completion: Completion, payload: bytes) -> None:
        """With `hold`: this one is kept, and the oldest answered if there are too many."""
        self._held.append((completion, payload))
        if len(self._held) > self._hold:
            self._answer(*self._held.popleft())
        if self._timer is None:
            self._set_timer()

    def _set_timer(self) -> None:
        self._arrivals_at_timer = self.channel.counters["received"]
        self._timer = self.host.call_later(self.options.hold_seconds, self._time_passed)

    def _time_passed(self) -> None:
        self._timer = None
        if self.channel.counters["received"] != self._arrivals_at_timer:
            self._set_timer()
        else:
            self._release()

    def _release(self) -> None:
        with self.channel.batch():
            while self._held:
                self._answer(*self._held.popleft())

    def _suspend(self, _: Channel) -> None:
        self._cancel_timer()
        self.finished_at_suspend += len(self._held)
        self._release()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _answer(self, completion: Completion, payload: bytes, waited: bool = False) -> None:
        """Answer at once, unless data is outside, or others wait: then in slices (`waited`: it has)."""
        # The benchmark measures the way here and back: what this takes itself is kept small.
        if (completion.has_external_data or self._slices.late) and not waited:
            self._slices.do(self.channel, self._answered(completion, payload))
            return
        tally = self.tally
        tally.started += 1
        if len(payload) < _REQUEST_SIZE:
            completion.complete(_pack_reply(0, 0, 0, STATUS_MALFORMED, 0))
            return
        sequence, length, crc = _unpack_request(payload)
        sequences = self._sequence
        if sequence == sequences.next < _LAST:
            sequences.next = sequence + 1
        else:
            sequences.arrived(sequence)
        data = payload[_REQUEST_SIZE : _REQUEST_SIZE + length]
        if crc32(data) != crc or len(data) != length or length > self.channel.largest_payload - _REPLY_SIZE:
            tally.corrupted += 1
            completion.complete(_pack_reply(sequence, 0, 0, STATUS_CORRUPT, 0))
            return
        answer = data.translate(TABLES[(sequence * 31 + 7) & 0xFF])  # `transform`
        tally.completed += 1
        completion.complete(_pack_reply(sequence, length, crc32(answer), STATUS_OK, 0) + answer)

    def _answered(self, completion: Completion, payload: bytes) -> Iterator[int]:
        """The same as work in slices, also for data in the guest's memory."""
        yield PIECE
        if not completion.has_external_data or len(payload) < _REQUEST_SIZE:
            self._answer(completion, payload, waited=True)
            return
        tally = self.tally
        tally.started += 1
        sequence, length, crc = _unpack_request(payload)
        self._sequence.arrived(sequence)
        try:
            grant = completion.external_data()
        except KmclError:
            completion.complete(_pack_reply(sequence, 0, 0, STATUS_MALFORMED, 0))
            return
        answer = yield from transformed(grant.views, length, crc, sequence)
        if answer is None:
            tally.corrupted += 1
            completion.complete(_pack_reply(sequence, 0, 0, STATUS_CORRUPT, 0))
            return
        tally.completed += 1
        completion.complete(_pack_reply(sequence, length, answer, STATUS_OK, 0))

    def save(self) -> bytes:
        return msgspec.msgpack.encode(_State(self._sequence.next, TallyState.of(self.tally), self.finished_at_suspend))

    def check(self, state: bytes) -> None:
        self.decoded(_decoder, state)

    def restore(self, state: bytes) -> None:
        saved = self.decoded(_decoder, state)
        saved.tally.load_into(self.tally)
        self._sequence.next = saved.next_sequence
        self.finished_at_suspend = saved.finished_at_suspend

    def status(self) -> dict[str, Any]:
        return {
            "held": len(self._held),
            "finished_at_suspend": self.finished_at_suspend,
            "tally": self.tally.as_dict(),
        }

    def bounds(self) -> dict[str, Bound]:
        return {"work in a turn": Bound(self._slices.waiting, None, self._slices.reached)}
