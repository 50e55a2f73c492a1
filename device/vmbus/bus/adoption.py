"""Puts the offers of a saved state back, and open channels on their rings."""

from collections.abc import Callable
from uuid import UUID

from vmbus.bus.offers import Offer, OfferState, OfferStateRecord, OpenRequest
from vmbus.bus.replacing import Key, channel_name, key_of
from vmbus.bus.saved import BusState
from vmbus.bus.server import BusServer
from vmbus.errors import StateError
from vmbus.kmcl.saved import ChannelRecord
from vmbus.kmcl.server import ServerChannel
from vmbus.ring import RingCorrupt
from vmbus.util.complaints import bounded_log
from vmbus.util.pieces import Pieces

log = bounded_log(__name__)

Reattach = Callable[[Offer, tuple[int | None, int | None]], None]


class Adoption:
    """Implements `vmbus.bus.replacing.Carrier` for the channels of a device.

    A channel whose rings cannot be taken up again, because of what the guest wrote over them, is made anew, alone: the
    guest is told that it is rescinded, and gets it offered once more when it has released it. `broken` says why.
    """

    def __init__(
        self,
        bus: BusServer,
        state: BusState,
        records: list[ChannelRecord],
        channels: list[ServerChannel],
        reattach: Reattach,
    ) -> None:
        """
        Args:
            bus: without a connection, its providers' primary channels offered.
            state, records: of the saved device; checked.
            channels: of the device, in its order; sub-channels come.
            reattach: puts the owner of an offer back on its rings, given the indices that we had published there (None:
                unknown). Raises RingCorrupt when the rings are none any more, other PeerErrors for missing memory.
        """
        self._bus = bus
        self._state = state
        self._records = {record.key: record for record in records}
        self._order = {record.key: at for at, record in enumerate(records)}
        self._reattach = reattach
        self._adopted: list[Offer] = []
        self._rescinded: list[Offer] = []
        self._torndown = [(gpadl.relid, gpadl.handle) for gpadl in state.gpadls if gpadl.tearing_down]
        self.channels = channels
        self.renewed: set[Key] = set()
        self.lost: set[Key] = set()
        self.broken: dict[Key, str] = {}

    def reattach(self, *, primaries: bool) -> Pieces[None]:
        """With `primaries` also offers that nobody owns any more. Raises StateError for a sub-channel that is missing,
        and what the callback raises."""
        live = {offer.key: offer for offer in self._bus.offers if offer.wanted}
        for record in self._state.offers:
            yield
            if record.abandoned:
                if primaries:
                    self._adopt_withdrawn(record)
            elif primaries is (record.subchannel == 0):
                self._adopt(record, live.get(record.key))

    def _adopt_withdrawn(self, record: OfferStateRecord) -> Offer:
        instance = UUID(bytes_le=record.instance)
        offer = Offer(UUID(bytes_le=record.interface_type), instance, 0, b"", None, record.subchannel)
        self._bus.adopt_withdrawn(offer, record.relid)
        self._adopted.append(offer)
        return offer

    def _adopt(self, record: OfferStateRecord, offer: Offer | None) -> None:
        key = record.key
        primary = (record.instance, 0)
        of_renewed = record.subchannel != 0 and primary in self.renewed
        forced = self._records[key].decoded.head.force_new
        if offer is None:
            if not (of_renewed or forced):
                raise StateError(f"{channel_name(key)} was saved, and its owner did not make it again")
            if not record.relid:
                self.renewed.add(key)  # the guest knows nothing of it
                return
            offer = self._adopt_withdrawn(record)
        else:
            self._adopted.append(offer)
            forced |= offer.owner.force_new_channel
        if primary in self.broken and record.open is not None:
            self.lost.add(key)
        if (of_renewed or forced) and record.relid:
            self._renew(offer, record)
            return
        request = None if record.open is None else OpenRequest.restored(record.open)
        self._bus.adopt(offer, record.relid, OfferState(record.state), request)
        # What the guest is about to get back cannot be mapped again.
        offer.teardowns = [handle for relid, handle in self._torndown if relid == record.relid]
        if request is None:
            return
        try:
            self._reattach(offer, self._records[key].own_indices)
        except RingCorrupt as error:
            log.error("channel %s is made anew: the guest has overwritten its rings: %s", offer.owner.name, error)
            self.lost.add(key)
            self.broken[key] = str(error)
            self._renew(offer, record)

    def _renew(self, offer: Offer, record: OfferStateRecord) -> None:
        """Its rings are left alone: the owner begins with a channel that was never open."""
        self.renewed.add(record.key)
        if record.state != OfferState.RESCINDED.value:
            self._rescinded.append(offer)
        self._bus.adopt(offer, record.relid, OfferState.RESCINDED, None)

    def end(self) -> None:
        """Everything is back: the guest is told what has changed."""
        bus = self._bus
        for offer in bus.offers:
            offer.teardowns = []
        self._put_in_order()
        adopted = {id(offer) for offer in self._adopted}
        bus.end_restore(
            torndown=self._torndown,
            rescinded=self._rescinded,
            new=[offer for offer in bus.offers if id(offer) not in adopted],
        )

    def _put_in_order(self) -> None:
        """Offers and channels in the order of their creation, as before: guests see offers in that order, and providers
        have made their primary channels before their sub-channels now. What the saved state did not have comes last."""
        offers = {(*one.key, one.abandoned): at for at, one in enumerate(self._state.offers)}
        self._bus.offers.sort(key=lambda one: offers.get((*one.key, not one.wanted), len(offers)))
        self.channels.sort(key=lambda one: self._order.get(key_of(one), len(self._order)))
