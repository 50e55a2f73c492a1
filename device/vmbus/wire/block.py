"""The messages of the block device, shared by its provider and the guest's service; see docs/provider-block.md.

Every message is a request of the guest's, and its completion packet carries the reply. The first one is HELLO. The data
of READ and WRITE is external data of the packet, never in the message.
"""

from enum import IntEnum, IntFlag
from struct import Struct, error
from typing import NamedTuple
from uuid import UUID

BLOCK_TYPE = UUID("5a2f2c7e-3d0e-4c43-9b58-6f0d2f1e0010")
VERSION = 1

_HELLO = Struct("<IIII")  # op, version, features, 0
_HELLO_REPLY = Struct("<IIIIQIIQ16s")
_REQUEST = Struct("<IIQQ")  # op, flags, offset, length
_REPLY = Struct("<II")  # status, 0


class Op(IntEnum):
    """What is asked for."""

    HELLO = 1
    READ = 2
    WRITE = 3
    FLUSH = 4
    DISCARD = 5
    WRITE_ZEROES = 6


class Flag(IntFlag):
    """Of a request."""

    FUA = 1  # WRITE, WRITE_ZEROES: on stable storage before it completes
    MAY_UNMAP = 2  # WRITE_ZEROES: storage may be given back


class Feature(IntFlag):
    """What both sides can do; READ_ONLY is the disk's alone."""

    READ_ONLY = 1
    FUA = 2
    DISCARD = 4
    WRITE_ZEROES = 8


class Status(IntEnum):
    """How a request ended."""

    OK = 0
    IO_ERROR = 1
    NO_SPACE = 2
    READ_ONLY = 3
    INVALID = 4  # outside of the disk, not aligned, too long, malformed
    BAD_MEMORY = 5  # external data that is missing, of another length, or not reachable
    UNSUPPORTED = 6  # an operation or version that is not known, or a feature that was not agreed on
    NO_HELLO = 7


class Hello(NamedTuple):
    """The guest's first message: the newest version it knows, and the features it wants."""

    version: int = VERSION
    features: int = int(Feature.FUA | Feature.DISCARD | Feature.WRITE_ZEROES)

    def pack(self) -> bytes:
        """The message."""
        return _HELLO.pack(Op.HELLO, self.version, self.features, 0)


class Disk(NamedTuple):
    """The host's answer to it. Sizes in bytes.

    `maximum_data` is the most that one READ or WRITE moves, `maximum_range` the most that one DISCARD or WRITE_ZEROES
    covers; `queue_depth` requests are taken at a time, more wait in the ring. `identity` is the same for the same disk.
    """

    status: int
    version: int
    features: int
    block_size: int
    size: int
    maximum_data: int
    queue_depth: int
    maximum_range: int
    identity: bytes

    def pack(self) -> bytes:
        """The reply."""
        return _HELLO_REPLY.pack(*self)


class Request(NamedTuple):
    """Any message but HELLO. `offset` and `length` in bytes; both 0 for FLUSH."""

    op: int
    flags: int
    offset: int
    length: int

    def pack(self) -> bytes:
        """The message."""
        return _REQUEST.pack(*self)


def parse_request(payload: bytes) -> Hello | Request | None:
    """A message of the guest's, unchecked but for its size; None when it is too short."""
    try:
        if payload[:4] == b"\x01\0\0\0":
            _, version, features, _ = _HELLO.unpack_from(payload)
            return Hello(version, features)
        return Request(*_REQUEST.unpack_from(payload))
    except error:
        return None


def pack_status(status: int) -> bytes:
    """The reply to any message but a good HELLO."""
    return _REPLY.pack(status, 0)


def parse_status(reply: bytes) -> int:
    """The status of a reply; IO_ERROR when it has none."""
    return int.from_bytes(reply[:4], "little") if len(reply) >= 4 else int(Status.IO_ERROR)


def parse_disk(reply: bytes) -> Disk | None:
    """The host's answer to HELLO; None when it refused."""
    if parse_status(reply) != Status.OK or len(reply) < _HELLO_REPLY.size:
        return None
    return Disk(*_HELLO_REPLY.unpack_from(reply))
