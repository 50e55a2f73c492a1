"""Room on disks: what a full one spoils says nothing about the device."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

ROOM_FOR_AN_EPISODE = 1 << 30
"""Bytes that must be free where episodes keep their big files before one begins."""
ROOM_FOR_RECORDS = 64 << 20
"""The same for the campaign's folder, where this is another file system."""
_FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT))


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


def tells_of_full_disk(failure: str) -> bool:
    """Whether a failure says that a disk was full."""
    return any(text in failure for text in _FULL)
