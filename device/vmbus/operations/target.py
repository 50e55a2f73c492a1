"""What a capture of a VM takes, and where it goes: files, or another host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from vmbus.device.description import DeviceDescription
from vmbus.qemu.qmp import file_channel
from vmbus.snapshot.manifest import FILE_PREFIX, RAM, STATES, FileRecord, state_name
from vmbus.vm.description import VmDescription


@dataclass
class CapturedDevice:
    """What was taken of one device, as its server says it."""

    state: FileRecord
    pci_config: bytes
    description: DeviceDescription
    """At this moment: providers may have come and gone since the launch."""
    packets: dict[str, int]
    incoming_held: int
    files: dict[str, int]
    """Providers' files that were copied beside the state: name and size in bytes."""

    @classmethod
    def told(cls, saved: Mapping[str, Any]) -> CapturedDevice:
        """From a server's answer to `save`."""
        packets = saved.get("packets", {})
        return cls(
            state=FileRecord(int(saved.get("bytes", 0)), str(saved["sha256"])),
            pci_config=bytes.fromhex(saved["config"]),
            description=msgspec.convert(saved["description"], DeviceDescription),
            packets={"queued": int(packets.get("queued", 0)), "sent": int(packets.get("sent", 0))},
            incoming_held=int(saved.get("incoming_held", 0)),
            files={str(name): int(size) for name, size in saved.get("files", {}).items()},
        )


@dataclass
class Captured:
    """The result of the capture, before it is sealed."""

    stopped_at: float
    was_running: bool
    devices: list[CapturedDevice]
    """All of the VM's, the first one first."""
    flushed_pages: int = 0
    flushed_bytes: int = 0
    attempts: int = 1
    reached_at: float = 0.0
    """CLOCK_MONOTONIC when QEMU was seen at pre-switchover (live only)."""
    saved_at: float = 0.0
    """When the device server had written its state."""
    flushed_at: float = 0.0
    """When the logged pages had been written through QEMU, and the target was done with the state."""
    written_at: float = 0.0
    """When QEMU had sent its last page (live only)."""
    driven: bool = False
    """QEMU migrates the devices itself: their states are in QEMU's stream, and the files are only copies."""

    @property
    def packets(self) -> dict[str, int]:
        """Of all devices together."""
        return {key: sum(one.packets[key] for one in self.devices) for key in ("queued", "sent")}

    @property
    def incoming_held(self) -> int:
        """Of all devices together."""
        return sum(one.incoming_held for one in self.devices)

    @property
    def state_bytes(self) -> int:
        """Of all devices together."""
        return sum(one.state.size for one in self.devices)

    @property
    def configs(self) -> list[bytes]:
        """The configuration spaces of their functions."""
        return [one.pci_config for one in self.devices]

    @property
    def files(self) -> dict[str, int]:
        """Of all devices together."""
        return {name: size for one in self.devices for name, size in one.files.items()}

    def described(self, vm: VmDescription) -> VmDescription:
        """The VM with its devices as they were. Raises `UsageError` if they do not go together any more."""
        return vm.with_devices([one.description for one in self.devices])


class Target(Protocol):
    """Where a capture goes."""

    @property
    def durable(self) -> bool:
        """Whether the state has to be on the disk as soon as it is written: a file that only lives for a while need
        not."""

    @property
    def way(self) -> str | None:
        """The TCP address of another host to which QEMU's stream goes, in words; None: it goes elsewhere."""

    def state(self, index: int) -> Path:
        """The file, not there yet, that the device server of that number writes its state into."""

    @property
    def files(self) -> Path | None:
        """The directory for copies of the providers' files. None: it is a migration; none go along, and those that
        would have to prevent it."""

    async def begin(self) -> list[dict[str, object]]:
        """A pass begins: the `channels` for QEMU's migrate. The VM runs as ever and has not been touched."""

    async def saved(self, captured: Captured) -> None:
        """The devices' states are in their files. The vCPUs stand, and QEMU has still to write its last pages; it does
        not before this returns. In a live capture the logged pages are written through QEMU meanwhile."""

    async def again(self) -> None:
        """The pass is given up, and `begin` follows. QEMU's stream is not cut yet: who reads it shall know first."""

    def discard(self) -> None:
        """The pass is given up: removes what it left."""


class FileTarget:
    """QEMU's stream and the devices' states go into files of a directory."""

    durable = True
    way = None

    def __init__(self, folder: Path) -> None:
        self.ram = folder / RAM
        self.files = folder

    def state(self, index: int) -> Path:
        return self.files / state_name(index)

    async def begin(self) -> list[dict[str, object]]:
        return file_channel(self.ram)

    async def again(self) -> None:
        pass

    async def saved(self, captured: Captured) -> None:
        pass

    def discard(self) -> None:
        for path in (self.ram, *(self.files / name for name in STATES), *self.files.glob(f"{FILE_PREFIX}*")):
            path.unlink(missing_ok=True)
