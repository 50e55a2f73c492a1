"""What a card answers to questions about itself (OIDs), by table, and what it takes from its guest. Sans-I/O."""

from __future__ import annotations

import re
from collections.abc import Callable
from struct import Struct, pack, unpack_from
from struct import error as StructError
from typing import Protocol

from vmbus.providers.network.spread import KEY_LIMIT, Spread
from vmbus.wire.ethernet import parse_mac

LINK_SPEED = 100_000_000
"""In units of 100 bit/s: 10 Gbit/s."""
RSS_ENTRIES = 128
"""Of a guest's table by which frames are spread over its queues."""
NAME_LIMIT = 255
"""Characters of the card's name."""

LARGEST_FRAME = 0x00010106
PACKET_FILTER = 0x0001010E
MEDIA_CONNECT_STATUS = 0x00010114
RSS_CAPABILITIES = 0x00010203
RSS_PARAMETERS = 0x00010204
MULTICAST_LIST = 0x01010103
FRIENDLY_NAME = 0x00020216
CONFIG_PARAMETER = 0x0001021B
PERMANENT_ADDRESS = 0x01010101
CURRENT_ADDRESS = 0x01010102
OFFLOAD_PARAMETERS = 0xFC01020C
OFFLOAD_HW_CAPABILITIES = 0xFC01020D

FILTER_DIRECTED = 0x1
FILTER_MULTICAST = 0x2
FILTER_ALL_MULTICAST = 0x4
FILTER_BROADCAST = 0x8
FILTER_PROMISCUOUS = 0x20

_OFFLOAD_SIZE = 156
_NDIS_HEADER = Struct("<BBH")
_RSS = Struct("<BBHHHIHxxIHxxI")  # the header, flags, CPU, hash; size and offset of the table, and of the key
_CONFIG = Struct("<5I")  # offset and size of the name, kind, offset and size of the value
_TEXT = 2  # a kind
_8023 = 2  # encapsulation
_TCP4 = 0x4 | 0x10  # checksums, with options
_TCP6 = 0x1 | 0x4 | 0x10  # the same, with extension headers
_UDP = 0x40
_LSO6 = 0x5  # with extension headers and options
_LSO_SIZE = 0xF53C
_LSO_SEGMENTS = 2
_ON = 2


class About(Protocol):
    mac: bytes
    address: bytes
    name: str

    @property
    def mtu(self) -> int: ...

    @property
    def offers_offload(self) -> bool: ...

    @property
    def offers_coalescing(self) -> bool: ...

    @property
    def queue_count(self) -> int: ...

    @property
    def link_up(self) -> bool: ...

    @property
    def filter(self) -> int: ...

    @property
    def statistics(self) -> dict[str, int]: ...


def ndis_offload(offload: bool, coalescing: bool) -> bytes:
    """NDIS_OFFLOAD, revision 3: which offloads the card has. `coalescing`: frames to the guest may be long (RSC)."""
    whole = bytearray(_OFFLOAD_SIZE)
    _NDIS_HEADER.pack_into(whole, 0, 0xA7, 3, _OFFLOAD_SIZE)

    def put(at: int, value: int) -> None:
        whole[at : at + 4] = pack("<I", value)

    if offload:
        for at, flags in ((4, _TCP4 | _UDP), (12, _TCP4 | _UDP), (20, _TCP6 | _UDP), (28, _TCP6 | _UDP)):
            put(at, _8023)
            put(at + 4, flags)
        for at in (80, 92):
            put(at, _8023)
            put(at + 4, _LSO_SIZE)
            put(at + 8, _LSO_SEGMENTS)
        put(104, _LSO6)
    if coalescing:
        whole[144:146] = b"\1\1"
    return bytes(whole)


def _rss_capabilities(card: About) -> bytes:
    if card.queue_count < 2:
        return b""
    # TCP and IP over both; the hash function is Toeplitz.
    flags = 0x00000300 | 0x1
    return pack("<BBHIIIH", 0x88, 2, 18, flags, card.queue_count, card.queue_count, RSS_ENTRIES)


def _word(value: int) -> bytes:
    return pack("<I", value & 0xFFFFFFFF)


_QUERIES: dict[int, Callable[[About], bytes]] = {
    0x00010102: lambda _: _word(0),  # hardware status: ready
    0x00010103: lambda _: _word(0),  # media supported, in use: 802.3
    0x00010104: lambda _: _word(0),
    LARGEST_FRAME: lambda card: _word(card.mtu),
    0x00010107: lambda _: _word(LINK_SPEED),
    PACKET_FILTER: lambda card: _word(card.filter),
    0x00010111: lambda card: _word(card.mtu + 14),  # maximum total size
    MEDIA_CONNECT_STATUS: lambda card: _word(not card.link_up),
    RSS_CAPABILITIES: _rss_capabilities,
    0x00020101: lambda card: _word(card.statistics["to_host"]),
    0x00020102: lambda card: _word(card.statistics["to_guest"]),
    FRIENDLY_NAME: lambda card: card.name[:NAME_LIMIT].encode("utf-16-le"),
    PERMANENT_ADDRESS: lambda card: card.mac,
    CURRENT_ADDRESS: lambda card: card.address,
    0x01010104: lambda _: _word(32),  # maximum list size; the list is taken and not needed
    OFFLOAD_HW_CAPABILITIES: lambda card: ndis_offload(card.offers_offload, card.offers_coalescing),
}


def answer(card: About, oid: int) -> bytes | None:
    """The data of the answer to a question; None when nothing is known of it."""
    found = _QUERIES.get(oid)
    return None if found is None else found(card)


def coalescing_wanted(data: bytes) -> bool | None:
    """OFFLOAD_PARAMETERS: whether long frames may come to the guest; None: it does not say, or the data is none."""
    try:
        kind, _, size = _NDIS_HEADER.unpack_from(data)
        if kind != 0x80 or not 22 <= size <= len(data):
            return None
        if size < 24:
            return False
        four, six = data[22], data[23]
    except (StructError, IndexError):
        return None
    return four == _ON and six == _ON if four or six else None


def offload_parameters(data: bytes) -> bool:
    return len(data) >= 22 and data[0] == 0x80 and 22 <= unpack_from("<H", data, 2)[0] <= len(data)


_HASH_KEPT, _TABLE_KEPT, _KEY_KEPT, _RSS_OFF = 2, 4, 8, 0x10  # flags of RSS_PARAMETERS
_TOEPLITZ = 1


def rss_parameters(data: bytes, queues: int, before: Spread) -> Spread | None:
    """What RSS_PARAMETERS make of how frames were spread `before` over so many queues; None when they make no sense."""
    try:
        kind, _, size, flags, _, info, length, offset, key_length, key_offset = _RSS.unpack_from(data)
    except StructError:
        return None
    if kind != 0x89 or not _RSS.size <= size <= len(data):
        return None
    function, types = info & 0xFF, info & ~0xFF
    if flags & _RSS_OFF or not (info or flags & _HASH_KEPT):
        return Spread((), before.key, before.types)
    table, key = before.table, before.key
    if not flags & _TABLE_KEPT:
        if length % 4 or not 0 < length <= 4 * RSS_ENTRIES or not _RSS.size <= offset <= len(data) - length:
            return None
        table = unpack_from(f"<{length // 4}I", data, offset)
    if not flags & _KEY_KEPT and key_length:
        if key_length > KEY_LIMIT or not _RSS.size <= key_offset <= len(data) - key_length:
            return None
        key = data[key_offset : key_offset + key_length]
    if flags & _HASH_KEPT:
        types = before.types
    elif function != _TOEPLITZ:
        return None
    return Spread(table, key, types) if table and max(table) < queues else None


def config_parameter(data: bytes) -> tuple[str, str] | None:
    """CONFIG_PARAMETER: the name and the value of one that is text; None when it makes no sense."""
    try:
        name_at, name_size, kind, value_at, value_size = _CONFIG.unpack_from(data)
    except StructError:
        return None
    texts = []
    for at, size in ((name_at, name_size), (value_at, value_size)):
        if kind != _TEXT or not _CONFIG.size <= at <= len(data) - size:
            return None
        texts.append(data[at : at + size].decode("utf-16-le", "replace").rstrip("\0"))
    return texts[0], texts[1]


def station(text: str) -> bytes | None:
    """The address in a parameter `NetworkAddress`, "020000000001" or with dashes; None when it is none."""
    try:
        return parse_mac(":".join(re.findall("..?", text.replace("-", ""))))
    except ValueError:
        return None
