"""Test driver `transfer`: TCP streams in both directions, whose bytes are known, so that each is checked. No channels.

One end serves, the other connects; the same program is both. Every connection has a number. Whoever sends ends with a
half-closed connection; who gets that says how many bytes came and their CRC, for comparing both ends' results.

Parameters:

    mode        "serve" or "connect"
    host        which address to connect to; serve: to listen on
    port        and which port
    streams     how many connections
    send        whether the connecting end sends (it says so)
    receive     whether the serving end sends (the connecting end says so)
    bytes       in each direction of each stream; 0: until it is stopped (the connecting end says)
    stall_seconds   without a byte on a stream it counts as dropped
    appear_seconds  how long connecting, or the first connection, may take
"""

from __future__ import annotations

import contextlib
import errno
import random
import select
import socket
import struct
import time
from typing import Any
from zlib import crc32

from vmbus.errors import UsageError, WaitTimeout
from vmbus_guest.testdrivers.context import Context

_HELLO = struct.Struct("<IIIIQ")  # magic, number, whether each side sends, bytes
_MAGIC = 0x4E455421
_PERIOD = 1 << 20
_CHUNK = 256 << 10
_TOTAL_RETRANSMISSIONS = 100  # offset in struct tcp_info
_NOT_YET = frozenset(
    {errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ETIMEDOUT, errno.ENETDOWN, errno.EADDRNOTAVAIL}
)


def pattern(number: int, side: int) -> memoryview:
    """What a side sends on a stream, again and again; with its beginning once more at the end, for long slices."""
    period = random.Random(2 * number + side).randbytes(_PERIOD)
    return memoryview(period + period[:_CHUNK])


class Stream:
    """One connection. `side`: 0 at the connecting end, 1 at the serving one."""

    def __init__(self, peer: socket.socket, number: int, side: int, sends: bool, receives: bool, count: int) -> None:
        self.socket = peer
        self.number = number
        self.count = count
        self.sends = sends
        self.receives = receives
        self.sent = self.received = 0
        self.sent_crc = self.received_crc = 0
        self.wrong_at = -1
        self.trouble = ""
        self.ended = False
        self.retransmissions = 0
        self.moved_at = time.monotonic()
        self.longest_gap = 0.0
        self._out = pattern(number, side) if sends else memoryview(b"")
        self._in = pattern(number, 1 - side) if receives else memoryview(b"")
        self._heard_end = self._said_end = False
        peer.setblocking(False)

    def fileno(self) -> int:
        return self.socket.fileno()

    @property
    def wants_to_send(self) -> bool:
        return self.sends and not self._said_end

    def stop_sending(self) -> None:
        """No more bytes from this side."""
        if not self._said_end:
            self._said_end = True
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
            self._look_ended()

    def send(self) -> None:
        """As much as is taken now, once."""
        at = self.sent % _PERIOD
        size = min(_CHUNK, self.count - self.sent) if self.count else _CHUNK
        try:
            count = self.socket.send(self._out[at : at + size])
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        self.sent_crc = crc32(self._out[at : at + count], self.sent_crc)
        self.sent += count
        self._moved()
        if self.count and self.sent == self.count:
            self.stop_sending()

    def receive(self) -> None:
        try:
            data = self.socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        self._moved()
        if not data:
            self._heard_end = True
            if not self.count or not self.sends:
                self.stop_sending()
            self._look_ended()
            return
        at = self.received % _PERIOD
        if self.wrong_at < 0 and (not self.receives or data != self._in[at : at + len(data)]):
            self.wrong_at = self.received
        self.received_crc = crc32(data, self.received_crc)
        self.received += len(data)

    def check(self, stall_seconds: float) -> None:
        """Give up a stream on which nothing moves."""
        if not self.ended and time.monotonic() - self.moved_at > stall_seconds:
            self.trouble = f"nothing moved for {stall_seconds:g} s"
            self._end()

    def _moved(self) -> None:
        now = time.monotonic()
        self.longest_gap = max(self.longest_gap, now - self.moved_at)
        self.moved_at = now

    def _fail(self, error: OSError) -> None:
        self.trouble = f"the connection was dropped: {error.strerror or error}"
        self._end()

    def _look_ended(self) -> None:
        if self._heard_end and self._said_end:
            self._end()

    def _end(self) -> None:
        if self.ended:
            return
        self.ended = True
        with contextlib.suppress(OSError):
            info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            (self.retransmissions,) = struct.unpack_from("I", info, _TOTAL_RETRANSMISSIONS)
        self.socket.close()

    def result(self) -> dict[str, Any]:
        """What went through, and what of it was wrong."""
        return {
            "stream": self.number,
            "sent": self.sent,
            "sent_crc": self.sent_crc,
            "received": self.received,
            "received_crc": self.received_crc,
            "wrong_at": self.wrong_at,
            "retransmissions": self.retransmissions,
            "longest_gap": round(self.longest_gap, 3),
            "trouble": self.trouble,
        }

    @property
    def good(self) -> bool:
        return self.ended and not self.trouble and self.wrong_at < 0


def _connect(address: tuple[str, int], number: int, hello: bytes, context: Context, deadline: float) -> socket.socket:
    while True:
        peer = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            peer.settimeout(2.0)
            peer.connect(address)
            peer.sendall(hello)
            return peer
        except (TimeoutError, OSError) as error:
            peer.close()
            late = time.monotonic() > deadline or context.stop_requested
            if late or not (isinstance(error, TimeoutError) or error.errno in _NOT_YET):
                raise WaitTimeout(f"stream {number} to {address[0]}:{address[1]} to connect: {error}", 0.0) from error
            time.sleep(0.1)


def _accept(listener: socket.socket) -> Stream | None:
    peer, _ = listener.accept()
    peer.settimeout(10.0)
    hello = b""
    while len(hello) < _HELLO.size:
        data = peer.recv(_HELLO.size - len(hello))
        if not data:
            peer.close()
            return None
        hello += data
    magic, number, theirs, ours, count = _HELLO.unpack(hello)
    if magic != _MAGIC:
        peer.close()
        return None
    return Stream(peer, number, 1, bool(ours), bool(theirs), count)


def run(context: Context) -> dict[str, Any]:
    """See the module's text."""
    get = context.parameters.get
    mode = get("mode", "serve")
    host = get("host", "0.0.0.0")
    port = get("port", 5001, minimum=1, maximum=65535)
    wanted = get("streams", 4, minimum=1, maximum=64)
    send, receive = get("send", True), get("receive", True)
    count = get("bytes", 0, minimum=0)
    stall = get("stall_seconds", 60.0, minimum=0.1)
    appear = get("appear_seconds", 30.0, minimum=0)
    context.parameters.check()
    if mode not in ("serve", "connect"):
        raise UsageError(f"parameter 'mode' is 'serve' or 'connect', not '{mode}'")
    streams: list[Stream] = []
    listener: socket.socket | None = None
    deadline = time.monotonic() + appear
    if mode == "connect":
        for number in range(wanted):
            hello = _HELLO.pack(_MAGIC, number, send, receive, count)
            peer = _connect((host, port), number, hello, context, deadline)
            streams.append(Stream(peer, number, 0, send, receive, count))
            if not send:
                streams[-1].stop_sending()
    else:
        listener = socket.create_server((host, port), backlog=wanted)
    started = time.monotonic()
    try:
        while listener is not None or not all(stream.ended for stream in streams):
            living = [stream for stream in streams if not stream.ended]
            if context.stop_requested:
                for stream in living:
                    stream.stop_sending()
                if listener is not None:
                    listener.close()
                    listener = None
                living = [stream for stream in living if not stream.ended]
            readers: list[Any] = [*living, *([listener] if listener is not None else [])]
            writers = [stream for stream in living if stream.wants_to_send]
            readable, writable, _ = select.select(readers, writers, [], 0.25)
            for stream in readable:
                if isinstance(stream, Stream):
                    stream.receive()
                    continue
                assert listener is not None
                accepted = _accept(listener)
                if accepted is not None:
                    if not streams:
                        started = time.monotonic()
                    streams.append(accepted)
                    if not accepted.sends:
                        accepted.stop_sending()
                if len(streams) == wanted:
                    listener.close()
                    listener = None
            for stream in writable:
                if not stream.ended:
                    stream.send()
            for stream in living:
                stream.check(stall)
            if listener is not None and not streams and time.monotonic() > deadline:
                raise WaitTimeout("the first connection", appear)
            if context.progress_due:
                context.progress(**_counts(streams))
    finally:
        if listener is not None:
            listener.close()
    seconds = time.monotonic() - started
    good = len(streams) == wanted and all(stream.good for stream in streams)
    return {
        **_counts(streams),
        "seconds": round(seconds, 3),
        "results": [stream.result() for stream in sorted(streams, key=lambda stream: stream.number)],
        "verdict": "passed" if good else "failed",
    }


def _counts(streams: list[Stream]) -> dict[str, Any]:
    return {
        "streams": len(streams),
        "sent": sum(stream.sent for stream in streams),
        "received": sum(stream.received for stream in streams),
        "slowest": min((stream.sent + stream.received for stream in streams), default=0),
        "wrong": sum(stream.wrong_at >= 0 for stream in streams),
        "dropped": [f"{stream.number}: {stream.trouble}" for stream in streams if stream.trouble],
        "retransmissions": sum(stream.retransmissions for stream in streams),
        "longest_gap": round(max((stream.longest_gap for stream in streams), default=0.0), 3),
    }
