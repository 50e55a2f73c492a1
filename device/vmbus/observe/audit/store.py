"""Where a record is kept."""

from __future__ import annotations

import errno
import os

HOST_LIMIT = 256 << 20
"""Bytes of a server's record beyond which it gets brief; see docs/audit.md for what is lost then."""
GUEST_LIMIT = 4 << 20
"""The same for a process in the guest, whose record lies in guest memory."""
GUEST_TOTAL = 24 << 20
"""Bytes of all records in one guest beyond which further ones are brief."""


def largest(limit: int) -> int:
    """Bytes at which a record ends for good, brief as it is: nobody may fill the disk with it."""
    return max(4 * limit, 16 << 20)


class FileStore:
    """A new file, its owner's alone, made when there is something to write. Gets brief beyond `limit` bytes, and takes
    nothing any more at `largest(limit)`."""

    def __init__(self, path: str | os.PathLike[str], *, limit: int = HOST_LIMIT) -> None:
        self.path = os.fspath(path)
        self.size = 0
        self._limit = limit
        self._descriptor = -1

    def write(self, data: bytes) -> bool:
        """See `vmbus.observe.audit.recorder.Store`."""
        if self.size + len(data) > largest(self._limit):
            raise OSError(errno.EFBIG, f"it has reached {largest(self._limit)} bytes")
        if self._descriptor < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._descriptor = os.open(self.path, flags, 0o600)
        view = memoryview(data)
        while view:
            written = os.write(self._descriptor, view)
            view = view[written:]
        self.size += len(data)
        return self.size < self._limit

    def sync(self) -> None:
        """See `vmbus.observe.audit.recorder.Store`."""
        if self._descriptor >= 0:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """See `vmbus.observe.audit.recorder.Store`."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class MemoryStore:
    """Kept in `data`: for tests and for looking at a record of one's own."""

    def __init__(self, *, limit: int = HOST_LIMIT) -> None:
        self.data = bytearray()
        self._limit = limit

    def write(self, data: bytes) -> bool:
        """See `vmbus.observe.audit.recorder.Store`."""
        self.data += data
        return len(self.data) < self._limit

    def sync(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""
