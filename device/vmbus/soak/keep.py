"""What is kept of failed episodes, bounded in size: what does not fit is dropped, and said.

Of one failure: logs and other text that got long lose their middle, then the biggest files are dropped. Of all
failures together: the big files of the oldest ones, then the oldest ones as a whole. The newest is never dropped.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

ONE_LIMIT = 256 << 20
"""Bytes kept of one failed episode, unless told otherwise."""
ALL_LIMIT_FACTOR = 8
"""All failures together may have so many times the limit of one."""
TEXT_LIMIT = 8 << 20
"""Text longer than this loses its middle."""
_HEAD = 1 << 20
_BIG = 1 << 20
_TEXT_SUFFIXES = {".log", ".jsonl", ".txt", ".console"}
NOTE = "DROPPED.txt"
"""Says in the folder of a failure what is not there any more."""


def bound_one(folder: Path, limit: int) -> list[str]:
    """Make the folder of a failure fit in `limit` bytes. Returns what was dropped, for people."""
    said = []
    sizes: dict[Path, int] = {}
    for path, status in _files(folder):
        if not stat.S_ISREG(status.st_mode):
            path.unlink()  # sockets and links lead nowhere once the episode has ended
            continue
        size = _size(status)
        if path.suffix in _TEXT_SUFFIXES and status.st_size > TEXT_LIMIT:
            _cut_middle(path, status.st_size)
            said.append(f"the middle of {path.relative_to(folder)} ({status.st_size - TEXT_LIMIT} bytes)")
            size = TEXT_LIMIT
        sizes[path] = size
    for path, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if sum(sizes.values()) <= limit:
            break
        path.unlink()
        del sizes[path]
        said.append(f"{path.relative_to(folder)} ({size} bytes)")
    _note(folder, said)
    return said


def bound_all(failures: Path, limit: int) -> list[str]:
    """Make all failures together fit in `limit` bytes. Returns what was dropped, for people."""
    said: list[str] = []
    folders = sorted((path for path in failures.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime_ns)
    total = sum(size_of(folder) for folder in folders)
    for folder in folders[:-1]:
        if total <= limit:
            return said
        dropped = []
        for path, status in _files(folder):
            if _size(status) > _BIG and total > limit:
                path.unlink()
                total -= _size(status)
                dropped.append(f"{path.relative_to(folder)} ({_size(status)} bytes)")
        _note(folder, dropped)
        said += [f"{folder.name}/{text}" for text in dropped]
    for folder in folders[:-1]:
        if total <= limit:
            return said
        total -= size_of(folder)
        shutil.rmtree(folder, ignore_errors=True)
        said.append(f"{folder.name}, as a whole")
    return said


def size_of(folder: Path) -> int:
    """Bytes that a folder has on the disk, without its holes."""
    return sum(_size(status) for _, status in _files(folder))


def _files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    for directory, _, names in os.walk(folder):
        for name in names:
            path = Path(directory) / name
            found.append((path, path.lstat()))
    return found


def _size(status: os.stat_result) -> int:
    return min(status.st_size, status.st_blocks * 512)


def _cut_middle(path: Path, size: int) -> None:
    """Leave the beginning and the end, within the limit, in place: this needs no room."""
    mark = f"\n... {size - TEXT_LIMIT} bytes left out ...\n".encode()
    tail = TEXT_LIMIT - _HEAD - len(mark)
    with path.open("r+b") as file:
        file.seek(size - tail)
        end = file.read(tail)
        file.seek(_HEAD)
        file.write(mark + end)
        file.truncate()


def _note(folder: Path, said: list[str]) -> None:
    if not said:
        return
    descriptor = os.open(folder / NOTE, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write("".join(f"dropped to save room: {text}\n" for text in said))
