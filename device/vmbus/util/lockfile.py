"""Records whose lock says whether their owner lives: also to a process that cannot see the owner's process id.

The kernel drops the lock when the owner ends, however it ends. Process ids say nothing where two containers share a
directory and not their processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path


class LockFile:
    """A file that is locked for as long as this object is open, or its process lives."""

    def __init__(self, path: Path, *, create: bool = True) -> None:
        """Makes the file if need be (its owner's alone), unless it has to be there. Raises `BlockingIOError` if
        somebody holds it, `OSError`."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
        self._descriptor: int | None = os.open(path, flags, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise

    def is_at(self, path: Path) -> bool:
        """Whether this file is the one that has that name now. Raises `OSError`."""
        return self._descriptor is not None and os.path.samestat(os.fstat(self._descriptor), path.lstat())

    def append(self, data: bytes) -> None:
        """Adds to the content. Raises `OSError`, also if it is closed or not all of it could be written."""
        if self._descriptor is None:
            raise OSError("the file is closed")
        if os.write(self._descriptor, data) != len(data):
            raise OSError("only a part of it could be written")

    def flush(self) -> None:
        """The content is on stable storage when this returns. Raises `OSError`."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Drops the lock. May be called more than once."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def held(path: Path) -> bool:
    """Whether somebody holds the lock of a file; if there is none, or it cannot be opened, nobody does."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False
