"""The part of a channel that is touched for every packet: cursor, tables, counters, and the straight ways.

`hand_over` takes packets from the cursor over a parsed batch to their owners, `complete` ends one that came, `send`
puts one of the owner's into the ring. All that is rare (queues, limits, states, callbacks that raise) is the channel's,
in `incoming`, `outgoing` and `channel`; this module only sees that it is so, and calls there.

This is the twin in Python of `vmbus/native/flow.c` and `completion.c`; `flow` chooses.
"""

from __future__ import annotations

import time
from threading import get_ident
from typing import TYPE_CHECKING, Any

from vmbus.errors import PeerError
from vmbus.kmcl.packet import PacketState
from vmbus.kmcl.status import Status
from vmbus.ring import RingWriter
from vmbus.wire.packet import PacketType, RawPacket

if TYPE_CHECKING:
    from vmbus.kmcl.channel import Channel
    from vmbus.kmcl.completion import Completion
    from vmbus.kmcl.packet import Packet
    from vmbus.kmcl.settings import ProcessPacket

# Looking a member up in an Enum class takes longer than a global, which counts where it is done for every packet.
_INBAND = int(PacketType.INBAND)
_TRANSFER_PAGES = int(PacketType.TRANSFER_PAGES)
_GPA_DIRECT = int(PacketType.GPA_DIRECT)
_COMPLETION = int(PacketType.COMPLETION)
_IDLE = PacketState.IDLE
_SENT = PacketState.SENT
_SUCCESS = Status.SUCCESS
_now = time.monotonic

NO_LIMIT = 1 << 62


class CompletionBase:
    """The part of a `Completion` that is touched for every packet. Its attributes are described there."""

    __slots__ = (
        "_body",
        "_grant",
        "_payload",
        "channel",
        "context",
        "deferred",
        "done",
        "flow",
        "kind",
        "size",
        "transaction",
        "wanted",
    )

    def __init__(self, flow: Flow, kind: int, transaction: int, wanted: bool, body: bytes, payload: bytes) -> None:
        self.flow = flow
        self.channel = flow.channel
        self.kind = kind
        self.transaction = transaction
        self.wanted = wanted
        self.context: Any = bytearray(flow.context_size) if flow.context_size else None
        self.deferred = False
        self.done = False
        self.size = len(payload) + len(body)
        self._body = body
        self._payload = payload
        self._grant: Any = None

    @property
    def has_external_data(self) -> bool:
        """Whether the packet describes guest memory (the EXTERNAL_DATA flag of EvtChannelProcessPacket)."""
        return self.kind == _GPA_DIRECT

    def complete(self, reply: bytes = b"") -> None:
        """Finish the packet (VmbChannelPacketComplete): its external data is given back, and a completion packet with
        `reply` is sent if the sender asked for one; queued in order when the ring is full. On any thread.

        Does nothing more when the channel has been closed meanwhile. Raises ChannelStateError when called twice,
        KmclError (INVALID_PARAMETER) for a reply that can never fit into the ring; the packet is then not completed.
        """
        flow = self.flow
        if self.done or self._grant is not None or len(reply) > flow.largest_reply or get_ident() != flow.thread:
            self.complete_otherwise(reply)
            return
        self.done = True
        flow.complete(self, reply)

    def complete_otherwise(self, reply: bytes) -> None:
        """Whatever is not as simple as that."""
        raise NotImplementedError


class Flow:
    """See the module's text. One for each channel, for all its life; a new open begins with an empty cursor.

    Attributes:
        packets, at: the batch that was parsed last, and the first of it that was not handed over.
        taken: ring bytes of the batch that were handed over, those of `packets[:at]`.
        outstanding: incoming packets that the owner has not completed, oldest first, and since when it has them.
        sent: outgoing packets in the ring, or taken, that wait for their completion, by transaction.
        waiting: completions that wait for room in the ring.
        held_bytes: of the packets in `outstanding`, and of the completions that wait.
        most, most_bytes: a packet is not taken while so many are outstanding or wait, or hold so many bytes.
        blocked: such a packet is at the cursor; nothing is taken before one of those ends.
        direct: completions may go into the ring at once: it is there, and nothing waits for room.
        active: the channel is; packets may go into the ring at once if `direct` too.
        largest, largest_reply: bytes of payload, and of a completion, that may be sent without looking closer.
        context_size: bytes of scratch space on every incoming packet.
        thread: the identifier of the channel's own thread.
        finishing: packets are being given back to their owner; more of them have to wait (see `outgoing`).
        pending: some do.
        lends: this is the guest's end, which lends memory: packets may come that hand parts of it over.
        next_transaction: the id that the next outgoing packet gets.
        sends, received, answered, completed: packets so far: sent by the owner; come, and answered with a completion;
            given back to the owner.
        cork: how many blocks there are at whose end everything staged is published.
        attention: somebody wants to know when a packet is completed: call `Channel.completed_one`.
        delivering: the packet that is being handed over right now.
        began: when the present turn began; packets are dated by it, since that costs less than to look at the clock.
    """

    __slots__ = (
        "active",
        "answered",
        "at",
        "attention",
        "began",
        "blocked",
        "channel",
        "completed",
        "context_size",
        "cork",
        "delivering",
        "direct",
        "finishing",
        "held_bytes",
        "largest",
        "largest_reply",
        "lends",
        "most",
        "most_bytes",
        "next_transaction",
        "outstanding",
        "packets",
        "pending",
        "process_packet",
        "received",
        "sends",
        "sent",
        "taken",
        "thread",
        "waiting",
        "writer",
    )

    completions: type[Completion]  # set by the module `completion`

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.packets: list[RawPacket] = []
        self.at = 0
        self.taken = 0
        self.outstanding: dict[Completion, float] = {}
        self.sent: dict[int, Packet] = {}
        self.waiting = 0
        self.held_bytes = 0
        self.most = NO_LIMIT
        self.most_bytes = NO_LIMIT
        self.blocked = False
        self.direct = False
        self.active = False
        self.largest = 0
        self.largest_reply = 0
        self.context_size = 0
        self.thread = get_ident()
        self.finishing = False
        self.pending = False
        self.lends = False
        self.next_transaction = 1
        self.cork = 0
        self.delivering: Completion | None = None
        self.attention = False
        self.began = 0.0
        self.process_packet: ProcessPacket | None = None
        self.writer: RingWriter | None = None
        self.sends = 0
        self.received = 0
        self.answered = 0
        self.completed = 0

    @property
    def requests(self) -> int:
        """Packets that came and whose completions are not in the ring yet."""
        return len(self.outstanding) + self.waiting

    def hand_over(self, most: int) -> int:
        """Hand over at most `most` packets from the cursor on, until one of them stops the channel; how many.

        Ends early when the channel is not active any more, and with `blocked` set at a limit. What a peer breaks, or
        the owner raises, fails the channel.
        """
        channel = self.channel
        packets = self.packets
        at = first = self.at
        stop = min(at + most, len(packets))
        while at < stop:
            kind, flags, transaction, body, payload, end = packets[at]
            if kind == _COMPLETION:
                packet = self.sent.pop(transaction, None)
                if packet is None:
                    channel.fail(f"a completion for transaction {transaction}, which is not waiting for one")
                    break
                self.at = at = at + 1
                self.taken = end
                if self.finishing:
                    channel.outgoing.finish_later(packet, payload)
                else:
                    self.finishing = True
                    packet.state = _IDLE
                    self.completed += 1
                    try:
                        packet.completion_routine(packet, _SUCCESS, payload)
                    except Exception as error:
                        channel.owner_failed("the completion routine", error, f"packet {transaction}")
                    finally:
                        self.finishing = False
                    if self.pending:
                        channel.outgoing.run_routines()
            else:
                outstanding = self.outstanding
                if len(outstanding) + self.waiting >= self.most or self.held_bytes >= self.most_bytes:
                    self.blocked = self.attention = True
                    break
                if kind == _TRANSFER_PAGES and not self.lends:
                    channel.fail(f"packet {transaction} is over transfer pages, and none were lent")
                    break
                process_packet = self.process_packet
                if process_packet is None:
                    channel.nobody_takes_packets()
                    break
                self.at = at = at + 1
                self.taken = end
                completion = self.completions(self, kind, transaction, flags != 0, body, payload)
                outstanding[completion] = self.began
                self.held_bytes += completion.size
                self.received += 1
                self.delivering = completion
                try:
                    process_packet(channel, completion, payload)
                except Exception as error:
                    channel.owner_failed("process_packet", error, f"packet {transaction}")
                    break
                finally:
                    self.delivering = None
                if completion.deferred:
                    channel.incoming.put_off(completion, payload)
            if not self.active:
                break
        return at - first

    def send(self, packet: Packet, payload: bytes, wait: bool) -> bool:
        """Put an idle packet of the owner's into the ring; False when that is not as simple as that.

        (External data, a payload that may be too long, a channel that is not active, a ring that is full or broken.)
        """
        writer = self.writer
        if not (self.active and self.direct) or len(payload) > self.largest or writer is None:
            return False
        transaction = self.next_transaction
        flags = 1 if wait else 0
        try:
            if not writer.put(_INBAND, flags, transaction, payload, 2):
                return False
        except PeerError:
            return False
        self.next_transaction = transaction + 1
        self.sends += 1
        packet.transaction = transaction
        packet.kind = _INBAND
        packet.offset8 = 2
        packet.flags = flags
        packet.since = self.began or _now()
        if wait:
            packet.state = _SENT
            self.sent[transaction] = packet
            if not self.cork:
                self.channel.outgoing.publish()
        else:
            self.channel.outgoing.in_ring_for_good(packet)
        return True

    def complete(self, completion: CompletionBase, reply: bytes) -> None:
        """An incoming packet is done. Nothing happens for one that was orphaned."""
        if self.outstanding.pop(completion, None) is None:  # type: ignore[call-overload]
            return
        self.held_bytes -= completion.size
        if completion.wanted:
            writer = self.writer
            if self.direct and writer is not None and self.cork:
                self.answered += 1
                try:
                    placed = writer.put(_COMPLETION, 0, completion.transaction, reply)
                except Exception as error:
                    self.channel.ring_failed(error)
                    return
                if not placed:
                    self.channel.outgoing.reply_waits(completion.transaction, reply)
            else:
                self.channel.outgoing.reply(completion.transaction, reply)
        if self.attention:
            self.channel.completed_one()
