"""One connection of a local bus: a server channel and a client channel, and the memory that joins them."""

from collections.abc import Callable, Sequence
from typing import Protocol

from vmbus.bus.client import FIRST_GPADL
from vmbus.bus.gpadl import Gpadl, GpadlError, Mappings
from vmbus.kmcl.channel import DEFAULT_TIMEOUT, Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.server import ServerChannel
from vmbus.memory.guest import Grant, GuestMemory, Window
from vmbus.ring import FEATURE_BITS, FEATURE_PENDING_SEND_SIZE, RingReader, RingWriter
from vmbus.wire.gpa import PAGE_SIZE, range_for


class LocalBuffer:
    """Private memory that both ends of a local bus can reach; implements the guest's `DmaBuffer`.

    Attributes:
        iova: its address, for external data and GPADLs. size: bytes, a multiple of 4096. view: its bytes, writable.
    """

    __slots__ = ("iova", "size", "view")

    def __init__(self, iova: int, view: memoryview) -> None:
        self.iova = iova
        self.size = len(view)
        self.view = view


class Bus(Protocol):
    """What a connection needs of its bus: see `vmbus.bus.local.LocalBus`."""

    server_memory: GuestMemory
    client_memory: GuestMemory

    def allocate(self, size: int) -> LocalBuffer:
        """Memory for rings."""

    def free(self, buffer: LocalBuffer) -> None:
        """Give it back."""

    def wake(self, channel: Channel) -> None:
        """Give a channel a turn."""

    def lost(self, connection: "Connection", channel: Channel, reason: str) -> None:
        """One end has failed."""

    def close(self, client: ClientChannel, timeout: float) -> None:
        """Close a channel from the client's end."""

    def wait(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        """Pump until the condition holds."""


class _Link:
    """One end of a connection: implements `vmbus.kmcl.channel.Link`."""

    def __init__(
        self, connection: "Connection", channel: Channel, memory: GuestMemory, reader: RingReader, writer: RingWriter
    ) -> None:
        self._connection = connection
        self._channel = channel
        self.memory = memory
        self.reader = reader
        self.writer = writer
        self.mappings = Mappings(memory)
        self.dead = False

    def signal(self) -> None:
        """The other end is to look at its rings."""
        if not self.dead:
            connection = self._connection
            other = connection.client if self._channel is connection.server else connection.server
            connection.bus.wake(other)

    def wake(self) -> None:
        if not self.dead:
            self._connection.bus.wake(self._channel)

    def failed(self, reason: str) -> None:
        """This end has closed because of the other one (or its owner)."""
        if not self.dead:
            self._connection.bus.lost(self._connection, self._channel, reason)

    def map_gpadl(self, handle: int, read_only: bool) -> Grant:
        """See `vmbus.bus.gpadl.Mappings.map`."""
        return self.mappings.map(self._gpadl(handle), read_only=read_only)

    def open_gpadl(self, handle: int, most: int) -> Window:
        """See `vmbus.bus.gpadl.Mappings.open`."""
        return self.mappings.open(self._gpadl(handle), most)

    def _gpadl(self, handle: int) -> Gpadl:
        gpadl = self._connection.gpadls.get(handle)
        if gpadl is None or handle in self._connection.deleting or self._channel is not self._connection.server:
            raise GpadlError(f"channel {self._channel.name} has no GPADL {handle:#x} to be mapped")
        return gpadl

    def unmap_gpadl(self, handle: int) -> None:
        """See `vmbus.bus.gpadl.Mappings.unmap`."""
        self.mappings.unmap(handle)

    def create_gpadl(self, extents: Sequence[tuple[int, int]], read_only: bool) -> int:
        """Describe memory of `LocalBus.allocate` to the server end. Raises GpadlError."""
        if self._channel is not self._connection.client:
            raise GpadlError(f"channel {self._channel.name}: only the client's end can describe memory")
        return self._connection.create_gpadl(extents)

    def delete_gpadl(self, handle: int) -> None:
        """Take memory back; waits while the server end has it mapped. Raises GpadlError and WaitTimeout."""
        self._connection.delete_gpadl(handle)

    def close_channel(self, timeout: float) -> None:
        """Close from the client's end, see `LocalBus.close`."""
        self._connection.bus.close(self._connection.client, timeout)


class Connection:
    """A server channel and the client channel that has opened it."""

    def __init__(self, bus: Bus, server: ServerChannel, client: ClientChannel) -> None:
        self.bus = bus
        self.server = server
        self.client = client
        self.out_pages = client.ring_pages_out + 1
        self.rings = bus.allocate((self.out_pages + client.ring_pages_in + 1) * PAGE_SIZE)
        self.gpadls: dict[int, Gpadl] = {}
        self.deleting: set[int] = set()
        self._next_gpadl = FIRST_GPADL
        for start in (0, self.out_pages * PAGE_SIZE):
            self.rings.view[start + FEATURE_BITS] = FEATURE_PENDING_SEND_SIZE
        self.server_link = self.link(server)
        self.client_link = self.link(client)

    def link(self, channel: Channel, own: tuple[int | None, int | None] = (None, None)) -> _Link:
        """A fresh end on the rings, whatever is in them; `own`: the indices of that end which they must have.

        Raises RingCorrupt.
        """
        is_server = channel is self.server
        memory = self.bus.server_memory if is_server else self.bus.client_memory
        base, split, size = self.rings.iova, self.out_pages * PAGE_SIZE, self.rings.size
        windows = [
            memory.window([(base + start, length)])
            for start, length in (
                (0, PAGE_SIZE),
                (PAGE_SIZE, split - PAGE_SIZE),
                (split, PAGE_SIZE),
                (split + PAGE_SIZE, size - split - PAGE_SIZE),
            )
        ]
        up, down = windows[:2], windows[2:]
        incoming, outgoing = (up, down) if is_server else (down, up)
        reader, writer = RingReader(*incoming, own=own[0]), RingWriter(*outgoing, own=own[1])
        return _Link(self, channel, memory, reader, writer)

    def abandon_server(self) -> None:
        """As by a process that ends: the server's end of the rings is nobody's, until another one takes them up."""
        link = self.server_link
        link.dead = True
        link.mappings.clear()
        link.reader.close()
        link.writer.close()

    def replace_server(self, server: ServerChannel, own: tuple[int | None, int | None]) -> None:
        """Put a fresh server end on the rings. Raises RingCorrupt when they do not have the indices `own`."""
        self.server = server
        self.server_link = self.link(server, own)
        server.reopen(self.server_link)

    def create_gpadl(self, extents: Sequence[tuple[int, int]]) -> int:
        """See `_Link.create_gpadl`."""
        if not extents:
            raise GpadlError(f"channel {self.client.name}: a GPADL of no memory")
        handle = self._next_gpadl
        self._next_gpadl += 1
        ranges = tuple(range_for(address, length) for address, length in extents)
        self.gpadls[handle] = Gpadl(0, handle, ranges)
        return handle

    def delete_gpadl(self, handle: int) -> None:
        """See `_Link.delete_gpadl`."""
        if handle not in self.gpadls or handle in self.deleting:
            raise GpadlError(f"channel {self.client.name} has no GPADL {handle:#x} to be deleted")
        self.deleting.add(handle)
        self.bus.wait(
            lambda: handle not in self.server_link.mappings,
            DEFAULT_TIMEOUT,
            f"the owner of channel {self.server.name} to unmap GPADL {handle:#x}",
        )
        self.gpadls.pop(handle, None)
        self.deleting.discard(handle)

    def let_go(self) -> None:
        """Both ends are closed: the memory is nobody's any more."""
        for link in (self.server_link, self.client_link):
            link.dead = True
            link.mappings.clear()
        self.gpadls.clear()
        self.bus.free(self.rings)
