"""The two ends of a few TCP conversations, as a program for the hosts of `vmbus.testbed`. Standard library only.

peer.py serve PORT                        prints "listening", then serves for ever
peer.py trips ADDRESS PORT COUNT          prints the seconds of COUNT round trips of one byte, as JSON
peer.py send ADDRESS PORT BYTES           prints the seconds that BYTES took to arrive
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time

PATIENCE = 60.0


def answer(peer: socket.socket) -> None:
    """Echo single bytes after an "e"; after an "s", a size in a line, count so many bytes and confirm."""
    with peer, peer.makefile("rwb", buffering=0) as stream:
        if peer.recv(1) == b"e":
            while data := peer.recv(1):
                peer.sendall(data)
            return
        left = int(stream.readline())
        while left > 0 and (data := peer.recv(1 << 16)):
            left -= len(data)
        peer.sendall(b"." if left == 0 else b"!")


def serve(port: int) -> None:
    with socket.create_server(("", port)) as server:
        print("listening", flush=True)
        while True:
            peer, _ = server.accept()
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=answer, args=(peer,), daemon=True).start()


def connect(address: str, port: int) -> socket.socket:
    peer = socket.create_connection((address, port), PATIENCE)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peer


def trips(address: str, port: int, count: int) -> None:
    seconds = []
    with connect(address, port) as peer:
        peer.sendall(b"e")
        for _ in range(count):
            start = time.monotonic()
            peer.sendall(b"x")
            assert peer.recv(1) == b"x"
            seconds.append(time.monotonic() - start)
    print(json.dumps(seconds))


def send(address: str, port: int, size: int) -> None:
    with connect(address, port) as peer:
        start = time.monotonic()
        peer.sendall(b"s%d\n" % size)
        block = bytes(1 << 16)
        left = size
        while left:
            left -= peer.send(block[:left])
        assert peer.recv(1) == b"."
        print(json.dumps(time.monotonic() - start))


if __name__ == "__main__":
    work = {"serve": serve, "trips": trips, "send": send}[sys.argv[1]]
    work(*(int(one) if one.isdigit() else one for one in sys.argv[2:]))
