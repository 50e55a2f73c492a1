"""What became of each migration to this machine, on disk: it outlives the VM, the process that owned it, and a reboot.

A source that does not know what became of its VM has to ask, perhaps long after. One file for each migration; its
destination holds the file's lock for as long as it lives, and appends a line at each stage:

    arriving   a source has come; the vCPUs have not run, and all that was started ends with its owner
    starting   the vCPUs are about to run
    running    they ran: the memory that the source still has is of the past
    gone       everything has ended, and they never ran

Nothing is flushed while the VM stands still. A line that a power cut took away makes the answer less certain, and never
another one: "arriving" of an earlier boot proves nothing.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from vmbus.errors import EnvironmentProblem
from vmbus.operations.migration.messages import DestinationId, Fate, MigrationId
from vmbus.util.boot import boot_id
from vmbus.util.directories import state_folder
from vmbus.util.lockfile import LockFile, held

KEPT_DAYS = 30
"""A record that nobody has written to for so long is removed."""

_SUFFIX = ".verdict"
_MOST_READ = 64 << 10

Stage = Literal["arriving", "starting", "running", "gone"]


class _Line(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    stage: Stage
    destination: DestinationId
    boot: str
    reason: str = ""


class Record:
    """The record of one migration, written by its destination."""

    def __init__(self, folder: Path, migration: MigrationId) -> None:
        """Raises `EnvironmentProblem` if it cannot be written, or somebody else writes it."""
        self.destination: DestinationId = secrets.token_hex(16)
        self._path = folder / f"{migration}{_SUFFIX}"
        self._write(self._open)
        try:
            self.note("arriving")
        except EnvironmentProblem:
            self.close()
            raise

    def _open(self) -> None:
        self._file = LockFile(self._path)

    def _write(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            reason = error.strerror or error
            raise EnvironmentProblem(f"cannot write down what becomes of the VM ({self._path}): {reason}") from error

    def note(self, stage: Stage, reason: str = "") -> None:
        """A stage begins. Raises `EnvironmentProblem`."""
        line = msgspec.json.encode(_Line(stage, self.destination, boot_id(), reason[:4096])) + b"\n"
        self._write(lambda: self._file.append(line))

    def flush(self) -> None:
        """What was noted survives a power cut from here on. Raises `EnvironmentProblem`."""
        self._write(self._file.flush)

    def close(self) -> None:
        """Ends the writing. May be called more than once."""
        self._file.close()


class Verdicts:
    """All records of this machine (and user)."""

    def __init__(self, folder: Path | None = None) -> None:
        """Raises `EnvironmentProblem` if there cannot be any."""
        self.folder = state_folder("migrations") if folder is None else folder

    def begin(self, migration: MigrationId) -> Record:
        """A migration comes here; records that are old enough are removed. Raises `EnvironmentProblem`."""
        with contextlib.suppress(OSError):
            for path in self.folder.glob(f"*{_SUFFIX}"):
                if time.time() - path.lstat().st_mtime > KEPT_DAYS * 86400 and not held(path):
                    path.unlink(missing_ok=True)
        return Record(self.folder, migration)

    def find(self, migration: MigrationId) -> Fate:
        """What a source is told that asks about a migration of which only the record is left."""
        path = self.folder / f"{migration}{_SUFFIX}"
        alive = held(path)  # before it is read: who dies in between has written nothing after that
        line = _last_line(path)
        if line is None:
            return Fate(fate="unknown", reason="this destination knows nothing of that migration")
        if line.stage in ("running", "gone"):
            return Fate(fate=line.stage, destination=line.destination, reason=line.reason)
        if line.stage == "arriving" and not alive and line.boot == boot_id():
            why = "its owner there has ended before the vCPUs were to run"
            return Fate(fate="gone", destination=line.destination, reason=why)
        why = "its owner there has ended" if not alive else "another process there has it"
        return Fate(fate="undecided", destination=line.destination, reason=f"{why}, in stage {line.stage!r}")


def _last_line(path: Path) -> _Line | None:
    """The last whole line; what a full disk or a kill has cut off does not count."""
    with contextlib.suppress(OSError, msgspec.MsgspecError, ValueError, RecursionError):
        with path.open("rb") as file:
            lines = file.read(_MOST_READ).split(b"\n")[:-1]
        return msgspec.json.decode(lines[-1], type=_Line) if lines else None
    return None
