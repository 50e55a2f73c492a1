"""Who carries the device through a migration: QEMU itself, or we, from outside?

A QEMU that migrates vfio-user devices asks the device server over their socket whether the device can be migrated
(DEVICE_FEATURE, MIGRATION), as soon as it connects. If it asks, and the server's libvfio-user can answer, then QEMU
leads the device through the migration, takes its state into its own stream, asks for the pages that the server wrote,
and puts the PCI function back: our own cures stand back. No version number tells that: QEMU, the library and the
device's settings all have a say. So the server is asked what happened on its socket.

What stands back, and what stays: docs/protocol-migration.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vmbus.errors import EnvironmentProblem, StateError
from vmbus.qemu.connections import Control, QemuMonitor
from vmbus.qemu.qmp import QmpCommandFailed

DEVICE = "vfio-user-pci"
PROPERTY = "enable-migration"
"""The setting of QEMU's other VFIO devices that turns their migration on; looked for, for the record."""


@dataclass(frozen=True)
class Probe:
    """What was found. `driven`: QEMU migrates the device. `offered`: this QEMU's device has a setting for it."""

    driven: bool
    offered: bool

    def __str__(self) -> str:
        if self.driven:
            return "QEMU migrates the device itself, through the vfio-user protocol"
        if self.offered:
            return f"the device server migrates the device: QEMU's {DEVICE} has {PROPERTY}, and did not make use of it"
        return "the device server migrates the device: QEMU did not ask it whether it could"


def driven(status: Mapping[str, Any]) -> bool:
    """Whether QEMU drives the device's migration, by what the device server's `status` says."""
    return status.get("driven_by_client") is True


async def driven_by_client(control: Control) -> bool:
    """The same, asked for. QEMU has asked the server by the time that it answers on its monitor."""
    return driven(await control.call("status"))


async def probe(monitor: QemuMonitor, control: Control) -> Probe:
    """The same with QEMU's own word beside it. Raises what the connections raise."""
    try:
        properties = await monitor.execute("device-list-properties", {"typename": DEVICE})
    except QmpCommandFailed as error:
        raise EnvironmentProblem(f"this QEMU has no device {DEVICE}: {error}") from error
    return Probe(driven=await driven_by_client(control), offered=any(one.get("name") == PROPERTY for one in properties))


async def require_same(control: Control, *, in_stream: bool, what: str) -> None:
    """Whether a VM that has just been started carries its device in the same way as the saved one, `what`.

    Raises StateError if not: QEMU's stream then has the device where it is not looked for, or lacks it.
    """
    check_same(await control.call("status"), in_stream=in_stream, what=what)


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


async def require_complete(control: Control) -> None:
    """QEMU has loaded its stream: whether the device's state was in it and is intact. Raises StateError."""
    migration = (await control.call("status"))["migration"]
    if not migration.get("complete"):
        raise StateError(
            f"QEMU has loaded its stream, and the device's state was not in it: the server is {migration.get('state')}"
        )


async def require_running(control: Control) -> None:
    """The vCPUs were let run: whether the device does, too. Raises StateError."""
    status = await control.call("status")
    if status["phase"] != "running":
        raise StateError(
            f"the device does not run, although QEMU does: the server is {status['phase']}; its log says why the state "
            "was refused"
        )
