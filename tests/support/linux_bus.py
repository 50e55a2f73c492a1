"""Linux's bus and its UIO driver without a kernel: what `hv_vmbus` and `uio_hv_generic` do for a program, done by the
guest's own driver in the same process, and the files of sysfs that show it."""

from __future__ import annotations

import os
from pathlib import Path

from vmbus.errors import EnvironmentProblem
from vmbus.wire import messages as m
from vmbus.wire.gpa import PAGE_SIZE, range_for
from vmbus.wire.synic import Register
from vmbus_guest.driver import VmbusDriver
from vmbus_guest.pci import DmaBuffer, PciFunction
from vmbus_guest.testdrivers.context import Context
from vmbus_guest.uio import DeviceGone, UioDriver

RING_PAGES = 18
"""Of each ring, as Linux 6.12 has them for types that it does not know."""


class OpenDevice:
    """An open /dev/uioN."""

    def __init__(self, kernel: Kernel, offer: m.OfferChannel, rings: DmaBuffer, gpadl: int) -> None:
        self._kernel = kernel
        self.offer = offer
        self.memory = rings
        self.gpadl = gpadl
        self.rings = rings.view
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.gone = False
        self.signals = 0

    def signal(self) -> None:
        # The kernel clears the mask of the inbound ring as it signals.
        half = len(self.rings) // 2
        self.rings[half + 8 : half + 12] = bytes(4)
        self.signals += 1
        self._kernel.function.write32(Register.SIGNAL_EVENT, self.offer.connection_id)

    def take_interrupts(self) -> bool:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return False
        if self.gone:
            raise DeviceGone("the channel was withdrawn")
        return True

    def close(self) -> None:
        self._kernel.close_uio(self)
        os.close(self.fd)


class Kernel(VmbusDriver):
    """The connection is Linux's; `root` gets what it shows in sysfs."""

    def __init__(self, function: PciFunction, root: Path) -> None:
        self.opened: dict[int, OpenDevice] = {}
        super().__init__(function)
        self.root = root
        self.opens = 0
        (root / "bus/vmbus/drivers/uio_hv_generic").mkdir(parents=True)
        (root / "bus/vmbus/drivers/uio_hv_generic/unbind").touch()
        (root / "bus/vmbus/devices").mkdir()
        self.show()

    def show(self) -> None:
        """Show all offers, bound to the UIO driver."""
        for relid, offer in self.bus.offers.items():
            folder = self.root / "bus/vmbus/devices" / str(offer.interface_instance)
            if folder.exists():
                continue
            (folder / "uio" / f"uio{relid}").mkdir(parents=True)
            (folder / "class_id").write_text(f"{{{offer.interface_type}}}\n")
            (folder / "device_id").write_text(f"{{{offer.interface_instance}}}\n")
            (folder / "id").write_text(f"{relid}\n")
            (folder / "driver_override").touch()
            (folder / "driver").symlink_to(self.root / "bus/vmbus/drivers/uio_hv_generic")
            maps = self.root / f"class/uio/uio{relid}/maps/map0"
            maps.mkdir(parents=True)
            (maps / "size").write_text(f"{2 * RING_PAGES * PAGE_SIZE:#x}\n")

    def open_uio(self, path: str, ring_bytes: int) -> OpenDevice:
        """As opening the file does. The rings are new, as after each open."""
        relid = int(path.rpartition("uio")[2])
        offer = self.bus.offers[relid]
        rings = self.allocate(ring_bytes)
        gpadl = self.bus.create_gpadl(relid, [range_for(rings.iova, rings.size)])
        self.run_until(lambda: gpadl in self.bus.created, 10, "GPADL_CREATED")
        self.bus.open_channel(relid, gpadl, ring_bytes // 2 // PAGE_SIZE)
        self.run_until(lambda: relid in self.bus.open_results, 10, "OPENCHANNEL_RESULT")
        if self.bus.created[gpadl] or self.bus.open_results[relid]:
            raise EnvironmentProblem(f"cannot open {path}")
        self.opens += 1
        device = self.opened[relid] = OpenDevice(self, offer, rings, gpadl)
        return device

    def close_uio(self, device: OpenDevice) -> None:
        """As the last close does."""
        relid, bus = device.offer.relid, self.bus
        del self.opened[relid]
        if not device.gone:
            bus.close_channel(relid)
            bus.teardown_gpadl(relid, device.gpadl)
            self.run_until(lambda: device.gpadl in bus.torndown or device.gone, 10, "GPADL_TORNDOWN")
        self.free(device.memory)

    def _take_events(self) -> None:
        for relid, device in self.opened.items():
            if self._event_view[relid]:
                self._event_view[relid] = 0
                os.eventfd_write(device.fd, 1)
        super()._take_events()

    def _rescinded(self, offer: m.OfferChannel) -> None:
        device = self.opened.get(offer.relid)
        if device is not None:
            device.gone = True
            os.eventfd_write(device.fd, 1)
        super()._rescinded(offer)


class Lent:
    """The kernel's memory, for `UioDriver`: what it is told as physical addresses are the function's here."""

    def __init__(self, kernel: Kernel) -> None:
        self.allocate, self.free = kernel.allocate, kernel.free

    def close(self) -> None:
        """The kernel closes it."""


def uio_driver(kernel: Kernel, recorder: object = None) -> UioDriver:
    """A program's driver over that kernel."""
    driver = UioDriver(
        recorder=recorder,  # type: ignore[arg-type]
        sysfs=str(kernel.root),
        open_device=kernel.open_uio,  # type: ignore[arg-type]
        physical=Lent(kernel),
    )
    # The kernel has its turns whenever there is an interrupt.
    driver.watch(kernel.function.interrupt_fd, lambda: _turn(kernel))
    return driver


def _turn(kernel: Kernel) -> None:
    kernel.step(0.0)


def uio_context(kernel: Kernel, parameters: dict[str, object]) -> Context:
    """For a test driver that reaches the device like that."""
    return Context(
        parameters,
        _no_function,
        open_uio=lambda recorder: uio_driver(kernel, recorder),
        prefer_uio=lambda: True,
    )


def _no_function() -> PciFunction:
    raise EnvironmentProblem("the function is Linux's")
