"""What several providers save: the books of a workload."""

import msgspec

from vmbus.errors import StateError
from vmbus.util.records import U64
from vmbus.wire.workload import BurstStart, Tally, parse_burst_start


class TallyState(msgspec.Struct, frozen=True):
    completed: U64
    corrupted: U64
    duplicated: U64
    lost: U64
    reordered: U64
    started: U64

    @classmethod
    def of(cls, tally: Tally) -> "TallyState":
        return cls(**tally.as_dict())

    def load_into(self, tally: Tally) -> None:
        tally.load(msgspec.structs.asdict(self))


def saved_run(run: tuple[int, int, int] | None, needless: int, issued: int) -> BurstStart | None:
    """A run of a burst provider out of u32 and u64; what the guest could not have asked for raises StateError."""
    if run is None:
        return None
    start = parse_burst_start(BurstStart(*run, needless).pack())
    if start is None or issued > start.packets:
        raise StateError(f"a burst run of size, packets and window {run}, {issued} of them sent, is not a possible one")
    return start
