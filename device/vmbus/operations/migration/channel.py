"""The authenticated connection between source and destination: both know one secret of 32 bytes.

Opening, all integers big-endian:

    client -> server   MAGIC, version (u16), 32 random bytes
    server -> client   MAGIC, version (u16), 32 random bytes, proof
    client -> server   proof

A proof is HMAC-SHA256 with the secret over the prover's role and everything that both have said up to then, so it is
good for this connection and this role only. The server proves itself first: a client with another secret notices it
by itself and can say so. Each direction then has a key of its own, made from the secret and the same words.

A frame is its length (u32), its bytes, and HMAC-SHA256 over its number (u64, counted from 0 in each direction), its
length and its bytes. The number is not sent. So a frame that is changed, left out, repeated, moved, or sent back to
where it came from does not fit, and the connection ends. Frames are authenticated and not encrypted.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import secrets
import socket
import stat
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from vmbus.errors import EnvironmentProblem, UsageError, WaitTimeout, os_error
from vmbus.operations.migration.address import Address, TcpAddress, UnixAddress
from vmbus.util.listening import Listener as UnixListener

MAGIC = b"VMBUSMIG"
VERSION = 2
SECRET_BYTES = 32
NONCE_BYTES = 32
PROOF_BYTES = 32
MAX_FRAME = 1 << 20
"""Bytes that a frame may have."""

HANDSHAKE_TIMEOUT = 10.0
"""Seconds that a peer has to prove itself."""

MAX_STRANGERS = 64
"""Connections that may be proving themselves at the same time. For a further one the oldest of the address that has
most of them is closed: who proves itself at once is never the oldest for long, whoever else comes and says nothing."""

SEND_TIMEOUT = 30.0
"""Seconds for which a peer may take nothing of what is sent to it; then it is gone."""

_HELLO = struct.Struct(f">8sH{NONCE_BYTES}s")
_LENGTH = struct.Struct(">I")
_COUNTED = struct.Struct(">QI")


class LinkLost(EnvironmentProblem):
    """The connection to the other side of a migration is gone, or cannot be trusted any more."""


class NotAuthentic(LinkLost):
    """What came does not carry the mark of the secret: another secret, or somebody changed it on its way."""


def read_secret(path: Path) -> bytes:
    """The secret in a file: 32 bytes, or 64 hexadecimal digits.

    Raises `EnvironmentProblem` if it cannot be read, and `UsageError` if it is something else or open to others.
    """
    with os_error(f"cannot read the secret {path}"):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(descriptor).st_mode
            data = os.read(descriptor, 1024) if stat.S_ISREG(mode) else b""
        finally:
            os.close(descriptor)
    if not stat.S_ISREG(mode):
        raise UsageError(f"the secret {path} is not a plain file")
    if stat.S_IMODE(mode) & 0o077:
        raise UsageError(f"the secret {path} is open to others (mode {stat.S_IMODE(mode):04o}): chmod 600 it")
    if len(data) == SECRET_BYTES:
        return data
    with contextlib.suppress(ValueError):
        secret = bytes.fromhex(data.decode("ascii").strip())
        if len(secret) == SECRET_BYTES:
            return secret
    raise UsageError(
        f"the secret {path} must have {SECRET_BYTES} bytes or {2 * SECRET_BYTES} hexadecimal digits; "
        f"(umask 077; head -c {SECRET_BYTES} /dev/urandom >FILE) makes one"
    )


def _hmac(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"".join(parts), "sha256")


class Channel:
    """A connection whose other end has proved that it knows the secret. Made by `connect` and by `Listener`."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        send_key: bytes,
        receive_key: bytes,
        name: str,
    ) -> None:
        self.name = name
        self._reader = reader
        self._writer = writer
        self._send_key = send_key
        self._receive_key = receive_key
        self._sent = 0
        self._received = 0
        self._lost: str | None = None

    async def send(self, data: bytes, timeout: float = SEND_TIMEOUT) -> None:
        """Sends one frame. Raises `LinkLost`, also if the other side does not take it for `timeout` seconds: then the
        connection is ended. Raises `UsageError` for one that is too large."""
        if len(data) > MAX_FRAME:
            raise UsageError(f"a frame of {len(data)} bytes is too large: {MAX_FRAME} are allowed")
        mark = _hmac(self._send_key, _COUNTED.pack(self._sent, len(data)), data)
        self._sent += 1
        try:
            self._writer.write(_LENGTH.pack(len(data)) + data + mark)
            async with asyncio.timeout(timeout):
                await self._writer.drain()
        except TimeoutError:
            self.abort()
            raise LinkLost(f"{self.name} has taken nothing for {timeout:g} s of what was sent to it") from None
        except OSError as error:
            raise LinkLost(f"the connection to {self.name} broke: {error}") from error

    async def receive(self) -> bytes:
        """The next frame. Raises `LinkLost` at the end of the connection, `NotAuthentic` for a frame that is not as it
        was sent; the connection is closed then, and nothing that may have come behind it is taken any more."""
        if self._lost is not None:
            raise LinkLost(f"the connection to {self.name} has ended: {self._lost}")
        try:
            return await self._receive()
        except LinkLost as error:
            self._lost = str(error)
            self.close()
            raise

    async def _receive(self) -> bytes:
        begun = False
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            begun = True
            if length > MAX_FRAME:
                raise NotAuthentic(f"{self.name} announces a frame of {length} bytes; {MAX_FRAME} are allowed")
            data = await self._reader.readexactly(length)
            mark = await self._reader.readexactly(PROOF_BYTES)
        except asyncio.IncompleteReadError as error:
            cut = " in the middle of a frame" if begun or error.partial else ""
            raise LinkLost(f"{self.name} closed the connection{cut}") from error
        except OSError as error:
            raise LinkLost(f"the connection to {self.name} broke: {error}") from error
        expected = _hmac(self._receive_key, _COUNTED.pack(self._received, length), data)
        if not hmac.compare_digest(mark, expected):
            raise NotAuthentic(
                f"frame {self._received} from {self.name} is not authentic: "
                "it was changed, repeated or moved on its way"
            )
        self._received += 1
        return data

    @property
    def local_host(self) -> str | None:
        """Our address on this connection, if it is TCP: the other side can reach it."""
        found = self._writer.get_extra_info("sockname")
        return str(found[0]) if isinstance(found, tuple) else None

    @property
    def remote_host(self) -> str | None:
        """The other side's address on this connection, if it is TCP: we can reach it."""
        found = self._writer.get_extra_info("peername")
        return str(found[0]) if isinstance(found, tuple) else None

    def close(self) -> None:
        """Ends the connection; what was sent before still goes out."""
        self._writer.close()

    def abort(self) -> None:
        """Ends the connection at once, without sending what waits."""
        self._writer.transport.abort()


def _keys(secret: bytes, words: bytes) -> tuple[bytes, bytes]:
    """The keys from client to server, and from server to client."""
    return _hmac(secret, b"key client to server", words), _hmac(secret, b"key server to client", words)


def _check_hello(data: bytes, name: str) -> None:
    magic, version, _ = _HELLO.unpack(data)
    if magic != MAGIC:
        raise NotAuthentic(f"{name} is not a migration's other side: it says {magic!r}")
    if version != VERSION:
        raise NotAuthentic(f"{name} speaks version {version} of the migration protocol; this program speaks {VERSION}")


async def open_as_client(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes, name: str
) -> Channel:
    """Proves both sides to each other, as the side that connected. Raises `LinkLost` or `NotAuthentic`."""
    ours = _HELLO.pack(MAGIC, VERSION, secrets.token_bytes(NONCE_BYTES))
    try:
        writer.write(ours)
        await writer.drain()
        theirs = await reader.readexactly(_HELLO.size)
        _check_hello(theirs, name)
        proof = await reader.readexactly(PROOF_BYTES)
        words = ours + theirs
        if not hmac.compare_digest(proof, _hmac(secret, b"proof server", words)):
            raise NotAuthentic(f"{name} does not know our secret: both sides need the same secret file")
        writer.write(_hmac(secret, b"proof client", words))
        await writer.drain()
    except (OSError, asyncio.IncompleteReadError) as error:
        raise LinkLost(f"{name} hung up before it had proved itself ({error})") from error
    up, down = _keys(secret, words)
    return Channel(reader, writer, up, down, name)


async def open_as_server(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes, name: str
) -> Channel:
    """Proves both sides to each other, as the side that listens. Raises `LinkLost` or `NotAuthentic`."""
    try:
        theirs = await reader.readexactly(_HELLO.size)
        _check_hello(theirs, name)
        ours = _HELLO.pack(MAGIC, VERSION, secrets.token_bytes(NONCE_BYTES))
        words = theirs + ours
        writer.write(ours + _hmac(secret, b"proof server", words))
        await writer.drain()
        proof = await reader.readexactly(PROOF_BYTES)
    except (OSError, asyncio.IncompleteReadError) as error:
        raise LinkLost(f"{name} hung up before it had proved itself ({error})") from error
    if not hmac.compare_digest(proof, _hmac(secret, b"proof client", words)):
        raise NotAuthentic(f"{name} does not know our secret: both sides need the same secret file")
    up, down = _keys(secret, words)
    return Channel(reader, writer, down, up, name)


async def _open_tcp(address: TcpAddress) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As `asyncio.open_connection`, but it is `ConnectionRefusedError` only if every address of the host refuses."""
    found = await asyncio.get_running_loop().getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    other: OSError | None = None
    refused: OSError | None = None
    for *_, place in found:
        try:
            return await asyncio.open_connection(str(place[0]), int(place[1]))
        except ConnectionRefusedError as error:
            refused = error
        except OSError as error:
            other = error
    raise other or refused or OSError(f"{address.host} has no address")


async def connect(address: Address, secret: bytes, timeout: float = HANDSHAKE_TIMEOUT) -> Channel:
    """Connects to a destination and proves both sides to each other.

    Raises `ConnectionRefusedError` if nothing listens there (for a unix socket also if its file is gone),
    `WaitTimeout`, `LinkLost`, `NotAuthentic`, and `EnvironmentProblem` if the address cannot be reached.
    """
    name = f"the destination {address}"
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout):
            if isinstance(address, UnixAddress):
                reader, writer = await asyncio.open_unix_connection(address.path)
            else:
                reader, writer = await _open_tcp(address)
            return await open_as_client(reader, writer, secret, name)
    except TimeoutError:
        if writer is not None:
            writer.transport.abort()
        raise WaitTimeout(f"{name} to answer", timeout) from None
    except FileNotFoundError as error:
        raise ConnectionRefusedError(error.errno, f"nothing listens on {address}") from error
    except ConnectionRefusedError:
        raise
    except OSError as error:
        raise EnvironmentProblem(f"cannot reach {name}: {error}") from error
    except BaseException:
        if writer is not None:
            writer.transport.abort()
        raise


Accepted = Callable[[Channel], Awaitable[None]]


class Listener:
    """Listens on an address and lets in only those who know the secret. Make one with `listen`.

    `serve` says what is to be called with each connection that has proved itself (and has to close it); until then
    they wait. `close` ends the listening; connections that were let in live on.
    """

    def __init__(self, address: Address, secret: bytes) -> None:
        self.address = address
        self._secret = secret
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
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
            self._unix = UnixListener(Path(address.path))
            self._server = await asyncio.start_unix_server(self._accept, sock=self._unix.socket)
            return
        with os_error(f"cannot listen on {address}"):
            self._server = await asyncio.start_server(self._accept, address.host, address.port, reuse_address=True)
        if address.port == 0:
            # More than one socket (a name for IPv4 and IPv6) would have a port each.
            sockets: list[socket.socket] = list(self._server.sockets)
            for one in sockets[1:]:
                one.close()
            self.address = TcpAddress(address.host, int(sockets[0].getsockname()[1]))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        peer = writer.get_extra_info("peername")
        name = f"the source {peer[0]}" if isinstance(peer, tuple) else "the source"
        try:
            if len(self._strangers) >= MAX_STRANGERS:
                self._turn_one_away()
            self._strangers[task] = name
            try:
                async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                    channel = await open_as_server(reader, writer, self._secret, name)
            finally:
                self._strangers.pop(task, None)
            on_channel = await asyncio.shield(self._on_channel)
        except (EnvironmentProblem, TimeoutError) as error:
            self.refused += 1
            self.last_refusal = str(error) or f"{name} did not prove itself in time"
            writer.close()
            return
        except asyncio.CancelledError:  # the listener is closed, or there are too many
            writer.transport.abort()
            return
        finally:
            self._tasks.discard(task)
        await on_channel(channel)

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
        if self._server is None:
            return
        self._server.close()
        self._server = None
        current = asyncio.current_task()
        for task in list(self._tasks):
            if task is not current:
                task.cancel()
        if self._unix is not None:
            self._unix.close()


async def listen(address: Address, secret: bytes) -> Listener:
    """Listens for sources. `Listener.address` has the real port. Raises `EnvironmentProblem`."""
    if len(secret) != SECRET_BYTES:
        raise UsageError(f"a secret has {SECRET_BYTES} bytes, not {len(secret)}")
    listener = Listener(address, secret)
    await listener._start()
    return listener
