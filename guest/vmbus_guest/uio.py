"""A driver of channels over Linux's own VMBus: the kernel has the connection, the rings and the interrupts, and a
program gets the rings of one channel as /dev/uioN of `uio_hv_generic`. So Linux's code opens and closes channels and
carries signals, and ours what is in the rings.

Map 0 of such a device are both rings: ours to the host first, half of the memory each; how large they are the kernel
decides. Writing a 1 signals the host and clears the mask of interrupts, reading waits until there was one. To open it
opens the channel, and the last close (no mapping left either) closes it.

Memory for external data is told to the host as physical addresses, in pages of ours (`vmbus_guest.huge_pages`). The
kernel's own buffers for a device, map 3 and 4, would do on some kernels only (the newest have them for network cards
alone), in scattered pages, and they go with the channel when it is closed.
"""

# os instead of pathlib: imports are slow in an emulated guest.

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn, Protocol
from uuid import UUID

from vmbus.errors import EnvironmentProblem, PeerError, UsageError, WaitTimeout
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.ring import RingReader, RingWriter
from vmbus.util.watches import Watches
from vmbus.wire import messages as m
from vmbus.wire.gpa import PAGE_SIZE
from vmbus_guest.channel_driver import DEFAULT_TIMEOUT, Buffers, ChannelDriver, ChannelLink, GpadlRefused, ring_windows
from vmbus_guest.huge_pages import PhysicalMemory
from vmbus_guest.vmbus_devices import VmbusDevice, bind_device, bus_is_there, find_devices, give_back, map_size, reserve

if TYPE_CHECKING:
    from vmbus.observe.audit.recorder import Recorder

__all__ = ["UioDevice", "UioDriver", "bus_is_there"]

RINGS = 1 << 56
"""Where the rings are in the driver's view of memory, by relid: no physical address is there."""

_SIGNAL = struct.pack("<i", 1)


class Allocator(Buffers, Protocol):
    """Where memory for the device comes from: see `vmbus_guest.huge_pages.PhysicalMemory`."""

    def close(self) -> None: ...


class DeviceGone(PeerError):
    """The host has withdrawn the channel."""


class UioDevice:
    """/dev/uioN, open, and with it its channel. `fd` is readable after an interrupt. `rings`: ours to the host first.

    Raises EnvironmentProblem when it cannot be opened, as when the host refuses.
    """

    def __init__(self, path: str, ring_bytes: int) -> None:
        if ring_bytes < 4 * PAGE_SIZE or ring_bytes % (2 * PAGE_SIZE):
            raise EnvironmentProblem(f"{path} has rings of {ring_bytes} bytes")
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise EnvironmentProblem(f"cannot open {path}, and with it the channel: {error.strerror}") from error
        try:
            self._memory = mmap.mmap(self.fd, ring_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
        except BaseException:
            os.close(self.fd)
            raise
        self.rings = memoryview(self._memory)

    def signal(self) -> None:
        """Signal the host. A channel that is gone is noticed when it is read."""
        with contextlib.suppress(OSError):
            os.write(self.fd, _SIGNAL)

    def take_interrupts(self) -> bool:
        """Whether there was one since the last call. Raises DeviceGone."""
        try:
            return bool(os.read(self.fd, 4))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ENODEV):
                raise
            raise DeviceGone(f"the channel was withdrawn: {error.strerror}") from error

    def close(self) -> None:
        """Close the channel, which waits until the host has let go of the rings."""
        self.rings.release()
        # A mapping that is left would keep the channel open: no view of it may be.
        self._memory.close()
        os.close(self.fd)


class UioLink(ChannelLink):
    """What carries one open channel."""

    def __init__(self, driver: UioDriver, channel: ClientChannel, found: VmbusDevice, device: UioDevice) -> None:
        super().__init__(driver, channel)
        self.found = found
        self.device = device
        self.iova = RINGS + (found.relid << 32)
        half = len(device.rings) // 2
        self.memory.map(self.iova, device.rings, True)
        out_header, out_data, in_header, in_data = ring_windows(self.memory, self.iova, half, 2 * half)
        self.reader, self.writer = RingReader(in_header, in_data), RingWriter(out_header, out_data)

    def signal(self) -> None:
        """Ring the doorbell, through the kernel."""
        self.device.signal()

    def create_gpadl(self, extents: Sequence[tuple[int, int]], read_only: bool) -> int:
        """Raises GpadlRefused: only the kernel can lend memory."""
        raise GpadlRefused(f"channel {self.channel.name}: {_NO_GPADLS}")

    def delete_gpadl(self, handle: int) -> NoReturn:
        """Raises UsageError: there is none."""
        raise UsageError(f"channel {self.channel.name}: {_NO_GPADLS}")

    def let_go(self) -> None:
        """The channel does not use the rings any more: have the kernel close it."""
        self.memory.unmap(self.iova, len(self.device.rings))
        self.device.close()


_NO_GPADLS = "uio_hv_generic lets no program lend memory as a GPADL; use access 'vfio' for that"


class UioDriver(ChannelDriver):
    """Channels over Linux's bus. Devices that nobody has are bound to UIO while they are claimed or open."""

    def __init__(
        self,
        *,
        recorder: Recorder | None = None,
        sysfs: str = "/sys",
        dev: str = "/dev",
        open_device: Callable[[str, int], UioDevice] = UioDevice,
        physical: Allocator | None = None,
    ) -> None:
        """Raises EnvironmentProblem when the guest's kernel has no such bus."""
        find_devices(sysfs=sysfs)
        self._physical: Allocator = PhysicalMemory() if physical is None else physical
        super().__init__(self._physical, recorder)
        self._sysfs = sysfs
        self._dev = dev
        self._open_device = open_device
        self._links: dict[UUID, UioLink] = {}
        self._reserved: dict[UUID, tuple[int, VmbusDevice]] = {}
        self._opening = False
        self._watched()

    def close(self, *, graceful: bool = True) -> None:
        try:
            if graceful:
                for link in list(self._links.values()):
                    self.close_channel(link.channel)
        finally:
            for link in list(self._links.values()):
                if link.channel.state in (ChannelState.OPENED, ChannelState.ACTIVE, ChannelState.CLOSING):
                    link.channel.close(lambda: None, force=True)
                self._let_go(link)
            self._close_watches()
            for descriptor, device in self._reserved.values():
                with contextlib.suppress(EnvironmentProblem):
                    give_back(device, sysfs=self._sysfs)
                os.close(descriptor)
            self._reserved.clear()
            self._free_all()
            self._physical.close()

    # ---- channels --------------------------------------------------------------------------------------------------

    def _instances(self, interface_type: UUID, wanted: Callable[[m.OfferChannel], bool] | None) -> list[UUID]:
        if wanted is not None:
            raise UsageError("what else an offer says Linux does not show: use access 'vfio'")
        return [device.instance for device in find_devices(interface_type, sysfs=self._sysfs)]

    def _take(self, instance: UUID) -> bool:
        """Other processes may use other devices of the same bus."""
        found = next((one for one in find_devices(sysfs=self._sysfs) if one.instance == instance), None)
        return found is None or self._reserve(found)

    def _reserve(self, device: VmbusDevice) -> bool:
        """Whether it is ours from here on."""
        if device.instance in self._reserved:
            return True
        descriptor = reserve(device)
        if descriptor is not None:
            self._reserved[device.instance] = descriptor, device
        return descriptor is not None

    def _find(self, channel: ClientChannel) -> VmbusDevice | None:
        for device in find_devices(channel.interface_type, sysfs=self._sysfs):
            if channel.interface_instance in (None, device.instance) and device.instance not in self._links:
                return device
        return None

    def _channel_enabled(self, channel: ClientChannel) -> None:
        if not self._opening:
            raise UsageError(
                f"channel {channel.name}: over UIO channels are opened by the driver's enable(); use access 'vfio'"
            )

    def enable(self, channel: ClientChannel, timeout: float = DEFAULT_TIMEOUT) -> None:
        if channel.subchannel_index:
            raise UsageError(f"channel {channel.name}: sub-channels are the kernel's own; use access 'vfio'")
        self._opening = True
        try:
            channel.enable()
        finally:
            self._opening = False
        try:
            self.run_until(lambda: self._find(channel) is not None, timeout, f"an offer for channel {channel.name}")
            found = self._find(channel)
            if found is None:
                raise WaitTimeout(f"an offer for channel {channel.name} that stays", timeout)
            self._open(channel, found)
        except BaseException:
            channel.disable()
            raise

    def _open(self, channel: ClientChannel, found: VmbusDevice) -> None:
        if not self._reserve(found):
            raise EnvironmentProblem(f"VMBus device {found.instance} is in use by another process")
        name = bind_device(found, sysfs=self._sysfs)
        device = self._open_device(f"{self._dev}/{name}", map_size(name, 0, sysfs=self._sysfs))
        try:
            link = UioLink(self, channel, found, device)
        except BaseException:
            device.close()
            raise
        self._links[found.instance] = link
        self._watched().add_reader(device.fd, lambda: self._readable(link))
        channel.open(link)
        channel.activate()
        self.wake(channel)

    def close_channel(self, channel: ClientChannel, timeout: float = DEFAULT_TIMEOUT) -> None:
        link = self.link_of(channel)
        channel.begin_pause()
        closed: list[bool] = []
        if channel.state in (ChannelState.OPENED, ChannelState.ACTIVE):
            channel.close(lambda: closed.append(True))
            self.run_until(lambda: bool(closed), timeout, f"packets of channel {channel.name} to be completed")
        if self._links.get(link.found.instance) is link:  # not withdrawn meanwhile
            channel.disable()
            self._let_go(link)

    def link_of(self, channel: ClientChannel) -> UioLink:
        for link in self._links.values():
            if link.channel is channel:
                return link
        raise UsageError(f"channel {channel.name} is not open on this driver")

    def instance_of(self, channel: ClientChannel) -> UUID:
        return self.link_of(channel).found.instance

    def _let_go(self, link: UioLink) -> None:
        del self._links[link.found.instance]
        if self._watches is not None:
            self._watches.remove_reader(link.device.fd)
        link.let_go()

    def _withdrawn(self, link: UioLink) -> None:
        channel, instance = link.channel, link.found.instance
        self.rescinded.append(instance)
        link.force_closed()
        self._let_go(link)
        reserved = self._reserved.pop(instance, None)
        if reserved is not None:
            os.close(reserved[0])
        if self.on_rescind is not None:
            self.on_rescind(channel)

    # ---- the pump --------------------------------------------------------------------------------------------------

    def _watch_own(self, watches: Watches) -> None:
        """Devices are watched as they are opened."""

    def _readable(self, link: UioLink) -> None:
        try:
            if link.device.take_interrupts():
                self.interrupts += 1
                self.wake(link.channel)
        except DeviceGone:
            self._withdrawn(link)

    def _wait(self, timeout: float) -> bool:
        return self._watched().poll(timeout)
