"""Looking on before a channel goes idle: when, for how long, and what it saves."""

from __future__ import annotations

import pytest

from vmbus.kmcl import KmclError
from vmbus.kmcl.polling import MOST_SECONDS, Polling
from vmbus.kmcl.server import ServerChannel

SECONDS = 0.0002


class Ring:
    """A guest that sends the next packet `gap` seconds after the last one was answered."""

    def __init__(self, gap: float) -> None:
        self.gap = gap
        self.now = 50.0
        self.next = self.now
        self.received = 0
        self.signals = 0
        self.spent = 0.0
        self.polling = Polling(SECONDS, lambda: self.now, self._pause)

    def _pause(self) -> None:
        self.now += 2e-6
        self.spent += 2e-6

    def available(self) -> int:
        return int(self.now >= self.next)

    def turn(self) -> None:
        """Packets are handed over until none comes any more."""
        began = self.now
        while True:
            self.received += 1
            self.now += 10e-6
            self.next = self.now + self.gap
            if not self.polling.comes(self, self.received, began):
                break
        self.now = max(self.now, self.next)  # the guest signals
        self.signals += 1


def play(gap: float, turns: int) -> Ring:
    ring = Ring(gap)
    for _ in range(turns):
        ring.turn()
        if ring.received > 1000:
            break
    return ring


def test_packets_that_come_soon_need_no_signal() -> None:
    ring = Ring(SECONDS / 4)
    original, limit = ring._pause, 2000

    def pause() -> None:
        original()
        if ring.received >= limit:
            ring.next = ring.now + 1.0

    ring.polling = Polling(SECONDS, lambda: ring.now, pause)
    ring.turn()
    assert ring.received >= limit and ring.signals == 1 and ring.polling.found >= limit - 1


def test_packets_that_come_late_are_not_waited_for() -> None:
    ring = play(10 * SECONDS, 500)
    assert ring.signals == ring.received == 500
    assert ring.polling.in_vain < 10 and ring.spent < 10 * SECONDS, "it has to learn that it is in vain"


def test_it_learns_again_when_they_come_soon_again() -> None:
    ring = play(10 * SECONDS, 100)
    ring.gap = SECONDS / 4
    for _ in range(40):
        before = ring.polling.found
        ring.next = ring.now
        if ring.polling.comes(ring, ring.received + 1, ring.now) and ring.polling.found > before:
            break
        ring.received += 1
        ring.now += SECONDS / 4
    else:
        pytest.fail("it never looked on again")


def test_a_turn_that_found_nothing_is_not_looked_on_after() -> None:
    ring = Ring(SECONDS / 4)
    assert ring.polling.comes(ring, 0, ring.now) is False and ring.spent == 0.0


def test_more_than_the_bound_is_refused() -> None:
    channel = ServerChannel(name="polled")
    channel.set_polling(MOST_SECONDS)
    assert channel.incoming.polling is not None and channel.incoming.polling.seconds == MOST_SECONDS
    channel.set_polling(0.0)
    assert channel.incoming.polling is None
    for seconds in (2 * MOST_SECONDS, -1.0, float("nan")):
        with pytest.raises(KmclError, match="polling"):
            channel.set_polling(seconds)
