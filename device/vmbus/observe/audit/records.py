"""Reading records, and joining those of many processes into what happened in the timeline of one VM.

A `Record` is one file. A server that was started from a saved state names the record in which that state was taken and
how many events came before it; so the servers' records form a tree, and the timeline of a VM is a path in it. What a
server recorded after the save from which the path goes on is an abandoned future: it did not happen in this timeline.
The guest's records are in its memory, so they are of its timeline by themselves.

A `Life` is one opening of a channel at one end, over all processes of that end; a `Lane` is one direction of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vmbus.errors import EnvironmentProblem, StateError, os_error
from vmbus.observe.audit import format as f
from vmbus.observe.audit.files import SUFFIX
from vmbus.observe.audit.lanes import Lane


class Mark(NamedTuple):
    """A point in a record: so many of its events came before it."""

    uid: str
    position: int


class Record:
    """One record. `events` begin with the META; `complete` tells whether it ends with a flush or an end."""

    def __init__(self, data: bytes, source: str) -> None:
        """Raises StateError."""
        frames = f.Frames(data, source)
        events = list(frames)
        self.source = source
        self.torn = frames.torn
        self.collected: Mark | None = None
        try:
            if events and events[0].kind == f.COLLECTED:
                body = events.pop(0).body
                self.collected = Mark(str(body["uid"]), int(body["position"]))
            meta = events[0].body if events and events[0].kind == f.META else {}
            self.uid = str(meta.get("uid", ""))
            self.side = str(meta.get("side", ""))
            self.name = str(meta.get("name", ""))
            self.pid = int(meta.get("pid", 0))
            self.started = float(meta.get("started", 0.0))
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"{source} is damaged: its first events are not those of a record: {error!r}") from error
        if events and (not self.uid or self.side not in ("host", "guest")):
            raise StateError(f"{source} does not begin with the event that says whose record it is")
        self.events = events
        self.complete = bool(events) and events[-1].kind in (f.FLUSHED, f.ENDED) and not self.torn

    @property
    def empty(self) -> bool:
        """Torn before its first event was whole."""
        return not self.events

    def parent(self, before: int | None = None) -> tuple[Mark | None, int]:
        """From where this record goes on (None: from power-on), and the index of its first event that counts, looking
        only at the events before `before`."""
        for index in range(len(self.events[:before]) - 1, -1, -1):
            event = self.events[index]
            if event.kind == f.RESUMED:
                return Mark(str(event.body.get("uid", "")), int(event.body.get("position", 0))), index
        return None, 0

    def __str__(self) -> str:
        return f"{self.side} {self.name!r} (process {self.pid}, record {self.uid[:8]})"


def find_files(paths: Iterable[Path]) -> list[Path]:
    """The records among files and directories. Raises EnvironmentProblem for what is not there, or nothing at all."""
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            found.update(dict.fromkeys(sorted(path.rglob(f"*{SUFFIX}"))))
        elif path.exists():
            found[path] = None
        else:
            raise EnvironmentProblem(f"there is no audit record {path}")
    if not found:
        raise EnvironmentProblem(f"there are no audit records (*{SUFFIX}) in {', '.join(map(str, paths)) or 'nothing'}")
    return list(found)


def read_records(paths: Iterable[Path]) -> list[Record]:
    """Raises EnvironmentProblem for files that cannot be read, StateError for those that are no records."""
    records = []
    for path in find_files(paths):
        with os_error(f"cannot read audit record {path}"):
            records.append(Record(path.read_bytes(), str(path)))
    return records


# ---- lives -----------------------------------------------------------------------------------------------------------


@dataclass
class Life:
    """One opening of a channel at one end."""

    nonce: str
    name: str
    instance: str
    subchannel: int
    out: Lane = field(default_factory=Lane)
    incoming: Lane = field(default_factory=Lane)
    first: int = 1
    """Transaction of the first packet put: a channel that is opened again numbers on."""
    known: bool = True
    """Recorded from its beginning."""
    closed: dict[str, Any] | None = None
    dropped: str = ""
    failures: list[tuple[str, int, int, str]] = field(default_factory=list)
    """Reason, packets put and taken so far, and who."""
    withdrawn: set[int] = field(default_factory=set)
    restored: list[tuple[str, dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    """At each restore: who, what was saved, what came back."""
    at_mark: tuple[int, int] | None = None
    """Packets put and taken when the other end's record was fetched."""
    looks: list[tuple[int, int, dict[str, Any]]] = field(default_factory=list)
    """Packets put and taken when it was recorded what was in flight, and that."""
    closed_at: tuple[int, int] | None = None
    """Packets put and taken before the close."""
    interface_type: str = ""
    generations: int = 1
    complete: bool = True

    @property
    def position(self) -> tuple[int, int]:
        """Packets put and taken so far."""
        return self.out.count, self.incoming.count

    @property
    def latest(self) -> dict[str, Any]:
        """What was in flight when that was recorded last; nothing, if it never was."""
        return self.looks[-1][2] if self.looks else {}

    def last_in_use(self) -> dict[str, Any] | None:
        """What was in flight at the end of the record, if that is known."""
        return self.latest if self.looks and self.looks[-1][0] == self.out.count else None


@dataclass
class Trouble:
    """Something that keeps a proof from being whole, or breaks it before packets are looked at."""

    message: str
    nonce: str = ""


@dataclass
class Timeline:
    """What one end recorded: its lives by nonce, in the order of their opening."""

    lives: dict[str, Life] = field(default_factory=dict)
    troubles: list[Trouble] = field(default_factory=list)
    unknown: list[Life] = field(default_factory=list)
    """Lives without a nonce: recorded, and not to be matched with anything."""


def lineage(records: Sequence[Record], leaf: Record) -> tuple[list[tuple[Record, int]], list[str]]:
    """The records of a timeline that ends with `leaf`, oldest first, each with the number of its events that count;
    and what is missing."""
    by_uid = {record.uid: record for record in records if record.side == "host"}
    path: list[tuple[Record, int]] = []
    missing: list[str] = []
    record: Record | None = leaf
    cut = len(leaf.events)
    while record is not None:
        if any(record is one for one, _ in path):
            missing.append(f"{record} goes on from itself")
            break
        path.insert(0, (record, cut))
        mark, _ = record.parent(cut)
        if mark is None:
            break
        record = by_uid.get(mark.uid)
        cut = mark.position
        if record is None:
            name = mark.uid[:8] if mark.uid else "none: the state was saved without one"
            missing.append(f"the record from which {path[0][0]} goes on is not here ({name})")
        elif cut > len(record.events):
            missing.append(f"{record} ends before the save from which {path[0][0]} goes on")
            cut = len(record.events)
    return path, missing


def host_timeline(path: Sequence[tuple[Record, int]], mark: Mark | None) -> Timeline:
    """What the servers of a lineage recorded. `mark`: when the guest's record was fetched."""
    timeline = Timeline()
    for number, (record, cut) in enumerate(path):
        _, start = record.parent(cut)
        _replay(timeline, record, start, cut, mark if mark is not None and mark.uid == record.uid else None)
        if number < len(path) - 1:
            for life in timeline.lives.values():
                if life.closed is None and not life.dropped and not life.looks:
                    timeline.troubles.append(Trouble(f"{record}: a channel is open at the save and was not saved"))
    return timeline


def guest_timeline(records: Iterable[Record]) -> Timeline:
    """What the processes of a guest recorded."""
    timeline = Timeline()
    for record in sorted(records, key=lambda one: one.started):
        _replay(timeline, record, 0, len(record.events), None)
    return timeline


def _replay(timeline: Timeline, record: Record, start: int, cut: int, mark: Mark | None) -> None:
    here: dict[int, Life] = {}
    waiting = {key: life for key, life in timeline.lives.items() if life.closed is None and not life.dropped}
    resumed = record.events[start].kind == f.RESUMED
    source = record.source
    # The first event that does not count any more, and the state at the mark.
    for index in range(start, cut):
        kind, number, body = record.events[index]
        if kind == f.OPENED:
            here[number] = _opened(timeline, waiting, body, record)
            continue
        if kind == f.DROPPED:
            life = waiting.pop(str(body.get("nonce")), None)
            if life is not None:
                life.dropped = str(body.get("reason", "dropped"))
                if body.get("failed"):
                    life.failures.append((life.dropped, *life.position, str(record)))
            continue
        if number == 0:
            if kind == f.FLUSHED and mark is not None and index + 1 == mark.position:
                for life in here.values():
                    life.at_mark = life.position
            if kind == f.RESTORED and resumed:
                for life in waiting.values():
                    what = f"channel {life.name!r} was open at the save and did not come back in {record}"
                    timeline.troubles.append(Trouble(what, life.nonce))
                waiting = {}
            continue
        life = here.get(number)
        if life is None:
            raise StateError(f"{source} is damaged: an event is of life {number}, which was never opened")
        if kind in (f.PUT, f.TAKEN):
            if life.known:
                (life.out if kind == f.PUT else life.incoming).add(body, source)
        elif kind == f.CLOSED:
            life.closed = body
            life.closed_at = life.position
        elif kind == f.FAILED:
            life.failures.append((str(body.get("reason")), *life.position, str(record)))
        elif kind == f.WITHDRAWN:
            life.withdrawn.add(int(body.get("transaction", 0)))
        elif kind in (f.SAVED, f.NOTED, f.RESTORED):
            if kind == f.RESTORED:
                life.restored.append((str(record), life.latest, body))
            life.looks.append((*life.position, body))
    for life in here.values():
        # Cut at a save, it is whole: the save flushed it.
        life.complete = cut < len(record.events) or record.complete


def _opened(timeline: Timeline, waiting: dict[str, Life], body: dict[str, Any], record: Record) -> Life:
    nonce = str(body.get("nonce", ""))
    name = str(body.get("name", ""))
    if body.get("resumed") and nonce in waiting:
        life = waiting.pop(nonce)
        life.generations += 1
        return life
    life = Life(
        nonce,
        name,
        str(body.get("instance", "")),
        int(body.get("subchannel", 0)),
        first=int(body.get("next", 1)),
        interface_type=str(body.get("type", "")),
        known=bool(nonce.strip("0")) and not body.get("resumed"),
    )
    if not nonce.strip("0"):
        timeline.unknown.append(life)
        return life
    timeline.lives[nonce] = life
    if body.get("resumed"):
        what = f"channel {name!r} goes on in {record}, and what was recorded before that is not here"
        timeline.troubles.append(Trouble(what, nonce))
    return life
