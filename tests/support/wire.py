"""Somebody on the wire between two hosts, who passes everything on, and looks whether a text is in it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from vmbus.operations.migration.address import TcpAddress

OUTSIDE = "127.0.0.2"
"""The address under which a destination at 127.0.0.1 is reached through somebody in the middle."""


class Wire:
    """Listens at `OUTSIDE` and passes on to the same port of 127.0.0.1, or to where `way` says for each connection."""

    def __init__(self, marker: bytes, way: list[int] | None = None) -> None:
        self.marker = marker
        self.way = way
        """Ports for the connections in their order; the last one for all that follow."""
        self.seen = 0
        """How often the marker was on the wire."""
        self.bytes = 0
        self.recorded: list[bytes] = []
        """What each connection's client has sent, with `record`."""
        self.record = False
        self.connections = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def on(self, *ports: int) -> AsyncIterator[TcpAddress]:
        """The first port's address outside."""
        servers = [await asyncio.start_server(self._accepting(port), OUTSIDE, port) for port in ports]
        try:
            yield TcpAddress(OUTSIDE, int(servers[0].sockets[0].getsockname()[1]))
        finally:
            for server in servers:
                server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accepting(self, port: int):  # type: ignore[no-untyped-def]
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            to = port if self.way is None else self.way[min(self.connections, len(self.way) - 1)]
            self.connections += 1
            self.recorded.append(b"")
            number = len(self.recorded) - 1
            up_reader, up_writer = None, None
            try:
                up_reader, up_writer = await asyncio.open_connection("127.0.0.1", to)
                await asyncio.gather(self._pass(reader, up_writer, number), self._pass(up_reader, writer, None))
            except (OSError, asyncio.CancelledError):
                pass
            finally:
                self._tasks.discard(task)
                writer.transport.abort()
                if up_writer is not None:
                    up_writer.transport.abort()

        return accept

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int | None) -> None:
        tail = b""
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 18):
                self.bytes += len(data)
                if self.record and number is not None:
                    self.recorded[number] += data
                text = tail + data
                self.seen += text.count(self.marker)
                tail = text[-len(self.marker) + 1 :]
                writer.write(data)
                await writer.drain()
        writer.close()
