"""The guest's console for any number of viewers at once. QEMU's socket has room for one: its owner, who is this.

A viewer that connects gets the latest output first. What one types, all see, as the guest echoes it. Nobody waits for a
viewer that does not read: it loses output and is told how much; nor for a guest that does not.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from vmbus.cli.console import MOST_TYPED
from vmbus.errors import os_error
from vmbus.util.listening import Listener

LATEST = 8 << 10
"""Bytes of output that a new viewer gets."""
MOST_UNREAD = 256 << 10
"""Bytes that wait for a viewer which does not read."""
MOST_VIEWERS = 16


class _Viewer:
    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._lost = 0

    def show(self, data: bytes) -> None:
        if self._writer.transport.get_write_buffer_size() + len(data) > MOST_UNREAD:
            self._lost += len(data)
            return
        if self._lost:
            self._writer.write(b"\r\n[... %d bytes left out ...]\r\n" % self._lost)
            self._lost = 0
        self._writer.write(data)

    def close(self) -> None:
        self._writer.close()


class Viewers:
    """Stands between QEMU's `console` socket and the viewers, who connect to `path`."""

    def __init__(self, console: Path, path: Path) -> None:
        self._console = console
        self._path = path
        self._guest: asyncio.StreamWriter | None = None
        self._viewers: set[_Viewer] = set()
        self._latest = bytearray()

    async def serve(self) -> None:
        """Until QEMU ends, or this is cancelled. Raises `EnvironmentProblem` if QEMU's socket cannot be reached, or
        there can be none for viewers."""
        with os_error(f"cannot connect to the console {self._console}"):
            reader, self._guest = await asyncio.open_unix_connection(str(self._console))
        listener = Listener(self._path)
        try:
            server = await asyncio.start_unix_server(self._view, sock=listener.socket)
            with contextlib.suppress(OSError):
                while data := await reader.read(65536):
                    self._latest += data
                    del self._latest[:-LATEST]
                    for viewer in self._viewers:
                        viewer.show(data)
            server.close()
        finally:
            listener.close()
            self._guest.close()
            for viewer in self._viewers:
                viewer.close()

    async def _view(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        viewer = _Viewer(writer)
        try:
            if len(self._viewers) >= MOST_VIEWERS:
                writer.write(b"[%d others look at this console, which are as many as can]\r\n" % MOST_VIEWERS)
                return
            viewer.show(bytes(self._latest))
            self._viewers.add(viewer)
            while data := await reader.read(4096):
                guest = self._guest
                if guest is not None and guest.transport.get_write_buffer_size() < MOST_TYPED:
                    guest.write(data)
        except OSError:
            pass
        finally:
            self._viewers.discard(viewer)
            viewer.close()
