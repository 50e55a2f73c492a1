"""What a campaign writes down: the JSON lines of its folder, and the report that is made of them.

A campaign is a row of *episodes*. An episode boots a VM, starts its workloads, carries out operations one after the
other, lets the workloads end, and compares all books. What happens in it follows from the campaign's seed and the
episode's number alone, so that each can be replayed by itself, run in any process, or on another machine.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FORMAT = 1
"""The version of these records. A campaign folder of another version is refused."""

Verdict = Literal["passed", "failed", "interrupted"]
"""`interrupted`: ended early on request, and nothing has failed up to then."""

Outcome = Literal["done", "refused", "failed"]
"""Of an operation. `refused`: it was meant to fail (a cancelled or sabotaged migration), and did so as it should."""

Count = dict[str, int]

CAMPAIGN = -1
"""Stands for the number of an episode in events of the campaign as a whole."""


class Sample(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Where an episode was at one moment."""

    at: float
    """Seconds since the episode's beginning."""
    transactions: int
    """Completed since the episode's beginning, all workloads together; falls when a VM goes back to a checkpoint."""
    in_flight: Count = {}
    """Packets by state, as the server counts them: queued, sent, held and more."""


class OperationRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    episode: int
    number: int
    """Within its episode, from 0."""
    kind: str
    parameters: dict[str, str | int | float | bool] = {}
    outcome: Outcome
    at: float
    """Seconds from the episode's beginning to its start."""
    seconds: float
    downtime: float | None = None
    """Seconds for which the guest stood still; None where it did not, or nobody can tell."""
    save_seconds: float | None = None
    restore_seconds: float | None = None
    memory_bytes: int | None = None
    """Of guest memory in the snapshot or the stream."""
    state_bytes: int | None = None
    """Of the device's state."""
    packets: Count = {}
    """In flight at the moment of the operation, by state."""
    message: str = ""
    """What went wrong, for people."""


class EventRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Something that a reader should see: a VM booted, a process died, a disk is full."""

    episode: int
    """CAMPAIGN for what is of no episode."""
    at: float
    """Seconds since the episode's beginning; since the campaign's, not counting what lay between its sittings."""
    text: str
    serious: bool = False


class WorkloadRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One test driver's end."""

    driver: str
    parameters: dict[str, object] = {}
    verdict: str
    """`passed`, `failed`, or `none` where it did not come to its end."""
    transactions: int = 0
    lost: int = 0
    duplicated: int = 0
    reordered: int = 0
    corrupted: int = 0
    message: str = ""


class EpisodeRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One episode, finished. Its line is written last: an episode without one counts as not run."""

    episode: int
    seed: int
    """Its own, which follows from the campaign's and its number."""
    verdict: Verdict
    started: str
    """UTC, as ISO 8601."""
    seconds: float
    where: str = ""
    """The worker that ran it."""
    workloads: list[WorkloadRecord] = []
    operations: int = 0
    audit: str = ""
    """The auditor's verdict: clean, broken, incomplete; empty when no records were kept."""
    samples: list[Sample] = []
    failure: str = ""
    """The first thing that went wrong, for people."""
    code: str = ""
    """The same for programs: see `vmbus.errors.Code`; mostly empty."""
    kept: str = ""
    """Where what was kept of a failure is, relative to the campaign's folder."""


class Environment(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a campaign ran on: versions and sizes, no names of machines."""

    project: str = ""
    python: str = ""
    qemu: str = ""
    libvfio_user: str = ""
    kernel: str = ""
    guest_kernel: str = ""
    accelerator: str = ""
    processors: int = 0
    memory_bytes: int = 0


class State(msgspec.Struct, kw_only=True):
    """`state.json`: how far a campaign has come. Written again from time to time, and at its end."""

    ran: float = 0.0
    """Seconds for which it ran, all sittings together."""
    state: Literal["running", "interrupted", "finished"] = "running"
    """`running` in the folder of a campaign that does not run: it was killed."""
    reason: str = ""
    """Why it ended before everything was done."""
    missing: list[str] = []
    """What could not be written, for people."""


class Failure(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One episode that failed, and how to see it again."""

    episode: int
    message: str
    replay: str
    """The one command that replays it."""
    kept: str = ""


class BudgetResult(msgspec.Struct, kw_only=True):
    """A bound on a measure (`vmbus.soak.measures`), and what became of it."""

    measure: str
    kind: str = ""
    """Of operations; empty for all."""
    limit: float
    value: float | None
    """None where nothing of it was measured: that keeps no budget."""
    kept: bool | None
    """None as long as the campaign is not finished."""


class Change(msgspec.Struct, kw_only=True):
    """The median of a quantity in operations of one kind, in an earlier campaign and in this one."""

    kind: str
    quantity: str
    before: float
    now: float
    operations: tuple[int, int]
    """That have it, before and now."""
    grown: bool
    """By more than is allowed."""


class Comparison(msgspec.Struct, kw_only=True):
    """A campaign beside an earlier one."""

    seed: int
    started: str
    growth: float | None
    """The share by which a median may have grown; None: any."""
    differences: list[str]
    """What else is different, for people: a comparison means little then."""
    changes: list[Change]


class Report(msgspec.Struct, kw_only=True, omit_defaults=False):
    """`report.json`: the whole campaign."""

    format: int = FORMAT
    verdict: Verdict
    seed: int
    started: str
    seconds: float
    operations: int
    """Carried out: done and refused ones; those that failed are in `failures`."""
    packets: int
    """In flight during operations, all together: each had to come out exactly once."""
    transactions: int
    """Completed and checked, all episodes together."""
    episodes_planned: int | None
    """None when the campaign runs for a time."""
    failures: list[Failure]
    by_kind: dict[str, Count]
    """Operations by kind and outcome."""
    command: str
    """The command that runs the whole campaign again."""
    environment: Environment
    settings: dict[str, object]
    episode_records: list[EpisodeRecord]
    operation_records: list[OperationRecord]
    events: list[EventRecord]
    missing: list[str]
    """What of the records could not be read or written, and is therefore not in here."""
    budgets: list[BudgetResult] = []
    comparison: Comparison | None = None
