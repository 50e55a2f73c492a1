"""Test driver `burst`: the burst provider floods the guest; every packet is checked and answered.

Parameters, besides the common ones of `Workload`:

    count         packets that the host is asked to send; 0: until stopped
    size          bytes of data in a packet
    window        packets of the host that may await their completion
    hold          packets taken but not completed yet: the newest ones are kept back
    hold_seconds  for how long at most, when nothing more arrives
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.status import Status
from vmbus.wire.workload import (
    BURST_ANSWER,
    BURST_TYPE,
    STATUS_OK,
    UNTIL_STOPPED,
    BurstDone,
    BurstStart,
    Sequence,
    Tally,
    burst_digest,
    burst_stop,
    parse_burst_packet,
)
from vmbus_guest.testdrivers.context import Parameters
from vmbus_guest.testdrivers.workload import LONGEST_STEP, Workload


class BurstDefaults:
    """What parameters are when they are not given."""

    __slots__ = ("count", "size", "window")

    def __init__(self, *, count: int = 1000, size: int = 64, window: int = 256) -> None:
        self.count = count
        self.size = size
        self.window = window


class BurstWorkload(Workload):
    """See the module's text."""

    name = "burst"
    interface_type = BURST_TYPE
    provider = "burst"
    defaults = BurstDefaults()
    needless = 0
    """Signals without a reason that the host gives with each packet."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._count = parameters.get("count", self.defaults.count, minimum=0, maximum=1 << 48)
        self._size = parameters.get("size", self.defaults.size, minimum=0, maximum=60000)
        self._window = parameters.get("window", self.defaults.window, minimum=1, maximum=1 << 20)
        self._hold = parameters.get("hold", 0, minimum=0, maximum=65536)
        self._hold_seconds = parameters.get("hold_seconds", 0.05, minimum=0, maximum=10)
        self.tally = Tally()
        self._sequence = Sequence(self.tally)
        self._received = 0
        self._held: deque[tuple[Completion, bytes]] = deque()
        self._done: BurstDone | None = None

    def prepare(self) -> None:
        """Take packets, and let go of them in time."""
        self.channel.set_process_packet_callbacks(self._process)
        self.channel.set_state_change_callbacks(suspend=self._suspend)

    def begin(self) -> None:
        """Ask the host to start."""
        packet = self.channel.allocate_packet()
        packet.completion_routine = self._begun
        start = BurstStart(self._size, self._count or UNTIL_STOPPED, self._window, self.needless)
        packet.send(start.pack())

    def tick(self, now: float) -> float:
        """When the host waits for completions, nothing arrives any more: then they are due."""
        if not self._held:
            return now + LONGEST_STEP
        due = self.moved_at + self._hold_seconds
        if now >= due:
            self._release()
            return now + LONGEST_STEP
        return due

    def finished(self) -> bool:
        """The host said that it is done, or refused; or somebody stopped the run."""
        return self._done is not None or bool(self.trouble)

    def stop(self) -> None:
        """Ask the host to send nothing new; it is done when all that it has sent is completed."""
        if self._stopped or self._done is not None:
            return
        self._stopped = True
        packet = self.channel.allocate_packet()
        packet.completion_routine = lambda packet, _status, _reply: packet.free()
        packet.send(burst_stop())

    def counts(self) -> dict[str, Any]:
        return {"received": self._received, **self.tally.as_dict(), "held": len(self._held)}

    def result(self) -> dict[str, Any]:
        """The final counts, and the host's."""
        tally = self.tally
        expected = self._expected
        result: dict[str, Any] = {
            "received": self._received,
            "completed": tally.completed,
            "lost": tally.lost + max(0, expected - self._sequence.next),
            "duplicated": tally.duplicated,
            "reordered": tally.reordered,
            "corrupted": tally.corrupted,
        }
        if self._done is not None:
            result["host"] = self._done._asdict()
        if self._stopped:
            result["stopped"] = True
        return result

    def good(self) -> bool:
        """Every packet came once, in order and intact, and the host liked every answer."""
        done, expected = self._done, self._expected
        return (
            self.tally.good
            and self._received == self.tally.completed == self._sequence.next == expected
            and done is not None
            and (done.started, done.completed, done.wrong) == (expected, expected, 0)
        )

    @property
    def _expected(self) -> int:
        """Packets of the whole run: of one that was stopped the host tells at its end."""
        if not self._stopped and self._count:
            return self._count
        return self._sequence.next if self._done is None else self._done.started

    def _begun(self, packet: Packet, status: int, reply: bytes) -> None:
        if status == Status.SUCCESS and int.from_bytes(reply[:4], "little") != STATUS_OK:
            self.trouble.append("the burst provider refused to start: is another run in progress?")
        packet.free()

    def _process(self, channel: Channel, completion: Completion, payload: bytes) -> None:
        self.moved_at = time.monotonic()
        packet = parse_burst_packet(payload)
        if packet is None:
            self.tally.corrupted += 1
            completion.complete()
        elif isinstance(packet, BurstDone):
            self._done = packet
            completion.complete()
        else:
            self._received += 1
            self._sequence.arrived(packet.sequence)
            if not packet.intact or len(packet.data) != self._size:
                self.tally.corrupted += 1
            answer = BURST_ANSWER.pack(packet.sequence, burst_digest(packet.sequence, packet.data))
            if not self._hold:
                self.tally.completed += 1
                completion.complete(answer)
                return
            self._held.append((completion, answer))
            if len(self._held) > self._hold:
                self._complete_oldest()

    def _complete_oldest(self) -> None:
        completion, answer = self._held.popleft()
        self.tally.completed += 1
        completion.complete(answer)

    def _release(self) -> None:
        with self.channel.batch():
            while self._held:
                self._complete_oldest()

    def _suspend(self, channel: Channel) -> None:
        self._release()


WORKLOAD = BurstWorkload
