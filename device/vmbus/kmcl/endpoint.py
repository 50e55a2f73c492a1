"""The life of a channel's end: opened, started, paused, held for a save, closed, failed. Its packets are in `Channel`.

The rules of the states are in `states`. Nothing here touches a ring but through the rooms of the packets. Whatever the
other end or the owner does, a close that has begun comes to its end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, cast
from uuid import UUID

from vmbus.errors import PeerError, VmbusError, WaitTimeout
from vmbus.kmcl.flow import Flow
from vmbus.kmcl.incoming import TURN_SECONDS, Incoming
from vmbus.kmcl.lifecycle import ChannelEvent, ChannelState, next_state
from vmbus.kmcl.observer import How, Lent, LifeObserver, Observer
from vmbus.kmcl.outgoing import Outgoing
from vmbus.kmcl.settings import Settings
from vmbus.kmcl.status import ChannelStateError
from vmbus.kmcl.threads import Carrier, Threads, own_thread
from vmbus.memory.guest import GuestMemory, MemoryRevoked
from vmbus.ring import RingReader, RingWriter
from vmbus.util.complaints import bounded_log
from vmbus.wire.packet import MAX_PACKET_SIZE, OVERHEAD

if TYPE_CHECKING:
    from vmbus.kmcl.channel import Channel

log = bounded_log(__name__)

DEFAULT_TIMEOUT = 30.0  # seconds

_OPENED = ChannelState.OPENED
_ACTIVE = ChannelState.ACTIVE
_CLOSING = ChannelState.CLOSING
_now = time.monotonic


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


class Waiter(Protocol):
    """How a call that must wait does so: keeps everything going until `condition()` holds.

    Raises WaitTimeout, which says `what` was waited for, after `timeout` seconds.
    """

    def __call__(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        """Wait."""


OwnerError = Callable[[str, BaseException], None]


class Endpoint(Settings):
    """See the module's text; the part of a `Channel` that is not its packets.

    Attributes:
        interface_instance: what the channel is offered as, or accepts; None on a client that takes any.
        started: whether the owner wishes packets to move whenever the channel is open.
        waiter: how blocking calls wait; without one they raise ChannelStateError where they would have to.
        carrier: how calls from other threads get to the channel's own; without one they are refused.
        on_owner_error: told which callback of the owner raised, and what.
        on_idle: called with the channel when it has become idle with transactions of its own under way.
        observers: who is asked at each open whether to look at it; `observing`: those who look at the present one;
            `lent`: for them, what packets refer to in memory that was lent.
        queueings, signals: entries that found no room at once, and signals given, so far.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.interface_instance: UUID | None = None
        self.waiter: Waiter | None = None
        self.carrier: Carrier | None = None
        self.on_owner_error: OwnerError | None = None
        self.on_idle: Callable[[Channel], None] | None = None
        self.observers: list[Observer] = []
        self.observing: list[LifeObserver] = []
        self.lent: Lent | None = None
        self.can_describe_memory = False
        self.started = False
        self.quiescing = False
        self.queueings = self.signals = 0
        self.link: Link | None = None
        # The link of a channel that is being closed, until the closed callback has returned: GPADLs go over it.
        self._closing_link: Link | None = None
        # Bytes of the largest payload that the outgoing ring can ever hold; set when the channel opens.
        self.largest_payload = MAX_PACKET_SIZE
        self._channel = channel = cast("Channel", self)  # there is no other kind
        self.flow = Flow(channel)
        self.outgoing = Outgoing(channel)
        self.incoming = Incoming(channel)
        self.threads = Threads(channel)
        self._cleaned_up = False
        self._when_quiet: list[Callable[[], None]] = []
        self._closing: list[Callable[[], None]] | None = None
        self._in_state_callback = 0

    # ---- life ------------------------------------------------------------------------------------------------

    @property
    def thread(self) -> int:
        """The identifier of the channel's own thread."""
        return self.flow.thread

    def _move(self, event: ChannelEvent) -> None:
        self.state = next_state(self.state, event, self.name)
        self.flow.active = self.state is _ACTIVE

    def enable(self) -> None:
        """Offer the channel, or accept its offer (VmbChannelEnable)."""
        raise NotImplementedError

    def disable(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Close the channel, and take it away (VmbChannelDisable)."""
        raise NotImplementedError

    @own_thread
    def start(self) -> None:
        """Take and send packets whenever the channel is open (VmbChannelStart)."""
        if self.state is ChannelState.DISABLED:
            raise ChannelStateError(f"channel {self.name} is disabled: enable() it before start()")
        self._refuse_in_state_callback("start")
        self.started = True
        self.activate()

    @own_thread
    def pause(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Stop taking and sending packets, and wait until every incoming packet is completed (VmbChannelPause).

        Before `enable`: come up paused. Raises WaitTimeout naming the packets that are missing (the channel stays
        paused), ChannelStateError from inside a state callback.
        """
        self._refuse_in_state_callback("pause")
        self.begin_pause()
        try:
            self.wait(lambda: not self.flow.outstanding, timeout, "incoming packets to be completed")
        except WaitTimeout as error:
            raise WaitTimeout(
                f"the owner of channel {self.name} to complete incoming packets {self.outstanding[:8]}", timeout
            ) from error

    @own_thread
    def begin_pause(self) -> None:
        """`pause` without the wait: `quiescent` tells when it is done, and `when_quiet` calls back then."""
        self.started = False
        self._do_suspend()

    def _refuse_in_state_callback(self, call: str) -> None:
        if self._in_state_callback:
            raise ChannelStateError(
                f"channel {self.name}: {call} is not possible from inside a state callback; do it after it returned"
            )

    def wait(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        """For calls that block. Raises WaitTimeout, and ChannelStateError without a `waiter`."""
        if condition():
            return
        if self.waiter is None:
            raise ChannelStateError(f"channel {self.name}: nothing was given to wait with for {what} (`waiter`)")
        self.waiter(condition, timeout, f"{what} (channel {self.name})")

    @own_thread
    def cleanup(self) -> None:
        """The channel will not be used again (VmbChannelCleanup). Raises ChannelStateError unless disabled."""
        if self.state is not ChannelState.DISABLED:
            raise ChannelStateError(f"channel {self.name} is {self.state.value}: disable() it before cleanup()")
        self._cleaned_up = True

    def _require_disabled(self, call: str) -> None:
        self._require_usable(call)
        super()._require_disabled(call)

    def _require_usable(self, call: str) -> None:
        self.threads.require_own(call)
        if self._cleaned_up:
            raise ChannelStateError(f"channel {self.name} was cleaned up: {call} is not possible any more")

    @own_thread
    def quiesce(self) -> None:
        """Like `pause`, for a save: the owner's wish (`started`) stays as it is."""
        self.quiescing = True
        self._do_suspend()

    @own_thread
    def unquiesce(self) -> None:
        """End `quiesce`: active again if open and started."""
        self.quiescing = False
        self.activate()

    @property
    def active(self) -> bool:
        """Open and started: packets move."""
        return self.state is _ACTIVE

    @property
    def outstanding(self) -> list[int]:
        """Transaction ids of incoming packets that the owner has not completed."""
        return sorted(completion.transaction for completion in self.flow.outstanding)

    @property
    def quiescent(self) -> bool:
        """Not active, no incoming packet outstanding, nothing on its way to the ring or to the owner: the channel can
        be saved."""
        return (
            self.state is not _ACTIVE
            and not self.flow.outstanding
            and self.outgoing.settled
            and not self.threads.under_way
        )

    @own_thread
    def when_quiet(self, call: Callable[[], None]) -> None:
        """Call back once no incoming packet is outstanding; at once if that is so now."""
        if self.flow.outstanding:
            self._when_quiet.append(call)
            self.flow.attention = True
        else:
            call()

    def completed_one(self) -> None:
        """For `Flow`: an incoming packet was completed, and somebody wanted to know."""
        flow = self.flow
        incoming = self.incoming
        if flow.blocked and incoming.room:
            flow.blocked = False
            if self.link is not None:
                self.link.wake()
        allowance = incoming.allowance
        if allowance is not None:
            allowance.settle()
        if self._when_quiet and not flow.outstanding:
            self._run_when_quiet()
        flow.attention = flow.blocked or bool(self._when_quiet) or (allowance is not None and allowance.waiting)

    def _run_when_quiet(self) -> None:
        waiting, self._when_quiet = self._when_quiet, []
        for call in waiting:
            call()

    @own_thread
    def open(self, link: Link) -> None:
        """The other end has opened the channel. For the bus: call `activate` after it has answered.

        Raises whatever the owner's opened callback raised, the open rolled back.
        """
        self._attach(link)
        self._in_state_callback += 1
        try:
            self.observe("opened")
            if self._opened is not None:
                self._opened(self._channel)
        except Exception as error:
            self._let_observers_go()
            self._move(ChannelEvent.OPEN_FAILED)
            self.link = self.flow.writer = None
            self.flow.direct = False
            self.outgoing.cancel_all()
            if not isinstance(error, VmbusError):  # one of these is a refusal
                self._tell_owner_error("opened", error)
            raise
        finally:
            self._in_state_callback -= 1

    def _attach(self, link: Link) -> None:
        self._move(ChannelEvent.OPEN)
        self.link = link
        self.incoming.reset()
        self.outgoing.attached(link)
        self.flow.process_packet = self.incoming.process_at_passive if self.incoming.passive else self._process_packet
        # A multiple of 8, so that padding makes no difference.
        self.largest_payload = link.writer.largest - OVERHEAD
        self.flow.largest_reply = self.largest_payload
        self.flow.largest = min(self.largest_payload, self.maximum_packet_size)
        self.flow.context_size = self.client_context_size

    @own_thread
    def activate(self) -> None:
        """Become active if open and started. For the bus, and for `start`."""
        if self.state is not _OPENED or not self.started or self.quiescing or self._closing is not None:
            return
        self._move(ChannelEvent.ACTIVATE)
        self._call_state("started", self._started)
        if self.active:
            with self.outgoing.corked():
                self._guarded(lambda: self.outgoing.drain(_now() + TURN_SECONDS))
        if self.active:
            self._call_state("post_started", self._post_started)
        if self.link is not None:
            self.link.wake()

    @own_thread
    def close(self, done: Callable[[], None], *, force: bool = False) -> None:
        """The other end has closed the channel. For the bus: `done` is called when the owner has let go of everything.

        With `force` (reset, memory gone) incoming packets still held are orphaned: completing them does nothing.
        Nothing that happens meanwhile stops it half-way: not a ring that turns out to be broken, not an owner that
        raises.
        """
        if self.state not in (_OPENED, _ACTIVE, _CLOSING):
            raise ChannelStateError(f"channel {self.name} is {self.state.value}: it cannot be closed")
        first = self._closing is None
        if self._closing is None:
            self._closing = []
        self._closing.append(done)
        if force:
            # The rings are not ours any more: whatever the owner completes or sends from here on is not written.
            self._detach()
        if first:
            self._do_suspend()
            self._move(ChannelEvent.CLOSE)
            self.flow.direct = False
            self.when_quiet(self._finish_close)
        if force and self.state is _CLOSING:
            self._run_when_quiet()

    @own_thread
    def lost(self) -> None:
        """For a restore: at the save it was open, and the other end is gone since. The owner is told that it closed."""
        if self.state is ChannelState.CLOSED:
            self._call_state("closed", self._closed)

    def open_link(self, call: str, *, closing: bool) -> Link:
        """The link; with `closing` also until the closed callback has returned."""
        self.threads.require_own(call)
        link = self.link if self.link is not None or not closing else self._closing_link
        if link is None:
            raise ChannelStateError(f"channel {self.name} is {self.state.value}: {call} needs an open channel")
        return link

    def _detach(self) -> None:
        """Let go of the rings, and of every incoming packet that was not completed."""
        link = self.link
        if link is None:
            return
        self._let_observers_go()
        self.link = self.flow.writer = None
        self.flow.direct = False
        for completion in self.flow.outstanding:
            completion.orphan()
        self.flow.outstanding.clear()
        self.incoming.deferred.clear()
        self.incoming.reset()
        self._closing_link = link
        link.reader.close()
        link.writer.close()

    def _finish_close(self) -> None:
        if self.state is not _CLOSING:
            return
        self._detach()
        self.outgoing.cancel_all()
        self._move(ChannelEvent.CLOSED)
        self._call_state("closed", self._closed)
        self._closing_link = None
        done, self._closing = self._closing, None
        for call in done or ():
            call()

    def _do_suspend(self) -> None:
        self.threads.run_carried()
        if self.state is _ACTIVE:
            # Packets that were put off have been taken: their owner sees them before it is told that none will come.
            self.incoming.run_deferred()
        if self.state is _ACTIVE:
            self._move(ChannelEvent.SUSPEND)
            with self.outgoing.corked():
                self._call_state("suspend", self._suspend)
        if self.state is _OPENED:
            self.outgoing.run_routines()

    def _call_state(self, name: str, callback: Callable[[Channel], None] | None) -> None:
        if callback is None:
            return
        self._in_state_callback += 1
        try:
            callback(self._channel)
        except Exception as error:
            self.owner_failed(f"the state callback {name}", error)
        finally:
            self._in_state_callback -= 1

    # ---- what goes wrong -----------------------------------------------------------------------------------------

    def owner_failed(self, callback: str, error: BaseException, where: str = "") -> None:
        """A callback of the owner raised: that is told, and ends the channel, with that cause."""
        on = f" on {where}" if where else ""
        log.error("channel %s: %s raised%s", self.name, callback, on, exc_info=error)
        self._tell_owner_error(callback, error)
        self.fail(f"{callback} raised {error!r}{on}")

    def _tell_owner_error(self, callback: str, error: BaseException) -> None:
        if self.on_owner_error is not None and not isinstance(error, PeerError):
            self.on_owner_error(f"{callback} of channel {self.name}", error)

    def ring_failed(self, error: Exception) -> None:
        """An access to the rings raised. What a peer broke fails the channel; anything else is a defect of ours."""
        if not isinstance(error, PeerError):
            raise error
        self.broken(error)

    def broken(self, error: PeerError) -> None:
        """An access to the rings found them broken, or gone: that fails the channel."""
        self.fail(str(error), breach=not isinstance(error, MemoryRevoked))

    def _guarded(self, action: Callable[[], object]) -> None:
        """Run something that touches shared memory; a peer that broke the rules fails the channel, not the caller."""
        try:
            action()
        except PeerError as error:
            self.broken(error)

    def fail(self, reason: str, *, breach: bool = True) -> None:
        """Close this channel alone, because the other end (or the owner's code) broke its rules.

        Without `breach`: because the other end is gone, which is told to a record as an end like any other. While it
        is being closed already, what it holds is given up, and the close goes on.
        """
        if self.link is None or self.state not in (_OPENED, _ACTIVE, _CLOSING):
            return
        (log.error if breach else log.info)("channel %s failed: %s", self.name, reason)
        for observer in self.observing:
            observer.failed(reason, breach)
        if self._closing is not None:
            self._detach()
            if self.state is _CLOSING:
                self._run_when_quiet()
            return
        link = self.link
        self.close(lambda: None, force=True)
        link.failed(reason)

    # ---- who looks on ----------------------------------------------------------------------------------------------

    def observe(self, how: How, observers: Sequence[Observer] | None = None) -> None:
        """Ask observers (all that are there, if none are named) whether they look at the present life."""
        link = self.link
        assert link is not None
        for observer in self.observers if observers is None else observers:
            life = observer.opened(self._channel, link, how)
            if life is not None:
                self.observing.append(life)

    def _let_observers_go(self) -> None:
        observing, self.observing = self.observing, []
        for observer in observing:
            observer.closed()
