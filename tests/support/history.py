"""Two ends that exchange packets, as far as audit records see them: any history, valid or damaged at one packet.

The rings are lists, and packets are ring bytes as the real ring would have them. What the records are made of is real:
`Recorder`, `Trace`, the format and the checker.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from struct import Struct
from uuid import UUID

from vmbus.observe.audit import format as f
from vmbus.observe.audit.checker import check_records
from vmbus.observe.audit.recorder import LifePosition, Recorder, Trace
from vmbus.observe.audit.records import Record
from vmbus.observe.audit.report import Report
from vmbus.observe.audit.store import MemoryStore

INBAND, COMPLETION = 6, 11
_HEAD = Struct("<HHHHQ")
INSTANCE = UUID(int=5)


def ring_bytes(kind: int, wanted: bool, transaction: int, payload: bytes) -> bytes:
    padded = payload + bytes(-len(payload) % 8)
    return _HEAD.pack(kind, 2, 2 + len(padded) // 8, int(wanted), transaction) + padded + bytes(8)


class Header:
    """A ring's header page, shared by both ends."""

    def __init__(self) -> None:
        self.data = bytearray(4096)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data


class Half:
    """One end of a ring, as a link has it."""

    def __init__(self, header: Header) -> None:
        self.header = header


class Link:
    def __init__(self, incoming: Header, outgoing: Header) -> None:
        self.reader, self.writer = Half(incoming), Half(outgoing)


class End:
    """One end of the channel; as much of a `Channel` as a recorder looks at."""

    interface_instance = INSTANCE
    subchannel_index = 0
    name = "model"
    ids_given = False

    def __init__(self, side: str, grain: int, limit: int) -> None:
        self.side = side
        self.grain = grain
        self.limit = limit
        self.next = 1
        self.queue: list[tuple[int, bool, int, bytes]] = []
        self.sent: list[int] = []
        self.held: list[tuple[int, bool]] = []
        self.trace: Trace | None = None
        self.records: list[tuple[Recorder, MemoryStore]] = []
        self.start()

    def start(self) -> None:
        """A new process."""
        store = MemoryStore(limit=self.limit)
        self.records.append((Recorder(store, side=self.side, name=self.side, grain=self.grain), store))

    @property
    def recorder(self) -> Recorder:
        return self.records[-1][0]

    @property
    def outstanding(self) -> list[int]:
        return [number for number, _ in self.held]

    @property
    def awaited(self) -> list[int]:
        return sorted(number for number, wanted in self.held if wanted)

    def in_use(self) -> tuple[list[int], list[tuple[int, int, bytes]], int]:
        return list(self.sent), [(kind, number, payload) for kind, _, number, payload in self.queue], self.next

    def accept(self, wanted: bool, payload: bytes) -> None:
        self.queue.append((INBAND, wanted, self.next, payload))
        self.next += 1

    def complete(self, which: int, payload: bytes) -> None:
        number, wanted = self.held.pop(which)
        if wanted:
            self.queue.append((COMPLETION, False, number, payload))


class History:
    """Both ends and what lies in the rings. `damage`: (who takes it, number of the packet taken, what is done)."""

    def __init__(self, grain: int = 16, limit: int = 1 << 30) -> None:
        self.host, self.guest = End("host", grain, limit), End("guest", grain, limit)
        self.rings: dict[str, list[bytes]] = {"host": [], "guest": []}
        self.headers = {"host": Header(), "guest": Header()}
        self.damage: tuple[str, int, str] | None = None
        self.victim: tuple[int, int] | None = None
        self.taken = {"host": 0, "guest": 0}
        for end, other in ((self.host, "guest"), (self.guest, "host")):
            end.trace = end.recorder.opened(end, Link(self.headers[end.side], self.headers[other]), "opened")

    def put(self, end: End, count: int) -> None:
        """Some of an end's queue goes into the ring, as one commit."""
        packets = []
        for kind, wanted, number, payload in end.queue[:count]:
            packets.append(ring_bytes(kind, wanted, number, payload))
            if wanted:
                end.sent.append(number)
        del end.queue[:count]
        if packets:
            self.rings["guest" if end is self.host else "host"] += packets
            assert end.trace is not None
            end.trace.put(b"".join(packets))

    def take(self, end: End, count: int) -> None:
        """Some packets are taken, in one batch."""
        ring = self.rings[end.side]
        seen: list[bytes] = []
        for _ in range(min(count, len(ring))):
            seen += self._next(end, ring)
        if seen:
            assert end.trace is not None
            end.trace.taken(b"".join(seen))

    def _next(self, end: End, ring: list[bytes]) -> list[bytes]:
        number, self.taken[end.side] = self.taken[end.side], self.taken[end.side] + 1
        if not ring:
            return []
        packet = ring.pop(0)
        out = [packet]
        if self.damage is not None and self.damage[:2] == (end.side, number):
            what = self.damage[2]
            kind, _, _, _, transaction = _HEAD.unpack_from(packet)
            if what == "lost":
                out = []
            elif what == "doubled":
                out = [packet, packet]
            elif what == "corrupted":
                at = len(packet) - 9
                out = [packet[:at] + bytes([packet[at] ^ 0x10]) + packet[at + 1 :]]
            elif what == "reordered":
                if not ring:
                    self.damage = (end.side, number + 1, what)
                    self._handle(end, packet)
                    return out
                out = [ring.pop(0), packet]
                self.taken[end.side] += 1
            self.victim = (kind, transaction)
            if what == "lost":
                return out
        for one in dict.fromkeys(out):
            self._handle(end, one)
        return out

    def _handle(self, end: End, packet: bytes) -> None:
        kind, _, _, flags, number = _HEAD.unpack_from(packet)
        if kind == COMPLETION:
            end.sent.remove(number)
        else:
            end.held.append((number, bool(flags)))

    def restore(self, choose: random.Random) -> None:
        """The host is saved, and goes on in a new process; now and then the old one went on, too."""
        host = self.host
        while host.held:
            host.complete(0, b"at the pause")
        old = host.recorder
        lives: list[LifePosition] = old.saved([host])  # type: ignore[list-item]
        position = old.position
        if choose.random() < 0.5:
            assert host.trace is not None
            host.trace.put(ring_bytes(INBAND, True, host.next, b"abandoned future"))
            old.flush("too late")
        host.start()
        host.recorder.resume(old.uid, position, lives)
        link = Link(self.headers["host"], self.headers["guest"])
        host.trace = host.recorder.opened(host, link, "resumed")  # type: ignore[arg-type]
        host.recorder.restored([host])  # type: ignore[list-item]

    def run(self, choose: random.Random, steps: int) -> None:
        for _ in range(steps):
            end = choose.choice([self.host, self.guest])
            match choose.randrange(12):
                case 0 | 1 | 2:
                    size = choose.choice([16, 16, 16, 8, 40])
                    for _ in range(choose.randrange(1, 30)):
                        end.accept(choose.random() < 0.9, choose.randbytes(size))
                case 3 | 4 | 5:
                    self.put(end, choose.randrange(1, 40))
                case 6 | 7 | 8:
                    self.take(end, choose.randrange(1, 40))
                case 9 | 10:
                    while end.held and choose.random() < 0.9:
                        end.complete(choose.choice([0, 0, -1]), choose.randbytes(16))
                case 11:
                    if choose.random() < 0.3:
                        self.restore(choose)
                    elif choose.random() < 0.3:
                        end.recorder.flush("now and then")

    def settle(self) -> None:
        """To the end, as far as a damaged history has one."""
        for _ in range(4):
            for end in (self.host, self.guest):
                while end.held:
                    end.complete(0, b"settled!")
                self.put(end, len(end.queue))
            for end in (self.host, self.guest):
                while self.rings[end.side]:
                    self.take(end, 100)

    def records(self) -> list[Record]:
        """As they would be fetched."""
        mark = self.host.recorder.flush("before")
        self.guest.recorder.flush("fetched")
        self.host.recorder.flush("after")
        found = [Record(bytes(store.data), f"host {number}") for number, (_, store) in enumerate(self.host.records)]
        data = bytes(self.guest.records[-1][1].data)
        collected = f.frame_json(f.COLLECTED, 0, {"uid": self.host.recorder.uid, "position": mark})
        return [*found, Record(data[: f.HEAD.size] + collected + data[f.HEAD.size :], "guest")]

    def check(self, records: Sequence[Record] | None = None) -> Report:
        return check_records(self.records() if records is None else records)
