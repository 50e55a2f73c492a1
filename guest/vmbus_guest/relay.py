"""Joins a connection that somebody has made to this guest, on standard input, with a port of the host's.

systemd starts it for a program of the guest's that knows TCP only, such as apt: `python3 -m vmbus_guest.relay PORT`.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading

HOST = 2
"""The host's number as a vsock address."""

_CHUNK = 64 << 10


def join(one: socket.socket, other: socket.socket) -> None:
    """Carry bytes both ways until both directions have ended."""
    back = threading.Thread(target=carry, args=(other, one), daemon=True)
    back.start()
    carry(one, other)
    back.join()


def carry(source: socket.socket, target: socket.socket) -> None:
    """Carry bytes one way, and its end. Where a side is gone, both directions end."""
    try:
        while data := source.recv(_CHUNK):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def main() -> None:
    """Serve one connection."""
    with socket.socket(fileno=0) as caller, socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as host:
        host.connect((HOST, int(sys.argv[1])))
        join(caller, host)


if __name__ == "__main__":
    main()
