"""The server's end of the socket, as far as we keep it in our own hands.

The library accepts a client and reads its first message in one blocking call without a timeout, and later blocks in
the middle of a message whose rest does not come. So we accept clients ourselves, look at what has arrived without
taking it, and let the library read only what is completely there.
"""

from __future__ import annotations

import array
import ctypes
import enum
import fcntl
import os
import select
import socket
import struct
import termios
from typing import NamedTuple

from vmbus.errors import EnvironmentProblem
from vmbus.transport import bindings
from vmbus.transport.protocol import FLAG_NO_REPLY, HEADER, Command

_TYPE_MASK = 0xF

_CLOCK_MONOTONIC = 1
_TFD_FLAGS = 0o4000 | 0o2000000  # non-blocking, close-on-exec
_libc = ctypes.CDLL(None, use_errno=True)


class Waiting(enum.Enum):
    NOTHING = enum.auto()
    PARTIAL = enum.auto()
    COMPLETE = enum.auto()
    CLOSED = enum.auto()
    BROKEN = enum.auto()
    """A header that no client sends: the stream cannot be trusted any more."""


class Look(NamedTuple):
    """What `look` saw: the state of the next message, its size in bytes, and how many complete ones are known of.

    `watched`: the next message's command, if it is one of WATCHED; else 0, and none of `messages` is.
    """

    waiting: Waiting
    size: int = 0
    messages: int = 0
    watched: int = 0


WATCHED = frozenset({Command.DMA_MAP, Command.DMA_UNMAP, Command.DEVICE_FEATURE})
"""Commands that are looked into before the library gets them."""


_MOST_DESCRIPTORS = 8  # in one message, as the library has it; the system closes what is beyond
_INT = array.array("i")
_PEEK_SIZE = 2048
_PEEK_FLAGS = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
_NOTHING, _CLOSED = Look(Waiting.NOTHING), Look(Waiting.CLOSED)


def look(client: socket.socket) -> Look:
    """What waits on `client`. Takes nothing, never blocks."""
    try:
        content = client.recv(_PEEK_SIZE, _PEEK_FLAGS)
    except BlockingIOError:
        return _NOTHING
    except OSError:
        return _CLOSED
    available = len(content)
    if not available:
        return _CLOSED
    # Posted writes come in crowds: one look counts all that are complete.
    start = messages = first = watched = 0
    while available - start >= HEADER.size:
        _, command, size, flags, _ = HEADER.unpack_from(content, start)
        # Replies are read by the library while it waits for them; one that comes on its own is not a request.
        if not HEADER.size <= size <= bindings.MAX_MESSAGE or flags & _TYPE_MASK:
            return Look(Waiting.COMPLETE, first, messages) if messages else Look(Waiting.BROKEN, size)
        if command in WATCHED:
            if messages:
                break
            watched = command
        first = first or size
        if start + size > available:
            break
        start += size
        messages += 1
        if watched:
            break
    if not messages and first and bytes_waiting(client) >= first:
        messages = 1  # longer than our look, or cut short by descriptors that came along
    if messages:
        return Look(Waiting.COMPLETE, first, messages, watched)
    return _CLOSED if _hung_up(client) else Look(Waiting.PARTIAL)


_POSTED = struct.Struct("<HHIIIQII4s")  # `protocol.HEADER`, `REGION_ACCESS`, and a register's value
_REGION_WRITE = int(Command.REGION_WRITE)
_TAKE_FLAGS = int(socket.MSG_DONTWAIT)


def take_posted_writes(client: socket.socket, most: int) -> tuple[list[tuple[int, bytes]], bool]:
    """Take the 4-byte writes to BAR0 that nobody waits for an answer to, as long as they come next on `client`, at most
    `most`: (offset, value) of each. Whether anything was seen behind them.

    Doorbells are such writes. They go past the library, which takes longer for one than all else that it causes. Raises
    OSError.
    """
    try:
        content = client.recv(_PEEK_SIZE, _PEEK_FLAGS)
    except BlockingIOError:
        return [], False
    found: list[tuple[int, bytes]] = []
    end = 0
    while len(found) < most and len(content) - end >= _POSTED.size:
        _, command, size, flags, _, offset, region, count, value = _POSTED.unpack_from(content, end)
        if command != _REGION_WRITE or flags != FLAG_NO_REPLY or region != bindings.REGION_BAR0:
            break
        if size != _POSTED.size or count != 4:
            break
        found.append((offset, value))
        end += size
    if end and len(client.recv(end, _TAKE_FLAGS)) != end:
        raise OSError("what was seen on the socket could not be taken off it")
    return found, len(content) > end


def receive(client: socket.socket, size: int, flags: int = 0) -> tuple[bytes, list[int]]:
    """At most `size` bytes, and the descriptors that came along, which are the caller's to close.

    It ends where descriptors came along. (`socket.recv_fds` of Python 3.11 leaves its flags out.)
    """
    room = socket.CMSG_SPACE(_MOST_DESCRIPTORS * _INT.itemsize)
    content, ancillary, _, _ = client.recvmsg(size, room, flags | socket.MSG_CMSG_CLOEXEC)
    descriptors: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors += array.array("i", data[: len(data) - len(data) % _INT.itemsize])
    return content, descriptors


def bytes_waiting(client: socket.socket) -> int:
    """Bytes that can be read from `client` without blocking."""
    count = array.array("i", [0])
    fcntl.ioctl(client.fileno(), termios.FIONREAD, count)
    return count[0]


def _hung_up(client: socket.socket) -> bool:
    poll = select.poll()
    poll.register(client.fileno(), 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


def bound_blocking(client: socket.socket, seconds: float) -> None:
    """Let no read or write on `client` block longer than `seconds`, whoever does it (the library too)."""
    limit = struct.pack("@ll", int(seconds), int(seconds % 1 * 1_000_000))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


class Timer:
    """A descriptor that becomes readable at a point of time; for event loops that watch one descriptor."""

    class _Setting(ctypes.Structure):
        _fields_ = (
            ("interval_seconds", ctypes.c_long),
            ("interval_nanoseconds", ctypes.c_long),
            ("seconds", ctypes.c_long),
            ("nanoseconds", ctypes.c_long),
        )

    def __init__(self) -> None:
        self.fd: int = _libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_FLAGS)
        if self.fd < 0:
            raise EnvironmentProblem(f"cannot create a timer: {os.strerror(ctypes.get_errno())}")

    def set(self, seconds: float | None) -> None:
        """Fire once in `seconds` (at once if not above 0), or never; forgets an earlier firing."""
        if seconds is None:
            setting = Timer._Setting(0, 0, 0, 0)
        else:
            nanoseconds = max(int(seconds * 1e9), 1)
            setting = Timer._Setting(0, 0, nanoseconds // 1_000_000_000, nanoseconds % 1_000_000_000)
        _libc.timerfd_settime(self.fd, 0, ctypes.byref(setting), None)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
