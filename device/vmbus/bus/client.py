"""The guest's end of the bus: builds requests, and keeps what the host's answers say. No waiting, no I/O.

Whoever drives it posts the messages, feeds what arrives into `receive`, and looks at the tables here to see whether an
answer has come.
"""

from collections.abc import Callable
from typing import Any
from uuid import UUID

from vmbus.errors import PeerError
from vmbus.wire import messages as m
from vmbus.wire.gpa import GpaRange, pack_ranges

VERSIONS = tuple(sorted((int(version) for version in m.Version), reverse=True))
FIRST_GPADL = 0xE1E10


class BusClient:
    """Tables of what the host said: `offers` by relid, and the answers to requests.

    Attributes:
        version_response: the answer to the last INITIATE_CONTACT, None before it.
        offers: offers by relid. rescinded: those of them that the host has withdrawn, until `release`.
        all_offers: whether ALLOFFERS_DELIVERED came.
        connect_results: refusals by (endpoint, service).
        created: status by GPADL handle. open_results: status by relid. torndown: handles.
        unloaded: whether UNLOAD was answered.
        on_rescind: called with the offer that the host has withdrawn.
        on_offer: called with a new offer.
    """

    def __init__(self, post: Callable[[int, bytes], None]) -> None:
        """`post(connection id, message)` sends a message to the host."""
        self._post = post
        self.connection_id = 1
        self.version = 0
        self.on_rescind: Callable[[m.OfferChannel], None] | None = None
        self.on_offer: Callable[[m.OfferChannel], None] | None = None
        self._next_gpadl = FIRST_GPADL
        self._forget()

    def _forget(self) -> None:
        self.version_response: m.VersionResponse | None = None
        self.offers: dict[int, m.OfferChannel] = {}
        self.rescinded: set[int] = set()
        self.all_offers = False
        self.created: dict[int, int] = {}
        self.open_results: dict[int, int] = {}
        self.torndown: set[int] = set()
        self.modified: dict[int, int] = {}
        self.connect_results: dict[tuple[UUID, UUID], int] = {}
        self.unloaded = False

    def _send(self, message: Any) -> None:
        self._post(self.connection_id, m.encode(message))

    # ---- requests ------------------------------------------------------------------------------------------------

    def initiate_contact(self, version: int) -> None:
        """Propose a version; `version_response` will tell."""
        self._forget()
        v5 = version >= m.Version.V5_0
        self.connection_id = 4 if v5 else 1
        self.version = version
        self._send(m.InitiateContact(version, 0, 2 if v5 else 0, 0, 0))

    def request_offers(self) -> None:
        """Ask for all offers; `all_offers` will tell when they are there."""
        self._send(m.RequestOffers())

    def create_gpadl(self, relid: int, ranges: list[GpaRange]) -> int:
        """Describe memory to the host; `created[handle]` will be the status."""
        handle = self._next_gpadl
        self._next_gpadl += 1
        for message in m.gpadl_messages(relid, handle, pack_ranges(ranges), len(ranges)):
            self._post(self.connection_id, message)
        return handle

    def teardown_gpadl(self, relid: int, handle: int) -> None:
        """Ask for memory back; the handle will be in `torndown`."""
        self._send(m.GpadlTeardown(relid, handle))

    def open_channel(self, relid: int, gpadl: int, downstream_page_offset: int, user_data: bytes = b"") -> None:
        """Open a channel; `open_results[relid]` will be the status."""
        self.open_results.pop(relid, None)
        self._send(m.OpenChannel(relid, relid, gpadl, 0, downstream_page_offset, user_data))

    def close_channel(self, relid: int) -> None:
        """Close a channel; there is no answer."""
        self._send(m.CloseChannel(relid))

    def release(self, relid: int) -> None:
        self.offers.pop(relid, None)
        self.rescinded.discard(relid)
        self._send(m.RelidReleased(relid))

    def modify_channel(self, relid: int, target_vp: int) -> None:
        """Move a channel's interrupts; from version 5.3 on `modified[relid]` will be the status."""
        self._send(m.ModifyChannel(relid, target_vp))

    def connect(self, endpoint: UUID, service: UUID) -> None:
        """Ask for a channel: an offer with these for its instance and type, or an entry in `connect_results`."""
        self._send(m.ConnectRequest(endpoint, service))

    def unload(self) -> None:
        """End the connection; `unloaded` will tell."""
        self._send(m.Unload())

    # ---- answers -------------------------------------------------------------------------------------------------

    def find_offer(
        self, interface_type: UUID, instance: UUID | None = None, subchannel: int = 0
    ) -> m.OfferChannel | None:
        """The first offer of that type (and instance) with that sub-channel index."""
        for offer in self.offers.values():
            if (
                offer.interface_type == interface_type
                and instance in (None, offer.interface_instance)
                and offer.subchannel_index == subchannel
                and offer.relid not in self.rescinded
            ):
                return offer
        return None

    def receive(self, data: bytes) -> None:
        """One message from the host. Raises MessageError for what no host may send."""
        message = m.decode(data, m.Direction.HOST)
        if isinstance(message, m.VersionResponse):
            self.version_response = message
            if message.supported and self.version >= m.Version.V5_0:
                self.connection_id = message.connection_id
        elif isinstance(message, m.OfferChannel):
            self.offers[message.relid] = message
            if self.on_offer is not None:
                self.on_offer(message)
        elif isinstance(message, m.AllOffersDelivered):
            self.all_offers = True
        elif isinstance(message, m.RescindOffer):
            offer = self.offers.get(message.relid)
            if offer is None:
                raise m.MessageError(f"relid {message.relid} is rescinded, which was never offered")
            self.rescinded.add(message.relid)
            if self.on_rescind is not None:
                self.on_rescind(offer)
        elif isinstance(message, m.OpenResult):
            self.open_results[message.relid] = message.status
        elif isinstance(message, m.GpadlCreated):
            self.created[message.gpadl] = message.status
        elif isinstance(message, m.GpadlTorndown):
            self.torndown.add(message.gpadl)
        elif isinstance(message, m.ModifyChannelResponse):
            self.modified[message.relid] = message.status
        elif isinstance(message, m.ConnectResult):
            self.connect_results[message.endpoint, message.service] = message.status
        elif isinstance(message, m.UnloadResponse):
            self.unloaded = True
        else:
            raise PeerError(f"unexpected message {message!r}")
