"""Who owns the VM at each stage of a migration, and what each side does if something fails there.

The owner is the side that may let the vCPUs run. There is exactly one at any moment, but for one stage: between the
source's Go and the news that it has arrived, neither knows. The source does not run the VM then, whatever happens,
until it has learned what became of the destination or somebody has decided for it.

The two tables are what both sides work by: `SOURCE` and `DESTINATION`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, Literal, TypeVar

from vmbus.errors import UsageError


class SourceStage(Enum):
    PREPARING = "preparing"
    CAPTURING = "capturing"
    HANDING_OVER = "handing over"
    DECIDED = "decided"
    MOVED = "moved"
    KEPT = "kept"
    IN_DOUBT = "in doubt"
    LOST = "lost"


class DestinationStage(Enum):
    PREPARING = "preparing"
    LOADING = "loading"
    RESTORED = "restored"
    DECIDED = "decided"
    RUNNING = "running"
    DISCARDED = "discarded"


S = TypeVar("S", bound=Enum)
Owner = Literal["source", "destination", "unknown", "nobody"]


@dataclass(frozen=True)
class Row(Generic[S]):
    """One stage: when it begins, who owns the VM, what a failure or a lost link leads to, and what may follow.

    `fate` (destination only) is the answer to a source that asks.
    """

    begins: str
    owner: Owner
    on_failure: str
    next: tuple[S, ...]
    fate: Literal["running", "gone", "undecided"] | None = None


SOURCE: Mapping[SourceStage, Row[SourceStage]] = {
    SourceStage.PREPARING: Row(
        "the destination is asked to get ready; nothing is done to the VM",
        "source",
        "the VM has not noticed anything",
        (SourceStage.CAPTURING, SourceStage.KEPT),
    ),
    SourceStage.CAPTURING: Row(
        "the dirty log starts; memory is copied, the vCPUs stop, the state is saved and sent",
        "source",
        "the migration is cancelled, the device resumes, the vCPUs run on",
        (SourceStage.HANDING_OVER, SourceStage.KEPT, SourceStage.LOST),
    ),
    SourceStage.HANDING_OVER: Row(
        "QEMU has sent its last page; the destination rebuilds everything",
        "source",
        "the device resumes, the vCPUs run on",
        (SourceStage.DECIDED, SourceStage.KEPT, SourceStage.LOST),
    ),
    SourceStage.DECIDED: Row(
        "just before Go is sent",
        "unknown",
        "the vCPUs stay stopped; the destination is asked what became of the VM",
        (SourceStage.MOVED, SourceStage.KEPT, SourceStage.IN_DOUBT, SourceStage.LOST),
    ),
    SourceStage.MOVED: Row(
        "the destination said that the VM runs there", "destination", "the source's processes end all the same", ()
    ),
    SourceStage.KEPT: Row("the VM runs on (or stays stopped, as it was before)", "source", "as without migration", ()),
    SourceStage.IN_DOUBT: Row(
        "the destination could not be asked in time",
        "unknown",
        "the vCPUs stay stopped until somebody decides",
        (SourceStage.MOVED, SourceStage.KEPT, SourceStage.LOST),
    ),
    SourceStage.LOST: Row("the VM could not be set running again; its processes end", "nobody", "", ()),
}

DESTINATION: Mapping[DestinationStage, Row[DestinationStage]] = {
    DestinationStage.PREPARING: Row(
        "a source has come; server and QEMU start",
        "source",
        "everything is discarded",
        (DestinationStage.LOADING, DestinationStage.DISCARDED),
        "gone",
    ),
    DestinationStage.LOADING: Row(
        "QEMU waits for the stream",
        "source",
        "everything is discarded",
        (DestinationStage.PREPARING, DestinationStage.RESTORED, DestinationStage.DISCARDED),
        "gone",
    ),
    DestinationStage.RESTORED: Row(
        "memory, PCI function and packets are back; the vCPUs stand",
        "source",
        "everything is discarded, also if Go does not come in time",
        (DestinationStage.DECIDED, DestinationStage.DISCARDED),
        "gone",
    ),
    DestinationStage.DECIDED: Row(
        "Go has come",
        "destination",
        "everything is discarded, the source is told so if it can be reached",
        (DestinationStage.RUNNING, DestinationStage.DISCARDED),
        "undecided",
    ),
    DestinationStage.RUNNING: Row("the vCPUs run", "destination", "as without migration", (), "running"),
    DestinationStage.DISCARDED: Row("everything has ended", "source", "", (), "gone"),
}


class Ownership(Generic[S]):
    """The stage of one side. Moves only as its table allows."""

    def __init__(self, table: Mapping[S, Row[S]], stage: S) -> None:
        self._table = table
        self.stage = stage

    @property
    def row(self) -> Row[S]:
        return self._table[self.stage]

    def move(self, stage: S) -> None:
        """Enters a stage. Raises `UsageError` if the table does not lead there: a defect, never a peer's doing."""
        if stage not in self.row.next:
            raise UsageError(f"a migration does not lead from {self.stage.value!r} to {stage.value!r}")
        self.stage = stage

    @property
    def over(self) -> bool:
        """Whether nothing follows any more."""
        return not self.row.next
