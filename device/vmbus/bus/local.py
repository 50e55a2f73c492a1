"""Channels within one process: a server channel and a client channel joined over private memory, without a guest.

Two uses. Providers of one device server talk to each other: a channel offered with LOOPBACK_OFFER is found here, by
the client channel of another provider. And tests of a provider need no guest: `run` pumps both ends until they are
quiet, and `save_and_restore` puts a fresh server end in the place of the old one, through the same chunks that a save
of a whole device writes.

Rings, packets, signals and GPADLs are the real ones; only the bus between the ends is short-cut. Nothing here blocks
but `wait`, and what needs it (`close`, `delete_gpadl`).
"""

import time
from collections.abc import Callable

from vmbus.bus.connection import Connection, LocalBuffer
from vmbus.bus.replacing import Key, Restored, key_of, put_back, save_channels
from vmbus.errors import StateError, UsageError, WaitTimeout
from vmbus.kmcl.channel import Channel, Waiter
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.saved import ChannelRecord
from vmbus.kmcl.server import ServerChannel
from vmbus.kmcl.status import KmclError, Status
from vmbus.kmcl.turns import one_round
from vmbus.memory.guest import GuestMemory
from vmbus.ring import RingCorrupt
from vmbus.util.complaints import bounded_log
from vmbus.util.pieces import Pieces, at_once
from vmbus.wire.gpa import PAGE_SIZE

log = bounded_log(__name__)

BASE = 0x1000_0000
DEFAULT_TIMEOUT = 30.0  # seconds
TURNS = 100_000

_OPEN = (ChannelState.OPENED, ChannelState.ACTIVE)


class LocalBus:
    """Joins server channels and client channels of one process.

    Attributes:
        on_rescind: called with a client channel whose server end went away; it is disabled, and may be opened again.
        on_failed: called with a channel that failed, and the reason.
    """

    def __init__(
        self,
        schedule: Callable[[], None] | None = None,
        *,
        waiter: Waiter | None = None,
        idle: Callable[[], bool] | None = None,
    ) -> None:
        """
        Args:
            schedule: called when a turn is wanted: have `service` called soon. None: somebody calls `run`.
            waiter: how blocking calls wait; None: by `run`ning this bus alone.
            idle: for `wait` and `run` on their own: what else may make progress (timers that run out), called when
                the bus is quiet. Returns whether it did anything.
        """
        self.server_memory = GuestMemory()
        self.client_memory = GuestMemory()
        self.on_rescind: Callable[[ClientChannel], None] | None = None
        self.on_failed: Callable[[Channel, str], None] | None = None
        self._schedule = schedule
        self._waiter = waiter
        self._idle = idle
        self._next_iova = BASE
        self._offers: list[ServerChannel] = []
        self._bound: dict[int, ServerChannel] = {}
        self._connections: list[Connection] = []
        self._lost: list[Connection] = []
        self._waiting: list[ClientChannel] = []
        self._opening = False
        self._ready: dict[Channel, None] = {}

    # ---- memory ----------------------------------------------------------------------------------------------------

    def allocate(self, size: int) -> LocalBuffer:
        """Zeroed memory of the client's; `size` is a multiple of 4096 bytes. Raises UsageError for another size."""
        if size <= 0 or size % PAGE_SIZE:
            raise UsageError(f"local memory comes in pages of {PAGE_SIZE} bytes; {size} were asked for")
        buffer = LocalBuffer(self._next_iova, memoryview(bytearray(size)))
        # A page stays free between buffers, so that running over the end of one is a fault.
        self._next_iova += size + PAGE_SIZE
        self.server_memory.map(buffer.iova, buffer.view, True)
        self.client_memory.map(buffer.iova, buffer.view, True)
        return buffer

    def free(self, buffer: LocalBuffer) -> None:
        """Give memory of `allocate` back."""
        self.server_memory.unmap(buffer.iova, buffer.size)
        self.client_memory.unmap(buffer.iova, buffer.size)

    # ---- offers ----------------------------------------------------------------------------------------------------

    def offer(self, server: ServerChannel) -> None:
        """Tie a disabled server channel to this bus, as a device does with `add_channel`: `enable` then offers it."""
        server.bind(self.enabled, self.disabled)
        if server.waiter is None:
            server.waiter = self.wait
        self._bound[id(server)] = server

    def offer_enabled(self, server: ServerChannel) -> None:
        """For a device: one of its channels, just enabled, is offered here."""
        self._bound[id(server)] = server
        self.enabled(server)

    def enabled(self, server: ServerChannel) -> None:
        """A server channel is offered. Raises UsageError for a second one of the same instance and sub-channel."""
        if any(key_of(other) == key_of(server) for other in self._offers):
            raise UsageError(
                f"sub-channel {server.subchannel_index} of instance {server.interface_instance} is offered already"
            )
        if server.subchannel_index and self._primary(server) is None:
            raise UsageError(f"channel {server.name} is a sub-channel, and its primary is not open")
        self._offers.append(server)
        if self._waiting:
            self._want()

    def _primary(self, server: ServerChannel) -> Connection | None:
        for connection in self._connections:
            if key_of(connection.server) == (server.interface_instance.bytes_le, 0):
                return connection
        return None

    def disabled(self, server: ServerChannel) -> None:
        """A server channel is withdrawn; the client end that has it open is closed and disabled."""
        if server not in self._offers:
            return
        self._offers.remove(server)
        for connection in list(self._connections):
            if connection.server is server:
                self._break(connection)

    @property
    def offers(self) -> list[ServerChannel]:
        """What is offered, in the order in which it was."""
        return list(self._offers)

    def attach(self, client: ClientChannel) -> None:
        """Tie a disabled client channel to this bus: `enable` then has it opened, at a turn, once its offer is there.

        A server end that refuses it is told to the client's pnp_failure callback.
        """
        client.bind(self._client_enabled)
        if client.waiter is None:
            client.waiter = self.wait

    def _client_enabled(self, client: ClientChannel) -> None:
        if not self._opening:
            self._waiting.append(client)
            self._want()

    def _open_waiting(self) -> None:
        for client in list(self._waiting):
            if client.state is not ChannelState.CLOSED:
                self._waiting.remove(client)
                continue
            server = self._match(client)
            if server is None:
                continue
            self._waiting.remove(client)
            try:
                self._join(server, client)
            except Exception as error:
                client.connection_failed(error.status if isinstance(error, KmclError) else Status.UNSUCCESSFUL)

    def open(self, client: ClientChannel) -> None:
        """Open the offered channel of the client's type (and instance, and sub-channel); enables the client if need be.

        Both ends are open when this returns, and the client is active. Raises UsageError when there is no such offer
        or it is open already, and whatever the server's opened callback raises to refuse; the client is then disabled.
        """
        if client.waiter is None:
            client.waiter = self.wait
        if client.state is ChannelState.DISABLED:
            self._opening = True
            try:
                client.enable()
            finally:
                self._opening = False
        try:
            server = self._match(client)
            if server is None:
                known = [(str(server.interface_type), str(server.interface_instance)) for server in self._offers]
                raise UsageError(
                    f"nothing that channel {client.name} could open is offered: it wants type {client.interface_type}, "
                    f"instance {client.interface_instance or 'any'}, sub-channel {client.subchannel_index}; offered "
                    f"are {known}"
                )
            self._join(server, client)
        except BaseException:
            client.disable()
            raise

    def _match(self, client: ClientChannel) -> ServerChannel | None:
        in_use = [connection.server for connection in self._connections]
        for server in self._offers:
            if (
                server.interface_type == client.interface_type
                and client.interface_instance in (None, server.interface_instance)
                and server.subchannel_index == client.subchannel_index
                and server not in in_use
            ):
                return server
        return None

    def _join(self, server: ServerChannel, client: ClientChannel) -> None:
        connection = Connection(self, server, client)
        try:
            server.open(connection.server_link)
        except BaseException:
            connection.let_go()
            raise
        self._connections.append(connection)
        client.open(connection.client_link)
        server.activate()
        client.activate()

    def close(self, client: ClientChannel, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Close a channel from the client's end, its sub-channels before it, and disable the client.

        Waits until the owners of both ends have completed what they hold. Raises WaitTimeout, and UsageError when the
        client is not open here.
        """
        connection = self._connection_of(client)
        for other in self._subchannels(connection.server):
            self.close(other.client, timeout)
        closed: list[str] = []
        client.quiesce()
        connection.server.close(lambda: closed.append("server"))
        client.close(lambda: closed.append("client"))
        client.quiescing = False
        self.wait(lambda: len(closed) == 2, timeout, f"both ends of channel {client.name} to complete their packets")
        if connection in self._connections:
            self._connections.remove(connection)
            connection.let_go()
            client.disable(timeout)

    def drop(self, client: ClientChannel) -> None:
        """Close both ends by force, and disable the client; one that waits for its offer waits no more."""
        if client in self._waiting:
            self._waiting.remove(client)
        for connection in list(self._connections):
            if connection.client is client:
                self._break(connection)
        if client.state is ChannelState.CLOSED:
            client.disable()

    def _subchannels(self, server: ServerChannel) -> list[Connection]:
        if server.subchannel_index:
            return []
        return [
            connection
            for connection in self._connections
            if connection.server is not server and connection.server.interface_instance == server.interface_instance
        ]

    def _connection_of(self, channel: Channel) -> Connection:
        for connection in self._connections:
            if channel in (connection.client, connection.server):
                return connection
        raise UsageError(f"channel {channel.name} is not open on this local bus")

    def lost(self, connection: Connection, channel: Channel, reason: str) -> None:
        """One end has failed: the other end goes at the next turn."""
        if self.on_failed is not None:
            self.on_failed(channel, reason)
        self._lost.append(connection)
        self._want()

    def _break(self, connection: Connection) -> None:
        """Close by force whatever is still open of a connection, sub-channels first."""
        if connection not in self._connections:
            return
        for other in self._subchannels(connection.server):
            self._break(other)
        self._connections.remove(connection)
        for channel in (connection.server, connection.client):
            if channel.state in (*_OPEN, ChannelState.CLOSING):
                channel.close(lambda: None, force=True)
        connection.let_go()
        if connection.client.state is ChannelState.CLOSED:
            connection.client.disable()
        if self.on_rescind is not None:
            self.on_rescind(connection.client)

    # ---- turns -----------------------------------------------------------------------------------------------------

    def wake(self, channel: Channel) -> None:
        """Give a channel a turn at the next `service`."""
        self._ready[channel] = None
        self._want()

    def _want(self) -> None:
        if self._schedule is not None:
            self._schedule()

    @property
    def busy(self) -> bool:
        return bool(self._ready or self._lost or any(self._match(client) for client in self._waiting))

    def service(self) -> None:
        """One turn for every channel that asked for it."""
        while self._lost:
            self._break(self._lost.pop(0))
        if self._waiting:
            self._open_waiting()
        try:
            one_round(self._ready)
        finally:
            if self.busy:
                self._want()

    def run(self, turns: int = TURNS) -> None:
        """Turns until both ends of all connections are quiet. Raises UsageError when they never are."""
        for _ in range(turns):
            if not self.busy:
                return
            self.service()
        raise UsageError(f"the channels of this local bus never become quiet: {turns} turns were not enough")

    def wait(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        """Pump until `condition()` holds. Raises WaitTimeout, at once when nothing is left that could make it hold."""
        if self._waiter is not None:
            self._waiter(condition, timeout, what)
            return
        deadline = time.monotonic() + timeout
        while not condition():
            if self.busy:
                self.service()
            elif self._idle is None or not self._idle():
                raise WaitTimeout(f"{what} (nothing is left to be done that could bring it)", timeout)
            if time.monotonic() > deadline:
                raise WaitTimeout(what, timeout)

    # ---- save and restore ------------------------------------------------------------------------------------------

    def save(self) -> list[ChannelRecord]:
        """Hold all server channels and write them down, as a save of the device does.

        Raises UsageError when incoming packets are held by a server that does not complete them when suspended, and
        what the channels raise.
        """
        for server in self._offers:
            server.quiesce()
        held = {server.name: server.outstanding for server in self._offers if not server.quiescent}
        if held:
            for server in self._offers:
                server.unquiesce()
            raise UsageError(f"incoming packets {held} are not completed: the owner has to, when it is suspended")
        for server in self._offers:
            server.check_rings()
        while self._lost:
            self._break(self._lost.pop(0))
        return at_once(save_channels(self._offers))

    def replace(
        self,
        saved: list[ChannelRecord],
        make_server: Callable[[], ServerChannel | None],
        before_packets: Callable[[], None] | None = None,
        after_packets: Callable[[], None] | None = None,
    ) -> Restored:
        """Put fresh server ends in the place of those that `save` has written down, as a fresh process does.

        The old ones are abandoned, as they would be by a process that ends. Then `make_server` makes the channels again
        (`offer` and `enable`; the one that it returns is offered and enabled if that was not done), `before_packets`
        gives the owner its own state back, and each channel's packets come through its restore callback;
        `after_packets` is called before any of them is started. The clients notice nothing, except those of channels
        with force_new_channel, or with rings that were overwritten: they are rescinded, and their packets on the server
        end are dropped. Of these, one that is not made again is gone.

        Raises StateError when another channel is not made again.
        """
        old = list(self._connections)
        for connection in old:
            connection.abandon_server()
            self._ready.pop(connection.server, None)
        self._offers.clear()
        self._bound.clear()
        made = make_server()
        if made is not None:
            if id(made) not in self._bound:
                self.offer(made)
            if made.state is ChannelState.DISABLED:
                made.enable()
        restored = at_once(
            put_back(
                _Replacement(self, old, saved),
                {record.key: record.decoded for record in saved},
                _calling(before_packets or _nothing),
                after_packets or _nothing,
            )
        )
        for connection in self._connections:
            self.wake(connection.server)
            self.wake(connection.client)
        return restored

    def save_and_restore(self, make_server: Callable[[], ServerChannel | None]) -> Restored:
        """`save`, then `replace`."""
        return self.replace(self.save(), make_server)

    def reattach(
        self, connection: Connection, server: ServerChannel, record: ChannelRecord, broken: dict[Key, str]
    ) -> bool:
        """For `replace`: put a fresh server end on the rings of a connection. False: made anew, the client is told; if
        the rings are to blame, `broken` says why."""
        renewed = server.force_new_channel or record.decoded.head.force_new
        if not renewed:
            try:
                connection.replace_server(server, record.own_indices)
            except RingCorrupt as error:
                log.error("channel %s is made anew: its rings were overwritten: %s", server.name, error)
                broken[record.key] = str(error)
                renewed = True
        if renewed:
            self.abandon(connection)
        return not renewed

    def abandon(self, connection: Connection) -> None:
        """For `replace`: the old server end lives no more, so only the client's end is closed."""
        self._forget_server(connection)
        self._break(connection)

    def _forget_server(self, connection: Connection) -> None:
        for other in self._subchannels(connection.server):
            self._forget_server(other)
        connection.server = ServerChannel(
            connection.server.interface_type,
            connection.server.interface_instance,
            name=connection.server.name,
            subchannel_index=connection.server.subchannel_index,
        )


class _Replacement:
    """Implements `vmbus.bus.replacing.Carrier` for the server ends of a local bus."""

    def __init__(self, bus: LocalBus, connections: list[Connection], saved: list[ChannelRecord]) -> None:
        self._bus = bus
        self._connections = [(key_of(one.server), one) for one in connections]
        self._records = {record.key: record for record in saved}
        self.renewed: set[Key] = set()
        self.lost: set[Key] = set()
        self.broken: dict[Key, str] = {}

    @property
    def channels(self) -> list[ServerChannel]:
        """Those that are offered again."""
        return self._bus.offers

    def reattach(self, *, primaries: bool) -> Pieces[None]:
        """Raises StateError for an open channel that was not made again."""
        servers = {key_of(server): server for server in self.channels}
        for key, connection in self._connections:
            yield
            if primaries is not (key[1] == 0) or key in self.renewed:
                continue
            server = servers.get(key)
            if server is None:
                if not self._records[key].decoded.head.force_new:
                    raise StateError(f"channel {connection.server.name} is open, and was not made again")
                self._bus.abandon(connection)
            elif self._bus.reattach(connection, server, self._records[key], self.broken):
                continue
            # Sub-channels share the fate of their primary.
            gone = {other for other, _ in self._connections if other == key or (primaries and other[0] == key[0])}
            self.renewed |= gone
            if key in self.broken:
                self.lost |= gone


def _nothing() -> None:
    pass


def _calling(call: Callable[[], None]) -> Pieces[None]:
    call()
    yield
