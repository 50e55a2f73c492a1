"""The authenticated connection between source and destination: both know one secret of 32 bytes.

Opening, all integers big-endian:

    client -> server   MAGIC, version (u16), 32 random bytes
    server -> client   MAGIC, version (u16), 32 random bytes, proof
    client -> server   proof

A proof is HMAC-SHA256 with the secret over the prover's role and everything that both have said up to then, so it is
good for this connection and this role only. The server proves itself first: a client with another secret notices it
by itself and can say so. Each direction then has a key of its own, made from the secret and the same words.

With TLS all of this is inside of it, and the proofs are also over the certificates of both sides: somebody between them
with a certificate of his own passes nothing on. Then the secret may be `NO_SECRET`. QEMU's connections come to the same
port, with STREAM_MAGIC and, in the secret's place, a key that the destination has just given out over the channel for
this one pass (see `tunnel`); what follows their opening is QEMU's.

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
import ssl
import stat
import struct
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vmbus.errors import EnvironmentProblem, UsageError, WaitTimeout, os_error
from vmbus.operations.migration.address import Address, TcpAddress, UnixAddress
from vmbus.operations.migration.tls import SHUTDOWN_TIMEOUT, Peer, Tls

MAGIC = b"VMBUSMIG"
STREAM_MAGIC = b"VMBUSRAM"
VERSION = 2
SECRET_BYTES = 32
NO_SECRET = b"certificates say who may come".ljust(SECRET_BYTES)
"""Where certificates say who may come, and nothing else has to."""
NONCE_BYTES = 32
PROOF_BYTES = 32
MAX_FRAME = 1 << 20
"""Bytes that a frame may have."""

HANDSHAKE_TIMEOUT = 10.0
"""Seconds that a peer has to prove itself."""

SEND_TIMEOUT = 30.0
"""Seconds for which a peer may take nothing of what is sent to it; then it is gone."""

_HELLO = struct.Struct(f">8sH{NONCE_BYTES}s")
_LENGTH = struct.Struct(">I")
_COUNTED = struct.Struct(">QI")
_UNKNOWN = {
    MAGIC: "does not know our secret: both sides need the same secret file",
    STREAM_MAGIC: "does not know this migration: somebody is between us",
}

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
T = TypeVar("T")


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
    """A connection whose other end has proved that it knows the secret. Made by `connect` and by `listener`."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        send_key: bytes,
        receive_key: bytes,
        name: str,
        peer: Peer | None = None,
    ) -> None:
        self.name = name
        self.peer = peer
        """Whose certificate the other side has shown; None without TLS."""
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


def channel_keys(secret: bytes, words: bytes) -> tuple[bytes, bytes]:
    """The keys from client to server, and from server to client."""
    return _hmac(secret, b"key client to server", words), _hmac(secret, b"key server to client", words)


def _check_hello(data: bytes, name: str, *expected: bytes) -> bytes:
    magic, version, _ = _HELLO.unpack(data)
    if magic == STREAM_MAGIC and magic not in expected:
        raise NotAuthentic(f"{name} brings memory, and no migration waits for it here")
    if magic not in expected:
        raise NotAuthentic(f"{name} is not a migration's other side: it says {magic!r}")
    if version != VERSION:
        raise NotAuthentic(f"{name} speaks version {version} of the migration protocol; this program speaks {VERSION}")
    return bytes(magic)


async def prove_as_client(ends: Ends, secret: bytes, name: str, binding: bytes = b"", magic: bytes = MAGIC) -> bytes:
    """Proves both sides to each other, as the side that connected; the words said. Raises `LinkLost`, `NotAuthentic`.

    `binding` is what both sides know of the connection that somebody between them would not have.
    """
    reader, writer = ends
    ours = _HELLO.pack(magic, VERSION, secrets.token_bytes(NONCE_BYTES))
    try:
        writer.write(ours)
        await writer.drain()
        theirs = await reader.readexactly(_HELLO.size)
        _check_hello(theirs, name, magic)
        proof = await reader.readexactly(PROOF_BYTES)
        words = ours + theirs + binding
        if not hmac.compare_digest(proof, _hmac(secret, b"proof server", words)):
            raise NotAuthentic(f"{name} {_UNKNOWN[magic]}")
        writer.write(_hmac(secret, b"proof client", words))
        await writer.drain()
    except (OSError, asyncio.IncompleteReadError) as error:
        raise LinkLost(f"{name} hung up before it had proved itself ({error})") from error
    return words


async def prove_as_server(
    ends: Ends, keys: Mapping[bytes, bytes], name: str, binding: bytes = b""
) -> tuple[bytes, bytes]:
    """The same as the side that listens. `keys`: the secret for each magic that the client may say; which one it said,
    and the words."""
    reader, writer = ends
    try:
        theirs = await reader.readexactly(_HELLO.size)
        magic = _check_hello(theirs, name, *keys)
        ours = _HELLO.pack(magic, VERSION, secrets.token_bytes(NONCE_BYTES))
        words = theirs + ours + binding
        writer.write(ours + _hmac(keys[magic], b"proof server", words))
        await writer.drain()
        proof = await reader.readexactly(PROOF_BYTES)
    except (OSError, asyncio.IncompleteReadError) as error:
        raise LinkLost(f"{name} hung up before it had proved itself ({error})") from error
    if not hmac.compare_digest(proof, _hmac(keys[magic], b"proof client", words)):
        raise NotAuthentic(f"{name} {_UNKNOWN[magic]}")
    return magic, words


async def _open_tcp(address: TcpAddress, **options: Any) -> Ends:
    """As `asyncio.open_connection`, but it is `ConnectionRefusedError` only if every address of the host refuses."""
    found = await asyncio.get_running_loop().getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    other: OSError | None = None
    refused: OSError | None = None
    for *_, place in found:
        try:
            return await asyncio.open_connection(str(place[0]), int(place[1]), **options)
        except ConnectionRefusedError as error:
            refused = error
        except OSError as error:
            other = error
    raise other or refused or OSError(f"{address.host} has no address")


async def _open(address: Address, name: str, tls: Tls | None) -> Ends:
    options: dict[str, Any] = {}
    if tls is not None:
        host = tls.name or (address.host if isinstance(address, TcpAddress) else None)
        if host is None:
            raise UsageError(f"{address} has no host's name for the certificate there to be of: --tls-name says it")
        options = {"ssl": tls.context, "server_hostname": host, "ssl_shutdown_timeout": SHUTDOWN_TIMEOUT}
    try:
        if isinstance(address, UnixAddress):
            return await asyncio.open_unix_connection(address.path, **options)
        return await _open_tcp(address, **options)
    except ssl.SSLCertVerificationError as error:
        raise NotAuthentic(f"{name} shows a certificate that does not count: {error.verify_message}") from error
    except (ssl.SSLError, ConnectionResetError, ConnectionAbortedError) as error:
        if tls is None:
            raise
        why = f" ({error})" if str(error) else ""
        raise LinkLost(f"{name} hung up instead of showing a certificate{why}: does it use --tls?") from error


async def connect(
    address: Address, secret: bytes, timeout: float = HANDSHAKE_TIMEOUT, tls: Tls | None = None
) -> Channel:
    """Connects to a destination and proves both sides to each other.

    Raises `ConnectionRefusedError` if nothing listens there (for a unix socket also if its file is gone),
    `WaitTimeout`, `LinkLost`, `NotAuthentic`, and `EnvironmentProblem` if the address cannot be reached.
    """
    check_secret(secret, tls)
    name = f"the destination {address}"

    async def prove(ends: Ends, peer: Peer | None, binding: bytes) -> Channel:
        words = await prove_as_client(ends, secret, name, binding)
        up, down = channel_keys(secret, words)
        return Channel(*ends, up, down, name, peer)

    return await _connect(address, name, tls, timeout, prove)


async def connect_stream(address: Address, key: bytes, tls: Tls, destination: Peer) -> Ends:
    """A connection for QEMU's stream to the destination that has given out `key`, and that is `destination`. Raises as
    `connect`."""
    name = f"the destination {address}"

    async def prove(ends: Ends, peer: Peer | None, binding: bytes) -> Ends:
        if peer is None or peer.fingerprint != destination.fingerprint:
            raise NotAuthentic(f"{name} is {peer}, and this migration's is {destination}: somebody is between them")
        await prove_as_client(ends, key, name, binding, STREAM_MAGIC)
        return ends

    return await _connect(address, name, tls, HANDSHAKE_TIMEOUT, prove)


async def _connect(
    address: Address,
    name: str,
    tls: Tls | None,
    timeout: float,
    prove: Callable[[Ends, Peer | None, bytes], Awaitable[T]],
) -> T:
    ends: Ends | None = None
    try:
        async with asyncio.timeout(timeout):
            ends = await _open(address, name, tls)
            peer = None if tls is None else tls.peer(ends[1])
            return await prove(ends, peer, b"" if tls is None or peer is None else tls.binding(peer))
    except BaseException as error:
        if ends is not None:
            ends[1].transport.abort()
        if isinstance(error, TimeoutError):
            raise WaitTimeout(f"{name} to answer", timeout) from None
        if isinstance(error, FileNotFoundError):
            raise ConnectionRefusedError(error.errno, f"nothing listens on {address}") from error
        if isinstance(error, OSError) and not isinstance(error, ConnectionRefusedError):
            raise EnvironmentProblem(f"cannot reach {name}: {error}") from error
        raise


def check_secret(secret: bytes, tls: Tls | None) -> None:
    """Raises `UsageError` for one that is none."""
    if len(secret) != SECRET_BYTES:
        raise UsageError(f"a secret has {SECRET_BYTES} bytes, not {len(secret)}")
    if secret == NO_SECRET and tls is None:
        raise UsageError("a migration needs a secret that both sides know, or certificates")
