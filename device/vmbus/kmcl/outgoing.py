"""Everything on its way to the other end: packets of the owner, and completions of packets that came.

Three places can hold a packet: `queue` (no room in the ring, or the channel is paused), the ring's staging area until
`publish`, and `Flow.sent` (in the ring, or taken). Completions share the queue, so that order holds between the two
kinds as well. Two rules keep anything from being lost:

* Whatever stages something runs inside a *cork* (a turn, a `batch`, or one of its own), and the last cork to end
  publishes. So nothing is staged when control goes back to whoever called the channel, above all not at a save.
* A packet is its owner's again only through `finished`, a list that is worked off by the outermost call. So a routine
  that sends the next packet, which is finished at once, does not recurse.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from struct import error as StructError
from typing import TYPE_CHECKING, NamedTuple

from vmbus.errors import PeerError
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.packet import Described, Packet, PacketState
from vmbus.kmcl.status import ChannelStateError, KmclError, Status
from vmbus.wire.gpa import GpaRange
from vmbus.wire.packet import (
    FLAG_COMPLETION_REQUESTED,
    MAX_RANGES,
    OVERHEAD,
    PacketType,
    TransferPages,
    gpa_direct_body,
    packet_size,
    transfer_pages_body,
)

if TYPE_CHECKING:
    from vmbus.kmcl.channel import Channel, Link

_INBAND = int(PacketType.INBAND)
_TRANSFER_PAGES = int(PacketType.TRANSFER_PAGES)
_GPA_DIRECT = int(PacketType.GPA_DIRECT)
_COMPLETION = int(PacketType.COMPLETION)

_OPENED = ChannelState.OPENED
_ACTIVE = ChannelState.ACTIVE
_CLOSING = ChannelState.CLOSING
_IDLE = PacketState.IDLE
_QUEUED = PacketState.QUEUED
_SENT = PacketState.SENT
_SUCCESS = Status.SUCCESS
_now = time.monotonic

ROUTINES_PER_TURN = 1024
"""Completion routines that run before others get their turn, when each of them sends the next packet."""
_LOOK_EVERY = 64  # queued entries that are put between two looks at the clock


class QueuedCompletion(NamedTuple):
    """A completion packet that found no room. `since`: when that was, by the monotonic clock."""

    transaction: int
    body: bytes
    since: float = 0.0


class Outgoing:
    """See the module's text. `queue`: what waits for room, in the order in which it will leave."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._flow = channel.flow
        self.queue: deque[Packet | QueuedCompletion] = deque()
        # Packets below this came back with a restore: how old they really are is not known.
        self.first_own = 1
        self.ids_given = False
        self._finished: deque[tuple[Packet, Status, bytes]] = deque()

    # ---- corks ---------------------------------------------------------------------------------------------------

    @contextmanager
    def corked(self) -> Iterator[None]:
        """Publish all that the block stages together, with at most one signal, when the outermost one ends.

        A peer that breaks the rules fails the channel, not the caller.
        """
        flow = self._flow
        flow.cork += 1
        try:
            yield
        finally:
            flow.cork -= 1
            if not flow.cork:
                self.publish()

    def publish(self) -> None:
        """What is staged becomes visible to the other end."""
        link = self._channel.link
        if link is None:
            return
        writer = link.writer
        try:
            observers = self._channel.observing
            if observers and (data := writer.staged):
                for observer in observers:
                    observer.about_to_put(data)
                signal = writer.commit()
                for observer in observers:
                    observer.put(data)
            else:
                signal = writer.commit()
        except PeerError as error:
            self._channel.ring_failed(error)
            return
        if signal:
            self._channel.signal(link)

    # ---- packets of the owner ------------------------------------------------------------------------------------

    def send(
        self,
        packet: Packet,
        payload: bytes,
        external: Described | None,
        wait_for_completion: bool,
        transaction: int | None,
    ) -> None:
        """Send a packet: into the ring if that is possible now, else it is queued. Raises as `Packet.send`."""
        self.prepare(packet, payload, external, wait_for_completion)
        if transaction is not None:
            self._take_transaction(packet, transaction)
        self._flow.sends += 1
        if self.queue or not self.put_at_once(packet):
            self.enqueue(packet)

    def put_at_once(self, packet: Packet) -> bool:
        """Put a prepared packet into the ring, and publish it; False when there is no room, or the channel is not
        active. A ring that turns out to be broken fails the channel, and the packet is given back as all others are."""
        channel = self._channel
        link = channel.link
        if link is None or channel.state is not _ACTIVE:
            return False
        try:
            if not link.writer.put(packet.kind, packet.flags, packet.transaction, packet.body, packet.offset8):
                return False
        except PeerError as error:
            packet.state = _QUEUED
            self.queue.append(packet)
            channel.ring_failed(error)
            return True
        flow = self._flow
        if flow.cork:
            self._in_ring(packet)
            return True
        flow.cork = 1  # `corked` written out: this is the way of each packet that is sent alone
        try:
            self._in_ring(packet)
        finally:
            flow.cork = 0
            self.publish()
        return True

    def prepare(self, packet: Packet, payload: bytes, external: Described | None, wait_for_completion: bool) -> None:
        """Check a send and give the packet its form and its transaction id."""
        channel = self._channel
        state = channel.state
        if state is not _ACTIVE and state is not _OPENED:
            raise ChannelStateError(
                f"channel {channel.name} is {state.value}: packets can be sent from the opened callback on until "
                "the closed callback"
            )
        channel.check_payload(payload)
        if external is None:
            if channel.is_pipe and wait_for_completion:
                raise channel.refuse("a pipe has neither external data nor completions", Status.INVALID_PARAMETER)
            packet.kind, packet.offset8, body = _INBAND, 2, payload
        elif isinstance(external, TransferPages):
            packet.kind = _TRANSFER_PAGES
            body, packet.offset8 = self._transfer_body(payload, external, wait_for_completion)
        else:
            packet.kind = _GPA_DIRECT
            body, packet.offset8 = self._external_body(payload, external, wait_for_completion)
        if len(body) > channel.largest_payload:
            raise KmclError(
                f"a packet of {packet_size(len(body))} ring bytes on channel {channel.name} can never fit into its "
                f"ring (at most {channel.largest_payload + OVERHEAD})",
                Status.INVALID_PARAMETER,
            )
        packet.transaction = self._flow.next_transaction
        self._flow.next_transaction += 1
        packet.flags = FLAG_COMPLETION_REQUESTED if wait_for_completion else 0
        packet.body = body
        packet.since = self._flow.began or _now()

    def _external_body(
        self, payload: bytes, external: Sequence[GpaRange], wait_for_completion: bool
    ) -> tuple[bytes, int]:
        channel = self._channel
        if channel.is_pipe:
            raise channel.refuse("a pipe has neither external data nor completions", Status.INVALID_PARAMETER)
        if not channel.can_describe_memory:
            raise channel.refuse("only the guest's end can describe memory", Status.INVALID_DEVICE_REQUEST)
        if not wait_for_completion:
            raise channel.refuse("external data needs wait_for_completion", Status.INVALID_PARAMETER)
        size = sum(one.byte_count for one in external)
        empty = any(one.byte_count <= 0 for one in external)
        if empty or not 0 < size <= channel.maximum_external_data or len(external) > channel.maximum_chain:
            raise channel.refuse(
                f"external data of {size} bytes in {len(external)} pieces; at most {channel.maximum_external_data} in "
                f"{channel.maximum_chain}",
                Status.INVALID_PARAMETER,
            )
        return gpa_direct_body(list(external), payload)

    def _transfer_body(self, payload: bytes, pages: TransferPages, wait_for_completion: bool) -> tuple[bytes, int]:
        channel = self._channel
        if channel.is_pipe or not wait_for_completion:
            raise channel.refuse("transfer pages need wait_for_completion, and no pipe", Status.INVALID_PARAMETER)
        if channel.can_describe_memory:
            raise channel.refuse("only the host's end can hand over transfer pages", Status.INVALID_DEVICE_REQUEST)
        if not 0 < len(pages.ranges) <= MAX_RANGES or any(length <= 0 for _, length in pages.ranges):
            raise channel.refuse(
                f"transfer pages in {len(pages.ranges)} ranges; 1 to {MAX_RANGES}, none of them empty",
                Status.INVALID_PARAMETER,
            )
        try:
            return transfer_pages_body(pages, payload)
        except StructError as error:
            raise channel.refuse(f"transfer pages: {error}", Status.INVALID_PARAMETER) from error

    def _take_transaction(self, packet: Packet, transaction: int) -> None:
        """Give a prepared packet the id that its owner wants instead of the next one of ours."""
        self._flow.next_transaction -= 1
        # A server's packets are saved under their ids, and those that wait for a completion are found by them. 0 is
        # nobody's: in some protocols it says that a packet of the host's belongs to no request.
        most = 1 << 64 if self._channel.can_describe_memory else 1
        if packet.flags or not 0 <= transaction < most:
            packet.body = b""
            raise self._channel.refuse(
                f"transaction {transaction} for a packet: only the guest's end may choose it, 0 to 2^64 - 1, the "
                "host's 0 alone, and only where no completion is waited for",
                Status.INVALID_PARAMETER,
            )
        packet.transaction = transaction
        self.ids_given |= bool(transaction)

    def withdraw(self, packet: Packet) -> bool:
        """Take a queued packet back; False when it has left the queue."""
        if packet.state is not _QUEUED:
            return False
        self.queue.remove(packet)
        packet.state = _IDLE
        self._set_direct()
        for observer in self._channel.observing:
            observer.withdrawn(packet.transaction)
        return True

    # ---- completions of packets that came --------------------------------------------------------------------------

    def reply(self, transaction: int, body: bytes) -> None:
        """A completion packet that could not go straight into the ring: see `Flow.complete`."""
        channel = self._channel
        link = channel.link
        if link is None or channel.state is _CLOSING:
            return
        self._flow.answered += 1
        if self.queue:
            self.reply_waits(transaction, body)
            return
        with self.corked():
            try:
                placed = link.writer.put(_COMPLETION, 0, transaction, body)
            except PeerError as error:
                channel.ring_failed(error)
                return
            if not placed:
                self.reply_waits(transaction, body)

    def reply_waits(self, transaction: int, body: bytes) -> None:
        """There is no room for a completion: it still counts as a request, until it is in the ring."""
        flow = self._flow
        flow.waiting += 1
        flow.held_bytes += len(body)
        self.enqueue(QueuedCompletion(transaction, body, _now()))

    # ---- the queue -------------------------------------------------------------------------------------------------

    def enqueue(self, entry: Packet | QueuedCompletion) -> None:
        """Keep an entry until there is room for it."""
        first = not self.queue
        self.queue.append(entry)
        if isinstance(entry, Packet):
            entry.state = _QUEUED
        channel = self._channel
        channel.queueings += 1
        self._flow.direct = False
        if first and channel.state is _ACTIVE and channel.link is not None:
            # The ring was full a moment ago: a turn asks for room, with the re-check that S4 needs.
            channel.link.wake()

    def drain(self, until: float) -> None:
        """Move queued entries into the ring, in order, as far as there is room; else ask for room (S4).

        Inside a cork. Ends at the time `until`, or when a routine stopped the channel. Raises PeerError.
        """
        channel = self._channel
        link = channel.link
        queue = self.queue
        if link is None or not queue:
            return
        writer = link.writer
        done = 0
        while queue:
            entry = queue[0]
            if isinstance(entry, Packet):
                placed = writer.put(entry.kind, entry.flags, entry.transaction, entry.body, entry.offset8)
            else:
                placed = writer.put(_COMPLETION, 0, entry.transaction, entry.body)
            if not placed:
                self.publish()
                if channel.link is link and writer.request_space(packet_size(len(entry.body))):
                    continue
                return
            queue.popleft()
            if isinstance(entry, Packet):
                self._in_ring(entry)
                if channel.link is not link or channel.state is not _ACTIVE:
                    return
            else:
                self._left(entry)
            done += 1
            if not done % _LOOK_EVERY and _now() > until:
                link.wake()
                return
        writer.cancel_request()
        self._set_direct()

    def _left(self, entry: QueuedCompletion) -> None:
        flow = self._flow
        flow.waiting -= 1
        flow.held_bytes -= len(entry.body)

    def _set_direct(self) -> None:
        self._flow.direct = not self.queue and self._channel.state in (_ACTIVE, _OPENED)

    def attached(self, link: Link) -> None:
        """The channel is on rings; its queue is empty."""
        self._flow.writer = link.writer
        self._flow.direct = True

    # ---- back to the owner -----------------------------------------------------------------------------------------

    def _in_ring(self, packet: Packet) -> None:
        packet.body = b""
        if packet.flags:
            packet.state = _SENT
            self._flow.sent[packet.transaction] = packet
        else:
            self._finish(packet, _SUCCESS, b"")

    def in_ring_for_good(self, packet: Packet) -> None:
        """A packet that wants no completion is in the ring: it is its owner's again."""
        with self.corked():
            self._finish(packet, _SUCCESS, b"")

    def _finish(self, packet: Packet, status: Status, reply: bytes) -> None:
        self._finished.append((packet, status, reply))
        self._flow.pending = True
        if not self._flow.finishing:
            self.run_routines()

    def finish_later(self, packet: Packet, reply: bytes) -> None:
        """For `Flow`: a packet is complete, and another one's routine is on."""
        self._finish(packet, _SUCCESS, reply)

    def run_routines(self, most: int = ROUTINES_PER_TURN) -> None:
        """Give finished packets back. What is left beyond `most` follows at the next turn."""
        finished = self._finished
        if self._flow.finishing or not finished:
            return
        channel = self._channel
        flow = self._flow
        flow.finishing = True
        try:
            while finished:
                if not most:
                    if channel.state is _ACTIVE and channel.link is not None:
                        channel.link.wake()
                        return
                    most = ROUTINES_PER_TURN  # nothing reaches the ring any more, so this ends
                most -= 1
                packet, status, reply = finished.popleft()
                packet.state = _IDLE
                flow.completed += 1
                try:
                    packet.completion_routine(packet, status, reply)
                except Exception as error:
                    channel.owner_failed("the completion routine", error, f"packet {packet.transaction}")
        finally:
            flow.finishing = False
            flow.pending = bool(finished)

    def cancel_all(self) -> None:
        """The rings are gone: give every packet back to its owner, oldest first."""
        packets = self.in_use
        self._flow.sent.clear()
        self.queue.clear()
        self._flow.waiting = 0
        self._flow.held_bytes = 0
        for packet in packets:
            packet.body = b""
            self._finished.append((packet, Status.CANCELLED, b""))
        flow = self._flow
        flow.pending = True
        # Also from inside a routine: the closed callback comes next, and by then all packets are back. Nothing can be
        # sent any more, so this does not recurse further.
        before, flow.finishing = flow.finishing, False
        try:
            self.run_routines()
        finally:
            flow.finishing = before

    # ---- what is there -----------------------------------------------------------------------------------------------

    @property
    def in_use(self) -> list[Packet]:
        """Packets that are not their owner's: sent ones, oldest first, then queued ones."""
        return list(self._flow.sent.values()) + [entry for entry in self.queue if isinstance(entry, Packet)]

    @property
    def packets_queued(self) -> int:
        return len(self.queue) - self._flow.waiting

    def described(self) -> tuple[list[int], list[tuple[int, int, bytes]], int]:
        """See `Channel.in_use`."""
        queued = [
            (entry.kind if isinstance(entry, Packet) else _COMPLETION, entry.transaction, entry.body)
            for entry in self.queue
        ]
        return list(self._flow.sent), queued, self._flow.next_transaction

    @property
    def settled(self) -> bool:
        """Nothing is on its way back to the owner, or staged and not published."""
        link = self._channel.link
        return not self._finished and (link is None or not link.writer.staged)

    # ---- restore -----------------------------------------------------------------------------------------------------

    def put_back(self, sent: dict[int, Packet], queue: list[Packet | QueuedCompletion], next_transaction: int) -> None:
        """Everything that was in use at the save, in its old places; what was queued since comes behind it."""
        flow = self._flow
        flow.sent.update(sent)
        self.queue.extendleft(reversed(queue))
        for entry in queue:
            if isinstance(entry, QueuedCompletion):
                flow.waiting += 1
                flow.held_bytes += len(entry.body)
        self._set_direct()
        flow.next_transaction = self.first_own = next_transaction
