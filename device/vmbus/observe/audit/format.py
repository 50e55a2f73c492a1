"""The form of a record: a head, then events, appended and never changed.

Head: magic `VMBAUDIT`, u32 version, u32 reserved 0. Each event is a frame of type (u8, 3 bytes 0), life (u32: which
opening of a channel, 0 for the process), length and CRC-32 of its body (u32 each), then the body. All numbers are
little-endian. Bodies are JSON, except those of PUT and TAKEN, which are blocks: many packets of one direction of one
life, in ring order. A file that ends inside a frame was torn by the death of its writer; what is before that counts.
"""

import json
from collections.abc import Iterator
from struct import Struct
from struct import error as StructError
from typing import Any, NamedTuple
from zlib import crc32

from vmbus.errors import StateError

MAGIC = b"VMBAUDIT"
VERSION = 1
HEAD = Struct("<8sII")
FRAME = Struct("<BxxxIII")
MAX_BODY = 64 << 20
BLOCK_ERROR = StructError

META = 1
"""Who writes: side ("host" or "guest"), name, uid, pid, grain, started (seconds since 1970)."""
OPENED = 2
"""A life begins: nonce, name, instance, subchannel, type. `resumed`: it goes on where another process left it."""
PUT = 3
"""Packets that became visible in the outgoing ring."""
TAKEN = 4
"""Packets taken from the incoming ring and dealt with: a request was given to the owner, a completion finished its
packet."""
CLOSED = 5
"""A life ends: `sent`, `queued` (own packets given back as cancelled), `held` (packets of the other end that were not
completed), `next`."""
FAILED = 6
"""The channel was closed because a rule was broken: `reason`."""
WITHDRAWN = 7
"""A queued packet was taken back by its owner before it was put: `transaction`."""
SAVED = 8
"""Per life what is in flight (see InUse), then once with life 0: the point at which a save was taken."""
RESUMED = 9
"""This process goes on from another record: `uid` and `position`, the number of that record's events that count."""
RESTORED = 10
"""Per life what came back, in the form of SAVED."""
DROPPED = 11
"""A saved life that did not come back, on purpose: the channel was made anew. `reason`."""
FLUSHED = 12
"""Everything up to here is in the record; `reason`."""
ENDED = 13
"""The process ended in good order."""
COLLECTED = 14
"""Put in front of a guest's record by the host that fetched it: `uid` and `position` of its own record before that."""
NOTED = 15
"""Per open life what is in flight, in the form of SAVED, when somebody asked for the record."""

_WORDS = "meta opened put taken closed failed withdrawn saved resumed restored dropped flushed ended collected noted"
NAMES = dict(enumerate(_WORDS.split(), META))

# first ordinal, packets, CRC-32 of all ring bytes of this direction up to the block's end, packets that want a
# completion, completions, form, kind, flags, transaction, number of sums, packets between two of them
BLOCK = Struct("<QIIIIBBHQII")
BRIEF = 0
"""Without transactions, and with few sums: the record has reached its limit."""
RUN = 1
"""All of one kind and flags, with consecutive transactions from the one given."""
COLUMNS = 2
"""A byte of kind for each packet, then a byte of flags, then the transactions (u64)."""


class Event(NamedTuple):
    """One event; `body` is a dict, or the bytes of a block."""

    kind: int
    life: int
    body: Any


def head() -> bytes:
    """The first bytes of a record."""
    return HEAD.pack(MAGIC, VERSION, 0)


def frame(kind: int, life: int, body: bytes) -> bytes:
    return FRAME.pack(kind, life, len(body), crc32(body)) + body


def frame_json(kind: int, life: int, body: dict[str, Any]) -> bytes:
    """One event with a JSON body as bytes."""
    return frame(kind, life, json.dumps(body, separators=(",", ":")).encode())


class Frames:
    """The events in a record's bytes: iterate once. Afterwards `torn` says how many bytes of a cut event were left.

    Raises StateError for bytes that are no record, of another version, or damaged before their end.
    """

    def __init__(self, data: bytes, source: str) -> None:
        self.torn = 0
        self._data = data
        self._source = source

    def __iter__(self) -> Iterator[Event]:
        data, source = self._data, self._source
        if len(data) < HEAD.size:
            if MAGIC.startswith(data[: len(MAGIC)]):
                self.torn = len(data)
                return
            raise StateError(f"{source} is not an audit record: it has {len(data)} bytes")
        magic, version, reserved = HEAD.unpack_from(data)
        if magic != MAGIC or reserved:
            raise StateError(f"{source} is not an audit record: it starts with {magic!r}")
        if version != VERSION:
            raise StateError(f"{source} is an audit record of version {version}; this program reads {VERSION}")
        at = HEAD.size
        while at < len(data):
            if at + FRAME.size > len(data):
                self.torn = len(data) - at
                return
            kind, life, length, digest = FRAME.unpack_from(data, at)
            start = at + FRAME.size
            body = data[start : start + length]
            if kind not in NAMES or length > MAX_BODY:
                raise StateError(f"{source} is damaged at byte {at}: there is no event of type {kind}, length {length}")
            if len(body) < length:
                self.torn = len(data) - at
                return
            if crc32(body) != digest:
                raise StateError(f"{source} is damaged: the {NAMES[kind]} event at byte {at} has another checksum")
            yield Event(kind, life, body if kind in (PUT, TAKEN) else _json(body, source, at))
            at = start + length


def _json(body: bytes, source: str, at: int) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise StateError(f"{source} is damaged: the event at byte {at} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise StateError(f"{source} is damaged: the event at byte {at} is not an object")
    return content
