"""RNDIS: what a VMBus network card and its guest say to each other over NVSP. See docs/provider-network.md.

A message is `u32 type, u32 length` and a body, little-endian. *Offsets* in the fields of a message count from its byte
8. A packet message carries one Ethernet frame, and in front of it *per-packet information*: records of `u32 size, u32
type, u32 offset of the value`, then the value. Linux loops for ever over such a record that is malformed, so those that
are sent here are made in one place, and have 16 bytes each.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum, IntFlag
from struct import Struct, pack, unpack_from
from typing import NamedTuple

from vmbus.errors import PeerError

HEADER_SIZE = 8
PACKET_SIZE = 44
"""Bytes of a packet message before its per-packet information."""
PPI_SIZE = 16
"""Bytes of each of those that are sent here."""
PACKETS_PER_MESSAGE = 8
"""Packet messages that the guest may send together."""
TRANSFER_SIZE = 0x4000
ALIGNMENT_EXPONENT = 3
CONTROL_LIMIT = 4096
"""Bytes of data in one control message."""

_HEADER = Struct("<II")
_PACKET = Struct("<11I")
_CONTROL = Struct("<III")  # type, length, request id
_INITIALIZE = Struct("<6I")
_REQUEST = Struct("<7I")  # QUERY and SET: type, length, id, OID, length and offset of the data, 0
_INITIALIZE_COMPLETE = Struct("<13I")
_QUERY_COMPLETE = Struct("<6I")
_SET_COMPLETE = Struct("<4I")
_INDICATE = Struct("<5I")
_PPI = Struct("<III")
_ONE_PPI = Struct("<IIII")
_PPI_TYPE = 0x7FFFFFFF  # the highest bit marks types of the guest's own


class Type(IntEnum):
    PACKET = 1
    INITIALIZE = 2
    HALT = 3
    QUERY = 4
    SET = 5
    RESET = 6
    INDICATE = 7
    KEEPALIVE = 8
    INITIALIZE_COMPLETE = 0x80000002
    QUERY_COMPLETE = 0x80000004
    SET_COMPLETE = 0x80000005
    RESET_COMPLETE = 0x80000006
    KEEPALIVE_COMPLETE = 0x80000008


class Status(IntEnum):
    """How a request was taken, and what INDICATE tells."""

    SUCCESS = 0
    MEDIA_CONNECT = 0x4001000B
    MEDIA_DISCONNECT = 0x4001000C
    FAILURE = 0xC0000001
    NOT_SUPPORTED = 0xC00000BB
    INVALID_DATA = 0xC0010015


class Ppi(IntEnum):
    """Types of per-packet information."""

    CHECKSUM = 0
    LSO = 2
    VLAN = 6
    HASH = 9


class Checksum(IntFlag):
    """What a frame of the guest's wants: bits of Ppi.CHECKSUM. From bit 16 on, 10 bits say where the TCP or UDP header
    is."""

    IPV4 = 1
    IPV6 = 2
    TCP = 4
    UDP = 8
    IP_HEADER = 16


RECEIVED_TCP_GOOD = 1 << 3
RECEIVED_UDP_GOOD = 1 << 4
"""Bits of Ppi.CHECKSUM to the guest: it need not look at the sum."""


class RndisError(PeerError):
    """A message of the guest's does not add up."""


class Packet(NamedTuple):
    """A frame of the guest's. `information`: the values of its per-packet information, the first of each type."""

    frame: memoryview
    information: dict[int, int]


class Initialize(NamedTuple):
    request: int
    major: int
    minor: int
    maximum_transfer: int


class Halt(NamedTuple):
    """The last one. Not answered."""

    request: int


class Query(NamedTuple):
    """A question for an OID; `data` goes with some of them."""

    request: int
    oid: int
    data: bytes


class Set(NamedTuple):
    request: int
    oid: int
    data: bytes


class Keepalive(NamedTuple):
    """Whether somebody is there."""

    request: int


class Reset(NamedTuple):
    """Back to the beginning."""


Message = Packet | Initialize | Halt | Query | Set | Keepalive | Reset


def messages(data: bytes) -> Iterator[memoryview]:
    """The messages that lie one behind the other in the bytes of one VMBus packet. Raises RndisError.

    Padding behind the last one, which is shorter than a header, is no message.
    """
    view = memoryview(data)
    while len(view) >= HEADER_SIZE:
        length = _HEADER.unpack_from(view)[1]
        if not HEADER_SIZE < length <= len(view):
            raise RndisError(f"an RNDIS message of {length} bytes, {len(view)} of them here")
        yield view[:length]
        view = view[length:]


def parse(message: memoryview) -> Message:
    """One message of the guest's, whole. Raises RndisError."""
    kind = _HEADER.unpack_from(message)[0]
    size = len(message)
    if kind == Type.PACKET:
        return _parse_packet(message)
    if kind in (Type.QUERY, Type.SET):
        if size < _REQUEST.size:
            raise RndisError(f"a request of {size} bytes")
        _, _, request, oid, length, offset, _ = _REQUEST.unpack_from(message)
        if length > CONTROL_LIMIT or (length and not _REQUEST.size - 8 <= offset <= size - 8 - length):
            raise RndisError(f"a request of {size} bytes with {length} bytes of data at {offset}")
        data = bytes(message[8 + offset : 8 + offset + length]) if length else b""
        return Query(request, oid, data) if kind == Type.QUERY else Set(request, oid, data)
    if kind == Type.INITIALIZE and size >= _INITIALIZE.size:
        return Initialize(*_INITIALIZE.unpack_from(message)[2:])
    if kind in (Type.HALT, Type.KEEPALIVE) and size >= _CONTROL.size:
        request = _CONTROL.unpack_from(message)[2]
        return Halt(request) if kind == Type.HALT else Keepalive(request)
    if kind == Type.RESET:
        return Reset()
    raise RndisError(f"an RNDIS message of type {kind:#x} and {size} bytes")


def _parse_packet(message: memoryview) -> Packet:
    size = len(message)
    if size < PACKET_SIZE:
        raise RndisError(f"a packet message of {size} bytes")
    _, _, offset, length, _, _, _, at, total, _, _ = _PACKET.unpack_from(message)
    if not PACKET_SIZE - 8 <= offset <= size - 8 - length:
        raise RndisError(f"a packet message of {size} bytes with a frame of {length} at {offset}")
    frame = message[8 + offset : 8 + offset + length]
    if not total:
        return Packet(frame, {})
    if not PACKET_SIZE - 8 <= at <= size - 8 - total:
        raise RndisError(f"a packet message of {size} bytes with {total} bytes of information at {at}")
    return Packet(frame, _information(message[8 + at : 8 + at + total]))


def _information(records: memoryview) -> dict[int, int]:
    found: dict[int, int] = {}
    while records:
        if len(records) < _PPI.size:
            raise RndisError(f"{len(records)} bytes behind the last per-packet information")
        size, kind, offset = _PPI.unpack_from(records)
        # A record is at least its header, so this comes to an end.
        if not _PPI.size <= size <= len(records) or not _PPI.size <= offset <= size:
            raise RndisError(f"per-packet information of {size} bytes, its value at {offset}")
        if offset + 4 <= size and kind <= _PPI_TYPE:
            found.setdefault(kind, unpack_from("<I", records, offset)[0])
        records = records[size:]
    return found


# ---- what the host answers, and sends --------------------------------------------------------------------------------


def initialize_complete(request: int) -> bytes:
    return _INITIALIZE_COMPLETE.pack(
        Type.INITIALIZE_COMPLETE,
        _INITIALIZE_COMPLETE.size,
        request,
        Status.SUCCESS,
        1,
        0,
        1,  # connectionless
        0,  # 802.3
        PACKETS_PER_MESSAGE,
        TRANSFER_SIZE,
        ALIGNMENT_EXPONENT,
        0,
        0,
    )


def query_complete(request: int, status: int, data: bytes = b"") -> bytes:
    size = _QUERY_COMPLETE.size + len(data)
    return _QUERY_COMPLETE.pack(Type.QUERY_COMPLETE, size, request, status, len(data), 16) + data


def set_complete(request: int, status: int) -> bytes:
    return _SET_COMPLETE.pack(Type.SET_COMPLETE, _SET_COMPLETE.size, request, status)


def keepalive_complete(request: int) -> bytes:
    return _SET_COMPLETE.pack(Type.KEEPALIVE_COMPLETE, _SET_COMPLETE.size, request, Status.SUCCESS)


def reset_complete() -> bytes:
    """The answer to RESET: filters and the like have to be set again."""
    return _SET_COMPLETE.pack(Type.RESET_COMPLETE, _SET_COMPLETE.size, Status.SUCCESS, 1)


def indicate(status: int) -> bytes:
    return _INDICATE.pack(Type.INDICATE, _INDICATE.size, status, 0, 0)


def packet_header(length: int, information: bytes = b"") -> bytes:
    """What comes before a frame of `length` bytes; `information`: what `ppi` has made."""
    at = PACKET_SIZE - 8 if information else 0
    whole = PACKET_SIZE + len(information) + length
    frame = PACKET_SIZE - 8 + len(information)
    return _PACKET.pack(Type.PACKET, whole, frame, length, 0, 0, 0, at, len(information), 0, 0) + information


def ppi(kind: int, value: int) -> bytes:
    """One piece of per-packet information."""
    return _ONE_PPI.pack(PPI_SIZE, kind, _PPI.size, value)


# ---- for a guest of ours ---------------------------------------------------------------------------------------------


def initialize(request: int) -> bytes:
    """The first message."""
    return _INITIALIZE.pack(Type.INITIALIZE, _INITIALIZE.size, request, 1, 0, TRANSFER_SIZE)


def halt(request: int) -> bytes:
    """The last one."""
    return _CONTROL.pack(Type.HALT, _CONTROL.size, request)


def query(request: int, oid: int, data: bytes = b"") -> bytes:
    """A question."""
    return _REQUEST.pack(Type.QUERY, _REQUEST.size + len(data), request, oid, len(data), 20, 0) + data


def set_oid(request: int, oid: int, data: bytes) -> bytes:
    """A new value."""
    return _REQUEST.pack(Type.SET, _REQUEST.size + len(data), request, oid, len(data), 20, 0) + data


def keepalive(request: int) -> bytes:
    """Whether somebody is there."""
    return pack("<III", Type.KEEPALIVE, 12, request)
