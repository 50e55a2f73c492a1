"""One connection: a channel of the guest's and a unix stream of the host's, joined until both have ended.

Both directions are bounded. To the guest: bytes are read from the stream only while all that was read before is in the
ring, whose size the guest has chosen. To the host: what its program does not read is kept up to `HIGH` bytes, and then
the packet that came last is not completed, so that the channel is not read on (its quota is one) and the guest's ring
fills. Nothing is polled while an end is slow.

The guest is told of the end by a FIN, the last packet and one without data; the channel is rescinded when both ends
have sent theirs and everything has been delivered. Linux's own end of a channel ends with that RESCIND and with nothing
else. So whatever happens, each connection comes to it: after a refusal or a failure soon, and else when there is nobody
left who could make it move (`LINGER_SECONDS`).
"""

from collections import deque
from collections.abc import Callable
from itertools import islice

from vmbus.errors import PeerError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.server import ServerChannel
from vmbus.kmcl.status import Status
from vmbus.providers.base import Host, Timer
from vmbus.providers.vsock.states import GUEST_SENDS, HOST_SENDS, OPEN, Event, State, next_state
from vmbus.providers.vsock.streams import Stream
from vmbus.util.complaints import bounded_log
from vmbus.wire.hvsock import FIN, HvSockError, pack, unpack
from vmbus.wire.packet import OVERHEAD

log = bounded_log(__name__)

CHUNK = 8192
"""Bytes of data in one packet to the guest, at most; and never more than a third of its ring."""
TURN_BYTES = 64 << 10
"""Bytes that are read from a stream before others get their turn."""
HIGH = 64 << 10
"""Bytes for a slow program of the host's from which on the guest's packets stay in the ring."""
MOST_KEPT = 1 << 20
"""Bytes for a slow program of the host's: each pause of the device may let one more packet in."""
LINGER_SECONDS = 5.0
SETTLE_SECONDS = 0.02
_SETTLE_TRIES = 50
_PIECES = 64  # given to the host's program in one call

COUNTERS = ("to_guest", "to_host", "discarded", "wrong", "lingered")


class Connection:
    """See the module's text.

    Attributes:
        channel: its channel, which is not enabled yet. port: the listener's, of either side.
        state: see `vmbus.providers.vsock.states`. was_open: whether the guest has opened it.
        kept: bytes that wait for the host's program.
    """

    def __init__(
        self,
        host: Host,
        channel: ServerChannel,
        port: int,
        counters: dict[str, int],
        stream: Stream | None,
        on_opened: Callable[["Connection"], Stream | None],
        on_over: Callable[["Connection"], None],
        on_ended: Callable[["Connection"], None],
    ) -> None:
        """
        Args:
            counters: with COUNTERS in it, shared by all.
            stream: the host's end, if it is there already.
            on_opened: called when the guest has opened the channel; returns the host's end, None to refuse.
            on_over: called when nothing moves any more, soon after which the channel is withdrawn.
            on_ended: called to have it withdrawn.
        """
        self._host = host
        self.channel = channel
        self.port = port
        self.state = State.OFFERED
        self.was_open = False
        self.kept = 0
        self._counters = counters
        self._on_opened = on_opened
        self._on_over = on_over
        self._on_ended = on_ended
        self._stream = stream
        self._chunk = CHUNK
        self._pieces: deque[bytes] = deque()  # for the host
        self._held: Completion | None = None
        self._queued = 0  # packets that wait for room in the ring
        self._fin_in_ring = False
        self._told_host = False  # that the guest has ended
        self._nobody_reads = False  # at the host's end
        self._hung_up = False
        self._heard = False  # of the guest since it opened the channel
        self._progress = 0
        self._reading = self._writing = False
        self._timer: Timer | None = None
        channel.set_process_packet_callbacks(self._process, self._end_of_batch)
        channel.set_state_change_callbacks(
            opened=self._opened, started=self._started, suspend=self._suspend, closed=self._closed
        )
        channel.set_transaction_quota(1)

    @property
    def name(self) -> str:
        return self.channel.name

    def _move(self, event: Event) -> None:
        self.state = next_state(self.state, event, self.name)

    # ---- the beginning ---------------------------------------------------------------------------------------------

    def offer(self, seconds: float) -> None:
        """Offer it; the guest has so many seconds to open it. Raises what `ServerChannel.enable` does."""
        self._host.add_channel(self.channel)
        self.channel.enable()
        self.channel.start()
        self._timer = self._host.call_later(seconds, self.over)

    def _opened(self, _: Channel) -> None:
        self._cancel_timer()
        self._move(Event.OPENED)
        self.was_open = True
        self._chunk = max(1, min(CHUNK, (self.channel.largest_payload + OVERHEAD) // 3 - 2 * OVERHEAD))
        self._stream = self._on_opened(self)

    def _started(self, _: Channel) -> None:
        """For the first time, or after a pause."""
        if self.state is State.FLOWING and self._stream is None:
            # The guest's program hears of it at once by a FIN; a channel that is rescinded before the guest is ready
            # would have it wait until its own time is over.
            self._nobody_reads = True
            self._end_of_host()
            self.over()
        else:
            self._flush()

    # ---- to the guest ----------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        stream = self._stream
        left = TURN_BYTES
        with self.channel.batch():
            while stream is not None and self.state in HOST_SENDS and not self._queued and left > 0:
                data = stream.read(self._chunk)
                if data is None:
                    break
                if not data:
                    self._hung_up = stream.hung_up
                    self._end_of_host()
                    break
                left -= len(data)
                self._counters["to_guest"] += len(data)
                self._send(pack(data))
        self._look()

    def _end_of_host(self) -> None:
        self._move(Event.HOST_END)
        self._send(FIN)

    def _send(self, payload: bytes) -> None:
        packet = self.channel.allocate_packet()
        packet.pointer = payload is FIN
        packet.completion_routine = self._sent
        self._queued += 1
        packet.send(payload, wait_for_completion=False)

    def _sent(self, packet: Packet, status: int, _: bytes) -> None:
        """A packet is in the ring, or its channel was closed."""
        fin = packet.pointer
        packet.free()
        self._queued -= 1
        self._progress += 1
        if status == Status.SUCCESS:
            self._fin_in_ring |= fin
            if not self._queued:
                self._look()

    # ---- to the host -----------------------------------------------------------------------------------------------

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        self._heard = True
        try:
            data = unpack(payload)
            if self.state is not State.ENDING and self.state not in GUEST_SENDS:
                raise HvSockError("a packet behind the end of the guest's bytes")
        except HvSockError as error:
            self._counters["wrong"] += 1
            completion.fail(str(error))
            return
        if self.state is State.ENDING:
            self._counters["discarded"] += len(data)
        elif data:
            self._keep(data)
            if self.kept > HIGH:
                self._held = completion
                return
        else:
            self._move(Event.GUEST_FIN)
        completion.complete()

    def _end_of_batch(self, _: Channel, count: int) -> None:
        self._flush()

    def _keep(self, data: bytes) -> None:
        self._pieces.append(data)
        self.kept += len(data)

    def _flush(self) -> None:
        """Give the host's program what it takes, and see what follows from that."""
        while self._pieces and self._stream is not None and not self._nobody_reads:
            count = self._stream.write(list(islice(self._pieces, _PIECES)))
            if count is None:
                self._nobody_reads = True
            elif not count:
                break
            else:
                self._took(count)
        if self._nobody_reads:
            self._discard()
        if self.kept > MOST_KEPT:
            log.warning("connection %s: its program on the host has left %d bytes unread", self.name, self.kept)
            self.over()
        if self._held is not None and self.kept <= HIGH // 2:
            self._release()
        self._look()

    def _took(self, count: int) -> None:
        self.kept -= count
        self._counters["to_host"] += count
        while count:
            piece = self._pieces.popleft()
            if len(piece) > count:
                self._pieces.appendleft(piece[count:])
                return
            count -= len(piece)

    def _discard(self) -> None:
        self._counters["discarded"] += self.kept
        self._pieces.clear()
        self.kept = 0

    def _release(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.complete()

    def _suspend(self, _: Channel) -> None:
        self._release()

    # ---- what follows ----------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """After anything has moved: watch what there is to wait for, and see whether this is the end."""
        stream = self._stream
        if stream is None or self.state not in OPEN:
            return
        done = self.state in (State.GUEST_DONE, State.BOTH_DONE)
        if done and not self._pieces and not self._told_host:
            self._told_host = True
            stream.end_writing()
        if self._fin_in_ring and not self._pieces and (self._nobody_reads or self.state is State.BOTH_DONE):
            self.over()
            return
        self._watch(reading=self.state in HOST_SENDS and not self._queued, writing=bool(self._pieces))
        if self._timer is None and self._stuck:
            self._timer = self._host.call_later(LINGER_SECONDS, self._linger(self._progress))

    @property
    def _stuck(self) -> bool:
        """Whether one end has left, as far as can be told, and the other one may never come to its own end: a guest
        that has ended its sending and does not read either, a program of the host's that has gone."""
        gone = self.state in (State.GUEST_DONE, State.BOTH_DONE) and self._queued > 0
        return gone or (self._hung_up and self.state is State.HOST_DONE)

    def _linger(self, progress: int) -> Callable[[], None]:
        def due() -> None:
            self._timer = None
            if self.state in OPEN and self._stuck and progress == self._progress:
                self._counters["lingered"] += 1
                self.over()
            else:
                self._look()

        return due

    def _watch(self, *, reading: bool, writing: bool) -> None:
        stream = self._stream
        if stream is None:
            return
        if reading is not self._reading:
            self._reading = reading
            if reading:
                self._host.add_reader(stream.fd, self._readable)
            else:
                self._host.remove_reader(stream.fd)
        if writing is not self._writing:
            self._writing = writing
            if writing:
                self._host.add_writer(stream.fd, self._flush)
            else:
                self._host.remove_writer(stream.fd)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def over(self) -> None:
        """Nothing moves any more; the channel is withdrawn soon. Repeating it does nothing."""
        if self.state in (State.ENDING, State.ENDED):
            return
        self._move(Event.OVER)
        self.close()
        self._on_over(self)
        self._timer = self._host.call_later(0.0, self._settle(_SETTLE_TRIES) if self.was_open else self._end)

    def close(self) -> None:
        """Let go of the host's end, and call nothing any more."""
        self._cancel_timer()
        self._watch(reading=False, writing=False)
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._discard()
        self._release()

    def _settle(self, tries: int) -> Callable[[], None]:
        """A guest that was told that its channel is open has yet to see to it; a RESCIND that overtakes that would be
        a failed open. Linux shows that it is ready in its ring; others are given their time."""

        def look() -> None:
            if tries and not self._guest_is_ready():
                self._timer = self._host.call_later(SETTLE_SECONDS, self._settle(tries - 1))
            else:
                self._end()

        return look

    def _guest_is_ready(self) -> bool:
        rings = self.channel.rings
        if rings is None or self._heard:
            return True
        try:
            return rings[0].describe()["pending_send_size"] != 0
        except PeerError:
            return True

    def _closed(self, _: Channel) -> None:
        self._held = None
        if self.state in OPEN:
            self._flush_last()
            self.over()

    def _flush_last(self) -> None:
        """What the guest had said before: as much as goes now."""
        if self._stream is not None and self._pieces and not self._nobody_reads:
            count = self._stream.write(list(islice(self._pieces, _PIECES)))
            if count:
                self._took(count)

    def _end(self) -> None:
        self._timer = None
        self._move(Event.RESCINDED)
        self._on_ended(self)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
