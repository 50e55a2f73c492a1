"""Recording: a recorder is an observer of channels (`vmbus.kmcl.observer`). No I/O; bytes go to a `Store`.

A `Recorder` is one process' record. A `Trace` is one life of a channel (from an open to its close) as this end sees it.
Nothing is done per packet: the ring bytes of a batch are kept as they are, and those of many batches are digested at
once, mostly inside C functions. That makes a record cheap enough to leave on. For each direction it has

* the number of packets so far, and the CRC-32 of all their ring bytes (descriptors, payloads, padding): after the same
  number of packets both ends must have the same;
* that CRC-32 at every `grain`-th packet, so that a difference can be narrowed down to so many packets;
* kind and transaction of every packet.

Both ends count from the channel's opening, so no clock and no common position is needed to compare them.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from zlib import crc32

from vmbus.observe.audit import format as f
from vmbus.util.complaints import bounded_log

if TYPE_CHECKING:
    from vmbus.kmcl.channel import Channel, Link
    from vmbus.kmcl.observer import How
    from vmbus.wire.packet import RawPacket

log = bounded_log(__name__)

GRAIN = 16
"""Packets between two recorded checksums."""
NONCE_OFFSET = 128
"""Where in the header page of the ring to the guest the server's end puts the life's nonce: 16 bytes, reserved else."""
NONCE_SIZE = 16
NO_NONCE = bytes(NONCE_SIZE)

BRIEF = 64
"""Times as far apart are checksums in a record that has reached its limit."""
_DIGEST_BYTES = 64 << 10  # of ring that are digested together
_BUFFER = 64 << 10
_COMPLETION = 11


class Store(Protocol):
    """Where the bytes go. Both raise OSError."""

    def write(self, data: bytes) -> bool:
        """Append. Returns whether there is room for more detail; once False, only what must be is recorded."""

    def sync(self) -> None:
        """Make what was written survive a crash of the machine."""

    def close(self) -> None:
        """Nothing more comes."""


class LifePosition(NamedTuple):
    """A life so far, as a saved state carries it: which channel it is of (its interface instance as 16 bytes, and
    sub-channel), and packets in each direction with the CRC-32 of their ring bytes."""

    instance: bytes
    subchannel: int
    nonce: bytes
    put: int
    put_crc: int
    taken: int
    taken_crc: int

    @property
    def key(self) -> tuple[bytes, int]:
        """Which channel it is of."""
        return self.instance, self.subchannel


class _Lane:
    """One direction: how far it has come, and the ring bytes that have not been digested yet."""

    __slots__ = ("count", "crc", "event", "pending", "size")

    def __init__(self, event: int, count: int, crc: int) -> None:
        self.event = event
        self.count = count
        self.crc = crc
        self.pending: list[bytes] = []
        self.size = 0


class Trace:
    """One life of a channel at one end: a `LifeObserver`.

    `put` and `taken` only keep the ring bytes, which exist anyway; those of many batches are digested together.
    """

    __slots__ = ("_recorder", "channel", "incoming", "key", "life", "nonce", "out", "over")

    def __init__(
        self, recorder: Recorder, channel: Channel, life: int, nonce: bytes, out: _Lane, incoming: _Lane
    ) -> None:
        self._recorder = recorder
        self.channel = channel
        self.life = life
        self.key = channel_key(channel)
        self.nonce = nonce
        self.out = out
        self.incoming = incoming
        self.over = False

    @property
    def position(self) -> LifePosition:
        """For a saved state, after a digest."""
        out, incoming = self.out, self.incoming
        return LifePosition(*self.key, self.nonce, out.count, out.crc, incoming.count, incoming.crc)

    def put(self, data: bytes) -> None:
        """These packets were published, in one piece: whole packets, at least one."""
        lane = self.out
        lane.pending.append(data)
        lane.size += len(data)
        # What is put behind the close breaks a rule, and has to be seen.
        if lane.size >= _DIGEST_BYTES or self.over:
            self._recorder.digest(self.life, lane)

    def about_to_take(self, packets: Sequence[RawPacket], offset: int) -> None:
        """Nothing to be done."""

    def about_to_put(self, data: bytes) -> None:
        """Nothing to be done."""

    def taken(self, data: bytes) -> None:
        """These packets were taken, in one piece: whole packets, or nothing."""
        if not data:
            return
        lane = self.incoming
        lane.pending.append(data)
        lane.size += len(data)
        # Behind a close that happened while these packets were handed over, nobody else would digest them.
        if lane.size >= _DIGEST_BYTES or self.over:
            self._recorder.digest(self.life, lane)

    def withdrawn(self, transaction: int) -> None:
        """The owner took a queued packet back before it was put."""
        self._recorder.event(f.WITHDRAWN, self.life, {"transaction": transaction})

    def failed(self, reason: str, breach: bool) -> None:
        """The close follows. A peer that is gone broke no rule: that is an end like any other."""
        if breach:
            self._recorder.digest_all(self)
            self._recorder.event(f.FAILED, self.life, {"reason": reason})

    def closed(self) -> None:
        """The life ends."""
        if self.over:
            return
        self.over = True
        recorder = self._recorder
        recorder.digest_all(self)
        recorder.event(f.CLOSED, self.life, {**in_use(self.channel), "held": self.channel.outstanding})
        recorder.ended(self)


def in_use(channel: Channel) -> dict[str, Any]:
    """What is in flight at this end: `sent` (transactions that wait for a completion), `awaited` (packets of the other
    end that the owner has, and that want one), `queued` (entries that wait for room: kind, transaction, CRC-32 of the
    bytes behind the descriptor), `next` (the next packet's transaction), `given` (packets were put under ids of their
    sender's choice; left out where there were none)."""
    sent, queued, following = channel.in_use()
    given = {"given": True} if getattr(channel, "ids_given", False) else {}
    return {
        **given,
        "awaited": channel.awaited,
        "sent": sent,
        "queued": [[kind, transaction, crc32(body)] for kind, transaction, body in queued],
        "next": following,
    }


class Recorder:
    """The record of one process. `uid` (32 hex digits) names it for good; `position` is the number of its events;
    `path` is where it is kept, for people.

    When the store fails, recording ends (`failed` says why) and everything else goes on.
    """

    def __init__(
        self,
        store: Store,
        *,
        side: str,
        name: str,
        uid: str | None = None,
        grain: int | None = None,
        path: str = "",
    ) -> None:
        grain = GRAIN if grain is None else grain
        if grain < 1:
            raise ValueError(f"a grain of {grain} packets")
        self.side = side
        self.path = path
        self.uid = uid or os.urandom(16).hex()
        self.grain = grain
        self.position = 0
        self.failed = ""
        self.brief = False
        self._store = store
        self._buffer: list[bytes] = [f.head()]
        self._buffered = f.HEAD.size
        self._lives = 0
        self._open: dict[int, Trace] = {}  # by the id of the channel, which the trace keeps
        self._left: dict[tuple[bytes, int], LifePosition] = {}
        meta = {
            "side": side,
            "name": name,
            "uid": self.uid,
            "pid": os.getpid(),
            "grain": grain,
            "started": time.time(),
        }
        self.event(f.META, 0, meta)

    # ---- events ------------------------------------------------------------------------------------------------

    def event(self, kind: int, life: int, body: dict[str, Any]) -> None:
        """Record an event with a JSON body."""
        self._append(f.frame_json(kind, life, body))

    def _append(self, data: bytes) -> None:
        self.position += 1
        if self.failed:
            return
        self._buffer.append(data)
        self._buffered += len(data)
        if self._buffered >= _BUFFER:
            self._write()

    def _write(self) -> None:
        data = b"".join(self._buffer)
        self._buffer.clear()
        self._buffered = 0
        try:
            if data and not self.failed and not self._store.write(data):
                self.brief = True
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.failed = f"the audit record cannot be written: {error}"
        log.error("%s; recording ends, everything else goes on", self.failed)

    def digest(self, life: int, lane: _Lane) -> None:
        """Make a block of the packets that a lane has kept, if there are any."""
        pending = lane.pending
        if not pending:
            return
        data = pending[0] if len(pending) == 1 else b"".join(pending)
        pending.clear()
        lane.size = 0
        words = memoryview(data).cast("Q")
        step = (words[0] >> 32 & 0xFFFF) + 1  # words of the first packet
        heads = words[::step].tobytes()
        first, crc = lane.count, lane.crc
        grain = self.grain * BRIEF if self.brief else self.grain
        left = grain - first % grain
        if not len(words) % step and heads == heads[:8] * (len(heads) >> 3):
            # All packets are equal up to transaction and content, which is usual in bulk.
            count = len(heads) >> 3
            transactions = words[1::step].tobytes()
            ends: Sequence[int] = range(step * left << 3, len(data) + 1, step * grain << 3)
        else:
            starts = list(_starts(words))
            count = len(starts)
            heads = array("Q", [words[start] for start in starts]).tobytes()
            transactions = array("Q", [words[start + 1] for start in starts]).tobytes()
            starts.append(len(words))
            ends = [start << 3 for start in starts[left::grain]]
        view = memoryview(data)
        sums = array("I")
        start = 0
        for end in ends:
            crc = crc32(view[start:end], crc)
            sums.append(crc)
            start = end
        if start < len(data):
            crc = crc32(view[start:], crc)
        lane.count = first + count
        lane.crc = crc
        self._append(f.frame(lane.event, life, self._block(first, crc, heads, transactions, sums, grain)))

    def _block(self, first: int, crc: int, heads: bytes, transactions: bytes, sums: array[int], grain: int) -> bytes:
        count = len(heads) >> 3
        kinds, flags = heads[::8], heads[6::8]
        wanted, completions = flags.count(1), kinds.count(_COMPLETION)
        kind, flag = kinds[0], flags[0]
        transaction = int.from_bytes(transactions[:8], "little")
        tail = b""
        if kinds.count(kind) == count == flags.count(flag) and transactions == _consecutive(transaction, count):
            form = f.RUN
        else:
            form = f.BRIEF if self.brief else f.COLUMNS
            kind = flag = transaction = 0
            if not self.brief:
                tail = kinds + flags + transactions
        head = f.BLOCK.pack(first, count, crc, wanted, completions, form, kind, flag, transaction, len(sums), grain)
        return head + sums.tobytes() + tail

    def digest_all(self, trace: Trace) -> None:
        """Both directions of a life."""
        self.digest(trace.life, trace.out)
        self.digest(trace.life, trace.incoming)

    # ---- channels ----------------------------------------------------------------------------------------------

    def opened(self, channel: Channel, link: Link, how: How) -> Trace:
        """A channel was opened, or put back on its rings: its trace. An `Observer`."""
        key = channel_key(channel)
        resumed = how == "resumed"
        left = self._left.pop(key, None) if resumed else None
        if resumed:
            nonce = NO_NONCE if left is None else left.nonce
        elif self.side == "host":
            nonce = os.urandom(NONCE_SIZE)
            link.writer.header.write(NONCE_OFFSET, nonce)
        else:
            nonce = link.reader.header.read(NONCE_OFFSET, NONCE_SIZE)
        self._lives += 1
        out, incoming = ((0, 0), (0, 0)) if left is None else ((left.put, left.put_crc), (left.taken, left.taken_crc))
        trace = Trace(self, channel, self._lives, nonce, _Lane(f.PUT, *out), _Lane(f.TAKEN, *incoming))
        self._open[id(channel)] = trace
        body = {
            "nonce": nonce.hex(),
            "name": channel.name,
            "instance": key[0].hex(),
            "subchannel": key[1],
            "type": str(getattr(channel, "interface_type", "")),
            "resumed": resumed,
            "next": channel.in_use()[2],
        }
        self.event(f.OPENED, trace.life, body)
        return trace

    def ended(self, trace: Trace) -> None:
        """`Trace.closed` does this."""
        if self._open.get(id(trace.channel)) is trace:
            del self._open[id(trace.channel)]

    # ---- save and restore --------------------------------------------------------------------------------------

    def saved(self, channels: Iterable[Channel]) -> list[LifePosition]:
        """A save is taken now, with these channels; what it has to carry, besides `uid` and `position`.

        Everything is written and flushed to disk.
        """
        lives = self._in_use(f.SAVED, channels)
        self.event(f.SAVED, 0, {"lives": len(lives)})
        self._out("saved", sync=True)
        return lives

    def resume(self, uid: str, position: int, lives: Iterable[LifePosition]) -> None:
        """Before a restore: this record goes on from `position` of record `uid`, where these lives were."""
        self._left = {life.key: life for life in lives}
        for trace in self._open.values():
            trace.over = True
        self._open.clear()
        self.event(f.RESUMED, 0, {"uid": uid, "position": position})

    def restored(self, channels: Iterable[Channel], broken: Mapping[tuple[bytes, int], str] = {}) -> None:
        """After a restore: what came back. Lives that nobody resumed were dropped: on purpose, but for `broken` ones,
        which says why."""
        lives = self._in_use(f.RESTORED, channels)
        for left in self._left.values():
            body = {"nonce": left.nonce.hex(), "instance": left.instance.hex(), "subchannel": left.subchannel}
            reason = broken.get(left.key)
            if reason is not None:
                body |= {"failed": True}
            self.event(f.DROPPED, 0, {**body, "reason": reason or "the channel was made anew"})
        self._left = {}
        self.event(f.RESTORED, 0, {"lives": len(lives)})
        self._out("restored")

    def _in_use(self, kind: int, channels: Iterable[Channel]) -> list[LifePosition]:
        lives = []
        for channel in channels:
            trace = self._open.get(id(channel))
            if trace is not None:
                self.digest_all(trace)
                self.event(kind, trace.life, in_use(channel))
                lives.append(trace.position)
        return lives

    # ---- the end -----------------------------------------------------------------------------------------------

    def flush(self, reason: str, *, sync: bool = False) -> int:
        """Everything that happened so far goes to the store; returns `position`. With `sync`, also to disk."""
        self._note()
        self._out(reason, sync=sync)
        return self.position

    def _note(self) -> None:
        """What is in flight now."""
        self._in_use(f.NOTED, [trace.channel for trace in self._open.values()])

    def _out(self, reason: str, *, sync: bool = False) -> None:
        self.event(f.FLUSHED, 0, {"reason": reason})
        self._write()
        if sync and not self.failed:
            try:
                self._store.sync()
            except OSError as error:
                self._fail(error)

    def close(self) -> None:
        """The process ends in good order. A record of nothing is not written at all."""
        if self.position == 1:
            return
        self._note()
        self.event(f.ENDED, 0, {})
        self._write()
        self._store.close()


_TEMPLATE = 1 << 15
_SPARE = 1 << 13
_templates: dict[int, bytes] = {}


def _consecutive(first: int, count: int) -> bytes:
    """The numbers from `first` on, as u64s; kept, since both directions of a channel tend to ask for the same."""
    base = first - first % _TEMPLATE
    if first + count > min(base + _TEMPLATE + _SPARE, 1 << 64):
        return b""  # longer than what is digested together can be
    template = _templates.get(base)
    if template is None:
        while len(_templates) > 4:
            del _templates[next(iter(_templates))]
        stop = min(base + _TEMPLATE + _SPARE, 1 << 64)
        template = _templates[base] = array("Q", range(base, stop)).tobytes()
    at = (first - base) << 3
    return template[at : at + (count << 3)]


def _starts(words: memoryview) -> Iterator[int]:
    """Where packets begin in ring bytes, which are whole packets, as words of 8 bytes."""
    at = 0
    while at < len(words):
        yield at
        at += (words[at] >> 32 & 0xFFFF) + 1


def channel_key(channel: Channel) -> tuple[bytes, int]:
    """(interface instance, sub-channel): which channel it is at either end."""
    instance = channel.interface_instance
    return (bytes(16) if instance is None else instance.bytes_le), getattr(channel, "subchannel_index", 0)
