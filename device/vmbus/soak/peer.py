"""The host's end of the guest's workload `vsock`: listens for its connection, makes the other one, checks both.

A VM that runs on keeps its connections, so each that ends before the guest said that it would is a fault (`ends`),
unless the VM went back to a checkpoint meanwhile (`excused`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any

from vmbus_guest.testdrivers.vsock import HOST_END, Frames, WrongBytes

PORT = 1024
"""On which the host listens."""
GUEST_PORT = 2048
_READ = 1 << 16
_AGAIN_SECONDS = 0.2


class Peer:
    """For one VM, as long as it is there.

    `frames` that were right, `ends` of connections that were to live on, `wrong` bytes in words.
    """

    def __init__(self, path: str, seed: int, size: int) -> None:
        """`path`: of the provider's socket. `seed`, `size`: the workload's."""
        self._path = path
        self._seed = seed
        self._size = size
        self._tasks: set[asyncio.Task[Any]] = set()
        self._alive: set[object] = set()
        self._excused: set[object] = set()
        self._excusing = False
        self._called = False
        self.frames = 0
        self.ends = 0
        self.wrong: list[str] = []

    async def start(self) -> None:
        """Listen, and call the guest. Raises OSError."""
        self._server = await asyncio.start_unix_server(self._accept, f"{self._path}_{PORT}")
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
        self._excused |= self._alive
        self._excusing = True
        try:
            yield
        finally:
            self._excused |= self._alive
            self._excusing = False

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work, name="the other end of a connection")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._spawn(self._talk(reader, writer))

    async def _call(self) -> None:
        """Connect to the guest, again after each end, until one was the right one."""
        while not self._called:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_unix_connection(self._path)
                try:
                    writer.write(b"CONNECT %d\n" % GUEST_PORT)
                    answer = await reader.readline()
                    if answer.startswith(b"OK "):
                        self._called = await self._talk(reader, writer)
                finally:
                    writer.close()
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One connection; whether it came to its right end."""
        frames = Frames(self._seed, HOST_END, self._size)
        token = object()
        self._alive.add(token)
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
            self._alive.discard(token)
            if not (frames.ended or self._excusing or token in self._excused):
                self.ends += 1
            self._excused.discard(token)
            writer.close()
        return frames.ended
