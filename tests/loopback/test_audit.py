"""Audit records of real traffic over the real transport: clean across saves and restores; and each way of breaking
exactly once, done to the mechanism, is found and named."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import Struct

import pytest
from msgspec.structs import replace

from support import pace
from support.chunks import packet_in, with_chunks
from support.pace import until
from support.traffic import PAGE, Traffic
from vmbus.kmcl.saved import encode
from vmbus.observe.audit import recorder
from vmbus.observe.audit.checker import check_paths
from vmbus.observe.audit.files import recorder_in
from vmbus.observe.audit.format import OPENED
from vmbus.observe.audit.records import read_records
from vmbus.observe.audit.report import Report
from vmbus.ring import READ_INDEX, WRITE_INDEX
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.testkit.loopback.pair import LoopbackPair
from vmbus.transport.library import Library
from vmbus_guest.driver import VmbusDriver
from vmbus_guest.testdrivers.context import Context
from vmbus_guest.testdrivers.mixed import run as run_mixed

DESCRIPTION = describe("echo", "burst", echo={"hold": 8, "hold_seconds": 0.01})
_DESCRIPTOR = Struct("<HHHHQ")


class Vm(LoopbackPair):
    """A guest whose device server is replaced again and again, both ends recording."""

    def __init__(self, library: Library, audit: Path, *, ram_size: int = 64 << 20) -> None:
        self.records = audit
        self.recorder = recorder_in(audit, "guest", "loopback")
        super().__init__(DESCRIPTION, library, audit=audit, recorder=self.recorder, ram_size=ram_size)

    def check(self) -> Report:
        """As `collect_audit` does: the server's record, the guest's, the server's again."""
        self.server.command("audit")
        self.recorder.flush("fetched")
        self.server.command("audit")
        return check_paths([self.records])


@pytest.fixture
def vm(libvfio_user: Library, tmp_path: Path) -> Iterator[Vm]:
    vm = Vm(libvfio_user, tmp_path / "audit")
    yield vm
    vm.close()


def test_many_generations_are_clean_at_every_moment(vm: Vm) -> None:
    choose = random.Random(42)
    traffic = Traffic(vm.driver, hold=30, window=60, ring_pages_in=1, ring_pages_out=1)
    traffic.start(1000, 1000, size=60, window=400)
    most = 0
    for generation in range(6):
        traffic.some(choose)
        vm.restore(vm.save())
        report = vm.check()
        assert report.clean, f"after {generation + 1} restores:\n{report}"
        most = max(most, report.in_flight)
    traffic.finish()
    report = vm.check()
    assert report.clean, str(report)
    assert (report.in_flight, len(report.timeline)) == (0, 7)
    # Both workloads, the guest's request to begin, and the host's word that it is done.
    assert (report.packets, report.transactions) == (2002, 2001)
    assert most > 300
    print(f"\n{report}\nat most {most} in flight")


def test_a_timeline_that_was_reverted_is_abandoned(vm: Vm) -> None:
    """The running server goes back to a saved state, after it has got ahead of it."""
    traffic = Traffic(vm.driver, hold=30, window=60, ring_pages_in=1, ring_pages_out=1)
    traffic.start(2000, 2000, size=60, window=400)
    vm.driver.run_until(lambda: len(traffic.burst.held) > 20, 10, "packets of the host")
    server = vm.server
    server.command("pause")
    for _ in range(20):
        vm.driver.step(0.0)
    vm.function.barrier()
    path = server.directory / "checkpoint"
    digest = server.command("save", path=str(path))["sha256"]
    config = bytes.fromhex(server.command("pci")["config"])
    ram = bytes(vm.function._ram)
    echo = server.server.providers[0]
    before = server.on_loop(lambda: echo.tally.completed)
    server.command("resume")
    until(lambda: server.on_loop(lambda: echo.tally.completed) != before, "the server to do something", 10)
    server.command("pause")
    vm.function.reset()
    vm.function._ram[:] = ram
    server.command("load", path=str(path), sha256=digest)
    vm.function.replay(config)
    server.command("restore-finish")
    traffic.finish()
    report = vm.check()
    assert report.clean and len(report.timeline) == 2, str(report)
    assert report.abandoned and "after the save" in report.abandoned[0]
    assert report.transactions == 4001


@pytest.mark.parametrize("restored", [False, True])
def test_a_channel_that_is_opened_again_is_clean(vm: Vm, restored: bool) -> None:
    """The host's channel numbers its transactions on over a close; each opening is a life of its own in the records."""
    for life in range(3):
        traffic = Traffic(vm.driver, hold=30, window=60, ring_pages_in=1, ring_pages_out=1)
        traffic.start(300, 300)
        traffic.some(random.Random(life))
        if restored and life < 2:
            vm.restore(vm.save())
        traffic.finish()
        for channel in (traffic.echo.channel, traffic.burst.channel):
            channel.disable()
        report = vm.check()
        assert report.clean, f"life {life + 1}:\n{report}"
        assert (report.packets, report.transactions) == ((life + 1) * 602, (life + 1) * 601)
        assert len(report.channels) == 2 * (life + 1)
    openings = [
        event.body["next"]
        for record in read_records([vm.audit])
        for event in record.events
        if event.kind == OPENED and record.side == "host" and event.body["name"] == "burst"
        if not event.body["resumed"]
    ]
    assert sorted(openings) == [1, 302, 603]  # what the checker would take for a gap, did it count each life from 1


def test_a_new_driver_after_a_dead_one(vm: Vm) -> None:
    traffic = Traffic(vm.driver, ring_pages_in=1, ring_pages_out=1)
    traffic.start(500, 500)
    traffic.some(random.Random(1))
    vm.driver.close(graceful=False)
    vm.recorder.close()
    vm.function = vm.server.function()
    vm.recorder = recorder_in(vm.audit, "guest", "second")
    vm.driver = VmbusDriver(vm.function, recorder=vm.recorder)
    traffic = Traffic(vm.driver)
    traffic.start(200, 200)
    traffic.finish()
    report = vm.check()
    assert report.clean, str(report)
    assert len(report.guests) == 2 and len(report.channels) == 4


def test_a_test_driver_keeps_a_record_and_writes_it_when_asked(libvfio_user: Library, tmp_path: Path) -> None:
    with LoopbackServer(describe("echo", "burst"), libvfio_user, audit=tmp_path) as server:
        workloads = [{"driver": "echo", "count": 500}, {"driver": "burst", "count": 500}]
        context = Context({"workloads": workloads}, server.function)
        context.keep_record(str(tmp_path), "mixed-1")
        (tmp_path / "flush").write_text("abc123")
        assert run_mixed(context)["verdict"] == "passed"
        context.end_record()
        (path,) = tmp_path.glob("guest-mixed-1-*.audit")
        assert b'"abc123"' in path.read_bytes()
        server.command("audit")
        report = check_paths([tmp_path])
        assert report.clean and report.transactions == 1001, str(report)


# ---- sabotage: the mechanism is damaged, never the records -----------------------------------------------------------


def busy(vm: Vm) -> Traffic:
    """Stops where packets are in flight in both states: queued at the host, in the ring, and held by the guest."""
    traffic = Traffic(vm.driver, hold=1 << 30, ring_pages_in=1, ring_pages_out=1)
    traffic.start(500, 2000, size=60, window=400)
    flow = traffic.burst.channel.flow
    # A turn that ended early would leave packets that the guest has copied, and whose place in the ring counts no more.
    vm.driver.run_until(
        lambda: len(traffic.burst.held) > 50 and flow.at == len(flow.packets), 10, "packets of the host"
    )
    traffic.burst.hold = 20
    # The guest stands still from here on. It may have taken all that the host may send, in one step: so it lets go of
    # some, and the host fills the ring and its queue again.
    for _ in range(min(len(traffic.burst.held) - 20, 100)):
        traffic.burst.complete_one()
    until(lambda: vm.server.command("status")["packets"]["queued"] >= 10, "the host to fill the ring", 10)
    return traffic


def go_on(traffic: Traffic) -> None:
    """Until nothing happens any more: after sabotage the workloads need not come to their end."""
    quiet = 0
    with contextlib.suppress(AssertionError, IndexError, KeyError):
        while quiet < 3 and not (traffic.echo.finished and traffic.burst.finished):
            if traffic.driver.step(pace.seconds(0.1)):
                quiet = 0
                continue
            quiet += not traffic.burst.held
            while traffic.burst.held:
                traffic.burst.complete_one()


def edit_lost(chunks: list[bytes], at: int) -> None:
    del chunks[at]


def edit_reordered(chunks: list[bytes], at: int) -> None:
    chunks[at], chunks[at + 1] = chunks[at + 1], chunks[at]


def edit_corrupted(chunks: list[bytes], at: int) -> None:
    chunk, lib = packet_in(chunks[at])
    body = lib.body[:-1] + bytes([lib.body[-1] ^ 1])
    chunks[at] = encode(replace(chunk, lib=encode(replace(lib, body=body))))


@pytest.mark.parametrize(
    ("queued", "edit"), [(True, edit_lost), (True, edit_reordered), (True, edit_corrupted), (False, edit_lost)]
)
def test_sabotage_of_the_saved_state(vm: Vm, queued: bool, edit: Callable[[list[bytes], int], None]) -> None:
    traffic = busy(vm)
    state = vm.save()
    libs = [packet_in(data)[1] for data in state.channels[1].chunks[1:]]
    at = [number for number, lib in enumerate(libs) if lib.queued is queued][5]
    victim = libs[at].transaction
    vm.restore(with_chunks(state, 1, lambda chunks: edit(chunks, at + 1)))
    go_on(traffic)
    report = vm.check()
    problem = report.problems[0]
    assert problem.kind == edit.__name__.removeprefix("edit_"), str(report)
    assert (problem.channel, problem.first, problem.last) == ("burst", victim, victim), str(report)
    if not queued:
        assert any(problem.kind == "failed" for problem in report.problems), "the server noticed the completion"
    print(f"\n{problem}")


class Ring:
    """A ring of the guest's, in guest memory: what lies in it and was not taken."""

    def __init__(self, window, data) -> None:
        self.header, self.data = window, data

    def packets(self) -> list[tuple[int, int, int, int]]:
        """Where each packet begins, its ring bytes, kind and transaction."""
        at, end, size = self.header.load32(READ_INDEX), self.header.load32(WRITE_INDEX), self.data.size
        found = []
        while at != end:
            kind, _, len8, _, transaction = _DESCRIPTOR.unpack(self.bytes(at, 16))
            found.append((at, len8 * 8 + 8, kind, transaction))
            at = (at + len8 * 8 + 8) % size
        return found

    def bytes(self, at: int, length: int) -> bytes:
        first = min(length, self.data.size - at)
        return self.data.read(at, first) + self.data.read(0, length - first)

    def write(self, at: int, data: bytes) -> None:
        first = min(len(data), self.data.size - at)
        self.data.write(at, data[:first])
        self.data.write(0, data[first:])


def ring_to_guest(vm: Vm, traffic: Traffic) -> Ring:
    reader = vm.driver.link_of(traffic.burst.channel).reader
    return Ring(reader.header, reader.data)


def stuffed(vm: Vm) -> tuple[Traffic, Ring]:
    """The ring to the guest is full, and the guest stands still."""
    traffic = busy(vm)
    vm.function.barrier()
    vm.server.command("pause")
    ring = ring_to_guest(vm, traffic)
    assert len(ring.packets()) > 10
    return traffic, ring


def ring_lost(ring: Ring, at: int) -> None:
    """The packet's place is taken by the bytes of the next one, and so on: the writer's index does not know."""
    packets = ring.packets()[at:]
    last = packets[-1]
    pieces = [ring.bytes(start, size) for start, size, _, _ in packets[1:]]
    ring.write(packets[0][0], b"".join(pieces))
    ring.header.store32(WRITE_INDEX, last[0])


def ring_doubled(ring: Ring, at: int) -> None:
    """The next packet is overwritten with this one."""
    (start, size, _, _), (after, _, _, _) = ring.packets()[at : at + 2]
    ring.write(after, ring.bytes(start, size))


def ring_reordered(ring: Ring, at: int) -> None:
    (one, size, _, _), (other, _, _, _) = ring.packets()[at : at + 2]
    first, second = ring.bytes(one, size), ring.bytes(other, size)
    ring.write(one, second)
    ring.write(other, first)


def ring_corrupted(ring: Ring, at: int) -> None:
    start, size, _, _ = ring.packets()[at]
    data = bytearray(ring.bytes(start, size))
    data[40] ^= 4
    ring.write(start, bytes(data))


DAMAGES = (ring_lost, ring_doubled, ring_reordered, ring_corrupted)


@pytest.mark.parametrize(("damage", "exact"), [*((damage, True) for damage in DAMAGES), (ring_corrupted, False)])
def test_sabotage_of_the_ring(
    libvfio_user: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage, exact: bool
) -> None:
    if exact:
        monkeypatch.setattr(recorder, "GRAIN", 1)
    vm = Vm(libvfio_user, tmp_path / "audit")
    try:
        traffic, ring = stuffed(vm)
        victim = ring.packets()[4][3]
        damage(ring, 4)
        vm.server.command("resume")
        go_on(traffic)
        report = vm.check()
        problem = report.problems[0]
        kind = damage.__name__.removeprefix("ring_")
        assert (problem.kind, problem.channel, problem.direction) == (kind, "burst", "to the guest"), str(report)
        assert problem.first is not None and problem.last is not None
        if kind == "corrupted" and not exact:
            assert problem.first <= victim <= problem.last < problem.first + 16
        else:
            assert problem.first == problem.last == victim, str(report)
        print(f"\n{problem}")
    finally:
        vm.close()


@pytest.mark.parametrize("known", [True, False])
def test_sabotage_a_request_taken_twice(vm: Vm, known: bool) -> None:
    """The server's read index in guest memory goes back by one packet between the save and the restore. A state that
    knows our index does not take the packet twice, but that channel is broken."""
    traffic = Traffic(vm.driver, ring_pages_in=1, ring_pages_out=1)
    traffic.start(100, 1)
    traffic.finish()
    state = vm.save()
    writer = vm.driver.link_of(traffic.echo.channel).writer
    ring = Ring(writer.header, writer.data)
    index = ring.header.load32(READ_INDEX)
    # The last word of a packet holds where it began.
    ring.header.store32(READ_INDEX, int.from_bytes(ring.bytes((index - 8) % ring.data.size, 8), "little") >> 32)
    if not known:
        channels = [replace(one, incoming=replace(one.incoming, own_index=None)) for one in state.channels]
        state = replace(state, channels=channels)
    vm.restore(state)
    if not known:
        traffic.echo.start(10)
    go_on(traffic)
    report = vm.check()
    problem = report.problems[0]
    if known:
        assert (problem.kind, report.verdict) == ("failed", "broken") and "read index is" in str(report), str(report)
        return
    assert (problem.kind, problem.direction, problem.first) == ("doubled", "to the host", 100), str(report)


# ---- the dirty flush -------------------------------------------------------------------------------------------------


def live_migration(vm: Vm, *, flush: bool) -> Traffic:
    """What QEMU does with memory in a live save, while only the server works: it copies all of it, then what the flush
    writes; the rest stays as it was copied. The new server sees that copy."""
    traffic = Traffic(vm.driver, hold=1 << 30, ring_pages_in=4, ring_pages_out=4)
    vm.server.command("pause")
    traffic.start(40, 3000, size=200, window=500)
    vm.function.barrier()
    server = vm.server
    server.command("log-start")
    copy = bytearray(vm.function._ram)
    server.command("resume")
    echo, burst = server.server.providers

    def worked() -> bool:
        return echo.tally.completed >= 40 and not echo._held and burst.channel.packets_queued >= 100

    while not server.on_loop(worked):
        pass
    state = vm.save()
    if flush:
        base = vm.function._iova_base
        for start, length in server.on_loop(lambda: server.server.device.memory.dirty_runs()):
            for at in range(start - base, start - base + length, PAGE):
                copy[at : at + PAGE] = vm.function._ram[at : at + PAGE]
    server.stop()
    vm.function._ram[:] = bytes(copy)
    vm.restore(state)
    traffic.burst.hold = 20
    return traffic


def test_a_live_save_with_its_flush_is_clean(libvfio_user: Library, tmp_path: Path) -> None:
    vm = Vm(libvfio_user, tmp_path / "audit", ram_size=8 << 20)
    try:
        traffic = live_migration(vm, flush=True)
        traffic.finish()
        report = vm.check()
        assert report.clean and report.transactions == 3041, str(report)
    finally:
        vm.close()


def test_sabotage_without_the_dirty_flush(libvfio_user: Library, tmp_path: Path) -> None:
    vm = Vm(libvfio_user, tmp_path / "audit", ram_size=8 << 20)
    try:
        go_on(live_migration(vm, flush=False))
        report = vm.check()
        assert report.verdict == "broken", str(report)
        print(f"\n{report}")
    finally:
        vm.close()
