"""The block provider in a real device server: data, saves, hostile guests, and drivers that die in mid-transfer."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.disk import Fault, FaultyBackend
from vmbus import providers, saved
from vmbus.errors import EnvironmentProblem, VmbusError, WaitTimeout
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.status import Status as PacketStatus
from vmbus.loopback.function import LoopbackFunction
from vmbus.loopback.harness import LoopbackServer, describe
from vmbus.providers.block import BlockProvider
from vmbus.providers.disk import disk
from vmbus.providers.disk.backend import Backend
from vmbus.providers.disk.core import Core, Job
from vmbus.providers.disk.image import Image
from vmbus.vfio_user.library import Library
from vmbus.vfio_user.mapping import GuestMapping
from vmbus.wire import block as wire
from vmbus.wire.block import BLOCK_TYPE, Disk, Flag, Hello, Op, Status, parse_disk, parse_status
from vmbus.wire.synic import CONTROL_RESET, Register
from vmbus_guest.driver import VmbusDriver

pytestmark = pytest.mark.loopback

MIB = 1 << 20
SIZE = 8 * MIB
OPTIONS: dict[str, Any] = {"image": "disk.img", "size_mib": 8, "create": True}
DESCRIPTION = describe("block", block=OPTIONS)


@pytest.fixture(autouse=True)
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "disks"
    monkeypatch.setenv("VMBUS_DISKS", str(directory))
    return directory


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Fault]]:
    """What is to go wrong in the storage of every disk."""
    faults: list[Fault] = []

    class Faulty(BlockProvider):
        def make_backend(self, image: Image) -> Backend:
            return FaultyBackend(image.backend, faults)

    monkeypatch.setitem(providers.PROVIDERS, "block", Faulty)
    yield faults
    for fault in faults:
        fault.go.set()


@pytest.fixture
def server(libvfio_user: Library, faults: list[Fault]) -> Iterator[LoopbackServer]:
    with LoopbackServer(DESCRIPTION, libvfio_user) as server:
        yield server


class Asked:
    """One request and its answer."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, int]] = []

    def completed(self, packet: Packet, status: int, reply: bytes) -> None:
        self.answers.append((status, parse_status(reply)))
        packet.free()

    @property
    def done(self) -> bool:
        return bool(self.answers)

    @property
    def status(self) -> int:
        assert len(self.answers) == 1, self.answers
        kernel, status = self.answers[0]
        assert kernel == PacketStatus.SUCCESS
        return status


class Guest:
    """A driver with a disk and some memory."""

    def __init__(self, function: LoopbackFunction, memory: int = 4 * MIB) -> None:
        self.function = function
        self.driver = VmbusDriver(function)
        self.channel = self.driver.client_channel(BLOCK_TYPE, name="disk")
        self.driver.enable(self.channel)
        self.buffer = self.driver.allocate(memory)
        disk = parse_disk(self.ask_raw(Hello().pack()))
        assert disk is not None
        self.disk: Disk = disk

    def ask_raw(self, message: bytes) -> bytes:
        replies: list[bytes] = []
        packet = self.channel.allocate_packet()
        packet.completion_routine = lambda packet, status, reply: replies.append(reply)
        packet.send(message)
        self.driver.run_until(lambda: bool(replies), 10, "a reply")
        return replies[0]

    def send(self, op: int, offset: int = 0, length: int = 0, *, flags: int = 0, at: int = 0, **more: Any) -> Asked:
        asked = Asked()
        packet = self.channel.allocate_packet()
        packet.completion_routine = asked.completed
        external = more.get("external", [(self.buffer.iova + at, length)] if op in (Op.READ, Op.WRITE) else None)
        packet.send(wire.Request(op, flags, offset, length).pack(), external=external)
        return asked

    def ask(self, *arguments: Any, **options: Any) -> int:
        asked = self.send(*arguments, **options)
        self.wait(asked)
        return asked.status

    def wait(self, *asked: Asked, seconds: float = 10.0) -> None:
        self.driver.run_until(lambda: all(one.done for one in asked), seconds, "answers of the disk")

    def write(self, offset: int, data: bytes, flags: int = 0) -> int:
        self.buffer.view[: len(data)] = data
        return self.ask(Op.WRITE, offset, len(data), flags=flags)

    def read(self, offset: int, length: int) -> bytes:
        assert self.ask(Op.READ, offset, length) == Status.OK
        return bytes(self.buffer.view[:length])


def until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise WaitTimeout(what, seconds)
        time.sleep(0.002)


def disk_status(server: LoopbackServer) -> dict[str, Any]:
    return dict(server.command("status")["providers"]["block"])


def pattern(length: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(length)


# ---- data ------------------------------------------------------------------------------------------------------------


class Churn:
    """Random requests, many in flight, each on blocks of its own; a model says what reads must find."""

    def __init__(self, guest: Guest, seed: int = 1) -> None:
        self.guest = guest
        self.choose = random.Random(seed)
        self.model = bytearray(SIZE)
        self.slots = list(range(16))
        self.busy: list[tuple[int, int, bytes | None, Asked]] = []
        self.done = 0

    def some(self) -> None:
        guest, choose = self.guest, self.choose
        with guest.channel.batch():
            while self.slots and choose.random() < 0.8:
                slot = self.slots.pop()
                at = slot * 65536
                offset = at * 8 + 4096 * choose.randrange(64)
                length = 4096 * choose.randint(1, 16)
                kind = choose.random()
                if kind < 0.4:
                    guest.buffer.view[at : at + length] = bytes(length)
                    expected = bytes(self.model[offset : offset + length])
                    asked = guest.send(Op.READ, offset, length, at=at)
                elif kind < 0.9:
                    data = pattern(length, choose.randrange(1 << 30))
                    guest.buffer.view[at : at + length] = data
                    self.model[offset : offset + length] = data
                    expected = None
                    asked = guest.send(Op.WRITE, offset, length, at=at, flags=choose.choice([0, 0, Flag.FUA]))
                else:
                    self.model[offset : offset + length] = bytes(length)
                    expected = None
                    asked = guest.send(Op.WRITE_ZEROES, offset, length, flags=choose.choice([0, Flag.MAY_UNMAP]))
                self.busy.append((slot, length, expected, asked))
        guest.driver.step(0.001)
        self.settle()

    def settle(self) -> None:
        for one in list(self.busy):
            slot, length, expected, asked = one
            if not asked.done:
                continue
            self.busy.remove(one)
            assert asked.status == Status.OK
            if expected is not None:
                same = bytes(self.guest.buffer.view[slot * 65536 : slot * 65536 + length]) == expected
                assert same, "a read found other bytes than were written"
            self.slots.append(slot)
            self.done += 1

    def finish(self) -> None:
        self.guest.wait(*(asked for *_, asked in self.busy))
        self.settle()
        for offset in range(0, SIZE, MIB):
            same = self.guest.read(offset, MIB) == bytes(self.model[offset : offset + MIB])
            assert same, f"the disk holds other bytes than were written, in the MiB at {offset:#x}"


def test_many_requests_in_flight(server: LoopbackServer) -> None:
    guest = Guest(server.function())
    churn = Churn(guest)
    while churn.done < 1500:
        churn.some()
    assert guest.ask(Op.FLUSH) == Status.OK
    churn.finish()
    guest.driver.close()


def test_scattered_memory(server: LoopbackServer) -> None:
    guest = Guest(server.function())
    buffer = guest.function.allocate_permuted([3, 0, 2, 1])
    data = pattern(buffer.size, 1)
    buffer.view[:] = data
    external = [(buffer.iova, 8192), (buffer.iova + 8192 + 16, 4096 - 16), (buffer.iova + 12288, 16)]
    asked = guest.send(Op.WRITE, 512, 12288, external=external)
    guest.wait(asked)
    assert asked.status == Status.OK
    expected = data[:8192] + data[8192 + 16 : 12288] + data[12288 : 12288 + 16]
    assert guest.read(512, 12288) == expected
    guest.driver.close()


# ---- saves and restores ----------------------------------------------------------------------------------------------


def test_many_generations_in_mid_traffic(libvfio_user: Library, tmp_path: Path) -> None:
    server = LoopbackServer(DESCRIPTION, libvfio_user)
    guest = Guest(server.function())
    churn = Churn(guest)
    held = 0
    for generation in range(12):
        for _ in range(churn.choose.randrange(1, 12)):
            churn.some()
        with guest.channel.batch():
            churn.some()
        copies = tmp_path / f"generation-{generation}"
        copies.mkdir()
        held += server.command("pause")["incoming_held"]
        state_path = tmp_path / f"state-{generation}"
        server.command("save", path=str(state_path), files=str(copies))
        config = bytes.fromhex(server.command("pci")["config"])
        server.stop()
        copy = copies / "file.block.disk"
        before = copy.read_bytes()
        server = LoopbackServer(DESCRIPTION, libvfio_user, restore=saved.decode(state_path.read_bytes()), files=copies)
        guest.function.reconnect(server.socket_path, config)
        server.command("restore-finish")
        churn.some()
        same = copy.read_bytes() == before
        assert same, "the snapshot's own copy was written to"
        copy.unlink()
    churn.finish()
    print(f"{churn.done} requests, {held} of them in flight at a save")
    assert churn.done > 100 and guest.driver.rescinded == []
    guest.driver.close(graceful=False)
    server.stop()


def test_a_save_waits_for_what_is_in_flight(server: LoopbackServer, faults: list[Fault]) -> None:
    guest = Guest(server.function())
    slow = Fault("write", hang=True)
    faults.append(slow)
    first = guest.send(Op.WRITE, 0, 4096)
    assert slow.begun.wait(10)
    outcome: list[Any] = []
    pause = threading.Thread(target=lambda: outcome.append(server.command("pause")))
    pause.start()
    until(lambda: server.command("status")["phase"] == "pausing", "the pause to begin")
    # A guest that goes on asking while a save is in progress: it is served afterwards.
    later = [guest.send(Op.READ, number * 4096, 4096, at=65536) for number in range(8)]
    guest.driver.step(0.05)
    assert not first.done and pause.is_alive()
    slow.go.set()
    pause.join(10)
    assert outcome[0]["incoming_held"] == 1
    status = disk_status(server)
    assert not status["locked"] and status["running"] == []
    guest.driver.step(0.05)
    assert not any(one.done for one in later)
    server.command("resume")
    guest.wait(first, *later)
    assert {one.status for one in (first, *later)} == {Status.OK}
    guest.driver.close()


def test_a_request_that_cannot_finish_fails_the_save_and_not_the_disk(
    server: LoopbackServer, faults: list[Fault]
) -> None:
    guest = Guest(server.function())
    hung = Fault("read", hang=True)
    faults.append(hung)
    asked = guest.send(Op.READ, 0, 4096)
    assert hung.begun.wait(10)
    with pytest.raises(WaitTimeout, match="incoming packets"):
        server.command("pause", seconds=0.3)
    assert server.command("status")["phase"] == "running"
    assert guest.write(8192, b"still..." * 64) == Status.OK
    assert guest.ask(Op.FLUSH) == Status.OK
    hung.go.set()
    guest.wait(asked)
    assert asked.status == Status.OK
    server.command("pause")
    server.command("resume")
    guest.driver.close()


def test_a_disk_whose_flush_failed_fails_the_save(server: LoopbackServer, faults: list[Fault], tmp_path: Path) -> None:
    guest = Guest(server.function())
    assert guest.write(0, pattern(4096, 1)) == Status.OK
    faults.append(Fault("flush", errno.EIO))
    server.command("pause")  # brings everything to stable storage, and hears that it cannot
    with pytest.raises(EnvironmentProblem, match="stable storage"):
        server.command("save", path=str(tmp_path / "state"), files=str(tmp_path))
    server.command("resume")
    assert guest.read(0, 4096) == pattern(4096, 1)
    assert guest.ask(Op.FLUSH) == Status.IO_ERROR
    guest.driver.close()


def test_two_hosts_never_have_the_image_at_once(libvfio_user: Library, tmp_path: Path) -> None:
    """The order of a live migration, by hand: the source gives the image up before the destination takes it."""
    description = describe("block", block=OPTIONS | {"snapshot": "shared"})
    with LoopbackServer(description, libvfio_user) as source:
        function = source.function()
        guest = Guest(function)
        guest.write(0, pattern(4096, 1))
        with pytest.raises(VmbusError, match="is in use"):
            LoopbackServer(description, libvfio_user)
        state = source.save()
        config = bytes.fromhex(source.command("pci")["config"])
        with LoopbackServer(description, libvfio_user, restore=state) as destination:
            function.reconnect(destination.socket_path, config)
            destination.command("restore-finish")
            assert guest.read(0, 4096) == pattern(4096, 1)
            assert guest.write(4096, pattern(4096, 2)) == Status.OK
            with pytest.raises(EnvironmentProblem, match="is in use"):
                source.command("resume")
            assert source.command("status")["phase"] == "paused"
        # Even when the other one is gone: it has written.
        with pytest.raises(EnvironmentProblem, match="was written to by somebody else"):
            source.command("resume")


# ---- hostile guests --------------------------------------------------------------------------------------------------


def test_a_guest_that_asks_for_nonsense(server: LoopbackServer, disks: Path) -> None:
    guest = Guest(server.function())
    assert guest.write(0, pattern(65536, 7)) == Status.OK
    assert guest.ask(Op.FLUSH) == Status.OK
    before = (disks / "disk.img").read_bytes()
    function = guest.function
    choose = random.Random(9)
    good = guest.buffer.iova
    function.map(0x9_0000_0000, 4096, 0, writable=False)
    external: list[list[tuple[int, int]] | None] = [
        None,
        [(good, 4096)],
        [(good, 8)],
        [(0x7_0000_0000, 4096)],  # not there
        [(good + (3 << 20), 4096), (0x7_0000_0000, 4096)],  # partly there
        [((1 << 64) - 4096, 4096)],
        [(0x9_0000_0000, 4096)],  # read-only
    ]
    offsets = [0, 511, 4096, SIZE - 512, SIZE, 1 << 40, (1 << 64) - 512, (1 << 64) - 1]
    lengths = [0, 1, 512, 4096, SIZE, 1 << 32, (1 << 64) - 512, (1 << 64) - 1]
    asked = []
    for _ in range(400):
        message = wire.Request(
            choose.choice([*Op, 0, 7, 0xFFFF_FFFF]),
            choose.choice([0, 0, 1, 2, 3, 4, 0xFFFF_FFFF]),
            choose.choice(offsets),
            choose.choice(lengths),
        )
        if message.op in (Op.WRITE, Op.DISCARD, Op.WRITE_ZEROES) and message.offset + message.length <= SIZE:
            message = message._replace(offset=SIZE)  # what is sound would change the disk
        one = Asked()
        packet = guest.channel.allocate_packet()
        packet.completion_routine = one.completed
        data = message.pack()[: choose.choice([24, 24, 24, 8, 16])]
        packet.send(data, external=choose.choice(external))
        asked.append(one)
        if len(asked) % 20 == 0:
            guest.wait(*asked)
    guest.wait(*asked)
    same = (disks / "disk.img").read_bytes() == before
    assert same, "nonsense has changed the disk"
    assert disk_status(server)["errors"] == 0
    disk = parse_disk(guest.ask_raw(Hello().pack()))
    assert disk is not None
    assert guest.read(0, 65536) == pattern(65536, 7)
    read_only = guest.send(Op.READ, 0, 4096, external=[(0x9_0000_0000, 4096)])
    source = guest.send(Op.WRITE, 0, 4096, external=[(0x9_0000_0000, 4096)])
    guest.wait(read_only, source)
    assert (read_only.status, source.status) == (Status.BAD_MEMORY, Status.OK)
    guest.driver.close()


# ---- drivers that die in mid-transfer --------------------------------------------------------------------------------

CANARY = b"\xc5" * MIB


class Killed:
    """A guest whose reads hang on worker threads while its driver dies; its memory then belongs to somebody else."""

    def __init__(self, server: LoopbackServer, faults: list[Fault], count: int = 4) -> None:
        self.server = server
        self.function = server.function()
        guest = Guest(self.function)
        for number in range(count):
            assert guest.write(number * 65536, pattern(65536, number)) == Status.OK
        self.hung = [Fault("read", hang=True) for _ in range(count)]
        faults += self.hung
        self.file_page = guest.buffer.file_pages[0]
        for number in range(count):
            guest.send(Op.READ, number * 65536, 65536, at=number * 65536)
        self.driver = guest.driver
        for fault in self.hung:
            assert fault.begun.wait(10)

    def canary(self) -> memoryview:
        """The memory that the reads were for, as its new owner sees it."""
        start = self.file_page * 4096
        view = self.function._ram[start : start + MIB]
        view[:] = CANARY
        return view

    def release(self) -> None:
        for fault in self.hung:
            fault.go.set()
        until(lambda: disk_status(self.server)["orphaned"] == 0, "the orphaned reads to end")


def test_nothing_touches_memory_after_it_was_taken_back(
    server: LoopbackServer, faults: list[Fault], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "PATIENCE", 0.0)
    killed = Killed(server, faults)
    killed.function.unmap_all()
    canary = killed.canary()
    assert disk_status(server)["orphaned"] == len(killed.hung)
    killed.release()
    assert bytes(canary) == CANARY or pytest.fail("a read has written into memory that was taken back")
    # A dirty log that starts now knows nothing of that memory.
    server.command("log-start")
    server.command("pause")
    assert server.command("flush")["pages"] == 0
    server.command("log-stop")
    server.command("resume")
    guest = Guest(killed.function)
    assert guest.read(0, 65536) == pattern(65536, 0)
    guest.driver.close()


def test_without_the_revocation_it_would(
    server: LoopbackServer, faults: list[Fault], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "PATIENCE", 0.0)
    monkeypatch.setattr(GuestMapping, "revoke", lambda self: None)
    killed = Killed(server, faults)
    killed.function.unmap_all()
    canary = killed.canary()
    killed.release()
    intact = bytes(canary) == CANARY
    assert not intact, "the canary proves nothing"


def test_drivers_that_die_again_and_again_with_reads_on_threads(
    server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No faults here: real reads, cut off wherever they happen to be."""
    monkeypatch.setattr(disk, "PATIENCE", 0.0)
    function = server.function()
    guest = Guest(function)
    for number in range(8):
        assert guest.write(number * MIB, pattern(MIB, number)) == Status.OK
    choose = random.Random(11)
    orphans: list[int] = []
    forget = Core.forget

    def counted(core: Core, take_back: Callable[[Job], bool], gone: Callable[[Any], bool]) -> list[Job]:
        startable = forget(core, take_back, gone)
        orphans.append(len(core.running))
        return startable

    monkeypatch.setattr(Core, "forget", counted)
    monkeypatch.setattr(FaultyBackend, "prompt", False)
    rounds = 0
    while sum(orphans) < 20 or rounds < 20:
        rounds += 1
        assert rounds < 300, f"only {sum(orphans)} reads were ever under way"
        start = guest.buffer.file_pages[0] * 4096
        for number in range(32):
            guest.send(Op.READ, number % 8 * MIB, MIB, at=number % 4 * MIB)
        guest.driver.step(0.0)
        time.sleep(choose.random() * 0.003)
        function.unmap_all()
        view = function._ram[start : start + 4 * MIB]
        view[:] = CANARY * 4
        until(lambda: disk_status(server)["orphaned"] == 0, "the orphaned reads to end")
        intact = bytes(view) == CANARY * 4
        assert intact, "a read has written into memory that was taken back"
        function.close()
        function = server.function()
        guest = Guest(function)
    print(f"{sum(orphans)} reads were under way when their memory was taken back, in {rounds} rounds")
    guest.driver.close()


def test_a_reset_waits_for_what_is_under_way(server: LoopbackServer, faults: list[Fault]) -> None:
    """After a mere reset the memory is still in reach: so nothing may be under way when the guest goes on."""
    killed = Killed(server, faults)
    timer = threading.Timer(0.3, lambda: [fault.go.set() for fault in killed.hung])
    timer.start()
    killed.function.write32(Register.CONTROL, CONTROL_RESET)
    assert killed.function.read32(Register.CONTROL) == 0
    canary = killed.canary()
    until(lambda: disk_status(server)["orphaned"] == 0, "the orphaned reads to end")
    timer.join()
    assert bytes(canary) == CANARY or pytest.fail("a read has written into memory after the reset")
    guest = Guest(killed.function)
    assert guest.read(0, 65536) == pattern(65536, 0)
    guest.driver.close()


def test_an_old_write_never_replaces_a_new_one(
    server: LoopbackServer, faults: list[Fault], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "PATIENCE", 0.0)
    function = server.function()
    old = Guest(function)
    old.buffer.view[:4096] = b"old." * 1024
    hung = Fault("write", hang=True)
    faults.append(hung)
    old.send(Op.WRITE, 0, 4096)
    assert hung.begun.wait(10)
    function.write32(Register.CONTROL, CONTROL_RESET)
    new = Guest(function)
    new.buffer.view[:4096] = b"new." * 1024
    asked = new.send(Op.WRITE, 0, 4096)
    flush = new.send(Op.FLUSH)
    new.wait(flush)
    new.driver.step(0.05)
    assert not asked.done
    # The orphan is of no use to anybody, but it can still write: a save waits for it, too.
    with pytest.raises(WaitTimeout):
        server.command("pause", seconds=0.2)
    hung.go.set()
    new.wait(asked)
    assert asked.status == Status.OK
    assert new.read(0, 4096) == b"new." * 1024
    new.driver.close()


def test_a_server_ends_with_a_disk_that_hangs(
    libvfio_user: Library, faults: list[Fault], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock stays until the operation ends: whatever is written until then is written under it."""
    monkeypatch.setattr("vmbus.server.life._END_SECONDS", 0.2)
    server = LoopbackServer(DESCRIPTION, libvfio_user)
    guest = Guest(server.function())
    hung = Fault("write", hang=True)
    faults.append(hung)
    below: list[Any] = []
    guest.send(Op.WRITE, 0, 4096)
    assert hung.begun.wait(10)
    below.append(server.server.providers[0])
    guest.driver.close(graceful=False)
    server.stop()
    hung.go.set()
    until(lambda: not below[0].disk.under_way, "the write to end")
    with LoopbackServer(DESCRIPTION, libvfio_user) as server:
        Guest(server.function()).driver.close()
