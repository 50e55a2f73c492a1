"""Copying large files with holes: sharing their blocks where the file system can, keeping the holes where it cannot.

And flushing the directories that name them.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from vmbus.util.interruptible import NEVER, Stop

_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_CHUNK = 4 << 20
_NO_CLONE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM)


def copy_content(source: int, target: int, stop: Stop = NEVER) -> int:
    """Fill the new, empty file `target` with the content of `source`, a file or block device, and flush it to disk.

    Both are descriptors. Returns the size in bytes. Raises OSError.
    """
    size = os.lseek(source, 0, os.SEEK_END)
    if not _clone(source, target):
        os.ftruncate(target, size)
        copy_data(source, target, size, stop)
    os.fsync(target)
    return size


def copy_file(source: Path, target: Path, *, made: list[Path] | None = None, stop: Stop = NEVER) -> int:
    """Copy a file (or a block device) to a new file of its owner alone, flushed to disk; returns its size in bytes.

    `made` gets the target once it exists. Raises OSError, also when the target is there already.
    """
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        if made is not None:
            made.append(target)
        try:
            size = copy_content(fd, out, stop)
        finally:
            os.close(out)
    finally:
        os.close(fd)
    return size


def sync_directory(path: Path) -> None:
    """Flush a directory: the names in it are on stable storage. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clone(source: int, target: int) -> bool:
    """Let the target share the source's blocks, if the file system can."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno not in _NO_CLONE:
            raise
        return False
    return True


def copy_data(source: int, target: int, size: int, stop: Stop = NEVER) -> None:
    """Copy all of `size` bytes that is not a hole. Raises OSError."""
    offset = 0
    while offset < size:
        offset, end = _next_data(source, offset, size)
        while offset < end:
            stop.check()
            data = os.pread(source, min(_CHUNK, end - offset), offset)
            if not data:
                raise OSError(errno.EIO, "the file became shorter while it was copied")
            offset += os.pwrite(target, data, offset)


def _next_data(source: int, offset: int, size: int) -> tuple[int, int]:
    """Where the next data begins and ends, from `offset` on."""
    try:
        start = os.lseek(source, offset, os.SEEK_DATA)
        return start, os.lseek(source, start, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a hole to the end
            return size, size
        if error.errno == errno.EINVAL:  # a block device knows no holes
            return offset, size
        raise
