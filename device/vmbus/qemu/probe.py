"""Who carries the device through a migration: QEMU itself, or we, from outside?

A QEMU that migrates vfio-user devices asks the device server over their socket whether the device can be migrated
(DEVICE_FEATURE, MIGRATION), as soon as it connects. If it asks, and the server's libvfio-user can answer, then QEMU
leads the device through the migration, takes its state into its own stream, asks for the pages that the server wrote,
and puts the PCI function back: our own cures stand back. No version number tells that: QEMU, the library and the
device's settings all have a say. So the server is asked what happened on its socket.

What stands back, and what stays: docs/protocol-migration.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vmbus.errors import StateError
from vmbus.qemu.device import DeviceInstance, ask_each


def driven(status: Mapping[str, Any]) -> bool:
    """Whether QEMU drives the device's migration, by what the device server's `status` says."""
    return status.get("driven_by_client") is True


async def driven_by_client(devices: Sequence[DeviceInstance]) -> bool:
    """The same of all devices of a VM, asked for. QEMU has asked the servers by the time that it answers on its
    monitor. Raises StateError if it drives some of them and others not."""
    found = {driven(status) for status in await ask_each(devices, "status")}
    if len(found) > 1:
        raise StateError("QEMU migrates some of the VM's devices itself, and others not: their servers differ")
    return found == {True}


async def require_same(devices: Sequence[DeviceInstance], *, in_stream: bool, what: str) -> None:
    """Whether a VM that has just been started carries its devices in the same way as the saved one, `what`.

    Raises StateError if not: QEMU's stream then has the device where it is not looked for, or lacks it.
    """
    for status in await ask_each(devices, "status"):
        check_same(status, in_stream=in_stream, what=what)


def check_same(status: Mapping[str, Any], *, in_stream: bool, what: str) -> None:
    """The same by what the device server's `status` says."""
    here = driven(status)
    if in_stream and not here:
        raise StateError(
            f"{what} has the device in QEMU's stream, and here QEMU does not migrate devices itself: use the QEMU and "
            "the libvfio-user that it was saved with (VMBUS_QEMU, VMBUS_LIBVFIO_USER)"
        )
    if here and not in_stream:
        raise StateError(
            f"{what} has the device beside QEMU's stream, and here QEMU expects it in there: use the libvfio-user that "
            "it was saved with (VMBUS_LIBVFIO_USER)"
        )


async def require_complete(devices: Sequence[DeviceInstance]) -> None:
    """QEMU has loaded its stream: whether the devices' states were in it and are intact. Raises StateError."""
    for status in await ask_each(devices, "status"):
        migration = status["migration"]
        if not migration.get("complete"):
            raise StateError(
                "QEMU has loaded its stream, and the device's state was not in it: the server is "
                f"{migration.get('state')}"
            )


async def require_running(devices: Sequence[DeviceInstance]) -> None:
    """The vCPUs were let run: whether the devices do, too. Raises StateError."""
    for status in await ask_each(devices, "status"):
        if status["phase"] != "running":
            raise StateError(
                f"the device does not run, although QEMU does: the server is {status['phase']}; its log says why the "
                "state was refused"
            )
