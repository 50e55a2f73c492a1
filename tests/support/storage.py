"""A storage driver as Linux's behind a PCI function: the channels of a `VmbusDriver`, and memory that it owns."""

from __future__ import annotations

from typing import Any

from support.storvsc import MIB, Driver
from vmbus.testkit.loopback.function import LoopbackFunction
from vmbus.testkit.loopback.harness import LoopbackServer
from vmbus.testkit.loopback.pair import DriverSide
from vmbus.wire.storvsp import STORVSP_TYPE
from vmbus_guest.driver import VmbusDriver

RING_PAGES = 16


class Controller(Driver):
    """A driver of `bus`'s controller."""

    def __init__(self, bus: VmbusDriver, *, sub_channels: int = 0, memory: int = 4 * MIB) -> None:
        self.bus = bus
        self.side = DriverSide(bus)
        super().__init__(self.side.open(STORVSP_TYPE, ring_pages=RING_PAGES, name="storage"), memory)
        self.ports[0].answer = lambda _: b""
        self.connect(sub_channels=sub_channels)
        for index in range(1, sub_channels + 1):
            port = self.side.open(STORVSP_TYPE, subchannel=index, ring_pages=RING_PAGES, name=f"storage.{index}")
            self.ports.append(port)


class Guest(Controller):
    """A driver of its own behind a PCI function."""

    def __init__(self, function: LoopbackFunction, **more: int) -> None:
        self.function = function
        super().__init__(VmbusDriver(function), **more)

    def close(self) -> None:
        self.bus.close()


def status(server: LoopbackServer) -> dict[str, Any]:
    return dict(server.command("status")["providers"]["scsi"])


def disk_status(server: LoopbackServer, index: int = 0) -> dict[str, Any]:
    """Of one of its disks."""
    return dict(status(server)["luns"][index])
