"""The SCSI provider on real channels with a driver as Linux's and real files: commands, errors, units, saves."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import storvsc
from support.disk import Fault, FaultyBackend
from support.storvsc import GOOD, Driver, Extents, Pending, Result, result_of
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.providers.disk.backend import Backend
from vmbus.providers.disk.image import Image
from vmbus.providers.scsi import ScsiProvider, adapter
from vmbus.providers.scsi.commands import Data
from vmbus.providers.scsi.handshake import STEPS, Handshake, Phase
from vmbus.providers.scsi.unit import Unit
from vmbus.testkit import ProviderTest, every_step
from vmbus.testkit.client import Client, Request
from vmbus.wire import scsi, storvsp
from vmbus.wire.scsi import Opcode
from vmbus.wire.storvsp import Direction, Operation

pytestmark = pytest.mark.unit

MIB = 1 << 20
BLOCKS = MIB // 512
ONE: dict[str, Any] = {"luns": [{"lun": 0, "image": "disk.img", "size_mib": 1, "create": True}]}
TWO: dict[str, Any] = {
    "luns": [*ONE["luns"], {"lun": 3, "image": "other.img", "size_mib": 2, "create": True, "block_size": 4096}]
}


@pytest.fixture(autouse=True)
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "disks"
    monkeypatch.setenv("VMBUS_DISKS", str(directory))
    return directory


class KitPort:
    """Implements Port."""

    def __init__(self, kit: ProviderTest, client: Client) -> None:
        self.kit = kit
        self.client = client

    def send(self, payload: bytes, external: Extents | None) -> Request:
        return self.client.send(payload, external=None if external is None else list(external))

    def wait(self, *pending: Pending) -> None:
        self.kit.run()
        assert all(one.done for one in pending), "a request has no answer: Linux would wait for ever"


class KitMemory:
    """Implements Memory."""

    def __init__(self, client: Client) -> None:
        self.memory = client.memory(bytes(2 * MIB))

    def put(self, data: bytes) -> None:
        self.memory.data = data

    def get(self, length: int) -> bytes:
        return self.memory.data[:length]

    def extents(self, length: int, at: int = 0) -> list[tuple[int, int]]:
        return self.memory.part(at, length)


class Guest(Driver):
    """A driver in the kit."""

    def __init__(self, kit: ProviderTest, *, connect: bool = True, sub_channels: int = 0) -> None:
        self.kit = kit
        self.client = kit.open(kit.provider.name)
        super().__init__(KitPort(kit, self.client), KitMemory(self.client))
        if connect:
            self.connect(sub_channels=sub_channels)
            for index in range(1, sub_channels + 1):
                self.ports.append(KitPort(kit, kit.open(f"{kit.provider.name}.{index}")))

    def notices(self) -> list[int]:
        """Operations of the packets that have come unasked."""
        self.kit.run()
        packets = self.client.packets[self.client._received :]
        self.client._received = len(self.client.packets)
        for packet in packets:
            assert packet.transaction == 0 and not packet.wanted
        return [storvsp.parse_head(packet.payload)[0] for packet in packets]


def faulty(*faults: Fault) -> type[ScsiProvider]:
    class Faulty(ScsiProvider):
        def make_backend(self, image: Image) -> Backend:
            return FaultyBackend(image.backend, list(faults))

    return Faulty


@pytest.fixture
def guest() -> Iterator[Guest]:
    with ProviderTest(ScsiProvider, options=ONE) as kit:
        yield Guest(kit)


def pattern(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def provider_of(guest: Guest) -> ScsiProvider:
    provider = guest.kit.provider
    assert isinstance(provider, ScsiProvider)
    return provider


# ---- the handshake ---------------------------------------------------------------------------------------------------


def test_the_handshake_agrees_on_the_newest_version(guest: Guest) -> None:
    assert guest.version == 0x0602
    assert guest.properties == (4, 1, MIB)
    assert guest.kit.provider.status()["phase"] == "ready"


def test_steps_that_come_too_early_or_again_are_refused_and_change_nothing() -> None:
    with ProviderTest(ScsiProvider, options=ONE) as kit:
        guest = Guest(kit, connect=False)
        steps = [
            (Operation.BEGIN_INITIALIZATION, b""),
            (Operation.QUERY_PROTOCOL_VERSION, (0x0600).to_bytes(4, "little")),
            (Operation.QUERY_PROPERTIES, b""),
            (Operation.END_INITIALIZATION, b""),
        ]
        for done in range(len(steps)):
            for number, (operation, body) in enumerate(steps):
                if number != done:
                    assert guest.step(operation, body)[0] == storvsp.Status.INVALID_DEVICE_STATE, (done, operation)
            result = guest.ask(storvsc.inquiry(36), 36)
            assert result.srb == storvsp.SrbStatus.INVALID_REQUEST
            assert guest.step(*steps[done])[0] == 0
        assert guest.ask(storvsc.READY).good


@pytest.mark.parametrize("version", [0x0402, 0x0200, 0x0603, 0xFFFF, 0])
def test_other_versions_are_refused_and_the_next_one_may_fit(version: int) -> None:
    with ProviderTest(ScsiProvider, options=ONE) as kit:
        guest = Guest(kit, connect=False)
        guest.step(Operation.BEGIN_INITIALIZATION)
        offered = version.to_bytes(4, "little")
        assert guest.step(Operation.QUERY_PROTOCOL_VERSION, offered)[0] == storvsp.Status.REVISION_MISMATCH
        assert guest.step(Operation.QUERY_PROTOCOL_VERSION, (0x0501).to_bytes(4, "little"))[0] == 0


@given(st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 0xFFFF)), max_size=30), st.integers(0, 8))
def test_any_order_of_steps(steps: list[tuple[int, int]], most: int) -> None:
    """An answer of 64 bytes to each; whoever is ready has begun, agreed and asked for properties, in that order."""
    handshake = Handshake(most, MIB)
    good: list[int] = []
    for operation, word in steps:
        before = handshake.phase
        payload = storvsp.pack_request(operation, word.to_bytes(2, "little"))
        reply = handshake.step(operation, payload)
        assert len(reply) == 64 and storvsp.parse_head(reply)[0] == Operation.COMPLETE_IO
        if storvsp.parse_head(reply)[2]:
            assert handshake.phase is before
        else:
            good.append(operation)
        assert handshake.sub_channels <= most
    plain = [operation for operation in good if operation != Operation.CREATE_SUB_CHANNELS]
    order = [
        Operation.BEGIN_INITIALIZATION,
        Operation.QUERY_PROTOCOL_VERSION,
        Operation.QUERY_PROPERTIES,
        Operation.END_INITIALIZATION,
    ]
    assert plain == order[: len(plain)]
    assert (handshake.phase is Phase.READY) == (len(plain) == 4)
    assert good.count(Operation.CREATE_SUB_CHANNELS) == bool(handshake.sub_channels)


def test_an_open_begins_anew(guest: Guest) -> None:
    guest.client.close()
    guest.kit.run()
    guest.client.open()
    guest.kit.run()
    assert guest.ask(storvsc.READY).srb == storvsp.SrbStatus.INVALID_REQUEST
    guest.connect()
    assert guest.ask(storvsc.READY).good


# ---- what is there ---------------------------------------------------------------------------------------------------


def test_a_scan_finds_each_disk_once() -> None:
    with ProviderTest(ScsiProvider, options=TWO) as kit:
        first, second = Guest(kit).scan()
        assert first[:-1] == (0, BLOCKS, 512, False, True, True, True, b"Msft    ")
        assert second[:-1] == (3, 512, 4096, False, True, True, True, b"Msft    ")
        assert first.identity != second.identity


def test_a_controller_without_disks() -> None:
    with ProviderTest(ScsiProvider) as kit:
        guest = Guest(kit)
        assert guest.scan() == []
        assert guest.ask(storvsc.READY).gone


def test_what_is_not_there_is_gone_and_never_a_disk(guest: Guest) -> None:
    for where in ({"lun": 1}, {"target": 1}, {"path": 7}, {"lun": 255}):
        assert guest.fetch(storvsc.inquiry(36), 36, **where)[0] == scsi.ABSENT
        for cdb in (storvsc.READY, storvsc.read_10(0, 1), storvsc.SYNCHRONIZE):
            assert guest.ask(cdb, 512 if cdb[0] == Opcode.READ_10 else 0, **where).gone


# ---- data ------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_is_in_the_image(guest: Guest, disks: Path) -> None:
    data = pattern(65536)
    assert guest.write(8, data).good
    assert guest.write(136, data, fua=True).good
    assert guest.read(8, 65536) == data and guest.read(136, 65536) == data
    assert guest.ask(storvsc.SYNCHRONIZE).good
    assert (disks / "disk.img").read_bytes()[4096 : 4096 + 65536] == data
    status = guest.kit.provider.status()["luns"][0]
    assert (status["bytes_written"], status["bytes_read"], status["flushes"]) == (131072, 131072, 1)


@pytest.mark.parametrize(
    ("reads", "writes"),
    [
        ("08 00 00 04 08 00", "0a 00 00 04 08 00"),
        ("28 00 00000004 00 0008 00", "2a 08 00000004 00 0008 00"),
        ("a8 00 00000004 00000008 00 00", "aa 08 00000004 00000008 00 00"),
        ("88 00 0000000000000004 00000008 00 00", "8a 08 0000000000000004 00000008 00 00"),
    ],
)
def test_each_form_of_read_and_write(guest: Guest, reads: str, writes: str) -> None:
    guest.memory.put(pattern(4096))
    assert guest.ask(bytes.fromhex(writes), 4096, direction=Direction.TO_DEVICE) == (GOOD, 0, 4096, None)
    guest.memory.put(bytes(4096))
    assert guest.fetch(bytes.fromhex(reads), 4096) == pattern(4096)
    assert guest.read(4, 4096) == pattern(4096)


def test_a_model_disk_agrees(guest: Guest) -> None:
    choose = random.Random(3)
    model = bytearray(MIB)
    for number in range(300):
        first = choose.randrange(BLOCKS)
        count = min(choose.choice([1, 2, 7, 64, 300]), BLOCKS - first)
        at, length = first * 512, count * 512
        kind = choose.randrange(5)
        if kind == 0:
            same = guest.read(first, length) == bytes(model[at : at + length])
            assert same, number
        elif kind == 1:
            guest.memory.put(bytes(512))
            cdb = storvsc.long_form(Opcode.WRITE_SAME_16, first, count, choose.choice([0, scsi.UNMAP_BIT]))
            assert guest.ask(cdb, 512, direction=Direction.TO_DEVICE).good
            model[at : at + length] = bytes(length)
        elif kind == 2 and length > 4096:
            assert guest.unmap((first, count)).good
            assert guest.write(first, pattern(length, number)).good
            model[at : at + length] = pattern(length, number)
        else:
            assert guest.write(first, pattern(length, number), fua=choose.random() < 0.3).good
            model[at : at + length] = pattern(length, number)
    same = guest.read(0, MIB) == bytes(model)
    assert same


def test_unmap_gives_storage_back(guest: Guest, disks: Path) -> None:
    assert guest.write(0, pattern(MIB)).good and guest.ask(storvsc.SYNCHRONIZE).good
    before = (disks / "disk.img").stat().st_blocks
    assert guest.unmap((0, 1024), (1536, 512), (1100, 0)).good
    found = guest.read(0, MIB)
    assert found[1024 * 512 : 1536 * 512] == pattern(MIB)[1024 * 512 : 1536 * 512]
    if (disks / "disk.img").stat().st_blocks < before:  # where the file system can
        assert not any(found[: 1024 * 512])


def test_memory_of_any_alignment(guest: Guest) -> None:
    data = pattern(4096)
    guest.memory.put(b"\0" * 24 + data)
    at = guest.memory.extents(1)[0][0]
    assert guest.ask(storvsc.write_10(0, 8), 4096, external=[(at + 24, 4096)], direction=Direction.TO_DEVICE).good
    assert guest.read(0, 4096) == data


# ---- errors ----------------------------------------------------------------------------------------------------------


def sense(result: Result) -> scsi.Sense | None:
    assert result.srb == storvsp.SrbStatus.ERROR and result.status == 2
    return result.sense


@pytest.mark.parametrize(
    ("op", "number", "expected"),
    [
        ("read", errno.EIO, scsi.UNRECOVERED_READ_ERROR),
        ("write", errno.EIO, scsi.WRITE_ERROR),
        ("write", errno.ENOSPC, scsi.SPACE_ALLOCATION_FAILED),
        ("write", errno.EDQUOT, scsi.SPACE_ALLOCATION_FAILED),
        ("flush", errno.EIO, scsi.INTERNAL_TARGET_FAILURE),
        ("discard", errno.EIO, scsi.WRITE_ERROR),
    ],
)
def test_each_error_of_the_storage_has_its_sense(op: str, number: int, expected: scsi.Sense) -> None:
    with ProviderTest(faulty(Fault(op, number)), options=ONE) as kit:
        guest = Guest(kit)
        ask: dict[str, Callable[[], Result]] = {
            "read": lambda: guest.ask(storvsc.read_10(0, 1), 512),
            "write": lambda: guest.write(0, pattern(512)),
            "flush": lambda: guest.ask(storvsc.SYNCHRONIZE),
            "discard": lambda: guest.unmap((0, 8), (16, 8)),
        }
        assert sense(ask[op]()) == expected
        again = ask[op]()
        assert again.good or op == "flush", "only a flush that failed stays failed"
        if op == "flush":
            assert sense(again) == expected
            with pytest.raises(EnvironmentProblem, match="stable storage"):
                kit.provider.save()


def test_commands_that_make_no_sense(guest: Guest) -> None:
    last = BLOCKS - 1
    cases: list[tuple[bytes, int, int, scsi.Sense]] = [
        (storvsc.read_10(last, 2), 1024, Direction.FROM_DEVICE, scsi.LBA_OUT_OF_RANGE),
        (storvsc.read_10(0xFFFF_FFFF, 1), 512, Direction.FROM_DEVICE, scsi.LBA_OUT_OF_RANGE),
        (storvsc.read_10(0, 2), 512, Direction.FROM_DEVICE, scsi.INVALID_FIELD_IN_CDB),
        (storvsc.read_10(BLOCKS + 1, 0), 0, Direction.NONE, scsi.LBA_OUT_OF_RANGE),
        (storvsc.long_form(Opcode.READ_16, 0, 0xFFFF_FFFF), 512, Direction.FROM_DEVICE, scsi.INVALID_FIELD_IN_CDB),
        (storvsc.long_form(Opcode.WRITE_16, 1 << 63, 1), 512, Direction.TO_DEVICE, scsi.LBA_OUT_OF_RANGE),
        (storvsc.long_form(Opcode.WRITE_SAME_16, 0, 0, 1), 0, Direction.NONE, scsi.INVALID_FIELD_IN_CDB),
        (storvsc.long_form(Opcode.WRITE_SAME_16, 0, 1), 0, Direction.NONE, scsi.INVALID_FIELD_IN_CDB),
        (storvsc.long_form(Opcode.WRITE_SAME_16, BLOCKS, 1, 1), 0, Direction.NONE, scsi.LBA_OUT_OF_RANGE),
        (b"\x55" + bytes(9), 0, Direction.NONE, scsi.INVALID_OPERATION),
        (b"\x5e" + bytes(9), 0, Direction.NONE, scsi.INVALID_OPERATION),
        (b"\x9e\x12" + bytes(14), 32, Direction.FROM_DEVICE, scsi.INVALID_OPERATION),
        (storvsc.inquiry(255, 0xB9), 255, Direction.FROM_DEVICE, scsi.INVALID_FIELD_IN_CDB),
        (bytes([0x12, 0, 1, 0, 36, 0]), 36, Direction.FROM_DEVICE, scsi.INVALID_FIELD_IN_CDB),
        (bytes([0x1A, 0, 0x05, 0, 64, 0]), 64, Direction.FROM_DEVICE, scsi.INVALID_FIELD_IN_CDB),
        (bytes([0x1A, 0, 0xC8, 0, 64, 0]), 64, Direction.FROM_DEVICE, scsi.SAVING_NOT_SUPPORTED),
    ]
    for cdb, length, direction, expected in cases:
        assert sense(guest.ask(cdb, length, direction=direction)) == expected, cdb.hex()
    assert sense(guest.unmap((BLOCKS, 1))) == scsi.LBA_OUT_OF_RANGE
    assert sense(guest.unmap(*[(0, 1)] * 65)) in (scsi.INVALID_FIELD_IN_PARAMETERS, scsi.PARAMETER_LIST_LENGTH_ERROR)
    assert sense(guest.unmap((0, 0xFFFF_FFFF))) == scsi.INVALID_FIELD_IN_PARAMETERS
    guest.memory.put(b"\1" * 512)
    same = guest.ask(storvsc.long_form(Opcode.WRITE_SAME_16, 0, 8), 512, direction=Direction.TO_DEVICE)
    assert sense(same) == scsi.INVALID_FIELD_IN_CDB


def test_a_failed_inquiry_or_mode_sense_leaves_the_buffer_alone(guest: Guest) -> None:
    """Linux takes it for success, with what is in the buffer."""
    guest.memory.put(b"\xaa" * 255)
    guest.ask(storvsc.inquiry(255, 0xB9), 255)
    guest.ask(bytes([0x1A, 0, 0x05, 0, 64, 0]), 64)
    assert guest.memory.get(255) == b"\xaa" * 255


def test_memory_that_is_missing_too_short_or_out_of_reach(guest: Guest) -> None:
    assert guest.write(0, pattern(4096)).good
    at = guest.memory.extents(1)[0][0]
    for external in ([(at, 512)], [(at + (1 << 40), 4096)], [(at, 4088)]):
        for cdb, direction in (
            (storvsc.read_10(0, 8), Direction.FROM_DEVICE),
            (storvsc.write_10(0, 8), Direction.TO_DEVICE),
        ):
            result = guest.ask(cdb, 4096, external=external, direction=direction)
            assert result.srb == storvsp.SrbStatus.INVALID_REQUEST
    for cdb in (storvsc.read_10(0, 8), storvsc.write_10(0, 8)):
        pending = guest.ports[0].send(storvsc.request(cdb, 4096), None)
        guest.ports[0].wait(pending)
        assert result_of(pending.reply).srb == storvsp.SrbStatus.INVALID_REQUEST
    assert guest.read(0, 4096) == pattern(4096)


def test_a_longer_buffer_than_the_command_needs_is_a_short_answer(guest: Guest) -> None:
    guest.write(0, pattern(512))
    result = guest.ask(storvsc.read_10(0, 1), 4096)
    assert result == (GOOD, 0, 512, None) and guest.memory.get(512) == pattern(512)
    assert guest.ask(storvsc.read_10(0, 0)) == (GOOD, 0, 0, None)


def test_a_write_protected_disk(disks: Path) -> None:
    disks.mkdir()
    (disks / "disk.img").write_bytes(pattern(MIB))
    options = {"luns": [{"image": "disk.img", "read_only": True}]}
    with ProviderTest(ScsiProvider, options=options) as kit:
        guest = Guest(kit)
        (found,) = guest.scan()
        assert (found.read_only, found.thin, found.write_cache, found.fua) == (True, False, False, False)
        assert sense(guest.write(0, bytes(512))) == scsi.WRITE_PROTECTED
        assert guest.read(0, MIB) == pattern(MIB)
        assert guest.ask(storvsc.SYNCHRONIZE).good
        assert kit.provider.files() == {}
        kit.save_and_restore()
        assert guest.read(512, 512) == pattern(MIB)[262144:262656]
    assert (disks / "disk.img").read_bytes() == pattern(MIB)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(st.data())
def test_any_packet_is_answered_with_what_linux_knows(guest: Guest, data: st.DataObject) -> None:
    """The driver asserts it of each answer; and no packet at all makes the channel fail."""
    opcodes = st.sampled_from([*Opcode]) | st.integers(0, 255)
    cdb = bytes([data.draw(opcodes)]) + data.draw(st.binary(min_size=15, max_size=15) | st.just(bytes(15)))
    length = data.draw(st.sampled_from([0, 1, 8, 36, 512, 4096, MIB, 2 * MIB, 0xFFFF_FFFF]))
    room = data.draw(st.sampled_from([0, 1, 512, 4096, MIB]))
    payload = bytearray(storvsc.request(cdb, length, lun=data.draw(st.sampled_from([0, 0, 0, 1, 255]))))
    payload[20] = data.draw(st.sampled_from([16, 16, 16, 10, 6, 0, 5, 17, 255]))
    payload[22] = data.draw(st.integers(0, 3))
    if data.draw(st.booleans()):
        payload[data.draw(st.integers(0, 63))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([64, 64, 64, 64, 72, 56, 8, 0]))
    packet = bytes(payload).ljust(cut, b"\0")[:cut]
    external = guest.memory.extents(room) if room else None
    pending = guest.ports[0].send(packet, external)
    guest.ports[0].wait(pending)
    assert len(pending.reply) == 64
    if storvsp.parse_operation(packet) == Operation.EXECUTE_SRB:
        result = result_of(pending.reply)
        assert result.moved <= max(room, 0)
    assert guest.client.is_open


def test_a_command_that_takes_no_data_moves_none_whatever_memory_comes_with_it(guest: Guest) -> None:
    pending = guest.ports[0].send(storvsc.request(storvsc.SYNCHRONIZE, 8), guest.memory.extents(1))
    guest.ports[0].wait(pending)
    result = result_of(pending.reply)
    assert (result.good, result.moved) == (True, 0)


# ---- logical units that come, go and grow ----------------------------------------------------------------------------


def test_a_logical_unit_is_added_and_the_guest_told(guest: Guest) -> None:
    guest.scan()
    added = guest.kit.command("add-lun", lun=5, image="new.img", size_mib=1, create=True)
    assert added["lun"] == 5
    assert guest.notices() == [Operation.ENUMERATE_BUS]
    assert [one.lun for one in guest.scan()] == [0, 5]
    assert guest.write(0, pattern(512), lun=5).good
    guest.kit.save_and_restore()
    assert guest.read(0, 512, lun=5) == pattern(512), "it is not in the description, but in the state"
    assert sorted(guest.kit.provider.files()) == ["lun-0", "lun-5"]


def test_one_that_is_removed_is_gone_at_once_and_its_image_free(guest: Guest, disks: Path) -> None:
    guest.scan()
    assert guest.write(0, pattern(512)).good
    assert guest.kit.command("remove-lun", lun=0) == {"lun": 0, "image": "disk.img"}
    assert guest.notices() == [Operation.ENUMERATE_BUS]
    assert guest.ask(storvsc.READY).gone and guest.ask(storvsc.SYNCHRONIZE).gone
    assert guest.scan() == []
    with ProviderTest(ScsiProvider, options=ONE) as other:
        assert Guest(other).read(0, 512) == pattern(512)
    guest.kit.save_and_restore()
    assert guest.scan() == []
    guest.kit.command("add-lun", lun=0, image="disk.img")
    assert guest.read(0, 512) == pattern(512)


def test_what_was_asked_for_before_the_removal_is_still_done(guest: Guest, disks: Path) -> None:
    guest.memory.put(pattern(4096))
    with guest.kit._turn():
        pending = [guest.send(storvsc.write_10(8 * n, 8), 4096, direction=Direction.TO_DEVICE) for n in range(20)]
    for _ in range(3):
        guest.kit._one_turn()
    gone = guest.kit.provider.command("remove-lun", {"lun": 0})
    later = guest.send(storvsc.READY)
    guest.kit.run()
    assert not isinstance(gone, dict) and gone.result(0)["lun"] == 0
    results = [result_of(one.reply) for one in pending]
    assert all(one.good or one.gone for one in results) and any(one.good for one in results)
    assert result_of(later.reply).gone
    content = (disks / "disk.img").read_bytes()
    for number, one in enumerate(results):
        assert not one.good or content[4096 * number : 4096 * (number + 1)] == pattern(4096)


def test_a_larger_disk(guest: Guest) -> None:
    (before,) = guest.scan()
    assert guest.kit.command("resize", lun=0, size_mib=3) == {"lun": 0, "size": 3 * MIB}
    assert guest.notices() == [Operation.ENUMERATE_BUS]
    guest.kit.save_and_restore()
    assert sense(guest.ask(storvsc.READY)) == scsi.CAPACITY_HAS_CHANGED
    assert guest.ask(storvsc.READY).good, "it is said once"
    (after,) = guest.scan()
    assert after == before._replace(blocks=3 * BLOCKS)
    assert guest.write(2 * BLOCKS, pattern(512)).good
    for size, said in ((2, "can become larger"), (0, "size_mib")):
        with pytest.raises(UsageError, match=said):
            guest.kit.command("resize", lun=0, size_mib=size)


def test_a_disk_whose_image_became_larger_outside(guest: Guest, disks: Path) -> None:
    os.truncate(disks / "disk.img", 2 * MIB)
    assert guest.kit.command("resize", lun=0)["size"] == 2 * MIB
    assert storvsc.until_good(lambda: guest.ask(storvsc.READY)).good
    os.truncate(disks / "disk.img", MIB // 2)
    with pytest.raises(UsageError, match="is less than"):
        guest.kit.command("resize", lun=0)
    os.truncate(disks / "disk.img", 2 * MIB)


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("add-lun", {"lun": 0, "image": "x.img", "size_mib": 1, "create": True}, "has lun 0 already"),
        ("add-lun", {"lun": 1, "image": "disk.img"}, "same image"),
        ("add-lun", {"lun": 64, "image": "x.img"}, "lun"),
        ("add-lun", {"lun": 1, "image": "../x"}, "image"),
        ("add-lun", {"lun": 1, "image": "x", "more": 1}, "more"),
        ("remove-lun", {"lun": 1}, r"has no lun 1; there are \[0\]"),
        ("remove-lun", {}, "lun"),
        ("resize", {"lun": 9}, "has no lun 9"),
        ("luns", {"x": 1}, "x"),
        ("format", {}, "no command 'format'"),
    ],
)
def test_wrong_commands_are_refused(guest: Guest, command: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        guest.kit.command(command, **arguments)
    assert [one.lun for one in guest.scan()] == [0]
    assert guest.notices() == []


def test_a_logical_unit_whose_image_is_not_there_is_not_added(guest: Guest) -> None:
    with pytest.raises(EnvironmentProblem, match="No such file"):
        guest.kit.command("add-lun", lun=1, image="nothing.img")
    assert [one.lun for one in guest.scan()] == [0] and guest.notices() == []


def test_a_notice_waits_for_room_and_goes_over_a_save(disks: Path) -> None:
    with ProviderTest(ScsiProvider, options=ONE) as kit:
        guest = Guest(kit)
        with guest.client.away():
            for _ in range(300):
                provider_of(guest).adapter.notify()
                kit.run()
            kit.command("add-lun", lun=1, image="a.img", size_mib=1, create=True)
            saved = kit.save_and_restore()
            kit.command("remove-lun", lun=1)
            kit.save_and_restore()
        assert saved.queued == 1, "one that waits is as good as many"
        notices = guest.notices()
        assert set(notices) == {Operation.ENUMERATE_BUS} and 100 < len(notices) < 300


def test_before_it_is_withdrawn_the_guest_lets_go(guest: Guest) -> None:
    provider = provider_of(guest)
    guest.scan()
    calm = provider.depart()
    assert calm is not None
    guest.kit.run()
    assert guest.notices() == [Operation.ENUMERATE_BUS]
    for _ in range(3):
        guest.kit.advance(0.3)
        assert not calm.done(), "the guest is still at it"
        assert guest.ask(storvsc.READY).gone
    guest.kit.advance(1.0)
    assert calm.done()
    guest.kit.command("add-lun", lun=1, image="meanwhile.img", size_mib=1, create=True)
    with pytest.raises(UsageError, match="has lun 0 already"):
        guest.kit.command("add-lun", lun=0, image="x.img", size_mib=1, create=True)
    provider.stay()
    assert set(guest.notices()) == {Operation.ENUMERATE_BUS} and len(guest.scan()) == 2


def test_a_guest_that_never_lets_go_is_not_waited_for_without_bound(guest: Guest) -> None:
    provider = provider_of(guest)
    calm = provider.depart()
    assert calm is not None
    for _ in range(60):
        guest.ask(storvsc.READY)
        guest.kit.advance(0.1)
    assert calm.done()
    provider.stay()


# ---- sabotage --------------------------------------------------------------------------------------------------------


def _another_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """BUSY, which Linux takes for success with nothing done."""
    real = adapter.pack_answer
    monkeypatch.setattr(adapter, "pack_answer", lambda srb, _, *more, **named: real(srb, 0x05, *more, **named))


def _absent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "absent", lambda command: None)


def _absent_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    real = adapter.absent
    there = Data(scsi.standard_inquiry(True))
    monkeypatch.setattr(adapter, "absent", lambda one: there if one.cdb[0] == Opcode.INQUIRY else real(one))


def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    real = adapter.pack_good
    monkeypatch.setattr(adapter, "pack_good", lambda *arguments: real(*arguments)[:48])


@pytest.mark.parametrize("sabotage", [_another_status, _absent_is_an_error, _absent_is_there, _short_answers])
def test_sabotage_of_the_answers_is_noticed(
    monkeypatch: pytest.MonkeyPatch, sabotage: Callable[[pytest.MonkeyPatch], None]
) -> None:
    sabotage(monkeypatch)
    with ProviderTest(ScsiProvider, options=ONE) as kit:
        guest = Guest(kit)
        with pytest.raises(AssertionError):
            guest.scan()
            guest.ask(storvsc.read_10(BLOCKS, 1), 512)


def test_sabotage_a_larger_disk_that_is_not_told_of_is_noticed(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    (before,) = guest.scan()
    monkeypatch.setattr(Unit, "grown", property(lambda self: False, lambda self, _: None), raising=False)
    guest.kit.command("resize", lun=0, size_mib=3)
    assert guest.ask(storvsc.READY).good, "the guest believes what it has asked for before"
    assert guest.look(0) != before


# ---- sub-channels ----------------------------------------------------------------------------------------------------


def test_requests_over_several_channels_reach_one_disk() -> None:
    with ProviderTest(ScsiProvider, options=ONE) as kit:
        guest = Guest(kit, sub_channels=3)
        for index in range(4):
            assert guest.write(index * 8, pattern(4096, index), channel=index).good
        kit.save_and_restore()
        for index in range(4):
            assert guest.read(index * 8, 4096, channel=3 - index) == pattern(4096, index)
        assert kit.provider.status()["sub_channels"] == 3


def test_sub_channels_go_with_the_primary_one_and_come_again() -> None:
    with ProviderTest(ScsiProvider, options=ONE) as kit:
        guest = Guest(kit, sub_channels=2)
        for port in reversed(guest.ports):
            assert isinstance(port, KitPort)
            port.client.close()
            kit.run()
        assert kit.provider.status()["sub_channels"] == 0
        guest.client.open()
        kit.run()
        guest.connect(sub_channels=4)
        kit.run()
        assert kit.provider.status()["sub_channels"] == 4


def test_more_sub_channels_than_were_offered_are_refused() -> None:
    with ProviderTest(ScsiProvider, options=ONE | {"sub_channels": 2}) as kit:
        guest = Guest(kit)
        for count in (0, 3, 0xFFFF):
            status, _ = guest.step(Operation.CREATE_SUB_CHANNELS, count.to_bytes(2, "little"))
            assert status == storvsp.Status.INVALID_PARAMETER
        assert guest.step(Operation.CREATE_SUB_CHANNELS, b"\2\0")[0] == 0
        assert guest.step(Operation.CREATE_SUB_CHANNELS, b"\1\0")[0] == storvsp.Status.INVALID_PARAMETER
        kit.run()
        assert kit.provider.status()["sub_channels"] == 2
    with ProviderTest(ScsiProvider, options=ONE | {"sub_channels": 0}) as kit:
        guest = Guest(kit)
        assert guest.properties == (0, 0, MIB)


# ---- saves -----------------------------------------------------------------------------------------------------------


def story(kit: ProviderTest) -> object:
    """Handshake, scan, overlapping writes on two channels, a flush, a reset, a change of disks."""
    guest = Guest(kit, sub_channels=1)
    found: list[object] = [guest.look(0), guest.look(3)]
    pending = []
    memory = guest.memory
    assert isinstance(memory, KitMemory)
    for number in range(4):
        at = number * 8192
        memory.memory._buffer.view[at : at + 8192] = pattern(8192, number)
        cdb = storvsc.write_10(number * 8, 16, fua=bool(number % 2))
        pending.append(guest.send(cdb, 8192, external=memory.extents(8192, at), direction=Direction.TO_DEVICE))
    kit.run()
    pending.append(guest.send(storvsc.SYNCHRONIZE, channel=1))
    pending.append(guest.send(storvsc.read_10(0, 40), 20480, external=memory.extents(20480, MIB), channel=1))
    pending.append(guest.ports[0].send(storvsp.pack_request(Operation.RESET_BUS), None))
    kit.run()
    found += [one.reply for one in pending]
    found.append(hash(memory.memory.data[MIB : MIB + 20480]))
    return found


def test_scsi_survives_a_save_and_restore_at_every_step() -> None:
    # All runs use the same images, so the story writes whatever it reads.
    assert every_step(story, ScsiProvider, options=TWO) > 20


def test_a_save_keeps_each_disk_by_its_number(disks: Path) -> None:
    with ProviderTest(ScsiProvider, options=TWO) as kit:
        guest = Guest(kit)
        assert guest.write(0, pattern(4096, 1)).good
        assert guest.write(0, pattern(4096, 2), block_size=4096, lun=3).good
        before = guest.scan()
        kit.save_and_restore()
        assert guest.scan() == before
        assert guest.read(0, 4096) == pattern(4096, 1)
        assert guest.read(0, 4096, block_size=4096, lun=3) == pattern(4096, 2)


def test_a_clone_has_disks_of_its_own(disks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ProviderTest(ScsiProvider, options=TWO) as kit:
        guest = Guest(kit)
        assert guest.write(0, pattern(4096, 1)).good
        assert guest.write(0, pattern(4096, 2), block_size=4096, lun=3).good
        kit._quiesce("saved")
        kit._deactivate()
        state = kit.provider.save()
        copies = {name: tmp_path / name for name in kit.provider.files()}
        for name, path in kit.provider.files().items():
            copies[name].write_bytes(path.read_bytes())
        kit._activate()
        for channel in kit.channels:
            channel.unquiesce()
        monkeypatch.setenv("VMBUS_CLONE_DISKS", str(tmp_path / "clone"))
        clone = ProviderTest(ScsiProvider)
        clone._deactivate()
        clone.provider.check(state)
        clone.provider.restore_files(copies)
        clone.provider.restore(state)
        clone._activate()
        with clone:
            other = Guest(clone)
            assert other.read(0, 4096) == pattern(4096, 1)
            assert other.write(0, pattern(4096, 5), block_size=4096, lun=3).good
            assert guest.read(0, 4096, block_size=4096, lun=3) == pattern(4096, 2)
            assert [one.identity for one in other.scan()] == [one.identity for one in guest.scan()]
    assert sorted(path.name for path in (tmp_path / "clone").iterdir()) == ["disk.img", "other.img"]


def fields(**changes: Any) -> bytes:
    unit: dict[str, Any] = {
        "options": {"image": "disk.img"},
        "disk": {"size": MIB, "block_size": 512, "stamp": 0},
        "grown": False,
    }
    unit |= changes.pop("unit", {})
    state = {"version": 1, "phase": "ready", "protocol": 0x0602, "asked": 0, "offered": [], "units": [unit]}
    return msgspec.msgpack.encode(state | changes)


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"\xff",
        fields(version=2),
        fields(phase="somewhere"),
        fields(protocol=0),
        fields(protocol=7),
        fields(phase="start"),
        fields(phase="agreed", asked=1),
        fields(asked=65),
        fields(offered=[0]),
        fields(offered=[1, 1]),
        fields(offered=[65]),
        fields(more=1),
        fields(units=[{}]),
        fields(unit={"grown": 1}),
        fields(unit={"options": {"image": "../x"}}),
        fields(unit={"options": {"image": "x", "block_size": 4096}}),
        fields(unit={"disk": {"size": 1000, "block_size": 512, "stamp": 0}}),
        fields(unit={"disk": {"size": -1, "block_size": 512, "stamp": 0}}),
        fields(units=[msgspec.msgpack.decode(fields())["units"][0]] * 2),
    ],
)
def test_damaged_state_is_refused(state: bytes) -> None:
    with ProviderTest(ScsiProvider, options=ONE) as kit:
        kit.check_refuses(state)


def test_files_that_belong_to_no_disk_are_refused() -> None:
    with ProviderTest(ScsiProvider, options=ONE) as kit:
        kit._deactivate()
        kit.provider.restore_files({"lun-7": Path("/dev/null")})
        kit.check_refuses(b"")
        with pytest.raises(Exception, match="lun-7"):
            kit.provider.check(fields())
        kit.provider.restore_files({})
        kit._activate()


def refused(options: dict[str, Any]) -> str:
    with pytest.raises((UsageError, EnvironmentProblem)) as caught, ProviderTest(ScsiProvider, options=options):
        pass
    return str(caught.value)


def test_wrong_options_are_named(disks: Path) -> None:
    one = {"image": "a", "size_mib": 1, "create": True}
    for options, said in (
        ({"luns": [one, one | {"lun": 1}]}, "same image"),
        ({"luns": [one, one | {"image": "b"}]}, "same lun"),
        ({"luns": [one | {"lun": 64}]}, "lun"),
        ({"luns": [{"image": "a", "create": True}]}, "needs size_mib"),
        ({"luns": [{"image": "a"}]}, "No such file"),
        ({"sub_channels": 65}, "sub_channels"),
        ({"queue_depth": 0}, "queue_depth"),
    ):
        assert said in refused(options)
    # The first disk is free again when the second one cannot be had.
    assert "No such file" in refused({"luns": [one, {"lun": 1, "image": "none"}]})
    with ProviderTest(ScsiProvider, options={"luns": [one]}):
        pass
