"""A channel: what both endpoints share. Each of its rooms knows one thing.

    endpoint   its life: opened, started, paused, closed, failed
    outgoing   the owner's packets and the completions of those that came, on their way to the other end
    incoming   packets from the other end, on their way to the owner: turns, limits, passive processing
    flow       the part of both that is touched for every packet
    requests   synchronous requests
    threads    calls from other threads than its own

Everything here runs on one thread and never waits; `send` and `complete` may be called from others. Whoever carries the
channel calls `process` when the other end has signalled; the `Link` carries signals the other way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import islice
from threading import get_ident
from typing import NamedTuple

from vmbus.errors import PeerError
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.endpoint import DEFAULT_TIMEOUT, Endpoint, Link, Waiter
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.outgoing import QueuedCompletion
from vmbus.kmcl.packet import Described, Packet
from vmbus.kmcl.polling import MOST_SECONDS, Polling
from vmbus.kmcl.requests import send_synchronous_request
from vmbus.kmcl.status import KmclError, Status
from vmbus.kmcl.threads import own_thread
from vmbus.memory.guest import GuestMemory
from vmbus.ring import RingReader, RingWriter

__all__ = ["DEFAULT_TIMEOUT", "Channel", "InFlight", "Link", "QueuedCompletion", "Waiter"]

_ACTIVE = ChannelState.ACTIVE
_now = time.monotonic


class InFlight(NamedTuple):
    """What is in flight on a channel, for inspection: the oldest of each sort, and how many there are.

    `held`: incoming packets that the owner has not completed, with the time since when. `sent`: outgoing packets in the
    ring or taken. `waiting`: what waits for room, packets and completions in the order in which they will leave.
    Times are of the monotonic clock.
    """

    held: list[tuple[Completion, float]]
    sent: list[Packet]
    waiting: list[Packet | QueuedCompletion]
    held_count: int
    sent_count: int
    queued_count: int
    completions_count: int


class Channel(Endpoint):
    """Two rings and a signal. Use `ServerChannel` or `ClientChannel`."""

    # ---- sending ---------------------------------------------------------------------------------------------

    def allocate_packet(self) -> Packet:
        """A fresh outgoing packet (VmbPacketAllocate)."""
        return Packet(self)

    @own_thread
    def batch(self) -> AbstractContextManager[None]:
        """Publish all sends of the block together, with at most one signal."""
        return self.outgoing.corked()

    def send_packet(
        self,
        packet: Packet,
        payload: bytes,
        external: Described | None,
        wait_for_completion: bool,
        transaction: int | None = None,
    ) -> None:
        """`Packet.send` does this."""
        if get_ident() != self.flow.thread:
            self.threads.send(packet, payload, external, wait_for_completion, transaction)
        elif (
            external is not None
            or transaction is not None
            or (wait_for_completion and self.is_pipe)
            or not self.flow.send(packet, payload, wait_for_completion)
        ):
            self.outgoing.send(packet, payload, external, wait_for_completion, transaction)

    def check_payload(self, payload: bytes) -> None:
        """Whether a payload may be sent. Raises KmclError."""
        if len(payload) > self.maximum_packet_size:
            raise KmclError(
                f"a payload of {len(payload)} bytes on channel {self.name}, whose maximum is "
                f"{self.maximum_packet_size}",
                Status.INVALID_PARAMETER,
            )

    send_synchronous_request = own_thread(send_synchronous_request)

    def signal(self, link: Link) -> None:
        """For the rooms of this channel: the other end is to look."""
        self.signals += 1
        link.signal()

    def signal_needlessly(self) -> None:
        """Signal the other end though there is nothing new for it, which it has to bear: for tests. Harmless while the
        channel is not open."""
        if self.link is not None and self.state is _ACTIVE:
            self.signal(self.link)

    # ---- receiving -------------------------------------------------------------------------------------------

    @own_thread
    def set_transaction_quota(self, quota: int) -> None:
        """Most incoming packets that may be outstanding (VmbChannelSetTransactionQuota).

        One counts until its completion is in the ring. Lowered below what is outstanding, nothing more is taken until
        enough are completed. Raising it does not start a blocked queue; the next completion does.
        """
        if quota <= 0:
            raise self.refuse(f"a quota of {quota}", Status.INVALID_PARAMETER_2)
        self.incoming.set_quota(quota)

    @own_thread
    def set_polling(self, seconds: float) -> None:
        """Look on for so long at most, when all packets were handed over, before the other end is asked to signal the
        next one: it saves the signals while packets come one right after the other, and costs processor time. 0: do
        not, as it is at first. Raises KmclError for more than `vmbus.kmcl.polling.MOST_SECONDS`."""
        if not 0 <= seconds <= MOST_SECONDS:
            raise self.refuse(f"polling for {seconds:g} s; at most {MOST_SECONDS:g}", Status.INVALID_PARAMETER_2)
        self.incoming.polling = Polling(seconds) if seconds else None

    @own_thread
    def set_incoming_processing_at_passive(self, passive: bool) -> None:
        """Packets are processed where blocking calls are possible (VmbChannelSetIncomingProcessingAtPassive).

        Inline, a batch is handed over while the ring is being read, and nothing may wait inside `process_packet`. At
        passive, one packet at a time is handed over from a turn of its own: inside it, synchronous requests on this
        very channel work.
        """
        self.incoming.passive = passive
        if self.link is not None:
            self.flow.process_packet = self.incoming.process_at_passive if passive else self._process_packet
            self.link.wake()

    @property
    def owners_process_packet(self) -> Callable[[Channel, Completion, bytes], None] | None:
        """The owner's callback, as it was set."""
        return self._process_packet

    def memory_of(self, completion: Completion) -> GuestMemory | None:
        """For `Completion`: the memory behind the channel, None when it was closed since."""
        return self.link.memory if self.link is not None and completion in self.flow.outstanding else None

    def fail_incoming(self, completion: Completion, reason: str) -> None:
        """`Completion.fail` does this."""
        if self.flow.outstanding.pop(completion, None) is None:
            return
        self.flow.held_bytes -= completion.size
        self.fail(reason)
        if not self.flow.outstanding:
            self._run_when_quiet()

    def nobody_takes_packets(self) -> None:
        """For `Flow`: there is a packet, and no callback."""
        self.fail("a packet came, and nobody takes packets on this channel")

    def process(self) -> bool:
        """The other end has signalled, or `Link.wake` was asked: move packets both ways until nothing is left to do.

        Returns True when it stopped early to be fair to others: call again soon.
        """
        threads = self.threads
        if threads.under_way:
            threads.run_carried()
        incoming = self.incoming
        if self.state is not _ACTIVE or incoming.in_turn:
            return False
        outgoing = self.outgoing
        outgoing.run_routines()
        if incoming.deferred:
            incoming.run_deferred()
        if self.state is not _ACTIVE:
            return False
        flow = self.flow
        before = flow.began
        flow.began = _now()
        incoming.in_turn = True
        flow.cork += 1
        try:
            return incoming.turn()
        except PeerError as error:
            self.broken(error)
            return False
        finally:
            flow.cork -= 1
            if not flow.cork:
                outgoing.publish()
            incoming.in_turn = False
            flow.began = before

    def went_idle(self) -> None:
        """For `Incoming`: both ends have nothing to do, as far as this one can see."""
        if self.on_idle is not None and (self.flow.sent or self.outgoing.queue):
            self.on_idle(self)

    def end_batch(self, handled: int) -> bool:
        """For `Incoming`: so many packets were handed over together. Returns whether the owner was told."""
        if self._processing_complete is None:
            return False
        try:
            self._processing_complete(self, handled)
        except Exception as error:
            self.owner_failed("processing_complete", error)
        return True

    # ---- inspection ------------------------------------------------------------------------------------------

    @property
    def counters(self) -> dict[str, int]:
        """What happened so far, by name."""
        flow = self.flow
        return {
            "sent": flow.sends,
            "completed": flow.completed,
            "received": flow.received,
            "answered": flow.answered,
            "queued": self.queueings,
            "signals": self.signals,
        }

    @property
    def packets_in_use(self) -> list[Packet]:
        """Outgoing packets that are not their owner's: sent ones, oldest first, then queued ones."""
        return self.outgoing.in_use

    def in_use(self) -> tuple[list[int], list[tuple[int, int, bytes]], int]:
        """The same for records: transactions that wait for a completion; entries that wait for room (kind, transaction,
        what follows the descriptor), completions among them; the next packet's transaction."""
        return self.outgoing.described()

    @property
    def ids_given(self) -> bool:
        """Whether packets were sent under ids of their owner's choice, other than 0."""
        return self.outgoing.ids_given

    @property
    def awaited(self) -> list[int]:
        """Transactions of incoming packets that the owner has and that want a completion."""
        return sorted(completion.transaction for completion in self.flow.outstanding if completion.wanted)

    @property
    def packets_queued(self) -> int:
        """Outgoing packets that wait for room."""
        return self.outgoing.packets_queued

    @property
    def packets_sent(self) -> int:
        """Outgoing packets in the ring, or taken, that wait for their completion."""
        return len(self.flow.sent)

    def in_flight(self, most: int) -> InFlight:
        """What is in flight, at most `most` of each sort one by one, the oldest first."""
        flow, queue = self.flow, self.outgoing.queue
        return InFlight(
            list(islice(flow.outstanding.items(), most)),
            list(islice(flow.sent.values(), most)),
            list(islice(queue, most)),
            len(flow.outstanding),
            len(flow.sent),
            self.packets_queued,
            flow.waiting,
        )

    def is_restored(self, packet: Packet) -> bool:
        """Whether an outgoing packet in flight came back with a restore: it is older than it looks."""
        return packet.transaction < self.outgoing.first_own

    @property
    def next_transaction(self) -> int:
        """The id that the next outgoing packet gets."""
        return self.flow.next_transaction

    @property
    def rings(self) -> tuple[RingReader, RingWriter] | None:
        """The rings while the channel is open, for inspection: to be looked at only."""
        return None if self.link is None else (self.link.reader, self.link.writer)

    def describe(self) -> dict[str, object]:
        """State, counters, packets in flight and rings, for inspection."""
        rings: dict[str, object] | None = None
        if self.link is not None:
            try:
                rings = {"incoming": self.link.reader.describe(), "outgoing": self.link.writer.describe()}
            except PeerError as error:
                rings = {"error": str(error)}
        return {
            "name": self.name,
            "state": self.state.value,
            "started": self.started,
            "packets": {"queued": self.packets_queued, "sent": self.packets_sent},
            "completions_queued": self.flow.waiting,
            "incoming_held": len(self.flow.outstanding),
            "held_bytes": self.flow.held_bytes,
            "blocked": self.flow.blocked,
            "counters": self.counters,
            "rings": rings,
        }
