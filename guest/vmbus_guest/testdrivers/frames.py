"""Test driver `frames`: connections made by each side, whose every byte is known and checked. No channels.

They are sockets of AF_VSOCK, or TCP where an address is given. Both ends send numbered frames with a checksum; this end
keeps a window of them open, and the host's end sends one for each that it gets. When a connection ends, as each of
AF_VSOCK does when its VM is restored, the next one is made, and begins at 0. How often that was is counted (`ends`):
whoever runs this knows how often it may have been.

Parameters:

    address  of the host's, IPv4; empty: AF_VSOCK
    port     of the host's, to connect to
    listen   port to listen on, to which the host connects
    pairs    connections that are made by each side
    size     most bytes of data in a frame
    window   frames that wait for one of the host's, on each connection
    pace     seconds between two frames of a connection
    seed     of the data
    end_seconds   how long the end may take after a stop
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
import zlib
from struct import Struct
from typing import Any

from vmbus.errors import VmbusError
from vmbus.wire.workload import Pattern
from vmbus_guest.testdrivers.context import Context

HOST = 2
GUEST_END, HOST_END = 0, 1
_HEAD = Struct("<IIQI")  # magic, bytes of data, number, their checksum
_FRAME, _LAST = 0x4D415246, 0x5453414C
_MOST = 65536
_CONNECT_SECONDS = 5.0
_AGAIN_SECONDS = 0.2
_NOT_SENT = frozenset(
    {errno.EAGAIN, errno.EPIPE, errno.ECONNRESET, errno.ENODEV, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}
)
"""What sending may say; reading finds the end. ENODEV: the channel is rescinded, which the socket is yet to hear."""
_LOOK_SECONDS, _LOOKS = 2, 120
"""With TCP: after so long without a word the other end is asked whether it knows this connection; so often in vain. A
guest that went back in time waits for what came already, and the other end has forgotten it."""


def look_alive(end: socket.socket) -> None:
    """Notice that the other end does not know this connection of TCP, also if nothing is sent."""
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, _LOOK_SECONDS),
        (socket.TCP_KEEPINTVL, _LOOK_SECONDS),
        (socket.TCP_KEEPCNT, _LOOKS),
    ):
        end.setsockopt(socket.IPPROTO_TCP, option, value)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


class WrongBytes(VmbusError):
    """What came is not what was sent."""


class Frames:
    """One end of one connection, without I/O: what it sends next, and a check of what it gets.

    `sent`, `received`: frames so far. `ended`: the other end has said that there are no more, and how many there were.
    """

    def __init__(self, seed: int, end: int, size: int) -> None:
        self._own, self._other = Pattern(2 * seed + end), Pattern(2 * seed + 1 - end)
        self._size = size
        self._buffer = bytearray()
        self.sent = self.received = 0
        self.ended = False

    def _length(self, number: int) -> int:
        return 1 + number * 7919 % self._size

    def frame(self) -> bytes:
        data = self._own.data(self.sent, self._length(self.sent))
        self.sent += 1
        return _HEAD.pack(_FRAME, len(data), self.sent - 1, zlib.crc32(data)) + data

    def last(self) -> bytes:
        """What says that no more will come."""
        return _HEAD.pack(_LAST, 0, self.sent, 0)

    def feed(self, data: bytes) -> int:
        """Take what came; returns how many frames are whole by now. Raises WrongBytes."""
        self._buffer += data
        whole = 0
        while len(self._buffer) >= _HEAD.size:
            magic, length, number, checksum = _HEAD.unpack_from(self._buffer)
            if self.ended or magic not in (_FRAME, _LAST) or length > _MOST or number != self.received:
                raise WrongBytes(
                    f"after {self.received} frames{', all there were,' if self.ended else ''} came the head "
                    f"{bytes(self._buffer[: _HEAD.size]).hex()}"
                )
            if magic == _LAST:
                self.ended = True
                del self._buffer[: _HEAD.size]
                continue
            if len(self._buffer) < _HEAD.size + length:
                break
            data = bytes(self._buffer[_HEAD.size : _HEAD.size + length])
            if zlib.crc32(data) != checksum or data != self._other.data(number, self._length(number)):
                raise WrongBytes(f"the data of frame {number} are not those that were sent")
            del self._buffer[: _HEAD.size + length]
            self.received += 1
            whole += 1
        if self.ended and self._buffer:
            raise WrongBytes(f"{len(self._buffer)} bytes behind the last frame")
        return whole


class _Link:
    """One connection, and those before it."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values
        self.socket: socket.socket | None = None
        self.sent = self.received = self.ends = self.refused = 0
        self.faults: list[str] = []
        self.done = False
        self.again_at = 0.0

    def begin(self, end: socket.socket) -> None:
        end.setblocking(False)
        if end.family == socket.AF_INET:
            look_alive(end)
        self.socket = end
        self._frames = Frames(self._values["seed"], GUEST_END, self._values["size"])
        self._out = bytearray()
        self._due = 0.0
        self._stopped = False

    def wants_to_send(self, now: float, stop: bool) -> bool:
        """Whether there is something to send, or will be made."""
        frames = self._frames
        if stop and not self._stopped:
            self._stopped = True
            self._out += frames.last()
        room = frames.sent - frames.received < self._values["window"]
        if room and now >= self._due and not (self._stopped or self._out):
            self._out += frames.frame()
            self.sent += 1
            self._due = now + self._values["pace"]
        return bool(self._out)

    def send(self) -> None:
        assert self.socket is not None
        try:
            del self._out[: self.socket.send(self._out)]
        except OSError as error:
            if error.errno not in _NOT_SENT:
                raise

    def receive(self) -> None:
        assert self.socket is not None
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            try:
                self.received += self._frames.feed(data)
            except WrongBytes as error:
                self.faults.append(str(error))
                self._end()
            return
        if self._stopped and self._frames.ended:
            self.done = True
        elif self._frames.received:
            self.ends += 1
        else:
            self.refused += 1  # nobody listened: a connection that never was
        self._end()

    def _end(self) -> None:
        assert self.socket is not None
        self.socket.close()
        self.socket = None
        self.again_at = time.monotonic() + _AGAIN_SECONDS


def _new(address: str) -> socket.socket:
    return socket.socket(socket.AF_INET if address else socket.AF_VSOCK, socket.SOCK_STREAM)


def _connect(address: str, port: int) -> socket.socket | None:
    end = _new(address)
    end.settimeout(_CONNECT_SECONDS)
    try:
        end.connect((address or HOST, port))
    except OSError:
        end.close()
        return None
    return end


def _listen(address: str, port: int, most: int) -> socket.socket:
    waiting = _new(address)
    waiting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    waiting.bind(("0.0.0.0" if address else socket.VMADDR_CID_ANY, port))
    waiting.listen(most)
    waiting.setblocking(False)
    return waiting


def run(context: Context) -> dict[str, Any]:
    """See the module's text."""
    get = context.parameters.get
    address = get("address", "")
    port = get("port", 1024, minimum=1, maximum=(1 << 31) - 1)
    listen = get("listen", 2048, minimum=1, maximum=(1 << 31) - 1)
    pairs = get("pairs", 1, minimum=1, maximum=64)
    values = {
        "size": get("size", 16384, minimum=1, maximum=_MOST),
        "window": get("window", 8, minimum=1, maximum=1024),
        "pace": get("pace", 0.02, minimum=0, maximum=10),
        "seed": get("seed", 1),
    }
    end_seconds = get("end_seconds", 20.0, minimum=0, maximum=600)
    context.parameters.check()
    waiting = _listen(address, listen, 4 * pairs)
    ours, theirs = [_Link(values) for _ in range(pairs)], [_Link(values) for _ in range(pairs)]
    links = (*ours, *theirs)
    deadline = None
    while not all(link.done for link in links) and not any(link.faults for link in links):
        now = time.monotonic()
        stop = context.stop_requested
        if stop and deadline is None:
            deadline = now + end_seconds
        if deadline is not None and now > deadline:
            break
        for out in ours:
            if out.socket is None and not out.done and now >= out.again_at:
                if (end := _connect(address, port)) is not None:
                    out.begin(end)
                else:
                    out.refused += 1
                    out.again_at = now + _AGAIN_SECONDS
        busy = [link for link in links if link.socket is not None]
        free = [link for link in theirs if link.socket is None and not link.done]
        readers: list[Any] = [link.socket for link in busy] + ([waiting] if free else [])
        writers: list[Any] = [link.socket for link in busy if link.wants_to_send(now, stop)]
        readable, writable, _ = select.select(readers, writers, [], max(0.005, values["pace"]))
        for link in busy:
            if link.socket in writable:
                link.send()
            if link.socket in readable:
                link.receive()
        if waiting in readable:
            with contextlib.suppress(OSError):
                free[0].begin(waiting.accept()[0])
        if context.progress_due:
            context.progress(**_counts(links))
    waiting.close()
    faults = [text for link in links for text in link.faults]
    faults += [
        f"connection {number} of those that {who} did not come to its end"
        for who, some in (("this end makes", ours), ("the host makes", theirs))
        for number, link in enumerate(some)
        if not link.done
    ]
    return {**_counts(links), "reasons": faults[:10], "verdict": "failed" if faults else "passed"}


def _counts(links: tuple[_Link, ...]) -> dict[str, Any]:
    return {
        "sent": sum(link.sent for link in links),
        "received": sum(link.received for link in links),
        "slowest": min(link.received for link in links),
        "ends": sum(link.ends for link in links),
        "refused": sum(link.refused for link in links),
        "wrong": sum(len(link.faults) for link in links),
    }
