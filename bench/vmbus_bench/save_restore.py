"""Save and restore against the number of packets in flight: real server processes, one saved, a fresh one restored.

The burst provider sends a window of packets with per-packet state of its own (its save and restore callbacks run for
each); the guest's side, in this process, takes half of them without completing any, so that packets lie taken, in the
ring, and queued on the full ring. Then: pause, save to a file (with fsync), a fresh server that reads and checks the
file, the guest's memory connected to it, restore-finish. At the end the guest completes everything, and the provider
counts: a restore that lost something does not pass for a fast one.

Three times make up the total. `save`: pause and save, by the server's clock. `load`: decoding the file and checking
that it fits, which a server does as it starts; measured here, on the same file with the same code, since its process
start would drown it. `rebuild`: restore-finish, by the server's clock. Microseconds a packet are the slope between the
smallest and the largest number of packets as well as the plain quotient; the target is judged by the quotient at the
largest number.

The baseline writes as many bytes of MessagePack, one record a packet, to a file with fsync, reads and decodes them.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from vmbus.device import saved
from vmbus.errors import VmbusError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet
from vmbus.testkit.loopback.function import LoopbackFunction
from vmbus.testkit.loopback.harness import describe
from vmbus.wire.workload import (
    BURST_ANSWER,
    BURST_TYPE,
    BurstDone,
    BurstPacket,
    BurstStart,
    burst_digest,
    parse_burst_packet,
)
from vmbus_bench.figures import Part, Row, Sample, Target, ratio
from vmbus_bench.processes import ServerProcess, cpu_seconds
from vmbus_guest.driver import VmbusDriver

SIZE = 64
TARGET = 10.0
_WHY = "by the wall, so a busy machine is in it; the row of CPU time has it without that"
_TIMEOUT = 60.0


class _Guest:
    """The guest's side of a burst run: takes up to `limit` packets and keeps them until `finish`."""

    def __init__(self, function: LoopbackFunction, packets: int, limit: int) -> None:
        self._driver = VmbusDriver(function)
        self.channel: ClientChannel = self._driver.client_channel(BURST_TYPE, name="burst")
        self.channel.set_process_packet_callbacks(self._process)
        self.channel.set_transaction_quota(limit)
        self._held: deque[tuple[Completion, BurstPacket]] = deque()
        self._begun = False
        self._keep = True
        self._done: BurstDone | None = None
        self._packets = packets
        self._driver.enable(self.channel)
        start = self.channel.allocate_packet()
        start.completion_routine = self._started
        start.send(BurstStart(SIZE, packets, packets).pack())
        wanted = min(limit, packets)
        self._driver.run_until(
            lambda: self._begun and len(self._held) >= wanted, _TIMEOUT, f"{wanted} packets of the burst provider"
        )

    def _started(self, packet: Packet, status: int, reply: bytes) -> None:
        self._begun = True
        packet.free()

    def _process(self, channel: Channel, completion: Completion, payload: bytes) -> None:
        content = parse_burst_packet(payload)
        if isinstance(content, BurstDone):
            self._done = content
            completion.complete()
        elif content is None or not content.intact:
            raise VmbusError("a packet of the burst provider arrived damaged")
        elif self._keep:
            self._held.append((completion, content))
        else:
            self._answer(completion, content)

    def turn(self) -> None:
        self._driver.step(0.001)

    @staticmethod
    def _answer(completion: Completion, content: BurstPacket) -> None:
        completion.complete(BURST_ANSWER.pack(content.sequence, burst_digest(content.sequence, content.data)))

    def finish(self) -> None:
        """Complete everything. Raises VmbusError unless the provider got every answer, each once and right."""
        self._keep = False
        with self.channel.batch():
            while self._held:
                self._answer(*self._held.popleft())
        self._driver.run_until(lambda: self._done is not None, _TIMEOUT, "the burst provider to be done")
        if self._done != (self._packets, self._packets, 0):
            raise VmbusError(f"after a restore of {self._packets} packets the provider counts {self._done}")

    def close(self) -> None:
        """Let go of the device."""
        self._driver.close(graceful=False)


class _Times(msgspec.Struct):
    save: float
    load: float
    rebuild: float
    cpu: float
    base: float
    bytes: int
    queued: int
    sent: int

    @property
    def total(self) -> float:
        return self.save + self.load + self.rebuild


def _baseline(directory: Path, size: int, packets: int) -> float:
    """Seconds to write and read back about `size` bytes as one MessagePack list of `packets` records."""
    record = os.urandom(max(1, size // packets - 2))
    records = [record] * packets
    file = directory / "baseline.bin"
    start = time.perf_counter()
    with file.open("xb") as output:
        output.write(msgspec.msgpack.encode(records))
        output.flush()
        os.fsync(output.fileno())
    if len(msgspec.msgpack.decode(file.read_bytes(), type=list[bytes])) != packets:
        raise VmbusError("the baseline's file does not have what was written")
    seconds = time.perf_counter() - start
    file.unlink()
    return seconds


def _once(library: Path, packets: int) -> _Times:
    description = describe("burst")
    with tempfile.TemporaryDirectory(prefix="vmbus-bench-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        state = directory / "device.state"
        with ServerProcess(description, library) as first:
            function = stack.enter_context(LoopbackFunction(first.socket_path))
            guest = _Guest(function, packets, max(1, packets // 2))
            # It sends them in slices.
            while first.call("status")["providers"]["burst"]["issued"] < packets:
                guest.turn()
            before = cpu_seconds(first.pid)
            paused = first.call("pause")
            report = first.call("save", path=str(state))
            cpu = cpu_seconds(first.pid) - before
            config = bytes.fromhex(first.call("pci")["config"])
        counts = report["packets"]
        if counts["queued"] + counts["sent"] != packets:
            raise VmbusError(f"{packets} packets were to be in flight, and {counts} were saved")
        start, before = time.perf_counter(), time.process_time()
        decoded = saved.decode(state.read_bytes())
        saved.count_packets(decoded)
        load = time.perf_counter() - start
        cpu += time.process_time() - before
        with ServerProcess(description, library, restore=state) as second:
            function.reconnect(second.socket_path, config)
            before = cpu_seconds(second.pid)
            finished = second.call("restore-finish")
            cpu += cpu_seconds(second.pid) - before
            guest.finish()
            guest.close()
        return _Times(
            save=paused["seconds"] + report["seconds"],
            load=load,
            rebuild=finished["seconds"],
            cpu=cpu,
            base=_baseline(directory, report["bytes"], packets),
            bytes=report["bytes"],
            **counts,
        )


def measure(library: Path, *, quick: bool, step: Callable[[str], None]) -> Part:
    """Run this part. `step` is told what is being done."""
    repeats = 2 if quick else 5
    sizes = [10, 1000, 10_000] if quick else [10, 100, 1000, 10_000]
    taken: dict[int, list[_Times]] = {packets: [] for packets in sizes}
    for repeat in range(repeats):
        for packets in sizes:
            step(f"save and restore, {packets} packets in flight, round {repeat + 1} of {repeats}")
            taken[packets].append(_once(library, packets))
    rows = []
    for packets, times in taken.items():
        last = times[-1]
        base = [1e3 * one.base for one in times]
        where = f"{last.queued} queued, {last.sent} sent; {last.bytes} bytes"
        total = [1e3 * one.total for one in times]
        per_packet = 1e3 * Sample.of(total, "ms").median / packets
        rows.append(
            Row(
                f"{packets} packets in flight",
                Sample.of(total, "ms"),
                Sample.of(base, "ms"),
                ratio(total, base),
                f"{per_packet:.1f} us a packet; {where}",
                {
                    "save": Sample.of([1e3 * one.save for one in times], "ms"),
                    "load": Sample.of([1e3 * one.load for one in times], "ms"),
                    "rebuild": Sample.of([1e3 * one.rebuild for one in times], "ms"),
                },
            )
        )
    small, large = taken[sizes[0]], taken[sizes[-1]]
    slope = [1e6 * (b.total - a.total) / (sizes[-1] - sizes[0]) for a, b in zip(small, large, strict=True)]
    rows.append(Row("each further packet", Sample.of(slope, "us"), note=f"between {sizes[0]} and {sizes[-1]}"))
    quotient = Sample.of([1e6 * one.total / sizes[-1] for one in large], "us")
    rows.append(
        Row(
            f"a packet, {sizes[-1]} in flight",
            quotient,
            note="by the wall, as judged; without what else the machine did meanwhile:",
            details={"CPU time": Sample.of([1e6 * one.cpu / sizes[-1] for one in large], "us")},
        )
    )
    return Part(
        name="save-restore",
        title="save and restore of a device with packets in flight",
        parameters={"size": SIZE, "packets": sizes, "repeats": repeats},
        baseline="as many bytes written (fsync), read and decoded as one MessagePack list with a record a packet",
        rows=rows,
        targets=[
            Target.judge(
                f"save and restore together, a packet, {sizes[-1]} in flight", quotient, "at most", TARGET, _WHY
            )
        ],
    )
