"""The order of an end's own packets where some have an id of their sender's choice, as answers have that repeat the
request's id (`Packet.send`, `transaction`).

Only packets that want no completion can. So one that wants one has the next number of the channel's own, and of the
others nobody can say whether a number that would be the next one is. What is carried along is therefore between which
two numbers the next one is; whenever that number was written down, or a packet wants a completion, it is known again.
"""

from __future__ import annotations

from vmbus.observe.audit.records import COMPLETION, UNKNOWN, Life


def ids_given(life: Life) -> bool:
    """Whether some ids are, or may be where the record ends before it says so."""
    ends = life.in_use[-1][2] if life.in_use else None
    ends = ends if life.closed is None else life.closed
    return not life.complete or (ends is not None and bool(ends.get("given")))


class _Next:
    """The next number is from `low` to `high`, or unknown (0)."""

    def __init__(self, first: int, withdrawn: set[int]) -> None:
        self.low = self.high = first
        self._withdrawn = withdrawn

    def may_be(self, number: int) -> None:
        """A packet that has this number, which is its own or was given."""
        while self.high and self.high in self._withdrawn:
            self.high += 1
        if number == self.high:
            self.high += 1

    def is_(self, number: int, following: int) -> tuple[str, int, str] | None:
        """The next number is `number`; behind it comes `following`. The breach, if it cannot be."""
        while self.high and self.high in self._withdrawn and self.high < number:
            self.high += 1
        low, high, self.low, self.high = self.low, self.high, following, following
        if not high or low <= number <= high:
            return None
        if number > high:
            return "lost", high, f"{number} follows it"
        return "doubled", number, f"{low} was to follow"


def check(life: Life) -> tuple[str, int, str] | None:
    """The first breach: its kind, the transaction, and what there is instead. None: there is none."""
    lane, following, start = life.out, _Next(life.first, life.withdrawn), 0
    occasions = [(count, body) for _, count, body in life.in_use]
    if life.closed is not None:
        occasions.append((lane.count, life.closed))
    for count, body in [*occasions, (lane.count, None)]:
        for index in range(start, count):
            kind, number = lane.kinds[index], lane.transactions[index]
            if kind == UNKNOWN:
                following.low = following.high = 0
            elif kind == COMPLETION or not number:
                continue
            elif lane.flags[index]:
                if (breach := following.is_(number, number + 1)) is not None:
                    return breach
            else:
                following.may_be(number)
        start = count
        if body is None or "next" not in body:
            continue
        if life.failures and body is life.closed:
            return None  # what was staged when the channel failed was never put
        before = following.low, following.high
        queued = [number for kind, number, _ in body.get("queued", []) if kind != COMPLETION and number]
        for number in queued:
            following.may_be(number)
        behind = int(body["next"])
        if (breach := following.is_(behind, behind)) is not None:
            return breach
        if queued:  # put later, where it passes by again
            following.low, following.high = max(before[0], behind - len(queued)), before[1]
    return None
