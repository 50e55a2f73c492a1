"""Test driver `ping`: asks a host for echoes and reports which came back. No channels, no device.

The same program on both sides: busybox' ping counts replies, and this one also says how long there were none.

Parameters:

    host       whose echoes
    count      how many are sent; 0: until it is stopped
    interval   seconds between two
    size       bytes of data in each
    patience   seconds to wait for those that are missing at the end
    appear_seconds  how long the first reply may take
"""

from __future__ import annotations

import errno
import itertools
import os
import select
import socket
import struct
import time
from typing import Any

from vmbus.errors import EnvironmentProblem, UsageError, WaitTimeout
from vmbus_guest.testdrivers.context import Context

_HEADER = struct.Struct("!BBHHH")  # type, code, checksum, identifier, sequence
_REQUEST, _REPLY = 8, 0
_UNREACHABLE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENOBUFS})


def checksum(data: bytes) -> int:
    """The Internet checksum."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Pinger:
    """Echo requests to one host, each with a number of 32 bits and known data."""

    def __init__(self, host: str, size: int) -> None:
        """Raises EnvironmentProblem where raw sockets are not permitted."""
        try:
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        except OSError as error:
            raise EnvironmentProblem(f"ping needs a raw socket: {error.strerror} (CAP_NET_RAW)") from error
        self.socket.setblocking(False)
        self.host = host
        self.identifier = os.getpid() & 0xFFFF
        self.pad = bytes(index & 0xFF for index in range(max(0, size - 4)))
        self.sent: dict[int, float] = {}
        self.received: dict[int, float] = {}
        self.duplicates = self.damaged = self.unreachable = 0

    def send(self, number: int) -> None:
        body = struct.pack("!I", number) + self.pad
        head = _HEADER.pack(_REQUEST, 0, 0, self.identifier, number & 0xFFFF)
        message = _HEADER.pack(_REQUEST, 0, checksum(head + body), self.identifier, number & 0xFFFF) + body
        self.sent[number] = time.monotonic()
        try:
            self.socket.sendto(message, (self.host, 0))
        except OSError as error:
            if error.errno not in _UNREACHABLE:
                raise
            self.unreachable += 1

    def receive(self, timeout: float) -> None:
        """Take replies, waiting for the first one."""
        if not select.select([self.socket], [], [], max(0.0, timeout))[0]:
            return
        while True:
            try:
                packet, (address, _) = self.socket.recvfrom(65536)
            except BlockingIOError:
                return
            message = packet[4 * (packet[0] & 15) :]
            if len(message) < 12 or address != self.host:
                continue
            kind, _, _, identifier, _ = _HEADER.unpack_from(message)
            if kind != _REPLY or identifier != self.identifier:
                continue
            (number,) = struct.unpack_from("!I", message, 8)
            if checksum(message) or message[12:] != self.pad or number not in self.sent:
                self.damaged += 1
            elif number in self.received:
                self.duplicates += 1
            else:
                self.received[number] = time.monotonic()

    def result(self) -> dict[str, Any]:
        """What happened. `longest_gap`: most seconds without any reply."""
        trips = sorted(self.received[number] - self.sent[number] for number in self.received)
        arrivals = sorted(self.received.values())
        gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
        return {
            "sent": len(self.sent),
            "received": len(self.received),
            "lost": len(self.sent) - len(self.received),
            "duplicates": self.duplicates,
            "damaged": self.damaged,
            "unreachable": self.unreachable,
            "median_ms": round(1000 * trips[len(trips) // 2], 3) if trips else None,
            "longest_gap": round(max(gaps, default=0.0), 3),
        }


def run(context: Context) -> dict[str, Any]:
    """See the module's text."""
    get = context.parameters.get
    host = get("host", "")
    count = get("count", 10, minimum=0, maximum=1 << 31)
    interval = get("interval", 0.1, minimum=0.001, maximum=60)
    size = get("size", 56, minimum=4, maximum=60000)
    patience = get("patience", 5.0, minimum=0, maximum=60)
    appear = get("appear_seconds", 30.0, minimum=0, maximum=600)
    context.parameters.check()
    try:
        host = socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        raise UsageError(f"parameter 'host' is an IPv4 address, not '{host}'") from None
    first = Pinger(host, size)
    deadline = time.monotonic() + appear
    number = 0
    while not first.received:  # both ends may still be coming up
        if time.monotonic() > deadline or context.stop_requested:
            raise WaitTimeout(f"the first echo of {host}", appear)
        first.send(number)
        number += 1
        first.receive(0.1)
    first.socket.close()
    pinger = Pinger(host, size)
    pinger.identifier ^= 0x8000
    number = 0
    due = time.monotonic()
    while not context.stop_requested and (not count or number < count):
        now = time.monotonic()
        if now >= due:
            pinger.send(number)
            number += 1
            due = max(due + interval, now)
        pinger.receive(min(due - time.monotonic(), 0.25))
        if context.progress_due:
            context.progress(**pinger.result())
    deadline = time.monotonic() + patience
    while len(pinger.received) < len(pinger.sent) and time.monotonic() < deadline:
        pinger.receive(0.1)
    result = pinger.result()
    good = result["received"] > 0 and not result["damaged"] and not result["duplicates"]
    return {**result, "verdict": "passed" if good else "failed"}
