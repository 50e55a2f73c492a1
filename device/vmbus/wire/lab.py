"""What the lab provider and the guest's test drivers say to each other: requests that make the host do things.

A request on a station's channel starts with `u32 operation, u32 argument`; what follows depends on the operation:

============ ==================== ================================================================================
operation    argument             what it asks for, and what follows
============ ==================== ================================================================================
ECHO         0                    an echo request (`wire.workload`), data inline or in external memory; so the reply
STATION      0                    which station this is
SUBCHANNELS  how many             sub-channels 1 to that number exist, and no others
WITHDRAW     sub-channel          it is rescinded
OFFER        sub-channel          it is offered
UNPLUG       station              the whole station is rescinded, with its sub-channels; not the one that is asked
PLUG         station              it is offered
GPADL        flags                `u32 handle, u32 0` and an echo request: transform the data in a GPADL's memory; so
                                  the reply. With KEEP it stays mapped, and the next GPADL for it uses that mapping
UNMAP        handle               end that
PUSH         how many             the host sends so many numbered packets; `u32 size` follows. BUSY while more than
                                  MOST_PUSHED packets, or MOST_PUSHED_BYTES of data, would wait for their answers
STATS        0                    the host's books about this channel since it was opened
============ ==================== ================================================================================

Where not said otherwise the reply is `u32 status, u32 value`. A pushed packet is an echo request whose data both sides
know (`pushed_data`); its answer is an echo reply. On a pipe there are messages `u64 sequence, u32 crc32, data`,
answered in kind with transformed data, or bytes, each answered with its own transform.
"""

from enum import IntEnum
from struct import Struct
from typing import NamedTuple
from uuid import UUID

from vmbus.wire.workload import Pattern, transform

LAB_TYPE = UUID("5a2f2c7e-3d0e-4c43-9b58-6f0d2f1e0003")
LAB_PIPE_TYPE = UUID("5a2f2c7e-3d0e-4c43-9b58-6f0d2f1e0004")

MAXIMUM_SUBCHANNELS = 256
MAXIMUM_PUSH = 4096
MAXIMUM_PUSH_SIZE = 16384
MOST_PUSHED = 32_768
"""Packets of one lab, on all its channels, that may wait for their answers."""
MOST_PUSHED_BYTES = 64 << 20
"""Bytes of data in them."""
MOST_LAB_SUBCHANNELS = 1024
"""Sub-channels of one lab, on all its stations."""
KEEP = 1

HEAD = Struct("<II")
REPLY = Struct("<II")
HANDLE = Struct("<II")
SIZE = Struct("<I")
MESSAGE = Struct("<QI")
_STATS = Struct("<II6Q")

_PUSHED = Pattern(11)


class Op(IntEnum):
    """See the module's text."""

    ECHO = 1
    STATION = 2
    SUBCHANNELS = 3
    WITHDRAW = 4
    OFFER = 5
    UNPLUG = 6
    PLUG = 7
    GPADL = 8
    UNMAP = 9
    PUSH = 10
    STATS = 11


class Status(IntEnum):
    OK = 0
    MALFORMED = 1
    NOT_THERE = 2
    BUSY = 3
    """The lab has as much of it as it may have: ask again when there is less."""


class Stats(NamedTuple):
    """The host's books about one channel since it was opened: requests answered and how many of them were wrong,
    packets pushed, answered, and answered wrongly, entries that had to wait for room in the ring."""

    requests: int
    wrong: int
    pushed: int
    push_answers: int
    push_wrong: int
    queued: int

    def pack(self) -> bytes:
        return _STATS.pack(Status.OK, 0, *self)


def parse_stats(reply: bytes) -> Stats | None:
    """The answer to STATS, None when it is none."""
    if len(reply) < _STATS.size or _STATS.unpack_from(reply)[0] != Status.OK:
        return None
    return Stats(*_STATS.unpack_from(reply)[2:])


def request(op: Op, argument: int = 0, body: bytes = b"") -> bytes:
    """A request."""
    return HEAD.pack(op, argument) + body


def parse_reply(reply: bytes) -> tuple[int, int]:
    """(status, value)."""
    if len(reply) < REPLY.size:
        return Status.MALFORMED, 0
    status, value = REPLY.unpack_from(reply)
    return status, value


def pushed_data(sequence: int, size: int) -> bytes:
    return _PUSHED.data(sequence, size)


def transform_stream(data: bytes) -> bytes:
    """What a pipe of bytes makes of them, wherever the stream is cut."""
    return transform(data, 0)
