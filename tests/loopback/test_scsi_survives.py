"""The SCSI provider in a real device server, with a driver as Linux's on the other side of a real socket: load over
several channels, saves in mid-traffic, disks that vanish or fail under load, hostile guests, and withdrawal."""

from __future__ import annotations

import errno
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import pace, storvsc
from support.disk import Fault
from support.kit_storage import disks as disks
from support.kit_storage import faults as faults
from support.pace import until
from support.storage import Guest, status
from support.storvsc import Extents, pattern, result_of
from vmbus.device import saved
from vmbus.errors import EnvironmentProblem, UsageError, VmbusError, WaitTimeout
from vmbus.providers.scsi import ScsiProvider
from vmbus.testkit import Request
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.transport.library import Library
from vmbus.wire import scsi
from vmbus.wire.storvsp import Direction, Operation

MIB = 1 << 20
SIZE = 8 * MIB
SLOT = 65536
OPTIONS: dict[str, Any] = {
    "luns": [
        {"lun": 0, "image": "disk.img", "size_mib": 8, "create": True},
        {"lun": 1, "image": "slow.img", "size_mib": 8, "create": True},
    ]
}
DESCRIPTION = describe("scsi", "echo", scsi=OPTIONS)


@pytest.fixture
def server(libvfio_user: Library, faults: list[Fault]) -> Iterator[LoopbackServer]:
    with LoopbackServer(DESCRIPTION, libvfio_user) as server:
        yield server


def command(server: LoopbackServer, name: str, **arguments: Any) -> dict[str, Any]:
    return server.command("provider", name="scsi", command=name, arguments=arguments)


class Churn:
    """Random requests, many in flight on all channels and disks, each on blocks of its own; a model says what reads
    must find. `gone`: disks that have vanished: requests for them may be answered so.

    Its data is behind the first MiB of the guest's memory, which other commands use meanwhile.
    """

    def __init__(self, guest: Guest, luns: int = 2, seed: int = 1) -> None:
        self.guest = guest
        self.choose = random.Random(seed)
        self.models = [bytearray(SIZE) for _ in range(luns)]
        self.gone: set[int] = set()
        self.slots = list(range(24))
        self.busy: list[tuple[int, int, int, bytes | None, Request]] = []
        self.done = self.vanished = 0

    def some(self) -> None:
        choose, guest = self.choose, self.guest
        while self.slots and choose.random() < 0.8:
            slot = self.slots.pop()
            lun = slot % len(self.models)
            first, count = 256 * slot + 8 * choose.randrange(16), 8 * choose.randint(1, 16)
            at, length = first * 512, count * 512
            channel = choose.randrange(len(guest.ports))
            external: Extents | None = guest.memory.extents(length, MIB + slot * SLOT)
            expected: bytes | None = None
            kind = choose.random()
            if kind < 0.1:
                self.models[lun][at : at + length] = bytes(length)
                flags = scsi.NO_DATA_BIT | choose.choice([0, scsi.UNMAP_BIT])
                cdb = storvsc.long_form(scsi.Opcode.WRITE_SAME_16, first, count, flags)
                external, length, direction = None, 0, Direction.NONE
            elif kind < 0.45:
                guest.memory.put(bytes(length), MIB + slot * SLOT)
                expected = bytes(self.models[lun][at : at + length])
                cdb, direction = storvsc.read_10(first, count), Direction.FROM_DEVICE
            else:
                data = pattern(length, choose.randrange(1 << 30))
                guest.memory.put(data, MIB + slot * SLOT)
                self.models[lun][at : at + length] = data
                cdb, direction = storvsc.write_10(first, count, fua=choose.random() < 0.2), Direction.TO_DEVICE
            sent = guest.send(cdb, length, channel=channel, external=external, lun=lun, direction=direction)
            self.busy.append((slot, lun, length, expected, sent))
        guest.bus.step(0.001)
        self.settle()

    def settle(self) -> None:
        for one in list(self.busy):
            slot, lun, length, expected, sent = one
            if not sent.done:
                continue
            self.busy.remove(one)
            result = result_of(sent.reply)
            if result.gone and lun in self.gone:
                self.vanished += 1
            else:
                assert result.good and result.moved == length, result
                if expected is not None:
                    same = self.guest.memory.get(length, MIB + slot * SLOT) == expected
                    assert same, "a read found other bytes than were written"
            self.slots.append(slot)
            self.done += 1

    def finish(self) -> None:
        for one in self.busy:
            one[-1].wait(20)
        self.settle()
        for lun, model in enumerate(self.models):
            for first in range(0, SIZE // 512, 2048):
                if lun not in self.gone:
                    same = self.guest.read(first, MIB, lun=lun) == bytes(model[first * 512 : first * 512 + MIB])
                    assert same, f"lun {lun} holds other bytes than were written, from block {first} on"


def test_scsi_survives_generations_in_mid_traffic(libvfio_user: Library, tmp_path: Path) -> None:
    server = LoopbackServer(DESCRIPTION, libvfio_user)
    guest = Guest(server.function(), sub_channels=2)
    churn = Churn(guest)
    held = 0
    for generation in range(10):
        for _ in range(churn.choose.randrange(1, 10)):
            churn.some()
        churn.some()
        copies = tmp_path / f"generation-{generation}"
        copies.mkdir()
        held += server.command("pause")["incoming_held"]
        state_path = tmp_path / f"state-{generation}"
        server.command("save", path=str(state_path), files=str(copies))
        config = bytes.fromhex(server.command("pci")["config"])
        server.stop()
        before = {path: path.read_bytes() for path in copies.iterdir()}
        assert sorted(path.name for path in before) == ["file.scsi.lun-0", "file.scsi.lun-1"]
        server = LoopbackServer(DESCRIPTION, libvfio_user, restore=saved.decode(state_path.read_bytes()), files=copies)
        guest.function.reconnect(server.socket_path, config)
        server.command("restore-finish")
        churn.some()
        for path, content in before.items():
            same = path.read_bytes() == content
            assert same, "the snapshot's own copy was written to"
            path.unlink()
    churn.finish()
    print(f"{churn.done} requests, {held} of them in flight at a save")
    assert churn.done > 100 and guest.bus.rescinded == []
    guest.bus.close(graceful=False)
    server.stop()


def test_a_slow_disk_does_not_keep_the_other_one_waiting(server: LoopbackServer, faults: list[Fault]) -> None:
    guest = Guest(server.function())
    slow = [Fault("write", hang=True) for _ in range(40)]
    faults += slow
    pending = [guest.send(storvsc.write_10(8 * n, 8), 4096, lun=1, direction=Direction.TO_DEVICE) for n in range(40)]
    assert slow[0].begun.wait(pace.seconds(10))
    guest.bus.step(0.02)
    for number in range(50):
        # With FUA: others are done without a thread.
        assert guest.write(8 * number, pattern(4096, number), fua=bool(number % 2)).good
        assert guest.read(8 * number, 4096) == pattern(4096, number)
    assert not any(one.done for one in pending)
    for fault in slow:
        fault.go.set()
    for one in pending:
        one.wait(20)
    assert all(result_of(one.reply).good for one in pending)
    guest.close()


def test_with_all_threads_for_one_disk_the_other_one_would_wait(server: LoopbackServer, faults: list[Fault]) -> None:
    guest = Guest(server.function())
    provider = server.server.providers[0]
    assert isinstance(provider, ScsiProvider)
    for unit in provider.units.values():
        unit.disk.most_jobs = 40
    slow = [Fault("write", hang=True) for _ in range(40)]
    faults += slow
    pending = [guest.send(storvsc.write_10(8 * n, 8), 4096, lun=1, direction=Direction.TO_DEVICE) for n in range(40)]
    assert slow[7].begun.wait(pace.seconds(10))
    other = guest.send(storvsc.write_10(0, 8, fua=True), 4096, direction=Direction.TO_DEVICE)
    guest.bus.step(0.2)
    assert not other.done
    for fault in slow:
        fault.go.set()
    for one in (*pending, other):
        one.wait(20)
    guest.close()


def test_a_disk_that_vanishes_under_load(server: LoopbackServer, disks: Path) -> None:
    guest = Guest(server.function(), sub_channels=1)
    churn = Churn(guest)
    while churn.done < 200:
        churn.some()
    answers: list[dict[str, Any]] = []
    churn.gone.add(1)
    removal = threading.Thread(target=lambda: answers.append(command(server, "remove-lun", lun=1)))
    removal.start()
    # On a busy machine the removal may be over before the guest has taken its notice, or asked for that disk again.
    deadline = time.monotonic() + pace.seconds(20)
    while churn.done < 600 or removal.is_alive() or not (churn.vanished and guest.ports[0].unreceived):
        assert time.monotonic() < deadline, (churn.done, churn.vanished)
        churn.some()
    removal.join()
    assert answers == [{"lun": 1, "image": "slow.img"}] and churn.vanished > 0
    assert guest.notices() == [Operation.ENUMERATE_BUS]
    assert [one.lun for one in guest.scan()] == [0]
    churn.finish()
    command(server, "add-lun", lun=1, image="slow.img")
    assert [one.lun for one in guest.scan()] == [0, 1]
    guest.close()


def test_a_disk_that_is_full_says_so_and_works_again(server: LoopbackServer, faults: list[Fault]) -> None:
    guest = Guest(server.function())
    faults.append(Fault("write", errno.ENOSPC, count=3))
    senses = [guest.write(0, pattern(4096, 1), lun=1).sense for _ in range(4)]
    assert senses == [scsi.SPACE_ALLOCATION_FAILED] * 3 + [None]
    assert guest.ask(storvsc.SYNCHRONIZE, lun=1).good
    server.command("pause")
    server.command("resume")
    assert guest.read(0, 4096, lun=1) == pattern(4096, 1)
    guest.close()


def test_fault_d1_an_image_that_is_replaced_while_it_is_in_use(
    server: LoopbackServer, disks: Path, tmp_path: Path
) -> None:
    guest = Guest(server.function())
    assert guest.write(0, pattern(4096, 1)).good
    (disks / "disk.img").rename(disks / "moved.img")
    (disks / "disk.img").write_bytes(b"X" * SIZE)
    assert guest.write(8, pattern(4096, 2)).good and guest.ask(storvsc.SYNCHRONIZE).good
    copies = tmp_path / "copies"
    copies.mkdir()
    server.save(copies)
    assert (copies / "file.scsi.lun-0").read_bytes()[:8192] == pattern(4096, 1) + pattern(4096, 2)
    server.command("resume")
    assert guest.read(0, 8192) == pattern(4096, 1) + pattern(4096, 2)
    assert (disks / "disk.img").read_bytes() == b"X" * SIZE
    guest.close()


def test_a_controller_is_withdrawn_once_the_guest_has_let_go(server: LoopbackServer) -> None:
    """As Linux does: told to look, it finds its disks gone, looks everywhere once more, and is quiet."""
    guest = Guest(server.function())
    guest.scan()
    answers: list[dict[str, Any]] = []
    rescind = threading.Thread(target=lambda: answers.append(server.command("rescind", name="scsi")))
    rescind.start()
    guest.bus.run_until(lambda: bool(guest.ports[0].unreceived), 10, "a notice")
    assert guest.ask(storvsc.READY).gone and guest.ask(storvsc.READY, lun=1).gone
    assert guest.ask(storvsc.SYNCHRONIZE).gone
    assert guest.scan() == [] and not answers
    while rescind.is_alive():
        guest.bus.step(0.01)
    rescind.join()
    assert answers[0]["released"]
    guest.bus.close()


def test_a_withdrawal_that_fails_leaves_the_disks(server: LoopbackServer, faults: list[Fault]) -> None:
    guest = Guest(server.function())
    hung = Fault("write", hang=True)
    faults.append(hung)
    pending = guest.send(storvsc.write_10(0, 8), 4096, lun=1, direction=Direction.TO_DEVICE)
    assert hung.begun.wait(pace.seconds(10))
    with pytest.raises(WaitTimeout):
        server.command("rescind", name="scsi", seconds=1.0)
    assert [one.lun for one in guest.scan()] == [0, 1] and len(guest.notices()) == 2
    hung.go.set()
    pending.wait()
    assert result_of(pending.reply).good
    guest.close()


def test_a_save_waits_for_what_is_in_flight_and_a_hung_disk_fails_it(
    server: LoopbackServer, faults: list[Fault]
) -> None:
    guest = Guest(server.function())
    hung = Fault("write", hang=True)
    faults.append(hung)
    pending = guest.send(storvsc.write_10(0, 8), 4096, lun=1, direction=Direction.TO_DEVICE)
    assert hung.begun.wait(pace.seconds(10))
    with pytest.raises(WaitTimeout, match="incoming packets"):
        server.command("pause", seconds=0.3)
    assert server.command("status")["phase"] == "running"
    assert guest.write(0, pattern(4096, 1)).good, "the device runs on"
    answers: list[dict[str, Any]] = []
    pause = threading.Thread(target=lambda: answers.append(server.command("pause")))
    pause.start()
    until(lambda: server.command("status")["phase"] == "pausing", "the pause to begin")
    # A guest that goes on asking while a save is in progress: it is served afterwards.
    later = [guest.send(storvsc.read_10(8 * number, 8), 4096) for number in range(8)]
    guest.bus.step(0.05)
    assert not pending.done and pause.is_alive()
    hung.go.set()
    pause.join(pace.seconds(10))
    assert answers[0]["incoming_held"] == 1
    assert not any(one["locked"] or one["running"] for one in status(server)["luns"])
    guest.bus.step(0.05)
    assert not any(one.done for one in later)
    server.command("resume")
    for one in (pending, *later):
        one.wait(20)
    assert all(result_of(one.reply).good for one in (pending, *later))
    assert guest.read(0, 4096) == pattern(4096, 1)
    guest.close()


def test_a_flush_that_fails_at_a_pause_fails_the_save(
    server: LoopbackServer, faults: list[Fault], tmp_path: Path
) -> None:
    guest = Guest(server.function())
    assert guest.write(0, pattern(4096, 1), lun=1).good
    faults.append(Fault("flush"))
    server.command("pause")  # brings everything to stable storage, and hears that it cannot
    with pytest.raises(EnvironmentProblem, match="stable storage"):
        server.command("save", path=str(tmp_path / "state"), files=str(tmp_path))
    server.command("resume")
    assert guest.read(0, 4096, lun=1) == pattern(4096, 1)
    assert guest.ask(storvsc.SYNCHRONIZE, lun=1).sense == scsi.INTERNAL_TARGET_FAILURE
    assert guest.ask(storvsc.SYNCHRONIZE).good
    guest.close()


@pytest.mark.parametrize("snapshot", ["shared", "copy"])
def test_two_hosts_never_have_an_image_at_once(libvfio_user: Library, snapshot: str) -> None:
    options = {"luns": [one | {"snapshot": snapshot} for one in OPTIONS["luns"]]}
    description = describe("scsi", scsi=options)
    with LoopbackServer(description, libvfio_user) as source:
        function = source.function()
        guest = Guest(function)
        guest.write(0, pattern(4096, 1))
        with pytest.raises(VmbusError, match="is in use"):
            LoopbackServer(description, libvfio_user)
        state = source.save(moving=True)
        config = bytes.fromhex(source.command("pci")["config"])
        with LoopbackServer(description, libvfio_user, restore=state) as destination:
            function.reconnect(destination.socket_path, config)
            destination.command("restore-finish")
            assert guest.read(0, 4096) == pattern(4096, 1)
            assert guest.write(8, pattern(4096, 2)).good
            with pytest.raises(EnvironmentProblem, match="is in use"):
                source.command("resume")
        with pytest.raises(EnvironmentProblem, match="was written to by somebody else"):
            source.command("resume")


def test_scsi_survives_a_move_to_where_its_image_is_not(
    libvfio_user: Library, tmp_path: Path, disks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a host refuses, and so does a save when nobody could find the image."""
    description = describe("scsi", scsi=OPTIONS)
    other = tmp_path / "other"

    def refused(why: str) -> None:
        with monkeypatch.context() as there, LoopbackServer(description, libvfio_user, restore=state) as host:
            there.setenv("VMBUS_DISKS", str(other))
            function.reconnect(host.socket_path, config)
            with pytest.raises(EnvironmentProblem, match=why):
                host.command("restore-finish")

    with LoopbackServer(description, libvfio_user) as source:
        function = source.function()
        guest = Guest(function)
        guest.write(0, pattern(4096, 1))
        state = source.save(moving=True)
        config = bytes.fromhex(source.command("pci")["config"])
    refused("there is no disk image .*: who goes on with a VM needs the same image")
    assert not other.exists(), "it makes no empty one"
    shutil.copytree(disks, other, copy_function=shutil.copyfile)
    refused("or is another disk.*both hosts have to reach the same image")
    with LoopbackServer(description, libvfio_user, restore=state) as host:
        function.reconnect(host.socket_path, config)
        host.command("restore-finish")
        assert guest.read(0, 4096) == pattern(4096, 1)
        (disks / "disk.img").rename(disks / "renamed.img")
        with pytest.raises(UsageError, match="belong to the device's state, and nothing takes them along"):
            host.save(moving=True)
        host.command("resume")
        assert guest.read(0, 4096) == pattern(4096, 1)
        files = tmp_path / "snapshot"
        files.mkdir()
        state = host.save(files)
        config = bytes.fromhex(host.command("pci")["config"])
    monkeypatch.setenv("VMBUS_CLONE_DISKS", str(tmp_path / "clone"))
    with LoopbackServer(description, libvfio_user, restore=state, files=files) as clone:
        function.reconnect(clone.socket_path, config)
        clone.command("restore-finish")
        assert guest.read(0, 4096) == pattern(4096, 1)
        with pytest.raises(UsageError, match="belong to the device's state, and nothing takes them along"):
            clone.save(moving=True)
        clone.command("resume")
        guest.close()
