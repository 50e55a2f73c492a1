"""What a live migration did, as the source saw it."""

from __future__ import annotations

import msgspec

from vmbus.operations.migration.messages import Restored
from vmbus.operations.target import Captured


class MigrationReport(msgspec.Struct, kw_only=True):
    """What a live migration did, as the source saw it. Times in seconds by its own clock, sizes in bytes."""

    migration: str
    address: str
    phases: dict[str, float]
    """All that was done, by phase."""
    downtime: float
    """From the stop of the vCPUs to the news that they run at the destination. If that had to be fetched, the time that
    they ran there before it was told is taken off: the destination says how long that was."""
    downtime_qemu: float
    """QEMU's share: its stop, its last pages, its load, its start."""
    downtime_device: float
    """The rest: the device's pause, save, transfer, flush, PCI replay and restore, and the messages between."""
    spans: dict[str, float]
    """The downtime in the order in which it passed."""
    packets: dict[str, int]
    """Outgoing packets that moved: ``queued`` and ``sent``."""
    incoming_held: int
    channels: int
    ram_bytes: int
    """What QEMU sent in its last pass."""
    state_bytes: int
    flushed_pages: int
    flushed_bytes: int
    attempts: int
    """Passes: more than 1 if the dirty log broke."""
    multifd: int
    asked: bool
    """Whether the news that the VM runs had to be fetched, since the link broke after the decision."""

    @property
    def total(self) -> float:
        return sum(self.phases.values())


QEMU_SPANS = ("stop", "switchover", "load", "cont")
"""Those that are QEMU's share."""


def spans_of(
    captured: Captured, restored: Restored, *, sent_at: float, restored_at: float, running_at: float, cont: float
) -> dict[str, float]:
    """The downtime in the order in which it passed. The moments (CLOCK_MONOTONIC): the destination had the state, it
    had rebuilt everything, the vCPUs ran there, for which they took `cont` seconds."""
    rebuilt = restored.seconds.get("pci", 0.0) + restored.seconds.get("device", 0.0)
    after_sent = restored_at - captured.written_at
    return {
        "stop": captured.reached_at - captured.stopped_at,
        "save": captured.saved_at - captured.reached_at,
        "transfer": sent_at - captured.saved_at,
        "flush": captured.flushed_at - sent_at,
        "switchover": captured.written_at - captured.flushed_at,
        "load": max(0.0, after_sent - rebuilt),
        "rebuild": min(rebuilt, after_sent),
        "messages": max(0.0, running_at - restored_at - cont),
        "cont": cont,
    }
