"""Test driver `storm`: more interrupts than there is reason for. The burst provider sends small packets, a few at a
time, so that each has to be signalled, and signals several times for each; the guest rings the channel's doorbell as
often. All packets are checked as `burst` does.

Parameters, besides those of `burst`:

    needless   signals without a reason that the host gives with each packet
    doorbells  the same from the guest, in each of its turns

Beside `burst` it needs a burst provider of its own.
"""

from __future__ import annotations

from typing import Any

from vmbus.wire.workload import MOST_NEEDLESS
from vmbus_guest.testdrivers.burst import BurstDefaults, BurstWorkload
from vmbus_guest.testdrivers.context import Parameters


class StormWorkload(BurstWorkload):
    """See the module's text."""

    name = "storm"
    defaults = BurstDefaults(count=1000, size=8, window=2)

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self.needless = parameters.get("needless", 4, minimum=0, maximum=MOST_NEEDLESS)
        self._doorbells = parameters.get("doorbells", 4, minimum=0, maximum=MOST_NEEDLESS)
        self.rung = 0
        self._interrupts_before = 0

    def begin(self) -> None:
        """As `burst`, and count from here."""
        self._interrupts_before = self.driver.interrupts
        super().begin()

    def tick(self, now: float) -> float:
        for _ in range(self._doorbells):
            self.channel.signal_needlessly()
        self.rung += self._doorbells
        return super().tick(now)

    def result(self) -> dict[str, Any]:
        """The final counts, with the interrupts that were taken (by all workloads) and the doorbells rung."""
        interrupts = self.driver.interrupts - self._interrupts_before
        return {**super().result(), "interrupts": interrupts, "doorbells": self.rung}


WORKLOAD = StormWorkload
