"""What the records of one end can prove alone: each request that was taken was completed once, and each packet of its
own that wants a completion got one.

Ids come again: a driver uses one as soon as its request is completed. So it is counted, for each id: at every moment at
which the record says what is under way, requests without a completion are exactly those that were under way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from vmbus.observe.audit.lanes import COMPLETION, UNKNOWN, Lane
from vmbus.observe.audit.records import Life


class Breach(NamedTuple):
    """`kind` as in a `Problem`; `own`: of a packet of the record's own end, else of one that it took."""

    kind: str
    transaction: int | None
    own: bool
    message: str


class _Tally:
    """One direction of requests, and the completions that come back."""

    def __init__(self, requests: Lane, answers: Lane, *, own: bool) -> None:
        self._requests = requests
        self._answers = answers
        self._own = own
        self._seen = [0, 0]
        self._open: Counter[int] = Counter()
        self._known: set[int] = set()
        self.completed = 0

    def advance(self, requests: int, answers: int) -> None:
        """Up to so many packets of each direction."""
        lane = self._requests
        for index in range(self._seen[0], requests):
            if lane.flags[index] and lane.kinds[index] not in (COMPLETION, UNKNOWN):
                self._open[lane.transactions[index]] += 1
                self._known.add(lane.transactions[index])
        lane = self._answers
        for index in range(self._seen[1], answers):
            if lane.kinds[index] == COMPLETION:
                self._open[lane.transactions[index]] -= 1
                self.completed += 1
        self._seen = [requests, answers]

    def breach(self, waiting: Counter[int] | None) -> Breach | None:
        """The first id whose completions are too many, or too few. `waiting`: what is under way; None: that is not
        known, and too few cannot be told."""
        for number, count in self._open.items():
            there = 0 if waiting is None else waiting[number]
            if count < there or count < 0:
                kind = "doubled" if number in self._known else "invented"
                said = "no request wanted it" if kind == "invented" else "more completions than requests"
                return Breach(kind, number, self._own, said)
            if count > there and waiting is not None:
                return Breach("lost", number, self._own, "it was completed, as far as its owner goes, and never put")
        unknown = None if waiting is None else next((one for one in waiting if one not in self._open), None)
        if unknown is not None:
            return Breach("invented", unknown, self._own, "it is under way, and never came")
        # What is done with is not carried along.
        self._open = Counter({number: count for number, count in self._open.items() if count})
        return None


def check(life: Life) -> tuple[int, Breach | None]:
    """Completed transactions of both directions together, and the first breach."""
    theirs = _Tally(life.incoming, life.out, own=False)
    mine = _Tally(life.out, life.incoming, own=True)
    found: Breach | None = None
    for out, incoming, body in _looks(life):
        theirs.advance(incoming, out)
        mine.advance(out, incoming)
        found = theirs.breach(_held(body)) or mine.breach(_sent(body))
        if found is not None:
            break
    if found is None and life.closed_at is not None and life.out.count > life.closed_at[0]:
        kind, number = life.out.key(life.closed_at[0])
        known = kind != UNKNOWN
        found = Breach("invented", number if known else None, kind != COMPLETION, "it was put after the close")
    return theirs.completed + mine.completed, found


def _looks(life: Life) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Moments at which the record says what is under way, and its end. Nothing is said of single packets in what is
    brief, so looking ends there."""
    for out, incoming, body in life.looks:
        if UNKNOWN in life.out.kinds[:out] or UNKNOWN in life.incoming.kinds[:incoming]:
            return
        yield out, incoming, body
    # Packets that were being handed over at the close are told behind it.
    out, incoming = (life.out.count if life.closed_at is None else life.closed_at[0]), life.incoming.count
    if life.complete and not (UNKNOWN in life.out.kinds or UNKNOWN in life.incoming.kinds):
        yield out, incoming, {}


def _held(body: dict[str, Any]) -> Counter[int] | None:
    """Requests without a completion in the ring: their owner has them, or the completion waits for room."""
    if "awaited" not in body:
        return None
    answers = [number for kind, number, _ in body.get("queued", []) if kind == COMPLETION]
    return Counter([*body["awaited"], *answers])


def _sent(body: dict[str, Any]) -> Counter[int] | None:
    # With a close comes what was staged and never put, too.
    return Counter(body["sent"]) if "awaited" in body and "sent" in body else None
