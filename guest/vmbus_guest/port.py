"""The agent's line to the host: one virtio-serial port."""

# Imports are kept few, os instead of pathlib and subprocess: each costs boot time in an emulated guest.
# ruff: noqa: PTH112, PTH123, PTH208

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PORT_NAME = "org.vmbus.agent"

MAXIMUM_LINE = 1 << 20
"""Bytes of one line, either way."""
MAXIMUM_OUTPUT = 4 << 20
"""Bytes waiting for the host to read them; beyond that, lines are dropped."""
MAXIMUM_EVENTS = 256 << 10
"""Bytes waiting beyond which no event is added."""

_READ = 64 << 10
_GONE = (errno.EPIPE, errno.EIO, errno.ENODEV, errno.ECONNRESET)


class Port:
    """The agent's end of the line to the host: a non-blocking descriptor, lines in, lines out.

    For epoll it is edge-triggered: while nobody is at the host's end, the descriptor reports a hang-up without end.
    """

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self.connected = True
        self.dropped = 0
        self._input = bytearray()
        self._skipping = False  # the rest of a line that was too long
        self._lines: list[bytes] = []
        self._waiting = 0
        self._partial = b""

    def receive(self) -> Iterable[bytes]:
        """Read what is there. Yields whole lines; an empty line for one that was too long."""
        while True:
            try:
                data = os.read(self.descriptor, _READ)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                data = b""
            if not data:  # nobody there
                self._input.clear()
                self._skipping = False
                return
            self._input += data
            while (end := self._input.find(b"\n")) >= 0:
                line = bytes(self._input[:end])
                del self._input[: end + 1]
                if self._skipping or len(line) > MAXIMUM_LINE:
                    self._skipping = False
                    yield b"\0"
                elif line.strip():
                    yield line
            if len(self._input) > MAXIMUM_LINE:
                self._input.clear()
                self._skipping = True

    def send(self, message: dict[str, Any], *, event: bool = False) -> None:
        """Queue one line and write what the host takes."""
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        if self._waiting + len(line) > (MAXIMUM_EVENTS if event else MAXIMUM_OUTPUT):
            self.dropped += 1
            return
        self._lines.append(line)
        self._waiting += len(line)
        self.flush()

    def flush(self) -> bool:
        """Write what the host takes. True if nothing is left."""
        while self._lines or self._partial:
            if not self._partial:
                self._partial = b"".join(self._lines)
                self._lines.clear()
            try:
                written = os.write(self.descriptor, self._partial)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                return False
            self._partial = self._partial[written:]
            self._waiting -= written
        return True

    def forget(self) -> None:
        """The host is gone: what it did not read would reach its successor from the middle of a line on."""
        self._lines.clear()
        self._partial = b""
        self._waiting = 0


def find_port(name: str = PORT_NAME, *, timeout: float = 30.0, sysfs: str = "/sys", dev: str = "/dev") -> str:
    """Return the device node of the virtio-serial port with this name; the kernel learns of it a little after boot.

    Raises `TimeoutError` if it does not appear within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    root = f"{sysfs}/class/virtio-ports"
    while True:
        for node in os.listdir(root) if os.path.isdir(root) else ():
            try:
                with open(f"{root}/{node}/name", encoding="utf-8") as file:
                    if file.read().strip() == name:
                        return f"{dev}/{node}"
            except OSError:
                continue  # unnamed, or gone again
        if time.monotonic() >= deadline:
            raise TimeoutError(f"no virtio-serial port '{name}' in {root} within {timeout:g} s; does the VM have one?")
        time.sleep(0.02)
