"""What lies between the two ends of a migration: connections that are carried on, and a link between two hosts.

The processes of both VMs are this machine's own, as in any migration of an episode; what they say to each other goes
through the networks of two hosts (`vmbus.testbed`) and the link between them, which has a rate, a latency and losses,
and can be cut: source, this machine, host A, the link, host B, this machine, destination.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

from vmbus.testbed.hosts import TwoHosts

HERE, NEAR = "127.0.0.1", "127.0.0.2"
"""Where the destination is, and where the source finds the way to it, at the same ports."""

_PIECE = 1 << 18

Way = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


class Relay:
    """Connections that come to a socket go on by a way, until it is cut."""

    def __init__(self, comes: socket.socket, way: Way) -> None:
        """`comes`: listens; it is closed with the relay."""
        self._comes = comes
        self._way = way
        self._whole = asyncio.Event()
        self._whole.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._accept, sock=self._comes)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Nothing gets through any more, in either direction, and nobody is told."""
        self._whole.clear()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._whole.wait()
            there = await self._way()
            await asyncio.gather(self._carry(reader, there[1]), self._carry(there[0], writer))
        except OSError:
            pass  # nobody listens there any more: as if refused
        finally:
            writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_PIECE):
                await self._whole.wait()
                writer.write(data)
                await writer.drain()
        await self._whole.wait()
        writer.close()


@contextlib.asynccontextmanager
async def far(ports: Sequence[int], base: Path, *, rate: float, latency: float, loss: float) -> AsyncIterator[TwoHosts]:
    """Between NEAR and HERE, at each of these ports, lie two hosts with a link of this shape (see `TwoHosts.shape`).
    Their logs are in `base` meanwhile.

    Raises Forbidden where this machine does not let us make them, and EnvironmentProblem.
    """
    async with await TwoHosts.create(base=base) as hosts, contextlib.AsyncExitStack() as relays:
        await hosts.shape(rate=rate, latency=latency, loss=loss)
        for port in ports:
            await relays.enter_async_context(Relay(await hosts.b.socket(port), _from_here(port)))
            near = socket.create_server((NEAR, port))
            await relays.enter_async_context(Relay(near, _from_a(hosts, port)))
        yield hosts


def _from_here(port: int) -> Way:
    return lambda: asyncio.open_connection(HERE, port)


def _from_a(hosts: TwoHosts, port: int) -> Way:
    async def way() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        end = await hosts.a.socket()
        try:
            end.setblocking(False)
            await asyncio.get_running_loop().sock_connect(end, (hosts.b.address, port))
            return await asyncio.open_connection(sock=end)
        except BaseException:
            end.close()
            raise

    return way


def free_port() -> int:
    """A TCP port that nobody has at the moment."""
    with socket.create_server((HERE, 0)) as end:
        return int(end.getsockname()[1])
