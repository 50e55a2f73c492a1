"""The order of an end's own packets: it puts them as it accepted them, so their transactions are consecutive.

Where some have an id of their sender's choice, as answers have that repeat the request's id (`Packet.send`,
`transaction`), less is known. Only packets that want no completion can. So one that wants one has the next number of
the channel's own, and of the others nobody can say whether a number that would be the next one is. What is carried
along is therefore between which two numbers the next one is; whenever that number was written down, or a packet wants a
completion, it is known again. Nothing is known behind a brief block, until the next number is.
"""

from __future__ import annotations

from typing import Any

from vmbus.observe.audit.lanes import COMPLETION, STEP, UNKNOWN, Lane
from vmbus.observe.audit.records import Life

Breach = tuple[str, int, str]
"""Its kind, the transaction, and what there is instead."""


def check(life: Life, *, given: bool) -> Breach | None:
    """The first breach, if there is one. `given`: ids may be of their sender's choice."""
    return (_Given if given else _Own)(life).check()


def ids_given(life: Life) -> bool:
    """Whether some ids are, or may be where the record ends before it says so."""
    ends = life.latest if life.closed is None else life.closed
    return not life.complete or bool(ends.get("given"))


class _Own:
    """All ids are the channel's own. The next one is from `low` to `high`, which are the same then, or unknown (0)."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.low = self.high = life.first

    def check(self) -> Breach | None:
        """See the module's function."""
        lane, life, start = self.life.out, self.life, 0
        occasions = [(count, body) for count, _, body in life.looks]
        if life.closed is not None:
            occasions.append((lane.count, life.closed))
        for count, body in occasions:
            if (breach := self.passed(lane, start, count)) is not None:
                return breach
            start = count
            if "next" not in body:
                continue
            before = self.low, self.high
            queued = [number for kind, number, _ in body.get("queued", []) if kind != COMPLETION and number]
            if (breach := self.waiting(queued, int(body["next"]), body)) is not None:
                return breach
            if queued:  # put later, where it passes by again
                self.again(before, queued)
        return self.passed(lane, start, lane.count)

    def passed(self, lane: Lane, start: int, stop: int) -> Breach | None:
        """The packets from `start` to `stop` were put."""
        for at in range(start, stop, STEP):
            part = slice(at, min(at + STEP, stop))
            kinds, numbers = lane.kinds[part], lane.transactions[part]
            if UNKNOWN in kinds:
                self.low = self.high = 0
                continue
            mine = [number for kind, number in zip(kinds, numbers, strict=True) if kind != COMPLETION and number]
            first = self.high or (mine or [0])[0]
            if mine == list(range(first, first + len(mine))):
                self.low = self.high = first + len(mine)
                continue
            for number in mine:
                if (breach := self.is_(number, number + 1)) is not None:
                    kind, first, message = breach
                    late = kind == "lost" and first in lane.transactions[at:]
                    return "reordered" if late else kind, first, message
        return None

    def waiting(self, queued: list[int], behind: int, body: dict[str, Any]) -> Breach | None:
        """These wait for room, and the next packet gets the number `behind`."""
        life = self.life
        if life.failures and body is life.closed:
            # What was staged when the channel failed was never put: its sender gives it up with the rest.
            first = self.low or [*queued, behind][0]
            queued = [*sorted(number for number in body.get("sent", []) if number >= first), *queued]
        for number in queued:
            if (breach := self.is_(number, number + 1)) is not None:
                return breach
        return self.is_(behind, behind)

    def again(self, before: tuple[int, int], queued: list[int]) -> None:
        """These were not put yet."""
        self.low = self.high = before[1] or queued[0]

    def is_(self, number: int, following: int) -> Breach | None:
        """The next number is `number`; behind it comes `following`. The breach, if it cannot be."""
        while self.high and self.high in self.life.withdrawn and self.high < number:
            self.high += 1
        low, high, self.low, self.high = self.low, self.high, following, following
        if not high or low <= number <= high:
            return None
        if number > high:
            return "lost", high, f"{number} follows it"
        return "doubled", number, f"{low} was to follow"


class _Given(_Own):
    """Some packets that want no completion have ids of their sender's choice."""

    def passed(self, lane: Lane, start: int, stop: int) -> Breach | None:
        for kind, flag, number in zip(
            *(one[start:stop] for one in (lane.kinds, lane.flags, lane.transactions)), strict=True
        ):
            if kind == UNKNOWN:
                self.low = self.high = 0
            elif kind == COMPLETION or not number:
                continue
            elif not flag:
                self.may_be(number)
            elif (breach := self.is_(number, number + 1)) is not None:
                return breach
        return None

    def may_be(self, number: int) -> None:
        """A packet that has this number, which is its own or was given."""
        while self.high and self.high in self.life.withdrawn:
            self.high += 1
        if number == self.high:
            self.high += 1

    def waiting(self, queued: list[int], behind: int, body: dict[str, Any]) -> Breach | None:
        if self.life.failures and body is self.life.closed:
            return None
        for number in queued:
            self.may_be(number)
        return self.is_(behind, behind)

    def again(self, before: tuple[int, int], queued: list[int]) -> None:
        self.low, self.high = max(before[0], self.low - len(queued)), before[1]
