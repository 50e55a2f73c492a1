"""The SCSI provider on real channels with a driver as Linux's and real files: handshake, commands, errors."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import storvsc
from support.disk import Fault
from support.kit_storage import BLOCKS, MIB, ONE, Guest, faulty
from support.kit_storage import disks as disks
from support.kit_storage import guest as guest
from support.storvsc import GOOD, Result, pattern, result_of
from vmbus.errors import EnvironmentProblem
from vmbus.providers.scsi import ScsiProvider, adapter
from vmbus.providers.scsi.commands import Data
from vmbus.providers.scsi.handshake import STEPS, Handshake, Phase
from vmbus.providers.scsi.unit import Unit
from vmbus.testkit import ProviderTest
from vmbus.wire import scsi, storvsp
from vmbus.wire.scsi import Opcode
from vmbus.wire.storvsp import Direction, Operation

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


def test_what_is_not_there_is_gone_and_never_a_disk(guest: Guest) -> None:
    for where in ({"lun": 1}, {"target": 1}, {"path": 7}, {"lun": 255}):
        assert guest.fetch(storvsc.inquiry(36), 36, **where)[0] == scsi.ABSENT
        for cdb in (storvsc.READY, storvsc.read_10(0, 1), storvsc.SYNCHRONIZE):
            assert guest.ask(cdb, 512 if cdb[0] == Opcode.READ_10 else 0, **where).gone


# ---- data ------------------------------------------------------------------------------------------------------------


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
        pending = guest.ports[0].send(storvsc.request(cdb, 4096))
        pending.wait()
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
        zeroes = storvsc.long_form(Opcode.WRITE_SAME_16, 0, 1, scsi.NO_DATA_BIT)
        for result in (
            guest.write(0, bytes(512)),
            guest.write(0, bytes(512), fua=True),
            guest.unmap((0, 1)),
            guest.ask(zeroes),
        ):
            assert sense(result) == scsi.WRITE_PROTECTED
        assert guest.read(0, MIB) == pattern(MIB)
        assert guest.ask(storvsc.SYNCHRONIZE).good
        assert kit.provider.files() == {}
        kit.save_restore()
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
    pending = guest.ports[0].send(packet, external=external)
    pending.wait()
    assert len(pending.reply) == 64
    if storvsp.parse_operation(packet) == Operation.EXECUTE_SRB:
        result = result_of(pending.reply)
        assert result.moved <= max(room, 0)
    assert guest.client.is_open


def test_a_command_that_takes_no_data_moves_none_whatever_memory_comes_with_it(guest: Guest) -> None:
    pending = guest.ports[0].send(storvsc.request(storvsc.SYNCHRONIZE, 8), external=guest.memory.extents(1))
    pending.wait()
    result = result_of(pending.reply)
    assert (result.good, result.moved) == (True, 0)


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
