"""A campaign's records: a JSON object a line, a file for each kind, each written whole or not at all.

What a full disk leaves of a line is taken back at once, what a crash leaves of one at the next opening. Whoever reads
takes what is there, while it is written, after a crash, or in a copy; a line that is none costs no other.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import msgspec

from vmbus.errors import os_error
from vmbus.soak.records import EpisodeRecord, EventRecord, OperationRecord

Record = OperationRecord | EventRecord | EpisodeRecord
JOURNALS: dict[type[Record], str] = {OperationRecord: "operations", EventRecord: "events", EpisodeRecord: "episodes"}

R = TypeVar("R", OperationRecord, EventRecord, EpisodeRecord)


class Journal:
    """One file, opened to be written. Raises EnvironmentProblem where it cannot be."""

    def __init__(self, folder: Path, kind: type[Record]) -> None:
        """`torn` becomes how many bytes without their end were there, and are gone."""
        self.path = folder / f"{JOURNALS[kind]}.jsonl"
        self._sync = kind is EpisodeRecord  # which counts as run once its record is on the disk
        with os_error(f"cannot write {self.path}"):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        size = end = os.fstat(self._descriptor).st_size
        while end > 0:
            start = max(0, end - 65536)
            found = os.pread(self._descriptor, end - start, start).rfind(b"\n")
            end = start + found + 1
            if found >= 0:
                break
        self.torn = size - end
        if self.torn:
            os.ftruncate(self._descriptor, end)

    def append(self, line: bytes) -> None:
        """Write one line. Raises OSError, and then nothing of it is there."""
        before = os.fstat(self._descriptor).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            if self._sync:
                os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, before)
            raise

    def close(self) -> None:
        os.close(self._descriptor)


def read_records(folder: Path, kind: type[R], missing: list[str]) -> list[R]:
    """The records of one kind; what cannot be read is named in `missing`, and keeps no other from being read."""
    path = folder / f"{JOURNALS[kind]}.jsonl"
    decoder = msgspec.json.Decoder(kind)
    records: list[R] = []
    bad: list[str] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        records.append(decoder.decode(line))
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    what = "is cut off" if not line.endswith(b"\n") else f"is no record: {error}"
                    bad.append(f"line {number} {what}")
    except FileNotFoundError:
        missing.append(f"{path.name}: there is no such file")
    except OSError as error:
        missing.append(f"{path.name}: cannot be read after {len(records)} records: {error.strerror}")
    if bad:
        missing.append(f"{path.name}: {len(bad)} of {len(records) + len(bad)} lines could not be read; {bad[0]}")
    return records


def last_episodes(records: list[EpisodeRecord]) -> dict[int, EpisodeRecord]:
    """The record of each episode that counts: the last, but what has once failed stays so."""
    last: dict[int, EpisodeRecord] = {}
    for record in records:
        before = last.get(record.episode)
        if before is None or before.verdict != "failed" or record.verdict == "failed":
            last[record.episode] = record
    return last
