"""Log files of a VM that stay bounded, whatever the guest makes QEMU and the device server write into them.

Their writers only append (O_APPEND), so a file can be shortened under their hands: the beginning stays, since it says
how things were started, and the latest lines do; between them stands how much was left out. Nobody ever waits for
us, as a guest's console would for the reader of a pipe. The price: a file may pass its bound by what is written
between two looks, and what is written in the very moment of shortening, some microseconds, is lost.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

LOG_LIMIT = 1 << 20
"""Bytes at which a log file is shortened."""
LOG_HEAD = 64 << 10
"""Bytes of its beginning that stay."""
LOG_TAIL = 256 << 10
"""Bytes of its end that stay."""
LOOK_EVERY = 0.5
"""Seconds between two looks at its size."""

_MARK = re.compile(rb"\n?\[\.\.\. (\d+) bytes left out \.\.\.\]\n")


def shorten(path: Path) -> int:
    """Shorten a log file that is longer than LOG_LIMIT. Returns the bytes left out of it by now; 0 if it was not."""
    with contextlib.suppress(OSError):
        if path.stat().st_size > LOG_LIMIT:
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                return _shorten(fd)
            finally:
                os.close(fd)
    return 0


def _shorten(fd: int) -> int:
    head = os.pread(fd, LOG_HEAD, 0)
    keep = head.rfind(b"\n") + 1 or len(head)  # whole lines; the same at each time
    before = _MARK.match(os.pread(fd, 100, keep))
    start = max(os.fstat(fd).st_size - LOG_TAIL, keep)
    tail = os.pread(fd, LOG_LIMIT, start)
    os.ftruncate(fd, keep)
    # The next half line goes as well, unless lines are that long.
    drop = max(len(tail) - LOG_TAIL, 0)
    drop = tail.find(b"\n", drop, drop + LOG_HEAD) + 1 or drop
    gone = start - keep + drop
    if before is not None:
        gone += int(before[1]) - len(before[0])
    end = b"" if head[:keep].endswith(b"\n") else b"\n"
    os.write(fd, end + b"[... %d bytes left out ...]\n" % gone + tail[drop:])
    return gone
