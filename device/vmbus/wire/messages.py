"""Channel messages: what bus and guest say to each other outside of the rings.

A message is at most 240 bytes: `u32 type, u32 0`, then the fields. The table of all messages is `MESSAGES`. A received
message may be longer than its structure (some guests pad), never shorter.

Not served, and answered or ignored as an unknown message: reserved channels (18 to 20), and everything that needs
version 6.0.
"""

from enum import Enum, IntEnum
from struct import Struct
from typing import Any, NamedTuple
from uuid import UUID

from vmbus.errors import PeerError

MAX_MESSAGE_SIZE = 240
_HEADER = Struct("<II")
HEADER_SIZE = _HEADER.size

# The 8-byte words of a GPADL that fit behind the fixed part of each message.
GPADL_HEADER_WORDS = (MAX_MESSAGE_SIZE - 20) // 8
GPADL_BODY_WORDS = (MAX_MESSAGE_SIZE - 16) // 8


class MessageError(PeerError):
    """A channel message is malformed or unknown."""


class Version(IntEnum):
    """Protocol versions that the bus speaks, `major << 16 | minor`."""

    V4_0 = 0x0004_0000
    V4_1 = 0x0004_0001
    V5_0 = 0x0005_0000
    V5_1 = 0x0005_0001
    V5_2 = 0x0005_0002
    V5_3 = 0x0005_0003


class Direction(Enum):
    """Who sends a message."""

    HOST = "host to guest"
    GUEST = "guest to host"


class OfferFlag:
    """Bits of `OfferChannel.flags`."""

    ENUMERATE_DEVICE_INTERFACE = 0x0001
    NAMED_PIPE_MODE = 0x0010
    LOOPBACK_OFFER = 0x0100
    TLNPI_PROVIDER_OFFER = 0x2000


class OfferChannel(NamedTuple):
    """Host offers a channel. `connection_id` is what the guest signals; relids are 1 to 2047."""

    interface_type: UUID
    interface_instance: UUID
    flags: int
    mmio_megabytes: int
    user_defined: bytes
    subchannel_index: int
    mmio_megabytes_optional: int
    relid: int
    monitor_id: int
    monitor_allocated: int
    dedicated_interrupt: int
    connection_id: int


class RescindOffer(NamedTuple):
    """Host withdraws an offer; the relid stays in use until RELID_RELEASED."""

    relid: int


class RequestOffers(NamedTuple):
    """Guest asks for all offers, once per connection."""


class AllOffersDelivered(NamedTuple):
    """Host: the offers that existed at REQUESTOFFERS have all been sent."""


class OpenChannel(NamedTuple):
    """Guest opens a channel; the ring GPADL holds the upstream ring, then the downstream one from page `offset`."""

    relid: int
    open_id: int
    ring_gpadl: int
    target_vp: int
    downstream_page_offset: int
    user_data: bytes


class OpenResult(NamedTuple):
    """Host: the channel is open (status 0) or not (a failing NTSTATUS)."""

    relid: int
    open_id: int
    status: int


class CloseChannel(NamedTuple):
    """Guest closes a channel. There is no answer."""

    relid: int


class GpadlHeader(NamedTuple):
    """Guest starts to describe a GPADL; `words` are the first 8-byte words of its range list."""

    relid: int
    gpadl: int
    range_bytes: int
    range_count: int
    words: bytes


class GpadlBody(NamedTuple):
    """Guest continues a GPADL. `number` is not to be relied on."""

    number: int
    gpadl: int
    words: bytes


class GpadlCreated(NamedTuple):
    """Host: the GPADL is complete and accepted (status 0) or refused."""

    relid: int
    gpadl: int
    status: int


class GpadlTeardown(NamedTuple):
    """Guest wants its memory back."""

    relid: int
    gpadl: int


class GpadlTorndown(NamedTuple):
    """Host: it will not touch the memory any more."""

    gpadl: int


class RelidReleased(NamedTuple):
    """Guest has forgotten a (rescinded) channel: the relid is free."""

    relid: int


class InitiateContact(NamedTuple):
    """Guest proposes a version. `interrupt_page` is the union of offset 16: from 5.0 on byte 0 is the SINT."""

    version: int
    target_vp: int
    interrupt_page: int
    monitor_page_1: int
    monitor_page_2: int


class VersionResponse(NamedTuple):
    """Host accepts or refuses the version; `connection_id` is where later messages go (from 5.0 on)."""

    supported: int
    state: int
    connection_id: int


class Unload(NamedTuple):
    """Guest ends the connection."""


class UnloadResponse(NamedTuple):
    """Host has dropped all channels and GPADLs."""


class ConnectRequest(NamedTuple):
    """Guest wants a channel of a service (TL_CONNECT_REQUEST): the offer is to have `endpoint` for its instance."""

    endpoint: UUID
    service: UUID


class ConnectResult(NamedTuple):
    """Host: there will be no such offer (TL_CONNECT_RESULT); `status` is a failing NTSTATUS."""

    endpoint: UUID
    service: UUID
    status: int


class ModifyChannel(NamedTuple):
    """Guest moves a channel's interrupts to another virtual processor."""

    relid: int
    target_vp: int


class ModifyChannelResponse(NamedTuple):
    """Host: done; sent from version 5.3 on."""

    relid: int
    status: int


class Row(NamedTuple):
    """One row of the message table; `since` is the protocol version it appeared in, `fields` its fixed part."""

    number: int
    message: Any
    direction: Direction
    since: int
    fields: Struct


MESSAGES: dict[int, Row] = {
    row.number: row
    for row in (
        Row(1, OfferChannel, Direction.HOST, 0, Struct("<16s16s16xHH120sHHIBBHI")),
        Row(2, RescindOffer, Direction.HOST, 0, Struct("<I")),
        Row(3, RequestOffers, Direction.GUEST, 0, Struct("<")),
        Row(4, AllOffersDelivered, Direction.HOST, 0, Struct("<")),
        Row(5, OpenChannel, Direction.GUEST, 0, Struct("<IIIII120s")),
        Row(6, OpenResult, Direction.HOST, 0, Struct("<III")),
        Row(7, CloseChannel, Direction.GUEST, 0, Struct("<I")),
        Row(8, GpadlHeader, Direction.GUEST, 0, Struct("<IIHH")),
        Row(9, GpadlBody, Direction.GUEST, 0, Struct("<II")),
        Row(10, GpadlCreated, Direction.HOST, 0, Struct("<III")),
        Row(11, GpadlTeardown, Direction.GUEST, 0, Struct("<II")),
        Row(12, GpadlTorndown, Direction.HOST, 0, Struct("<I")),
        Row(13, RelidReleased, Direction.GUEST, 0, Struct("<I")),
        Row(14, InitiateContact, Direction.GUEST, 0, Struct("<IIQQQ")),
        Row(15, VersionResponse, Direction.HOST, 0, Struct("<BBxxI")),
        Row(16, Unload, Direction.GUEST, 0, Struct("<")),
        Row(17, UnloadResponse, Direction.HOST, 0, Struct("<")),
        Row(21, ConnectRequest, Direction.GUEST, 0, Struct("<16s16s")),
        Row(22, ModifyChannel, Direction.GUEST, Version.V4_1, Struct("<II")),
        Row(23, ConnectResult, Direction.HOST, 0, Struct("<16s16sI")),
        Row(24, ModifyChannelResponse, Direction.HOST, Version.V5_3, Struct("<II")),
    )
}

# Fields on the wire as GUIDs, and the field that takes whatever follows the fixed part.
_GUID_FIELDS = {OfferChannel: 2, ConnectRequest: 2, ConnectResult: 2}
_TAIL_FIELDS = {GpadlHeader, GpadlBody}
_ROWS = {row.message: row for row in MESSAGES.values()}


def encode(message: Any) -> bytes:
    """The wire form of a message of this module, header included: 8 to 240 bytes."""
    values = [value.bytes_le if isinstance(value, UUID) else value for value in message]
    row = _ROWS[type(message)]
    tail: bytes = values.pop() if row.message in _TAIL_FIELDS else b""
    encoded = _HEADER.pack(row.number, 0) + row.fields.pack(*values) + tail
    if len(encoded) > MAX_MESSAGE_SIZE:
        raise ValueError(f"{type(message).__name__} of {len(encoded)} bytes exceeds {MAX_MESSAGE_SIZE}")
    return encoded


def decode(data: bytes, direction: Direction) -> Any:
    """The message in `data` (at most 240 bytes) as a named tuple of this module.

    Raises MessageError for an unknown number, one that only the other side may send, and a message that is too short.
    """
    if not HEADER_SIZE <= len(data) <= MAX_MESSAGE_SIZE:
        raise MessageError(f"a channel message of {len(data)} bytes ({HEADER_SIZE} to {MAX_MESSAGE_SIZE} are possible)")
    number = _HEADER.unpack_from(data)[0]
    row = MESSAGES.get(number)
    if row is None or row.direction is not direction:
        raise MessageError(f"message number {number} is not known from {direction.value}")
    end = HEADER_SIZE + row.fields.size
    if len(data) < end:
        raise MessageError(f"{row.message.__name__} needs {end} bytes and has {len(data)}")
    values: list[Any] = list(row.fields.unpack_from(data, HEADER_SIZE))
    for index in range(_GUID_FIELDS.get(row.message, 0)):
        values[index] = UUID(bytes_le=values[index])
    if row.message in _TAIL_FIELDS:
        tail = data[end:]
        values.append(tail[: len(tail) & ~7])
    return row.message(*values)


def gpadl_messages(relid: int, gpadl: int, ranges: bytes, range_count: int) -> list[bytes]:
    """The GPADL_HEADER and as many GPADL_BODY messages as the packed range list `ranges` needs."""
    if not 0 < len(ranges) <= 0xFFFF:
        raise ValueError(f"a GPADL's range list has 1 to 65535 bytes, not {len(ranges)}")
    cut = GPADL_HEADER_WORDS * 8
    messages = [encode(GpadlHeader(relid, gpadl, len(ranges), range_count, ranges[:cut]))]
    step = GPADL_BODY_WORDS * 8
    for number, start in enumerate(range(cut, len(ranges), step)):
        messages.append(encode(GpadlBody(number, gpadl, ranges[start : start + step])))
    return messages
