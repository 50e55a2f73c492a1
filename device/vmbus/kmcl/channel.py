"""A channel: what both endpoints share.

Packets leave in the order of their sends. Three places can hold one: the channel's queue (no room in the ring, or the
channel is paused), the ring, and the other end. Completions of incoming packets share the queue, so that order holds
between the two kinds as well.

Everything here runs on one thread and never waits. Whoever carries the channel calls `process` when the other end has
signalled; the `Link` carries signals the other way.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, Protocol
from uuid import UUID

from vmbus.errors import PeerError, WaitTimeout
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet, PacketState
from vmbus.kmcl.settings import Settings
from vmbus.kmcl.states import ChannelEvent, ChannelState, next_state
from vmbus.kmcl.status import ChannelStateError, KmclError, Status
from vmbus.memory import GuestMemory
from vmbus.ring import RingReader, RingWriter
from vmbus.wire.gpa import GpaRange, range_for
from vmbus.wire.packet import (
    FLAG_COMPLETION_REQUESTED,
    MAX_PACKET_SIZE,
    OVERHEAD,
    PacketType,
    RawPacket,
    gpa_direct_body,
    packet_size,
)

if TYPE_CHECKING:
    from vmbus.audit.recorder import Recorder, Trace
    from vmbus.capture.capture import Capture

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
_now = time.monotonic

DEFAULT_TIMEOUT = 30.0  # seconds
_LONGEST_REQUEST = 60.0  # seconds
# Batches handed to the owner before other channels get their turn.
BATCHES_PER_TURN = 2
# Packets taken behind one whose owner waits inside it; beyond that they stay in the ring.
_MOST_PUT_OFF = 4096


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
    since: float = 0.0


class InFlight(NamedTuple):
    """What is in flight on a channel, for inspection: the oldest of each sort, and how many there are.

    `held`: incoming packets that the owner has not completed, with the time since when. `sent`: outgoing packets in the
    ring or taken. `waiting`: what waits for room, packets and completions in the order in which they will leave.
    Times are of the monotonic clock.
    """

    held: list[tuple[Completion, float]]
    sent: list[Packet]
    waiting: list[Packet | _QueuedCompletion]
    held_count: int
    sent_count: int
    queued_count: int
    completions_count: int


class Waiter(Protocol):
    """How a call that must wait does so: keeps everything going until `condition()` holds.

    Raises WaitTimeout, which says `what` was waited for, after `timeout` seconds.
    """

    def __call__(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        """Wait."""


class Channel(Settings):
    """Two rings and a signal. Use `ServerChannel` or `ClientChannel`.

    Attributes:
        interface_instance: what the channel is offered as, or accepts; None on a client that takes any.
        started: whether the owner wishes packets to move whenever the channel is open.
        counters: what happened so far, by name.
        waiter: how blocking calls wait; without one they raise ChannelStateError where they would have to.
        recorder: records what happens to packets from the next open on; None: nobody does. `trace`: while open.
        capture: is told of opens and closes, and may look at packets in between; None: nobody does.
        on_owner_error: told which callback of the owner has raised, and what.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.interface_instance: UUID | None = None
        self.waiter: Waiter | None = None
        self.recorder: Recorder | None = None
        self.trace: Trace | None = None
        self.capture: Capture | None = None
        self.on_owner_error: Callable[[str, BaseException], None] | None = None
        self.can_describe_memory = False
        self.started = False
        self.held = False
        self.counters = {"sent": 0, "completed": 0, "received": 0, "answered": 0, "queued": 0, "signals": 0}
        self._cleaned_up = False
        self._link: Link | None = None
        # The link of a channel that is being closed, until the closed callback has returned: GPADLs go over it.
        self._closing_link: Link | None = None
        # Bytes of the largest payload that the outgoing ring can ever hold; set when the channel opens.
        self.largest_payload = MAX_PACKET_SIZE
        self._generation = 0
        self._cork = 0
        self._queue: deque[Packet | _QueuedCompletion] = deque()
        self._sent: dict[int, Packet] = {}
        # Incoming packets that the owner has not completed, oldest first, and since when it has them.
        self._outstanding: dict[Completion, float] = {}
        # When the present turn began. Within one, packets are dated by it: that costs less than to look at the clock.
        self._turn_began = 0.0
        self._next_transaction = 1
        # Packets below this came back with a restore: how old they really are is not known.
        self._first_own = 1
        self._quota = 0
        self._blocked_on_quota = False
        self._when_quiet: list[Callable[[], None]] = []
        self._in_process = False
        self._in_state_callback = 0
        self._passive = False
        self._delivering: Completion | None = None
        self._deferred: deque[tuple[Completion, bytes]] = deque()
        self._in_passive_turn = False

    # ---- life ------------------------------------------------------------------------------------------------

    def _move(self, event: ChannelEvent) -> None:
        self.state = next_state(self.state, event, self.name)

    def enable(self) -> None:
        """Offer the channel, or accept its offer (VmbChannelEnable)."""
        raise NotImplementedError

    def disable(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Close the channel, and take it away (VmbChannelDisable)."""
        raise NotImplementedError

    def start(self) -> None:
        """Take and send packets whenever the channel is open (VmbChannelStart)."""
        if self.state is ChannelState.DISABLED:
            raise ChannelStateError(f"channel {self.name} is disabled: enable() it before start()")
        self._refuse_in_state_callback("start")
        self.started = True
        self.activate()

    def pause(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Stop taking and sending packets, and wait until every incoming packet is completed (VmbChannelPause).

        Before `enable`: come up paused. Raises WaitTimeout naming the packets that are missing (the channel stays
        paused), ChannelStateError from inside a state callback.
        """
        self._refuse_in_state_callback("pause")
        self.begin_pause()
        try:
            self._wait(lambda: not self._outstanding, timeout, "incoming packets to be completed")
        except WaitTimeout as error:
            raise WaitTimeout(
                f"the owner of channel {self.name} to complete incoming packets {self.outstanding[:8]}", timeout
            ) from error

    def begin_pause(self) -> None:
        """`pause` without the wait: `quiescent` tells when it is done, and `when_quiet` calls back then."""
        self.started = False
        self._do_suspend()

    def _refuse_in_state_callback(self, call: str) -> None:
        if self._in_state_callback:
            raise ChannelStateError(
                f"channel {self.name}: {call} is not possible from inside a state callback; do it after it returned"
            )

    def _wait(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        if condition():
            return
        if self.waiter is None:
            raise ChannelStateError(f"channel {self.name}: nothing was given to wait with for {what} (`waiter`)")
        self.waiter(condition, timeout, f"{what} (channel {self.name})")

    def cleanup(self) -> None:
        """The channel will not be used again (VmbChannelCleanup). Raises ChannelStateError unless disabled."""
        if self.state is not ChannelState.DISABLED:
            raise ChannelStateError(f"channel {self.name} is {self.state.value}: disable() it before cleanup()")
        self._cleaned_up = True

    def _require_disabled(self, call: str) -> None:
        self._require_usable(call)
        super()._require_disabled(call)

    def _require_usable(self, call: str) -> None:
        if self._cleaned_up:
            raise ChannelStateError(f"channel {self.name} was cleaned up: {call} is not possible any more")

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
        self._attach(link)
        self._in_state_callback += 1
        try:
            if self.recorder is not None:
                self.trace = self.recorder.opened(self, link)
            if self.capture is not None:
                self.capture.opened(self, link)
            if self._opened is not None:
                self._opened(self)
        except Exception:
            self._end_trace()
            if self.capture is not None:
                self.capture.closed(self, link)
            self._move(ChannelEvent.OPEN_FAILED)
            self._cancel_all()
            self._link = None
            raise
        finally:
            self._in_state_callback -= 1

    def _attach(self, link: Link) -> None:
        self._move(ChannelEvent.OPEN)
        self._link = link
        self._generation += 1
        # A multiple of 8, so that padding makes no difference.
        self.largest_payload = link.writer.largest - OVERHEAD

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

    def lost(self) -> None:
        """For a restore: at the save it was open, and the other end is gone since. The owner is told that it closed."""
        if self.state is ChannelState.CLOSED:
            self._call_state(self._closed)

    def _open_link(self, call: str, *, closing: bool) -> Link:
        """The link; with `closing` also until the closed callback has returned."""
        link = self._link if self._link is not None or not closing else self._closing_link
        if link is None:
            raise ChannelStateError(f"channel {self.name} is {self.state.value}: {call} needs an open channel")
        return link

    def _detach(self) -> None:
        """Let go of the rings, and of every incoming packet that was not completed."""
        self._end_trace()
        link, self._link = self._link, None
        self._generation += 1
        for completion in self._outstanding:
            completion.orphan()
        self._outstanding.clear()
        self._deferred.clear()
        self._blocked_on_quota = False
        if link is not None:
            if self.capture is not None:
                self.capture.closed(self, link)
            self._closing_link = link
            link.reader.close()
            link.writer.close()

    def _end_trace(self) -> None:
        trace, self.trace = self.trace, None
        if trace is not None:
            trace.close()

    def _finish_close(self, done: Callable[[], None]) -> None:
        if self.state is ChannelState.CLOSING:
            self._detach()
            self._cancel_all()
            self._move(ChannelEvent.CLOSED)
            self._call_state(self._closed)
            self._closing_link = None
        done()

    def _do_suspend(self) -> None:
        if self.state is ChannelState.ACTIVE:
            # Packets that were put off have been taken: their owner sees them before it is told that none will come.
            self._run_deferred()
        if self.state is ChannelState.ACTIVE:
            self._move(ChannelEvent.SUSPEND)
            self._call_state(self._suspend)
            self._guarded(self._flush)

    def _cancel_all(self) -> None:
        """Give every packet in use back to its owner, oldest first."""
        packets = self.packets_in_use
        self._sent.clear()
        self._queue.clear()
        for packet in packets:
            self._finish(packet, Status.CANCELLED, b"")

    def _call_state(self, callback: Callable[[Channel], None] | None) -> None:
        if callback is None:
            return
        self._in_state_callback += 1
        try:
            callback(self)
        except Exception as error:
            log.exception("channel %s: a state callback of its owner raised", self.name)
            self.fail(f"a state callback raised {error!r}")
        finally:
            self._in_state_callback -= 1

    def fail(self, reason: str, *, breach: bool = True) -> None:
        """Close this channel alone, because the other end (or the owner's code) broke its rules.

        Without `breach`: because the other end is gone, which is told to a record as an end like any other.
        """
        if self.state not in (ChannelState.OPENED, ChannelState.ACTIVE) or self._link is None:
            return
        log.error("channel %s failed: %s", self.name, reason)
        if self.trace is not None and breach:
            self.trace.failed(reason)
        if self.capture is not None:
            self.capture.noted(self, "failed", reason)
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
        self,
        packet: Packet,
        payload: bytes,
        external: Sequence[GpaRange] | None,
        wait_for_completion: bool,
        transaction: int | None = None,
    ) -> None:
        """`Packet.send` does this."""
        self._prepare(packet, payload, external, wait_for_completion)
        if transaction is not None:
            self._take_transaction(packet, transaction)
        self.counters["sent"] += 1
        if self.state is _ACTIVE and not self._queue and self._put(packet):
            return
        self._enqueue(packet)
        packet.state = PacketState.QUEUED

    def _put(self, packet: Packet) -> bool:
        """Put a prepared packet into the ring; False when there is no room, or no ring any more."""
        link = self._link
        if link is None:
            return False
        try:
            if not link.writer.put(packet.kind, packet.flags, packet.transaction, packet.body, packet.offset8):
                return False
            packet.body = b""
            self._in_ring(packet)
            if not self._cork:
                self._flush()
        except PeerError as error:
            if packet.state is _IDLE:
                packet.state = PacketState.QUEUED
                self._queue.append(packet)
            self.fail(str(error))
        return True

    def _prepare(
        self, packet: Packet, payload: bytes, external: Sequence[GpaRange] | None, wait_for_completion: bool
    ) -> None:
        """Check a send and give the packet its form and its transaction id."""
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
        if self.is_pipe and (external is not None or wait_for_completion):
            raise self._refuse("a pipe has neither external data nor completions", Status.INVALID_PARAMETER)
        if external is None:
            kind, offset8, body = _INBAND, 2, payload
        else:
            if not self.can_describe_memory:
                raise KmclError(
                    f"channel {self.name}: only the guest's end can describe memory", Status.INVALID_DEVICE_REQUEST
                )
            if not wait_for_completion:
                raise self._refuse("external data needs wait_for_completion", Status.INVALID_PARAMETER)
            size = sum(one.byte_count for one in external)
            empty = any(one.byte_count <= 0 for one in external)
            if empty or not 0 < size <= self.maximum_external_data or len(external) > self.maximum_chain:
                raise self._refuse(
                    f"external data of {size} bytes in {len(external)} pieces; at most {self.maximum_external_data} in "
                    f"{self.maximum_chain}",
                    Status.INVALID_PARAMETER,
                )
            kind = _GPA_DIRECT
            body, offset8 = gpa_direct_body(list(external), payload)
        if len(body) > self.largest_payload:
            raise KmclError(
                f"a packet of {packet_size(len(body))} ring bytes on channel {self.name} can never fit into its ring "
                f"(at most {self.largest_payload + OVERHEAD})",
                Status.INVALID_PARAMETER,
            )
        packet.transaction = self._next_transaction
        self._next_transaction += 1
        packet.kind = kind
        packet.offset8 = offset8
        packet.flags = FLAG_COMPLETION_REQUESTED if wait_for_completion else 0
        packet.body = body
        packet.since = self._turn_began if self._in_process else _now()

    def _take_transaction(self, packet: Packet, transaction: int) -> None:
        """Give a prepared packet the id that its owner wants instead of the next one of ours."""
        self._next_transaction -= 1
        # A server's packets are saved under their ids, and those that wait for a completion are found by them.
        if packet.flags or not self.can_describe_memory or not 0 <= transaction < 1 << 64:
            packet.body = b""
            raise self._refuse(
                f"transaction {transaction} for a packet: only the guest's end may choose it, 0 to 2^64 - 1, and only "
                "where no completion is waited for",
                Status.INVALID_PARAMETER,
            )
        packet.transaction = transaction

    def send_synchronous_request(
        self,
        payload: bytes,
        *,
        external: Sequence[tuple[int, int]] | None = None,
        wait_for_completion: bool = True,
        completion_size: int | None = None,
        timeout: float | None = None,
    ) -> bytes:
        """Send one packet and wait for its completion; returns the reply (VmbChannelSendSynchronousRequest).

        The server's end may use it only with `timeout` 0 and without `wait_for_completion`: then the packet goes into
        the ring at once or not at all. `timeout` None waits for as long as a minute. `completion_size`: the most bytes
        of the reply to return, a multiple of 8; None: all of it.

        Raises KmclError: BUFFER_OVERFLOW, there was no room at once and `timeout` is 0, nothing was queued; CANCELLED,
        the time ran out (a request that was still queued is withdrawn, a late completion is ignored); DEVICE_REMOVED,
        the channel is not active or is going away; INVALID_PARAMETER for a server that would have to wait.
        ChannelStateError where nothing can be waited for: inline in `process_packet`, or without a `waiter`.
        """
        if not self.can_describe_memory and (wait_for_completion or timeout != 0):
            raise self._refuse("a server may not wait: timeout 0, without completion", Status.INVALID_PARAMETER)
        if completion_size is not None and (completion_size < 0 or completion_size % 8):
            raise self._refuse(f"a completion of {completion_size} bytes, no multiple of 8", Status.INVALID_PARAMETER)
        if self.state is not _ACTIVE:
            raise self._refuse(f"no synchronous request while it is {self.state.value}", Status.DEVICE_REMOVED)
        if wait_for_completion:
            self._require_wait()
        packet = self.allocate_packet()
        outcome: list[tuple[int, bytes]] = []
        packet.completion_routine = lambda _, status, reply: outcome.append((status, reply))
        ranges = None if external is None else [range_for(address, length) for address, length in external]
        self._prepare(packet, payload, ranges, wait_for_completion)
        if self._queue or not self._put(packet):
            try:
                if timeout == 0:
                    raise self._refuse("no room for a synchronous request; it was not queued", Status.BUFFER_OVERFLOW)
                self._require_wait()
            except KmclError:
                self._next_transaction -= 1
                raise
            self._enqueue(packet)
            packet.state = PacketState.QUEUED
        self.counters["sent"] += 1
        # Also from inside a `batch`: what is waited for has to be visible.
        self._guarded(self._flush)
        if self._link is not None:
            # Inside a packet the ring is masked: a turn of its own unmasks it, so that the completion is signalled.
            self._link.wake()
        bound = _LONGEST_REQUEST if timeout is None else timeout
        try:
            self._wait(
                lambda: bool(outcome) or self.state not in (_ACTIVE, _OPENED),
                bound,
                f"the completion of synchronous request {packet.transaction}",
            )
        except WaitTimeout as error:
            if packet.state is PacketState.QUEUED:
                self._queue.remove(packet)
                packet.state = _IDLE
                if self.trace is not None:
                    self.trace.withdrawn(packet.transaction)
            raise self._refuse(f"synchronous request {packet.transaction}: {error}", Status.CANCELLED) from error
        if not outcome or outcome[0][0] != Status.SUCCESS:
            raise self._refuse(f"synchronous request {packet.transaction}: the channel closed", Status.DEVICE_REMOVED)
        return outcome[0][1][:completion_size]

    def _require_wait(self) -> None:
        if self._in_process:
            raise ChannelStateError(
                f"channel {self.name}: nothing can be waited for inline in a packet's callback; defer_to_passive(), or "
                "set_incoming_processing_at_passive()",
                Status.INVALID_DEVICE_REQUEST,
            )
        if self.waiter is None:
            raise ChannelStateError(f"channel {self.name}: nothing was given to wait with (`waiter`)")

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

    def signal_needlessly(self) -> None:
        """Signal the other end though there is nothing new for it, which it has to bear: for tests. Harmless while the
        channel is not open."""
        if self._link is not None and self.state is _ACTIVE:
            self.counters["signals"] += 1
            self._link.signal()

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
        """Most incoming packets that may be outstanding (VmbChannelSetTransactionQuota).

        Lowered below what is outstanding, nothing more is taken until enough are completed. Raising it does not start
        a blocked queue; the next completion does.
        """
        if quota <= 0:
            raise self._refuse(f"a quota of {quota}", Status.INVALID_PARAMETER_2)
        self._quota = quota

    def set_incoming_processing_at_passive(self, passive: bool) -> None:
        """Packets are processed where blocking calls are possible (VmbChannelSetIncomingProcessingAtPassive).

        Inline, a batch is handed over while the ring is being read, and nothing may wait inside `process_packet`. At
        passive, one packet at a time is handed over from a turn of its own: inside it, synchronous requests on this
        very channel work. Slower, so not the default.
        """
        self._passive = passive
        if self._link is not None:
            self._link.wake()

    def defer_to_passive(self, completion: Completion) -> None:
        """`Completion.defer_to_passive` does this."""
        if completion is not self._delivering or self._in_passive_turn or completion.done:
            raise ChannelStateError(
                f"packet {completion.transaction} of channel {self.name} can be put off only from inside its "
                "process_packet call, and not a second time",
                Status.INVALID_DEVICE_REQUEST,
            )
        completion.deferred = True

    def _run_deferred(self) -> None:
        """Hand packets that were put off to their owner again, each in a turn in which blocking calls are possible."""
        while self._deferred and not self._in_passive_turn:
            completion, payload = self._deferred.popleft()
            self._hand_over(completion, payload)

    def _hand_over(self, completion: Completion, payload: bytes) -> bool:
        """One call of the owner's process_packet, at passive; False when it raised, which fails the channel."""
        process_packet = self._process_packet
        assert process_packet is not None
        before = self._in_process, self._cork, self._in_passive_turn, self._delivering
        self._in_process, self._cork, self._in_passive_turn = False, 0, True
        self._delivering = completion
        try:
            process_packet(self, completion, payload)
        except Exception as error:
            log.exception("channel %s: process_packet raised on packet %d", self.name, completion.transaction)
            self.fail(f"process_packet raised {error!r} on packet {completion.transaction}")
            return False
        finally:
            self._in_process, self._cork, self._in_passive_turn, self._delivering = before
        return True

    def _put_off(self, completion: Completion, payload: bytes) -> None:
        """Keep a packet that was taken for a passive turn."""
        if completion in self._outstanding:
            self._deferred.append((completion, payload))
            if not self.active:
                # Its owner paused the channel while it had the packet: no other turn comes.
                self._run_deferred()

    def memory_of(self, generation: int) -> GuestMemory | None:
        """For `Completion`: the memory behind the channel, None when it was closed since."""
        return self._link.memory if self._link is not None and generation == self._generation else None

    def complete_incoming(self, completion: Completion, generation: int, reply: bytes) -> None:
        """`Completion.complete` does this."""
        link = self._link
        if generation != self._generation or link is None:
            return
        outstanding = self._outstanding
        outstanding.pop(completion, None)
        if completion.wanted and self.state is not _CLOSING:
            self.counters["answered"] += 1
            try:
                if self._queue or not link.writer.put(_COMPLETION, 0, completion.transaction, reply):
                    self._enqueue(_QueuedCompletion(completion.transaction, reply, _now()))
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

    def fail_incoming(self, completion: Completion, generation: int, reason: str) -> None:
        """`Completion.fail` does this."""
        if generation != self._generation or self._link is None:
            return
        self._outstanding.pop(completion, None)
        self.fail(reason)
        if not self._outstanding:
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
        if self._deferred:
            self._run_deferred()
            if not self.active:
                return False
        self._in_process = True
        self._turn_began = _now()
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
        tap, look = reader.tap, reader.look
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
            if look is not None:
                look(packets[:1] if self._passive else packets)
            if self._passive:
                # Given back before the owner sees it: a nested turn must find the packets behind it.
                taken = self._take_one(link, packets[0])
                if taken is None:
                    return False
                handled = taken
            else:
                data = reader.batch
                handled, consumed = self._deliver(packets)
                if tap is not None and handled:
                    tap(data[:consumed])
                if self._link is not link:
                    return False
                if reader.advance(consumed):
                    self.counters["signals"] += 1
                    link.signal()
            if self._processing_complete is not None and handled:
                self._end_batch(self._processing_complete, handled)
            self._flush()
            if not self.active:
                return False
            if self._deferred:
                return True  # also when the quota is used up: it may be these that use it
            if self._blocked_on_quota:
                return False
            if error is not None and handled == len(packets):
                self.fail(error)
                return False
        return True

    def _end_batch(self, processing_complete: Callable[[Channel, int], None], handled: int) -> None:
        try:
            processing_complete(self, handled)
        except Exception as error:
            log.exception("channel %s: processing_complete raised", self.name)
            self.fail(f"processing_complete raised {error!r}")

    def _deliver(self, packets: list[RawPacket]) -> tuple[int, int]:
        """Hand packets to their owners until one of them stops the channel; (packets, ring bytes) dealt with."""
        generation = self._generation
        outstanding = self._outstanding
        sent = self._sent
        counters = self.counters
        began = self._turn_began
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
                outstanding[completion] = began
                counters["received"] += 1
                self._delivering = completion
                try:
                    process_packet(self, completion, payload)
                except Exception as error:
                    log.exception("channel %s: process_packet raised on packet %d", self.name, transaction)
                    self.fail(f"process_packet raised {error!r} on packet {transaction}")
                    break
                finally:
                    self._delivering = None
                if completion.deferred:
                    self._put_off(completion, payload)
            handled += 1
            consumed = end
            if self.state is not _ACTIVE:
                break
        return handled, consumed

    def _take_one(self, link: Link, raw: RawPacket) -> int | None:
        """At passive: take one packet out of the ring, then hand it over. None: this turn ends here."""
        kind, flags, transaction, body, payload, end = raw
        if kind != _COMPLETION:
            if len(self._deferred) >= _MOST_PUT_OFF or (self._quota and len(self._outstanding) >= self._quota):
                self._blocked_on_quota = True
                return None
            if self._process_packet is None:
                self.fail("a packet came, and nobody takes packets on this channel")
                return None
        if link.reader.tap is not None:
            link.reader.tap(link.reader.batch[:end])
        if link.reader.advance(end):
            self.counters["signals"] += 1
            link.signal()
        if kind == _COMPLETION:
            packet = self._sent.pop(transaction, None)
            if packet is None:
                self.fail(f"a completion for transaction {transaction}, which is not waiting for one")
                return None
            self._finish(packet, _SUCCESS, payload)
        else:
            completion = Completion(self, transaction, flags != 0, body, self._generation)
            self._outstanding[completion] = self._turn_began
            self.counters["received"] += 1
            self._flush()
            if self._in_passive_turn:
                # The owner waits inside an earlier packet. What it waits for may be behind this one, which comes next.
                self._put_off(completion, payload)
            elif not self._hand_over(completion, payload):
                return None
        return 1 if self._link is link else None

    # ---- inspection ------------------------------------------------------------------------------------------

    @property
    def packets_in_use(self) -> list[Packet]:
        """Outgoing packets that are not their owner's: sent ones, oldest first, then queued ones."""
        return list(self._sent.values()) + [entry for entry in self._queue if isinstance(entry, Packet)]

    def in_use(self) -> tuple[list[int], list[tuple[int, int, bytes]], int]:
        """What is in flight: transactions that wait for a completion; entries that wait for room (kind, transaction,
        what follows the descriptor), completions among them; the next packet's transaction."""
        queued = [
            (entry.kind if isinstance(entry, Packet) else _COMPLETION, entry.transaction, entry.body)
            for entry in self._queue
        ]
        return list(self._sent), queued, self._next_transaction

    @property
    def packets_queued(self) -> int:
        """Outgoing packets that wait for room."""
        return sum(isinstance(entry, Packet) for entry in self._queue)

    @property
    def packets_sent(self) -> int:
        """Outgoing packets in the ring, or taken, that wait for their completion."""
        return len(self._sent)

    def in_flight(self, most: int) -> InFlight:
        """What is in flight, at most `most` of each sort one by one, the oldest first."""
        queued = self.packets_queued
        return InFlight(
            list(islice(self._outstanding.items(), most)),
            list(islice(self._sent.values(), most)),
            list(islice(self._queue, most)),
            len(self._outstanding),
            len(self._sent),
            queued,
            len(self._queue) - queued,
        )

    def is_restored(self, packet: Packet) -> bool:
        """Whether an outgoing packet in flight came back with a restore: it is older than it looks."""
        return packet.transaction < self._first_own

    @property
    def next_transaction(self) -> int:
        """The id that the next outgoing packet gets."""
        return self._next_transaction

    @property
    def rings(self) -> tuple[RingReader, RingWriter] | None:
        """The rings while the channel is open, for inspection: to be looked at only."""
        return None if self._link is None else (self._link.reader, self._link.writer)

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
