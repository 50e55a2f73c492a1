"""The formats of the two workloads, echo and burst, shared by their providers and the guest's test drivers.

Every transaction carries its number and a checksum, and answers depend on both, so that loss, duplication,
reordering and corruption are each detected by the side that suffers from it.

Echo, guest to host: request `u64 sequence, u32 length, u32 crc32, data` (data inline, or in external memory), reply
`u64 sequence, u32 length, u32 crc32, u32 status, u32 0, transformed data` (inline, or in place).

Burst, guest to host: START, answered when the run has begun, and STOP, which ends a run with the packets that were
sent up to then. Host to guest: DATA packets with unpredictable bytes, each answered with its number and a digest; at
the end one DONE packet with the host's counts.
"""

import hashlib
import random
import zlib
from struct import Struct
from typing import NamedTuple
from uuid import UUID

ECHO_TYPE = UUID("5a2f2c7e-3d0e-4c43-9b58-6f0d2f1e0001")
BURST_TYPE = UUID("5a2f2c7e-3d0e-4c43-9b58-6f0d2f1e0002")

ECHO_REQUEST = Struct("<QII")
ECHO_REPLY = Struct("<QIIII")
STATUS_OK = 0
STATUS_CORRUPT = 1
STATUS_MALFORMED = 2

BURST_START = Struct("<IIQII")
BURST_DATA = Struct("<IIQII")
BURST_ANSWER = Struct("<Q16s")
BURST_DONE = Struct("<II4Q")
OP_START = 1
OP_STOP = 2
UNTIL_STOPPED = 1 << 62
"""Packets of a run without an end of its own."""
MOST_NEEDLESS = 64
"""Signals without a reason for each packet of a run."""
KIND_DATA = 1
KIND_DONE = 2

LAST = (1 << 64) - 1  # counters are saved as u64

_BLOCK = 1 << 16
TABLES = [bytes(value ^ key for value in range(256)) for key in range(256)]
"""What `transform` does to bytes, by key."""


class Tally:
    """Counts of one side of a workload. A run is good when everything that began ended and nothing went wrong."""

    __slots__ = ("completed", "corrupted", "duplicated", "lost", "reordered", "started")

    def __init__(self) -> None:
        self.started = 0
        self.completed = 0
        self.lost = 0
        self.duplicated = 0
        self.reordered = 0
        self.corrupted = 0

    @property
    def good(self) -> bool:
        """Nothing lost, doubled, out of order or damaged."""
        return not (self.lost or self.duplicated or self.reordered or self.corrupted)

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}

    def load(self, counts: dict[str, int]) -> None:
        """The counts of `as_dict` again."""
        for name in self.__slots__:
            setattr(self, name, int(counts[name]))


class Sequence:
    """Checks that numbers arrive once each and in order.

    Numbers are u64 and chosen by the other side: `next` begins again at 0 after the last of them, and the count of the
    lost ones stops at 2^64 - 1.
    """

    __slots__ = ("next", "tally")

    def __init__(self, tally: Tally) -> None:
        self.next = 0
        self.tally = tally

    def arrived(self, number: int) -> None:
        """Count `number`: as expected, skipping some (they are lost until they turn up), or from the past."""
        tally = self.tally
        if number == self.next:
            self.next = (number + 1) & LAST
        elif number > self.next:
            tally.lost = min(tally.lost + number - self.next, LAST)
            self.next = (number + 1) & LAST
        elif tally.lost > 0:
            tally.lost -= 1
            tally.reordered += 1
        else:
            tally.duplicated += 1


class Pattern:
    """Data that both sides of a test can tell from its seed and a sequence number, cheaply."""

    def __init__(self, seed: int) -> None:
        self._block = random.Random(seed).randbytes(_BLOCK) * 2

    def data(self, sequence: int, length: int) -> bytes:
        """`length` bytes (at most 65536) for transaction `sequence`."""
        start = (sequence * 7919) % _BLOCK
        return self._block[start : start + length]


def transform(data: bytes, sequence: int) -> bytes:
    return data.translate(TABLES[(sequence * 31 + 7) & 0xFF])


def echo_request(sequence: int, data: bytes, *, inline: bool) -> bytes:
    """A request; without `inline` the data is in external memory."""
    head = ECHO_REQUEST.pack(sequence, len(data), zlib.crc32(data))
    return head + data if inline else head


class EchoReply(NamedTuple):
    """A parsed reply; `data` is empty when it is in external memory."""

    sequence: int
    length: int
    crc: int
    status: int
    data: bytes


def parse_echo_reply(payload: bytes) -> EchoReply | None:
    """A reply, or None when it is too short to be one."""
    if len(payload) < ECHO_REPLY.size:
        return None
    sequence, length, crc, status, _ = ECHO_REPLY.unpack_from(payload)
    return EchoReply(sequence, length, crc, status, payload[ECHO_REPLY.size : ECHO_REPLY.size + length])


class BurstStart(NamedTuple):
    """Parameters of a burst run: `packets` packets of `size` bytes, at most `window` of them not completed.

    `needless`: so many signals without a reason follow each packet. Only the provider `burst` gives them.
    """

    size: int
    packets: int
    window: int
    needless: int = 0

    def pack(self) -> bytes:
        return BURST_START.pack(OP_START, self.size, self.packets, self.window, self.needless)


def parse_burst_start(payload: bytes) -> BurstStart | None:
    """A START request, or None when it is not one."""
    if len(payload) < BURST_START.size:
        return None
    operation, size, count, window, needless = BURST_START.unpack_from(payload)
    if operation != OP_START or not 0 < window <= 1 << 20 or size > 60000 or needless > MOST_NEEDLESS:
        return None
    return BurstStart(size, count, window, needless)


def burst_stop() -> bytes:
    return BURST_START.pack(OP_STOP, 0, 0, 0, 0)


def is_burst_stop(payload: bytes) -> bool:
    """Whether a request is that."""
    return len(payload) >= BURST_START.size and BURST_START.unpack_from(payload)[0] == OP_STOP


def burst_digest(sequence: int, data: bytes) -> bytes:
    """The answer to a DATA packet."""
    return hashlib.blake2b(data, digest_size=16, salt=sequence.to_bytes(8, "little")).digest()


def burst_data(sequence: int, data: bytes) -> bytes:
    return BURST_DATA.pack(KIND_DATA, len(data), sequence, zlib.crc32(data), 0) + data


class BurstDone(NamedTuple):
    """The host's counts at the end of a run."""

    started: int
    completed: int
    wrong: int

    def pack(self) -> bytes:
        return BURST_DONE.pack(KIND_DONE, 0, self.started, self.completed, self.wrong, 0)


class BurstPacket(NamedTuple):
    """A DATA packet as the guest sees it; `intact` tells whether its checksum fits."""

    sequence: int
    data: bytes
    intact: bool


def parse_burst_packet(payload: bytes) -> BurstPacket | BurstDone | None:
    """What the host sent, or None when it is neither DATA nor DONE."""
    if len(payload) < BURST_DATA.size:
        return None
    kind, length, sequence, crc, _ = BURST_DATA.unpack_from(payload)
    if kind == KIND_DATA:
        data = payload[BURST_DATA.size : BURST_DATA.size + length]
        return BurstPacket(sequence, data, len(data) == length and zlib.crc32(data) == crc)
    if kind == KIND_DONE and len(payload) >= BURST_DONE.size:
        _, _, started, completed, wrong, _ = BURST_DONE.unpack_from(payload)
        return BurstDone(started, completed, wrong)
    return None
