"""The VMBus device's PCI function in a paused VM: whether it answers, and how it is put back after QEMU's load."""

from __future__ import annotations

from collections.abc import Sequence

from vmbus.device.pci import replay_writes
from vmbus.errors import StateError
from vmbus.qemu.connections import Control, QemuMonitor
from vmbus.qemu.pci_replay import PciAddress, replay

MAGIC = 0x53424D56
"""What a read of the first register of BAR0 gives ("VMBS")."""


async def barrier(monitor: QemuMonitor, control: Control, known: int | None = None) -> None:
    """Makes sure that every register write which the guest has posted reached the device server.

    Writes are posted: QEMU may still have some under way when the vCPUs stop. A read comes after them on the same
    connection, and its answer proves that they were handled. Without a mapped BAR there cannot be any.

    `known`: where BAR0 was a while ago. The device is asked for its place only if it does not answer there any more.
    """
    if known is not None and _value(await _read(monitor, known)) == MAGIC:
        return
    bar0 = (await control.call("pci"))["bar0"]
    if bar0 is None:
        return
    output = await _read(monitor, bar0)
    if _value(output) != MAGIC:
        raise StateError(
            f"the VMBus device does not answer at its BAR0 {bar0:#x}: QEMU's monitor says {output!r}; if the guest has "
            "put it where something else is, it cannot be saved before the guest moves it"
        )


async def _read(monitor: QemuMonitor, address: int) -> str:
    return await monitor.human(f"xp /1xw {address:#x}")


def _value(output: str) -> int:
    """The word in the output of the monitor's ``xp``; -1 if there is none."""
    try:
        return int(output.rpartition(":")[2].strip(), 16)
    except ValueError:
        return -1


async def put_back(
    monitor: QemuMonitor,
    control: Control,
    address: PciAddress,
    config: bytes,
    only: Sequence[tuple[int, int, int]] | None = None,
) -> int:
    """Puts the function back as `config` (256 bytes) says, and returns the number of writes.

    `only`: the writes that are missing (offset, size, value), if it was put back but for them. Raises
    `EnvironmentProblem` or `StateError` if it does not take it.
    """
    count = await replay(monitor.human, address, replay_writes(config) if only is None else only)
    known = bytes.fromhex((await control.call("pci"))["config"])
    if known != config:
        at = next(i for i in range(len(config)) if known[i : i + 1] != config[i : i + 1])
        raise StateError(
            f"the device's configuration differs from the saved one after the replay, first in byte {at:#04x}: "
            f"{known[at : at + 1].hex() or 'nothing'} instead of {config[at]:02x}"
        )
    await barrier(monitor, control)  # the BAR answers where the guest expects it
    return count


async def is_back(monitor: QemuMonitor, control: Control, config: bytes) -> bool:
    """Whether the function is as `config` says, and its BAR answers.

    For a function that was put back before QEMU loaded its stream: that has nothing of the function in it. QEMU tells
    the server of each configuration write and of each reset, so what the server has is what QEMU has.

    Raises `StateError` if it is, and does not answer.
    """
    pci = await control.call("pci")
    if bytes.fromhex(pci["config"]) != config:
        return False
    await barrier(monitor, control, pci["bar0"])
    return True
