"""One PCI function's device: SynIC, bus, memory and channels tied together. No I/O of its own.

The surroundings give two callables: `interrupt` (raise the MSI) and `schedule` (call `service` soon). Everything runs
on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vmbus.bus.gpadl import Gpadl, GpadlError, Mappings, ring_extents
from vmbus.bus.local import LocalBus
from vmbus.bus.offers import Offer
from vmbus.bus.server import BusServer
from vmbus.bus.synic import Synic
from vmbus.device.observing import DeviceObserver
from vmbus.errors import PeerError
from vmbus.kmcl.allowance import SharedAllowance
from vmbus.kmcl.channel import Channel, Waiter
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.server import ServerChannel
from vmbus.kmcl.status import KmclError, Status
from vmbus.kmcl.threads import Carrier
from vmbus.kmcl.turns import one_round
from vmbus.memory.guest import Grant, GuestMemory, Window
from vmbus.ring import RingReader, RingWriter
from vmbus.util.backlog import Backlog
from vmbus.util.complaints import bounded_log
from vmbus.wire.synic import PostStatus

log = bounded_log(__name__)

ROUND_SECONDS = 0.01
"""Time after which a round of channels' turns lets the event loop have its turn, give or take a turn."""
LOOK_AGAIN_SECONDS = 0.005
"""After which a channel that went idle with transactions under way is looked at once more."""


class ServerLink:
    """What carries one open channel on the host: implements `vmbus.kmcl.channel.Link`."""

    def __init__(
        self,
        device: Device,
        offer: Offer,
        channel: ServerChannel,
        gpadl: Gpadl,
        own: tuple[int | None, int | None] = (None, None),
    ) -> None:
        """Opens the rings in the GPADL's memory. `own`: for a restore, the indices of ours that they must have.

        Raises PeerError when the guest's description does not fit, RingCorrupt when the rings are none.
        """
        assert offer.request is not None
        parts = ring_extents(gpadl, offer.request.downstream_page_offset)
        self._device = device
        self._offer = offer
        self._channel = channel
        self.memory = device.memory
        self.mappings = Mappings(device.memory)
        self._gone = False
        opened = []
        try:
            for part in parts:
                opened.append(self.memory.window(part))
            self.reader = RingReader(opened[0], opened[1], own=own[0])
            self.writer = RingWriter(opened[2], opened[3], own=own[1])
        except PeerError:
            for window in opened:
                window.close()
            raise
        # Until the channel's first turn ends idle, the guest need not signal.
        self.reader.mask()
        for window in opened:
            window.on_revoke = self._revoked

    def _revoked(self) -> None:
        if not self._gone:
            self._gone = True
            self._device.backlog.do(self._fail)

    def _fail(self) -> None:
        if self._channel.link is self:
            self._channel.fail("the guest unmapped its rings", breach=False)

    def signal(self) -> None:
        """The guest is to look at this channel's rings."""
        self._device.synic.raise_event(self._offer.relid)

    def wake(self) -> None:
        """Give the channel a turn soon."""
        self._device.wake(self._channel)

    def failed(self, reason: str) -> None:
        """The guest broke the channel: it is withdrawn, and offered anew once the guest has released it."""
        self._device.bus.rescind_in_pieces(self._offer)

    def map_gpadl(self, handle: int, read_only: bool) -> Grant:
        """The memory of a GPADL of this channel, in the dirty log while mapped unless `read_only`.

        The guest gets its memory back after `unmap_gpadl`, or when the channel is closed. Raises GpadlError,
        GpadlMapped, and MemoryFault when the guest has not made the memory reachable.
        """
        bus = self._device.bus
        gpadl = bus.map_gpadl(self._offer, handle)
        try:
            return self.mappings.map(gpadl, read_only=read_only)
        except BaseException:
            bus.unmap_gpadl(self._offer, handle)
            raise

    def open_gpadl(self, handle: int, most: int) -> Window:
        """The same as one window, of which only what is written gets into the dirty log. Raises as `map_gpadl`, and
        GpadlError for more than `most` bytes."""
        bus = self._device.bus
        gpadl = bus.map_gpadl(self._offer, handle)
        try:
            return self.mappings.open(gpadl, most)
        except BaseException:
            bus.unmap_gpadl(self._offer, handle)
            raise

    def unmap_gpadl(self, handle: int) -> None:
        """End a mapping. Raises GpadlError when there is none."""
        self.mappings.unmap(handle)
        self._device.bus.unmap_gpadl(self._offer, handle)


class Device:
    """The device. `channels` are those that providers have allocated, in order.

    `observers` look at the channels that the guest is offered: see `add_observer`.
    """

    def __init__(
        self,
        interrupt: Callable[[], None],
        schedule: Callable[[], None],
        *,
        waiter: Waiter | None = None,
        carrier: Carrier | None = None,
        later: Callable[[float, Callable[[], None]], object] | None = None,
        local_schedule: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            interrupt: raise the MSI.
            schedule: have `service` called soon.
            waiter: how blocking calls of channels wait; None: they cannot.
            carrier: how calls of other threads get to this one; None: they are refused.
            later: have something called after some seconds; None: no channel is looked at again.
            local_schedule: have `local_bus.service` called soon; None: somebody calls `local_bus.run`.
            clock: seconds, for how long a turn may be.
        """
        self._interrupt = interrupt
        self._schedule = schedule
        self.memory = GuestMemory()
        self.synic = Synic(self.memory, self)
        self._clock = clock
        self.backlog = Backlog(schedule, clock)
        self.bus = BusServer(self, self.backlog)
        self.channels: list[ServerChannel] = []
        self.resets = 0
        self.frozen = False
        self.waiter = waiter
        self.carrier = carrier
        self._later = later
        self.allowance = SharedAllowance(lambda: self.channels, schedule)
        self.internal_errors = 0
        # Channels that went idle with transactions under way, to be looked at again; and those that were.
        self._idle: dict[Channel, None] = {}
        self._looked_again: dict[Channel, int] = {}
        self.observers: list[DeviceObserver] = []
        self.local_bus = LocalBus(local_schedule, waiter=waiter)
        self._offers: dict[int, Offer] = {}
        self._links: dict[int, ServerLink] = {}
        self._ready: dict[ServerChannel, None] = {}

    # ---- providers ---------------------------------------------------------------------------------------------

    def add_channel(self, channel: ServerChannel) -> None:
        """Bind a channel to this device; it is offered when it is enabled.

        One with a local offer goes to `local_bus`, not to the guest.
        """
        if channel.waiter is None:
            channel.waiter = self.waiter
        channel.carrier = self.carrier
        channel.bind(self._offer_channel, self._withdraw_channel)
        if channel not in self.channels:
            self.channels.append(channel)

    def remove_channel(self, channel: ServerChannel, gone: Callable[[], None] | None = None) -> None:
        """Forget a channel, withdrawn and closed by force if need be. Harmless for one that is not here.

        `gone` is called when the guest has forgotten it, too: has released it, or lost its connection.
        """
        offer = self._offers.get(id(channel))
        if offer is not None:
            offer.on_gone = gone
        elif gone is not None:
            gone()
        if channel.state is not ChannelState.DISABLED:
            self._withdraw_channel(channel)
            if channel.state is ChannelState.CLOSED:
                channel.disable(0)
        if channel in self.channels:
            self.channels.remove(channel)
        for table in (self._ready, self._idle, self._looked_again, self.allowance.refused):
            table.pop(channel, None)

    def _offer_channel(self, channel: ServerChannel) -> None:
        if channel.loopback_offer:
            # Its rings are not the guest's, so it is no part of what is saved.
            self.channels.remove(channel)
            self.local_bus.offer_enabled(channel)
            return
        channel.incoming.bind(self.allowance)
        channel.on_idle = self._went_idle
        channel.observers = list(self.observers)
        offer = Offer(
            channel.interface_type,
            channel.interface_instance,
            channel.offer_flags,
            channel.user_defined,
            channel,
            channel.subchannel_index,
            (channel.mmio_megabytes, channel.mmio_megabytes_optional),
        )
        self.bus.offer(offer)
        self._offers[id(channel)] = offer

    def _withdraw_channel(self, channel: ServerChannel) -> None:
        if channel.loopback_offer:
            self.local_bus.disabled(channel)
            return
        offer = self._offers.pop(id(channel), None)
        if offer is not None:
            self.bus.withdraw(offer)

    def add_observer(self, observer: DeviceObserver) -> None:
        """From here on it is told of the channels that the guest is offered, also of those that are open."""
        self.observers.append(observer)
        for channel in self.channels:
            if not channel.loopback_offer:
                channel.observers.append(observer)
                if channel.link is not None:
                    channel.observe("joined", [observer])

    def remove_observer(self, observer: DeviceObserver) -> None:
        """It is asked about no further opening; what it looks at now is its own to let go of."""
        self.observers.remove(observer)
        for channel in self.channels:
            if observer in channel.observers:
                channel.observers.remove(observer)

    def relid_of(self, channel: ServerChannel) -> int:
        """The number under which the guest knows a channel, 0 while it does not."""
        offer = self._offers.get(id(channel))
        return 0 if offer is None else offer.relid

    # ---- turns -------------------------------------------------------------------------------------------------

    def wake(self, channel: ServerChannel) -> None:
        """Give a channel a turn at the next `service`."""
        if not self._ready and not self.frozen:
            self._schedule()
        self._ready[channel] = None

    def service(self) -> None:
        """Give every channel that asked for it one turn."""
        if self.frozen:
            return
        try:
            self.backlog.run()
        except Exception:
            self.internal_errors += 1
            log.exception("what a guest's request made necessary was not carried out to its end")
        until = self._clock() + ROUND_SECONDS
        self.allowance.look()
        try:
            with self.backlog.turn():
                one_round(self._ready, lambda: self.frozen or self._clock() > until)
        finally:
            if self.busy:
                self._schedule()

    def _went_idle(self, channel: Channel) -> None:
        """A belt beside the fences: should a signal be lost, the channel does not wait for it for ever."""
        if self._later is None or self._looked_again.get(channel) == channel.flow.received + channel.flow.completed:
            return
        if not self._idle:
            self._later(LOOK_AGAIN_SECONDS, self._look_again)
        self._idle[channel] = None

    def _look_again(self) -> None:
        """Once for each time that a channel went idle."""
        idle, self._idle = self._idle, {}
        for channel in idle:
            if channel.link is not None:
                self._looked_again[channel] = channel.flow.received + channel.flow.completed
                channel.link.wake()

    @property
    def busy(self) -> bool:
        """Whether channels wait for their turn, or other work does."""
        return bool(self._ready or self.backlog) and not self.frozen

    def freeze(self) -> None:
        """Nothing takes a turn until `thaw`, and nothing is left half done."""
        self.backlog.finish()
        self.backlog.at_once = True
        self.frozen = True

    def thaw(self) -> None:
        """Turns are given again; every open channel gets one, since it may have missed a signal."""
        self.frozen = False
        self.backlog.at_once = False
        for channel in self.channels:
            self._ready[channel] = None
        self._schedule()
        self.synic.deliver()  # what a save has left there

    # ---- the PCI function --------------------------------------------------------------------------------------

    def bar_read(self, offset: int, size: int) -> bytes:
        return self.synic.read(offset, size)

    def bar_write(self, offset: int, data: bytes) -> None:
        """A write to BAR0. Never raises: it comes from a guest, and everything else goes on."""
        try:
            self.synic.write(offset, data)
        except Exception:
            # What a guest or an owner does wrong is caught where it belongs; this is a defect of ours.
            self.internal_errors += 1
            log.exception("a write of %s to offset %#x of BAR0 was not carried out to its end", data.hex(), offset)

    def reset(self) -> None:
        """Power-on state: every channel is closed by force, the guest's connection forgotten. Offers stay."""
        self.resets += 1
        self.bus.reset()
        self.synic.reset()
        for table in (self._ready, self._idle, self._looked_again, self.allowance.refused):
            table.clear()

    # ---- SynicActions ------------------------------------------------------------------------------------------

    def posted(self, connection_id: int, message: bytes) -> PostStatus:
        if not self.bus.accepts(connection_id):
            return PostStatus.INVALID_CONNECTION_ID
        self.bus.receive(message)
        return PostStatus.SUCCESS

    def signalled(self, connection_id: int) -> None:
        offer = self.bus.find(connection_id)
        if offer is not None:
            self.wake(offer.owner)

    def reset_requested(self) -> None:
        """The guest asked for a reset through a register, or took the pages for messages back."""
        self.reset()

    def interrupt(self) -> None:
        self._interrupt()

    # ---- BusActions --------------------------------------------------------------------------------------------

    def post(self, message: bytes) -> None:
        self.synic.post(message)

    def open_channel(self, offer: Offer, gpadl: Gpadl) -> None:
        """The guest opens a channel: rings first, then its owner is asked."""
        channel: ServerChannel = offer.owner
        try:
            link = ServerLink(self, offer, channel, gpadl)
        except PeerError as error:
            log.warning("channel %s not opened: %s", channel.name, error)
            self.bus.opened(offer, Status.INVALID_PARAMETER)
            return
        self._links[id(offer)] = link
        try:
            channel.open(link)
        except Exception as error:
            log.warning("channel %s not opened: its owner refused: %r", channel.name, error)
            self._let_go(offer)
            link.reader.close()
            link.writer.close()
            self.bus.opened(offer, error.status if isinstance(error, KmclError) else Status.UNSUCCESSFUL)
            return
        self.bus.opened(offer, 0)

    def channel_answered(self, offer: Offer) -> None:
        """The guest knows that the channel is open."""
        channel: ServerChannel = offer.owner
        channel.activate()

    def cut_off(self) -> None:
        """All memory is the guest's again."""
        self.memory.revoke_windows()

    def close_channel(self, offer: Offer, force: bool) -> None:
        channel: ServerChannel = offer.owner

        def closed() -> None:
            self._let_go(offer)
            self.bus.closed(offer)

        if channel.state in (ChannelState.OPENED, ChannelState.ACTIVE, ChannelState.CLOSING):
            channel.close(closed, force=force)
        else:
            closed()

    def _let_go(self, offer: Offer) -> None:
        """The channel is closed: what its owner still has mapped is unmapped."""
        link = self._links.pop(id(offer), None)
        if link is not None:
            if link.mappings:
                log.warning(
                    "channel %s was closed with GPADLs %s mapped: its owner has to unmap them when it is closed",
                    offer.owner.name,
                    [hex(handle) for handle in link.mappings.handles],
                )
            link.mappings.clear()

    # ---- restore -----------------------------------------------------------------------------------------------

    def reattach(self, offer: Offer, own: tuple[int | None, int | None]) -> None:
        """For restore: put an open channel back on its rings, in which we had published the indices `own` (None: not
        known). Raises RingCorrupt when that is not so, other PeerErrors when the memory is not there."""
        assert offer.request is not None
        gpadl = self.bus.gpadls.complete.get((offer.relid, offer.request.ring_gpadl))
        if gpadl is None:
            raise GpadlError(f"the ring GPADL {offer.request.ring_gpadl:#x} of relid {offer.relid} was not saved")
        channel: ServerChannel = offer.owner
        link = ServerLink(self, offer, channel, gpadl, own)
        self._links[id(offer)] = link
        channel.reopen(link)

    # ---- inspection --------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Everything about the device, as plain data."""
        return {
            "synic": {
                "enabled": self.synic.enabled,
                "fault": self.synic.fault,
                "messages_waiting": len(self.synic.outbox),
                "bad_accesses": self.synic.bad_accesses,
            },
            "bus": {
                "state": self.bus.state.value,
                "version": self.bus.version,
                "offers": [
                    {
                        "relid": offer.relid,
                        "state": offer.state.value,
                        "type": str(offer.interface_type),
                        "instance": str(offer.instance),
                        "subchannel": offer.subchannel,
                        "withdrawn": not offer.wanted,
                        "gpadls_mapped": len(offer.mapped),
                    }
                    for offer in self.bus.offers
                ],
                "gpadls": [
                    {"relid": gpadl.relid, "handle": gpadl.handle, "bytes": gpadl.size}
                    for gpadl in self.bus.gpadls.complete.values()
                ],
                "messages_rejected": self.bus.rejected,
            },
            "memory": {
                "regions": len(self.memory.mapped()),
                "dirty_log": None if self.memory.log is None else len(self.memory.log.pages),
            },
            "channels": [channel.describe() for channel in self.channels],
            "requests": self.allowance.summary(),
            "internal_errors": self.internal_errors,
            "resets": self.resets,
        }
