"""One PCI function on one vfio-user socket.

`Context` listens, accepts one client at a time, feeds its requests to a `DeviceHandler` and raises interrupts. It is
single-threaded: every method belongs to the thread that runs the event loop (`trigger` too).

How it treats the library:

* One library context per client. Whatever ends a connection (the client left, the stream lost its framing, an errno
  that the library does not recover from), the context is destroyed and a new one waits for the next client, so no
  state of a lost connection survives it. The socket that clients connect to is ours and outlives them all.
* The handshake. The library would accept a client and block until its first message is there, for ever if need be.
  So we accept, wait for the complete VERSION message on our own loop, relay it and its answer over a private
  connection that the library accepts, and then put the client's socket in the place of that connection (dup2). A
  silent client is dropped after `handshake_timeout`; it delays nobody.
* Requests. The library reads a message only when it is completely there; one whose rest does not come within
  `message_timeout` ends the connection.
* Posted writes of registers (doorbells) are taken off the socket and handled without the library, which has nothing to
  do for them; not where a client may migrate the device, since the library knows when it must refuse them.
* Configuration space is the handler's alone (the callback gets every access, unsplit).
* Migration. Where the library has migration v2 and there is a `MigrationHandler`, the client can migrate the device
  through the protocol; see `migration` for what is looked at before the library gets it.
* Offering memory. Requests that the library would not handle well are answered here, see `offers`.
* Taking memory back. The library removes a region when it is named exactly. A client may also name a range with several
  regions in it: QEMU does so with all that a guest's driver had mapped, when the guest takes the device out of that
  address space, and relies on it. Such a request is answered here; the library is told of each region. That may be
  thousands: `run` does as many at a time as it would handle requests, and the answer goes out with the last.
* Crowds. A client that comes and fails, or goes, keeps its place among those that may wait for `_COOLING` seconds, and
  nobody else is accepted while all places are taken. So neither a crowd nor a lack of descriptors keeps us busy.
* Interrupts are MSI only. ERR and REQ have no vectors: the 2022 generation would put the client's ERR eventfd in the
  place of vector 0.
* Views of guest memory are over our own second mapping, see `mapping`.

Nothing raised in a callback gets into C: it is logged and the client is answered with EINVAL.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import json
import logging
import os
import re
import select
import socket
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from vmbus.errors import EnvironmentProblem, PeerError, UsageError, VmbusError
from vmbus.transport import bindings, protocol
from vmbus.transport.connection import (
    LONGEST_PATH,
    Listener,
    Timer,
    Waiting,
    bound_blocking,
    look,
    receive,
    take_posted_writes,
)
from vmbus.transport.library import Generation, Library
from vmbus.transport.mapping import GuestMapping, any_lost
from vmbus.transport.migration import (
    LONGEST_DATA,
    LONGEST_LOOK,
    FeatureGate,
    MigrationHandler,
    MigrationRefused,
    MigrationState,
)
from vmbus.transport.offers import Offer, Region, Regions
from vmbus.transport.protocol import HEADER
from vmbus.util.complaints import bounded_log

logger = bounded_log(__name__)
_library_logger = bounded_log(f"{__name__}.library")

CONFIG_SIZE = 256
DEFAULT_MAX_DMA_REGIONS = 16384
"""For the new generation. Every region costs two memory areas, of which a process may have 65530 by default."""
_LONGEST_VERSION_MESSAGE = 65536
_MOST_PENDING = 8
_COOLING = 0.1
# Errors that only the client's answer can be, so that the stream is in step after them.
_REFUSALS = frozenset({errno.ENODEV, errno.ENXIO, errno.EFAULT, errno.EACCES, errno.ENOENT})
# QEMU takes back ranges in which nothing is left whenever the guest switches its IOMMU address space. The advice about
# twin_socket is for servers that send messages while the guest runs; `write_through_client` does not.
_NOISE = re.compile(r"cmd 3 failed: No such file|failed to remove DMA region .*No such file|without the twin_socket")


class ResetKind(enum.Enum):
    """Why the device is reset."""

    DEVICE = bindings.RESET_DEVICE
    """The client asks; memory and interrupts stay set up."""
    LOST_CONNECTION = bindings.RESET_LOST_CONN
    """The client is gone; all memory has been unmapped before."""
    FLR = bindings.RESET_PCI_FLR


class RunResult(enum.Enum):
    """What `Context.run` ended with."""

    IDLE = enum.auto()
    """Nothing waits; wait for `poll_fd`."""
    MORE = enum.auto()
    """The batch is full; more may wait."""
    DISCONNECTED = enum.auto()
    """The client is gone. The handler has been told, and the next client can connect."""


class DeviceAccessError(PeerError):
    """A register or configuration access that the device refuses; the client is answered with EINVAL."""


class ClientGone(VmbusError):
    """The connection ended (or had to be ended) during an operation that needs it."""


class ClientBusy(VmbusError):
    """The client has a request in flight, so that a message to it would garble the stream."""


class ClientRefused(VmbusError):
    """The client answered a write to guest memory with an error; the connection is intact.

    QEMU does so while the guest has bus mastering off.
    """


class AddressNotMapped(VmbusError):
    """The client does not offer (writable) memory at this I/O address."""


class DeviceHandler(Protocol):
    """What a device does with the client's requests. Called on the event loop's thread, from within the library:
    no method may call back into the `Context`, `trigger` excepted."""

    def bar0_read(self, offset: int, size: int) -> bytes:
        """`size` bytes of BAR0. May raise DeviceAccessError."""

    def bar0_write(self, offset: int, data: bytes) -> None:
        """May raise DeviceAccessError (a posted write has nobody to tell it to)."""

    def config_read(self, offset: int, size: int) -> bytes:
        """`size` bytes of configuration space, any alignment."""

    def config_write(self, offset: int, data: bytes) -> None:
        """Any size and alignment."""

    def dma_map(self, iova: int, view: memoryview, writable: bool) -> None:
        """The guest gives memory: `view` (format "B") shows it, and stays safe to touch after `dma_unmap`."""

    def dma_map_unreachable(self, iova: int, size: int) -> None:
        """The guest gives memory that we cannot map."""

    def dma_unmap(self, iova: int, size: int) -> None:
        """The guest takes memory back. After the return, views no longer reach it."""

    def reset(self, kind: ResetKind) -> None:
        """The device is reset. For LOST_CONNECTION everything has been unmapped before."""


@dataclass
class _Pending:
    """A client that has not yet sent its VERSION message."""

    socket: socket.socket
    deadline: float


@dataclass
class _LibraryContext:
    """A `vfu_ctx_t` that is realized and has a private connection waiting to be accepted."""

    pointer: int
    private: socket.socket
    callbacks: list[Any] = field(default_factory=list)  # C holds only bare pointers to them


class Context:
    """A PCI function with a memory BAR of `bar0_size` bytes and `msi_vectors` MSI vectors, listening on `socket_path`.

    Raises EnvironmentProblem if the socket cannot be had or the library refuses the set-up.
    """

    def __init__(
        self,
        library: Library,
        socket_path: Path,
        handler: DeviceHandler,
        *,
        bar0_size: int = 4096,
        msi_vectors: int = 1,
        max_dma_regions: int = DEFAULT_MAX_DMA_REGIONS,
        handshake_timeout: float = 5.0,
        message_timeout: float = 10.0,
        migration: MigrationHandler | None = None,
    ) -> None:
        self._library = library
        self._vfu = library.cdll
        self._handler = handler
        self._bar0_size = bar0_size
        self._msi_vectors = msi_vectors
        self._max_dma_regions = max_dma_regions
        self._handshake_timeout = handshake_timeout
        self._message_timeout = message_timeout
        self._client: socket.socket | None = None
        self._pending: list[_Pending] = []
        self._stall_deadline: float | None = None
        self._cooling: list[float] = []  # when places are free again that failed clients had
        self._accepting = True  # the listening socket is looked at
        self._regions = Regions()
        self._offer: Offer | None = None  # what the library is just being asked to map
        self._depth = 0
        self._lost_reported = True
        self._escaped: BaseException | None = None
        self._max_transfer = bindings.MAX_DATA_TRANSFER
        # The 2022 generation has another kind of migration, which no client uses.
        self._migration = migration if library.generation is Generation.NEW else None
        self._gate = FeatureGate(self._migration, self)
        self._closed = False
        self._folder = _folder_for(socket_path)
        self._context: _LibraryContext | None = self._create()
        try:
            self._listener = Listener(socket_path)
        except BaseException:
            self._destroy()
            raise
        # One descriptor for whatever we wait for, so that the event loop never has to follow our changes.
        self._epoll = select.epoll()
        self._timer = Timer()
        self._epoll.register(self._timer.fd, select.EPOLLIN)
        self._epoll.register(self._listener.socket.fileno(), select.EPOLLIN)

    # -- for the event loop ---------------------------------------------------------------------------------------

    def poll_fd(self) -> int:
        """A descriptor that is readable whenever `attach` or `run` has something to do. It never changes."""
        return self._epoll.fileno()

    @property
    def attached(self) -> bool:
        """Whether a client is connected and has shaken hands."""
        return self._client is not None

    @property
    def driven_by_client(self) -> bool:
        """Whether the client has asked whether it can migrate the device, and was told that it can."""
        return self._client is not None and self._gate.driven

    @property
    def socket_path(self) -> Path:
        """Where clients connect."""
        return self._listener.path

    @property
    def dma_regions(self) -> list[tuple[int, int, bool]]:
        """What the client offers, by address: (I/O address, size in bytes, whether we could map it)."""
        return [(region.iova, region.size, region.mapping is not None) for region in self._regions]

    def attach(self) -> bool:
        """Do what can be done towards a connected client, without ever waiting; True when one is attached.

        Clients that stay silent, hang up or talk nonsense are dropped here, and logged.
        """
        self._check_usable()
        if self._client is not None:
            return True
        self._drain_events()
        while self._places() and (client := self._accept()) is not None:
            bound_blocking(client, self._message_timeout)
            self._pending.append(_Pending(client, time.monotonic() + self._handshake_timeout))
            self._epoll.register(client.fileno(), select.EPOLLIN | select.EPOLLET)
        for pending in list(self._pending):
            waiting, size, _, _ = look(pending.socket)
            if waiting is Waiting.COMPLETE and size <= _LONGEST_VERSION_MESSAGE:
                if self._shake_hands(pending, size):
                    return True
            elif waiting is Waiting.NOTHING or waiting is Waiting.PARTIAL:
                if time.monotonic() >= pending.deadline:
                    reason = f"no complete VERSION message within {self._handshake_timeout:g} s"
                    self._forget(pending, reason)
            elif waiting is Waiting.CLOSED:
                self._forget(pending, "it left before its VERSION message")
            else:
                self._forget(pending, "its first message is not a VERSION message")
        self._watch_listener(self._places() > 0)
        self._set_timer()
        return False

    def run(self, max_requests: int = 64, seconds: float = inf) -> RunResult:
        """Handle the requests that wait, at most `max_requests`, and for `seconds`. Never waits for a client.

        Without a client it does what `attach` does. Re-raises what is no Exception (KeyboardInterrupt and the like)
        from a callback. Raises EnvironmentProblem if guest memory that was taken back cannot be cut off: do not go on.
        """
        self._check_usable()
        if self._client is None:
            return RunResult.MORE if self.attach() else RunResult.IDLE
        if self._stall_deadline is not None:
            self._drain_events()
        handled = 0
        until = time.monotonic() + seconds
        while handled < max_requests and time.monotonic() < until:
            if any_lost() and (region := self._regions.shrunk()) is not None:
                return self._disconnect(f"pages of its memory at {region.iova:#x} are gone: the file was made shorter")
            if not self._gate.driven:
                try:
                    writes, more = take_posted_writes(self._client, max_requests - handled)
                except OSError:
                    return self._leave(None, max_requests)
                if writes:
                    handled += len(writes)
                    self._note_progress()
                    self._posted(writes)
                    if not more:
                        return RunResult.IDLE
                    continue
            waiting, size, messages, watched = look(self._client)
            if waiting is Waiting.NOTHING:
                self._note_progress()
                return RunResult.IDLE
            if waiting is Waiting.PARTIAL:
                return self._note_stall()
            self._note_progress()
            if waiting is Waiting.BROKEN:
                broken = f"it sent a header that is no request ({size} bytes); the stream is lost"
                return self._leave(broken, max_requests)
            if waiting is Waiting.CLOSED:
                return self._leave(None, max_requests)
            if watched:
                done, problem = self._run_watched(watched, size, max_requests - handled)
                if problem is not None:
                    return self._disconnect(problem)
                handled += done
                continue
            for _ in range(min(messages, max_requests - handled)):
                handled += 1
                if (problem := self._run_library()) is not None:
                    return self._disconnect(problem)
                if time.monotonic() >= until:
                    break
        return RunResult.MORE

    # -- for the device -------------------------------------------------------------------------------------------

    def trigger(self, vector: int = 0) -> bool:
        """Raise an interrupt. False if there is no client, or it has set up no eventfd for the vector.

        Raises UsageError if there is no such vector.
        """
        if not 0 <= vector < self._msi_vectors:
            raise UsageError(f"interrupt vector {vector} of {self._msi_vectors}")
        if self._client is None or self._context is None:
            return False
        return bool(self._vfu.vfu_irq_trigger(self._context.pointer, vector) == 0)

    def write_through_client(self, iova: int, data: bytes | memoryview) -> None:
        """Have the client write `data` to guest memory at I/O address `iova`, so that it sees the pages change.

        Only while the guest cannot cause requests (vCPUs stopped) and never from a callback: the library takes
        whatever comes next on the socket for the answer. Raises AddressNotMapped (nothing, or only the part before
        the gap, was written), ClientRefused (the same) if the client answers with an error, ClientBusy if a request
        waits (run, then try again), ClientGone if the connection had to be given up.
        """
        self._check_usable()
        if self._client is None or self._context is None:
            raise ClientGone("no client is attached that could write guest memory")
        if self._max_transfer <= 0:
            raise EnvironmentProblem("the client announced max_data_xfer_size 0: it cannot be sent any data")
        content = memoryview(data).cast("B")
        done = 0
        while done < len(content):
            region = self._region_at(iova + done)
            room = region.iova + region.size - (iova + done)
            length = min(len(content) - done, room, self._max_transfer)
            # Looking once per message: an answer to our own message has been taken by the time we look again.
            waiting = look(self._client).waiting
            if waiting is Waiting.CLOSED:
                self._disconnect(None)
                raise ClientGone("the client left before all guest memory was written")
            if waiting is not Waiting.NOTHING:
                raise ClientBusy(
                    "the client has a request in flight: stop the vCPUs, and run() until idle, before this"
                )
            self._write_chunk(iova + done, bytes(content[done : done + length]))
            done += length

    def close(self) -> None:
        """Disconnect the client (the handler is told), stop listening, remove the socket. Repeating it does nothing."""
        if self._closed:
            return
        self._check_usable()
        self._closed = True
        self._end_connection()
        self._destroy()
        for pending in self._pending:
            pending.socket.close()
        self._pending.clear()
        self._listener.close()
        self._timer.close()
        self._epoll.close()

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- connections ----------------------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self._depth:
            raise UsageError("the transport cannot be driven from within one of its own callbacks")
        if self._closed:
            raise UsageError(f"the transport on {self._listener.path} is closed")

    def _drain_events(self) -> None:
        # Edge-triggered entries stay "ready" towards the outer event loop until they are collected here.
        self._epoll.poll(0)

    def _set_timer(self) -> None:
        deadlines = [pending.deadline for pending in self._pending]
        if self._cooling and self._client is None:
            deadlines.append(self._cooling[0])
        if self._stall_deadline is not None:
            deadlines.append(self._stall_deadline)
        self._timer.set(min(deadlines) - time.monotonic() if deadlines else None)

    def _places(self) -> int:
        """How many more clients may wait."""
        now = time.monotonic()
        self._cooling = [end for end in self._cooling if end > now]
        return _MOST_PENDING - len(self._pending) - len(self._cooling)

    def _cool(self, places: int) -> None:
        """Give away no more than the places that are left, for a while."""
        self._cooling += [time.monotonic() + _COOLING] * places

    def _accept(self) -> socket.socket | None:
        try:
            return self._listener.accept()
        except OSError as error:
            logger.warning("no client can be accepted on %s for now: %s", self._listener.path, error)
            self._cool(self._places())
            return None

    def _watch_listener(self, wanted: bool) -> None:
        """Whether somebody who connects wakes us."""
        if wanted != self._accepting:
            self._accepting = wanted
            self._epoll.modify(self._listener.socket.fileno(), select.EPOLLIN if wanted else 0)

    def _forget(self, pending: _Pending, reason: str) -> None:
        logger.warning("client on %s dropped: %s", self._listener.path, reason)
        self._cool(1)
        self._pending.remove(pending)
        self._epoll.unregister(pending.socket.fileno())
        pending.socket.close()

    def _shake_hands(self, pending: _Pending, size: int) -> bool:
        """Relay the VERSION exchange, then give the library the client's socket. False if the client is dropped."""
        if self._context is None:
            self._context = self._create_if_possible()
            if self._context is None:
                self._forget(pending, "nothing can be set up for it")
                return False
        client, private, pointer = pending.socket, self._context.private, self._context.pointer
        request, stray = receive(client, size, socket.MSG_WAITALL)
        for fd in stray:
            os.close(fd)
        private.sendall(request)
        attached = self._vfu.vfu_attach_ctx(pointer) == 0
        problem = None if attached else os.strerror(ctypes.get_errno())
        try:
            reply, fds = receive(private, bindings.MAX_MESSAGE, socket.MSG_DONTWAIT)
            if attached and self._migration is not None:
                reply = _with_shorter_transfers(reply)
            try:
                socket.send_fds(client, [reply], fds)
            finally:
                for fd in fds:
                    os.close(fd)
        except OSError as error:
            problem = problem or f"the answer to its VERSION message could not be sent ({error})"
        if problem is not None:
            self._forget(pending, f"handshake failed: {problem}")
            self._destroy()
            self._context = self._create_if_possible()
            return False
        os.dup2(client.fileno(), self._vfu.vfu_get_poll_fd(pointer), inheritable=False)
        private.close()
        self._client = client
        self._lost_reported = False
        self._gate = FeatureGate(self._migration, self)
        self._max_transfer = _announced_transfer(request)
        self._pending.remove(pending)
        for other in list(self._pending):
            self._forget(other, "another client was faster")
        # A device has one client; the next one waits in the socket's queue without waking us.
        self._watch_listener(False)
        self._epoll.modify(client.fileno(), select.EPOLLIN)
        self._set_timer()
        logger.info("client attached on %s", self._listener.path)
        return True

    def _posted(self, writes: list[tuple[int, bytes]]) -> None:
        """Writes to BAR0 that were taken off the socket."""
        self._depth += 1
        try:
            for offset, value in writes:
                try:
                    if offset + len(value) <= self._bar0_size:
                        self._handler.bar0_write(offset, value)
                except DeviceAccessError as error:
                    logger.debug("BAR0 write at %#x refused: %s", offset, error)
                except Exception:
                    logger.exception("BAR0 write at %#x failed in the device", offset)
        finally:
            self._depth -= 1

    def _run_watched(self, command: int, size: int, room: int) -> tuple[int, str | None]:
        """One request that is looked at first. Returns how much of `room` it took, and as `_run_library`."""
        assert self._client is not None
        if command == protocol.Command.DMA_MAP:
            return 1, self._run_map(size)
        try:
            start = self._client.recv(min(size, LONGEST_LOOK), socket.MSG_PEEK | socket.MSG_DONTWAIT)
            after = self._gate.before(command, start[HEADER.size :])
        except MigrationRefused as refusal:
            logger.error("the client's migration: %s", refusal)
            return 1, self._answer(size, refusal.errno)
        except OSError:
            return 1, ""
        if command == protocol.Command.DMA_UNMAP:
            done, problem = self._run_unmap(size, room)
        else:
            done, problem = 1, self._run_library()
        if problem is None and after is not None:
            after()
        return done, problem

    def _answer(self, size: int, code: int, body: bytes | None = None) -> str | None:
        """Take the next request, of `size` bytes, off the socket and answer it: with an error, or 0. Returns as above.

        `body`: of the answer; None for what the request itself says.
        """
        assert self._client is not None
        try:
            request = b""
            while len(request) < size:  # a read ends where descriptors come along
                piece, stray = receive(self._client, size - len(request), socket.MSG_WAITALL)
                for fd in stray:
                    os.close(fd)
                if not piece:
                    return ""
                request += piece
            message_id, command, _, flags, _ = HEADER.unpack_from(request)
            if not flags & protocol.FLAG_NO_REPLY:
                answer = protocol.TYPE_REPLY | (protocol.FLAG_ERROR if code else 0)
                content = b"" if code else request[HEADER.size :] if body is None else body
                self._client.sendall(protocol.encode(message_id, command, content, flags=answer, error=code))
        except OSError as error:
            return f"its request could not be answered ({error})"
        return None

    def _run_library(self) -> str | None:
        """One request. Returns None, or why the connection must end ("" if the client simply left)."""
        assert self._context is not None
        result = self._vfu.vfu_run_ctx(self._context.pointer)
        error = ctypes.get_errno()
        self._raise_escaped()
        if result >= 0:
            return None
        if error in (errno.ENOTCONN, errno.EBADF):
            return ""
        return f"the library gave up on it: {os.strerror(error)}"

    def _run_map(self, size: int) -> str | None:
        """A DMA_MAP request of `size` bytes. Returns as `_run_library`."""
        assert self._client is not None
        wanted = HEADER.size + protocol.DMA_MAP.size
        if size < wanted:
            return self._run_library()  # refused there
        descriptors: list[int] = []
        try:
            start, descriptors = receive(self._client, wanted, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            if len(start) < wanted:
                return "it sent a request to map memory in pieces"
            offer = Offer.read(start[HEADER.size :], descriptors)
            code = self._regions.answer(offer, descriptors)
        except OSError:
            return ""
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        if code is not None:
            return self._answer(size, code, b"")
        self._offer = offer
        try:
            return self._run_library()
        finally:
            self._offer = None

    def _run_unmap(self, size: int, room: int) -> tuple[int, str | None]:
        """A DMA_UNMAP request of `size` bytes, to which nothing else is to be said. Returns as `_run_watched`.

        The request stays where it is until the last of its regions is gone: `run` then comes back to it.
        """
        assert self._client is not None
        wanted = HEADER.size + protocol.DMA_UNMAP.size
        try:
            start = self._client.recv(wanted, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            return 1, ""
        if size != wanted or len(start) != wanted:
            return 1, self._run_library()
        _, flags, iova, length = protocol.DMA_UNMAP.unpack_from(start, HEADER.size)
        inside: list[Region] = []
        if flags == 0:
            inside = list(islice(self._regions.inside(iova, iova + length), room + 1))
        elif flags == protocol.DMA_UNMAP_ALL and not iova and not length:
            inside = list(islice(self._regions, room + 1))
        if not inside or (flags == 0 and (inside[0].iova, inside[0].size) == (iova, length)):
            return 1, self._run_library()
        if (problem := self._unmap_through_library(inside[:room])) is not None or len(inside) > room:
            return room, problem
        return len(inside), self._answer(size, 0)

    def _unmap_through_library(self, regions: list[Region]) -> str | None:
        """Have the library remove regions, with requests on a connection of our own. Returns as above."""
        assert self._context is not None and self._client is not None
        descriptor = self._vfu.vfu_get_poll_fd(self._context.pointer)
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            return f"no connection can be had to take back its memory ({error})"
        with ours, theirs:
            for end in (ours, theirs):
                bound_blocking(end, self._message_timeout)
            os.dup2(theirs.fileno(), descriptor, inheritable=False)
            try:
                for region in regions:
                    body = protocol.DMA_UNMAP.pack(protocol.DMA_UNMAP.size, 0, region.iova, region.size)
                    ours.sendall(protocol.encode(0, protocol.Command.DMA_UNMAP, body))
                    if (problem := self._run_library()) is not None:
                        return problem or "the library gave up on it while memory was taken back"
                    reply = ours.recv(bindings.MAX_MESSAGE)
                    if HEADER.unpack_from(reply)[3] & protocol.FLAG_ERROR:
                        return f"the library does not take back memory at {region.iova:#x}"
            except (OSError, struct.error) as error:
                return f"the library does not take back memory ({error})"
            finally:
                os.dup2(self._client.fileno(), descriptor, inheritable=False)
        return None

    def _raise_escaped(self) -> None:
        """Raise what a callback could not raise through C."""
        if self._escaped is not None:
            escaped, self._escaped = self._escaped, None
            raise escaped

    def _note_progress(self) -> None:
        if self._stall_deadline is None or self._client is None:
            return
        self._stall_deadline = None
        self._epoll.modify(self._client.fileno(), select.EPOLLIN)
        self._set_timer()

    def _note_stall(self) -> RunResult:
        assert self._client is not None
        now = time.monotonic()
        if self._stall_deadline is None:
            self._stall_deadline = now + self._message_timeout
            # Level-triggered, the beginning of the message would keep the event loop spinning.
            self._epoll.modify(self._client.fileno(), select.EPOLLIN | select.EPOLLET)
            self._drain_events()
            self._set_timer()
            # What arrived between our look and the change has raised no event.
            return RunResult.MORE if look(self._client).waiting is not Waiting.PARTIAL else RunResult.IDLE
        if now >= self._stall_deadline:
            return self._disconnect(f"the rest of a message did not come within {self._message_timeout:g} s")
        self._set_timer()
        return RunResult.IDLE

    def _leave(self, problem: str | None, room: int) -> RunResult:
        """`_disconnect` a client that has sent its last request, once at most `room` regions of its memory are left."""
        first = list(islice(self._regions, room + 1))
        if len(first) > room and self._unmap_through_library(first[:room]) is None:
            return RunResult.MORE
        return self._disconnect(problem)

    def _disconnect(self, problem: str | None) -> RunResult:
        if problem:
            logger.error("client on %s dropped: %s", self._listener.path, problem)
        else:
            logger.info("client on %s left", self._listener.path)
        self._end_connection()
        self._destroy()
        self._cool(1)
        self._context = self._create_if_possible()
        self._watch_listener(self._places() > 0)
        self._set_timer()
        self._raise_escaped()
        return RunResult.DISCONNECTED

    def _end_connection(self) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        self._stall_deadline = None
        self._epoll.unregister(client.fileno())
        self._destroy()  # unmaps and resets through the callbacks
        client.close()
        # The library has done both by now, unless it lost track.
        for region in list(self._regions):
            self._unmap(region)
        self._report_lost()

    def _report_lost(self) -> None:
        if not self._lost_reported:
            self._lost_reported = True
            self._shielded("reset", self._handler.reset, ResetKind.LOST_CONNECTION)

    # -- the library's context ------------------------------------------------------------------------------------

    def _create(self) -> _LibraryContext:
        vfu = self._vfu
        with tempfile.TemporaryDirectory(prefix=".c-", dir=self._folder) as directory:
            path = Path(directory) / "s"
            pointer = vfu.vfu_create_ctx(
                bindings.TRANS_SOCK, os.fsencode(path), bindings.FLAG_ATTACH_NB, None, bindings.DEV_TYPE_PCI
            )
            if pointer is None:
                raise EnvironmentProblem(f"libvfio-user cannot create a device on {path}: {_errno_text()}")
            private = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            context = _LibraryContext(pointer, private)
            try:
                self._set_up(context)
                private.connect(os.fspath(path))
            except BaseException:
                private.close()
                vfu.vfu_destroy_ctx(pointer)
                raise
        return context

    def _create_if_possible(self) -> _LibraryContext | None:
        """For the next client. Whoever comes while there is none is dropped, and it is tried again."""
        try:
            return self._create()
        except (OSError, EnvironmentProblem) as error:
            logger.warning("no client can be served on %s for now: %s", self._listener.path, error)
            return None

    def _set_up(self, context: _LibraryContext) -> None:
        vfu, pointer = self._vfu, context.pointer

        def keep(callback: Any) -> Any:
            context.callbacks.append(callback)
            return callback

        def require(result: int, what: str) -> None:
            if result < 0:
                raise EnvironmentProblem(f"libvfio-user ({self._library.path}) refuses {what}: {_errno_text()}")

        os.set_inheritable(vfu.vfu_get_poll_fd(pointer), False)
        level = 7 if _library_logger.isEnabledFor(logging.DEBUG) else 4
        require(vfu.vfu_setup_log(pointer, keep(bindings.LogCallback(_on_log)), level), "the log")
        # Before region 7: the new generation resets that region's flags here.
        require(vfu.vfu_pci_init(pointer, bindings.PCI_CONVENTIONAL, 0, 0), "the PCI set-up")
        read_write = bindings.REGION_READ | bindings.REGION_WRITE
        handler = self._handler
        for index, size, flags, what, read, write in (
            (
                bindings.REGION_BAR0,
                self._bar0_size,
                read_write | bindings.REGION_MEM,
                "BAR0",
                handler.bar0_read,
                handler.bar0_write,
            ),
            (
                bindings.REGION_CONFIG,
                CONFIG_SIZE,
                read_write | bindings.REGION_ALWAYS_CB,
                "configuration space",
                handler.config_read,
                handler.config_write,
            ),
        ):
            callback = keep(bindings.RegionCallback(self._region_callback(what, read, write)))
            require(vfu.vfu_setup_region(pointer, index, size, callback, flags, None, 0, -1, 0), what)
        require(
            vfu.vfu_setup_device_reset_cb(pointer, keep(bindings.ResetCallback(self._on_reset))), "the reset callback"
        )
        register = keep(bindings.DmaCallback(self._on_dma_register))
        unregister = keep(bindings.DmaCallback(self._on_dma_unregister))
        if self._library.generation is Generation.NEW:
            result = vfu.vfu_setup_device_dma(pointer, self._max_dma_regions, register, unregister)
        else:
            result = vfu.vfu_setup_device_dma(pointer, register, unregister)
        require(result, "the DMA callbacks")
        for kind, count in (
            (bindings.IRQ_INTX, 0),
            (bindings.IRQ_MSI, self._msi_vectors),
            (bindings.IRQ_MSIX, 0),
            (bindings.IRQ_ERR, 0),
            (bindings.IRQ_REQ, 0),
        ):
            require(vfu.vfu_setup_device_nr_irqs(pointer, kind, count), f"{count} interrupts of type {kind}")
        if self._migration is not None:
            callbacks = bindings.MigrationCallbacks(
                bindings.MIGRATION_CALLBACKS_VERSION,
                keep(bindings.TransitionCallback(self._on_transition)),
                keep(bindings.DataCallback(self._on_read_data)),
                keep(bindings.DataCallback(self._on_write_data)),
            )
            require(vfu.vfu_setup_device_migration_callbacks(pointer, ctypes.byref(callbacks)), "migration")
        require(vfu.vfu_realize_ctx(pointer), "the whole set-up")

    def _destroy(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.private.close()
            self._vfu.vfu_destroy_ctx(context.pointer)
            context.callbacks.clear()

    # -- callbacks ------------------------------------------------------------------------------------------------

    def _shielded(self, what: str, function: Callable[..., Any], *arguments: Any) -> bool:
        """Call the handler; log instead of raising. True if it went well."""
        self._depth += 1
        try:
            function(*arguments)
            return True
        except Exception:
            logger.exception("the device's %s failed", what)
        except BaseException as error:
            self._escaped = error
        finally:
            self._depth -= 1
        return False

    def _region_callback(
        self, what: str, read: Callable[[int, int], bytes], write: Callable[[int, bytes], None]
    ) -> Callable[[int, Any, int, int, bool], int]:
        def callback(_context: int, buffer: Any, count: int, offset: int, is_write: bool) -> int:
            self._depth += 1
            try:
                if is_write:
                    write(offset, ctypes.string_at(buffer, count))
                    return count
                content = bytes(read(offset, count))
                if len(content) == count:
                    ctypes.memmove(buffer, content, count)
                    return count
                logger.error("%s read of %d bytes at %#x: the device gave %d", what, count, offset, len(content))
            except DeviceAccessError as error:
                logger.debug("%s access of %d bytes at %#x refused: %s", what, count, offset, error)
            except Exception:
                logger.exception("%s access of %d bytes at %#x failed in the device", what, count, offset)
            except BaseException as error:
                self._escaped = error
            finally:
                self._depth -= 1
            ctypes.set_errno(errno.EINVAL)
            return -1

        return callback

    def _on_reset(self, _context: int, kind: int) -> int:
        if kind == bindings.RESET_LOST_CONN:
            # Also called for a context that never had a client, and again when it is destroyed.
            self._report_lost()
            return 0
        if self._shielded("reset", self._handler.reset, ResetKind(kind)):
            return 0
        ctypes.set_errno(errno.EINVAL)
        return -1

    def _on_dma_register(self, _context: int, pointer: Any) -> None:
        self._shielded("DMA mapping", self._map, pointer.contents)

    def _on_dma_unregister(self, _context: int, pointer: Any) -> None:
        info = pointer.contents
        region = self._regions.get(info.iova.base or 0)
        if region is not None and region.size == info.iova.len:
            self._unmap(region)

    def _map(self, info: bindings.DmaInfo) -> None:
        iova, size, address = info.iova.base or 0, info.iova.len, info.vaddr
        if size == 0:
            return
        writable = bool(info.prot & bindings.PROT_WRITE)
        mapping = None
        if address is not None:
            try:
                mapping = GuestMapping(address, size, writable=writable)
            except EnvironmentProblem as error:
                logger.warning("DMA region %#x cannot be used: %s", iova, error)
        if not self._regions.add(Region(iova, iova + size, mapping, writable, self._offer)):
            raise UsageError(f"libvfio-user mapped {size} bytes at {iova:#x} over memory that is there")
        if mapping is None:
            self._handler.dma_map_unreachable(iova, size)
        else:
            self._handler.dma_map(iova, mapping.view, writable)

    def _unmap(self, region: Region) -> None:
        self._regions.remove(region)
        self._shielded("DMA unmapping", self._handler.dma_unmap, region.iova, region.size)
        if region.mapping is not None:
            try:
                region.mapping.revoke()
            except EnvironmentProblem as error:
                self._escaped = error  # guest memory must not stay in reach: `run` ends the server

    # -- migration ------------------------------------------------------------------------------------------------

    def _migrating(self, what: str, step: Callable[[MigrationHandler], int]) -> int:
        """One step of the handler's; its result, or -1 with errno set."""
        self._depth += 1
        code = errno.EIO
        try:
            assert self._migration is not None
            return step(self._migration)
        except MigrationRefused as refusal:
            logger.error("the client's migration: %s", refusal)
            code = refusal.errno
        except Exception:
            logger.exception("the client's migration: %s failed in the device", what)
        except BaseException as error:
            self._escaped = error
        finally:
            self._depth -= 1
        ctypes.set_errno(code)
        return -1

    def _on_transition(self, _context: int, number: int) -> int:
        def step(handler: MigrationHandler) -> int:
            handler.transition(MigrationState(number))
            return 0

        return self._migrating("a transition", step)

    def _on_read_data(self, _context: int, buffer: int, count: int) -> int:
        def step(handler: MigrationHandler) -> int:
            data = handler.read_data(count)
            if len(data) > count:
                raise MigrationRefused(f"the device gave {len(data)} bytes of state for {count}", errno.EIO)
            if data:
                ctypes.memmove(buffer, data, len(data))
            return len(data)

        return self._migrating("reading its state", step)

    def _on_write_data(self, _context: int, buffer: int, count: int) -> int:
        def step(handler: MigrationHandler) -> int:
            handler.write_data(ctypes.string_at(buffer, count) if count else b"")
            return count

        return self._migrating("writing its state", step)

    def is_region(self, iova: int, size: int) -> bool:
        """Whether the client offers exactly this memory."""
        region = self._regions.get(iova)
        return region is not None and region.size == size

    def smallest_region(self) -> int:
        """Bytes in the smallest region that we can reach; 0 without any."""
        return min((region.size for region in self._regions if region.mapping is not None), default=0)

    def mark_dirty(self, iova: int, size: int) -> None:
        """Tell the library that memory in one of its regions was written. Raises MigrationRefused if there is none."""
        assert self._context is not None
        entry, pointer = bindings.ScatterGather(), self._context.pointer
        found = self._vfu.vfu_addr_to_sgl(pointer, iova, size, ctypes.byref(entry), 1, bindings.PROT_WRITE)
        if found != 1:
            raise MigrationRefused(f"libvfio-user cannot mark {size} bytes at {iova:#x} as written", errno.EIO)
        self._vfu.vfu_sgl_mark_dirty(pointer, ctypes.byref(entry), 1)

    # -- writing through the client -------------------------------------------------------------------------------

    def _region_at(self, iova: int) -> Region:
        region = self._regions.find(iova)
        if region is None:
            raise AddressNotMapped(f"the client offers no memory at I/O address {iova:#x}")
        if not region.writable:
            raise AddressNotMapped(f"guest memory at I/O address {iova:#x} is read-only for the device")
        return region

    def _write_chunk(self, iova: int, chunk: bytes) -> None:
        assert self._context is not None
        entry = bindings.ScatterGather()
        pointer = self._context.pointer
        count = self._vfu.vfu_addr_to_sgl(pointer, iova, len(chunk), ctypes.byref(entry), 1, bindings.PROT_WRITE)
        if count != 1:
            reason = _errno_text() if count == -1 else "it spans several regions"
            raise AddressNotMapped(f"libvfio-user cannot resolve {len(chunk)} bytes at I/O address {iova:#x}: {reason}")
        if self._library.generation is Generation.OLD:
            # This generation sends the start of the region as the address, whatever the offset within it.
            entry.region_base += entry.offset
            result = self._vfu.vfu_sgl_write(pointer, ctypes.byref(entry), 1, chunk)
        else:
            result = self._vfu.vfu_sgl_write(pointer, ctypes.byref(entry), 1, chunk, 0)
        error = ctypes.get_errno()
        if result == 0:
            return
        if error in _REFUSALS and self._client is not None:
            raise ClientRefused(
                f"the client refused to write {len(chunk)} bytes at I/O address {iova:#x}: {os.strerror(error)}; "
                "the guest must have bus mastering on for the device"
            )
        # An answer that is not ours to read may have been half read: nothing after it can be trusted.
        problem = f"it did not take {len(chunk)} bytes for I/O address {iova:#x}: {os.strerror(error)}"
        self._disconnect(problem)
        raise ClientGone(f"the connection to the client was given up: {problem}")


def _on_log(_context: int, level: int, message: bytes) -> None:
    try:
        text = message.decode("utf-8", "replace")
        if _NOISE.search(text):
            severity = logging.DEBUG
        else:
            severity = logging.ERROR if level <= 3 else logging.WARNING if level == 4 else logging.DEBUG
        _library_logger.log(severity, "%s", text)
    except Exception:
        # There is nowhere left to report to.
        return


def _announced_transfer(version_request: bytes) -> int:
    """The largest data in bytes that the client takes in one message, from its VERSION request."""
    text = version_request[HEADER.size + 4 :].rstrip(b"\0")
    try:
        announced = json.loads(text)["capabilities"]["max_data_xfer_size"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return bindings.MAX_DATA_TRANSFER
    if type(announced) is not int or announced < 0:
        return bindings.MAX_DATA_TRANSFER
    return min(announced, bindings.MAX_DATA_TRANSFER)


def _with_shorter_transfers(version_reply: bytes) -> bytes:
    """The answer to VERSION with LONGEST_DATA in the place of the library's limit."""
    message_id, command, _, flags, error = HEADER.unpack_from(version_reply)
    start = HEADER.size + protocol.VERSION_PREFIX.size
    try:
        told = json.loads(version_reply[start:].rstrip(b"\0"))
        told["capabilities"]["max_data_xfer_size"] = min(told["capabilities"]["max_data_xfer_size"], LONGEST_DATA)
    except (ValueError, KeyError, TypeError, RecursionError):
        return version_reply
    body = version_reply[HEADER.size : start] + json.dumps(told, separators=(",", ":")).encode() + b"\0"
    return protocol.encode(message_id, command, body, flags=flags, error=error)


def _folder_for(socket_path: Path) -> Path | None:
    """Where a context may have its own socket for a moment: beside ours, if there is room for a name, else None.

    Whoever owns that directory clears it away if we are killed meanwhile.
    """
    folder = socket_path.absolute().parent
    if len(os.fsencode(folder)) + len("/.c-12345678/s") > LONGEST_PATH or not os.access(folder, os.W_OK | os.X_OK):
        return None
    return folder


def _errno_text() -> str:
    return os.strerror(ctypes.get_errno())
