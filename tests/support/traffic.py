"""Both workloads over a real server, driven step by step, surviving any number of saves and restores of the server."""

import random
import time
from typing import Any

from support import pace
from vmbus.errors import WaitTimeout
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.status import Status
from vmbus.wire.workload import (
    BURST_ANSWER,
    BURST_TYPE,
    ECHO_TYPE,
    STATUS_OK,
    BurstDone,
    BurstStart,
    Pattern,
    Sequence,
    Tally,
    burst_digest,
    echo_request,
    parse_burst_packet,
    parse_echo_reply,
    transform,
)
from vmbus_guest.driver import VmbusDriver

PAGE = 4096


class Echo:
    """Numbered requests, a window of them outstanding; every third one has its data in external memory."""

    def __init__(
        self, driver: VmbusDriver, *, window: int = 40, size: int = 300, external: int = 3, **pages: int
    ) -> None:
        self.driver = driver
        self.window, self.size, self.external = window, size, external
        self.channel = driver.client_channel(ECHO_TYPE, name="echo", **pages)
        driver.enable(self.channel)
        span = -(-size // 64) * 64
        self.span = span
        self.memory = driver.allocate(-(-window * span // PAGE) * PAGE)
        self.tally = Tally()
        self.sequence = Sequence(self.tally)
        self.issued = 0
        self.target = 0
        self.cancelled = 0
        self.pattern = Pattern(3)
        self.idle: list[Packet] = []
        for index in range(window):
            packet = self.channel.allocate_packet()
            packet.pointer = [index, 0, b"", False]
            packet.completion_routine = self._completed
            self.idle.append(packet)

    def start(self, count: int) -> None:
        self.target += count
        idle, self.idle = self.idle, []
        for packet in idle:
            self._issue(packet)

    def _issue(self, packet: Packet) -> None:
        if self.issued >= self.target:
            self.idle.append(packet)
            return
        slot = packet.pointer
        number = slot[1] = self.issued
        self.issued += 1
        data = slot[2] = self.pattern.data(number, 1 + number * 37 % self.size)
        slot[3] = bool(self.external) and number % self.external == 0
        if slot[3]:
            start = slot[0] * self.span
            self.memory.view[start : start + len(data)] = data
            where = self.driver.external(self.memory, start, len(data))
            packet.send(echo_request(number, data, inline=False), external=where)
        else:
            packet.send(echo_request(number, data, inline=True))

    def _completed(self, packet: Packet, status: int, reply: bytes) -> None:
        if status == Status.CANCELLED:
            self.cancelled += 1
            return
        index, number, data, external = packet.pointer
        parsed = parse_echo_reply(reply)
        answer = b"" if parsed is None else parsed.data
        if external:
            answer = bytes(self.memory.view[index * self.span : index * self.span + len(data)])
        self.sequence.arrived(number)
        self.tally.completed += 1
        if (
            parsed is None
            or (parsed.sequence, parsed.status) != (number, STATUS_OK)
            or answer != transform(data, number)
        ):
            self.tally.corrupted += 1
        self._issue(packet)

    @property
    def finished(self) -> bool:
        return self.tally.completed == self.target

    def check(self) -> None:
        assert self.tally.good, self.tally.as_dict()
        assert self.sequence.next == self.tally.completed == self.issued == self.target


class Burst:
    """Takes the host's packets, and completes the oldest when more than `hold` are held."""

    def __init__(self, driver: VmbusDriver, *, hold: int = 20, **pages: int) -> None:
        self.driver = driver
        self.hold = hold
        self.channel = driver.client_channel(BURST_TYPE, name="burst", **pages)
        self.channel.set_process_packet_callbacks(self._process)
        driver.enable(self.channel)
        self.tally = Tally()
        self.sequence = Sequence(self.tally)
        self.held: list[tuple[Completion, bytes]] = []
        self.done: BurstDone | None = None
        self.count = 0

    def start(self, count: int, *, size: int = 100, window: int = 300) -> None:
        self.count = count
        self.channel.allocate_packet().send(BurstStart(size, count, window).pack())

    def _process(self, _: Channel, completion: Completion, payload: bytes) -> None:
        packet = parse_burst_packet(payload)
        if isinstance(packet, BurstDone):
            self.done = packet
            completion.complete()
            return
        if packet is None or not packet.intact:
            self.tally.corrupted += 1
            completion.complete()
            return
        self.sequence.arrived(packet.sequence)
        self.tally.completed += 1
        self.held.append((completion, BURST_ANSWER.pack(packet.sequence, burst_digest(packet.sequence, packet.data))))
        while len(self.held) > self.hold:
            self.complete_one()

    def complete_one(self) -> None:
        completion, answer = self.held.pop(0)
        completion.complete(answer)

    @property
    def finished(self) -> bool:
        return self.done is not None

    def check(self) -> None:
        assert self.tally.good, self.tally.as_dict()
        assert self.sequence.next == self.tally.completed == self.count
        assert self.done == BurstDone(self.count, self.count, 0)


class Traffic:
    """Both at once on one driver."""

    def __init__(self, driver: VmbusDriver, *, hold: int = 20, window: int = 40, **pages: int) -> None:
        self.driver = driver
        self.echo = Echo(driver, window=window, **pages)
        self.burst = Burst(driver, hold=hold, **pages)

    def start(self, requests: int, packets: int, **burst: int) -> None:
        self.echo.start(requests)
        self.burst.start(packets, **burst)

    def some(self, choose: random.Random) -> None:
        """Go on for a random while."""
        for _ in range(choose.randrange(8)):
            self.driver.step(choose.choice([0.0, 0.001]))
            for _ in range(min(choose.randrange(10), len(self.burst.held))):
                self.burst.complete_one()

    def finish(self, timeout: float = 20.0) -> None:
        """To the end; every transaction of both ends exactly once."""
        timeout = pace.seconds(timeout)
        deadline = time.monotonic() + timeout
        while not (self.echo.finished and self.burst.finished):
            if not self.driver.step(0.002):
                while self.burst.held:
                    self.burst.complete_one()
            if time.monotonic() > deadline:
                raise WaitTimeout(f"the workloads: {self.progress()}", timeout)
        self.echo.check()
        self.burst.check()

    def progress(self) -> dict[str, Any]:
        return {
            "echo": (self.echo.target, self.echo.tally.as_dict()),
            "burst": (self.burst.count, self.burst.tally.as_dict(), len(self.burst.held), self.burst.done),
        }


def busy(driver: VmbusDriver) -> Traffic:
    """Stops where packets are in flight in both states."""
    traffic = Traffic(driver, hold=1 << 30, ring_pages_in=1, ring_pages_out=1)
    traffic.start(500, 2000, size=60, window=400)
    driver.run_until(lambda: len(traffic.burst.held) > 50, 10, "packets of the host")
    traffic.burst.hold = 20
    return traffic
