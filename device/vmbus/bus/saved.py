"""The bus in a saved state: what its rooms have written, put together, decoded and checked against each other."""

from typing import Annotated

import msgspec

from vmbus.bus.gpadl import (
    MAX_GPADLS,
    MAX_IN_PROGRESS,
    GpadlError,
    GpadlState,
    PartialState,
    check_gpadls,
    decode_gpadls,
    ring_extents,
)
from vmbus.bus.offers import MAX_RELID, OfferStateRecord, OpenState, check_offers
from vmbus.errors import StateError
from vmbus.util.pieces import Pieces
from vmbus.util.records import U32, Bytes, StructVersion, decode
from vmbus.wire import messages as m


class BusState(msgspec.Struct, frozen=True):
    connected: bool
    version: U32
    offers_requested: bool
    offers: Annotated[list[OfferStateRecord], msgspec.Meta(max_length=MAX_RELID)]
    gpadls: list[GpadlState]
    partial: Annotated[list[PartialState], msgspec.Meta(max_length=MAX_IN_PROGRESS)]
    structure_version: StructVersion = 1

    @property
    def open_channels(self) -> int:
        return sum(offer.open is not None for offer in self.offers)


NOTHING = BusState(connected=False, version=0, offers_requested=False, offers=[], gpadls=[], partial=[])
"""Without a connection."""


class _Pieces(BusState, frozen=True):
    gpadls: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MAX_GPADLS)]  # type: ignore[assignment]


_decoder = msgspec.msgpack.Decoder(_Pieces)


def decode_bus(data: Bytes) -> BusState:
    """The bus in MessagePack bytes. Raises StateError."""
    pieces = decode(_decoder, data, "the bus in the device state")
    return BusState(
        pieces.connected,
        pieces.version,
        pieces.offers_requested,
        pieces.offers,
        decode_gpadls(pieces.gpadls, sum(one.range_bytes for one in pieces.partial)),
        pieces.partial,
        pieces.structure_version,
    )


def check(bus: BusState) -> Pieces[None]:
    """Raises StateError for records that are not those of a possible bus."""
    if bus.connected and bus.version not in set(m.Version):
        raise StateError(f"the bus was connected with version {bus.version:#x}, which is not served")
    relids = check_offers(bus.offers)
    if not (bus.connected and bus.offers_requested) and relids:
        raise StateError("channels are known to the guest, which has not asked for offers")
    yield
    check_gpadls(bus.gpadls, bus.partial, relids)
    yield
    gpadls = {(gpadl.relid, gpadl.handle): gpadl for gpadl in bus.gpadls}
    for offer in bus.offers:
        yield
        if offer.open is not None:
            _check_rings(offer, offer.open, gpadls.get((offer.relid, offer.open.ring_gpadl)))


def _check_rings(offer: OfferStateRecord, opened: OpenState, gpadl: GpadlState | None) -> None:
    what = f"relid {offer.relid} is open, and its ring GPADL {opened.ring_gpadl:#x}"
    if gpadl is None or gpadl.tearing_down:
        raise StateError(f"{what} is missing or torn down")
    try:
        ring_extents(gpadl.live, opened.downstream_page_offset)
    except GpadlError as error:
        raise StateError(f"{what} is none: {error}") from error
