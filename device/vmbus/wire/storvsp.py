"""StorVSP: the packets between Linux's hv_storvsc and a storage controller; see docs/provider-scsi.md.

Every packet, and every completion, has 64 bytes: `u32 operation, u32 flags, u32 status` and 52 bytes that depend on the
operation. Little-endian; what is in a CDB or in data is SCSI's, and big-endian (`vmbus.wire.scsi`).
"""

from enum import IntEnum, IntFlag
from struct import Struct
from typing import NamedTuple
from uuid import UUID

STORVSP_TYPE = UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f")

PACKET_SIZE = 64
VERSIONS = (0x0602, 0x0600, 0x0501)
"""Protocol versions that are spoken, major << 8 | minor. Older ones have shorter packets."""
CDB_SIZE = 16
SENSE_ROOM = 20

_HEAD = Struct("<III")
_SRB = Struct("<HBBBBBBBBBBI20sHBBIII")
_PROPERTIES = Struct("<IHHIIQ")
_U16 = Struct("<H")
_BODY = PACKET_SIZE - _HEAD.size
_BARE = bytes(_BODY)


class Operation(IntEnum):
    COMPLETE_IO = 1
    REMOVE_DEVICE = 2
    EXECUTE_SRB = 3
    RESET_LUN = 4
    RESET_ADAPTER = 5
    RESET_BUS = 6
    BEGIN_INITIALIZATION = 7
    END_INITIALIZATION = 8
    QUERY_PROTOCOL_VERSION = 9
    QUERY_PROPERTIES = 10
    ENUMERATE_BUS = 11
    FCHBA_DATA = 12
    CREATE_SUB_CHANNELS = 13


class Status(IntEnum):
    """NTSTATUS of a completion."""

    SUCCESS = 0
    INVALID_PARAMETER = 0xC000000D
    REVISION_MISMATCH = 0xC0000059
    NOT_SUPPORTED = 0xC00000BB
    INVALID_DEVICE_STATE = 0xC0000184


class SrbStatus(IntEnum):
    """How a request ended, as far as the adapter goes. A guest takes any value that it does not know for success with
    nothing done, and asks again for ever: so there are these, and no others."""

    SUCCESS = 0x01
    ERROR = 0x04
    INVALID_REQUEST = 0x06
    INVALID_LUN = 0x20


SENSE_VALID = 0x80
"""Added to a `SrbStatus` when the sense data is there."""


class ScsiStatus(IntEnum):
    """How a request ended, as far as the logical unit goes."""

    GOOD = 0
    CHECK_CONDITION = 2


class Direction(IntEnum):
    """Where the data of a request goes."""

    TO_DEVICE = 0
    FROM_DEVICE = 1
    NONE = 2


class ChannelFlag(IntFlag):
    """In the answer to QUERY_PROPERTIES."""

    MULTI_CHANNEL = 1


class Srb(NamedTuple):
    """A SCSI request block: what EXECUTE_SRB asks, and what its completion repeats.

    `data_length` bytes move; `cdb` has 20 bytes, of which the first 16 are the command block's room, and the sense data
    in the answer has all of them.
    """

    length: int
    srb_status: int
    scsi_status: int
    port: int
    path: int
    target: int
    lun: int
    cdb_length: int
    sense_length: int
    direction: int
    reserved: int
    data_length: int
    cdb: bytes
    reserve: int
    queue_tag: int
    queue_action: int
    srb_flags: int
    timeout: int
    sort_key: int

    @property
    def command(self) -> bytes | None:
        """The command block, 16 bytes, zero behind its end; None when its length cannot be."""
        length = self.cdb_length
        if length == CDB_SIZE:
            return self.cdb[:CDB_SIZE]
        return self.cdb[:length].ljust(CDB_SIZE, b"\0") if 6 <= length < CDB_SIZE else None

    def pack(self) -> bytes:
        return _SRB.pack(*self)


def parse_operation(payload: bytes) -> int:
    """What a packet of the guest's asks for; 0, which is nothing, when it is too short to say."""
    return int.from_bytes(payload[:4], "little") if len(payload) >= PACKET_SIZE else 0


def parse_srb(payload: bytes) -> Srb:
    """The request of an EXECUTE_SRB packet of at least 64 bytes, unchecked."""
    return Srb._make(_SRB.unpack_from(payload, 12))


def parse_u16(payload: bytes) -> int:
    """The first word behind the head: the version that a guest offers, or the sub-channels that it asks for."""
    word: int = _U16.unpack_from(payload, 12)[0]
    return word


def pack_packet(operation: int, status: int = 0, body: bytes = _BARE) -> bytes:
    """A packet of ours. `body`: at most 52 bytes."""
    return _HEAD.pack(operation, 0, status) + body.ljust(_BODY, b"\0")


def pack_request(operation: int, body: bytes = b"", flags: int = 1) -> bytes:
    return _HEAD.pack(operation, flags, 0) + body.ljust(_BODY, b"\0")


def pack_properties(sub_channels: int, maximum_transfer: int) -> bytes:
    """The answer to QUERY_PROPERTIES. `maximum_transfer`: bytes of one request, never 0."""
    flags = ChannelFlag.MULTI_CHANNEL if sub_channels else 0
    return pack_packet(Operation.COMPLETE_IO, body=_PROPERTIES.pack(0, sub_channels, 0, flags, maximum_transfer, 0))


def pack_answer(srb: Srb, srb_status: int, scsi_status: int = 0, *, length: int = 0, sense: bytes = b"") -> bytes:
    """The completion of an EXECUTE_SRB. `length`: bytes moved; `sense`: 20 bytes at most, and SENSE_VALID with it."""
    answer = srb._replace(
        srb_status=srb_status | SENSE_VALID if sense else srb_status,
        scsi_status=scsi_status,
        sense_length=len(sense),
        data_length=length,
        cdb=sense.ljust(SENSE_ROOM, b"\0") if sense else srb.cdb,
    )
    return _HEAD.pack(Operation.COMPLETE_IO, 0, 0) + _SRB.pack(*answer)


_MOVED = Struct("<I")
_GOOD = _HEAD.pack(Operation.COMPLETE_IO, 0, 0)


def pack_good(payload: bytes, length: int) -> bytes:
    """`pack_answer` for a request that went well, out of its packet: the most frequent answer by far."""
    return b"".join(
        (_GOOD, payload[12:14], b"\x01\0", payload[16:21], b"\0", payload[22:24], _MOVED.pack(length), payload[28:64])
    )


class Properties(NamedTuple):
    """The answer to QUERY_PROPERTIES, as a guest reads it."""

    sub_channels: int
    flags: int
    maximum_transfer: int


def parse_properties(reply: bytes) -> Properties:
    """Of a completion of 64 bytes."""
    _, sub_channels, _, flags, maximum, _ = _PROPERTIES.unpack_from(reply, 12)
    return Properties(sub_channels, flags, maximum)


def parse_head(packet: bytes) -> tuple[int, int, int]:
    """Operation, flags and status of any packet of at least 12 bytes."""
    operation, flags, status = _HEAD.unpack_from(packet)
    return operation, flags, status
