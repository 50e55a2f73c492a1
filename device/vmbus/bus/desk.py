"""The part of the bus that deals with GPADLs: what the guest describes and wants back, and what owners map."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

from vmbus.bus.gpadl import Gpadl, GpadlError, GpadlMapped, GpadlTable
from vmbus.bus.offers import Offer, OfferState
from vmbus.errors import PeerError
from vmbus.util.complaints import bounded_log
from vmbus.wire import messages as m

log = bounded_log(__name__)

REFUSED = 0x8000FFFF


class GpadlDesk(ABC):
    """Base of `vmbus.bus.server.BusServer`. `gpadls` is to be read only."""

    def __init__(self) -> None:
        self.gpadls = GpadlTable()
        self._by_relid: dict[int, Offer] = {}

    @abstractmethod
    def post(self, message: Any) -> None:
        """Send a message to the guest."""

    @abstractmethod
    def rescind_in_pieces(self, offer: Offer, done: Callable[[], None]) -> None:
        """Take a channel away from the guest, then call `done`."""

    # ---- owners ----------------------------------------------------------------------------------------------------

    def map_gpadl(self, offer: Offer, handle: int) -> Gpadl:
        """The owner is about to use a GPADL: it will not be torn down before `unmap_gpadl`.

        Raises GpadlError when the channel has no such GPADL or it holds the rings, GpadlMapped when it is mapped.
        """
        gpadl = self.gpadls.complete.get((offer.relid, handle))
        if gpadl is None or not offer.in_use or handle in offer.teardowns:
            raise GpadlError(f"channel {offer.name} has no GPADL {handle:#x}, or the guest is taking it back")
        if offer.request is not None and handle == offer.request.ring_gpadl:
            raise GpadlError(f"GPADL {handle:#x} holds the rings of channel {offer.name}")
        if handle in offer.mapped:
            raise GpadlMapped(f"GPADL {handle:#x} is mapped already: unmap it first")
        offer.mapped.add(handle)
        return gpadl

    def unmap_gpadl(self, offer: Offer, handle: int) -> None:
        """The owner uses it no more; a teardown that waits is answered. Raises GpadlError when it is not mapped."""
        if handle not in offer.mapped:
            raise GpadlError(f"GPADL {handle:#x} is not mapped on channel {offer.name}")
        offer.mapped.discard(handle)
        if handle in offer.teardowns and offer.state is not OfferState.CLOSING:
            offer.teardowns.remove(handle)
            self._torn_down(offer.relid, handle)

    def _finish_teardowns(self, offer: Offer) -> None:
        """Answer the GPADL_TEARDOWNs that came while the owner could still touch the memory."""
        for handle in offer.teardowns:
            self._torn_down(offer.relid, handle)
        offer.teardowns.clear()

    # ---- the guest -------------------------------------------------------------------------------------------------

    def _channel(self, relid: int) -> Offer:
        offer = self._by_relid.get(relid)
        if offer is None:
            raise m.MessageError(f"relid {relid} is not offered")
        return offer

    def _gpadl_header(self, message: m.GpadlHeader) -> None:
        try:
            self._channel(message.relid)
            done = self.gpadls.begin(
                message.relid, message.gpadl, message.range_bytes, message.range_count, message.words
            )
        except PeerError:
            self.post(m.GpadlCreated(message.relid, message.gpadl, REFUSED))
            raise
        if done is not None:
            self.post(m.GpadlCreated(done.relid, done.handle, 0))

    def _gpadl_body(self, message: m.GpadlBody) -> None:
        begun = self.gpadls.partial.get(message.gpadl)
        try:
            _, done = self.gpadls.extend(message.gpadl, message.words)
        except PeerError:
            if begun is not None:
                self.post(m.GpadlCreated(begun.relid, begun.handle, REFUSED))
            raise
        if done is not None:
            self.post(m.GpadlCreated(done.relid, done.handle, 0))

    def _gpadl_teardown(self, message: m.GpadlTeardown) -> None:
        key = (message.relid, message.gpadl)
        offer = self._by_relid.get(message.relid)
        if key not in self.gpadls.complete:
            # Answered all the same: a guest that waits for this would wait for ever.
            begun = self.gpadls.partial.get(message.gpadl)
            if begun is not None and begun.relid == message.relid:
                self.gpadls.abandon(message.gpadl)
                self.post(m.GpadlCreated(message.relid, message.gpadl, REFUSED))
            self.post(m.GpadlTorndown(message.gpadl))
            raise m.MessageError(f"teardown of GPADL {message.gpadl:#x} of relid {message.relid}, which does not exist")
        if offer is not None and (offer.state is OfferState.CLOSING or message.gpadl in offer.mapped):
            if message.gpadl in offer.teardowns:
                raise m.MessageError(f"second teardown of GPADL {message.gpadl:#x}")
            offer.teardowns.append(message.gpadl)
            return
        if offer is not None and offer.request is not None and offer.request.ring_gpadl == message.gpadl:
            # The guest wants the rings of a channel that it has not closed: it gets them, and loses the channel.
            log.warning("bus: relid %d is %s and its rings are torn down", message.relid, offer.state.value)
            self.rescind_in_pieces(offer, partial(self._torn_down, *key))
            return
        self._torn_down(*key)

    def _torn_down(self, relid: int, handle: int) -> None:
        self.gpadls.remove(relid, handle)
        self.post(m.GpadlTorndown(handle))
