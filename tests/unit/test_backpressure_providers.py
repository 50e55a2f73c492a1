"""What one guest can make providers hold and do is bounded: a turn's work, packets in flight, work for threads, timers.

Turns are counted, and what was done in each; nothing here depends on how fast the machine is.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from support.device import Machine, connect
from support.storvsc import HANDSHAKE, SYNCHRONIZE, long_form, request, write_10
from support.traffic import Burst
from vmbus.bus.synic import CONTROL_RESET, Register
from vmbus.kmcl.server import ServerChannel
from vmbus.providers import burst, slices
from vmbus.providers.base import MOST_WORK, WorkQueueFull
from vmbus.providers.disk.backend import Backend
from vmbus.providers.disk.core import Core, Job, JobState
from vmbus.providers.disk.disk import Disk
from vmbus.providers.disk.request import Op
from vmbus.providers.disk.work import UnderWay
from vmbus.providers.lab import station as lab_station
from vmbus.providers.scsi import ScsiProvider
from vmbus.providers.slices import BEHIND, BUDGET, PIECE, Slices
from vmbus.server.services import THREADS, ProviderServices, Services
from vmbus.server.timers import Timers
from vmbus.testkit import ProviderTest
from vmbus.wire import lab
from vmbus.wire.scsi import NO_DATA_BIT, Opcode
from vmbus.wire.storvsp import STORVSP_TYPE, Direction
from vmbus.wire.workload import (
    ECHO_TYPE,
    echo_request,
    parse_echo_reply,
    transform,
)

MIB = 1 << 20


class Soon:
    """A host's `call_soon`, by hand."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def call_soon(self, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def turn(self) -> bool:
        calls, self.calls = self.calls, []
        for call in calls:
            call()
        return bool(calls)


# ---- slices ----------------------------------------------------------------------------------------------------------


def steps(log: list[str], name: str, costs: Sequence[int]) -> Iterator[int]:
    for cost in costs:
        log.append(name)
        yield cost


def test_a_turn_does_no_more_than_its_budget_and_the_rest_follows_in_order() -> None:
    host, log = Soon(), list[str]()
    work = Slices(host, 100)  # type: ignore[arg-type]
    work.do("a", steps(log, "a", [60, 60, 60]))
    work.do("b", steps(log, "b", [1]))
    assert log == ["a", "a"] and work.waiting == 2 and not work.open and len(host.calls) == 1
    assert host.turn() and log == ["a", "a", "a", "b"] and work.waiting == 0 and work.open
    assert not host.turn() and work.reached == 1
    work.spend(100)
    work.do("c", steps(log, "c", [1]))
    assert log[-1] == "b" and host.turn() and log[-1] == "c"


def test_what_waits_behind_and_what_is_dropped() -> None:
    host, log = Soon(), list[str]()
    work = Slices(host, 10)  # type: ignore[arg-type]
    work.spend(10)
    work.do("a", steps(log, "first", [BEHIND, 1]))
    work.do("b", steps(log, "second", [1]))
    work.do("c", steps(log, "never", [1]))
    work.drop("c")
    host.turn()
    assert log == ["first", "second", "first"] and not work.waiting

    def drops_itself() -> Iterator[int]:
        work.drop("d")
        yield 1
        raise AssertionError("it was dropped")

    work.do("d", drops_itself())
    assert not work.waiting


def test_a_piece_that_raises_is_not_done_again_and_others_are() -> None:
    host, log = Soon(), list[str]()
    work = Slices(host, 10)  # type: ignore[arg-type]

    def bad() -> Iterator[int]:
        yield 20
        raise ValueError("bad")

    work.do("a", bad())
    work.do("b", steps(log, "b", [1]))
    with pytest.raises(ValueError, match="bad"):
        host.turn()
    assert host.turn() and log == ["b"]


# ---- burst -----------------------------------------------------------------------------------------------------------


def reader(machine: Machine) -> Burst:
    """A guest that takes packets of a burst run, and answers none before `finish`."""
    return Burst(connect(machine), hold=1 << 30)


def finish(guest: Burst) -> None:
    guest.hold = 0
    while guest.held:
        guest.complete_one()
    guest.driver.run_until(lambda: guest.finished, 30, "the end of the run")
    guest.check()


def issued(machine: Machine) -> int:
    return int(machine.providers[0].status()["issued"])


@pytest.mark.parametrize("kind", ["burst", "ddi-burst"])
def test_the_largest_window_of_the_largest_packets_is_sent_in_slices_and_holds_what_is_documented(kind: str) -> None:
    machine = Machine((kind,))
    guest = reader(machine)
    guest.start(300, size=60_000, window=1 << 20)
    longest, before = 0, issued(machine)
    while machine.scheduled or machine.soon:
        calls, machine.soon = machine.soon, []
        for call in calls:
            call()
        machine.scheduled = False
        machine.device.service()
        longest, before = max(longest, issued(machine) - before), issued(machine)
    assert 0 < longest * 60_000 <= 2 * BUDGET  # two rounds of work at most come together in a turn of this test
    assert before * 60_000 <= burst.MOST_BYTES < (before + 1) * 60_000
    bounds = machine.providers[0].bounds()
    assert bounds["packets in flight"] == (before, before, 1) and bounds["work in a turn"].reached >= 7
    finish(guest)


@pytest.mark.parametrize("kind", ["burst", "ddi-burst"])
def test_small_packets_are_bounded_by_their_number(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(burst, "MOST_PACKETS", 700)
    machine = Machine((kind,))
    guest = reader(machine)
    guest.start(3000, size=16, window=1 << 20)
    machine.serve()
    assert issued(machine) == 700
    finish(guest)


def test_without_slices_one_request_would_do_it_all_in_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure above can fail."""
    monkeypatch.setattr(slices.Slices, "__init__", lambda self, host: _unbounded(self, host))
    machine = Machine(("burst",))
    guest = reader(machine)
    guest.start(300, size=60_000, window=1 << 20)
    machine.scheduled = False
    machine.device.service()
    assert issued(machine) * 60_000 > 2 * BUDGET


_real = Slices.__init__


def _unbounded(self: Slices, host: Any) -> None:
    _real(self, host, 1 << 40)


@pytest.mark.parametrize("kind", ["burst", "ddi-burst"])
def test_a_save_between_two_slices_loses_nothing(kind: str) -> None:
    machine = Machine((kind,))
    guest = reader(machine)
    guest.start(2000, size=100, window=1500)
    machine.scheduled = False
    machine.device.service()
    assert 0 < issued(machine) < 1500 and machine.soon
    machine.come_back(machine.save())
    machine.serve()
    assert issued(machine) == 1500
    finish(guest)


@pytest.mark.parametrize("kind", ["burst", "ddi-burst"])
def test_a_run_that_is_over_before_its_slices_are(kind: str) -> None:
    machine = Machine((kind,))
    guest = reader(machine)
    guest.start(20_000, size=100, window=15_000)
    machine.scheduled = False
    machine.device.service()
    guest.driver.close_channel(guest.channel)
    machine.serve()
    assert issued(machine) < 15_000 and not machine.providers[0].status()["running"]


# ---- echo and lab ----------------------------------------------------------------------------------------------------


def test_much_external_data_is_transformed_in_slices_and_answers_keep_their_order() -> None:
    machine = Machine(("echo",))
    driver = connect(machine)
    channel = driver.client_channel(ECHO_TYPE, name="echo", ring_pages_in=16, ring_pages_out=16)
    driver.enable(channel)
    memory = machine.allocate(8 * MIB)
    data = bytes(range(256)) * (8 * MIB // 256)
    memory.view[:] = data
    answers: list[int] = []

    def answered(packet: Any, status: int, reply: bytes) -> None:
        parsed = parse_echo_reply(reply)
        assert parsed is not None and parsed.status == 0
        answers.append(parsed.sequence)

    for number in range(3):
        packet = channel.allocate_packet()
        packet.completion_routine = answered
        if number:
            packet.send(echo_request(number, b"small", inline=True))
        else:
            packet.send(echo_request(0, data, inline=False), external=[(memory.iova, len(data))])
    machine.scheduled = False
    for _ in range(3):  # on a busy machine one of them is enough for a turn
        machine.device.service()
    assert machine.soon and not answers and machine.providers[0].bounds()["work in a turn"].now == 3
    driver.run_until(lambda: len(answers) == 3, 10, "the answers")
    assert answers == [0, 1, 2]
    assert machine.providers[0].bounds()["work in a turn"].reached >= 2 * 8 * MIB // BUDGET - 1
    same = bytes(memory.view) == transform(data, 0)
    assert same and machine.providers[0].tally.good  # type: ignore[attr-defined]


def test_a_request_whose_channel_is_gone_does_not_touch_its_memory_any_more() -> None:
    machine = Machine(("echo",))
    driver = connect(machine)
    channel = driver.client_channel(ECHO_TYPE, name="echo")
    driver.enable(channel)
    memory = machine.allocate(4 * MIB)
    packet = channel.allocate_packet()
    packet.completion_routine = lambda *_: None
    packet.send(echo_request(1, bytes(4 * MIB), inline=False), external=[(memory.iova, 4 * MIB)])
    machine.scheduled = False
    machine.device.service()
    machine.write32(Register.CONTROL, CONTROL_RESET)
    memory.view[:] = b"\x55" * (4 * MIB)
    machine.serve()
    same = bytes(memory.view) == b"\x55" * (4 * MIB)
    assert same


class Lab:
    """A kit with a lab, and the guest's end of one of its stations."""

    def __init__(self, kit: ProviderTest) -> None:
        self.kit = kit
        self.guest = kit.open("lab-0", ring_pages=64)
        self.provider: Any = kit.provider

    def ask(self, op: lab.Op, argument: int, body: bytes = b"") -> Any:
        return self.guest.send(lab.request(op, argument, body))


@pytest.fixture
def station() -> Iterator[Lab]:
    with ProviderTest("lab", options={"stations": 2, "pipes": 0}) as kit:
        yield Lab(kit)


def test_a_ring_full_of_requests_for_sub_channels_makes_no_turn_long(
    station: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = 0
    most = 0
    enable = ServerChannel.enable

    def counted(self: ServerChannel) -> None:
        nonlocal made
        made += 1
        enable(self)

    monkeypatch.setattr(ServerChannel, "enable", counted)
    requests = [station.ask(lab.Op.SUBCHANNELS, 256 * (number % 2)) for number in range(1, 41)]
    last = station.ask(lab.Op.SUBCHANNELS, 5)
    while station.kit.hosted.host.busy or station.kit.bus.busy:
        before = made
        station.kit.turn()
        most = max(most, made - before)
    assert 0 < most <= BUDGET // lab_station._OFFER + 1
    assert {lab.parse_reply(one.reply)[0] for one in [*requests, last]} == {lab.Status.OK}
    names = [channel.name for channel in station.kit.channels]
    assert names == ["lab-0", "lab-1", *(f"lab-0.{index}" for index in range(1, 6))]
    assert station.provider.bounds()["sub-channels"].now == 5


def test_there_are_so_many_sub_channels_and_no_more(station: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab_station, "MOST_LAB_SUBCHANNELS", 10)
    request = station.ask(lab.Op.SUBCHANNELS, 12)
    station.kit.run()
    assert lab.parse_reply(request.reply) == (lab.Status.BUSY, 12)
    assert station.provider.bounds()["sub-channels"] == (10, 10, 1)
    request = station.ask(lab.Op.SUBCHANNELS, 0)
    station.kit.run()
    assert lab.parse_reply(request.reply)[0] == lab.Status.OK and station.provider.bounds()["sub-channels"].now == 0


def test_a_channel_is_withdrawn_when_what_was_asked_on_it_before_is_answered(station: Lab) -> None:
    """With requests on both that wait for their slices."""
    station.guest.request(lab.request(lab.Op.SUBCHANNELS, 1))
    sub = station.kit.open("lab-0.1")
    slow = station.ask(lab.Op.PUSH, 2000, lab.SIZE.pack(2000))
    asked = [sub.send(lab.request(lab.Op.ECHO) + echo_request(number, b"x", inline=True)) for number in range(20)]
    gone = station.ask(lab.Op.WITHDRAW, 1)
    station.kit.run()
    assert lab.parse_reply(slow.reply)[0] == lab.parse_reply(gone.reply)[0] == lab.Status.OK
    assert all(one.done for one in asked) and not sub.is_open


def test_pushes_are_sent_in_slices_and_bounded(station: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab_station, "MOST_PUSHED_BYTES", 12_000_000)
    line = station.provider.stations[0].lines[0]
    pushes = [station.ask(lab.Op.PUSH, 2000, lab.SIZE.pack(2000)) for _ in range(5)]
    with station.guest.away():
        most = 0
        while station.kit.hosted.host.busy or station.kit.bus.busy:
            before = line.pushed
            station.kit.turn()
            most = max(most, line.pushed - before)
        assert 0 < most * (PIECE + 2000) <= BUDGET + slices.STEP + PIECE + 2000
        assert line.pushed == 6000
    station.guest.answer = lambda packet: b""
    station.kit.run()
    assert [lab.parse_reply(one.reply)[0] for one in pushes] == [lab.Status.OK] * 3 + [lab.Status.BUSY] * 2
    assert station.provider.bounds()["pushed bytes"] == (0, 12_000_000, 2)


def test_pushes_that_a_closed_channel_took_along_give_their_room_back(station: Lab) -> None:
    station.ask(lab.Op.PUSH, 4000, lab.SIZE.pack(4000))
    with station.guest.away():
        station.kit.turn()
        assert station.provider.bounds()["pushed packets"].now == 4000
        station.guest.close()
        station.kit.run()
    assert station.provider.bounds()["pushed packets"].now == 0 == station.provider.bounds()["pushed bytes"].now


def test_pushes_count_after_a_restore(station: Lab) -> None:
    station.ask(lab.Op.PUSH, 100, lab.SIZE.pack(2000))
    station.kit.run()
    station.kit.save_restore()
    bounds = station.kit.provider.bounds()
    assert bounds["pushed packets"].now == 100 and bounds["pushed bytes"].now == 200_000
    for packet in station.guest.packets:
        packet.complete()
    station.kit.run()
    assert station.kit.provider.bounds()["pushed packets"].now == 0


# ---- work for threads, timers ----------------------------------------------------------------------------------------


@pytest.fixture
def services() -> Iterator[Services]:
    loop = asyncio.new_event_loop()
    services = Services(loop)
    yield services
    services.close()
    loop.close()


def test_work_that_waits_is_bounded_and_can_be_taken_back(services: Services) -> None:
    owner = ProviderServices(services, "one")
    go, begun, told = threading.Event(), threading.Barrier(THREADS + 1), list[str]()

    def hold() -> None:
        begun.wait(10)
        go.wait(10)

    running = [owner.run_blocking(hold, lambda result, error: told.append("held")) for _ in range(THREADS)]
    begun.wait(10)
    waiting = [owner.run_blocking(lambda: None, lambda result, error: told.append("told")) for _ in range(MOST_WORK)]
    with pytest.raises(WorkQueueFull, match="1024 pieces of work wait"):
        owner.run_blocking(lambda: None, lambda result, error: None)
    assert owner.bounds() == {"work that waits": (MOST_WORK, MOST_WORK, 1)}
    assert all(job.cancel() for job in waiting[1:]) and not waiting[1].cancel()
    assert not running[0].cancel()
    assert services.busy == {"one": THREADS + 1} and owner.waiting == 1
    go.set()
    assert services.finish(0.0) or services.finish(10)
    assert told.count("held") == THREADS


def test_timers_that_were_cancelled_do_not_pile_up() -> None:
    loop = asyncio.new_event_loop()
    timers = Timers(loop)
    called: list[int] = []
    timers.call_later(0.0, lambda: called.append(1))
    for _ in range(10_000):
        timers.call_later(3600.0, lambda: called.append(2)).cancel()
    assert timers.kept < 200
    timers.run_due()
    assert called == [1]
    timers.close()
    loop.close()


# ---- the disk --------------------------------------------------------------------------------------------------------


class Stuck:
    """A backend whose operations begin, and end when `go` is set."""

    def __init__(self, below: Backend, go: threading.Event) -> None:
        self.below = below
        self.go = go
        self.zeroed: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.below, name)

    def discard(self, offset: int, length: int) -> None:
        self.write_zeroes(offset, length, may_unmap=False, durable=False)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool, durable: bool) -> None:
        self.zeroed.append(offset)
        self.go.wait(30)
        self.below.write_zeroes(offset, length, may_unmap=may_unmap, durable=durable)


class DiskMachine(Machine):
    """With a disk, whose work is done by threads."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.work = ProviderServices(services, "disk")
        luns = [{"image": "disk.img", "size_mib": 1, "create": True}]
        super().__init__(("scsi",), scsi={"luns": luns, "queue_depth": 64})
        self.providers[0].activate()

    def run_blocking(self, work: Any, done: Any) -> Any:
        return self.work.run_blocking(work, done)


@pytest.fixture
def disk(services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DiskMachine]:
    monkeypatch.setenv("VMBUS_DISKS", str(tmp_path))
    go = threading.Event()
    monkeypatch.setattr(ScsiProvider, "make_backend", lambda self, image: Stuck(image.backend, go))
    machine = DiskMachine(services)
    machine.go = go  # type: ignore[attr-defined]
    yield machine
    go.set()
    assert services.finish(10)
    machine.providers[0].stop()


def core_of(machine: DiskMachine) -> Core:
    provider: Any = machine.providers[0]
    core = provider.units[0].disk.core
    assert isinstance(core, Core)
    return core


def resets_with_requests(machine: DiskMachine, times: int) -> tuple[int, int]:
    """64 requests, then a reset, again and again. Returns the most pieces of work and orphans that there were."""
    core = core_of(machine)
    work = orphans = 0
    for _ in range(times):
        driver = connect(machine)
        channel = driver.client_channel(STORVSP_TYPE, name="disk")
        driver.enable(channel)
        zeroes = [long_form(Opcode.WRITE_SAME_16, 16 * index, 8, NO_DATA_BIT) for index in range(64)]
        for message in (*HANDSHAKE, *map(request, zeroes)):
            packet = channel.allocate_packet()
            packet.completion_routine = lambda *_: None
            packet.send(message)
        driver.run_until(lambda: core.under_way >= 64, 10, "the disk to take the requests")
        work = max(work, machine.work.jobs)
        machine.write32(Register.CONTROL, CONTROL_RESET)
        machine.used[:] = bytes(len(machine.used))
        orphans = max(orphans, core.count({JobState.ORPHANED}))
    return work, orphans


def test_resets_of_a_slow_disk_leave_no_orphans_but_what_is_under_way(disk: DiskMachine, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    before = b"\xaa" * MIB
    image.write_bytes(before)
    work, orphans = resets_with_requests(disk, 100)
    core = core_of(disk)
    assert work <= 64 + THREADS and orphans <= THREADS
    assert core.under_way <= THREADS and disk.work.waiting == 0
    # Another guest: what it writes comes after what is under way, and nothing else that a dead one wanted is done.
    driver = connect(disk)
    channel = driver.client_channel(STORVSP_TYPE, name="disk")
    driver.enable(channel)
    memory = disk.allocate(8192)
    memory.view[:] = b"\x77" * 8192
    answers: list[bytes] = []
    write = request(write_10(0, 16), 8192, direction=Direction.TO_DEVICE)
    for message, external in (
        *((step, None) for step in HANDSHAKE),
        (write, [(memory.iova, 8192)]),
        (request(SYNCHRONIZE), None),
    ):
        packet = channel.allocate_packet()
        packet.completion_routine = lambda packet, status, reply: answers.append(reply)
        packet.send(message, external=external)
    disk.serve()
    assert len(answers) <= len(HANDSHAKE) + 1  # the write waits for the zeroes that are under way at its place
    disk.go.set()  # type: ignore[attr-defined]

    def answered() -> bool:
        disk.services.run_ready()
        return len(answers) == len(HANDSHAKE) + 2 and not core.under_way

    driver.run_until(answered, 20, "the write, and what was under way")
    content = image.read_bytes()
    provider: Any = disk.providers[0]
    zeroed = set(provider.units[0].disk.backend.zeroed)
    assert len(zeroed) <= THREADS
    expected = bytearray(before)
    for offset in zeroed:
        expected[offset : offset + 4096] = bytes(4096)
    expected[:8192] = b"\x77" * 8192
    same = content == bytes(expected)
    assert same


def test_orphans_that_are_not_taken_back_are_found_out(disk: DiskMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was: whatever was handed out stays."""
    monkeypatch.setattr(Disk, "_take_back", lambda self, job: False)
    work, orphans = resets_with_requests(disk, 5)
    assert work > 64 + THREADS or orphans > THREADS


def test_the_disk_tells_when_its_queue_is_full(disk: DiskMachine) -> None:
    resets_with_requests(disk, 1)
    assert disk.providers[0].bounds()["requests to a disk"].reached >= 1


def test_an_operation_that_hangs_is_waited_for_at_one_reset_and_not_at_each() -> None:
    under_way = UnderWay()
    threads: list[threading.Thread] = []

    def begin(op: Op) -> threading.Event:
        go, begun = threading.Event(), threading.Event()

        def hang() -> None:
            job = Job(op, 0, 512, 0, [])
            job.state = JobState.ORPHANED
            with under_way(job):
                begun.set()
                go.wait(20)

        threads.append(threading.Thread(target=hang))
        threads[-1].start()
        assert begun.wait(10)
        return go

    first = begin(Op.READ)
    assert not under_way.wait(0.01) and len(under_way) == 1
    with mock.patch.object(under_way._condition, "wait", side_effect=AssertionError("it was given up")):
        assert not under_way.wait(60)
    second = begin(Op.WRITE)
    threading.Timer(0.05, second.set).start()
    under_way.wait(20.0)
    assert len(under_way) == 1  # the other one was waited for
    first.set()
    for thread in threads:
        thread.join(10)
    assert under_way.wait(0.0) and not len(under_way)
