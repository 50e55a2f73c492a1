"""Two KMCL endpoints joined by rings in one bytearray: no bus, no transport. Turns are explicit."""

from collections.abc import Callable
from uuid import UUID

from vmbus.kmcl import ClientChannel
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.server import ServerChannel
from vmbus.memory.guest import GuestMemory
from vmbus.ring import FEATURE_BITS, RingReader, RingWriter

TYPE = UUID("00000000-0000-4000-8000-000000000001")
INSTANCE = UUID("00000000-0000-4000-8000-000000000002")
BASE = 0x10000
PAGE = 4096


class PairLink:
    """A `Link` of one end; the other end's turn is asked for by `signal`."""

    def __init__(self, pair: "Pair", side: str, memory: GuestMemory, reader: RingReader, writer: RingWriter) -> None:
        self.pair = pair
        self.side = side
        self.memory = memory
        self.reader = reader
        self.writer = writer
        self.failures: list[str] = []

    def signal(self) -> None:
        self.pair.signals[self.side] += 1
        self.pair.ready.add("client" if self.side == "server" else "server")

    def wake(self) -> None:
        self.pair.ready.add(self.side)

    def failed(self, reason: str) -> None:
        self.failures.append(reason)


class Pair:
    """A server channel and a client channel, open. `ram` is the guest's memory, shared by both."""

    def __init__(self, *, up_pages: int = 1, down_pages: int = 1) -> None:
        self.up_pages = up_pages
        self.down_pages = down_pages
        self.ram = bytearray((up_pages + down_pages + 2) * PAGE)
        self.signals = {"server": 0, "client": 0}
        self.ready: set[str] = set()
        self.server = ServerChannel(TYPE, INSTANCE, name="server")
        self.client = ClientChannel(TYPE, name="client")
        self.server_link: PairLink
        self.client_link: PairLink

    def link(self, side: str) -> PairLink:
        memory = GuestMemory()
        memory.map(BASE, memoryview(self.ram), True)
        split = (self.up_pages + 1) * PAGE
        up = memory.window([(BASE, PAGE)]), memory.window([(BASE + PAGE, split - PAGE)])
        down_size = len(self.ram) - split - PAGE
        down = memory.window([(BASE + split, PAGE)]), memory.window([(BASE + split + PAGE, down_size)])
        incoming, outgoing = (up, down) if side == "server" else (down, up)
        return PairLink(self, side, memory, RingReader(*incoming), RingWriter(*outgoing))

    def open(self) -> None:
        """Enable and open both ends, the server started."""
        for start in (0, (self.up_pages + 1) * PAGE):
            self.ram[start + FEATURE_BITS] = 1
        self.server.bind(lambda _: None, lambda _: None)
        self.server.enable()
        self.client.enable()
        self.server_link = self.link("server")
        self.client_link = self.link("client")
        self.server.open(self.server_link)
        self.client.open(self.client_link)
        self.client.activate()
        self.server.start()

    def turn(self, side: str) -> None:
        """One turn of one end, if something asked for it."""
        if side in self.ready:
            self.ready.discard(side)
            channel: Channel = self.server if side == "server" else self.client
            if channel.process():
                self.ready.add(side)

    def run(self, limit: int = 10_000) -> None:
        """Turns until neither end wants one."""
        for _ in range(limit):
            if not self.ready:
                return
            self.turn(sorted(self.ready)[0])
        raise AssertionError("the two ends never become quiet")

    def replace_server(self, make: Callable[[], ServerChannel], chunks: list[bytes]) -> None:
        """A fresh server end in the place of the old one, restored from chunks, as after a restore of the VM."""
        self.ready.discard("server")
        self.server = make()
        self.server.bind(lambda _: None, lambda _: None)
        self.server.enable()
        self.server_link = self.link("server")
        self.server.reopen(self.server_link)
        started = self.server.restore(chunks)
        if started:
            self.server.start()
        # One kick each way, as the device gives after a restore.
        self.ready |= {"server", "client"}
