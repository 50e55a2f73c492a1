"""The catalogue of test drivers: small programs in the guest that use one kind of device hard and judge what they see.

A test driver is a function `run(context) -> result`. Its result is an object with a `verdict` of "passed" or "failed";
`python3 -m vmbus_guest.testdrivers NAME --parameters JSON` runs one in a process of its own. This module stays light:
the agent imports it at boot; the drivers themselves are imported where they run.
"""

from __future__ import annotations

TYPE_CHECKING = False  # without `typing`, which costs a tenth of a second under TCG
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vmbus_guest.testdrivers.context import Context


class Entry:
    """One test driver of the catalogue."""

    __slots__ = ("module", "summary")

    def __init__(self, module: str, summary: str) -> None:
        self.module = module
        self.summary = summary

    def load(self) -> Callable[[Context], dict[str, Any]]:
        """Import the driver's module and return its `run`."""
        module = __import__(self.module, fromlist=["run"])
        run: Callable[[Context], dict[str, Any]] = module.run
        return run


CATALOGUE: dict[str, Entry] = {
    "echo": Entry(
        "vmbus_guest.testdrivers.echo",
        "keeps a window of numbered requests at the echo provider and checks every answer",
    ),
    "raw-echo": Entry(
        "vmbus_guest.testdrivers.raw_echo",
        "counts echo transactions as fast as they go, checking nothing but their number",
    ),
    "burst": Entry(
        "vmbus_guest.testdrivers.burst",
        "has the burst provider flood the guest, checks and answers every packet",
    ),
    "bulk": Entry(
        "vmbus_guest.testdrivers.bulk",
        "has the echo provider transform large buffers in place, as fast as they go, and checks every answer",
    ),
    "remap": Entry(
        "vmbus_guest.testdrivers.remap",
        "maps memory, has the echo provider write to it, and unmaps it, round after round",
    ),
    "mixed": Entry(
        "vmbus_guest.testdrivers.mixed",
        "runs several of the others side by side over one connection to the device",
    ),
    "services": Entry(
        "vmbus_guest.services.run",
        "runs the guest's ends of network, disk and integration services until it is stopped",
    ),
    "disk-writer": Entry(
        "vmbus_guest.testdrivers.disk_writer",
        "makes a file system on a block device, writes and syncs, and checks what it holds: no channels",
    ),
    "ping": Entry(
        "vmbus_guest.testdrivers.ping",
        "asks a host for echoes, and reports which came back: no device",
    ),
    "interface": Entry(
        "vmbus_guest.testdrivers.interface",
        "switches an interface of another driver's on, such as virtio_net's, and gives it an address: no device",
    ),
    "transfer": Entry(
        "vmbus_guest.testdrivers.transfer",
        "sends and takes TCP streams whose every byte is known, and checks them: no device",
    ),
    "kvp": Entry(
        "vmbus_guest.testdrivers.kvp",
        "reads and writes the key-value pools of the guest, as its programs do: no device",
    ),
    "disk-speed": Entry(
        "vmbus_guest.testdrivers.disk_speed",
        "reads or writes a block device past the page cache and counts: no channels",
    ),
    "function": Entry(
        "vmbus_guest.testdrivers.function",
        "opens the PCI function, reads its registers, maps memory for it, and closes it: no channels",
    ),
}
"""By name."""
