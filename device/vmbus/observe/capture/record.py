"""What one packet of a capture file holds: the link layer header of ours, byte by byte, and what stands behind it.

Little-endian, 40 bytes:

====== ===== =========================================================================================================
offset bytes field
====== ===== =========================================================================================================
0      1     version of this header, 1
1      1     record: 1 a packet, 2 an event
2      1     direction: 0 to the host, 1 to the guest
3      1     bits: 1 the external data is as it was when the request was taken, so it is left out; 2 the external data
             could not be read; 4 the owner took the packet's memory description for malformed
4      4     0
8      16    the descriptor as it lies in the ring: u16 type, u16 offset8, u16 len8, u16 flags, u64 transaction
24     4     bytes of the headers of the packet's type
28     4     bytes of payload (in an event: of JSON)
32     4     bytes of external data that the packet describes
36     4     bytes of it that were copied
====== ===== =========================================================================================================

Behind it: the headers of the type, the payload (padded to 8 bytes, as in the ring), the copied external data. A snap
length cuts this anywhere. An event's descriptor is 0.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from vmbus.errors import StateError
from vmbus.observe.words import Seen
from vmbus.wire.packet import FLAG_COMPLETION_REQUESTED, MAX_PACKET_SIZE, PacketType

VERSION = 1
PACKET = 1
EVENT = 2
TO_HOST = 0
TO_GUEST = 1

UNCHANGED = 1
UNREADABLE = 2
MALFORMED = 4
_BITS = UNCHANGED | UNREADABLE | MALFORMED

HEADER = Struct("<BBBBIHHHHQIIII")
assert HEADER.size == 40

MAX_EXTERNAL = (1 << 32) - 1
MAX_EVENT = 64 << 10


class Record(NamedTuple):
    """One packet or event. `external`: what was copied of `external_size` bytes. Of what the snap length has cut off,
    `missing` tells the number of bytes: the end of `external`, then of `payload`, then of `body`."""

    record: int
    direction: int
    bits: int
    kind: int
    flags: int
    transaction: int
    body: bytes
    payload: bytes
    external_size: int
    external: bytes
    missing: int = 0

    @property
    def wanted(self) -> bool:
        """Whether the packet's sender waits for a completion."""
        return bool(self.flags & FLAG_COMPLETION_REQUESTED)

    @property
    def whole(self) -> bool:
        """Whether the packet itself is here; its external data may be cut."""
        return self.missing == 0

    def seen(self) -> Seen:
        """For `vmbus.observe.words.describe`."""
        return Seen(self.direction == TO_GUEST, self.kind, self.transaction, self.body, self.payload, self.external)

    def pack(self) -> bytes:
        """The bytes for the file, nothing cut."""
        body, payload = len(self.body), len(self.payload)
        offset8, len8 = (0, 0) if self.record == EVENT else ((16 + body) >> 3, (16 + body + payload) >> 3)
        head = HEADER.pack(
            VERSION,
            self.record,
            self.direction,
            self.bits,
            0,
            self.kind,
            offset8,
            len8,
            self.flags,
            self.transaction,
            body,
            payload,
            self.external_size,
            len(self.external),
        )
        return head + self.body + self.payload + self.external


def parse(data: bytes, original: int) -> Record:
    """The record in `data`, of which there were `original` bytes. Raises StateError that says what is wrong with it."""
    if len(data) < HEADER.size:
        raise StateError(f"a record of {len(data)} bytes; its header alone has {HEADER.size}")
    (
        version,
        record,
        direction,
        bits,
        zero,
        kind,
        offset8,
        len8,
        flags,
        transaction,
        body_size,
        payload_size,
        external_size,
        copied,
    ) = HEADER.unpack_from(data)
    if version != VERSION:
        raise StateError(f"a record of version {version}; version {VERSION} can be read")
    if record not in (PACKET, EVENT) or direction > TO_GUEST or bits & ~_BITS or zero:
        raise StateError(f"a record of kind {record}, direction {direction}, bits {bits:#x}, reserved {zero:#x}")
    wanted = HEADER.size + body_size + payload_size + copied
    # `original` counts external data that was not copied, too.
    if copied > external_size or original != HEADER.size + body_size + payload_size + external_size:
        raise StateError(
            f"a record of {original} bytes that claims {body_size} of headers, {payload_size} of payload, "
            f"{external_size} of external data, {copied} of them copied"
        )
    if len(data) > wanted:
        raise StateError(f"a record of {len(data)} bytes in the file that claims only {wanted}")
    if record == EVENT:
        if payload_size > MAX_EVENT or body_size or external_size or len(data) < wanted:
            raise StateError(
                f"an event of {body_size}, {payload_size} and {external_size} bytes, {len(data)} of them here"
            )
    else:
        if kind not in PacketType.__members__.values() or flags & ~FLAG_COMPLETION_REQUESTED:
            raise StateError(f"a packet of type {kind} with flags {flags:#x}")
        if max(body_size, payload_size) > MAX_PACKET_SIZE or body_size % 8 or payload_size % 8:
            raise StateError(f"a packet with {body_size} bytes of headers and {payload_size} of payload")
        if (offset8, len8) != ((16 + body_size) >> 3, (16 + body_size + payload_size) >> 3):
            raise StateError(f"a packet whose descriptor says {offset8} and {len8} words, and the record otherwise")
        if (kind in (PacketType.TRANSFER_PAGES, PacketType.GPA_DIRECT)) != bool(body_size):
            raise StateError(f"a packet of type {kind} with {body_size} bytes of headers")
    start = HEADER.size
    body = data[start : start + body_size]
    start += body_size
    payload = data[start : start + payload_size]
    start += payload_size
    missing = body_size - len(body) + payload_size - len(payload)
    return Record(
        record,
        direction,
        bits,
        kind,
        flags,
        transaction,
        body,
        payload,
        external_size,
        data[start : start + copied],
        missing,
    )
