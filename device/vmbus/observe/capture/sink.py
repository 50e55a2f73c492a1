"""Where a capture goes: a thread that makes blocks of what the event loop hands over, and writes them.

The device must not feel it. So the loop never waits here: what it hands over is kept in memory up to a bound, beyond
which it is dropped and counted; and when the file cannot be written any more, the capture ends, and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.util.complaints import bounded_log

log = bounded_log(__name__)

QUEUE_BYTES = 32 << 20
"""Most bytes of packets that wait for the thread; a slow disk or reader costs packets beyond that."""

_ITEM_BYTES = 512  # of memory that each thing that waits takes besides what it says
_LOOK = 0.1  # seconds between looks at whether the end has come, while a reader does not read
_END_SECONDS = 5.0  # for what is left to write when a capture is stopped

Item = Callable[[], bytes]
"""What the loop hands over: makes the blocks when the thread calls it."""


def open_output(path: Path) -> int:
    """A descriptor for a capture: a new file, its owner's alone, or a FIFO of ours that somebody reads.

    Raises UsageError if there is something else at `path`, EnvironmentProblem if it cannot be made.
    """
    if not path.is_absolute():
        raise UsageError(f"a capture's file is named by an absolute path, not {str(path)!r}")
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        pass
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"cannot write a capture to {path}: {error}") from error
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        reason = "nobody reads from it" if error.errno == errno.ENXIO else error.strerror
        raise EnvironmentProblem(f"cannot write a capture to {path}: {reason}") from error
    status = os.fstat(fd)
    if not stat.S_ISFIFO(status.st_mode) or status.st_uid != os.getuid():
        os.close(fd)
        raise UsageError(f"{path} exists; a capture goes into a new file, or into a FIFO of yours")
    return fd


class Sink:
    """Writes to a descriptor, which it owns, at most `limit` bytes.

    Attributes:
        ended: why nothing more is written; empty while all is well.
        full: whether that was because the limit was reached.
        written: bytes so far.
    """

    def __init__(self, fd: int, name: str, *, limit: int, queue_bytes: int = QUEUE_BYTES) -> None:
        self.ended = ""
        self.full = False
        self.written = 0
        self._fd = fd
        self._name = name
        self._limit = limit
        self._queue_bytes = queue_bytes
        self._regular = stat.S_ISREG(os.fstat(fd).st_mode)
        self._items: deque[tuple[Item, int]] = deque()
        self._queued = 0
        self._closing = False
        self._deadline = 0.0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._thread.start()

    def put(self, item: Item, size: int, *, urgent: bool = False) -> bool:
        """Have the thread write what `item()` makes, which takes about `size` bytes of memory until then. False: there
        is no room (there is some more for what is `urgent`), or the capture has ended."""
        size += _ITEM_BYTES
        room = 2 * self._queue_bytes if urgent else self._queue_bytes
        with self._changed:
            if self._closing or self.ended or self._queued + size > room:
                return False
            self._items.append((item, size))
            self._queued += size
            self._changed.notify()
        return True

    def wait_written(self, timeout: float) -> bool:
        """Whether all that was put is written (or the capture has ended), within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queued or bool(self.ended), timeout)

    def close(self, last: Item | None = None, *, seconds: float = _END_SECONDS) -> None:
        """Write what is left, then what `last` makes, for at most about `seconds`, and end. May be repeated."""
        with self._changed:
            if not self._closing:
                self._closing = True
                self._deadline = time.monotonic() + seconds
                if last is not None and not self.ended:
                    self._items.append((last, 0))
                self._changed.notify()
        self._thread.join(seconds + 1.0)  # a disk that hangs keeps the thread, and nobody else

    # ---- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: bool(self._items) or self._closing)
                    items = list(self._items)
                    self._items.clear()
                if not items:
                    return
                for make, size in items:
                    if not self.ended:
                        self._write(make())
                    with self._changed:
                        self._queued -= size
                        self._changed.notify_all()
                if self.ended:
                    return
        except Exception as error:
            log.exception("capture %s", self._name)
            self._end(f"a defect of the capture itself: {error!r}")
        finally:
            with self._changed:
                self._items.clear()
                self._queued = 0
                self._changed.notify_all()
            with contextlib.suppress(OSError):
                os.close(self._fd)

    def _write(self, data: bytes) -> None:
        if self.written + len(data) > self._limit:
            self.full = True
            self._end(f"its limit of {self._limit} bytes is reached")
            return
        view = memoryview(data)
        try:
            while view:
                try:
                    view = view[os.write(self._fd, view) :]
                except BlockingIOError:
                    self._wait_for_reader()
            self.written += len(data)
        except OSError as error:
            if self._regular:
                # Up to here all blocks are whole: without this piece any tool reads the file.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self.written)
            gone = error.errno == errno.EPIPE
            self._end("its reader is gone" if gone else f"it cannot be written: {error.strerror}")

    def _wait_for_reader(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        while not poll.poll(_LOOK * 1000):
            if self._closing and time.monotonic() > self._deadline:
                raise OSError(errno.EAGAIN, "its reader does not read")

    def _end(self, reason: str) -> None:
        with self._changed:
            self.ended = self.ended or reason
            self._changed.notify_all()
        log.warning("the capture to %s has ended: %s; everything else goes on", self._name, reason)
