"""Offers: channels as the guest and their owners see them, and the rules by which they move.

    UNOFFERED   the owner wants it offered; the guest does not know it (no connection, or offers not requested yet)
    OFFERED     the guest knows it; it is closed
    OPENING     the guest asked for it; the owner has not answered yet
    OPEN        both ends use the rings
    CLOSING     the guest closed it; the owner still holds packets. An OPENCHANNEL that comes now is remembered
    RESCINDED   withdrawn (its owner disabled it, or the guest broke its protocol); waits for RELID_RELEASED, after
                which it is offered anew if its owner still wants that

Rules live in `TRANSITIONS` and nowhere else.
"""

from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any
from uuid import UUID

import msgspec

from vmbus.errors import StateError, UsageError
from vmbus.util.records import U16, U32, Guid, Relid, StructVersion
from vmbus.wire import messages as m

MAX_RELID = 2047
CONNECTION_ID_BASE = 0x10000


class OfferState(Enum):
    """See the module's text."""

    UNOFFERED = "unoffered"
    OFFERED = "offered"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"
    RESCINDED = "rescinded"


class OfferEvent(Enum):
    """What moves an offer. RELEASE: the guest has given the relid back. FORGET: the guest's connection is gone."""

    OFFER = "offer"
    OPEN = "open"
    OPENED = "opened"
    REFUSED = "refused"
    CLOSE = "close"
    CLOSED = "closed"
    RESCIND = "rescind"
    RELEASE = "release"
    FORGET = "forget"


_S = OfferState
_E = OfferEvent

TRANSITIONS: dict[tuple[OfferState, OfferEvent], OfferState] = {
    (_S.UNOFFERED, _E.OFFER): _S.OFFERED,
    (_S.UNOFFERED, _E.FORGET): _S.UNOFFERED,
    (_S.OFFERED, _E.OPEN): _S.OPENING,
    (_S.OFFERED, _E.RESCIND): _S.RESCINDED,
    (_S.OFFERED, _E.RELEASE): _S.UNOFFERED,
    (_S.OFFERED, _E.FORGET): _S.UNOFFERED,
    (_S.OPENING, _E.OPENED): _S.OPEN,
    (_S.OPENING, _E.REFUSED): _S.OFFERED,
    (_S.OPENING, _E.CLOSE): _S.CLOSING,
    (_S.OPENING, _E.RESCIND): _S.RESCINDED,
    (_S.OPEN, _E.CLOSE): _S.CLOSING,
    (_S.OPEN, _E.RESCIND): _S.RESCINDED,
    (_S.CLOSING, _E.CLOSED): _S.OFFERED,
    (_S.CLOSING, _E.RESCIND): _S.RESCINDED,
    (_S.CLOSING, _E.FORGET): _S.UNOFFERED,  # a reset waits for no owner
    (_S.RESCINDED, _E.RELEASE): _S.UNOFFERED,
    (_S.RESCINDED, _E.FORGET): _S.UNOFFERED,
}


class OpenState(msgspec.Struct, frozen=True):
    open_id: U32
    ring_gpadl: U32
    target_vp: U32
    downstream_page_offset: U32
    user_data: Annotated[bytes, msgspec.Meta(max_length=120)]
    structure_version: StructVersion = 1


class OfferStateRecord(msgspec.Struct, frozen=True):
    """One offer, by its GUIDs. `withdrawn`: its owner is gone, and the guest has yet to release the relid."""

    interface_type: Guid
    instance: Guid
    subchannel: U16
    relid: Relid
    state: str
    open: OpenState | None
    withdrawn: bool = False
    structure_version: StructVersion = 1

    @property
    def key(self) -> tuple[bytes, int]:
        """Which channel it is: instance and sub-channel."""
        return self.instance, self.subchannel

    @property
    def abandoned(self) -> bool:
        """Whether its owner was gone, and only the guest's release of the relid was awaited."""
        return self.withdrawn and self.state == OfferState.RESCINDED.value


def check_offers(records: list[OfferStateRecord]) -> set[int]:
    """Raises StateError for offers that cannot be those of one bus; returns the relids that the guest knows."""
    relids = set()
    for offer in records:
        try:
            known = OfferState(offer.state)
        except ValueError:
            raise StateError(f"an offer has the unknown state {offer.state!r}") from None
        if known in (OfferState.OPENING, OfferState.CLOSING) or (known is OfferState.OPEN) != (offer.open is not None):
            raise StateError(f"an offer is {offer.state} {'with' if offer.open else 'without'} open parameters")
        if (known is OfferState.UNOFFERED) == (offer.relid != 0):
            raise StateError(f"an offer is {offer.state} and has relid {offer.relid}")
        if offer.relid in relids:
            raise StateError(f"two offers have relid {offer.relid}")
        if offer.relid:
            relids.add(offer.relid)
    open_ = {offer.key for offer in records if offer.open is not None}
    for instance, subchannel in open_:
        if subchannel and (instance, 0) not in open_:
            raise StateError(f"sub-channel {subchannel} of an instance is open, and its primary channel is not")
    return relids


class OpenRequest:
    __slots__ = ("downstream_page_offset", "open_id", "ring_gpadl", "target_vp", "user_data")

    def __init__(
        self, open_id: int, ring_gpadl: int, target_vp: int, downstream_page_offset: int, user_data: bytes
    ) -> None:
        self.open_id = open_id
        self.ring_gpadl = ring_gpadl
        self.target_vp = target_vp
        self.downstream_page_offset = downstream_page_offset
        self.user_data = user_data

    def save(self) -> OpenState:
        return OpenState(self.open_id, self.ring_gpadl, self.target_vp, self.downstream_page_offset, self.user_data)

    @classmethod
    def restored(cls, record: OpenState) -> "OpenRequest":
        return cls(record.open_id, record.ring_gpadl, record.target_vp, record.downstream_page_offset, record.user_data)


class Offer:
    """One channel on the bus. `owner` is the caller's, never looked at. `key`: its instance and sub-channel."""

    __slots__ = (
        "flags",
        "instance",
        "interface_type",
        "key",
        "mapped",
        "mmio_megabytes",
        "on_gone",
        "owner",
        "relid",
        "reopen",
        "request",
        "state",
        "subchannel",
        "teardowns",
        "user_defined",
        "waits_for",
        "wanted",
    )

    def __init__(
        self,
        interface_type: UUID,
        instance: UUID,
        flags: int,
        user_defined: bytes,
        owner: Any,
        subchannel: int = 0,
        mmio_megabytes: tuple[int, int] = (0, 0),
    ) -> None:
        self.interface_type = interface_type
        self.instance = instance
        self.flags = flags
        self.user_defined = user_defined
        self.owner = owner
        self.subchannel = subchannel
        self.key = instance.bytes_le, subchannel
        self.mmio_megabytes = mmio_megabytes
        self.relid = 0
        self.state = OfferState.UNOFFERED
        self.request: OpenRequest | None = None
        self.reopen: m.OpenChannel | None = None
        # GPADLs that the owner has mapped, and teardowns that wait for it to let go.
        self.mapped: set[int] = set()
        self.teardowns: list[int] = []
        # The sub-channels after which the owner is asked to close, None unless that waits.
        self.waits_for: list[Offer] | None = None
        self.wanted = True
        # Told when it is withdrawn and the guest has released it, or has lost its connection.
        self.on_gone: Callable[[], None] | None = None

    def move(self, event: OfferEvent) -> None:
        """Raises UsageError naming the offer and what would be possible: a defect of this program."""
        try:
            self.state = TRANSITIONS[self.state, event]
        except KeyError:
            possible = ", ".join(e.value for s, e in TRANSITIONS if s is self.state)
            raise UsageError(
                f"offer {self.name} is {self.state.value}: {event.value!r} is not possible now (possible: {possible})"
            ) from None

    @property
    def name(self) -> str:
        return f"{self.instance}" + (f" (sub-channel {self.subchannel})" if self.subchannel else "")

    @property
    def connection_id(self) -> int:
        """What the guest signals for this channel."""
        return CONNECTION_ID_BASE + self.relid

    @property
    def in_use(self) -> bool:
        """Whether its owner may be touching the rings."""
        return self.state in (OfferState.OPENING, OfferState.OPEN, OfferState.CLOSING)

    def offer_message(self) -> m.OfferChannel:
        return m.OfferChannel(
            self.interface_type,
            self.instance,
            self.flags,
            self.mmio_megabytes[0],
            self.user_defined,
            self.subchannel,
            self.mmio_megabytes[1],
            self.relid,
            0,
            0,
            1,
            self.connection_id,
        )

    @property
    def record(self) -> OfferStateRecord:
        """As it is now, in the middle of opening or closing too."""
        return OfferStateRecord(
            interface_type=self.interface_type.bytes_le,
            instance=self.instance.bytes_le,
            subchannel=self.subchannel,
            relid=self.relid,
            state=self.state.value,
            open=None if self.request is None else self.request.save(),
            withdrawn=not self.wanted,
        )

    def save(self) -> OfferStateRecord:
        """Raises StateError for one in the middle of opening or closing."""
        if self.state in (OfferState.OPENING, OfferState.CLOSING):
            raise StateError(f"channel {self.name} is {self.state.value}: it cannot be saved before that ends")
        return self.record

    def put_back(self, relid: int, state: OfferState, request: OpenRequest | None) -> None:
        """For a restore, the one thing that moves an offer without an event: it is where it was."""
        self.relid = relid
        self.state = state
        self.request = request
