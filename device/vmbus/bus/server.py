"""The host's end of the bus: a state machine that takes messages and says what to do through a narrow interface.

The connection:

    DISCONNECTED   --INITIATE_CONTACT, version known-->  CONNECTED   --UNLOAD-->  DISCONNECTED
    INITIATE_CONTACT in any state first drops everything. Offers are sent once, after REQUESTOFFERS.
    Dropping may have to wait for owners that hold packets; what else the guest sends meanwhile is rejected, except
    another INITIATE_CONTACT or UNLOAD, which takes the place of the one that waits.

Offers move as `vmbus.bus.offers` says.

Sub-channels (index 1 and up, with the GUIDs of their primary) exist for the guest while their primary is open: they are
offered when it opens, or as soon as the owner enables them later; when it closes, those that the guest has not closed
are rescinded first, and its owner is asked to close when its sub-channels' owners have done so.

A GPADL that the channel's owner has mapped is not torn down under it: GPADL_TORNDOWN is sent after the unmap.

Every request is answered exactly once: the guest waits for VERSION_RESPONSE, GPADL_CREATED, OPENCHANNEL_RESULT,
GPADL_TORNDOWN and UNLOAD_RESPONSE without a timeout. A message that is malformed or does not fit the state is counted,
logged and, where an answer exists, refused; it never disturbs other channels.
"""

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any, Protocol

from vmbus.bus.connects import ConnectDesk
from vmbus.bus.desk import REFUSED, GpadlDesk
from vmbus.bus.gpadl import Gpadl, GpadlError
from vmbus.bus.offers import CONNECTION_ID_BASE, MAX_RELID, Offer, OfferEvent, OfferState, OpenRequest
from vmbus.bus.saved import BusState
from vmbus.bus.table import OfferTable, still_in_use
from vmbus.errors import PeerError, UsageError
from vmbus.util.backlog import Backlog
from vmbus.util.complaints import bounded_log
from vmbus.util.pieces import Pieces
from vmbus.wire import messages as m

log = bounded_log(__name__)

# Where messages are posted: 1 before version 5.0, 4 for INITIATE_CONTACT and everything from 5.0 on.
MESSAGE_CONNECTION_ID = 1
MESSAGE_CONNECTION_ID_5_0 = 4


class ConnectionState(Enum):
    """See the module's text."""

    DISCONNECTED = "disconnected"
    CONNECTED = "connected"


class _Reset:
    """What ends the connection is a reset, to which there is no answer."""


class BusActions(Protocol):
    def post(self, message: bytes) -> None:
        """Send a message to the guest, after those before it."""

    def open_channel(self, offer: Offer, gpadl: Gpadl) -> None:
        """Open; answer with `BusServer.opened`, now or later."""

    def channel_answered(self, offer: Offer) -> None:
        """The guest has been told that the channel is open: packets may move."""

    def cut_off(self) -> None:
        """Nothing touches the memory of any channel from here on; that they are closed is said later."""

    def close_channel(self, offer: Offer, force: bool) -> None:
        """Close; answer with `BusServer.closed`, now or later (now, if `force`)."""


class BusServer(GpadlDesk):
    """The host's end. One per PCI function.

    `offers` is in the order of their creation, which is the order in which the guest sees them.
    """

    def __init__(self, actions: BusActions, backlog: Backlog | None = None) -> None:
        """`backlog`: where the work goes that grows with the channels; without one it is done at once."""
        super().__init__()
        self._actions = actions
        self._backlog = Backlog(lambda: None) if backlog is None else backlog
        self.state = ConnectionState.DISCONNECTED
        self.version = 0
        self.offers_requested = False
        self.offers = OfferTable()
        self.connects = ConnectDesk(self.post)
        self.rejected = 0
        # The UNLOAD or INITIATE_CONTACT that waits for owners to let go; a later one takes its place.
        self._ending: m.InitiateContact | m.Unload | _Reset | None = None
        self._no_relid_below = 1  # all lower ones are in use
        self._in_use: list[Offer] = []  # what that waits for, and among it what is not in use any more
        # While a saved state is put back, nothing is sent: what the guest knows is in the state.
        self.restoring = False
        # Called when a withdrawn offer is gone for good.
        self.on_released: Callable[[], None] | None = None

    # ---- owners ------------------------------------------------------------------------------------------------

    def offer(self, offer: Offer) -> None:
        """Offer a channel, now if the guest has asked for offers, else when it does.

        One that was withdrawn, and that the guest has not released yet, is waited for. Raises UsageError when
        (instance, sub-channel) is offered already, when a sub-channel has no primary, or when all relids are in use.
        """
        if any(other.wanted for other in self.offers.same(offer)):
            raise UsageError(f"a channel with instance {offer.name} is offered already")
        if offer.subchannel:
            primary = self.offers.primary(offer)
            if primary is None or primary.interface_type != offer.interface_type:
                raise UsageError(f"channel {offer.name} has no primary: offer one with its type and instance first")
        if len(self.offers) >= MAX_RELID:
            raise UsageError(f"all {MAX_RELID} relids are in use: no further channel can be offered")
        self.offers.add(offer)
        self._send_offer(offer)

    def withdraw(self, offer: Offer) -> None:
        """Take an offer back: rescinded if the guest knows it, and forgotten once the guest has released it."""
        offer.wanted = False
        if offer.state is OfferState.UNOFFERED:
            self.offers.remove(offer)
        else:
            self.rescind(offer)

    def rescind(self, offer: Offer) -> None:
        """Tell the guest that the channel is gone. Its owner must have let go of it already, or is made to."""
        if offer.state in (OfferState.UNOFFERED, OfferState.RESCINDED):
            return
        for sub in self.offers.subchannels(offer):
            self.rescind(sub)
        self._rescind_one(offer)

    def rescind_in_pieces(self, offer: Offer, done: Callable[[], None] = lambda: None) -> None:
        """`rescind` because of the guest, who has as many sub-channels as it likes; `done` is called at the end."""
        for sub in self.offers.subchannels(offer):
            self._backlog.do(partial(self._rescind_one, sub))
        self._backlog.do(partial(self._rescind_one, offer))
        self._backlog.do(done)

    def _rescind_one(self, offer: Offer) -> None:
        if offer.state in (OfferState.UNOFFERED, OfferState.RESCINDED):
            return
        in_use = offer.in_use
        waiting = offer.request if offer.state is OfferState.OPENING else offer.reopen
        offer.move(OfferEvent.RESCIND)
        offer.request = offer.reopen = None
        offer.waits_for = None
        if in_use:
            self._actions.close_channel(offer, True)
        offer.mapped.clear()
        self._finish_teardowns(offer)
        if waiting is not None:
            self.post(m.OpenResult(offer.relid, waiting.open_id, REFUSED))
        if not self.disconnecting:  # a guest that begins anew knows of no offers
            self.post(m.RescindOffer(offer.relid))
        if offer.subchannel:
            self._close_if_alone(self.offers.primary(offer))
        self._continue_disconnect()

    def opened(self, offer: Offer, status: int) -> None:
        """The owner's answer to `open_channel`: 0, or a failing NTSTATUS."""
        if offer.state is not OfferState.OPENING or offer.request is None:
            return
        request = offer.request
        if status:
            offer.move(OfferEvent.REFUSED)
            offer.request = None
        else:
            offer.move(OfferEvent.OPENED)
        self.post(m.OpenResult(offer.relid, request.open_id, status))
        if not status:
            self._actions.channel_answered(offer)
            for sub in self.offers.subchannels(offer):
                self._backlog.do(partial(self._send_offer, sub))

    def closed(self, offer: Offer) -> None:
        """The owner's answer to `close_channel`: it holds nothing any more."""
        if offer.state is not OfferState.CLOSING:
            return
        offer.move(OfferEvent.CLOSED)
        offer.request = None
        offer.mapped.clear()
        self._finish_teardowns(offer)
        if offer.subchannel and not self.disconnecting and not self._primary_is_open(offer):
            self.rescind(offer)
        if offer.reopen is not None:
            again, offer.reopen = offer.reopen, None
            try:
                self._open(offer, again)
            except PeerError as error:
                self._reject(error)
        if offer.subchannel:
            self._close_if_alone(self.offers.primary(offer))
        self._continue_disconnect()

    def _close(self, offer: Offer) -> None:
        """Ask the owner to close; that of a primary after those of its sub-channels."""
        offer.move(OfferEvent.CLOSE)
        offer.waits_for = [sub for sub in self.offers.subchannels(offer) if sub.in_use]
        self._close_if_alone(offer)

    def _close_if_alone(self, primary: Offer | None) -> None:
        if primary is not None and primary.waits_for is not None and not still_in_use(primary.waits_for):
            primary.waits_for = None
            self._actions.close_channel(primary, False)

    def _primary_is_open(self, sub: Offer) -> bool:
        primary = self.offers.primary(sub)
        return primary is not None and primary.state is OfferState.OPEN

    # ---- the guest ---------------------------------------------------------------------------------------------

    def find(self, connection_id: int) -> Offer | None:
        """The open channel that a signal on `connection_id` is for."""
        offer = self._by_relid.get(connection_id - CONNECTION_ID_BASE)
        return offer if offer is not None and offer.state is OfferState.OPEN else None

    @property
    def disconnecting(self) -> bool:
        """Whether the guest has ended the connection (UNLOAD, or a new INITIATE_CONTACT) and waits for the answer."""
        return self._ending is not None

    def accepts(self, connection_id: int) -> bool:
        """Whether messages may be posted there."""
        return connection_id in (MESSAGE_CONNECTION_ID, MESSAGE_CONNECTION_ID_5_0)

    def receive(self, data: bytes) -> None:
        """Handle one posted message. Bad ones are counted and logged; nothing is raised for what a guest does."""
        try:
            message = m.decode(data, m.Direction.GUEST)
            handler = _HANDLERS.get(type(message))
            if handler is None:
                raise m.MessageError(f"{type(message).__name__} is not served")
            connected = self.state is ConnectionState.CONNECTED and not self.disconnecting
            if not connected and type(message) is m.RelidReleased:
                return  # Linux does so for each of its channels after UNLOAD, which has released them all
            if self.state is ConnectionState.DISCONNECTED and type(message) is not m.InitiateContact:
                raise m.MessageError(f"{type(message).__name__} before a version was agreed on")
            if self.disconnecting and type(message) not in (m.InitiateContact, m.Unload):
                # Above all no OPENCHANNEL: the end of the connection would wait for that channel too.
                raise m.MessageError(f"{type(message).__name__} after the connection was ended")
            handler(self, message)
        except PeerError as error:
            self._reject(error)

    def _reject(self, error: PeerError) -> None:
        self.rejected += 1
        log.warning("bus: message %d from the guest rejected: %s", self.rejected, error)

    def reset(self) -> None:
        """The function was reset: drop everything without a word to the guest, its memory before this returns."""
        self.restoring = False
        self._backlog.clear()
        self._ending = _Reset()
        self._forget()
        for offer in self.offers:
            offer.reopen = offer.waits_for = None
            offer.teardowns.clear()
        self._actions.cut_off()
        self._drop_all(force=True)

    def post(self, message: Any) -> None:
        """Send a message to the guest, unless it knows of no connection."""
        if self.state is ConnectionState.CONNECTED or isinstance(message, m.VersionResponse | m.UnloadResponse):
            self._actions.post(m.encode(message))

    def _end_connection(self, message: m.InitiateContact | m.Unload) -> None:
        self._ending = message
        for offer in self.offers:
            offer.reopen = None
        self._drop_all(force=False)

    def _drop_all(self, *, force: bool) -> None:
        self._in_use = [offer for offer in self.offers if offer.in_use]
        for offer in sorted(self._in_use, key=lambda offer: offer.subchannel == 0):
            self._backlog.do(partial(self._drop, offer, force))
        self._continue_disconnect()

    def _drop(self, offer: Offer, force: bool) -> None:
        if force and offer.in_use:
            if offer.state is not OfferState.CLOSING:
                offer.move(OfferEvent.CLOSE)
            self._actions.close_channel(offer, True)
        elif offer.in_use and offer.state is not OfferState.CLOSING:
            self._close(offer)

    def _continue_disconnect(self) -> None:
        """Answer UNLOAD or INITIATE_CONTACT once no owner touches guest memory any more."""
        if self._ending is None or still_in_use(self._in_use):
            return
        self._disconnect()
        contact, self._ending = self._ending, None
        if isinstance(contact, _Reset):
            return
        if isinstance(contact, m.Unload):
            self.post(m.UnloadResponse())
            return
        supported = contact.version in set(m.Version)
        if supported:
            self.state = ConnectionState.CONNECTED
            self.version = contact.version
        v5 = contact.version >= m.Version.V5_0
        where = MESSAGE_CONNECTION_ID_5_0 if v5 else contact.version
        self.post(m.VersionResponse(int(supported), 0, where if supported else 0))

    def _forget(self) -> None:
        self.state = ConnectionState.DISCONNECTED
        self.version = 0
        self.offers_requested = False
        self.gpadls.clear()
        self.connects.clear()
        self._by_relid.clear()
        self._no_relid_below = 1

    def _disconnect(self) -> None:
        self._backlog.clear()  # of a connection that is no more
        self._forget()
        withdrawn = any(not offer.wanted for offer in self.offers)
        for offer in list(self.offers):
            offer.move(OfferEvent.FORGET)
            offer.relid = 0
            offer.request = None
            offer.teardowns.clear()
            offer.mapped.clear()
            if not offer.wanted:
                self.offers.remove(offer)
        if withdrawn:
            self._tell_released()

    def _tell_released(self) -> None:
        if self.on_released is not None:
            self.on_released()

    def _request_offers(self, _: m.RequestOffers) -> None:
        if self.offers_requested:
            raise m.MessageError("offers were requested before on this connection")
        self.offers_requested = True
        for offer in list(self.offers):
            self._backlog.do(partial(self._send_offer, offer))
        self._backlog.do(lambda: self.post(m.AllOffersDelivered()))

    def _send_offer(self, offer: Offer) -> None:
        if not self.offers_requested or self.restoring or offer.state is not OfferState.UNOFFERED or not offer.wanted:
            return
        if offer.subchannel and not self._primary_is_open(offer):
            return
        if any(other.relid for other in self.offers.same(offer)):
            return  # withdrawn, and not released yet: guests take a second offer of an instance for the same channel
        relid = next((one for one in range(self._no_relid_below, MAX_RELID + 1) if one not in self._by_relid), 0)
        if not relid:
            raise UsageError(f"all {MAX_RELID} relids are in use")
        self._no_relid_below = relid + 1
        offer.relid = relid
        offer.move(OfferEvent.OFFER)
        self._by_relid[relid] = offer
        self.post(offer.offer_message())

    def _open_channel(self, message: m.OpenChannel) -> None:
        try:
            offer = self._channel(message.relid)
            if offer.state is OfferState.RESCINDED:
                return
            if offer.state is OfferState.CLOSING and offer.reopen is None:
                offer.reopen = message
                return
            if offer.state is not OfferState.OFFERED:
                raise m.MessageError(f"open of relid {message.relid}, which is {offer.state.value}")
            if offer.subchannel and not self._primary_is_open(offer):
                raise m.MessageError(f"open of relid {message.relid}, whose primary channel is not open")
        except PeerError:
            self.post(m.OpenResult(message.relid, message.open_id, REFUSED))
            raise
        self._open(offer, message)

    def _open(self, offer: Offer, message: m.OpenChannel) -> None:
        gpadl = self.gpadls.complete.get((message.relid, message.ring_gpadl))
        if gpadl is None:
            self.post(m.OpenResult(message.relid, message.open_id, REFUSED))
            raise GpadlError(f"open of relid {message.relid} with GPADL {message.ring_gpadl:#x}, which does not exist")
        offer.move(OfferEvent.OPEN)
        offer.request = OpenRequest(*message[1:])
        self._actions.open_channel(offer, gpadl)

    def _close_channel(self, message: m.CloseChannel) -> None:
        offer = self._channel(message.relid)
        if offer.state is OfferState.RESCINDED:
            return
        if offer.state is not OfferState.OPEN:
            raise m.MessageError(f"close of relid {message.relid}, which is {offer.state.value}")
        self._close(offer)
        for sub in self.offers.subchannels(offer):
            if sub.state is not OfferState.CLOSING:
                self._backlog.do(partial(self._rescind_one, sub))

    def _relid_released(self, message: m.RelidReleased) -> None:
        offer = self._channel(message.relid)
        if offer.state not in (OfferState.RESCINDED, OfferState.OFFERED):
            raise m.MessageError(f"release of relid {message.relid}, which is {offer.state.value}")
        rescinded = offer.state is OfferState.RESCINDED
        del self._by_relid[message.relid]
        self._no_relid_below = min(self._no_relid_below, message.relid)
        self.gpadls.drop_channel(message.relid)
        offer.move(OfferEvent.RELEASE)
        offer.relid = 0
        if not offer.wanted:
            self.offers.remove(offer)
            for other in self.offers.same(offer):
                self._send_offer(other)
            self._tell_released()
        elif rescinded:
            self._send_offer(offer)

    def _modify_channel(self, message: m.ModifyChannel) -> None:
        offer = self._by_relid.get(message.relid)
        good = offer is not None and offer.state is OfferState.OPEN and offer.request is not None
        if good and offer is not None and offer.request is not None:
            offer.request.target_vp = message.target_vp
        if self.version >= m.Version.V5_3:
            self.post(m.ModifyChannelResponse(message.relid, 0 if good else REFUSED))
        if not good:
            raise m.MessageError(f"modification of relid {message.relid}, which is not open")

    # ---- save and restore ------------------------------------------------------------------------------------------

    def save(self) -> BusState:
        """The connection, offers and GPADLs. Raises StateError while a channel is opening or closing."""
        offers = [offer.save() for offer in self.offers]
        tearing_down = {(offer.relid, handle) for offer in self.offers for handle in offer.teardowns}
        gpadls, partial = self.gpadls.save(tearing_down)
        return BusState(
            connected=self.state is ConnectionState.CONNECTED,
            version=self.version,
            offers_requested=self.offers_requested,
            offers=offers,
            gpadls=gpadls,
            partial=partial,
        )

    def restore(self, state: BusState) -> Pieces[None]:
        """Put the connection and its GPADLs back; the offers follow (`vmbus.bus.adoption`), and `end_restore`."""
        self.restoring = True
        if state.connected:
            self.state = ConnectionState.CONNECTED
            self.version = state.version
            self.offers_requested = state.offers_requested
        yield from self.gpadls.restore(state.gpadls, state.partial)

    def adopt(self, offer: Offer, relid: int, state: OfferState, request: OpenRequest | None) -> None:
        """For restore: put an offer back into its saved state."""
        offer.put_back(relid, state, request)
        if relid:
            self._by_relid[relid] = offer

    def adopt_withdrawn(self, offer: Offer, relid: int) -> None:
        """For restore: an offer that had been withdrawn, whose relid the guest has not released yet."""
        offer.wanted = False
        self.offers.add(offer)
        self.adopt(offer, relid, OfferState.RESCINDED, None)

    def end_restore(self, *, torndown: list[tuple[int, int]], rescinded: list[Offer], new: list[Offer]) -> None:
        """For restore: the end of it, when messages may go to the guest again.

        Args:
            torndown: (relid, handle) of teardowns that waited for an unmap: nothing is mapped any more.
            rescinded: offers adopted as RESCINDED of which the guest does not know that yet.
            new: offers that the saved state did not have.
        """
        self.restoring = False
        for relid, handle in torndown:
            self.gpadls.remove(relid, handle)
            self.post(m.GpadlTorndown(handle))
        for offer in rescinded:
            self.post(m.RescindOffer(offer.relid))
        for offer in new:
            self._send_offer(offer)


_HANDLERS: dict[type[Any], Any] = {
    m.InitiateContact: BusServer._end_connection,
    m.Unload: BusServer._end_connection,
    m.RequestOffers: BusServer._request_offers,
    m.GpadlHeader: BusServer._gpadl_header,
    m.GpadlBody: BusServer._gpadl_body,
    m.GpadlTeardown: BusServer._gpadl_teardown,
    m.OpenChannel: BusServer._open_channel,
    m.CloseChannel: BusServer._close_channel,
    m.RelidReleased: BusServer._relid_released,
    m.ModifyChannel: BusServer._modify_channel,
    m.ConnectRequest: lambda bus, message: bus.connects.requested(message),
}
