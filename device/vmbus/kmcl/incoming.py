"""Packets from the other end: one delivery path, with a cursor over a parsed batch.

A batch is copied out of the ring and parsed once; the cursor (in `Flow`) goes over it as far as the owner takes
packets, be that all at once, one by one, or a few when some others are completed. The ring's space is given back for
what was handed over, and for no more. At passive a batch is handed over in pieces of one packet, each given back before
its owner sees it: a turn inside of it must find the packets behind it.

A turn has a budget of ring bytes and of time, and then others have theirs. A request counts until its completion is in
the ring: at a limit (the owner's quota, the channel's share, the device's) the channel is not read on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from vmbus.kmcl.completion import Completion
from vmbus.kmcl.flow import NO_LIMIT
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.polling import Polling
from vmbus.kmcl.status import ChannelStateError, Status
from vmbus.wire.packet import PacketType

if TYPE_CHECKING:
    from vmbus.kmcl.channel import Channel
    from vmbus.kmcl.observer import LifeObserver
    from vmbus.ring import RingReader

TURN_BYTES = 64 << 10
"""Ring bytes that one turn of a channel hands over, give or take a batch."""
TURN_SECONDS = 0.004
"""Time that one turn of a channel takes, give or take a few packets."""
MOST_REQUESTS = 4096
"""Requests of a guest on one channel that are not answered yet, or whose answers wait for room in the ring."""
MOST_REQUEST_BYTES = 8 << 20
"""Bytes that these, and the answers that wait, hold on one channel."""
MOST_PUT_OFF = 4096
"""Packets taken behind one whose owner waits inside it; beyond that they stay in the ring."""
_LOOK_EVERY = 16  # packets handed over between two looks at the clock

_COMPLETION = int(PacketType.COMPLETION)
_ACTIVE = ChannelState.ACTIVE
_now = time.monotonic


class Allowance(Protocol):
    """What channels share: the device's bound on what its guest can have it hold."""

    def grants(self, channel: Channel) -> bool:
        """Whether the channel may take some more packets. After a no it is woken when there is room again."""

    @property
    def waiting(self) -> bool:
        """Whether a channel had got a no: `settle` is to be called when a packet is completed on any of them."""

    def settle(self) -> None:
        """A packet was completed."""


class Incoming:
    """See the module's text.

    Attributes:
        quota: the owner's limit (`Channel.set_transaction_quota`), 0: none.
        passive: packets are handed over one by one, where blocking calls are possible.
        in_turn: a turn is on, and its owner's code cannot wait in it.
        in_passive_turn: an owner has a packet in a turn in which it may wait.
        deferred: packets that wait for such a turn.
        polling: looks on for a while before the channel goes idle; None: it does so at once.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._flow = channel.flow
        self.quota = 0
        self._bound = NO_LIMIT
        self.passive = False
        self.in_turn = False
        self.in_passive_turn = False
        self.deferred: deque[tuple[Completion, bytes]] = deque()
        self.allowance: Allowance | None = None
        self._reader: RingReader | None = None  # of the batch behind the cursor, also once the channel has let go of it
        self._error: str | None = None  # what is wrong behind it
        self._given = 0  # ring bytes of it that were given back
        self._told = 0  # and those that observers were told of
        self.polling: Polling | None = None

    # ---- limits --------------------------------------------------------------------------------------------------

    def bind(self, allowance: Allowance) -> None:
        """The other end is a guest: what it can have us hold is bounded, for this channel and with all others.

        (A guest's own end has no bounds: if both stopped to read, nothing would move any more.)
        """
        self.allowance = allowance
        self._bound = MOST_REQUESTS
        self._flow.most_bytes = MOST_REQUEST_BYTES
        self._set_most()

    def set_quota(self, quota: int) -> None:
        self.quota = quota
        self._set_most()

    def _set_most(self) -> None:
        self._flow.most = min(self.quota or NO_LIMIT, self._bound)

    @property
    def room(self) -> bool:
        """Whether another packet may be taken, as far as this channel goes."""
        flow = self._flow
        return flow.requests < flow.most and flow.held_bytes < flow.most_bytes

    # ---- the cursor ------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """An open or a close: nothing was read. What is in the cursor is still in the ring."""
        flow = self._flow
        flow.packets = []
        flow.at = flow.taken = self._given = self._told = 0
        flow.blocked = False
        self._error = None

    def _fetch(self) -> bool:
        """Parse the next batch, all of the last one having been given back; False when there is no packet in it.

        Raises PeerError for impossible indices.
        """
        link = self._channel.link
        assert link is not None
        self._reader = link.reader
        packets, self._error = link.reader.fetch()
        flow = self._flow
        flow.packets = packets
        flow.at = flow.taken = self._given = self._told = 0
        return bool(packets)

    def _give_back(self) -> None:
        """The space of what was handed over is the writer's again. Raises PeerError."""
        link = self._channel.link
        taken = self._flow.taken
        if link is None or taken == self._given:
            return
        size, self._given = taken - self._given, taken
        if link.reader.advance(size):
            self._channel.signal(link)

    # ---- turns -------------------------------------------------------------------------------------------------------

    def turn(self) -> bool:
        """Move packets both ways, inside a cork; True when it stopped early to be fair to others. Raises PeerError."""
        channel = self._channel
        flow = self._flow
        link = channel.link
        assert link is not None
        reader = link.reader
        until = flow.began + TURN_SECONDS
        left = TURN_BYTES
        reader.mask()
        while True:
            channel.outgoing.drain(until)
            if channel.link is not link or channel.state is not _ACTIVE:
                return False
            if flow.at == len(flow.packets):
                if self._error is not None:
                    channel.fail(self._error)
                    return False
                if not self._fetch():
                    if self._error is not None:
                        continue
                    channel.outgoing.publish()
                    if channel.link is not link:
                        return False
                    if self.polling is not None and self.polling.comes(reader, flow.received, flow.began):
                        continue
                    if reader.unmask():
                        channel.went_idle()
                        return False
                    continue
            before = flow.taken
            flow.blocked = False
            handled = self._hand_over(until)
            if channel.link is not link:
                return False
            left -= flow.taken - before
            self._give_back()
            if handled and channel.end_batch(handled) and channel.link is not link:
                return False
            channel.outgoing.publish()
            if channel.link is not link or channel.state is not _ACTIVE:
                return False
            if self.deferred and not self.in_passive_turn:
                return True  # also at a limit: it may be these that use it up
            if flow.blocked:
                return False
            if left <= 0 or _now() > until:
                return True

    def _hand_over(self, until: float) -> int:
        """Packets from the cursor to their owners until something stops that; how many."""
        channel = self._channel
        flow = self._flow
        link = channel.link
        piece = 1 if self.passive else _LOOK_EVERY
        handled = 0
        while flow.at < len(flow.packets):
            if flow.packets[flow.at].kind != _COMPLETION and not self._may_take():
                flow.blocked = flow.attention = True
                break
            observers = channel.observing
            self._told = flow.taken
            if observers:
                some = flow.packets[flow.at : flow.at + piece]
                for observer in observers:
                    observer.about_to_take(some, self._told)
            count = flow.hand_over(piece)
            if observers:
                self._tell(observers)
            handled += count
            if count < piece or channel.link is not link or channel.state is not _ACTIVE or self.passive:
                break
            if _now() > until:
                break
        return handled

    def _may_take(self) -> bool:
        """Whether there is room for some more requests, where `Flow` does not look."""
        if len(self.deferred) >= MOST_PUT_OFF:
            return False
        return self.allowance is None or self.allowance.grants(self._channel)

    def _tell(self, observers: Sequence[LifeObserver]) -> None:
        """Those who look learn of what was handed over since they were last told."""
        told, self._told = self._told, self._flow.taken
        if observers and self._reader is not None:
            data = self._reader.batch[told : self._told]
            for observer in observers:
                observer.taken(data)

    # ---- where blocking calls are possible ----------------------------------------------------------------------

    def process_at_passive(self, channel: Channel, completion: Completion, payload: bytes) -> None:
        """In the place of the owner's process_packet, at passive."""
        self._tell(channel.observing)
        # Given back before the owner sees it: a turn inside of its callback must find the packets behind this one.
        self._give_back()
        channel.outgoing.publish()
        if self.in_passive_turn:
            # The owner waits inside an earlier packet. What it waits for may be behind this one, which comes next.
            self.put_off(completion, payload)
        else:
            self._call_owner(completion, payload)

    def _call_owner(self, completion: Completion, payload: bytes) -> None:
        flow = self._flow
        process_packet = self._channel.owners_process_packet
        assert process_packet is not None
        before = self.in_turn, flow.cork, flow.delivering
        self.in_turn, flow.cork, flow.delivering = False, 0, completion
        self.in_passive_turn = True
        try:
            process_packet(self._channel, completion, payload)
        finally:
            self.in_turn, flow.cork, flow.delivering = before
            self.in_passive_turn = False

    def defer(self, completion: Completion) -> None:
        """`Completion.defer_to_passive` does this."""
        if completion is not self._flow.delivering or self.in_passive_turn or completion.done:
            raise ChannelStateError(
                f"packet {completion.transaction} of channel {self._channel.name} can be put off only from inside its "
                "process_packet call, and not a second time",
                Status.INVALID_DEVICE_REQUEST,
            )
        completion.deferred = True

    def put_off(self, completion: Completion, payload: bytes) -> None:
        """Keep a packet that was taken for a passive turn."""
        if completion in self._flow.outstanding:
            self.deferred.append((completion, payload))
            if self._channel.state is not _ACTIVE:
                # Its owner paused the channel while it had the packet: no other turn comes.
                self.run_deferred()

    def run_deferred(self) -> None:
        """Hand packets that were put off to their owner again, each in a turn in which blocking calls are possible."""
        channel = self._channel
        while self.deferred and not self.in_passive_turn:
            completion, payload = self.deferred.popleft()
            try:
                self._call_owner(completion, payload)
            except Exception as error:
                channel.owner_failed("process_packet", error, f"packet {completion.transaction}")
