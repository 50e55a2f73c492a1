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
* Interrupts are MSI only. ERR and REQ have no vectors: the 2022 generation would put the client's ERR eventfd in the
  place of vector 0.
* Views of guest memory are over our own second mapping, see `mapping`.

Beside it are `doorway` (clients before their handshake), `library_context` (the library's object) and `callbacks` (what
that calls).
"""

from __future__ import annotations

import enum
import errno
import os
import select
import socket
import time
from itertools import islice
from math import inf
from pathlib import Path

from vmbus.errors import EnvironmentProblem, UsageError, VmbusError
from vmbus.transport import bindings
from vmbus.transport.callbacks import Callbacks
from vmbus.transport.connection import Timer, Waiting, look, receive, take_posted_writes
from vmbus.transport.doorway import Doorway, Pending, announced_transfer, with_shorter_transfers
from vmbus.transport.handler import DeviceAccessError, DeviceHandler, ResetKind
from vmbus.transport.library import Generation, Library
from vmbus.transport.library_context import AddressNotMapped, LibraryContext, folder_for
from vmbus.transport.mapping import any_lost
from vmbus.transport.migration import FeatureGate, MigrationHandler
from vmbus.transport.offers import Region
from vmbus.transport.requests import Requests
from vmbus.util.complaints import bounded_log
from vmbus.util.listening import Listener, folder_of, listening

__all__ = [
    "AddressNotMapped",
    "ClientBusy",
    "ClientGone",
    "ClientRefused",
    "Context",
    "DeviceAccessError",
    "DeviceHandler",
    "ResetKind",
    "RunResult",
]

logger = bounded_log(__name__)

DEFAULT_MAX_DMA_REGIONS = 16384
"""For the new generation. Every region costs two memory areas, of which a process may have 65530 by default."""
# Errors that only the client's answer can be, so that the stream is in step after them.
_REFUSALS = frozenset({errno.ENODEV, errno.ENXIO, errno.EFAULT, errno.EACCES, errno.ENOENT})


class RunResult(enum.Enum):
    IDLE = enum.auto()
    """Nothing waits; wait for `poll_fd`."""
    MORE = enum.auto()
    """The batch is full; more may wait."""
    DISCONNECTED = enum.auto()
    """The client is gone. The handler has been told, and the next client can connect."""


class ClientGone(VmbusError):
    """The connection ended (or had to be ended) during an operation that needs it."""


class ClientBusy(VmbusError):
    """The client has a request in flight, so that a message to it would garble the stream."""


class ClientRefused(VmbusError):
    """The client answered a write to guest memory with an error; the connection is intact.

    QEMU does so while the guest has bus mastering off.
    """


class Context:
    """A PCI function with a memory BAR of `bar0_size` bytes and `msi_vectors` MSI vectors, listening on `socket_path`.

    A socket that was handed over (`vmbus.util.listening`) may take the path's place. Raises EnvironmentProblem if the
    socket cannot be had or the library refuses the set-up.
    """

    def __init__(
        self,
        library: Library,
        socket_path: Path | Listener,
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
        # The 2022 generation has another kind of migration, which no client uses.
        migration = migration if library.generation is Generation.NEW else None
        self._calls = Callbacks(handler, migration)
        self._regions = self._calls.regions
        self._gate = FeatureGate(migration, self)
        self._bar0_size = bar0_size
        self._msi_vectors = msi_vectors
        self._max_dma_regions = max_dma_regions
        self._message_timeout = message_timeout
        self._client: socket.socket | None = None
        self._requests: Requests  # the client's, while there is one
        self._stall_deadline: float | None = None
        self._max_transfer = bindings.MAX_DATA_TRANSFER
        self._closed = False
        self._folder = folder_for(folder_of(socket_path))
        self._context: LibraryContext | None = self._create()
        try:
            self._listener = listening(socket_path, make_directory=True)
        except BaseException:
            self._destroy()
            raise
        # One descriptor for whatever we wait for, so that the event loop never has to follow our changes.
        self._epoll = select.epoll()
        self._timer = Timer()
        self._epoll.register(self._timer.fd, select.EPOLLIN)
        self._doorway = Doorway(self._listener, self._epoll, handshake_timeout, message_timeout)

    # -- for the event loop ---------------------------------------------------------------------------------------

    def poll_fd(self) -> int:
        """A descriptor that is readable whenever `attach` or `run` has something to do. It never changes."""
        return self._epoll.fileno()

    @property
    def attached(self) -> bool:
        """Whether a client is connected and has shaken hands."""
        return self._client is not None

    @property
    def deserted(self) -> bool:
        """Whether the only client that could come has come and is gone."""
        return self._listener.spent and self._client is None and not self._doorway.pending

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
        self._doorway.let_in()
        for pending, size in self._doorway.ready():
            if self._shake_hands(pending, size):
                return True
        self._doorway.open()
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
                    self._calls.posted(writes, self._bar0_size)
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
                done, problem = self._requests.watched(watched, size, max_requests - handled)
                if problem is not None:
                    return self._disconnect(problem)
                handled += done
                continue
            for _ in range(min(messages, max_requests - handled)):
                handled += 1
                if (problem := self._requests.library()) is not None:
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
        return self._context.trigger(vector)

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
        self._doorway.close()
        self._listener.close()
        self._timer.close()
        self._epoll.close()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- connections ----------------------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self._calls.inside:
            raise UsageError("the transport cannot be driven from within one of its own callbacks")
        if self._closed:
            raise UsageError(f"the transport on {self._listener.path} is closed")

    def _drain_events(self) -> None:
        # Edge-triggered entries stay "ready" towards the outer event loop until they are collected here.
        self._epoll.poll(0)

    def _set_timer(self) -> None:
        deadlines = self._doorway.deadlines if self._client is None else []
        if self._stall_deadline is not None:
            deadlines.append(self._stall_deadline)
        self._timer.set(min(deadlines) - time.monotonic() if deadlines else None)

    def _shake_hands(self, pending: Pending, size: int) -> bool:
        """Relay the VERSION exchange, then give the library the client's socket. False if the client is dropped."""
        if self._context is None:
            self._context = self._create_if_possible()
            if self._context is None:
                self._doorway.drop(pending, "nothing can be set up for it")
                return False
        client, context, private = pending.socket, self._context, self._context.private
        request, stray = receive(client, size, socket.MSG_WAITALL)
        for fd in stray:
            os.close(fd)
        private.sendall(request)
        problem = context.attach()
        try:
            reply, fds = receive(private, bindings.MAX_MESSAGE, socket.MSG_DONTWAIT)
            if problem is None and self._calls.migration is not None:
                reply = with_shorter_transfers(reply)
            try:
                socket.send_fds(client, [reply], fds)
            finally:
                for fd in fds:
                    os.close(fd)
        except OSError as error:
            problem = problem or f"the answer to its VERSION message could not be sent ({error})"
        if problem is not None:
            self._doorway.drop(pending, f"handshake failed: {problem}")
            self._destroy()
            self._context = self._create_if_possible()
            return False
        context.read_from(client)
        private.close()
        self._client = client
        self._calls.lost_reported = False
        self._gate = FeatureGate(self._calls.migration, self)
        self._requests = Requests(client, context, self._calls, self._gate, self._message_timeout)
        self._max_transfer = announced_transfer(request)
        self._doorway.shut(pending)
        self._epoll.modify(client.fileno(), select.EPOLLIN)
        self._set_timer()
        logger.info("client attached on %s", self._listener.path)
        return True

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
        if len(first) > room and self._requests.unmap(first[:room]) is None:
            return RunResult.MORE
        return self._disconnect(problem)

    def _disconnect(self, problem: str | None) -> RunResult:
        if problem:
            logger.error("client on %s dropped: %s", self._listener.path, problem)
        else:
            logger.info("client on %s left", self._listener.path)
        self._end_connection()
        self._destroy()
        self._doorway.cool(1)
        self._context = self._create_if_possible()
        self._doorway.open()
        self._set_timer()
        self._calls.raise_escaped()
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
            self._calls.unmap(region)
        self._calls.report_lost()

    def _create(self) -> LibraryContext:
        return LibraryContext(
            self._library,
            self._calls,
            self._folder,
            bar0_size=self._bar0_size,
            msi_vectors=self._msi_vectors,
            max_dma_regions=self._max_dma_regions,
        )

    def _create_if_possible(self) -> LibraryContext | None:
        """For the next client. Whoever comes while there is none is dropped, and it is tried again."""
        try:
            return self._create()
        except (OSError, EnvironmentProblem) as error:
            logger.warning("no client can be served on %s for now: %s", self._listener.path, error)
            return None

    def _destroy(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.destroy()

    # -- for the gate ---------------------------------------------------------------------------------------------

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
        self._context.mark_dirty(iova, size)

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
        error = self._context.write(iova, chunk)
        if error == 0:
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
