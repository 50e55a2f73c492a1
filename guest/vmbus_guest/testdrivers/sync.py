"""Test driver `sync`: requests to the lab that are waited for one at a time, as a driver does that has nothing else to
do: from the loop, and from inside the processing of packets that the host pushes.

Parameters:

    count         requests in all; 0: until stopped
    size          most bytes of data in a request
    external      share (0 to 1) of the requests whose data is in external memory and transformed in place
    nested_every  requests after which the host pushes a packet, inside of which another request is made; 0: never
"""

from __future__ import annotations

import time
import zlib
from typing import Any

from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.wire.workload import STATUS_OK, Pattern, echo_request, parse_echo_reply, transform
from vmbus_guest.pci import DmaBuffer
from vmbus_guest.testdrivers.context import Parameters
from vmbus_guest.testdrivers.requests import ECHO, LabWorkload, Pushes, right_answer
from vmbus_guest.testdrivers.workload import CountedWorkload

_TURN = 0.02
"""Seconds after which others get their turn."""
_PUSH_SIZE = 40
_PATTERN = Pattern(17)


class SyncWorkload(CountedWorkload, LabWorkload):
    """See the module's text."""

    name = "sync"
    default_pages = 4
    default_count = 150

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._size = parameters.get("size", 500, minimum=1, maximum=8192)
        self._external = parameters.get("external", 0.25, minimum=0, maximum=1)
        self._nested_every = parameters.get("nested_every", 8, minimum=0)
        self.nested = 0
        """Requests that were made inside of a packet."""
        self.pushes = Pushes(self.moved)
        self._buffers: list[DmaBuffer] = []
        self._depth = 0

    def prepare(self) -> None:
        """Packets are processed where requests can be waited for."""
        self.channel.set_process_packet_callbacks(self._process)
        self.channel.set_incoming_processing_at_passive(True)

    def begin(self) -> None:
        """Memory for one request, and for one inside of it."""
        self._buffers = [self.driver.allocate(-(-self._size // 4096) * 4096) for _ in range(2)]

    def tick(self, now: float) -> float:
        """Some requests, one after the other."""
        until = now + _TURN
        while not self._no_more():
            self._request()
            if self._nested_every and self._issued % self._nested_every == 0 and self.pushes.complete:
                self.pushes.ask(self.channel, 1, _PUSH_SIZE)
            if time.monotonic() >= until:
                return now
        return super().tick(now)

    def _request(self) -> None:
        sequence = self._issued
        self._issued += 1
        self.tally.started += 1
        mixed = (sequence * 2654435761) & 0xFFFFFFFF
        data = _PATTERN.data(sequence, 1 + mixed % self._size)
        self._depth += 1
        try:
            if self._depth <= len(self._buffers) and (mixed >> 8) / (1 << 24) < self._external:
                right = self._external_request(sequence, data, self._buffers[self._depth - 1])
            else:
                right = right_answer(self._send(ECHO + echo_request(sequence, data, inline=True)), sequence, data)
        finally:
            self._depth -= 1
        self.moved()
        self.tally.completed += 1
        if not self._depth and not self.nested:
            self._sequence.arrived(sequence)
        if not right:
            self.tally.corrupted += 1

    def _send(self, payload: bytes, external: list[tuple[int, int]] | None = None) -> bytes:
        return self.channel.send_synchronous_request(payload, external=external, timeout=self.stall_seconds)

    def _external_request(self, sequence: int, data: bytes, buffer: DmaBuffer) -> bool:
        buffer.view[: len(data)] = data
        reply = self._send(ECHO + echo_request(sequence, data, inline=False), [(buffer.iova, len(data))])
        parsed = parse_echo_reply(reply)
        answer = transform(data, sequence)
        return (
            parsed is not None
            and (parsed.status, parsed.sequence, parsed.crc) == (STATUS_OK, sequence, zlib.crc32(answer))
            and buffer.view[: len(data)] == answer
        )

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        answer = self.pushes.take(payload)
        if not self._stopped:
            self.nested += 1
            self._request()
        completion.complete(answer)

    def finished(self) -> bool:
        return self.pushes.complete and super().finished()

    def counts(self) -> dict[str, Any]:
        return {**super().counts(), "nested": self.nested}

    def result(self) -> dict[str, Any]:
        self.tally.lost = max(self.tally.lost, self._issued - self.tally.completed)
        return {**self.counts(), "pushed": self.pushes.tally.completed}

    def good(self) -> bool:
        """Each was answered once and right, and so were the host's packets."""
        return (
            self.finished()
            and self.tally.good
            and self.pushes.tally.good
            and self.tally.completed == self._issued
            and self.pushes.tally.completed == self.pushes.asked
        )


WORKLOAD = SyncWorkload
