"""The guest's own driver: SynIC registers, bus client and KMCL client channels over any `PciFunction`."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from uuid import UUID

from vmbus.bus.client import VERSIONS, BusClient
from vmbus.errors import EnvironmentProblem, PeerError, UsageError, WaitTimeout
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.ring import FEATURE_BITS, FEATURE_PENDING_SEND_SIZE, RingReader, RingWriter
from vmbus.ring.fence import full_fence
from vmbus.util.watches import Watches
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
from vmbus_guest.channel_driver import (
    DEFAULT_TIMEOUT,
    ChannelDriver,
    ChannelLink,
    ChannelRescinded,
    GpadlRefused,
    ring_windows,
)
from vmbus_guest.pci import DmaBuffer, PciFunction

if TYPE_CHECKING:
    from vmbus.observe.audit.recorder import Recorder


class ClientLink(ChannelLink):
    """What carries one open channel."""

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
        super().__init__(driver, channel)
        self._driver = driver
        self.offer = offer
        self.rings = rings
        self.gpadl = gpadl
        self.reader = reader
        self.writer = writer
        # Handles of memory lent beyond the rings; the host was told of it.
        self.gpadls: set[int] = set()

    def signal(self) -> None:
        """Ring the doorbell."""
        self._driver.function.write32(Register.SIGNAL_EVENT, self.offer.connection_id)

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


class VmbusDriver(ChannelDriver):
    """A connection to the device. Use it as a context manager.

    Attributes:
        function: the PCI function.
        bus: the bus client with its tables.
    """

    def __init__(
        self, function: PciFunction, *, versions: tuple[int, ...] = VERSIONS, recorder: "Recorder | None" = None
    ) -> None:
        """Reset the device, connect with the newest version that it takes, and fetch the offers.

        Raises EnvironmentProblem when the function is not ours or speaks no version in `versions`, WaitTimeout when
        it does not answer.
        """
        super().__init__(function, recorder)
        self.function = function
        self.bus = BusClient(self._post)
        self.bus.on_rescind = self._rescinded
        self._waiting: list[ClientChannel] = []
        self._opening = False
        self._opening_waiting = False
        self._links: dict[int, ClientLink] = {}
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

    # ---- memory --------------------------------------------------------------------------------------------------

    def trim(self) -> int:
        return self.function.trim()

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
            self._free_all()
            self._close_watches()
            self.function.close()

    # ---- channels --------------------------------------------------------------------------------------------------

    def _instances(self, interface_type: UUID, wanted: Callable[[m.OfferChannel], bool] | None) -> list[UUID]:
        return [
            offer.interface_instance
            for relid, offer in self.bus.offers.items()
            if offer.interface_type == interface_type
            and not offer.subchannel_index
            and relid not in self.bus.rescinded
            and (wanted is None or wanted(offer))
        ]

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
        windows = ring_windows(self.memory, rings.iova, split, rings.size)
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

    def link_of(self, channel: ClientChannel) -> ClientLink:
        """The link of an open channel. Raises UsageError when it is not open."""
        for link in self._links.values():
            if link.channel is channel:
                return link
        raise UsageError(f"channel {channel.name} is not open on this driver")

    def instance_of(self, channel: ClientChannel) -> UUID:
        return self.link_of(channel).offer.interface_instance

    def _rescinded(self, offer: m.OfferChannel) -> None:
        self.rescinded.append(offer.interface_instance)
        link = self._links.pop(offer.relid, None)
        if link is not None:
            link.force_closed()
            self.free(link.rings)
        self.bus.release(offer.relid)
        if link is not None and self.on_rescind is not None:
            self.on_rescind(link.channel)

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

    def _watch_own(self, watches: Watches) -> None:
        watches.add_reader(self.function.interrupt_fd, lambda: None)

    def _wait(self, timeout: float) -> bool:
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
        return interrupted or called
