"""Work in slices: what one guest can make a provider do in one turn of the event loop is bounded.

A request can ask for more than a turn has time for, and a ring full of requests for much more. Work that may be long is
a generator that yields what each of its steps has cost, in bytes of data that were touched. While the budget lasts it
is done at once; then the rest waits, in its order, for turns of its own, and others get theirs in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any
from zlib import crc32

from vmbus.providers.base import Host
from vmbus.wire.workload import transform

BUDGET = 1 << 20
"""Cost of a slice, some milliseconds."""
PIECE = 2048
"""What anything costs besides its data: a packet that is sent, a request that is answered."""
STEP = 256 << 10
"""Most bytes of data that one step touches."""

BEHIND = -1
"""Yielded instead of a cost: go on after all that waits now."""

Work = Generator[int, None, Any]


class Slices:
    """The work of one provider.

    Attributes:
        late: work that is not finished, with whose it is, the oldest first; to be looked at only.
        reached: how often the budget of a turn was used up.
    """

    def __init__(self, host: Host, budget: int = BUDGET) -> None:
        self._host = host
        self._budget = budget
        self._left = budget
        self.late: deque[tuple[object, Iterator[int]]] = deque()
        self._running = False
        self._asked = False
        self.reached = 0

    @property
    def waiting(self) -> int:
        """Pieces of work that are not finished."""
        return len(self.late)

    @property
    def open(self) -> bool:
        """Whether something small may be done here and now, without `do`; tell its cost to `spend`."""
        return self._left > 0 and not self.late

    def spend(self, cost: int) -> None:
        """Something was done here and now."""
        self._left -= cost

    def do(self, owner: object, work: Iterator[int]) -> None:
        """Do this after all that waits: now if the budget allows, else in turns of its own. `owner`: see `drop`.

        What it raises here is the caller's; in a later turn it is that of a call of `call_soon`.
        """
        self.late.append((owner, work))
        if not self._running:
            self._run()

    def drop(self, owner: object) -> None:
        """Forget what this owner (a channel that closed) waits for."""
        if self.late:
            self.late = deque(one for one in self.late if one[0] is not owner)

    def _run(self) -> None:
        self._running = True
        try:
            while self.late and self._left > 0:
                entry = self.late[0]
                cost: int | None = None
                try:
                    cost = next(entry[1], None)
                finally:
                    there = bool(self.late) and self.late[0] is entry  # it may have dropped itself
                    if there and (cost is None or cost == BEHIND):
                        self.late.popleft()
                if cost == BEHIND:
                    if there:
                        self.late.append(entry)
                else:
                    self._left -= cost or 0
        finally:
            self._running = False
            if self.late and not self._asked:
                self._asked = True
                self._host.call_soon(self._again)

    def _again(self) -> None:
        self._asked = False
        self._left = self._budget
        self.reached += 1
        self._run()


def transformed(views: Sequence[memoryview], length: int, crc: int, sequence: int) -> Generator[int, None, int | None]:
    """What echo does with data in a guest's memory, in steps: check it, then transform it in place.

    Returns the checksum of the answer, None when there are not `length` bytes or their checksum is another one.
    """
    if sum(map(len, views)) != length:
        return None
    found = 0
    for part in _steps(views):
        found = crc32(part, found)
        yield len(part)
    if found != crc:
        return None
    found = 0
    for part in _steps(views):
        answer = transform(bytes(part), sequence)
        found = crc32(answer, found)
        part[:] = answer
        yield len(part)
    return found


def _steps(views: Sequence[memoryview]) -> Iterator[memoryview]:
    for view in views:
        for start in range(0, len(view), STEP):
            yield view[start : start + STEP]
