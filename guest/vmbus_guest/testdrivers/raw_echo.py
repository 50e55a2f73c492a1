"""Test driver `raw-echo`: echo transactions as fast as they go, for the benchmark. Only their number is checked.

Parameters, besides the common ones of `Workload`:

    count    transactions in all
    window   transactions outstanding at any moment
    size     bytes of data in a request, inline
    warm_up  transactions before the clock starts

With a window of 1 the result has `round_trip`: seconds per transaction, as
median, 95th percentile and maximum.
"""

from __future__ import annotations

import time
import zlib
from typing import Any

from vmbus.kmcl.packet import Packet
from vmbus.kmcl.status import Status
from vmbus.wire.workload import ECHO_REQUEST, ECHO_TYPE, Pattern
from vmbus_guest.testdrivers.context import Parameters
from vmbus_guest.testdrivers.workload import Workload


class RawEchoWorkload(Workload):
    """See the module's text."""

    name = "raw-echo"
    interface_type = ECHO_TYPE
    provider = "echo"

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._warm_up = parameters.get("warm_up", 200, minimum=0)
        self._count = parameters.get("count", 10000, minimum=1) + self._warm_up
        self._window = parameters.get("window", 64, minimum=1, maximum=65536)
        self._data = Pattern(1).data(0, parameters.get("size", 64, minimum=1, maximum=60000))
        self._crc = zlib.crc32(self._data)
        self._issued = 0
        self._completed_count = 0
        self._round_trips: list[float] = []
        self._sent_at = 0.0

    def begin(self) -> None:
        with self.channel.batch():
            for _ in range(min(self._window, self._count)):
                packet = self.channel.allocate_packet()
                packet.completion_routine = self._completed
                self._issue(packet)

    def finished(self) -> bool:
        return self._completed_count >= self._count

    def stop(self) -> None:
        """Send nothing more."""
        self._count = self._issued

    def counts(self) -> dict[str, Any]:
        return {"sent": self._issued, "completed": self._completed_count}

    def result(self) -> dict[str, Any]:
        """Counts and rate, without the warm-up."""
        completed = max(0, self._completed_count - self._warm_up)
        result: dict[str, Any] = {
            "sent": max(0, self._issued - self._warm_up),
            "completed": completed,
            "lost": self._issued - self._completed_count,
            "per_second": round(completed / self.seconds, 1) if self.seconds > 0 else 0.0,
        }
        if self._round_trips:
            ordered = sorted(self._round_trips)
            result["round_trip"] = {
                "median": ordered[len(ordered) // 2],
                "p95": ordered[len(ordered) * 95 // 100],
                "maximum": ordered[-1],
            }
        return result

    def good(self) -> bool:
        return self._completed_count == self._issued == self._count

    def _issue(self, packet: Packet) -> None:
        sequence = self._issued
        self._issued = sequence + 1
        if self._window == 1:
            self._sent_at = time.perf_counter()
        packet.send(ECHO_REQUEST.pack(sequence, len(self._data), self._crc) + self._data)

    def _completed(self, packet: Packet, status: int, reply: bytes) -> None:
        if status != Status.SUCCESS:
            return
        self._completed_count = done = self._completed_count + 1
        if self._window == 1 and done > self._warm_up:
            self._round_trips.append(time.perf_counter() - self._sent_at)
        if done == self._warm_up:
            self.started_at = time.monotonic()
        if not done & 0x3F or self._window == 1:
            self.moved_at = time.monotonic()
        if self._issued < self._count:
            self._issue(packet)


WORKLOAD = RawEchoWorkload
