"""The guest's driver: SynIC registers, bus client and KMCL client channels over any `PciFunction`.

One thread. Everything that waits does so in `run_until`, which pumps interrupts, messages and channels, has a bound,
and says what it waited for.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING
from uuid import UUID

from vmbus.bus.client import VERSIONS, BusClient
from vmbus.errors import EnvironmentProblem, PeerError, UsageError, WaitTimeout
from vmbus.fence import full_fence
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.memory import GuestMemory
from vmbus.ring import FEATURE_BITS, FEATURE_PENDING_SEND_SIZE, RingReader, RingWriter
from vmbus.watches import Watches
from vmbus.wire import messages as m
from vmbus.wire.gpa import PAGE_SIZE, range_for
from vmbus.wire.synic import (
    ABI_VERSION,
    CONTROL_ENABLE,
    CONTROL_RESET,
    MAGIC,
    MESSAGE_TYPE,
    PAGE_VALID,
    POST_HEADER,
    SLOT_FLAG_PENDING,
    SLOT_HEADER,
    SLOT_OFFSET,
    SLOT_SIZE,
    PostStatus,
    Register,
)
from vmbus_guest.pci import DmaBuffer, PciFunction

if TYPE_CHECKING:
    from vmbus.audit.recorder import Recorder

DEFAULT_TIMEOUT = 30.0


LOOK_AGAIN = 0.005
"""Seconds after which channels that went idle with transactions under way are looked at once more."""
LONGEST_TURN = 5.0
"""Seconds between two looks at the clock beyond which it has jumped."""


class SteadyClock:
    """Seconds since it was made, as somebody counts them who looks at least every few seconds: jumps of the clock
    count as `LONGEST_TURN`."""

    def __init__(self) -> None:
        self._elapsed = 0.0
        self._looked = time.monotonic()

    def elapsed(self) -> float:
        """Seconds so far."""
        now = time.monotonic()
        self._elapsed += min(now - self._looked, LONGEST_TURN)
        self._looked = now
        return self._elapsed


class GpadlRefused(PeerError):
    """The host does not take memory that was offered to it."""


class ChannelRescinded(PeerError):
    """The host has withdrawn a channel instead of answering."""


class ClientLink:
    """What carries one open channel in the guest: implements `vmbus.kmcl.channel.Link`."""

    def __init__(
        self,
        driver: "VmbusDriver",
        channel: ClientChannel,
        offer: m.OfferChannel,
        rings: DmaBuffer,
        gpadl: int,
        reader: RingReader,
        writer: RingWriter,
    ) -> None:
        self._driver = driver
        self.channel = channel
        self.offer = offer
        self.rings = rings
        self.gpadl = gpadl
        self.reader = reader
        self.writer = writer
        self.memory = driver.memory
        # Handles of memory lent beyond the rings; the host was told of it.
        self.gpadls: set[int] = set()

    def signal(self) -> None:
        """Ring the doorbell."""
        self._driver.function.write32(Register.SIGNAL_EVENT, self.offer.connection_id)

    def wake(self) -> None:
        """Give the channel a turn."""
        self._driver.wake(self.channel)

    def failed(self, reason: str) -> None:
        """The host broke the channel; it stays in the tables until the driver is closed."""
        self._driver.failures.append(f"channel {self.channel.name}: {reason}")

    def create_gpadl(self, extents: Sequence[tuple[int, int]], read_only: bool) -> int:
        """Lend memory to the host; returns the handle once the host has accepted it.

        `read_only` is a hint for the owner, and does not travel. Raises GpadlRefused, WaitTimeout, and PeerError when
        the channel is rescinded meanwhile.
        """
        driver, relid, name = self._driver, self.offer.relid, self.channel.name
        handle = driver.bus.create_gpadl(relid, [range_for(address, length) for address, length in extents])
        driver.await_answer(self.offer, lambda: handle in driver.bus.created, f"GPADL_CREATED on channel {name}")
        status = driver.bus.created.pop(handle)
        if status:
            raise GpadlRefused(f"the host refused memory that channel {name} lends to it: {status:#010x}")
        self.gpadls.add(handle)
        return handle

    def delete_gpadl(self, handle: int) -> None:
        """Take memory back; returns when the host has let go of it, which waits while it is mapped there.

        Raises UsageError for a handle that is not lent, WaitTimeout, PeerError when the channel is rescinded.
        """
        driver, name = self._driver, self.channel.name
        if handle not in self.gpadls:
            raise UsageError(f"channel {name} has lent no memory as GPADL {handle:#x}")
        self.gpadls.discard(handle)
        driver.bus.teardown_gpadl(self.offer.relid, handle)
        driver.await_answer(self.offer, lambda: handle in driver.bus.torndown, f"GPADL_TORNDOWN on channel {name}")
        driver.bus.torndown.discard(handle)

    def close_channel(self, timeout: float) -> None:
        """Close the channel, see `VmbusDriver.close_channel`."""
        self._driver.close_channel(self.channel, timeout)


class VmbusDriver:
    """A connection to the device. Use it as a context manager.

    Attributes:
        function: the PCI function.
        bus: the bus client with its tables.
        failures: what went wrong on channels, as text.
        rescinded: instances that the host has withdrawn, in that order.
        on_rescind: called with a client channel that was open when the host withdrew it; it is disabled by then, and
            can be enabled again when it is offered anew.
        recorder: records what happens to the packets of channels that are attached from here on; None: nobody does.
        interrupts: how many were taken.
    """

    def __init__(
        self, function: PciFunction, *, versions: tuple[int, ...] = VERSIONS, recorder: "Recorder | None" = None
    ) -> None:
        """Reset the device, connect with the newest version that it takes, and fetch the offers.

        Raises EnvironmentProblem when the function is not ours or speaks no version in `versions`, WaitTimeout when
        it does not answer.
        """
        self.function = function
        self.recorder = recorder
        self.interrupts = 0
        self._claimed: set[tuple[UUID, UUID]] = set()
        self.memory = GuestMemory()
        self.bus = BusClient(self._post)
        self.bus.on_rescind = self._rescinded
        self.failures: list[str] = []
        self.rescinded: list[UUID] = []
        self.on_rescind: Callable[[ClientChannel], None] | None = None
        self._waiting: list[ClientChannel] = []
        self._opening = False
        self._opening_waiting = False
        self._links: dict[int, ClientLink] = {}
        self._ready: dict[Channel, None] = {}
        self._idle: dict[Channel, None] = {}
        self._idle_since = 0.0
        self._looked_again: dict[Channel, int] = {}
        self._buffers: list[DmaBuffer] = []
        self._watches: Watches | None = None
        if function.read32(Register.MAGIC) != MAGIC:
            raise EnvironmentProblem(f"BAR0 reads {function.read32(Register.MAGIC):#x}: this is not a VMBus function")
        abi = function.read32(Register.ABI_VERSION)
        if abi >> 16 != ABI_VERSION >> 16:
            raise EnvironmentProblem(f"the device's ABI is {abi >> 16}.{abi & 0xFFFF}; this driver knows 1.x")
        self._pages = self.allocate(4 * PAGE_SIZE)
        self._message_view = self._pages.view[0:PAGE_SIZE]
        self._slot_type = self._message_view[SLOT_OFFSET : SLOT_OFFSET + 4].cast("I")
        self._event_view = self._pages.view[PAGE_SIZE : 2 * PAGE_SIZE]
        self._post_view = self._pages.view[2 * PAGE_SIZE : 2 * PAGE_SIZE + 256]
        self._reset()
        self._connect(versions)

    def __enter__(self) -> "VmbusDriver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(graceful=kind is None)

    # ---- memory --------------------------------------------------------------------------------------------------

    def allocate(self, size: int) -> DmaBuffer:
        """Zeroed memory that the device can reach; `size` is a multiple of 4096 bytes."""
        buffer = self.function.allocate(size)
        self.memory.map(buffer.iova, buffer.view, True)
        self._buffers.append(buffer)
        return buffer

    def free(self, buffer: DmaBuffer) -> None:
        """Give memory of `allocate` back."""
        self._buffers.remove(buffer)
        self.memory.unmap(buffer.iova, buffer.size)
        self.function.free(buffer)

    @staticmethod
    def external(buffer: DmaBuffer, offset: int = 0, length: int | None = None) -> list[tuple[int, int]]:
        """Part of a buffer, in the form that `Packet.send` takes as external data."""
        return [(buffer.iova + offset, buffer.size - offset if length is None else length)]

    # ---- connection ------------------------------------------------------------------------------------------------

    def _reset(self) -> None:
        write = self.function.write32
        write(Register.CONTROL, CONTROL_RESET)
        for low, address in (
            (Register.MESSAGE_PAGE_LOW, self._pages.iova | PAGE_VALID),
            (Register.EVENT_PAGE_LOW, (self._pages.iova + PAGE_SIZE) | PAGE_VALID),
            (Register.POST_ADDRESS_LOW, self._pages.iova + 2 * PAGE_SIZE),
        ):
            write(low, address & 0xFFFFFFFF)
            write(low + 4, address >> 32)
        write(Register.CONTROL, CONTROL_ENABLE)
        if not self.function.read32(Register.CONTROL) & CONTROL_ENABLE:
            raise EnvironmentProblem("the device cannot reach its message page: is bus mastering on, is it mapped?")

    def _connect(self, versions: tuple[int, ...]) -> None:
        for version in versions:
            self.bus.initiate_contact(version)
            self.run_until(lambda: self.bus.version_response is not None, DEFAULT_TIMEOUT, "the VERSION_RESPONSE")
            response = self.bus.version_response
            if response is not None and response.supported:
                break
        else:
            raise EnvironmentProblem(f"the device takes none of the versions {[hex(v) for v in versions]}")
        self.bus.request_offers()
        self.run_until(lambda: self.bus.all_offers, DEFAULT_TIMEOUT, "the host's offers")

    def _post(self, connection_id: int, message: bytes) -> None:
        block = POST_HEADER.pack(connection_id, 0, MESSAGE_TYPE, len(message)) + message
        deadline = time.monotonic() + DEFAULT_TIMEOUT
        while True:
            self._post_view[: len(block)] = block
            self.function.write32(Register.POST_MESSAGE, 1)
            status = self.function.read32(Register.POST_STATUS)
            if status == PostStatus.SUCCESS:
                return
            if status != PostStatus.INSUFFICIENT_BUFFERS:
                raise PeerError(f"the device refused message {message[0]} on connection {connection_id}: {status}")
            if time.monotonic() > deadline:
                raise WaitTimeout("the device to take a message", DEFAULT_TIMEOUT)
            self._take_message()

    def close(self, *, graceful: bool = True) -> None:
        """Close all channels, unload, reset the device and free everything. Without `graceful`, only the reset."""
        try:
            if graceful:
                for relid, link in list(self._links.items()):
                    if relid in self._links:  # not closed with its primary
                        self.close_channel(link.channel)
                self.bus.unload()
                self.run_until(lambda: self.bus.unloaded, DEFAULT_TIMEOUT, "the UNLOAD_RESPONSE")
        finally:
            self.function.write32(Register.CONTROL, CONTROL_RESET)
            self.function.read32(Register.STATUS)
            for link in list(self._links.values()):
                if link.channel.state in (ChannelState.OPENED, ChannelState.ACTIVE):
                    link.channel.close(lambda: None, force=True)
            self._links.clear()
            self._slot_type.release()
            for view in (self._message_view, self._event_view, self._post_view):
                view.release()
            for buffer in list(self._buffers):
                self.free(buffer)
            if self._watches is not None:
                self._watches.close()
                self._watches = None
            self.function.close()

    # ---- channels --------------------------------------------------------------------------------------------------

    def client_channel(
        self,
        interface_type: UUID,
        *,
        instance: UUID | None = None,
        ring_pages_in: int = 16,
        ring_pages_out: int = 16,
        name: str = "",
        subchannel_index: int = 0,
    ) -> ClientChannel:
        """A disabled client channel: set its callbacks, then `enable` it.

        `enable` of the driver waits until it is open; the channel's own only registers it, and `step` opens it once
        it is offered.
        """
        channel = ClientChannel(
            interface_type,
            instance,
            ring_pages_in=ring_pages_in,
            ring_pages_out=ring_pages_out,
            name=name,
            subchannel_index=subchannel_index,
        )
        self.attach(channel)
        return channel

    def claim(
        self,
        interface_type: UUID,
        instance: UUID | None = None,
        *,
        wanted: Callable[[m.OfferChannel], bool] = lambda offer: True,
    ) -> UUID | None:
        """Choose an instance that is offered and that nobody has claimed before; for users of one driver that would
        otherwise open the same channel. None when no instance of the type is offered (yet).

        Raises UsageError when `instance`, or every instance that is `wanted`, is somebody's already.
        """
        offers = [
            offer.interface_instance
            for relid, offer in self.bus.offers.items()
            if offer.interface_type == interface_type
            and not offer.subchannel_index
            and relid not in self.bus.rescinded
            and wanted(offer)
        ]
        free = [one for one in ([instance] if instance else offers) if (interface_type, one) not in self._claimed]
        if free:
            self._claimed.add((interface_type, free[0]))
            return free[0]
        if instance is None and not offers:
            return None
        raise UsageError(
            f"all {len(offers)} channels of type {interface_type} that this device offers are in use by workloads that "
            "run already: give the device another provider of that kind"
        )

    def attach(self, channel: ClientChannel) -> None:
        """Tie a disabled channel that was made elsewhere to this driver."""
        channel.bind(self._channel_enabled)
        channel.observers = [] if self.recorder is None else [self.recorder]
        channel.waiter = self.run_until
        channel.on_idle = self._went_idle

    def _channel_enabled(self, channel: ClientChannel) -> None:
        if not self._opening:
            self._waiting.append(channel)

    def _offer_for(self, channel: ClientChannel) -> m.OfferChannel | None:
        return self.bus.find_offer(channel.interface_type, channel.interface_instance, channel.subchannel_index)

    def _open_waiting(self) -> None:
        # Opening one pumps; the others have their turn when it is open.
        self._opening_waiting = True
        try:
            for channel in list(self._waiting):
                if channel.state is not ChannelState.CLOSED:
                    self._waiting.remove(channel)
                    continue
                offer = self._offer_for(channel)
                if offer is not None and offer.relid not in self._links:
                    self._waiting.remove(channel)
                    self._open_one(channel, offer)
        finally:
            self._opening_waiting = False

    def _open_one(self, channel: ClientChannel, offer: m.OfferChannel) -> None:
        try:
            self._open(channel, offer, DEFAULT_TIMEOUT)
        except ChannelRescinded:
            self._waiting.append(channel)  # for the next offer
        except (PeerError, WaitTimeout) as error:
            self.failures.append(f"channel {channel.name}: {error}")

    def enable(self, channel: ClientChannel, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Wait for the channel's offer, donate its rings and open it; it is active when this returns.

        Raises WaitTimeout, or PeerError when the host refuses it; the channel is then disabled.
        """
        self._opening = True
        try:
            channel.enable()
        finally:
            self._opening = False
        if channel.waiter is None:
            channel.waiter = self.run_until
        try:
            deadline = time.monotonic() + timeout
            while channel.state is ChannelState.CLOSED:
                left = max(deadline - time.monotonic(), 0.0)
                self.run_until(
                    lambda: self._offer_for(channel) is not None, left, f"an offer for channel {channel.name}"
                )
                offer = self._offer_for(channel)
                assert offer is not None
                # An offer that is withdrawn meanwhile may be followed by another.
                with contextlib.suppress(ChannelRescinded):
                    self._open(channel, offer, timeout)
        except BaseException:
            channel.disable()
            raise

    def await_answer(
        self, offer: m.OfferChannel, condition: Callable[[], bool], what: str, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        """`run_until` for an answer on one channel. Raises ChannelRescinded when it is withdrawn instead."""
        offers, relid = self.bus.offers, offer.relid
        self.run_until(lambda: condition() or offers.get(relid) is not offer, timeout, what)
        if offers.get(relid) is not offer:
            raise ChannelRescinded(f"the host withdrew the channel with relid {relid} instead of {what}")

    def _open(self, channel: ClientChannel, offer: m.OfferChannel, timeout: float) -> None:
        out_pages, in_pages = channel.ring_pages_out + 1, channel.ring_pages_in + 1
        rings = self.allocate((out_pages + in_pages) * PAGE_SIZE)
        try:
            self._open_on(channel, offer, rings, timeout)
        except PeerError:
            # The host has answered, and does not use the rings. (Without an answer it may: they stay.)
            self.free(rings)
            raise

    def _open_on(self, channel: ClientChannel, offer: m.OfferChannel, rings: DmaBuffer, timeout: float) -> None:
        out_pages = channel.ring_pages_out + 1
        split = out_pages * PAGE_SIZE
        windows = [
            self.memory.window([(rings.iova + start, length)])
            for start, length in (
                (0, PAGE_SIZE),
                (PAGE_SIZE, split - PAGE_SIZE),
                (split, PAGE_SIZE),
                (split + PAGE_SIZE, rings.size - split - PAGE_SIZE),
            )
        ]
        windows[0].store32(FEATURE_BITS, FEATURE_PENDING_SEND_SIZE)
        windows[2].store32(FEATURE_BITS, FEATURE_PENDING_SEND_SIZE)
        relid = offer.relid
        gpadl = self.bus.create_gpadl(relid, [range_for(rings.iova, rings.size)])
        self.await_answer(
            offer, lambda: gpadl in self.bus.created, f"GPADL_CREATED for channel {channel.name}", timeout
        )
        status = self.bus.created[gpadl]
        if status:
            channel.connection_failed(status)
            raise PeerError(f"the host refused the rings of channel {channel.name}: {status:#x}")
        self.bus.open_channel(relid, gpadl, out_pages)
        self.await_answer(
            offer, lambda: relid in self.bus.open_results, f"OPENCHANNEL_RESULT of channel {channel.name}", timeout
        )
        status = self.bus.open_results[relid]
        if status:
            self.bus.teardown_gpadl(relid, gpadl)
            self.await_answer(
                offer, lambda: gpadl in self.bus.torndown, f"GPADL_TORNDOWN of channel {channel.name}", timeout
            )
            channel.connection_failed(status)
            raise PeerError(f"the host refused to open channel {channel.name}: {status:#010x}")
        reader, writer = RingReader(windows[2], windows[3]), RingWriter(windows[0], windows[1])
        link = ClientLink(self, channel, offer, rings, gpadl, reader, writer)
        self._links[relid] = link
        channel.open(link)
        channel.activate()

    def close_channel(self, channel: ClientChannel, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Close a channel, its sub-channels first, and take its memory back once the host has let go of it."""
        link = self.link_of(channel)
        relid = link.offer.relid
        if not link.offer.subchannel_index:
            for other in list(self._links.values()):
                if other is not link and other.offer.interface_instance == link.offer.interface_instance:
                    self.close_channel(other.channel, timeout)
        channel.begin_pause()
        if relid in self.bus.offers:
            self.bus.close_channel(relid)
        closed: list[bool] = []
        if channel.state in (ChannelState.OPENED, ChannelState.ACTIVE):
            channel.close(lambda: closed.append(True))
            self.run_until(lambda: bool(closed), timeout, f"packets of channel {channel.name} to be completed")
        if self._links.pop(relid, None) is None:
            return  # rescinded while its packets were awaited: all is given back
        if relid in self.bus.offers:
            handles = [link.gpadl, *link.gpadls]
            for handle in handles:
                self.bus.teardown_gpadl(relid, handle)
            self.run_until(
                lambda: self.bus.torndown.issuperset(handles) or relid not in self.bus.offers,
                timeout,
                f"GPADL_TORNDOWN of channel {channel.name}",
            )
        channel.disable()
        self.free(link.rings)

    def create_gpadl(self, channel: ClientChannel, buffer: DmaBuffer, *, read_only: bool = False) -> int:
        """Lend a whole buffer of `allocate` to the host's end of an open channel; see `ClientChannel.create_gpadl`."""
        return channel.create_gpadl(self.external(buffer), read_only=read_only)

    def link_of(self, channel: ClientChannel) -> ClientLink:
        """The link of an open channel. Raises UsageError when it is not open."""
        for link in self._links.values():
            if link.channel is channel:
                return link
        raise UsageError(f"channel {channel.name} is not open on this driver")

    def _rescinded(self, offer: m.OfferChannel) -> None:
        self.rescinded.append(offer.interface_instance)
        link = self._links.pop(offer.relid, None)
        if link is not None:
            if link.channel.state in (ChannelState.OPENED, ChannelState.ACTIVE, ChannelState.CLOSING):
                link.channel.close(lambda: None, force=True)
            if link.channel.state is ChannelState.CLOSED:
                link.channel.disable()
            self.free(link.rings)
        self.bus.release(offer.relid)
        if link is not None and self.on_rescind is not None:
            self.on_rescind(link.channel)

    # ---- other descriptors ---------------------------------------------------------------------------------------

    def watch(self, fd: int, call: Callable[[], None]) -> None:
        """Have `call` made in a step whenever `fd` is readable, or hung up (level-triggered).

        `step` returns when it is, as it does for an interrupt. `fd` is non-blocking; `unwatch` it before closing it.
        Raises UsageError for a descriptor that cannot be watched.
        """
        self._watched().add_reader(fd, call)

    def watch_writable(self, fd: int, call: Callable[[], None]) -> None:
        """As `watch`, whenever `fd` can be written to."""
        self._watched().add_writer(fd, call)

    def unwatch(self, fd: int) -> None:
        """End `watch`. Harmless without one."""
        if self._watches is not None:
            self._watches.remove_reader(fd)

    def unwatch_writable(self, fd: int) -> None:
        """End `watch_writable`. Harmless without one."""
        if self._watches is not None:
            self._watches.remove_writer(fd)

    def _watched(self) -> Watches:
        if self._watches is None:
            self._watches = Watches()
            # So that one wait serves all; `step` drains it.
            self._watches.add_reader(self.function.interrupt_fd, lambda: None)
        return self._watches

    # ---- the pump --------------------------------------------------------------------------------------------------

    def wake(self, channel: Channel) -> None:
        """Give a channel a turn at the next step."""
        self._ready[channel] = None

    def _went_idle(self, channel: Channel) -> None:
        """A belt beside the fences: should an interrupt be lost, the channel does not wait for it for ever."""
        if self._looked_again.get(channel) != channel.flow.received + channel.flow.completed:
            if not self._idle:
                self._idle_since = time.monotonic()
            self._idle[channel] = None

    def _look_again(self) -> None:
        """Once for each time that a channel went idle."""
        if time.monotonic() - self._idle_since >= LOOK_AGAIN:
            for channel in self._idle:
                self._looked_again[channel] = channel.flow.received + channel.flow.completed
                if channel.active:
                    self._ready[channel] = None
            self._idle.clear()

    def _take_message(self) -> bool:
        """Take the message out of the slot, if there is one."""
        if not self._slot_type[0]:
            return False
        slot = bytes(self._message_view[SLOT_OFFSET : SLOT_OFFSET + SLOT_SIZE])
        self._slot_type[0] = 0
        full_fence()
        # The flag may have been set after the copy was taken: look at the slot itself.
        if self._message_view[SLOT_OFFSET + 5] & SLOT_FLAG_PENDING:
            self._message_view[SLOT_OFFSET + 5] = 0
            self.function.write32(Register.EOM, 1)
        _, size, _, _, _ = SLOT_HEADER.unpack_from(slot)
        self.bus.receive(slot[SLOT_HEADER.size : SLOT_HEADER.size + size])
        return True

    def _take_events(self) -> None:
        events = self._event_view
        for relid, link in list(self._links.items()):
            if events[relid]:
                events[relid] = 0
                self._ready[link.channel] = None
        full_fence()

    def step(self, timeout: float) -> bool:
        """Do what is to be done now; with nothing to do, wait up to `timeout` seconds for an interrupt or a watched
        descriptor.

        Returns whether there was anything.
        """
        if self._ready:
            timeout = 0.0
        elif self._idle:
            timeout = min(timeout, LOOK_AGAIN)
        called = False
        if self._watches is not None:
            called = self._watches.poll(timeout)
            timeout = 0.0
        interrupted = self.function.wait_interrupt(timeout)
        if interrupted:
            self.interrupts += 1
            while self._take_message():
                pass
            self._take_events()
        if self._waiting and not self._opening_waiting:
            self._open_waiting()
        if self._idle:
            self._look_again()
        ready = self._ready
        if not ready:
            return interrupted or called
        self._ready = {}
        for channel in ready:
            if channel.process():
                self._ready[channel] = None
        return True

    def run_until(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        """Pump until `condition()` holds. Raises WaitTimeout after `timeout` seconds, saying `what`.

        When the clock jumps, as it does in a guest that is taken back to a checkpoint, that is no time that has passed.
        """
        clock = SteadyClock()
        while not condition():
            left = timeout - clock.elapsed()
            if left <= 0:
                raise WaitTimeout(what, timeout)
            self.step(min(left, 1.0))
