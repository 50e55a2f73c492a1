"""Drivers that die, or reset their function, with requests on worker threads: nothing touches memory that is somebody
else's, and old data never replaces new. On the SCSI provider in a real device server."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support import pace, storvsc
from support.disk import Fault, FaultyBackend
from support.kit_storage import disks as disks
from support.kit_storage import faults as faults
from support.pace import until
from support.storage import Guest, disk_status
from support.storvsc import pattern, result_of
from vmbus.errors import WaitTimeout
from vmbus.providers.disk import disk
from vmbus.providers.disk.core import Core, Job
from vmbus.providers.scsi import ScsiProvider
from vmbus.testkit import Request
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.transport.library import Library
from vmbus.transport.mapping import GuestMapping
from vmbus.wire.storvsp import Direction
from vmbus.wire.synic import CONTROL_RESET, Register

MIB = 1 << 20
SLOT = 65536
BLOCKS = SLOT // 512
CANARY = b"\xc5" * MIB
DESCRIPTION = describe("scsi", scsi={"luns": [{"image": "slow.img", "size_mib": 8, "create": True}]})


@pytest.fixture
def server(libvfio_user: Library, faults: list[Fault]) -> Iterator[LoopbackServer]:
    with LoopbackServer(DESCRIPTION, libvfio_user) as server:
        yield server


def write(guest: Guest, data: bytes) -> Request:
    """To the first blocks, without waiting for it."""
    guest.memory.put(data)
    return guest.send(storvsc.write_10(0, len(data) // 512), len(data), direction=Direction.TO_DEVICE)


def until_no_orphans(server: LoopbackServer) -> None:
    until(lambda: not disk_status(server)["orphaned"], "the orphaned requests to end")


class Killed:
    """A guest whose reads hang on worker threads while its driver dies; its memory then belongs to somebody else."""

    def __init__(self, server: LoopbackServer, faults: list[Fault]) -> None:
        self.server = server
        self.function = server.function()
        guest = Guest(self.function, sub_channels=1)
        for number in range(4):
            assert guest.write(number * BLOCKS, pattern(SLOT, number)).good
        self.hung = [Fault("read", hang=True) for _ in range(4)]
        faults += self.hung
        self.file_page = guest.memory.memory.pages.buffer.file_pages[0]
        for number in range(4):
            memory = guest.memory.extents(SLOT, number * SLOT)
            guest.send(storvsc.read_10(number * BLOCKS, BLOCKS), SLOT, channel=number % 2, external=memory)
        for fault in self.hung:
            assert fault.begun.wait(pace.seconds(10))

    def canary(self) -> memoryview:
        """The memory that the reads were for, as its new owner sees it."""
        start = self.file_page * 4096
        view = self.function._ram[start : start + MIB]
        view[:] = CANARY
        return view

    def release(self) -> None:
        for fault in self.hung:
            fault.go.set()
        until_no_orphans(self.server)


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
    assert guest.read(0, SLOT) == pattern(SLOT, 0)
    guest.close()


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
        assert guest.write(number * MIB // 512, pattern(MIB, number)).good
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
        start = guest.memory.memory.pages.buffer.file_pages[0] * 4096
        for number in range(32):
            memory = guest.memory.extents(MIB, number % 4 * MIB)
            guest.send(storvsc.read_10(number % 8 * MIB // 512, MIB // 512), MIB, external=memory)
        guest.bus.step(0.0)
        time.sleep(choose.random() * 0.003)  # anywhere in the middle
        function.unmap_all()
        view = function._ram[start : start + 4 * MIB]
        view[:] = CANARY * 4
        until_no_orphans(server)
        intact = bytes(view) == CANARY * 4
        assert intact, "a read has written into memory that was taken back"
        function.close()
        function = server.function()
        guest = Guest(function)
    print(f"{sum(orphans)} reads were under way when their memory was taken back, in {rounds} rounds")
    guest.close()


def test_a_reset_waits_for_what_is_under_way(server: LoopbackServer, faults: list[Fault]) -> None:
    """After a mere reset the memory is still in reach: so nothing may be under way when the guest goes on."""
    killed = Killed(server, faults)
    timer = threading.Timer(0.3, lambda: [fault.go.set() for fault in killed.hung])
    timer.start()
    killed.function.write32(Register.CONTROL, CONTROL_RESET)
    assert killed.function.read32(Register.CONTROL) == 0
    canary = killed.canary()
    until_no_orphans(server)
    timer.join()
    assert bytes(canary) == CANARY or pytest.fail("a read has written into memory after the reset")
    guest = Guest(killed.function, sub_channels=1)
    assert guest.read(0, SLOT, channel=1) == pattern(SLOT, 0)
    guest.close()


def test_an_old_write_never_replaces_a_new_one(
    server: LoopbackServer, faults: list[Fault], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "PATIENCE", 0.0)
    function = server.function()
    hung = Fault("write", hang=True)
    faults.append(hung)
    write(Guest(function), b"old." * 1024)
    assert hung.begun.wait(pace.seconds(10))
    function.write32(Register.CONTROL, CONTROL_RESET)
    new = Guest(function)
    asked = write(new, b"new." * 1024)
    assert new.ask(storvsc.SYNCHRONIZE).good
    new.bus.step(0.05)
    assert not asked.done
    # The orphan is of no use to anybody, but it can still write: a save waits for it, too.
    with pytest.raises(WaitTimeout):
        server.command("pause", seconds=0.2)
    hung.go.set()
    asked.wait()
    assert result_of(asked.reply).good
    assert new.read(0, 4096) == b"new." * 1024
    new.close()


def test_a_server_ends_with_a_disk_that_hangs(
    libvfio_user: Library, faults: list[Fault], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock stays until the operation ends: whatever is written until then is written under it."""
    monkeypatch.setattr("vmbus.server.session._END_SECONDS", 0.2)
    server = LoopbackServer(DESCRIPTION, libvfio_user)
    guest = Guest(server.function())
    hung = Fault("write", hang=True)
    faults.append(hung)
    write(guest, bytes(4096))
    assert hung.begun.wait(pace.seconds(10))
    provider = server.server.providers[0]
    assert isinstance(provider, ScsiProvider)
    under_way = provider.units[0].disk.under_way
    guest.bus.close(graceful=False)
    server.stop()
    hung.go.set()
    until(lambda: not under_way, "the write to end")
    with LoopbackServer(DESCRIPTION, libvfio_user) as server:
        Guest(server.function()).close()
