"""QEMU's stream through the destination's one port: between a unix socket of QEMU's on each host, by TLS in between.

The destination opens a `Door` for one pass and gives out its key over the channel. At the source a `Tunnel` takes each
of QEMU's connections (the main one, and those of multifd) to the destination's port: in a connection of its own, which
begins with the proof that both sides have that key, over the certificates of both (`channel`). So memory goes to that
destination whose word the source has, for that migration, and nobody else gets as far as QEMU.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

from vmbus.errors import EnvironmentProblem, VmbusError, os_error
from vmbus.operations.migration.channel import Ends, NotAuthentic
from vmbus.operations.migration.tls import Peer
from vmbus.util.listening import Listener as UnixListener

PIECE = 256 << 10
"""Bytes that are taken from a connection at a time, and about as many wait in each."""
KEY_BYTES = 32
MOST_STREAMS = 17
"""Connections of one pass: QEMU's main one, and those of multifd."""


class _Carrying:
    """Connections that are being carried."""

    def __init__(self, most: int) -> None:
        self.most = min(most, MOST_STREAMS)
        self.taken = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def _begin(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def close(self) -> None:
        """Ends all connections. May be called more than once."""
        for task in self._tasks:
            task.cancel()


class Door(_Carrying):
    """Where QEMU's stream of one pass comes in, at the destination: from `peer` alone, to QEMU's socket at `path`."""

    def __init__(self, path: Path, peer: Peer | None, most: int) -> None:
        super().__init__(most)
        self.key = secrets.token_bytes(KEY_BYTES)
        self._path = path
        self._peer = peer

    def admit(self, peer: Peer | None, name: str) -> None:
        """Counts a connection that knows the key. Raises `NotAuthentic` for one too many, or of somebody else."""
        if peer is None or self._peer is None or peer.fingerprint != self._peer.fingerprint:
            raise NotAuthentic(f"{name} brings memory of a VM that {self._peer} sends")
        if self.taken >= self.most:
            raise NotAuthentic(f"{name} brings memory over more than {self.most} connections")
        self.taken += 1

    async def carry(self, ends: Ends) -> None:
        """Carries a connection that was let in, until it ends."""
        with contextlib.suppress(asyncio.CancelledError):
            await self._begin(self._carry(ends))

    async def _carry(self, ends: Ends) -> None:
        try:
            qemu = await asyncio.open_unix_connection(str(self._path), limit=PIECE)
        except OSError:  # it has ended, and whoever looks after it knows
            ends[1].transport.abort()
            return
        await _both_ways(qemu, ends, Rate(None))


class Tunnel(_Carrying):
    """Where QEMU's stream goes in, at the source: a unix socket, whose connections `dial` takes to the destination."""

    def __init__(
        self, path: Path, dial: Callable[[], Awaitable[Ends]], most: int, bandwidth: int | None = None
    ) -> None:
        super().__init__(most)
        self.rate = Rate(bandwidth)
        self.path = path
        self.problem: VmbusError | None = None
        """Why a connection could not be made; QEMU knows only that there was none."""
        self._dial = dial
        self._listener: UnixListener | None = None
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Listens. Raises `EnvironmentProblem`."""
        self._listener = UnixListener(self.path, backlog=self.most)
        with os_error(f"cannot listen on {self.path}"):
            self._server = await asyncio.start_unix_server(self._accept, sock=self._listener.socket, limit=PIECE)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.taken >= self.most:
            writer.transport.abort()
            return
        self.taken += 1
        self._begin(self._carry((reader, writer)))

    async def _carry(self, qemu: Ends) -> None:
        try:
            ends = await self._dial()
        except BaseException as error:
            qemu[1].transport.abort()
            if isinstance(error, OSError):
                error = EnvironmentProblem(str(error))
            if not isinstance(error, VmbusError):
                raise
            self.problem = self.problem or error
            return
        await _both_ways(qemu, ends, self.rate)

    def close(self) -> None:
        super().close()
        if self._server is not None:
            self._server.close()
        if self._listener is not None:
            self._listener.close()
        self._server = self._listener = None


class Rate:
    """How fast all connections of a tunnel together may take what QEMU sends.

    QEMU keeps to its own limit with one connection. With multifd it looks ten times a second, after the fact, and each
    connection may have sent half a megabyte more by then.
    """

    def __init__(self, bandwidth: int | None) -> None:
        """Bytes per second; None: as fast as it can be."""
        self._bandwidth = bandwidth
        self._free_at = 0.0
        self._held: dict[asyncio.TimerHandle, _Pipe] = {}

    def take(self, count: int, pipe: _Pipe) -> None:
        """So much came from a pipe's end, which has to wait if that was too fast."""
        if self._bandwidth is None:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._free_at = max(self._free_at, now) + count / self._bandwidth
        pipe.hold()

        def go_on() -> None:
            del self._held[timer]
            pipe.release()

        timer = loop.call_at(self._free_at, go_on)
        self._held[timer] = pipe

    def lift(self) -> None:
        """From now on there is no bound: the guest stands still."""
        self._bandwidth = None
        held, self._held = self._held, {}
        for timer, pipe in held.items():
            timer.cancel()
            pipe.release()


class _Pipe(asyncio.Protocol):
    """One end of a connection that is carried: what comes in goes out at the other one, no faster than that takes it.

    Without readers and writers, whose copies and wake-ups would cost a third more.
    """

    other: _Pipe

    def __init__(self, transport: asyncio.Transport, rate: Rate) -> None:
        self.transport = transport
        self.lost = asyncio.get_running_loop().create_future()
        self._rate = rate
        self._holds = 0

    def data_received(self, data: bytes) -> None:
        self.other.transport.write(data)
        self._rate.take(len(data), self)

    def hold(self) -> None:
        """Nothing more is read, until as many `release` have come as these."""
        self._holds += 1
        if self._holds == 1:
            self.transport.pause_reading()

    def release(self) -> None:
        self._holds -= 1
        if self._holds == 0:
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        self.other.hold()

    def resume_writing(self) -> None:
        self.other.release()

    def eof_received(self) -> bool:
        return False  # the connection is closed, and what waits for the other one still goes there

    def connection_lost(self, exc: Exception | None) -> None:
        self.other.transport.close()
        if not self.lost.done():
            self.lost.set_result(None)


async def _both_ways(one: Ends, other: Ends, rate: Rate) -> None:
    """`rate` is for what comes from `one`."""
    pipes = [
        _Pipe(cast(asyncio.Transport, ends[1].transport), bound) for ends, bound in ((one, rate), (other, Rate(None)))
    ]
    try:
        for pipe, opposite in zip(pipes, reversed(pipes), strict=True):
            pipe.other = opposite
            pipe.transport.set_protocol(pipe)
        for (reader, _), pipe in zip((one, other), pipes, strict=True):
            reader.feed_eof()
            pipe.data_received(await reader.read())  # what had come already
        await asyncio.wait([pipe.lost for pipe in pipes])
    finally:
        for pipe in pipes:
            if not pipe.lost.done():
                pipe.transport.abort()
