"""A vfio-user client on the host: what QEMU is to the device server, for the loopback harness and its tests.

Requests are synchronous. The server's own commands (DMA_READ, DMA_WRITE) are answered while a request waits for its
reply, by `serve` and, in the background, by `serving`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmbus.errors import PeerError, UsageError, VmbusError, WaitTimeout, os_error
from vmbus.transport import protocol
from vmbus.transport.protocol import Command, DeviceState, Feature, Message

_MAX_MESSAGE = (1 << 20) + 4096
_MAX_FDS = 16
# Larger writes arrive in pieces when the socket's buffer is full, and the library reads each body only once.
LONGEST_REGION_WRITE = 65536
_NAMES = {int(command): command.name for command in Command}


class RemoteError(VmbusError):
    """The server refused a request; `errno` is its own."""

    def __init__(self, command: int, errno: int) -> None:
        name = _NAMES.get(command, f"command {command}")
        super().__init__(f"the vfio-user server refused {name}: {os.strerror(errno)}")
        self.command = command
        self.errno = errno


class Disconnected(VmbusError):
    """The server closed the connection."""


@dataclass(frozen=True)
class RegionInfo:
    """What the server says about a region; `size` in bytes, 0 if there is none."""

    index: int
    flags: int
    size: int


@dataclass(frozen=True)
class DmaAccess:
    """A DMA_READ or DMA_WRITE that the server has sent."""

    command: Command
    iova: int
    size: int


@dataclass
class _Memory:
    iova: int
    size: int
    backing: int  # descriptor that DMA messages are served from
    offset: int
    flags: int


@dataclass
class VfioUserClient:
    """A connection to the device server at `path`; every wait ends after `timeout` seconds with WaitTimeout.

    Raises EnvironmentProblem if nobody listens, Disconnected or RemoteError if the handshake fails.
    """

    path: Path
    timeout: float = 10.0
    max_data_transfer: int = 1 << 20
    capabilities: dict[str, Any] = field(default_factory=dict)
    """What the server announced."""
    minor: int = 0
    dma_accesses: list[DmaAccess] = field(default_factory=list)
    """Everything the server has asked for, in order."""
    refuse_dma: int = 0
    """If set, the errno that the server's DMA messages are answered with."""

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._next_id = 0
        self._memory: dict[int, _Memory] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Blocking mode with a limit: in non-blocking mode a message could be sent in pieces.
            limit = struct.pack("@ll", int(self.timeout), int(self.timeout % 1 * 1_000_000))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            with os_error(f"no device server at {self.path}"):
                self._socket.connect(os.fspath(self.path))
            self._negotiate()
        except BaseException:
            self._socket.close()
            raise

    def _negotiate(self) -> None:
        capabilities = {
            "max_msg_fds": _MAX_FDS,
            "max_data_xfer_size": self.max_data_transfer,
            "migration": {"pgsize": 4096},
        }
        body = self.request(Command.VERSION, protocol.version_body(capabilities))
        major, self.minor = protocol.VERSION_PREFIX.unpack_from(body)
        if major != 0:
            raise PeerError(f"the server at {self.path} speaks vfio-user {major}, not 0")
        text = body[protocol.VERSION_PREFIX.size :].rstrip(b"\0")
        self.capabilities = json.loads(text).get("capabilities", {}) if text else {}

    # -- requests -------------------------------------------------------------------------------------------------

    def request(self, command: int, body: bytes = b"", *, fds: Sequence[int] = ()) -> bytes:
        """Send a command and return the body of its reply. Raises RemoteError, Disconnected or WaitTimeout."""
        with self._lock:
            message_id = self._send(command, body, fds, protocol.TYPE_COMMAND)
            while True:
                message = self._receive(f"the reply to command {command}")
                if not message.is_reply:
                    self._answer(message)
                    continue
                if message.message_id != message_id or message.command != command:
                    raise PeerError(
                        f"the server answered command {message.command} (id {message.message_id}) "
                        f"where command {command} (id {message_id}) waits"
                    )
                if message.flags & protocol.FLAG_ERROR:
                    raise RemoteError(command, message.error)
                return message.body

    def post(self, command: int, body: bytes) -> None:
        """Send a command that the server does not answer."""
        with self._lock:
            self._send(command, body, (), protocol.TYPE_COMMAND | protocol.FLAG_NO_REPLY)

    def device_info(self) -> tuple[int, int, int]:
        """Flags, number of regions, number of interrupt types."""
        body = self.request(Command.GET_INFO, protocol.DEVICE_INFO.pack(protocol.DEVICE_INFO.size, 0, 0, 0))
        _, flags, regions, interrupts = protocol.DEVICE_INFO.unpack_from(body)
        return flags, regions, interrupts

    def region_info(self, index: int) -> RegionInfo:
        """About region `index`."""
        packed = protocol.REGION_INFO.pack(protocol.REGION_INFO.size, 0, index, 0, 0, 0)
        body = self.request(Command.GET_REGION_INFO, packed)
        _, flags, got, _, size, _ = protocol.REGION_INFO.unpack_from(body)
        return RegionInfo(got, flags, size)

    def irq_count(self, index: int) -> int:
        """Vectors of interrupt type `index`."""
        body = self.request(Command.GET_IRQ_INFO, protocol.IRQ_INFO.pack(protocol.IRQ_INFO.size, 0, index, 0))
        return int(protocol.IRQ_INFO.unpack_from(body)[3])

    def set_eventfds(self, index: int, fds: Sequence[int], *, start: int = 0) -> None:
        """Have the vectors of type `index` from `start` on signal `fds`."""
        flags = protocol.IRQ_DATA_EVENTFD | protocol.IRQ_ACTION_TRIGGER
        packed = protocol.SET_IRQS.pack(protocol.SET_IRQS.size, flags, index, start, len(fds))
        self.request(Command.SET_IRQS, packed, fds=fds)

    def disable_irqs(self, index: int) -> None:
        """Take away all eventfds of type `index`."""
        flags = protocol.IRQ_DATA_NONE | protocol.IRQ_ACTION_TRIGGER
        self.request(Command.SET_IRQS, protocol.SET_IRQS.pack(protocol.SET_IRQS.size, flags, index, 0, 0))

    def dma_map(
        self,
        iova: int,
        size: int,
        fd: int,
        offset: int = 0,
        *,
        readable: bool = True,
        writable: bool = True,
        send_fd: bool = True,
    ) -> None:
        """Offer `size` bytes of `fd` from `offset` on at I/O address `iova`.

        Without `send_fd` the server can reach the memory by messages only. `fd` must stay open.
        """
        flags = protocol.DMA_READ_FLAG * readable | protocol.DMA_WRITE_FLAG * writable
        packed = protocol.DMA_MAP.pack(protocol.DMA_MAP.size, flags, offset if send_fd else 0, iova, size)
        with self._lock:
            self.request(Command.DMA_MAP, packed, fds=(fd,) if send_fd else ())
            self._memory[iova] = _Memory(iova, size, fd, offset, flags)

    def dma_unmap(self, iova: int, size: int) -> None:
        """Take back what `dma_map` offered with the same address and size."""
        with self._lock:
            self.request(Command.DMA_UNMAP, protocol.DMA_UNMAP.pack(protocol.DMA_UNMAP.size, 0, iova, size))
            self._memory.pop(iova, None)

    def dma_unmap_all(self) -> None:
        """Take back everything."""
        with self._lock:
            packed = protocol.DMA_UNMAP.pack(protocol.DMA_UNMAP.size, protocol.DMA_UNMAP_ALL, 0, 0)
            self.request(Command.DMA_UNMAP, packed)
            self._memory.clear()

    def region_read(self, region: int, offset: int, size: int) -> bytes:
        """`size` bytes of `region` at `offset`."""
        body = self.request(Command.REGION_READ, protocol.REGION_ACCESS.pack(offset, region, size))
        return body[protocol.REGION_ACCESS.size :]

    def region_write(self, region: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        """Write `data` to `region` at `offset`; posted: without waiting, and without hearing of an error."""
        if len(data) > LONGEST_REGION_WRITE:
            raise UsageError(f"{len(data)} bytes in one region write: at most {LONGEST_REGION_WRITE} arrive whole")
        body = protocol.REGION_ACCESS.pack(offset, region, len(data)) + data
        if posted:
            self.post(Command.REGION_WRITE, body)
        else:
            self.request(Command.REGION_WRITE, body)

    def dma_unmap_dirty(self, iova: int, size: int) -> list[int]:
        """As `dma_unmap`; returns the I/O addresses of pages that the server wrote and had not reported."""
        bitmap = protocol.DIRTY_BITMAP.pack(protocol.LOGGED_PAGE, protocol.bitmap_size(size))
        room = protocol.DMA_UNMAP.size + len(bitmap) + protocol.bitmap_size(size)
        packed = protocol.DMA_UNMAP.pack(room, protocol.DMA_UNMAP_GET_DIRTY, iova, size)
        with self._lock:
            body = self.request(Command.DMA_UNMAP, packed + bitmap)
            self._memory.pop(iova, None)
        start = protocol.DMA_UNMAP.size + len(bitmap)
        return [iova + page * protocol.LOGGED_PAGE for page in protocol.bitmap_pages(body[start:])]

    def reset(self) -> None:
        """Reset the device."""
        self.request(Command.RESET)

    # -- migration: all raise RemoteError if the device, or the server's library, does not do it --------------------

    def feature(self, number: int, operation: int, data: bytes = b"", *, room: int = 0) -> bytes:
        """A DEVICE_FEATURE command; `room`: bytes of data that the answer may have. Returns the answer's data."""
        size = protocol.FEATURE.size + max(len(data), room)
        body = self.request(Command.DEVICE_FEATURE, protocol.FEATURE.pack(size, number | operation) + data)
        return body[protocol.FEATURE.size :]

    def migration_flags(self) -> int:
        """Which optional states the device's migration has: MIGRATION_STOP_COPY and the like."""
        return int.from_bytes(self.feature(Feature.MIGRATION, protocol.FEATURE_GET, room=8)[:8], "little")

    def migration_state(self) -> DeviceState:
        """The migration state that the device is in."""
        data = self.feature(Feature.DEVICE_STATE, protocol.FEATURE_GET, room=protocol.DEVICE_STATE.size)
        return DeviceState(protocol.DEVICE_STATE.unpack_from(data)[0])

    def set_migration_state(self, state: int) -> None:
        """Lead the device into a migration state, over others if need be."""
        self.feature(Feature.DEVICE_STATE, protocol.FEATURE_SET, protocol.DEVICE_STATE.pack(state, 0))

    def read_migration_data(self, size: int) -> bytes:
        """The next at most `size` bytes of the device's state; none at its end."""
        wanted = protocol.MIGRATION_DATA.size + size
        body = self.request(Command.MIG_DATA_READ, protocol.MIGRATION_DATA.pack(wanted, size))
        _, valid = protocol.MIGRATION_DATA.unpack_from(body)
        return body[protocol.MIGRATION_DATA.size :][:valid]

    def write_migration_data(self, data: bytes) -> None:
        """The next bytes of the state that the device is to load."""
        head = protocol.MIGRATION_DATA.pack(protocol.MIGRATION_DATA.size + len(data), len(data))
        self.request(Command.MIG_DATA_WRITE, head + data)

    def logging_start(self, page_size: int = protocol.LOGGED_PAGE) -> None:
        """From now on the server logs which memory it writes."""
        packed = protocol.LOGGING_CONTROL.pack(page_size, 0, 0)
        self.feature(Feature.LOGGING_START, protocol.FEATURE_SET, packed)

    def logging_stop(self) -> None:
        """End the log."""
        self.feature(Feature.LOGGING_STOP, protocol.FEATURE_SET)

    def dirty_pages(self, iova: int, size: int, page_size: int = protocol.LOGGED_PAGE) -> list[int]:
        """I/O addresses of pages that the server wrote since it was asked last, in memory as it was offered."""
        packed = protocol.LOGGING_REPORT.pack(iova, size, page_size)
        room = protocol.LOGGING_REPORT.size + protocol.bitmap_size(size, page_size)
        data = self.feature(Feature.LOGGING_REPORT, protocol.FEATURE_GET, packed, room=room)
        bitmap = data[protocol.LOGGING_REPORT.size :]
        return [iova + page * page_size for page in protocol.bitmap_pages(bitmap)]

    @property
    def longest_transfer(self) -> int:
        """Bytes of data that one message may have in either direction."""
        theirs = self.capabilities.get("max_data_xfer_size", self.max_data_transfer)
        return min(self.max_data_transfer, int(theirs))

    # -- the server's requests ------------------------------------------------------------------------------------

    def serve(self, timeout: float = 0.0) -> int:
        """Answer the server's commands: those that wait, or the first to come within `timeout` s. Returns how many."""
        served = 0
        while self._readable(0.0 if served else timeout):
            with self._lock:
                if not self._readable(0.0):  # it was the reply to another thread's request
                    break
                self._answer(self._receive("a command of the server"))
                served += 1
        return served

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Answer the server's commands on a thread of its own. Requests may be made meanwhile, on other threads."""
        stop_read, stop_write = os.pipe()

        def loop() -> None:
            poll = select.poll()
            poll.register(stop_read, select.POLLIN)
            poll.register(self._socket.fileno(), select.POLLIN)
            while True:
                if any(fd == stop_read for fd, _ in poll.poll()):
                    return
                try:
                    self.serve()
                except (VmbusError, OSError, ValueError):  # the last one: closed meanwhile, a descriptor of -1
                    return  # the connection is gone: the next request will say so

        thread = threading.Thread(target=loop, name="vfio-user client", daemon=True)
        thread.start()
        try:
            yield
        finally:
            os.close(stop_write)
            thread.join(self.timeout)
            os.close(stop_read)

    def _readable(self, timeout: float) -> bool:
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def _answer(self, message: Message) -> None:
        """Serve a DMA command out of the memory that was offered."""
        body, error = b"", 0
        if message.command in (Command.DMA_READ, Command.DMA_WRITE):
            iova, size = protocol.DMA_ACCESS.unpack_from(message.body)
            command = Command(message.command)
            self.dma_accesses.append(DmaAccess(command, iova, size))
            memory = self._memory_at(iova, size)
            needed = protocol.DMA_READ_FLAG if command is Command.DMA_READ else protocol.DMA_WRITE_FLAG
            if self.refuse_dma:
                error = self.refuse_dma
            elif memory is None or not memory.flags & needed:
                error = errno.EFAULT
            else:
                place = memory.offset + iova - memory.iova
                body = protocol.DMA_ACCESS.pack(iova, size)
                if command is Command.DMA_READ:
                    body += os.pread(memory.backing, size, place)
                else:
                    os.pwrite(memory.backing, message.body[protocol.DMA_ACCESS.size :], place)
        else:
            error = errno.ENOTSUP
        if message.flags & protocol.FLAG_NO_REPLY:
            return
        flags = protocol.TYPE_REPLY | (protocol.FLAG_ERROR if error else 0)
        self._transmit(protocol.encode(message.message_id, message.command, body, flags=flags, error=error), ())

    def _memory_at(self, iova: int, size: int) -> _Memory | None:
        for memory in self._memory.values():
            if memory.iova <= iova and iova + size <= memory.iova + memory.size:
                return memory
        return None

    # -- messages -------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send any bytes: for tests of what the server does with nonsense."""
        with self._lock:
            self._transmit(data, fds)

    def close(self) -> None:
        """Hang up. Repeating it does nothing."""
        with contextlib.suppress(OSError):
            # A thread that serves may be blocked in a read, which would keep the connection open.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def __enter__(self) -> VfioUserClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, command: int, body: bytes, fds: Sequence[int], flags: int) -> int:
        message_id = self._next_id
        self._next_id = (message_id + 1) & 0xFFFF
        self._transmit(protocol.encode(message_id, command, body, flags=flags), fds)
        return message_id

    def _transmit(self, data: bytes, fds: Sequence[int]) -> None:
        try:
            sent = socket.send_fds(self._socket, [data], fds) if fds else self._socket.send(data)
        except BlockingIOError:
            raise WaitTimeout(f"the server at {self.path} to take a message", self.timeout) from None
        except OSError as error:
            raise Disconnected(f"the server at {self.path} is gone: {error.strerror or error}") from error
        if sent != len(data):
            raise Disconnected(f"the server at {self.path} took {sent} of {len(data)} bytes of a message")

    def _receive(self, what: str) -> Message:
        header = self._read(protocol.HEADER.size, what)
        message_id, command, size, flags, error = protocol.HEADER.unpack(header)
        if not protocol.HEADER.size <= size <= _MAX_MESSAGE:
            raise PeerError(f"the server at {self.path} sent a message of {size} bytes")
        body = self._read(size - protocol.HEADER.size, what) if size > protocol.HEADER.size else b""
        return Message(message_id, command, flags, error, body)

    def _read(self, size: int, what: str) -> bytes:
        content = b""
        while len(content) < size:
            try:
                piece = self._socket.recv(size - len(content), socket.MSG_WAITALL)
            except BlockingIOError:
                raise WaitTimeout(what, self.timeout) from None
            except OSError as error:
                raise Disconnected(f"the server at {self.path} is gone: {error.strerror or error}") from error
            if not piece:
                raise Disconnected(f"the server at {self.path} hung up while we waited for {what}")
            content += piece
        return content
