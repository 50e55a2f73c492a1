"""The host's end of the guest's test driver `frames`: listens for its connections, makes the others, checks all.

A VM that runs on keeps its connections, so each that ends before the guest said that it would is a fault (`ends`),
unless the VM went back to an earlier moment meanwhile: then those of sockets may end (`excused`), and those of TCP have
to (`cut`), since this end has not gone back.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Protocol

from vmbus_guest.testdrivers.frames import HOST_END, Frames, WrongBytes, look_alive

PORT = 1024
"""On which the host listens."""
GUEST_PORT = 2048
_READ = 1 << 16
_AGAIN_SECONDS = 0.2
_CONNECT_SECONDS = 10.0
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: a close tells the other end nothing, and whatever it sends is refused

Accept = Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]


class Way(Protocol):
    """How to get to the guest. Both raise OSError."""

    async def listen(self, accept: Accept) -> asyncio.Server: ...

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]: ...


class Sockets:
    """By the provider `vsock`, whose socket has this path."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def listen(self, accept: Accept) -> asyncio.Server:
        """For the guest's connections."""
        return await asyncio.start_unix_server(accept, f"{self._path}_{PORT}")

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """One to the guest."""
        reader, writer = await asyncio.open_unix_connection(self._path)
        try:
            writer.write(b"CONNECT %d\n" % GUEST_PORT)
            if not (await reader.readline()).startswith(b"OK "):
                raise ConnectionRefusedError
        except BaseException:
            writer.close()
            raise
        return reader, writer


class Peer:
    """For one VM, or for all that follow one another behind one network.

    `frames` that were right, `ends` of connections that were to live on, `wrong` bytes in words.
    """

    def __init__(self, way: Way, seed: int, size: int, pairs: int = 1) -> None:
        """`seed`, `size`, `pairs`: the workload's."""
        self._way = way
        self._seed = seed
        self._size = size
        self._pairs = pairs
        self._tasks: set[asyncio.Task[Any]] = set()
        self._alive: dict[object, asyncio.StreamWriter] = {}
        self._excused: set[object] = set()
        self._excusing = False
        self.frames = 0
        self.ends = 0
        self.wrong: list[str] = []

    async def start(self) -> None:
        """Listen, and call the guest. Raises OSError."""
        self._server = await self._way.listen(self._accept)
        for _ in range(self._pairs):
            self._spawn(self._call())

    async def close(self) -> None:
        """Let go of all; no end counts any more."""
        self._excusing = True
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @contextlib.contextmanager
    def excused(self) -> Iterator[None]:
        """In the block connections may end: those that are there, and those that begin."""
        self._excused |= self._alive.keys()
        self._excusing = True
        try:
            yield
        finally:
            self._excused |= self._alive.keys()
            self._excusing = False

    def cut(self) -> None:
        """Forget all connections of TCP that are there, so that whatever comes on them is refused."""
        self._excused |= self._alive.keys()
        for writer in self._alive.values():
            end = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work, name="the other end of a connection")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._spawn(self._talk(reader, writer))

    async def _call(self) -> None:
        """Connect to the guest, again after each end, until one was the right one."""
        while True:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_CONNECT_SECONDS):
                    reader, writer = await self._way.connect()
                if await self._talk(reader, writer):
                    return
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One connection; whether it came to its right end."""
        frames = Frames(self._seed, HOST_END, self._size)
        token = object()
        self._alive[token] = writer
        end = writer.get_extra_info("socket")
        if end.family == socket.AF_INET:
            look_alive(end)
        try:
            while not frames.ended and (data := await reader.read(_READ)):
                for _ in range(frames.feed(data)):
                    self.frames += 1
                    writer.write(frames.frame())
                if frames.ended:
                    writer.write(frames.last())
                await writer.drain()
        except WrongBytes as error:
            self.wrong.append(str(error))
        except OSError:
            pass  # an end like any other
        finally:
            del self._alive[token]
            # Without a frame it was of a VM that went back, or is none to speak of: nobody has lost anything.
            if frames.received and not (frames.ended or self._excusing or token in self._excused):
                self.ends += 1
            self._excused.discard(token)
            writer.close()
        return frames.ended
