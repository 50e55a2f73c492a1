"""Whether a write into the host's page cache is quick enough at present to be done on the event loop.

Handing a write to a thread costs several times what the write itself takes: a copy from memory to memory. But nobody
can ask the kernel beforehand whether it will wait: most file systems refuse RWF_NOWAIT for buffered writes. So it is
kept out of the reasons why it would: whole pages alone (a part of one may have to be read first), never while a flush
runs (that writes the file system's journal), and only while the host has fewer dirty pages than it begins to write back
at, far from where it makes writers wait. For whatever is left there is the clock: after a write that took long, threads
do them for a while, and for twice as long if it happens again. (On a busy host a write also takes long when another
process got the processor meanwhile; that is seldom, and the first while is short.)
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress

LARGEST_AT_ONCE = 1 << 20
"""Bytes of one write that is done at once."""
SLOW_SECONDS = 0.005
"""A write that took longer than this was none that should have been done at once."""
FIRST_BACK_OFF = 0.05
LONGEST_BACK_OFF = 10.0
"""For so many seconds threads do the writes then, the first time and at most."""
_CALM = 10  # times a back-off without a slow write: the next one is a first one again
_PAGE = 4096
_ASK_SECONDS = 0.25  # the host's dirty pages are looked at so often, or after so many bytes
_ASK_BYTES = 64 << 20


class Prompt:
    """See the module's text; for one image. `clock` gives seconds; `room`: whether the host has few dirty pages."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, room: Callable[[], bool] | None = None) -> None:
        self.clock = clock
        self._room = room or host_has_room
        self._not_before = 0.0
        self._back_off = FIRST_BACK_OFF
        self._ask_at = 0.0
        self._left = 0  # bytes until the host is asked again

    def takes(self, offset: int, length: int) -> bool:
        """Whether a write of `length` bytes at `offset` may be done at once."""
        if (offset | length) % _PAGE or length > LARGEST_AT_ONCE:
            return False
        now = self.clock()
        if now < self._not_before:
            return False
        if now >= self._ask_at or self._left < length:
            self._ask_at = now + _ASK_SECONDS
            self._left = _ASK_BYTES
            if not self._room():
                self._not_before = self._ask_at
                return False
        self._left -= length
        return True

    def took(self, seconds: float) -> None:
        """How long it was."""
        if seconds > SLOW_SECONDS:
            now = self.clock()
            again = now < self._not_before + _CALM * self._back_off
            self._back_off = min(2 * self._back_off, LONGEST_BACK_OFF) if again else FIRST_BACK_OFF
            self._not_before = now + self._back_off


def host_has_room() -> bool:
    """Whether fewer pages of this host are dirty than it begins to write back at; False if it does not say."""
    with suppress(OSError, ValueError):
        fd = os.open("/proc/vmstat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.pread(fd, 1 << 16, 0)
        finally:
            os.close(fd)
        return _value(text, b"nr_dirty") + _value(text, b"nr_writeback") < _value(
            text, b"nr_dirty_background_threshold"
        )
    return False


def _value(text: bytes, name: bytes) -> int:
    at = text.index(b"\n" + name + b" ") + len(name) + 2
    return int(text[at : text.index(b"\n", at)])
