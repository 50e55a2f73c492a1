"""A channel: what both endpoints share.

Packets leave in the order of their sends. Three places can hold one: the channel's queue (no room in the ring, or the
channel is paused), the ring, and the other end. Completions of incoming packets share the queue, so that order holds
between the two kinds as well.

Everything here runs on one thread and never waits. Whoever carries the channel calls `process` when the other end has
signalled; the `Link` carries signals the other way.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from vmbus.errors import PeerError
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet, PacketState
from vmbus.kmcl.states import ChannelEvent, ChannelState, next_state
from vmbus.kmcl.status import ChannelStateError, KmclError, Status
from vmbus.memory import GuestMemory
from vmbus.ring import RingReader, RingWriter
from vmbus.wire.gpa import range_for
from vmbus.wire.packet import FLAG_COMPLETION_REQUESTED, OVERHEAD, PacketType, RawPacket, gpa_direct_body, packet_size

log = logging.getLogger(__name__)

_INBAND = int(PacketType.INBAND)
_GPA_DIRECT = int(PacketType.GPA_DIRECT)
_COMPLETION = int(PacketType.COMPLETION)

# Looking a member up in an Enum class takes longer than a global, which counts where it is done for every packet.
_OPENED = ChannelState.OPENED
_ACTIVE = ChannelState.ACTIVE
_CLOSING = ChannelState.CLOSING
_IDLE = PacketState.IDLE
_SENT = PacketState.SENT
_SUCCESS = Status.SUCCESS

DEFAULT_MAXIMUM_PACKET_SIZE = 65536
DEFAULT_MAXIMUM_EXTERNAL_DATA = 16 << 20
# Batches handed to the owner before other channels get their turn.
BATCHES_PER_TURN = 2


class Link(Protocol):
    """What carries an open channel: its rings, its memory, and the signals to the other end and to the event loop."""

    reader: RingReader
    writer: RingWriter
    memory: GuestMemory

    def signal(self) -> None:
        """Tell the other end to look at its rings."""

    def wake(self) -> None:
        """Have `Channel.process` called soon, not from inside this call."""

    def failed(self, reason: str) -> None:
        """The other end broke the protocol of this channel; the channel is closing."""


class _QueuedCompletion(NamedTuple):
    """A completion packet that found no room."""

    transaction: int
    body: bytes


ProcessPacket = Callable[["Channel", Completion, bytes], None]
StateCallback = Callable[["Channel"], None]


class Channel:
    """Two rings and a signal. Use `ServerChannel` or `ClientChannel`.

    Attributes:
        name: for logs and errors (VmbChannelInitSetFriendlyName).
        pointer: the owner's context (VmbChannelSetPointer), never looked at.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.can_describe_memory = False
        self.pointer: object = None
        self.maximum_packet_size = DEFAULT_MAXIMUM_PACKET_SIZE
        self.maximum_external_data = DEFAULT_MAXIMUM_EXTERNAL_DATA
        self.state = ChannelState.DISABLED
        self.started = False
        self.held = False
        self.counters = {"sent": 0, "completed": 0, "received": 0, "answered": 0, "queued": 0, "signals": 0}
        self._process_packet: ProcessPacket | None = None
        self._processing_complete: Callable[[Channel, int], None] | None = None
        self._opened: StateCallback | None = None
        self._closed: StateCallback | None = None
        self._suspend: StateCallback | None = None
        self._started: StateCallback | None = None
        self._post_started: StateCallback | None = None
        self._link: Link | None = None
        self._generation = 0
        self._cork = 0
        self._queue: deque[Packet | _QueuedCompletion] = deque()
        self._sent: dict[int, Packet] = {}
        self._outstanding: set[Completion] = set()
        self._next_transaction = 1
        self._quota = 0
        self._blocked_on_quota = False
        self._when_quiet: list[Callable[[], None]] = []
        self._in_process = False

    # ---- set-up, while disabled ------------------------------------------------------------------------------

    def _require_disabled(self, call: str) -> None:
        if self.state is not ChannelState.DISABLED:
            raise ChannelStateError(
                f"channel {self.name} is {self.state.value}: {call} is only possible before enable()",
                Status.INVALID_PARAMETER_1,
            )

    def set_maximum_packet_size(self, size: int) -> None:
        """Largest payload in bytes (VmbChannelInitSetMaximumPacketSize)."""
        self._require_disabled("set_maximum_packet_size")
        if size <= 0:
            raise KmclError(f"channel {self.name}: a maximum packet size of {size}", Status.INVALID_PARAMETER_2)
        self.maximum_packet_size = size

    def set_maximum_external_data(self, size: int) -> None:
        """Most bytes of guest memory that one packet may describe (VmbChannelInitSetMaximumExternalData)."""
        self._require_disabled("set_maximum_external_data")
        if size <= 0:
            raise KmclError(f"channel {self.name}: maximum external data of {size}", Status.INVALID_PARAMETER_2)
        self.maximum_external_data = size

    def set_process_packet_callbacks(
        self,
        process_packet: ProcessPacket,
        processing_complete: Callable[["Channel", int], None] | None = None,
    ) -> None:
        """Who gets incoming packets (VmbChannelInitSetProcessPacketCallbacks).

        `process_packet(channel, completion, payload)` runs once per packet and must see to it that
        `completion.complete` is called once, now or later. `processing_complete(channel, count)` ends a batch.
        """
        self._require_disabled("set_process_packet_callbacks")
        self._process_packet = process_packet
        self._processing_complete = processing_complete

    def set_state_change_callbacks(
        self,
        *,
        opened: StateCallback | None = None,
        closed: StateCallback | None = None,
        suspend: StateCallback | None = None,
        started: StateCallback | None = None,
        post_started: StateCallback | None = None,
    ) -> None:
        """Who learns of state changes (VmbChannelInitSetStateChangeCallbacks).

        opened: the guest opened the channel; raising refuses the open. closed: it is closed; all packets are back.
        suspend: no packet will come until the next started; complete all that you hold. started: sends go out from
        here on. post_started: the same, after incoming packets were enabled.
        """
        self._require_disabled("set_state_change_callbacks")
        self._opened = opened
        self._closed = closed
        self._suspend = suspend
        self._started = started
        self._post_started = post_started

    # ---- life ------------------------------------------------------------------------------------------------

    def _move(self, event: ChannelEvent) -> None:
        self.state = next_state(self.state, event, self.name)

    def start(self) -> None:
        """Take and send packets whenever the channel is open (VmbChannelStart)."""
        if self.state is ChannelState.DISABLED:
            raise ChannelStateError(f"channel {self.name} is disabled: enable() it before start()")
        self.started = True
        self.activate()

    def pause(self) -> None:
        """Stop taking and sending packets (VmbChannelPause). Suspend runs at once if the channel was active.

        Unlike the DDI this does not wait: `quiescent` tells when every incoming packet has been completed, and
        `when_quiet` calls back then.
        """
        self.started = False
        self._do_suspend()

    def hold(self) -> None:
        """Like `pause`, for a save: the owner's wish (`started`) stays as it is."""
        self.held = True
        self._do_suspend()

    def unhold(self) -> None:
        """End `hold`: active again if open and started."""
        self.held = False
        self.activate()

    @property
    def active(self) -> bool:
        """Open and started: packets move."""
        return self.state is ChannelState.ACTIVE

    @property
    def outstanding(self) -> list[int]:
        """Transaction ids of incoming packets that the owner has not completed."""
        return sorted(completion.transaction for completion in self._outstanding)

    @property
    def quiescent(self) -> bool:
        """Not active, and no incoming packet outstanding: the channel can be saved."""
        return self.state is not ChannelState.ACTIVE and not self._outstanding

    def when_quiet(self, call: Callable[[], None]) -> None:
        """Call back once no incoming packet is outstanding; at once if that is so now."""
        if self._outstanding:
            self._when_quiet.append(call)
        else:
            call()

    def open(self, link: Link) -> None:
        """The other end has opened the channel. For the bus: call `activate` after it has answered.

        Raises whatever the owner's opened callback raised, the open rolled back.
        """
        self._move(ChannelEvent.OPEN)
        self._link = link
        self._generation += 1
        try:
            if self._opened is not None:
                self._opened(self)
        except Exception:
            self._move(ChannelEvent.OPEN_FAILED)
            self._cancel_all()
            self._link = None
            raise

    def activate(self) -> None:
        """Become active if open and started. For the bus, and for `start`."""
        if self.state is not ChannelState.OPENED or not self.started or self.held:
            return
        self._move(ChannelEvent.ACTIVATE)
        self._call_state(self._started)
        if self.active:
            self._guarded(self._drain_queue)
        if self.active:
            self._call_state(self._post_started)
        if self._link is not None:
            self._link.wake()

    def close(self, done: Callable[[], None], *, force: bool = False) -> None:
        """The other end has closed the channel. For the bus: `done` is called when the owner has let go of everything.

        With `force` (reset, memory gone) incoming packets still held are orphaned: completing them does nothing.
        """
        if force:
            # The rings are not ours any more: whatever the owner completes or sends from here on is not written.
            self._detach()
        self._do_suspend()
        if self.state is ChannelState.OPENED:
            self._move(ChannelEvent.CLOSE)
        elif self.state is not ChannelState.CLOSING:
            raise ChannelStateError(f"channel {self.name} is {self.state.value}: it cannot be closed")
        self.when_quiet(lambda: self._finish_close(done))
        if force:
            self._run_when_quiet()

    def _detach(self) -> None:
        """Let go of the rings, and of every incoming packet that was not completed."""
        link, self._link = self._link, None
        self._generation += 1
        self._outstanding.clear()
        if link is not None:
            link.reader.close()
            link.writer.close()

    def _finish_close(self, done: Callable[[], None]) -> None:
        if self.state is ChannelState.CLOSING:
            self._detach()
            self._cancel_all()
            self._move(ChannelEvent.CLOSED)
            self._call_state(self._closed)
        done()

    def _do_suspend(self) -> None:
        if self.state is ChannelState.ACTIVE:
            self._move(ChannelEvent.SUSPEND)
            self._call_state(self._suspend)
            self._guarded(self._flush)

    def _cancel_all(self) -> None:
        """Give every packet in use back to its owner, oldest first."""
        packets = list(self._sent.values()) + [entry for entry in self._queue if isinstance(entry, Packet)]
        self._sent.clear()
        self._queue.clear()
        for packet in packets:
            self._finish(packet, Status.CANCELLED, b"")

    def _call_state(self, callback: StateCallback | None) -> None:
        if callback is None:
            return
        try:
            callback(self)
        except Exception as error:
            log.exception("channel %s: a state callback of its owner raised", self.name)
            self.fail(f"a state callback raised {error!r}")

    def fail(self, reason: str) -> None:
        """Close this channel alone, because the other end (or the owner's code) broke its rules."""
        if self.state not in (ChannelState.OPENED, ChannelState.ACTIVE) or self._link is None:
            return
        log.error("channel %s failed: %s", self.name, reason)
        link = self._link
        self.close(lambda: None, force=True)
        link.failed(reason)

    def _guarded(self, action: Callable[[], object]) -> None:
        """Run something that touches shared memory; a peer that broke the rules fails the channel, not the caller."""
        try:
            action()
        except PeerError as error:
            self.fail(str(error))

    # ---- sending ---------------------------------------------------------------------------------------------

    def allocate_packet(self) -> Packet:
        """A fresh outgoing packet (VmbPacketAllocate)."""
        return Packet(self)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Publish all sends of the block together, with at most one signal."""
        self._cork += 1
        try:
            yield
        finally:
            self._cork -= 1
            if not self._cork:
                self._guarded(self._flush)

    def send_packet(
        self, packet: Packet, payload: bytes, external: Sequence[tuple[int, int]] | None, wait_for_completion: bool
    ) -> None:
        """`Packet.send` does this."""
        state = self.state
        if state is not _ACTIVE and state is not _OPENED:
            raise ChannelStateError(
                f"channel {self.name} is {state.value}: packets can be sent from the opened callback on until "
                "the closed callback"
            )
        if len(payload) > self.maximum_packet_size:
            raise KmclError(
                f"a payload of {len(payload)} bytes on channel {self.name}, whose maximum is "
                f"{self.maximum_packet_size}",
                Status.INVALID_PARAMETER,
            )
        link = self._link
        if external is None:
            kind, offset8, body = _INBAND, 2, payload
        else:
            if not self.can_describe_memory:
                raise KmclError(
                    f"channel {self.name}: only the guest's end can describe memory", Status.INVALID_DEVICE_REQUEST
                )
            if not wait_for_completion:
                raise KmclError("external data needs wait_for_completion", Status.INVALID_PARAMETER)
            kind = _GPA_DIRECT
            body, offset8 = gpa_direct_body([range_for(address, length) for address, length in external], payload)
        # `largest` is a multiple of 8, so that padding makes no difference here.
        if link is not None and len(body) > link.writer.largest - OVERHEAD:
            raise KmclError(
                f"a packet of {packet_size(len(body))} ring bytes on channel {self.name} can never fit into its ring "
                f"(at most {link.writer.largest})",
                Status.INVALID_PARAMETER,
            )
        packet.transaction = transaction = self._next_transaction
        self._next_transaction = transaction + 1
        packet.kind = kind
        packet.offset8 = offset8
        packet.flags = flags = FLAG_COMPLETION_REQUESTED if wait_for_completion else 0
        self.counters["sent"] += 1
        if state is _ACTIVE and not self._queue and link is not None:
            try:
                if link.writer.put(kind, flags, transaction, body, offset8):
                    self._in_ring(packet)
                    if not self._cork:
                        self._flush()
                    return
            except PeerError as error:
                packet.state = PacketState.QUEUED
                self._queue.append(packet)
                self.fail(str(error))
                return
        packet.body = body
        self._enqueue(packet)
        packet.state = PacketState.QUEUED

    def _in_ring(self, packet: Packet) -> None:
        if packet.flags:
            packet.state = _SENT
            self._sent[packet.transaction] = packet
        else:
            self._finish(packet, _SUCCESS, b"")

    def _enqueue(self, entry: Packet | _QueuedCompletion) -> None:
        first = not self._queue
        self._queue.append(entry)
        self.counters["queued"] += 1
        if first and self.state is ChannelState.ACTIVE and self._link is not None:
            # The ring was full a moment ago: `process` asks for room, with the re-check that S4 needs.
            self._link.wake()

    def _drain_queue(self) -> None:
        """Move queued entries into the ring, in order, as far as there is room; else ask for room (S4)."""
        link = self._link
        assert link is not None
        writer = link.writer
        if not self._queue:
            return
        queue = self._queue
        while queue:
            entry = queue[0]
            if isinstance(entry, Packet):
                placed = writer.put(entry.kind, entry.flags, entry.transaction, entry.body, entry.offset8)
            else:
                placed = writer.put(_COMPLETION, 0, entry.transaction, entry.body)
            if not placed:
                self._flush()
                if writer.request_space(packet_size(len(entry.body))):
                    continue
                return
            queue.popleft()
            if isinstance(entry, Packet):
                entry.body = b""
                self._in_ring(entry)
        writer.cancel_request()

    def _flush(self) -> None:
        link = self._link
        if link is not None and link.writer.commit():
            self.counters["signals"] += 1
            link.signal()

    def _finish(self, packet: Packet, status: Status, reply: bytes) -> None:
        """The packet is its owner's again."""
        packet.state = _IDLE
        packet.body = b""
        self.counters["completed"] += 1
        try:
            packet.completion_routine(packet, status, reply)
        except Exception as error:
            log.exception("channel %s: the completion routine of packet %d raised", self.name, packet.transaction)
            self.fail(f"the completion routine of packet {packet.transaction} raised {error!r}")

    # ---- receiving -------------------------------------------------------------------------------------------

    def set_transaction_quota(self, quota: int) -> None:
        """Most incoming packets that may be outstanding (VmbChannelSetTransactionQuota); 0: no limit."""
        if quota < 0:
            raise KmclError(f"channel {self.name}: a quota of {quota}", Status.INVALID_PARAMETER_2)
        self._quota = quota

    def memory_of(self, generation: int) -> GuestMemory | None:
        """For `Completion`: the memory behind the channel, None when it was closed since."""
        return self._link.memory if self._link is not None and generation == self._generation else None

    def complete_incoming(self, completion: Completion, generation: int, reply: bytes) -> None:
        """`Completion.complete` does this."""
        link = self._link
        if generation != self._generation or link is None:
            return
        outstanding = self._outstanding
        outstanding.discard(completion)
        if completion.wanted and self.state is not _CLOSING:
            self.counters["answered"] += 1
            try:
                if self._queue or not link.writer.put(_COMPLETION, 0, completion.transaction, reply):
                    self._enqueue(_QueuedCompletion(completion.transaction, reply))
                elif not self._cork:
                    self._flush()
            except PeerError as error:
                self.fail(str(error))
                return
        if self._blocked_on_quota:
            self._blocked_on_quota = False
            link.wake()
        if self._when_quiet and not outstanding:
            self._run_when_quiet()

    def _run_when_quiet(self) -> None:
        waiting = self._when_quiet
        self._when_quiet = []
        for call in waiting:
            call()

    def process(self) -> bool:
        """The other end has signalled, or `Link.wake` was asked: move packets both ways until nothing is left to do.

        Returns True when it stopped early to be fair to others: call again soon.
        """
        if self.state is not ChannelState.ACTIVE or self._in_process:
            return False
        self._in_process = True
        self._cork += 1
        try:
            return self._process()
        except PeerError as error:
            self.fail(str(error))
            return False
        finally:
            self._cork -= 1
            self._in_process = False

    def _process(self) -> bool:
        link = self._link
        assert link is not None
        reader = link.reader
        reader.mask()
        for _ in range(BATCHES_PER_TURN):
            self._drain_queue()
            packets, error = reader.fetch()
            if not packets:
                if error is not None:
                    self.fail(error)
                    return False
                self._flush()
                if reader.unmask():
                    return False
                continue
            handled, consumed = self._deliver(packets)
            if self._link is not link:
                return False
            if self._processing_complete is not None and handled:
                self._processing_complete(self, handled)
            if reader.advance(consumed):
                self.counters["signals"] += 1
                link.signal()
            self._flush()
            if self.state is not ChannelState.ACTIVE or self._blocked_on_quota:
                return False
            if error is not None and handled == len(packets):
                self.fail(error)
                return False
        return True

    def _deliver(self, packets: list[RawPacket]) -> tuple[int, int]:
        """Hand packets to their owners until one of them stops the channel; (packets, ring bytes) dealt with."""
        generation = self._generation
        outstanding = self._outstanding
        sent = self._sent
        counters = self.counters
        consumed = handled = 0
        process_packet = self._process_packet
        for kind, flags, transaction, body, payload, end in packets:
            if kind == _COMPLETION:
                packet = sent.pop(transaction, None)
                if packet is None:
                    self.fail(f"a completion for transaction {transaction}, which is not waiting for one")
                    break
                self._finish(packet, _SUCCESS, payload)
            else:
                if self._quota and len(outstanding) >= self._quota:
                    self._blocked_on_quota = True
                    break
                if process_packet is None:
                    self.fail("a packet came, and nobody takes packets on this channel")
                    break
                completion = Completion(self, transaction, flags != 0, body, generation)
                outstanding.add(completion)
                counters["received"] += 1
                try:
                    process_packet(self, completion, payload)
                except Exception as error:
                    log.exception("channel %s: process_packet raised on packet %d", self.name, transaction)
                    self.fail(f"process_packet raised {error!r} on packet {transaction}")
                    break
            handled += 1
            consumed = end
            if self.state is not _ACTIVE:
                break
        return handled, consumed

    # ---- inspection ------------------------------------------------------------------------------------------

    @property
    def packets_queued(self) -> int:
        """Outgoing packets that wait for room."""
        return sum(isinstance(entry, Packet) for entry in self._queue)

    @property
    def packets_sent(self) -> int:
        """Outgoing packets in the ring, or taken, that wait for their completion."""
        return len(self._sent)

    def describe(self) -> dict[str, object]:
        """State, counters, packets in flight and rings, for inspection."""
        rings: dict[str, object] | None = None
        if self._link is not None:
            try:
                rings = {"incoming": self._link.reader.describe(), "outgoing": self._link.writer.describe()}
            except PeerError as error:
                rings = {"error": str(error)}
        return {
            "name": self.name,
            "state": self.state.value,
            "started": self.started,
            "packets": {"queued": self.packets_queued, "sent": self.packets_sent},
            "completions_queued": len(self._queue) - self.packets_queued,
            "incoming_held": len(self._outstanding),
            "counters": dict(self.counters),
            "rings": rings,
        }
