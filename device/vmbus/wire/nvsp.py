"""NVSP: the messages of a VMBus network card, as Linux's hv_netvsc speaks them. See docs/provider-network.md.

The guest sets the card up: INIT (versions), NDIS configuration, two buffers of its own that it lends, RNDIS messages.
A message is `u32 type` and a body, little-endian, packed. The guest pads each to 40 bytes; the host answers with 64,
since Linux copies that much. An answer is the completion packet of the request; some messages have none.

The bytes of RNDIS messages (`vmbus.wire.rndis`) are never in here: they lie in a section of the send buffer, in memory
that the packet describes, or, to the guest, in the receive buffer, which the packet hands over as transfer pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from struct import Struct, pack, unpack_from
from struct import error as StructError
from typing import NamedTuple
from uuid import UUID

NVSP_TYPE = UUID("f8615163-df3e-46c5-913f-f2d2f965ed0e")

VERSIONS = (0x00002, 0x30002, 0x40000, 0x50000, 0x60000, 0x60001)
"""NVSP 1, 2, 4, 5, 6.0 and 6.1."""
VERSION_2 = 0x30002
VERSION_5 = 0x50000
VERSION_6_1 = 0x60001

RECEIVE_BUFFER_ID = 0xCAFE
"""The page set of packets over transfer pages, too."""
NO_SECTION = 0xFFFFFFFF
DATA_CHANNEL = 0
CONTROL_CHANNEL = 1
MDL_CHAIN = 34
"""Pieces of memory in one packet, as the answer to INIT says."""

_PADDED = 64
_TWO = Struct("<II")
_THREE = Struct("<III")
_FOUR = Struct("<IIII")
_BUFFER = Struct("<IIH")  # type, GPADL, id
_REVOKE = Struct("<IH")
_CONFIG = Struct("<IIIQ")  # type, MTU with the Ethernet header, 0, capabilities
_RECEIVE = Struct("<7I")  # type, status, sections, and one of them: offset, size, count, end


class Type(IntEnum):
    INIT = 1
    INIT_COMPLETE = 2
    NDIS_VERSION = 100
    RECEIVE_BUFFER = 101
    RECEIVE_BUFFER_COMPLETE = 102
    REVOKE_RECEIVE_BUFFER = 103
    SEND_BUFFER = 104
    SEND_BUFFER_COMPLETE = 105
    REVOKE_SEND_BUFFER = 106
    RNDIS = 107
    RNDIS_COMPLETE = 108
    NDIS_CONFIG = 125
    SWITCH_DATA_PATH = 129
    OID_QUERY = 131
    OID_QUERY_COMPLETE = 132
    SUB_CHANNELS = 133
    INDIRECTION_TABLE = 134
    PD_API = 135
    PD_POST_BATCH = 136


class Status(IntEnum):
    NONE = 0
    SUCCESS = 1
    FAILURE = 2
    INVALID_RNDIS = 5
    BUSY = 6


class Init(NamedTuple):
    """The first message: versions that the guest would take, from `lowest` to `highest`."""

    lowest: int
    highest: int


class NdisVersion(NamedTuple):
    """Which NDIS the guest's driver follows. Not answered."""

    major: int
    minor: int


class NdisConfig(NamedTuple):
    """`mtu`: with the 14 bytes of the Ethernet header. Not answered."""

    mtu: int
    capabilities: int


class ReceiveBuffer(NamedTuple):
    """The guest lends memory for what it is to receive."""

    gpadl: int
    identifier: int


class SendBuffer(NamedTuple):
    """The guest lends memory through which it sends short frames."""

    gpadl: int
    identifier: int


class RevokeReceiveBuffer(NamedTuple):
    """It is not to be touched any more. Not answered."""

    identifier: int


class RevokeSendBuffer(NamedTuple):
    """It is not to be touched any more. Not answered."""

    identifier: int


class Rndis(NamedTuple):
    """RNDIS messages: `size` bytes of a section of the send buffer, then the memory that the packet describes."""

    channel: int
    section: int
    size: int


class SubChannels(NamedTuple):
    """The guest asks for so many more channels (`operation` 1: allocate)."""

    operation: int
    wanted: int


class PdApi(NamedTuple):
    """The guest asks for something of PacketDirect, which cards in software do not have."""

    operation: int


class Other(NamedTuple):
    """A message that is known and not served."""

    type: Type


Message = (
    Init
    | NdisVersion
    | NdisConfig
    | ReceiveBuffer
    | SendBuffer
    | RevokeReceiveBuffer
    | RevokeSendBuffer
    | Rndis
    | SubChannels
    | PdApi
    | Other
)

_LAYOUTS: dict[int, tuple[type[Message], Struct]] = {
    Type.INIT: (Init, _THREE),
    Type.NDIS_VERSION: (NdisVersion, _THREE),
    Type.RECEIVE_BUFFER: (ReceiveBuffer, _BUFFER),
    Type.REVOKE_RECEIVE_BUFFER: (RevokeReceiveBuffer, _REVOKE),
    Type.SEND_BUFFER: (SendBuffer, _BUFFER),
    Type.REVOKE_SEND_BUFFER: (RevokeSendBuffer, _REVOKE),
    Type.RNDIS: (Rndis, _FOUR),
    Type.SUB_CHANNELS: (SubChannels, _THREE),
    Type.PD_API: (PdApi, _TWO),
}
_OTHERS = {Type.SWITCH_DATA_PATH, Type.OID_QUERY, Type.PD_POST_BATCH}


def parse(payload: bytes) -> Message | None:
    """A message of the guest's; None when it makes no sense."""
    try:
        (kind,) = unpack_from("<I", payload)
        if kind == Type.NDIS_CONFIG:
            _, mtu, _, capabilities = _CONFIG.unpack_from(payload)
            return NdisConfig(mtu, capabilities)
        if kind in _LAYOUTS:
            made, layout = _LAYOUTS[kind]
            return made(*layout.unpack_from(payload)[1:])
        if kind in _OTHERS:
            return Other(Type(kind))
    except StructError:
        pass
    return None


# ---- what the guest sends: for a guest of ours -----------------------------------------------------------------------


def pack_message(message: Message) -> bytes:
    """A message of the guest's, as Linux pads it."""
    if isinstance(message, NdisConfig):
        packed = _CONFIG.pack(Type.NDIS_CONFIG, message.mtu, 0, message.capabilities)
    elif isinstance(message, Other):
        packed = pack("<I", message.type)
    else:
        kind = next(kind for kind, (made, _) in _LAYOUTS.items() if made is type(message))
        packed = _LAYOUTS[kind][1].pack(kind, *message)
    return packed.ljust(40, b"\0")


# ---- what the host answers, and sends --------------------------------------------------------------------------------


def init_complete(version: int, status: int) -> bytes:
    return _FOUR.pack(Type.INIT_COMPLETE, version, MDL_CHAIN, status).ljust(_PADDED, b"\0")


def receive_buffer_complete(status: int, size: int = 0, count: int = 0) -> bytes:
    """The answer to RECEIVE_BUFFER: so many sections of `size` bytes, from its beginning on."""
    packed = _RECEIVE.pack(Type.RECEIVE_BUFFER_COMPLETE, status, int(count > 0), 0, size, count, size * count)
    return packed.ljust(_PADDED, b"\0")


def send_buffer_complete(status: int, section: int = 0) -> bytes:
    """The answer to SEND_BUFFER: it is cut into sections of so many bytes."""
    return _THREE.pack(Type.SEND_BUFFER_COMPLETE, status, section).ljust(_PADDED, b"\0")


def rndis_complete(status: int) -> bytes:
    """The answer to RNDIS: its memory is the guest's again."""
    return _TWO.pack(Type.RNDIS_COMPLETE, status).ljust(16, b"\0")


def sub_channels_complete(status: int, granted: int) -> bytes:
    """The answer to SUB_CHANNELS: so many are going to be offered."""
    return _THREE.pack(Type.SUB_CHANNELS, status, granted).ljust(_PADDED, b"\0")


def oid_query_complete(status: int) -> bytes:
    """The answer to a query outside of RNDIS."""
    return _TWO.pack(Type.OID_QUERY_COMPLETE, status).ljust(_PADDED, b"\0")


def pd_api_complete(operation: int, status: int) -> bytes:
    """The answer to PD_API; whatever it would give is zero."""
    return _THREE.pack(Type.PD_API, operation, status).ljust(_PADDED, b"\0")


def rndis(channel: int) -> bytes:
    """RNDIS messages to the guest, in the packet's transfer pages."""
    return _FOUR.pack(Type.RNDIS, channel, NO_SECTION, 0).ljust(40, b"\0")


def indirection_table(entries: Sequence[int]) -> bytes:
    """Which queue the guest is to send on, by the hash of a flow. Not answered."""
    return _THREE.pack(Type.INDIRECTION_TABLE, len(entries), 12) + pack(f"<{len(entries)}I", *entries)


class Parsed(NamedTuple):
    """An answer of the host's, or a message to the guest, for a guest of ours: its type and all words behind it."""

    type: int
    words: tuple[int, ...]


def parse_answer(payload: bytes) -> Parsed:
    """Raises struct.error for less than a word."""
    count = len(payload) // 4
    (kind, *words) = unpack_from(f"<{max(count, 1)}I", payload)
    return Parsed(kind, tuple(words))
