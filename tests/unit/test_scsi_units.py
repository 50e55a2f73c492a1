"""The SCSI provider's controller: disks that come, go and grow, its withdrawal, sub-channels, saves, options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support import storvsc
from support.kit_storage import BLOCKS, MIB, ONE, TWO, Guest
from support.kit_storage import disks as disks
from support.kit_storage import guest as guest
from support.storvsc import pattern, result_of
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.providers.scsi import ScsiProvider
from vmbus.testkit import ProviderTest, every_step
from vmbus.wire import scsi, storvsp
from vmbus.wire.storvsp import Direction, Operation

# ---- logical units that come, go and grow ----------------------------------------------------------------------------


def test_a_logical_unit_is_added_and_the_guest_told(guest: Guest) -> None:
    guest.scan()
    added = guest.kit.command("add-lun", lun=5, image="new.img", size_mib=1, create=True)
    assert added["lun"] == 5
    assert guest.notices() == [Operation.ENUMERATE_BUS]
    assert [one.lun for one in guest.scan()] == [0, 5]
    assert guest.write(0, pattern(512), lun=5).good
    guest.kit.save_restore()
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
    guest.kit.save_restore()
    assert guest.scan() == []
    guest.kit.command("add-lun", lun=0, image="disk.img")
    assert guest.read(0, 512) == pattern(512)


def test_what_was_asked_for_before_the_removal_is_still_done(guest: Guest, disks: Path) -> None:
    guest.memory.put(pattern(4096))
    with guest.kit._turn():
        pending = [guest.send(storvsc.write_10(8 * n, 8), 4096, direction=Direction.TO_DEVICE) for n in range(20)]
    for _ in range(3):
        guest.kit.turn()
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
    guest.kit.save_restore()
    assert guest.ask(storvsc.READY).sense == scsi.CAPACITY_HAS_CHANGED
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
                guest.provider.adapter.notify()
                kit.run()
            kit.command("add-lun", lun=1, image="a.img", size_mib=1, create=True)
            saved = kit.save_restore()
            kit.command("remove-lun", lun=1)
            kit.save_restore()
        assert saved.queued == 1, "one that waits is as good as many"
        notices = guest.notices()
        assert set(notices) == {Operation.ENUMERATE_BUS} and 100 < len(notices) < 300


def test_before_it_is_withdrawn_the_guest_lets_go(guest: Guest) -> None:
    provider = guest.provider
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
    provider = guest.provider
    calm = provider.depart()
    assert calm is not None
    for _ in range(60):
        guest.ask(storvsc.READY)
        guest.kit.advance(0.1)
    assert calm.done()
    provider.stay()


# ---- sub-channels ----------------------------------------------------------------------------------------------------


def test_sub_channels_go_with_the_primary_one_and_come_again() -> None:
    with ProviderTest(ScsiProvider, options=ONE) as kit:
        guest = Guest(kit, sub_channels=2)
        for port in reversed(guest.ports):
            port.close()
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
    for number in range(4):
        at = number * 8192
        memory.memory.write(at, pattern(8192, number))
        cdb = storvsc.write_10(number * 8, 16, fua=bool(number % 2))
        pending.append(guest.send(cdb, 8192, external=memory.extents(8192, at), direction=Direction.TO_DEVICE))
    kit.run()
    pending.append(guest.send(storvsc.SYNCHRONIZE, channel=1))
    pending.append(guest.send(storvsc.read_10(0, 40), 20480, external=memory.extents(20480, MIB), channel=1))
    pending.append(guest.ports[0].send(storvsp.pack_request(Operation.RESET_BUS)))
    kit.run()
    found += [one.reply for one in pending]
    found.append(hash(memory.memory.data[MIB : MIB + 20480]))
    return found


def test_scsi_survives_a_save_and_restore_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # All runs use the same images, so the story writes whatever it reads. What a power cut leaves is told elsewhere.
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)
    assert every_step(story, ScsiProvider, options=TWO) > 20


def test_a_clone_has_disks_of_its_own(disks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ProviderTest(ScsiProvider, options=TWO) as kit:
        guest = Guest(kit)
        assert guest.write(0, pattern(4096, 1)).good
        assert guest.write(0, pattern(4096, 2), block_size=4096, lun=3).good
        kit.hosted.quiesce("saved")
        kit.hosted.deactivate()
        state = kit.provider.save()
        copies = {name: tmp_path / name for name in kit.provider.files()}
        for name, path in kit.provider.files().items():
            copies[name].write_bytes(path.read_bytes())
        kit.hosted.activate()
        for channel in kit.channels:
            channel.unquiesce()
        monkeypatch.setenv("VMBUS_CLONE_DISKS", str(tmp_path / "clone"))
        clone = ProviderTest(ScsiProvider)
        clone.hosted.deactivate()
        clone.provider.check(state)
        clone.provider.restore_files(copies)
        clone.provider.restore(state)
        clone.hosted.activate()
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
        kit.hosted.deactivate()
        kit.provider.restore_files({"lun-7": Path("/dev/null")})
        kit.check_refuses(b"")
        with pytest.raises(Exception, match="lun-7"):
            kit.provider.check(fields())
        kit.provider.restore_files({})
        kit.hosted.activate()


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
