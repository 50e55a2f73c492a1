"""What a capture of a VM takes, and where it goes: files, or another host."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vmbus.qemu.qmp import file_channel
from vmbus.snapshot.manifest import FILE_PREFIX


@dataclass
class Captured:
    """The result of the capture, before it is sealed."""

    stopped_at: float
    was_running: bool
    packets: dict[str, int]
    incoming_held: int
    state_sha256: str
    pci_config: bytes
    device: dict[str, Any]
    """The description of the device at this moment: providers may have come and gone since the launch."""
    state_bytes: int = 0
    files: dict[str, int] = field(default_factory=dict)
    """Providers' files that were copied beside the state: name and size in bytes."""
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
    """QEMU migrates the device itself: its state is in QEMU's stream, and the file is only a copy."""


class Target(Protocol):
    """Where a capture goes."""

    @property
    def durable(self) -> bool:
        """Whether the state has to be on the disk as soon as it is written: a file that only lives for a while need
        not."""

    @property
    def way(self) -> str | None:
        """The TCP address of another host to which QEMU's stream goes, in words; None: it goes elsewhere."""

    @property
    def state(self) -> Path:
        """The file, not there yet, that the device server writes its state into."""

    @property
    def files(self) -> Path | None:
        """The directory for copies of the providers' files. None: it is a migration; none go along, and those that
        would have to prevent it."""

    async def begin(self) -> list[dict[str, object]]:
        """A pass begins: the `channels` for QEMU's migrate. The VM runs as ever and has not been touched."""

    async def saved(self, captured: Captured) -> None:
        """The device's state is in its file. The vCPUs stand, and QEMU has still to write its last pages; it does not
        before this returns. In a live capture the logged pages are written through QEMU meanwhile."""

    def discard(self) -> None:
        """The pass is given up: removes what it left."""


class FileTarget:
    """QEMU's stream and the device's state go into two files."""

    durable = True
    way = None

    def __init__(self, ram: Path, state: Path) -> None:
        self.ram = ram
        self.state = state
        self.files = state.parent

    async def begin(self) -> list[dict[str, object]]:
        return file_channel(self.ram)

    async def saved(self, captured: Captured) -> None:
        pass

    def discard(self) -> None:
        for path in (self.ram, self.state, *self.files.glob(f"{FILE_PREFIX}*")):
            path.unlink(missing_ok=True)
