"""Room on disks: what a full one spoils says nothing about the device."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from vmbus.errors import Code
from vmbus.soak.records import EpisodeRecord

ROOM_FOR_AN_EPISODE = 1 << 30
"""Bytes that must be free where episodes keep their big files before one begins."""
ROOM_FOR_RECORDS = 64 << 20
"""The same for the campaign's folder, where this is another file system."""
_NEARLY_FULL = 1 << 20


def short_of_room(places: Iterable[tuple[Path, int]]) -> str:
    """Which of the places has less than so many bytes free, for people; empty if none has."""
    for path, needed in places:
        try:
            free = shutil.disk_usage(path).free
        except OSError as error:
            return f"{path} cannot be looked at: {error.strerror}"
        if free < needed:
            return f"{path} has {free >> 20} MiB left, and {needed >> 20} MiB are needed"
    return ""


def hit_full_disk(record: EpisodeRecord, places: Sequence[Path]) -> bool:
    """Whether an episode failed since a disk was full: it says so, or whoever died of that cannot any more."""
    if record.verdict != "failed":
        return False
    return record.code == Code.DISK_FULL or bool(short_of_room((path, _NEARLY_FULL) for path in places))
