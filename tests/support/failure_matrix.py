"""The failure matrix: what becomes of a VM when something fails, for each operation, phase and failure.

Every combination is either a `Cell`, which tests run, or left out with a reason (`GAPS`). The tests are
tests/*/test_failure_matrix.py; docs/migration.md has the same table, written by ``python -m support.failure_matrix``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from vmbus.vm.moments import Moment


class Operation(Enum):
    """What is under way."""

    SAVE = "stopped save"
    LIVE_SAVE = "live save, the VM runs on"
    RESTORE = "restore"
    MIGRATE = "live migration"
    CHECKPOINT = "checkpoint in place"
    REVERT = "revert in place"


PHASES = (
    Moment.BEFORE_STREAM,
    Moment.RAM_COPY,
    Moment.PRE_SWITCHOVER,
    Moment.SAVING,
    Moment.WRITING,
    Moment.STOPPED,
    Moment.SEALING,
    Moment.LOADING,
    Moment.PCI_REPLAY,
    Moment.PACKET_RESTORE,
    Moment.BEFORE_GO,
    Moment.BEFORE_CONT,
)


class Failure(Enum):
    """What fails. The source of a save, a checkpoint or a revert is the VM itself; a restore has a destination only."""

    SOURCE_SERVER = "source's server killed"
    SOURCE_QEMU = "source's QEMU killed"
    SOURCE_OWNER = "source's owner killed"
    ASKER = "asking command killed"
    DESTINATION_SERVER = "destination's server killed"
    DESTINATION_QEMU = "destination's QEMU killed"
    DESTINATION_OWNER = "destination's owner killed"
    LINK_CUT = "link cut"
    SOURCE_DISK = "source's disk full"
    DESTINATION_DISK = "destination's disk full"
    SAVE_RAISES = "save callback raises"
    SAVE_HANGS = "save callback hangs"
    SAVE_LATE = "save callback returns too late"
    SAVE_STUCK = "save callback hangs in native code"
    RESTORE_RAISES = "restore callback raises"
    RESTORE_HANGS = "restore callback hangs"


class Outcome(Enum):
    """Who runs the VM afterwards."""

    SOURCE = "source"
    DESTINATION = "destination"
    SNAPSHOT = "snapshot"
    """Nobody, and there is a whole snapshot from which it is restored."""
    NOBODY = "nobody"
    DOUBT = "in doubt"
    """The source cannot know whether the destination runs it, and stays stopped until that is decided."""


@dataclass(frozen=True)
class Cell:
    """One combination. `says`: what the error of whoever reports it must match. `why`: for nobody, why nobody could."""

    operation: Operation
    phase: Moment
    failure: Failure
    outcome: Outcome
    says: str
    why: str = ""

    @property
    def key(self) -> tuple[Operation, Moment, Failure]:
        return self.operation, self.phase, self.failure

    @property
    def name(self) -> str:
        return f"{self.operation.name}-{self.phase.name}-{self.failure.name}".lower()


O, P, F = Operation, Moment, Failure  # noqa: E741 - they stand in every line of the tables
SAVES = (O.SAVE, O.LIVE_SAVE)
TAKEN = (*SAVES, O.CHECKPOINT)
KILLED = "was killed by SIGKILL"
SOURCE_PROCESS = (F.SOURCE_SERVER, F.SOURCE_QEMU)
DESTINATION_PROCESS = (F.DESTINATION_SERVER, F.DESTINATION_QEMU)

# --- why nobody runs it

DEAD = "QEMU or the device server is gone, with what only it had: as without the operation"
OWNER = "QEMU and the device server end with their owner: as without the operation"
UNTOLD = (
    "the destination has everything, and cannot tell a dead source from a cut link behind which the source runs on; "
    "only Go makes it the owner"
)
HALF = "memory or devices are replaced already; the error names the way back to the checkpoint"
STUCK = "the device server does not answer any more, and a VM cannot run without its device"
AGAIN = "nothing ran before; the snapshot is as it was"

PHASES_OF: Mapping[Operation, tuple[Moment, ...]] = {
    O.SAVE: (P.BEFORE_STREAM, P.RAM_COPY, P.SAVING, P.WRITING, P.STOPPED, P.SEALING),
    O.LIVE_SAVE: (P.BEFORE_STREAM, P.RAM_COPY, P.PRE_SWITCHOVER, P.SAVING, P.WRITING, P.STOPPED, P.SEALING),
    O.RESTORE: (P.BEFORE_STREAM, P.LOADING, P.PCI_REPLAY, P.PACKET_RESTORE, P.BEFORE_CONT),
    O.MIGRATE: tuple(phase for phase in PHASES if phase is not P.SEALING),
    O.CHECKPOINT: (P.BEFORE_STREAM, P.RAM_COPY, P.SAVING, P.WRITING, P.STOPPED),
    O.REVERT: (P.LOADING, P.PCI_REPLAY, P.PACKET_RESTORE, P.BEFORE_CONT),
}
"""The phases that an operation has."""

_MISSING: Mapping[tuple[Operation, Moment], str] = {
    (O.SAVE, P.PRE_SWITCHOVER): "the vCPUs are stopped from the beginning, so there is no switchover",
    (O.CHECKPOINT, P.PRE_SWITCHOVER): "the vCPUs are stopped from the beginning, so there is no switchover",
    (O.MIGRATE, P.SEALING): "there is no bundle: the state is sent while it is written",
    (O.CHECKPOINT, P.SEALING): "the record is written right after the source stopped: the same phase",
    (O.LIVE_SAVE, P.BEFORE_CONT): "the vCPUs run again right after the source stopped: the same phase",
    (O.CHECKPOINT, P.BEFORE_CONT): "the vCPUs run again right after the source stopped: the same phase",
    (O.SAVE, P.BEFORE_CONT): "the VM ends with a stopped save",
    (O.RESTORE, P.BEFORE_GO): "nobody else could own the VM, so nothing is decided",
    (O.REVERT, P.BEFORE_GO): "nobody else could own the VM, so nothing is decided",
    (O.REVERT, P.BEFORE_STREAM): "QEMU's snapshot-load is the stream: see while the destination loads",
}
NO_SOURCE = "a restore has no source"
NO_DESTINATION = "there is no destination"


def _phase_gap(operation: Operation, phase: Moment) -> str:
    if (operation, phase) in _MISSING:
        return _MISSING[operation, phase]
    return (
        NO_SOURCE if operation is O.RESTORE else ("a revert saves nothing" if operation is O.REVERT else NO_DESTINATION)
    )


def _cells() -> Iterable[Cell]:
    for operation in TAKEN:
        for phase in PHASES_OF[operation]:
            written = operation in SAVES and phase in (P.STOPPED, P.SEALING)
            for failure in SOURCE_PROCESS:
                if not written:
                    yield Cell(operation, phase, failure, Outcome.NOBODY, f"{KILLED}(.|\n)*the VM is lost", DEAD)
                elif operation is O.LIVE_SAVE and phase is P.STOPPED:
                    says = f"the snapshot .* is complete, but (.|\n)*{KILLED}(.|\n)*the VM is lost"
                    yield Cell(operation, phase, failure, Outcome.SNAPSHOT, says, DEAD)
                else:
                    yield Cell(operation, phase, failure, Outcome.SNAPSHOT, KILLED, DEAD)
            yield Cell(operation, phase, F.SOURCE_OWNER, Outcome.NOBODY, "", OWNER)
            yield Cell(operation, phase, F.ASKER, Outcome.SOURCE, "")
        full = {
            O.SAVE: (P.BEFORE_STREAM, P.RAM_COPY, P.SAVING, P.SEALING),
            O.LIVE_SAVE: (P.BEFORE_STREAM, P.RAM_COPY, P.SAVING, P.SEALING),
            O.CHECKPOINT: (P.RAM_COPY, P.SAVING, P.STOPPED),
        }
        for phase in full[operation]:
            after = ".*the VM runs on" if (operation, phase) != (O.LIVE_SAVE, P.SEALING) else ""
            yield Cell(operation, phase, F.SOURCE_DISK, Outcome.SOURCE, f"No space left on device{after}")
    for operation in (*TAKEN, O.MIGRATE):
        at = operation, P.SAVING
        yield Cell(*at, F.SAVE_RAISES, Outcome.SOURCE, "a defect in save.*the VM runs on")
        says = "the providers to give their state; it was interrupted in .*Faulty.save.*the VM runs on"
        yield Cell(*at, F.SAVE_HANGS, Outcome.SOURCE, says)
        yield Cell(*at, F.SAVE_LATE, Outcome.SOURCE, "to answer 'save'.*the VM runs on")
        yield Cell(*at, F.SAVE_STUCK, Outcome.NOBODY, "to answer 'save'.*the VM is lost.*'status'", STUCK)
    yield from _restores()
    yield from _reverts()
    yield from _migrations()


def _restores() -> Iterable[Cell]:
    for phase in PHASES_OF[O.RESTORE]:
        for failure in DESTINATION_PROCESS:
            yield Cell(O.RESTORE, phase, failure, Outcome.SNAPSHOT, KILLED, AGAIN)
        yield Cell(O.RESTORE, phase, F.DESTINATION_OWNER, Outcome.SNAPSHOT, "", AGAIN)
    yield Cell(O.RESTORE, P.BEFORE_STREAM, F.DESTINATION_DISK, Outcome.SNAPSHOT, "No space left on device", AGAIN)
    at = O.RESTORE, P.PACKET_RESTORE
    yield Cell(*at, F.RESTORE_RAISES, Outcome.SNAPSHOT, "a defect in restore", AGAIN)
    yield Cell(*at, F.RESTORE_HANGS, Outcome.SNAPSHOT, "the device server to rebuild its channels", AGAIN)


def _reverts() -> Iterable[Cell]:
    for phase in PHASES_OF[O.REVERT]:
        for failure in SOURCE_PROCESS:
            says = f"failed half way: (.|\n)*{KILLED}(.|\n)*checkpoints are still in"
            yield Cell(O.REVERT, phase, failure, Outcome.NOBODY, says, f"{DEAD}; {HALF}")
        yield Cell(O.REVERT, phase, F.SOURCE_OWNER, Outcome.NOBODY, "", OWNER)
        yield Cell(O.REVERT, phase, F.ASKER, Outcome.SOURCE, "")
    at = O.REVERT, P.PACKET_RESTORE
    says = "failed half way: .*{}.*checkpoints are still in"
    yield Cell(*at, F.RESTORE_RAISES, Outcome.NOBODY, says.format("a defect in restore"), HALF)
    yield Cell(*at, F.RESTORE_HANGS, Outcome.NOBODY, says.format("'restore-finish'"), HALF)


_SENT = (P.STOPPED, P.LOADING, P.PCI_REPLAY, P.PACKET_RESTORE, P.BEFORE_GO, P.BEFORE_CONT)
"""From here on the destination has everything that the source had."""


def _migrations() -> Iterable[Cell]:
    lost = f"{KILLED}(.|\n)*the VM is lost"
    for phase in PHASES_OF[O.MIGRATE]:
        decided = phase is P.BEFORE_CONT
        for failure in SOURCE_PROCESS:
            if phase in _SENT:
                yield Cell(O.MIGRATE, phase, failure, Outcome.DESTINATION, "")
            else:
                yield Cell(O.MIGRATE, phase, failure, Outcome.NOBODY, lost, DEAD)
        if decided:
            yield Cell(O.MIGRATE, phase, F.SOURCE_OWNER, Outcome.DESTINATION, "")
            yield Cell(O.MIGRATE, phase, F.ASKER, Outcome.DESTINATION, "")
            yield Cell(O.MIGRATE, phase, F.LINK_CUT, Outcome.DOUBT, "could not be asked .* runs there(.|\n)*resolve")
        else:
            why = UNTOLD if phase in _SENT else OWNER
            says = "the VM did not arrive: .*closed the connection.*nothing is left of it here"
            yield Cell(O.MIGRATE, phase, F.SOURCE_OWNER, Outcome.NOBODY, says, why)
            yield Cell(O.MIGRATE, phase, F.ASKER, Outcome.SOURCE, "")
            yield Cell(O.MIGRATE, phase, F.LINK_CUT, Outcome.SOURCE, "nothing came from .* for .*the VM runs on")
        for failure in DESTINATION_PROCESS:  # an idle one may be missed only when it is needed, after the decision
            says = f"gives up: (.|\n)*{KILLED}(.|\n)*(runs on here|the VM runs on)"
            yield Cell(O.MIGRATE, phase, failure, Outcome.SOURCE, says)
        if decided:
            says = "nobody listens at .*could not be asked .* runs there(.|\n)*--resolve ask"
            yield Cell(O.MIGRATE, phase, F.DESTINATION_OWNER, Outcome.DOUBT, says)
        else:
            says = "(closed the connection|broke)(.|\n)*the VM runs on"
            yield Cell(O.MIGRATE, phase, F.DESTINATION_OWNER, Outcome.SOURCE, says)
    full = "No space left on device.*the VM runs on"
    yield Cell(O.MIGRATE, P.SAVING, F.SOURCE_DISK, Outcome.SOURCE, full)
    for phase in (P.BEFORE_STREAM, P.WRITING):
        yield Cell(O.MIGRATE, phase, F.DESTINATION_DISK, Outcome.SOURCE, f"gives up: .*{full}")
    at = O.MIGRATE, P.PACKET_RESTORE
    yield Cell(*at, F.RESTORE_RAISES, Outcome.SOURCE, "gives up: .*a defect in restore.*the VM runs on")
    yield Cell(*at, F.RESTORE_HANGS, Outcome.SOURCE, "gives up: .*in vain for .*'restore-finish'.*runs on")


def _gap(operation: Operation, phase: Moment, failure: Failure) -> str | None:
    """Why there is no such cell; None if there has to be one."""
    if phase not in PHASES_OF[operation]:
        return _phase_gap(operation, phase)
    source = failure in (*SOURCE_PROCESS, F.SOURCE_OWNER, F.ASKER, F.SOURCE_DISK)
    if operation is O.RESTORE and source:
        return "a restore has no source; who asks for it is the VM's owner" if failure is F.ASKER else NO_SOURCE
    destination = failure in (*DESTINATION_PROCESS, F.DESTINATION_OWNER, F.DESTINATION_DISK)
    if operation in (*TAKEN, O.REVERT) and destination:
        return NO_DESTINATION
    if failure is F.LINK_CUT:
        return None if operation is O.MIGRATE else "there is no link"
    if failure in (F.SOURCE_DISK, F.DESTINATION_DISK):
        return "a revert writes no file" if operation is O.REVERT else "that side writes no file in this phase"
    if failure in (F.SAVE_RAISES, F.SAVE_HANGS, F.SAVE_LATE, F.SAVE_STUCK):
        if operation in (O.RESTORE, O.REVERT):
            return "no save callback is called"
        return None if phase is P.SAVING else "save callbacks are called while saving only"
    if failure in (F.RESTORE_RAISES, F.RESTORE_HANGS):
        if operation in TAKEN:
            return "no restore callback is called"
        return None if phase is P.PACKET_RESTORE else "restore callbacks are called during packet restore only"
    return None


def _table() -> dict[tuple[Operation, Moment, Failure], Cell | str]:
    cells: dict[tuple[Operation, Moment, Failure], Cell] = {}
    for cell in _cells():
        assert cell.key not in cells, f"{cell.name} is there twice"
        cells[cell.key] = cell
    table: dict[tuple[Operation, Moment, Failure], Cell | str] = {}
    for operation in Operation:
        for phase in PHASES:
            for failure in Failure:
                key = operation, phase, failure
                reason = _gap(*key)
                if key in cells:
                    disk = failure in (F.SOURCE_DISK, F.DESTINATION_DISK)
                    assert reason is None or disk, f"{cells[key].name} is there, and left out: {reason}"
                    table[key] = cells.pop(key)
                else:
                    assert reason, f"{key} is neither there nor left out"
                    table[key] = reason
    assert not cells, f"not in the matrix: {[cell.name for cell in cells.values()]}"
    return table


TABLE = _table()
CELLS = [entry for entry in TABLE.values() if isinstance(entry, Cell)]
GAPS = {key: entry for key, entry in TABLE.items() if isinstance(entry, str)}

IN_QEMU: frozenset[tuple[Operation, Moment, Failure]] = frozenset(
    {
        (O.MIGRATE, P.RAM_COPY, F.DESTINATION_SERVER),
        (O.MIGRATE, P.RAM_COPY, F.DESTINATION_QEMU),
        (O.MIGRATE, P.RAM_COPY, F.LINK_CUT),
        (O.MIGRATE, P.SAVING, F.SAVE_RAISES),
        (O.MIGRATE, P.SAVING, F.SAVE_HANGS),
        (O.MIGRATE, P.WRITING, F.DESTINATION_DISK),
        (O.MIGRATE, P.STOPPED, F.DESTINATION_QEMU),
        (O.MIGRATE, P.PACKET_RESTORE, F.DESTINATION_SERVER),
        (O.MIGRATE, P.PACKET_RESTORE, F.RESTORE_HANGS),
        (O.MIGRATE, P.BEFORE_CONT, F.DESTINATION_SERVER),
        (O.MIGRATE, P.BEFORE_CONT, F.DESTINATION_QEMU),
        (O.LIVE_SAVE, P.RAM_COPY, F.SOURCE_DISK),
        (O.SAVE, P.RAM_COPY, F.SOURCE_DISK),
        (O.LIVE_SAVE, P.SAVING, F.SAVE_LATE),
        (O.LIVE_SAVE, P.STOPPED, F.SOURCE_SERVER),
        (O.MIGRATE, P.STOPPED, F.SOURCE_QEMU),
    }
)
"""The decisive cells: those are run in real QEMU, too."""

_SHORT = {
    Outcome.SOURCE: "source",
    Outcome.DESTINATION: "dest.",
    Outcome.SNAPSHOT: "snapshot",
    Outcome.NOBODY: "nobody",
    Outcome.DOUBT: "in doubt",
}


def markdown() -> str:
    """The tables as docs/migration.md has them: one for each operation, notes below."""
    notes: dict[str, int] = {}

    def note(text: str) -> str:
        return f"<sup>{notes.setdefault(text, len(notes) + 1)}</sup>" if text else ""

    lines = []
    for operation in Operation:
        phases = PHASES_OF[operation]
        lines += [f"**{operation.value[0].upper()}{operation.value[1:]}**", ""]
        lines += ["| | " + " | ".join(phase.value for phase in phases) + " |", "| --- |" + " --- |" * len(phases)]
        for failure in Failure:
            entries = [TABLE[operation, phase, failure] for phase in phases]
            if all(isinstance(entry, str) for entry in entries):
                continue
            shown = [
                f"{_SHORT[entry.outcome]}{note(entry.why)}" if isinstance(entry, Cell) else f"–{note(entry)}"
                for entry in entries
            ]
            lines.append(f"| {failure.value} | " + " | ".join(shown) + " |")
        lines.append("")
    lines += [f"{number}. {text[0].upper()}{text[1:]}." for text, number in notes.items()]
    lines += ["", "Rows and columns that are not there:", ""]
    lines += [f"* {operation.value}: {'; '.join(_absent(operation))}." for operation in Operation]
    return "\n".join(lines) + "\n"


def _absent(operation: Operation) -> list[str]:
    """Whole columns and rows without a cell, with their reasons."""
    reasons: dict[str, list[str]] = {}
    for phase in PHASES:
        if phase not in PHASES_OF[operation]:
            reasons.setdefault(_phase_gap(operation, phase), []).append(phase.value)
    for failure in Failure:
        entries = [TABLE[operation, phase, failure] for phase in PHASES_OF[operation]]
        if all(isinstance(entry, str) for entry in entries):
            reasons.setdefault(str(entries[0]), []).append(failure.value)
    return [f"{', '.join(what)} ({why})" for why, what in reasons.items()]


if __name__ == "__main__":
    print(markdown(), end="")
