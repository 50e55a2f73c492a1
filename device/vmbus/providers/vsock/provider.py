"""The provider of sockets: what is offered and asked for, bounds, status. See docs/provider-vsock.md."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec

from vmbus.bus.connects import Wish
from vmbus.errors import UsageError, VmbusError
from vmbus.kmcl.server import (
    SERVER_FLAG_ENUMERATE_DEVICE_INTERFACE,
    SERVER_FLAG_FORCE_NEW_CHANNEL,
    SERVER_FLAG_OFFER_AS_PIPE,
    SERVER_FLAG_TLNPI_PROVIDER_OFFER,
    ServerChannel,
)
from vmbus.kmcl.settings import FLAG_IS_PIPE
from vmbus.providers.base import Bound, Host, Provider, Timer
from vmbus.providers.vsock.connection import COUNTERS, Connection
from vmbus.providers.vsock.states import OPEN, State
from vmbus.providers.vsock.streams import BACKLOG, LINE_LIMIT, Stream, check_path, connect, parse_line
from vmbus.util.complaints import bounded_log
from vmbus.util.listening import Listener
from vmbus.wire.hvsock import offer_data, peer_port, port_of, service_of

log = bounded_log(__name__)

MOST_CONNECTIONS = 256
"""Connections at a time, programs of the host's that have not said yet where to among them."""
MOST_UNRELEASED = 1024
"""Connections that are over, whose channels the guest has not released."""
GUEST_SECONDS = 5.0
"""For the guest to open a channel that it has asked for."""
HOST_SECONDS = 2.0
"""For the guest to open a channel that a program of the host's has asked for."""
LINE_SECONDS = 30.0
"""For such a program to say where to."""
_ACCEPTED_PER_TURN = 16
_ACCEPT_AGAIN = 1.0  # seconds after which programs are taken again when no descriptor was left

_FLAGS = (
    SERVER_FLAG_ENUMERATE_DEVICE_INTERFACE
    | SERVER_FLAG_OFFER_AS_PIPE
    | SERVER_FLAG_TLNPI_PROVIDER_OFFER
    # A connection does not survive its processes: a restored device rescinds its channel.
    | SERVER_FLAG_FORCE_NEW_CHANNEL
)
# Where the host's own ports begin, which the guest sees at the other end.
_FIRST_PORT = 1 << 30


class VsockOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`path`: of the socket for programs of the host's; None: in the VM's run directory, by the provider's name."""

    path: str | None = None


class _Caller:
    """A program of the host's that has connected, and has not said yet where to."""

    def __init__(self, stream: Stream, timer: Timer) -> None:
        self.stream = stream
        self.timer = timer
        self.line = b""


class VsockProvider(Provider):
    """See the package's text."""

    kind = "vsock"
    Options = VsockOptions

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        chosen: VsockOptions = self.options
        self._own_place = chosen.path is None
        if chosen.path is not None:
            self.path = Path(chosen.path)
            if not self.path.is_absolute():
                raise UsageError(f"provider {name!r} (vsock): the path {chosen.path!r} is not an absolute one")
        elif host.run_directory is not None:
            self.path = host.run_directory / f"{name}.sock"
        else:
            raise UsageError(f"provider {name!r} (vsock): there is no run directory here, so give it a `path`")
        check_path(self.path)
        self._listener: Listener | None = None
        self._accepting = False
        self._again: Timer | None = None
        self._active = False
        self._callers: set[_Caller] = set()
        self._connections: set[Connection] = set()
        self._unreleased = 0
        self._next_port = _FIRST_PORT + int.from_bytes(os.urandom(3), "little")
        self._full = self._full_unreleased = 0
        names = ("from_guest", "from_host", "refused_by_guest", "refused_by_host", "turned_away")
        self.counters = dict.fromkeys((*names, *COUNTERS), 0)

    def start(self) -> None:
        self.host.serve_connects(self._asked)

    def activate(self) -> None:
        if self._listener is None:
            self._listener = Listener(self.path, backlog=BACKLOG)
        self._active = True
        self._look()

    def deactivate(self) -> None:
        self._active = False
        # A socket in the run directory is nobody else's: programs that connect meanwhile wait in its queue. Another
        # path may be wanted by the device's next process.
        if not self._own_place:
            self._close_listener()

    def stop(self) -> None:
        self._active = False
        self._close_listener()
        if self._again is not None:
            self._again.cancel()
            self._again = None
        for caller in list(self._callers):
            self._drop(caller)
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def _close_listener(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            self._watch(listener, False)
            listener.close()

    # ---- room ------------------------------------------------------------------------------------------------------

    @property
    def _count(self) -> int:
        return len(self._connections) + len(self._callers)

    @property
    def _room(self) -> bool:
        return self._count < MOST_CONNECTIONS and self._unreleased < MOST_UNRELEASED

    def _look(self) -> None:
        """Programs of the host's are taken while there is room; the others wait in the socket's queue."""
        if self._listener is not None and self._again is None:
            self._watch(self._listener, self._room)

    def _watch(self, listener: Listener, wanted: bool) -> None:
        if wanted is not self._accepting:
            self._accepting = wanted
            if wanted:
                self.host.add_reader(listener.socket.fileno(), self._accept)
            else:
                self.host.remove_reader(listener.socket.fileno())

    def _was_full(self) -> None:
        if self._count >= MOST_CONNECTIONS:
            self._full += 1
        else:
            self._full_unreleased += 1

    # ---- from the host ---------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        listener = self._listener
        for _ in range(_ACCEPTED_PER_TURN):
            if listener is None:
                return
            if not self._room:
                self._was_full()
                break
            try:
                client = listener.accept()
            except OSError as error:
                log.warning("provider %s: no program can be taken at %s: %s", self.name, self.path, error.strerror)
                self._watch(listener, False)
                self._again = self.host.call_later(_ACCEPT_AGAIN, self._accept_again)
                return
            if client is None:
                break
            self._greet(Stream(client))
        self._look()

    def _accept_again(self) -> None:
        self._again = None
        self._look()

    def _greet(self, stream: Stream) -> None:
        caller = _Caller(stream, self.host.call_later(LINE_SECONDS, lambda: self._turn_away(caller)))
        self._callers.add(caller)
        self.host.add_reader(stream.fd, lambda: self._said(caller))

    def _said(self, caller: _Caller) -> None:
        # One byte at a time: what is behind the line is the connection's.
        while b"\n" not in caller.line:
            data = caller.stream.read(1) if len(caller.line) < LINE_LIMIT else b""
            if data is None:
                return
            if not data:
                self._turn_away(caller)
                return
            caller.line += data
        port = parse_line(caller.line[:-1])
        if port is None:
            self._turn_away(caller)
            return
        self._forget(caller)
        self._connect_guest(caller.stream, port)
        self._look()

    def _turn_away(self, caller: _Caller) -> None:
        self.counters["turned_away"] += 1
        self._drop(caller)

    def _drop(self, caller: _Caller) -> None:
        self._forget(caller)
        caller.stream.close()
        self._look()

    def _forget(self, caller: _Caller) -> None:
        self._callers.discard(caller)
        caller.timer.cancel()
        self.host.remove_reader(caller.stream.fd)

    def _connect_guest(self, stream: Stream, port: int) -> None:
        own = self._next_port
        self._next_port = _FIRST_PORT + (own + 1) % _FIRST_PORT

        def opened(connection: Connection) -> Stream | None:
            self.counters["from_host"] += 1
            stream.write([b"OK %d\n" % own])  # there is room for it: nothing was written before
            return stream

        def over(connection: Connection) -> None:
            # The program is told without a word, by the end of its stream, as the convention has it.
            self.counters["refused_by_guest"] += not connection.was_open

        instance = UUID(bytes_le=own.to_bytes(4, "little") + os.urandom(12))
        channel = self._channel(service_of(port), instance, f"{self.name}-to-{port}-{own}", from_host=True)
        connection = Connection(self.host, channel, port, self.counters, stream, opened, over, self._ended)
        if not self._offer(connection, HOST_SECONDS):
            stream.close()

    # ---- from the guest --------------------------------------------------------------------------------------------

    def _asked(self, wish: Wish) -> bool:
        port = port_of(wish.service)
        if port is None:
            return False
        if not self._room:
            self._was_full()
        if not self._active or not self._room:
            wish.refuse()
            return True

        def opened(connection: Connection) -> Stream | None:
            wish.end()
            stream = connect(self.path, connection.port)
            self.counters["refused_by_host" if stream is None else "from_guest"] += 1
            return stream

        name = f"{self.name}-from-{port}-{peer_port(wish.endpoint)}"
        channel = self._channel(wish.service, wish.endpoint, name, from_host=False)
        connection = Connection(
            self.host, channel, port, self.counters, None, opened, lambda _: wish.end(), self._ended
        )
        if not self._offer(connection, GUEST_SECONDS):
            wish.refuse()
        return True

    # ---- both ------------------------------------------------------------------------------------------------------

    def _channel(self, service: UUID, instance: UUID, name: str, *, from_host: bool) -> ServerChannel:
        channel = ServerChannel(service, instance, name=name)
        channel.set_flags(FLAG_IS_PIPE)
        channel.set_server_flags(_FLAGS)
        channel.user_defined = offer_data(from_host=from_host)
        return channel

    def _offer(self, connection: Connection, seconds: float) -> bool:
        """Whether there is something that the guest can open."""
        try:
            connection.offer(seconds)
        except VmbusError as error:  # the guest's endpoint is in use, or the device has no relid left
            log.warning("provider %s: a connection is refused: %s", self.name, error)
            self.host.remove_channel(connection.channel)
            return False
        self._connections.add(connection)
        return True

    def _ended(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._unreleased += 1
        self.host.remove_channel(connection.channel, self._released)
        self._look()

    def _released(self) -> None:
        self._unreleased -= 1
        self._look()

    # ---- what tools are told ---------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        states = [connection.state for connection in self._connections]
        return {
            "socket": str(self.path),
            "connections": sum(state in OPEN for state in states),
            "connecting": states.count(State.OFFERED) + len(self._callers),
            "ending": states.count(State.ENDING),
            "unreleased": self._unreleased,
            "kept": sum(connection.kept for connection in self._connections),
            **self.counters,
        }

    def bounds(self) -> dict[str, Bound]:
        return {
            "connections": Bound(self._count, MOST_CONNECTIONS, self._full),
            "unreleased channels": Bound(self._unreleased, MOST_UNRELEASED, self._full_unreleased),
        }
