"""What tests run in a guest with Linux's hv_sock: `python3 vsock_guest.py WHAT ...`; answers are lines of JSON."""

from __future__ import annotations

import hashlib
import json
import select
import socket
import sys
import time
from typing import Any

HOST = 2


def new() -> socket.socket:
    return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)


def to_host(port: int) -> socket.socket:
    end = new()
    end.connect((HOST, port))
    return end


def listener(port: int) -> socket.socket:
    end = new()
    end.bind((socket.VMADDR_CID_ANY, port))
    end.listen(16)
    return end


def rest(end: socket.socket) -> bytes:
    got = bytearray()
    while data := end.recv(1 << 16):
        got += data
    return bytes(got)


def say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def connect(port: int, size: int) -> None:
    """Send so many bytes, end the sending, and then read the host's."""
    start = time.monotonic()
    with to_host(port) as end:
        connected = time.monotonic() - start
        data = hashlib.shake_256(b"guest").digest(size)
        end.sendall(data)
        end.shutdown(socket.SHUT_WR)
        got = rest(end)
    say(connected=connected, seconds=time.monotonic() - start, bytes=len(got), sum=hashlib.sha256(got).hexdigest())


def refused(port: int) -> None:
    """To a port on which nobody listens."""
    start = time.monotonic()
    try:
        with to_host(port) as end:
            got = end.recv(10)
    except OSError as error:
        say(error=str(error), seconds=time.monotonic() - start)
    else:
        say(bytes=len(got), seconds=time.monotonic() - start)


def echo(port: int, count: int) -> None:
    """Take so many connections, one after the other, and send back what comes."""
    with listener(port) as waiting:
        say(listening=port)
        total = 0
        for _ in range(count):
            end, _peer = waiting.accept()
            with end:
                while data := end.recv(1 << 16):
                    total += len(data)
                    end.sendall(data)
    say(bytes=total)


def many(port: int, count: int) -> None:
    """So many short connections to the host, which sends back what it gets."""
    right = 0
    for number in range(count):
        with to_host(port) as end:
            end.sendall(b"%d" % number)
            end.shutdown(socket.SHUT_WR)
            right += rest(end) == b"%d" % number
    say(right=right)


def hold(to: int, at: int) -> None:
    """One connection each way: send back what comes until the end, and then see that nothing can be sent."""
    with listener(at) as waiting:
        say(listening=at)
        ends = [to_host(to), waiting.accept()[0]]
    say(holding=len(ends))
    alive = list(ends)
    while alive:
        for end in select.select(alive, [], [])[0]:
            data = end.recv(1 << 16)
            try:
                end.sendall(data)
            except OSError:  # the end came while this was on its way
                data = b""
            if not data:
                alive.remove(end)
    for end in ends:
        error, deadline = "", time.monotonic() + 10
        while not error and time.monotonic() < deadline:
            try:
                end.sendall(b"x")
                time.sleep(0.01)
            except OSError as raised:
                error = type(raised).__name__
        end.close()
        say(ended=True, error=error)


if __name__ == "__main__":
    work = {"connect": connect, "refused": refused, "echo": echo, "many": many, "hold": hold}[sys.argv[1]]
    work(*map(int, sys.argv[2:]))
