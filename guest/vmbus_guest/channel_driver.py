"""What a driver of channels is, however it reaches the device: memory, channels that are opened and closed, and the
pump that keeps all of them going.

`vmbus_guest.driver` is one over the registers of the PCI function, `vmbus_guest.uio` one over Linux's own bus. Test
drivers and services are written against this. One thread: everything that waits does so in `run_until`, which pumps,
has a bound, and says what it waited for.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self
from uuid import UUID

from vmbus.errors import PeerError, UsageError, WaitTimeout
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.endpoint import Link
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.memory.guest import GuestMemory, Window
from vmbus.util.watches import Watches
from vmbus.wire import messages as m
from vmbus_guest.pci import PAGE_SIZE, DmaBuffer

if TYPE_CHECKING:
    from vmbus.observe.audit.recorder import Recorder

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


class Buffers(Protocol):
    """Where memory for the device comes from."""

    def allocate(self, size: int) -> DmaBuffer: ...

    def free(self, buffer: DmaBuffer) -> None: ...


class ChannelLink:
    """What carries one open channel in the guest: all that links have in common (`vmbus.kmcl.endpoint.Link`)."""

    def __init__(self, driver: ChannelDriver, channel: ClientChannel) -> None:
        self.channel = channel
        self.memory = driver.memory
        self._of = driver

    def wake(self) -> None:
        """Give the channel a turn."""
        self._of.wake(self.channel)

    def failed(self, reason: str) -> None:
        """The host broke the channel; it stays in the tables until the driver is closed."""
        self._of.failures.append(f"channel {self.channel.name}: {reason}")

    def close_channel(self, timeout: float) -> None:
        """Close the channel, see `ChannelDriver.close_channel`."""
        self._of.close_channel(self.channel, timeout)

    def force_closed(self) -> None:
        """The channel is gone at the host: close and disable it here."""
        channel = self.channel
        if channel.state in (ChannelState.OPENED, ChannelState.ACTIVE, ChannelState.CLOSING):
            channel.close(lambda: None, force=True)
        if channel.state is ChannelState.CLOSED:
            channel.disable()


def ring_windows(memory: GuestMemory, address: int, split: int, size: int) -> list[Window]:
    """Two rings in `size` bytes at `address`, the second one at `split`: each one's header page and data."""
    parts = ((0, PAGE_SIZE), (PAGE_SIZE, split), (split, split + PAGE_SIZE), (split + PAGE_SIZE, size))
    return [memory.window([(address + start, end - start)]) for start, end in parts]


class ChannelDriver(ABC):
    """See the module's text. Use it as a context manager.

    Attributes:
        memory: what the rings, and memory of `allocate`, are reached through on this side.
        failures: what went wrong on channels, as text.
        rescinded: instances that the host has withdrawn, in that order.
        on_rescind: called with a client channel that was open when the host withdrew it; it is disabled by then, and
            can be enabled again when it is offered anew.
        recorder: records what happens to the packets of channels that are attached from here on; None: nobody does.
        interrupts: how many were taken.
    """

    def __init__(self, source: Buffers, recorder: Recorder | None = None) -> None:
        """`source`: of the memory that `allocate` gives."""
        self._source = source
        self._buffers: list[DmaBuffer] = []
        self.recorder = recorder
        self.interrupts = 0
        self.memory = GuestMemory()
        self.failures: list[str] = []
        self.rescinded: list[UUID] = []
        self.on_rescind: Callable[[ClientChannel], None] | None = None
        self._claimed: set[tuple[UUID, UUID]] = set()
        self._ready: dict[Channel, None] = {}
        self._idle: dict[Channel, None] = {}
        self._idle_since = 0.0
        self._looked_again: dict[Channel, int] = {}
        self._watches: Watches | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(graceful=kind is None)

    @abstractmethod
    def close(self, *, graceful: bool = True) -> None:
        """Close all channels and free everything. Without `graceful`, with whatever is outstanding."""

    # ---- memory --------------------------------------------------------------------------------------------------

    def allocate(self, size: int) -> DmaBuffer:
        """Zeroed memory that the device can reach; `size` is a multiple of 4096 bytes. Raises EnvironmentProblem."""
        buffer = self._source.allocate(size)
        self.memory.map(buffer.iova, buffer.view, True)
        self._buffers.append(buffer)
        return buffer

    def free(self, buffer: DmaBuffer) -> None:
        """Give memory of `allocate` back."""
        self._buffers.remove(buffer)
        self.memory.unmap(buffer.iova, buffer.size)
        self._source.free(buffer)

    def _free_all(self) -> None:
        for buffer in list(self._buffers):
            self.free(buffer)

    def trim(self) -> int:
        """Have memory that is wholly free be out of the device's reach, where that can be. Returns how many pieces."""
        return 0

    @staticmethod
    def external(buffer: DmaBuffer, offset: int = 0, length: int | None = None) -> list[tuple[int, int]]:
        """Part of a buffer, in the form that `Packet.send` takes as external data."""
        return [(buffer.iova + offset, buffer.size - offset if length is None else length)]

    # ---- channels --------------------------------------------------------------------------------------------------

    @abstractmethod
    def enable(self, channel: ClientChannel, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Wait for the channel's offer, and open it; it is active when this returns.

        Raises WaitTimeout, or PeerError when the host refuses it; the channel is then disabled.
        """

    @abstractmethod
    def close_channel(self, channel: ClientChannel, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Close a channel; what it waited for is cancelled."""

    @abstractmethod
    def link_of(self, channel: ClientChannel) -> Link:
        """The link of an open channel. Raises UsageError when it is not open."""

    @abstractmethod
    def instance_of(self, channel: ClientChannel) -> UUID:
        """The instance whose channel an open channel is. Raises UsageError when it is not open."""

    @abstractmethod
    def _channel_enabled(self, channel: ClientChannel) -> None:
        """A channel was enabled: by `enable`, or by itself, and is then opened as soon as it is offered."""

    @abstractmethod
    def _instances(self, interface_type: UUID, wanted: Callable[[m.OfferChannel], bool] | None) -> list[UUID]:
        """Instances of a type that are offered now, primary channels only."""

    def _take(self, instance: UUID) -> bool:
        """Whether an instance that nobody here has claimed is free, and if so have it."""
        return True

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
        wanted: Callable[[m.OfferChannel], bool] | None = None,
    ) -> UUID | None:
        """Choose an instance that is offered and that nobody has claimed before; for users of one driver that would
        otherwise open the same channel. None when no instance of the type is offered (yet).

        Raises UsageError when `instance`, or every instance that is `wanted`, is somebody's already.
        """
        offers = self._instances(interface_type, wanted)
        for one in [instance] if instance else offers:
            if (interface_type, one) not in self._claimed and self._take(one):
                self._claimed.add((interface_type, one))
                return one
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

    def create_gpadl(self, channel: ClientChannel, buffer: DmaBuffer, *, read_only: bool = False) -> int:
        """Lend a whole buffer of `allocate` to the host's end of an open channel; see `ClientChannel.create_gpadl`."""
        return channel.create_gpadl(self.external(buffer), read_only=read_only)

    # ---- other descriptors ---------------------------------------------------------------------------------------

    def watch(self, fd: int, call: Callable[[], None]) -> None:
        """Have `call` made in a step whenever `fd` is readable, or hung up (level-triggered).

        `step` returns when it is, as it does for an interrupt. `fd` is non-blocking; `unwatch` it before closing it.
        Raises UsageError for a descriptor that cannot be watched.
        """
        self._watched().add_reader(fd, call)

    def unwatch(self, fd: int) -> None:
        """End `watch`. Harmless without one."""
        if self._watches is not None:
            self._watches.remove_reader(fd)

    def _watched(self) -> Watches:
        if self._watches is None:
            self._watches = Watches()
            self._watch_own(self._watches)
        return self._watches

    def _close_watches(self) -> None:
        if self._watches is not None:
            self._watches.close()
            self._watches = None

    @abstractmethod
    def _watch_own(self, watches: Watches) -> None:
        """Have one wait serve for the device's own descriptors, too; `_wait` drains them."""

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

    @abstractmethod
    def _wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the device or a watched descriptor, and note whose turn it is. Returns
        whether there was anything."""

    def step(self, timeout: float) -> bool:
        """Do what is to be done now; with nothing to do, wait up to `timeout` seconds for an interrupt or a watched
        descriptor.

        Returns whether there was anything.
        """
        if self._ready:
            timeout = 0.0
        elif self._idle:
            timeout = min(timeout, LOOK_AGAIN)
        anything = self._wait(timeout)
        if self._idle:
            self._look_again()
        ready = self._ready
        if not ready:
            return anything
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
