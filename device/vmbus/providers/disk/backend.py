"""Where a disk's bytes are: a raw file or a block device.

Data moves with preadv and pwritev between the page cache and the buffers it is given, which are the guest's memory
itself. Never with O_DIRECT: the kernel would pin the guest's pages for the device's DMA, and the data of a read could
then arrive in them after the guest has taken them back. A copy by the processor goes to whatever is mapped at that
moment, see `vmbus.transport.mapping`.

All methods block, are called on any thread, several at a time, and raise OSError.
"""

import ctypes
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from vmbus.providers.disk.prompt import Prompt

_VECTOR = 1024  # IOV_MAX: buffers in one call
_ZEROES = bytes(1 << 20)

_FALLOC_KEEP_SIZE = 0x01
_FALLOC_PUNCH_HOLE = 0x02
_FALLOC_ZERO_RANGE = 0x10
_NOT_THERE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.restype = ctypes.c_int
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Movable(Protocol):
    """A packet that describes memory: see `vmbus.kmcl.Completion.move`."""

    def move(self, fd: int, offset: int, length: int, *, write: bool, flags: int = 0) -> int | None:
        """Move bytes between a file and that memory."""


class Backend(Protocol):
    """A disk's storage. Offsets and lengths in bytes, within its size."""

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill all of `views`."""

    def write(self, offset: int, views: Sequence[memoryview], *, durable: bool) -> None:
        """Write all of `views`; `durable`: return when it is on stable storage."""

    def flush(self) -> None:
        """Return when all that was written before the call is on stable storage."""

    def discard(self, offset: int, length: int) -> None:
        """Nobody wants these bytes any more: give their storage back, or do nothing."""

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool, durable: bool) -> None:
        """Make these bytes zero; `may_unmap`: their storage may be given back."""

    def close(self) -> None:
        """Use nothing any more. What is under way goes on, and holds the file (and its lock) until it has ended."""


class FileBackend:
    """A raw file or block device, on a descriptor that it takes over."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False
        self._prompt = True  # whether `read_now` may find out something
        self._nowait = True  # whether the file system may know RWF_NOWAIT for writes
        self.writes = Prompt()

    @contextmanager
    def open(self) -> Iterator[int]:
        """The descriptor, which stays this very file for as long as the block runs: numbers are used again."""
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, "the image was closed")
            self._users += 1
        try:
            yield self._fd
        finally:
            with self._lock:
                self._users -= 1
                if self._closed and not self._users:
                    os.close(self._fd)

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill all of `views`. EIO where the file ends too early: somebody has cut it."""
        pending = list(views)
        with self.open() as fd:
            while pending:
                count = os.preadv(fd, pending[:_VECTOR], offset)
                if count == 0:
                    raise OSError(errno.EIO, f"the image ends at {offset}, before the disk does")
                offset += count
                _consume(pending, count)

    def read_now(self, offset: int, views: Sequence[memoryview]) -> bool:
        """Fill all of `views`, if that needs no waiting; whether it is done. Not for several threads at a time."""
        if not self._prompt or len(views) > _VECTOR:
            return False
        try:
            return os.preadv(self._fd, views, offset, os.RWF_NOWAIT) == sum(map(len, views))
        except BlockingIOError:
            return False
        except OSError:
            self._prompt = False  # the file system cannot tell, or something is wrong: the long way says what
            return False

    def write_now(self, offset: int, views: Sequence[memoryview], length: int) -> bool:
        """Write all of `views`, `length` bytes, if that is not likely to need waiting; whether it is done. Not for
        several threads at a time. What was written of it may be written again."""
        if len(views) > _VECTOR:
            return False
        return self._written_now(offset, length, lambda flags: os.pwritev(self._fd, views, offset, flags))

    def move_now(self, memory: Movable, offset: int, length: int, *, write: bool) -> bool:
        """`read_now`, or `write_now`, of all the memory that a packet describes, without looking at it; False, and
        nothing done, also where that is not possible."""
        if write:
            move = lambda flags: memory.move(self._fd, offset, length, write=True, flags=flags)  # noqa: E731
            return self._written_now(offset, length, move)
        try:
            return self._prompt and memory.move(self._fd, offset, length, write=False, flags=os.RWF_NOWAIT) == length
        except OSError:
            return False

    def _written_now(self, offset: int, length: int, write: Callable[[int], int | None]) -> bool:
        """`write` with these flags, if it is not likely to need waiting; whether all is done."""
        writes = self.writes
        if self._closed or not writes.takes(offset, length):
            return False
        began = writes.clock()
        try:
            if self._nowait:
                try:
                    return write(os.RWF_NOWAIT) == length
                except OSError as error:
                    if error.errno != errno.EOPNOTSUPP:
                        return False
                    self._nowait = False
            return write(0) == length
        except OSError:
            return False  # the long way says what is wrong
        finally:
            writes.took(writes.clock() - began)

    def write(self, offset: int, views: Sequence[memoryview], *, durable: bool) -> None:
        """Write all of `views`."""
        pending = list(views)
        with self.open() as fd:
            while pending:
                count = os.pwritev(fd, pending[:_VECTOR], offset)
                if count == 0:
                    raise OSError(errno.EIO, f"nothing was written at {offset}")
                offset += count
                _consume(pending, count)
            if durable:
                make_durable(fd)

    def flush(self) -> None:
        """fdatasync."""
        with self.open() as fd:
            os.fdatasync(fd)

    def discard(self, offset: int, length: int) -> None:
        """Punch a hole, where the file system can."""
        with self.open() as fd:
            _allocate(fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool, durable: bool) -> None:
        """Ask the file system for zeroes; write them where it cannot."""
        mode = _FALLOC_PUNCH_HOLE if may_unmap else _FALLOC_ZERO_RANGE
        with self.open() as fd:
            if not _allocate(fd, mode | _FALLOC_KEEP_SIZE, offset, length):
                end = offset + length
                while offset < end:
                    offset += os.pwrite(fd, _ZEROES[: end - offset], offset)
            if durable:
                make_durable(fd)

    def close(self) -> None:
        """Close the descriptor once nobody uses it. Repeating it does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._prompt = False
            if not self._users:
                os.close(self._fd)


def make_durable(fd: int, sync: Callable[[int], None] | None = None) -> None:
    """fdatasync, or another `sync`. Not RWF_DSYNC: what a write finds out (no space) and what bringing it to stable
    storage finds out (earlier data is lost, and the kernel says so only once) must not be taken for each other. Raises
    EIO."""
    try:
        (sync or os.fdatasync)(fd)
    except OSError as error:
        raise OSError(errno.EIO, f"data was not brought to stable storage: {error.strerror}") from error


def _allocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """fallocate; whether the file system can do it. Raises OSError for what is not its lack of ability."""
    while _libc.fallocate(fd, mode, offset, length) != 0:
        error = ctypes.get_errno()
        if error in _NOT_THERE:
            return False
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))
    return True


def _consume(pending: list[memoryview], count: int) -> None:
    """Take `count` bytes off the front."""
    taken = 0
    while taken < len(pending) and count >= len(pending[taken]):
        count -= len(pending[taken])
        taken += 1
    del pending[:taken]
    if count:
        pending[0] = pending[0][count:]


def size_of(fd: int) -> int:
    """Bytes in a regular file or block device."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return os.lseek(fd, 0, os.SEEK_END)
    return os.fstat(fd).st_size
