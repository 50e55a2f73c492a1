"""A campaign's folder: what is written down, and what of it survives a crash, a full disk and a second sitting.

    campaign.json       what the campaign is (`Campaign`): it cannot be gone on with under other settings
    state.json          how far it has come (`records.State`)
    operations.jsonl, events.jsonl, episodes.jsonl      the records (`journal`): an episode without one, or with an
                        interrupted one, is run
    episodes/NNNNN/     the working folder of a running episode; removed when it has passed
    failures/NNNNN/     what was kept of a failed one (`keep`)
    expected.json       budgets, and an earlier campaign to compare with (`expected`)
    report.html, report.json, junit.xml                 made of all that
    lock                held by the process that writes here
    reserve             space for the records' last lines, given up when the disk is full

Lines that find no room wait in memory, in order, and are written as soon as there is room.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vmbus.errors import EnvironmentProblem, UsageError, os_error
from vmbus.provision.cache import publish_bytes
from vmbus.soak.journal import JOURNALS, Journal, Record, last_episodes, read_records
from vmbus.soak.records import FORMAT, Environment, EpisodeRecord, State
from vmbus.util.copying import sync_directory
from vmbus.util.lockfile import LockFile

CAMPAIGN_FILE = "campaign.json"
STATE_FILE = "state.json"
RESERVE = 4 << 20
"""Bytes that are kept free for records: some ten thousand operations."""
WAITING_LIMIT = 100_000
"""Lines that wait for room in memory, at most (some 50 MiB). Further ones are counted as missing."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


class Campaign(msgspec.Struct, kw_only=True):
    """`campaign.json`: which campaign this is."""

    format: int = FORMAT
    seed: int
    started: str
    """UTC, as ISO 8601."""
    settings: dict[str, Any]
    environment: Environment
    episodes_planned: int | None = None
    """None when it runs for a time."""
    only: int | None = None
    """The one episode that is replayed."""


class _Format(msgspec.Struct):
    format: int


def read_campaign(path: Path) -> Campaign:
    """What campaign the folder `path` holds. Raises `UsageError` when there is none, or one of another version."""
    file = path / CAMPAIGN_FILE
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path} is no folder of a campaign: it has no {CAMPAIGN_FILE}") from None
    except OSError as error:
        raise EnvironmentProblem(f"cannot read {file}: {error.strerror}") from error
    try:
        found = msgspec.json.decode(data, type=_Format).format
        if found == FORMAT:
            return msgspec.json.decode(data, type=Campaign)
    except msgspec.DecodeError as error:
        raise UsageError(
            f"{file} is damaged ({error}); its records are beside it, a new campaign needs a new folder"
        ) from error
    raise UsageError(
        f"{path} holds a campaign of format {found}, this version reads and writes {FORMAT}: "
        "go on with the version that began it, or choose a new folder"
    )


def read_state(path: Path, missing: list[str] | None = None) -> State:
    """How far the campaign has come; the beginning, if that cannot be read, which `missing` then says."""
    try:
        return msgspec.json.decode((path / STATE_FILE).read_bytes(), type=State)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        if missing is not None:
            said = error.strerror if isinstance(error, OSError) else error
            missing.append(f"{STATE_FILE}: whether the campaign came to its end is not known: {said}")
        return State()


class CampaignFolder:
    """The folder of a campaign that this process runs. Use `open`, and `close` it.

    `problems` has texts of what went wrong with the folder, for people; whoever shows them empties it.
    """

    def __init__(self, path: Path, campaign: Campaign, lock: LockFile) -> None:
        """Use `open`."""
        self.path = path
        self.campaign = campaign
        self.state = read_state(path)
        self.problems: list[str] = []
        self._lock = lock
        self._waiting: deque[tuple[Journal, bytes]] = deque()
        self._lost = 0
        self._full = False
        self._journals = {kind: Journal(path, kind) for kind in JOURNALS}
        self.problems += [
            f"{one.path.name} ended in the middle of a record ({one.torn} bytes), which is gone"
            for one in self._journals.values()
            if one.torn
        ]
        self.resumed = bool(self.state.ran)
        self._reserve()

    @classmethod
    def open(cls, path: Path, campaign: Campaign) -> CampaignFolder:
        """Begin `campaign` in the new or empty folder `path`, or go on with it where it is that of the same one.

        Raises `UsageError` for a folder of something else, of another version, of other settings, or in use, and
        `EnvironmentProblem` when it cannot be written.
        """
        path = path.absolute()
        with os_error(f"cannot make the campaign's folder {path}"):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = {entry.name for entry in path.iterdir()}
        if CAMPAIGN_FILE not in found and found - {"lock"}:
            raise UsageError(f"{path} holds other things than a campaign; choose a new or an empty folder")
        with os_error(f"cannot write in {path}"):
            try:
                lock = LockFile(path / "lock")
            except BlockingIOError:
                raise UsageError(
                    f"another process runs the campaign in {path}; choose another folder, or wait for it"
                ) from None
        try:
            if CAMPAIGN_FILE in found:
                return cls(path, _same(path, read_campaign(path), campaign), lock)
            with os_error(f"cannot write in {path}"):
                path.chmod(0o700)
                publish_bytes(path / CAMPAIGN_FILE, _pretty(campaign))
                for name in ("episodes", "failures"):
                    (path / name).mkdir(mode=0o700, exist_ok=True)
                sync_directory(path)
            return cls(path, campaign, lock)
        except BaseException:
            lock.close()
            raise

    def close(self) -> None:
        """Writes what waits, if it can, and lets go of the folder."""
        self.flush()
        for journal in self._journals.values():
            journal.close()
        (self.path / "reserve").unlink(missing_ok=True)
        self._lock.close()

    # --- records ---------------------------------------------------------------------------------------------------

    def write(self, record: Record) -> None:
        """Write one record down. Never raises for want of room: then it waits (see `waiting`)."""
        if len(self._waiting) >= WAITING_LIMIT:
            self._lost += 1
        else:
            self._waiting.append((self._journals[type(record)], msgspec.json.encode(record) + b"\n"))
        self.flush()

    def flush(self) -> bool:
        """Write what waits for room. Returns whether nothing waits any more."""
        while self._waiting:
            journal, line = self._waiting[0]
            try:
                journal.append(line)
            except OSError as error:
                if self._give_up_reserve():
                    continue
                if not self._full:
                    self._full = True
                    self.problems.append(
                        f"cannot write {journal.path}: {error.strerror}; records wait in memory until there is room"
                    )
                return False
            self._waiting.popleft()
        if self._full:
            self._full = False
            self.problems.append("there is room again: all records that waited are written")
            self._reserve()
        return True

    @property
    def waiting(self) -> int:
        """Records that are only in memory."""
        return len(self._waiting)

    def missing(self) -> list[str]:
        """What could not be written, for people."""
        said = []
        if self._waiting:
            said.append(f"{len(self._waiting)} records, which found no room on the disk")
        if self._lost:
            said.append(f"{self._lost} records, which found no room on the disk and then none in memory")
        return said

    def finished(self) -> dict[int, EpisodeRecord]:
        """The record of each episode that need not be run again. Lines that are no records are left out."""
        last = last_episodes(read_records(self.path, EpisodeRecord, self.problems))
        return {number: record for number, record in last.items() if record.verdict != "interrupted"}

    def with_room(self, write: Callable[[], T]) -> T:
        """Call `write`, which may be called twice: when the disk is full, the reserve is given up for it."""
        try:
            return write()
        except OSError as error:
            if error.errno not in NO_ROOM or not self._give_up_reserve():
                raise
            return write()

    def save_state(self) -> None:
        """Write `state.json`. A full disk leaves the last one."""
        self.state.missing = self.missing()
        with contextlib.suppress(OSError):
            self.with_room(lambda: publish_bytes(self.path / STATE_FILE, _pretty(self.state)))

    # --- the folders of episodes -------------------------------------------------------------------------------------

    def working(self, episode: int) -> Path:
        """A new, empty working folder of an episode. What an earlier, cut off run of it left is removed."""
        path = self.path / "episodes" / f"{episode:05}"
        with os_error(f"cannot make {path}"):
            if path.exists():
                shutil.rmtree(path)
            path.mkdir(mode=0o700, parents=True)
        return path

    def discard(self, working: Path) -> None:
        """Remove the working folder of an episode that has passed, or that will be run again."""
        shutil.rmtree(working, ignore_errors=True)

    def keep(self, working: Path) -> str:
        """Move the working folder of a failed episode to those that are kept; returns where, relative to the folder."""
        kept = self.path / "failures"
        kept.mkdir(mode=0o700, exist_ok=True)
        number = 1
        while (target := kept / (working.name if number == 1 else f"{working.name}-{number}")).exists():
            number += 1
        try:
            working.rename(target)
        except OSError as error:
            self.problems.append(f"cannot move {working} to {target}: {error.strerror}")
            target = working
        return str(target.relative_to(self.path))

    # --- room ------------------------------------------------------------------------------------------------------

    def _reserve(self) -> None:
        with contextlib.suppress(OSError):
            descriptor = os.open(self.path / "reserve", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, RESERVE)
            finally:
                os.close(descriptor)

    def _give_up_reserve(self) -> bool:
        """Free the reserve; False if there is none any more."""
        try:
            (self.path / "reserve").unlink()
        except OSError:
            return False
        self.problems.append("the disk is full: the reserve for records is given up")
        return True


def _same(path: Path, there: Campaign, wanted: Campaign) -> Campaign:
    def settings(campaign: Campaign) -> dict[str, str]:
        # As JSON, so that what only differs in type (a tuple, a list) does not differ.
        whole = {**campaign.settings, "seed": campaign.seed, "only": campaign.only}
        return {name: msgspec.json.encode(value).decode() for name, value in whole.items()}

    ours, theirs = settings(wanted), settings(there)
    differences = [
        f"{name} is {theirs.get(name, 'null')} there and {ours.get(name, 'null')} here"
        for name in sorted({*theirs, *ours})
        if theirs.get(name, "null") != ours.get(name, "null")
    ]
    if differences:
        raise UsageError(
            f"{path} holds a campaign with other settings: {'; '.join(differences)}. "
            "Go on with it (scripts/soak --resume), or choose a new folder"
        )
    return there


def _pretty(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"
