"""Packets as they lie in a ring: a 16-byte descriptor, headers of the type, payload, padding, an 8-byte trailer.

Descriptor: `u16 type, u16 offset8, u16 len8, u16 flags, u64 transaction`. `offset8` and `len8` count 8-byte words from
the start of the descriptor to the payload and to the end of the packet; the trailer is not part of `len8`. The exact
payload length is not on the wire: a receiver sees it padded to a multiple of 8.
"""

from collections.abc import Sequence
from enum import IntEnum
from struct import Struct, pack, unpack_from
from typing import NamedTuple

from vmbus.errors import PeerError
from vmbus.native.choice import core
from vmbus.wire.gpa import GpaRange, RangeError, pack_ranges, parse_ranges

DESCRIPTOR_SIZE = 16
TRAILER_SIZE = 8
OVERHEAD = DESCRIPTOR_SIZE + TRAILER_SIZE
FLAG_COMPLETION_REQUESTED = 1
MAX_PACKET_SIZE = 0xFFFF * 8
MAX_RANGES = 1024


class PacketType(IntEnum):
    """The packet types that are served; a receiver treats any other as corruption."""

    INBAND = 6
    TRANSFER_PAGES = 7
    GPA_DIRECT = 9
    COMPLETION = 11


_INBAND = int(PacketType.INBAND)
_TRANSFER_PAGES = int(PacketType.TRANSFER_PAGES)
_GPA_DIRECT = int(PacketType.GPA_DIRECT)
_COMPLETION = int(PacketType.COMPLETION)

_DESCRIPTOR = Struct("<HHHHQ")
_GPA_HEADER = Struct("<II")
_TRANSFER_HEADER = Struct("<HBBI")  # page set, 0, 0, ranges; then (length, offset) of each


class PacketError(PeerError):
    """A packet in a ring is malformed."""


class TransferPages(NamedTuple):
    """Parts of memory that the receiver has lent to the sender; a packet hands them over until it is completed.

    `page_set`: the number that both sides have given to that memory. `ranges`: (offset, length) of each part, bytes.
    """

    page_set: int
    ranges: Sequence[tuple[int, int]]


class RawPacket(NamedTuple):
    """One packet, parsed from a private copy of the ring.

    `body` holds the type's own headers between descriptor and payload (empty for in-band packets and completions);
    `end` is the offset behind this packet's trailer in the copy it was parsed from.
    """

    kind: int
    flags: int
    transaction: int
    body: bytes
    payload: bytes
    end: int


def largest_packet(size: int) -> int:
    """Ring bytes of the largest packet (descriptor, padding and trailer included) that fits a ring of `size` bytes."""
    return min(size - 16, MAX_PACKET_SIZE)


def packet_size(length: int) -> int:
    """Bytes of ring that a packet takes whose headers and payload behind the descriptor are `length` bytes."""
    return ((length + 7) & ~7) + OVERHEAD


def pure_split_packets(data: bytes, /) -> tuple[list[RawPacket], str | None]:
    """Cut a private copy of ring data into packets, checking every descriptor.

    A packet that is not wholly inside `data` ends the list without an error. A malformed one ends it with an
    explanation, after the good packets before it.
    """
    packets: list[RawPacket] = []
    append = packets.append
    new = tuple.__new__  # what RawPacket() comes to, without a call in between for each packet
    unpack = _DESCRIPTOR.unpack_from
    start = 0
    size = len(data)
    while start + DESCRIPTOR_SIZE <= size:
        kind, offset8, len8, flags, transaction = unpack(data, start)
        payload = start + offset8 * 8
        stop = start + len8 * 8
        end = stop + TRAILER_SIZE
        if kind in (_INBAND, _COMPLETION):
            wrong = offset8 != 2
        elif kind in (_GPA_DIRECT, _TRANSFER_PAGES):
            wrong = offset8 < 3
        else:
            return packets, f"packet type {kind} at offset {start} of the batch is not served"
        if wrong or len8 < offset8 or flags & ~FLAG_COMPLETION_REQUESTED:
            return packets, f"descriptor type={kind} offset8={offset8} len8={len8} flags={flags:#x} is malformed"
        if end > size:
            break
        append(new(RawPacket, (kind, flags, transaction, data[start + 16 : payload], data[payload:stop], end)))
        start = end
    return packets, None


split_packets = pure_split_packets if core is None else core.split_packets


def first_packet_size(data: bytes) -> int:
    """Ring bytes that the packet at the start of `data` claims (its trailer included), or 0 without a descriptor."""
    if len(data) < DESCRIPTOR_SIZE:
        return 0
    len8: int = _DESCRIPTOR.unpack_from(data)[2]
    return len8 * 8 + TRAILER_SIZE


def gpa_direct_body(ranges: list[GpaRange], payload: bytes) -> tuple[bytes, int]:
    """What follows the descriptor of a GPA-direct packet, and its `offset8`."""
    described = pack_ranges(ranges)
    return _GPA_HEADER.pack(0, len(ranges)) + described + payload, 3 + len(described) // 8


def parse_gpa_direct(body: bytes, *, max_bytes: int) -> list[GpaRange]:
    """The ranges of a GPA-direct packet from its `RawPacket.body`. Raises PacketError."""
    if len(body) < 8:
        raise PacketError("a GPA-direct packet without a range header")
    count = _GPA_HEADER.unpack_from(body)[1]
    if not 0 < count <= MAX_RANGES:
        raise PacketError(f"a GPA-direct packet with {count} ranges (1 to {MAX_RANGES} are allowed)")
    try:
        return parse_ranges(body, count, max_bytes=max_bytes, start=8)[0]
    except RangeError as error:
        raise PacketError(f"a GPA-direct packet with bad ranges: {error}") from error


def transfer_pages_body(pages: TransferPages, payload: bytes) -> tuple[bytes, int]:
    """What follows the descriptor of a packet over transfer pages, and its `offset8`. Raises struct.error for numbers
    that do not fit."""
    count = len(pages.ranges)
    numbers = [number for offset, length in pages.ranges for number in (length, offset)]
    described = pack(f"<{2 * count}I", *numbers)
    return _TRANSFER_HEADER.pack(pages.page_set, 0, 0, count) + described + payload, 3 + count


def parse_transfer_pages(body: bytes) -> TransferPages:
    """What a packet over transfer pages hands over, from its `RawPacket.body`. Raises PacketError."""
    if len(body) < _TRANSFER_HEADER.size:
        raise PacketError("a packet over transfer pages without a range header")
    page_set, _, _, count = _TRANSFER_HEADER.unpack_from(body)
    if not 0 < count <= MAX_RANGES or len(body) < _TRANSFER_HEADER.size + 8 * count:
        raise PacketError(f"a packet over transfer pages with {count} ranges in {len(body)} bytes")
    numbers = unpack_from(f"<{2 * count}I", body, _TRANSFER_HEADER.size)
    return TransferPages(page_set, list(zip(numbers[1::2], numbers[::2], strict=True)))
