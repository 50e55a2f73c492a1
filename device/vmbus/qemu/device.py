"""A device of an instance: the process that serves it, the connection to that, and its PCI function in QEMU.

A VM has one or several, in the order of its description; what is done to the VM is done to all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vmbus.device.description import DeviceDescription
from vmbus.qemu.connections import Control, QemuMonitor
from vmbus.qemu.pci_function import barrier, is_back, put_back
from vmbus.qemu.pci_replay import PciAddress
from vmbus.vm.process import Child

T = TypeVar("T")


class DeviceInstance:
    """One device. `description`: as it was at the start; providers may have come and gone since then. `server`: its
    process, if that is ours."""

    def __init__(
        self, description: DeviceDescription, address: PciAddress, monitor: QemuMonitor, control: Control
    ) -> None:
        self.description = description
        self.address = address
        self.monitor = monitor
        self.control = control
        self.server: Child | None = None

    def close(self) -> None:
        """Drops the connection to the server."""
        self.control.close()

    @property
    def name(self) -> str:
        return self.description.name

    async def barrier(self, known: int | None = None) -> None:
        """See `vmbus.qemu.pci_function.barrier`."""
        await barrier(self.monitor, self.control, known)

    async def load(
        self, path: Path, sha256: str, description: DeviceDescription, timeout: float, **more: Any
    ) -> dict[str, Any]:
        """Gives the server a state of the device, described as it is in there, by an absolute path; `more`: further
        arguments of that command."""
        plain = msgspec.to_builtins(description)
        return await self.control.call("load", timeout, path=str(path), sha256=sha256, description=plain, **more)

    async def put_back(self, config: bytes, only: Sequence[tuple[int, int, int]] | None = None) -> int:
        """Puts the function of a paused VM back: see `vmbus.qemu.pci_function`."""
        return await put_back(self.monitor, self.control, self.address, config, only)

    async def is_back(self, config: bytes) -> bool:
        """Whether it is: see there."""
        return await is_back(self.monitor, self.control, config)


async def resume_if_paused(device: DeviceInstance, **bounds: Any) -> None:
    """Sets a device going that stands; `bounds`: of the command `resume`."""
    if (await device.control.call("status"))["phase"] in ("pausing", "paused"):
        await device.control.call("resume", **bounds)


async def each(devices: Iterable[DeviceInstance], work: Callable[[DeviceInstance], Coroutine[Any, Any, T]]) -> list[T]:
    """Does something with all devices at the same time, and returns what came of it, in their order.

    If it fails for one the others' end is waited for, so that none is left half done; then the first error is raised.
    """
    found = await asyncio.gather(*map(work, devices), return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return [one for one in found if not isinstance(one, BaseException)]


async def ask_each(
    devices: Iterable[DeviceInstance], command: str, timeout: float | None = None, **arguments: Any
) -> list[dict[str, Any]]:
    """The same command to all their servers, and the answers in their order."""
    if timeout is not None:
        arguments["timeout"] = timeout
    return await each(devices, lambda device: device.control.call(command, **arguments))
