"""Where sources come: lets in only those who prove who they are, and no stranger can keep them out."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from vmbus.errors import EnvironmentProblem, UsageError, os_error
from vmbus.operations.migration import channel as channels
from vmbus.operations.migration.address import Address, TcpAddress, UnixAddress
from vmbus.operations.migration.channel import (
    MAGIC,
    STREAM_MAGIC,
    Channel,
    Ends,
    NotAuthentic,
    channel_keys,
    check_secret,
    prove_as_server,
)
from vmbus.operations.migration.tls import SHUTDOWN_TIMEOUT, Tls
from vmbus.operations.migration.tunnel import Door
from vmbus.util.listening import Listener as UnixListener

MAX_STRANGERS = 64
"""Connections that may be proving themselves at the same time. For a further one the oldest of the address that has
most of them is closed: who proves itself at once is never the oldest for long, whoever else comes and says nothing."""

_BACKLOG = 100
_REST = 1.0  # seconds, when there are no descriptors for another connection

Accepted = Callable[[Channel], Awaitable[None]]


class Listener:
    """Listens on an address and lets in only those who know the secret, and have a certificate. Make one with `listen`.

    `serve` says what is to be called with each connection that has proved itself (and has to close it); until then
    they wait. `close` ends the listening; connections that were let in live on.
    """

    def __init__(self, address: Address, secret: bytes, tls: Tls | None = None) -> None:
        self.address = address
        self.tls = tls
        self.door: Door | None = None
        """Where QEMU's stream may come in, over connections of its own; with TLS only."""
        self._secret = secret
        self._sockets: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()  # of all connections
        self._waiting: set[asyncio.Task[None]] = set()  # of those that are not in yet
        self._strangers: dict[asyncio.Task[None], str] = {}  # oldest first, with their addresses
        self._on_channel: asyncio.Future[Accepted] = asyncio.get_running_loop().create_future()
        self._unix: UnixListener | None = None
        self.refused = 0
        """Connections that did not prove themselves, or for which there was no room."""
        self.last_refusal = ""

    def serve(self, on_channel: Accepted) -> None:
        """Calls `on_channel` with every connection from now on, those that wait included."""
        if self._on_channel.done():
            raise UsageError(f"somebody serves {self.address} already")
        self._on_channel.set_result(on_channel)

    async def _start(self) -> None:
        address = self.address
        if isinstance(address, UnixAddress):
            self._unix = UnixListener(Path(address.path), backlog=_BACKLOG)
            self._sockets = [self._unix.socket]
        else:
            with os_error(f"cannot listen on {address}"):
                self._sockets = await _listening(address)
            self.address = TcpAddress(address.host, int(self._sockets[0].getsockname()[1]))
        for one in self._sockets:
            self._look_at(one)

    def _look_at(self, listening: socket.socket) -> None:
        if listening in self._sockets:
            asyncio.get_running_loop().add_reader(listening, self._knock, listening)

    def _knock(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            connection, peer = listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError:
            loop.remove_reader(listening)
            loop.call_later(_REST, self._look_at, listening)
            return
        connection.setblocking(False)
        name = f"the source {peer[0]}" if isinstance(peer, tuple) else "the source"
        task = loop.create_task(self._meet(connection, name))
        self._tasks.add(task)
        self._waiting.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _meet(self, connection: socket.socket, name: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        ends: Ends | None = None
        try:
            if len(self._strangers) >= MAX_STRANGERS:
                self._turn_one_away()
            self._strangers[task] = name
            try:
                async with asyncio.timeout(channels.HANDSHAKE_TIMEOUT):
                    ends = await self._open(connection, name)
                    found = await self._prove(ends, name)
            finally:
                self._strangers.pop(task, None)
            on_channel = await asyncio.shield(self._on_channel) if isinstance(found, Channel) else None
        except (EnvironmentProblem, TimeoutError) as error:
            self.refused += 1
            self.last_refusal = str(error) or f"{name} did not prove itself in time"
            (connection if ends is None else ends[1]).close()
            return
        except asyncio.CancelledError:  # the listener is closed, or there are too many
            if ends is not None:
                ends[1].transport.abort()
            return
        finally:
            self._waiting.discard(task)
        if isinstance(found, Door):
            await found.carry(ends)
        elif on_channel is not None:
            await on_channel(found)

    async def _open(self, connection: socket.socket, name: str) -> Ends:
        """Reader and writer of a connection: with TLS, if this is a listener for that."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        options: dict[str, Any] = {}
        if self.tls is not None:
            options = {"ssl": self.tls.context, "ssl_shutdown_timeout": SHUTDOWN_TIMEOUT}
        try:
            transport, _ = await loop.connect_accepted_socket(lambda: protocol, connection, **options)
        except BaseException as error:
            # Its transport closes it soon, unless its handshake had not begun yet.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                why = str(error) or "it hung up"
                raise NotAuthentic(f"{name} shows no certificate that counts here: {why}") from error
            raise
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def _prove(self, ends: Ends, name: str) -> Channel | Door:
        peer, binding, door = None, b"", self.door
        if self.tls is not None:
            peer = self.tls.peer(ends[1])
            binding = self.tls.binding(peer)
            name = f"{name} ({peer})"
        keys = {MAGIC: self._secret} | ({} if door is None else {STREAM_MAGIC: door.key})
        magic, words = await prove_as_server(ends, keys, name, binding)
        if magic == STREAM_MAGIC and door is not None:
            door.admit(peer, name)
            return door
        up, down = channel_keys(self._secret, words)
        return Channel(*ends, down, up, name, peer)

    def close_door(self) -> None:
        """QEMU's stream of this pass is over, or is of no use any more."""
        if self.door is not None:
            self.door.close()
            self.door = None

    def _turn_one_away(self) -> None:
        shares = Counter(self._strangers.values())
        most = max(shares, key=lambda name: shares[name])
        oldest = next(task for task, name in self._strangers.items() if name == most)
        del self._strangers[oldest]
        self.refused += 1
        self.last_refusal = f"{most} and others have {MAX_STRANGERS} connections that do not prove themselves"
        oldest.cancel()

    def close(self) -> None:
        """Stops listening. May be called more than once."""
        listening, self._sockets = self._sockets, []
        for one in listening:
            asyncio.get_running_loop().remove_reader(one)
            one.close()
        current = asyncio.current_task()
        for task in list(self._waiting):
            if task is not current:
                task.cancel()
        if self._unix is not None:
            self._unix.close()
            self._unix = None


async def _listening(address: TcpAddress) -> list[socket.socket]:
    """Sockets that listen on all that the host's name stands for. Raises `OSError`."""
    found = await asyncio.get_running_loop().getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    if address.port == 0:
        del found[1:]  # each would have a port of its own
    with contextlib.ExitStack() as undo:
        listening = []
        for family, _, _, _, place in dict.fromkeys(found):
            one = undo.enter_context(socket.create_server(place, family=family, backlog=_BACKLOG))
            one.setblocking(False)
            listening.append(one)
        undo.pop_all()
    return listening


async def listen(address: Address, secret: bytes, tls: Tls | None = None) -> Listener:
    """Listens for sources. `Listener.address` has the real port. Raises `EnvironmentProblem`."""
    check_secret(secret, tls)
    listener = Listener(address, secret, tls)
    await listener._start()
    return listener
