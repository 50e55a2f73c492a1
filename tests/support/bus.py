"""A bus server whose owner is a test, with a bus client at the other end: no memory, no transport."""

from uuid import UUID

from vmbus.bus.client import BusClient
from vmbus.bus.gpadl import Gpadl
from vmbus.bus.offers import Offer, OfferState
from vmbus.bus.server import BusServer
from vmbus.wire import messages as m

TYPE = UUID("00000000-0000-4000-8000-00000000aaaa")


def instance(number: int) -> UUID:
    return UUID(int=number + 1)


class Owner:
    """Implements BusActions. With `prompt_*` it answers at once, else when the test calls `bus.opened`/`closed`."""

    def __init__(self, bus_post) -> None:
        self.bus: BusServer
        self.bus_post = bus_post
        self.prompt_open = True
        self.prompt_close = True
        self.open_status = 0
        self.events: list[tuple] = []
        self.using: dict[int, Gpadl] = {}

    def post(self, message: bytes) -> None:
        self.bus_post(message)

    def open_channel(self, offer: Offer, gpadl: Gpadl) -> None:
        assert id(offer) not in self.using, "opened twice"
        self.events.append(("open", offer.owner))
        if not self.open_status:
            self.using[id(offer)] = gpadl
        if self.prompt_open:
            self.bus.opened(offer, self.open_status)

    def channel_answered(self, offer: Offer) -> None:
        self.events.append(("answered", offer.owner))

    def cut_off(self) -> None:
        pass

    def close_channel(self, offer: Offer, force: bool) -> None:
        self.events.append(("close", offer.owner, force))
        if self.prompt_close or force:
            self.let_go(offer)

    def let_go(self, offer: Offer) -> None:
        """The owner has done with the rings."""
        self.using.pop(id(offer), None)
        self.bus.closed(offer)


class Joined:
    """Server and client, each getting the other's messages at once. `sent` and `heard` have them decoded."""

    def __init__(self, offers: int = 2, **options) -> None:
        self.sent: list = []
        self.heard: list = []
        self.owner = Owner(self._to_guest)
        self.bus = self.owner.bus = BusServer(self.owner)
        self.client = BusClient(self._to_host)
        self.client.on_rescind = lambda offer: None
        self.offers = []
        for number in range(offers):
            self.offer(number, **options)

    def offer(self, number: int, *, flags: int = 0, user_defined: bytes = b"") -> Offer:
        offer = Offer(TYPE, instance(number), flags, user_defined, f"owner {number}")
        self.offers.append(offer)
        self.bus.offer(offer)
        return offer

    def _to_guest(self, message: bytes) -> None:
        self.heard.append(m.decode(message, m.Direction.HOST))
        self.client.receive(message)

    def _to_host(self, connection_id: int, message: bytes) -> None:
        assert self.bus.accepts(connection_id)
        self.say(message)

    def say(self, message) -> list:
        """Send a message (or raw bytes) to the server; returns what it answered."""
        data = message if isinstance(message, bytes) else m.encode(message)
        before = len(self.heard)
        self.sent.append(message)
        self.bus.receive(data)
        check(self.bus, self.owner)
        return self.heard[before:]

    def connect(self, version: int = m.Version.V5_3) -> None:
        self.client.initiate_contact(version)
        self.client.request_offers()

    def gpadl(self, relid: int = 1, pages: int = 4, handle: int = 7) -> int:
        """A ring GPADL, accepted."""
        ranges = [m.gpadl_messages(relid, handle, one_range(pages), 1)]
        answers = [answer for message in ranges[0] for answer in self.say(message)]
        assert answers == [m.GpadlCreated(relid, handle, 0)]
        return handle

    def open(self, relid: int = 1, handle: int = 7) -> list:
        return self.say(open_channel(relid, handle))


def open_channel(relid: int, handle: int, open_id: int = 99) -> m.OpenChannel:
    return m.OpenChannel(relid, open_id, handle, 0, 2, b"")


def one_range(pages: int, first: int = 0x100) -> bytes:
    return (
        (pages * 4096).to_bytes(4, "little")
        + bytes(4)
        + b"".join((first + page).to_bytes(8, "little") for page in range(pages))
    )


def check(bus: BusServer, owner: Owner) -> None:
    """What holds between any two messages."""
    relids = [offer.relid for offer in bus.offers if offer.relid]
    assert len(relids) == len(set(relids)), "relids are unique"
    assert bus._by_relid == {offer.relid: offer for offer in bus.offers if offer.relid}
    for offer in bus.offers:
        assert (offer.state is OfferState.UNOFFERED) == (offer.relid == 0)
        assert offer.in_use == (offer.request is not None), "a request exactly while the channel is in use"
        assert offer.reopen is None or offer.state is OfferState.CLOSING
        assert not offer.teardowns or offer.state is OfferState.CLOSING
        if id(offer) in owner.using:
            assert offer.in_use, "the owner uses rings only of a channel in use"
            assert owner.using[id(offer)] in bus.gpadls.complete.values(), "rings stay while they are used"
    for relid, _ in bus.gpadls.complete:
        assert relid in relids
    for partial in bus.gpadls.partial.values():
        assert partial.relid in relids and len(partial.data) < partial.range_bytes
    if bus.version == 0:
        assert not relids and not bus.offers_requested
