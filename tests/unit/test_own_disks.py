"""Disks of one's own: what is taken for one, and what becomes of their files at a save and a restore."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from struct import pack
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from support.model_vm import ModelVm
from vmbus.errors import EnvironmentProblem, StateError, UsageError
from vmbus.operations import own_disks
from vmbus.operations.image import image_in
from vmbus.operations.own_guest import require_trust
from vmbus.operations.save import save
from vmbus.snapshot.bundle import open_snapshot
from vmbus.vm.command_line import Programs, qemu_arguments
from vmbus.vm.description import VmDescription, load_description
from vmbus.vm.errors import SaveFailed
from vmbus.vm.own_disks import DiskState, changed, decode_qcow2, layer_of, look, mark
from vmbus.vm.own_guest import OwnDisk, OwnGuest

DEMO = load_description(Path(__file__).parents[2] / "qemu_configs" / "demo.toml")


def qcow2(path: Path, *, behind: str = "", kind: str = "raw", features: int = 0, content: bytes = b"") -> Path:
    """The header of an image of version 3, and something for its content."""
    extension = pack(">II8s", 0xE2792ACA, len(kind), kind.encode()) if kind else b""
    name = behind.encode()
    offset = 104 + len(extension) + 8
    header = pack(">4sIQI", b"QFI\xfb", 3, offset if name else 0, len(name)).ljust(72, b"\0")
    header += pack(">Q", features)
    path.write_bytes(header.ljust(100, b"\0") + pack(">I", 104) + extension + bytes(8) + name + content)
    return path


def vm_with(*disks: OwnDisk) -> VmDescription:
    return msgspec.structs.replace(DEMO, own=OwnGuest(disks=list(disks)))


@pytest.fixture(autouse=True)
def attributes(tmp_path: Path) -> None:
    try:
        os.setxattr(tmp_path, "user.vmbus.test", b"x")
    except OSError:
        pytest.fail("these tests need a file system with extended attributes for temporary files")


def test_own_guest_disk_is_what_its_name_or_the_user_says(tmp_path: Path) -> None:
    disguised = qcow2(tmp_path / "disk.img", behind="/etc/passwd")
    with pytest.raises(UsageError, match=r"has a qcow2 header.*format=qcow2 or format=raw"):
        look(OwnDisk(str(disguised)))
    assert look(OwnDisk(str(disguised), format="raw")).behind == []
    (tmp_path / "plain.qcow2").write_bytes(bytes(512))
    with pytest.raises(UsageError, match="is no qcow2 image: say format=raw"):
        look(OwnDisk(str(tmp_path / "plain.qcow2")))
    with pytest.raises(UsageError, match="keeps its data in another file"):
        look(OwnDisk(str(qcow2(tmp_path / "data.qcow2", features=4))))
    with pytest.raises(UsageError, match="does not say what 'base' behind it is"):
        look(OwnDisk(str(qcow2(tmp_path / "a.qcow2", behind="base", kind=""))))
    with pytest.raises(EnvironmentProblem, match=r"cannot use the disk .*nbd:"):
        look(OwnDisk(str(qcow2(tmp_path / "b.qcow2", behind="nbd:localhost:1"))))


def test_own_guest_disk_that_cannot_be_used_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="absent: No such file"):
        look(OwnDisk(str(tmp_path / "absent")))
    with pytest.raises(EnvironmentProblem, match="neither a file nor a block device"):
        look(OwnDisk(str(tmp_path)))
    path = tmp_path / "disk"
    path.write_bytes(bytes(512))
    with path.open("rb") as file:
        # As QEMU locks: shared, some bytes behind the beginning.
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, own_disks_lock(fcntl.F_RDLCK, 100))
        with pytest.raises(EnvironmentProblem, match="is in use"):
            look(OwnDisk(str(path)))
        assert look(OwnDisk(str(path), read_only=True)) == look(OwnDisk(str(path)), unused=False)
    assert look(OwnDisk(str(path))).top.size == 512


def own_disks_lock(kind: int, start: int) -> bytes:
    return pack("@hhqqi4x", kind, os.SEEK_SET, start, 1, 0)


def test_own_guest_images_behind_an_image_are_found_and_named_to_qemu(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(1024))
    qcow2(tmp_path / "middle.qcow2", behind="base")
    top = qcow2(tmp_path / "top.qcow2", behind=str(tmp_path / "middle.qcow2"), kind="qcow2")
    disk = OwnDisk(str(top))
    mark(look(disk))
    found = look(disk)
    assert [Path(layer.file).name for layer in found.behind] == ["middle.qcow2", "base"] and found.known
    words = qemu_arguments(vm_with(disk), Programs(("qemu",), "11.1.3", "tcg", None, None), tmp_path, disks=[found])
    block = msgspec.json.decode(words[words.index("-blockdev") + 1])
    assert block["backing"]["file"]["filename"] == str(tmp_path / "middle.qcow2")
    assert block["backing"]["backing"]["driver"] == "raw" and block["backing"]["backing"]["read-only"]
    alone = OwnDisk(str(qcow2(tmp_path / "alone.qcow2")))
    words = qemu_arguments(vm_with(alone), Programs(("qemu",), "11.1.3", "tcg", None, None), tmp_path)
    assert msgspec.json.decode(words[words.index("-blockdev") + 1])["backing"] is None, "whatever its header says later"
    (tmp_path / "base").write_bytes(bytes(1025))
    assert "1025 bytes now" in changed(found)
    qcow2(tmp_path / "round.qcow2", behind="round.qcow2", kind="qcow2")
    with pytest.raises(UsageError, match="more than 16 images"):
        look(OwnDisk(str(tmp_path / "round.qcow2")))


def test_own_guest_header_of_an_image_is_read_as_qemu_writes_it() -> None:
    assert not decode_qcow2(b"QFI\xfb" + pack(">I", 2) + bytes(200), "x").backing
    with pytest.raises(StateError, match="x is no qcow2 image"):
        decode_qcow2(bytes(200), "x")
    with pytest.raises(StateError, match="version 4"):
        decode_qcow2(b"QFI\xfb" + pack(">I", 4) + bytes(200), "x")
    with pytest.raises(StateError, match="no name that could be one"):
        decode_qcow2(pack(">4sIQI", b"QFI\xfb", 2, 1 << 60, 9) + bytes(200), "x")


class _Saved:
    """A snapshot with one disk, as far as putting the disk back looks at it."""

    def __init__(self, folder: Path, disk: OwnDisk) -> None:
        self.path = Path(disk.file)
        self.path.write_bytes(b"then" * 128)
        mark(look(disk))
        self.record = look(disk)
        self.directory = folder / "snapshot"
        self.directory.mkdir()
        if disk.contained:
            (self.directory / "disk.0").write_bytes(b"then" * 128)
        self.manifest = SimpleNamespace(vm=vm_with(disk), disks=[self.record])

    async def place(self, room: Path | None = None, **said: Any) -> own_disks.Placed:
        directory: Any = SimpleNamespace(room=lambda name: room)
        options: dict[str, Any] = {"clone": False, "folder": None, "trust": False} | said
        snapshot: Any = self
        return await own_disks.place_disks(snapshot, directory, **options)


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[_Saved]:
    yield _Saved(tmp_path, OwnDisk(str(tmp_path / "disk.img")))
    assert not list(tmp_path.glob(".*")), "nothing is left beside the disk"


async def test_own_guest_disk_that_is_as_it_was_is_not_touched(saved: _Saved) -> None:
    inode = saved.path.stat().st_ino
    placed = await saved.place()
    placed.keep()
    assert saved.path.stat().st_ino == inode and placed.description == saved.manifest.vm


@pytest.mark.parametrize("succeeds", [True, False])
async def test_own_guest_disk_gets_its_content_back_or_keeps_what_it_has(saved: _Saved, succeeds: bool) -> None:
    saved.path.chmod(0o640)
    saved.path.write_bytes(b"later" * 200)
    placed = await saved.place()
    assert saved.path.read_bytes() == b"then" * 128
    assert saved.path.stat().st_mode & 0o777 == 0o640
    assert look(OwnDisk(str(saved.path))).top.identity == saved.record.top.identity
    (placed.keep if succeeds else placed.undo)()
    assert saved.path.read_bytes() == (b"then" * 128 if succeeds else b"later" * 200)


async def test_own_guest_another_disk_is_never_replaced(saved: _Saved, tmp_path: Path) -> None:
    saved.path.unlink()
    with pytest.raises(StateError, match=r"No such file.*--disks DIR"):
        await saved.place()
    saved.path.write_bytes(b"somebody else's")
    with pytest.raises(StateError, match="is not the disk that it was taken of; --disks DIR"):
        await saved.place()
    placed = await saved.place(folder=tmp_path / "elsewhere")
    assert saved.path.read_bytes() == b"somebody else's"
    (disk,) = placed.description.mine.disks
    path = tmp_path / "elsewhere" / "disk.img"
    assert disk.file == str(path) and path.read_bytes() == b"then" * 128
    assert placed.disks[0].top.file == disk.file and placed.disks[0].known
    placed.undo()
    assert not list((tmp_path / "elsewhere").iterdir())


async def test_own_guest_what_a_killed_restore_left_is_not_thrown_away(saved: _Saved, tmp_path: Path) -> None:
    saved.path.write_bytes(b"later" * 200)
    left = tmp_path / ".disk.img.before-restore"
    left.write_bytes(b"before")
    with pytest.raises(EnvironmentProblem, match="a restore that was killed has left it"):
        await saved.place()
    assert left.read_bytes() == b"before" and saved.path.read_bytes() == b"later" * 200
    left.unlink()


async def test_own_guest_clones_have_copies_and_share_no_disk(saved: _Saved, tmp_path: Path) -> None:
    room = tmp_path / "room"
    placed = await saved.place(room, clone=True)
    assert Path(placed.description.mine.disks[0].file).parent == room
    placed.keep()
    shared = _Saved(room, OwnDisk(str(room / "shared.img"), snapshot="shared"))
    with pytest.raises(StateError, match="clones cannot share"):
        await shared.place(room, clone=True)


async def test_own_guest_shared_disk_is_refused_when_it_changed(tmp_path: Path) -> None:
    shared = _Saved(tmp_path, OwnDisk(str(tmp_path / "shared.img"), snapshot="shared"))
    await shared.place()
    shared.path.write_bytes(b"THEN" * 128)
    with pytest.raises(StateError, match="was written to since then; it only refers to that disk"):
        await shared.place()
    shared.path.unlink()
    shared.path.write_bytes(b"then" * 128)
    with pytest.raises(StateError, match="is another file by now"):
        await shared.place()


async def test_own_guest_a_strangers_snapshot_gets_nothing_of_this_machine(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    stranger = _Saved(tmp_path, OwnDisk(str(victim), read_only=True))
    os.removexattr(victim, "user.vmbus.disk")
    stranger.manifest.disks = [look(OwnDisk(str(victim), read_only=True))]
    with pytest.raises(StateError, match="a stranger's could name any file: --trust"):
        await stranger.place()
    await stranger.place(trust=True)
    with pytest.raises(StateError, match=r"-chardev file,path=x.*--trust"):
        vm = msgspec.structs.replace(DEMO, own=OwnGuest(qemu_args=["-chardev", "file,path=x"]))
        require_trust(vm, "the snapshot", trust=False)
    other = DiskState(msgspec.structs.replace(stranger.record.top, file="/etc/passwd"), [])
    stranger.manifest.disks = [other]
    with pytest.raises(StateError, match="its record says that disk 0 is /etc/passwd"):
        await stranger.place(trust=True)


def test_own_guest_a_vm_arrives_with_disks_that_are_here(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(512))
    disk = OwnDisk(str(path))
    mark(look(disk))
    record = look(disk)
    own_disks.check_arrival(vm_with(disk), [record], "there")
    with pytest.raises(StateError, match="not those that it speaks of"):
        own_disks.check_arrival(vm_with(disk), [], "there")
    path.write_bytes(bytes(1024))  # the source writes to it still
    own_disks.check_arrival(vm_with(disk), [record], "there")
    with pytest.raises(StateError, match="other images are behind"):
        forged = DiskState(record.top, [layer_of(Path("/etc/passwd"), "raw")])
        own_disks.check_arrival(vm_with(disk), [forged], "there")
    path.unlink()
    with pytest.raises(StateError, match="both hosts have to reach the same file"):
        own_disks.check_arrival(vm_with(disk), [record], "there")
    path.write_bytes(bytes(512))
    with pytest.raises(StateError, match="is another disk than the one at there"):
        own_disks.check_arrival(vm_with(disk), [record], "there")


def test_own_guest_saves_that_could_not_be_restored_are_refused_at_once(tmp_path: Path) -> None:
    shared = OwnDisk("/x.qcow2", snapshot="shared")
    vm: Any = SimpleNamespace(name="v", description=vm_with(shared), room=lambda name: tmp_path)
    own_disks.check_save(vm, keep=False)
    own_disks.check_checkpoint(vm)
    with pytest.raises(UsageError, match="save without --keep"):
        own_disks.check_save(vm, keep=True)
    vm.description = vm_with(OwnDisk("/x.img"))
    own_disks.check_save(vm, keep=True)
    with pytest.raises(UsageError, match="qemu-img convert"):
        own_disks.check_checkpoint(vm)
    vm.description = vm_with(OwnDisk(str(tmp_path / "disk0.img")))
    with pytest.raises(UsageError, match="ends with this clone"):
        own_disks.check_departure(vm)


class _Model(ModelVm):
    """A VM that writes to its disk whenever it runs."""

    def __init__(self, folder: Path, disk: OwnDisk) -> None:
        booted = {"kernel": None, "initramfs": None}
        super().__init__(vm_with(disk), Programs(("qemu",), "11.1.3", "tcg", **booted), folder)
        self.disk = Path(disk.file)
        self.disk.write_bytes(b"running" * 64)
        mark(look(disk))
        self.disks = [look(disk)]

    def set_running(self, running: bool) -> None:
        super().set_running(running)
        if hasattr(self, "disk"):
            self.disk.write_bytes((b"on" if running else b"stopped") * 64)


@pytest.mark.parametrize("live", [False, True])
async def test_own_guest_disk_is_copied_while_qemu_has_let_go_of_it(tmp_path: Path, live: bool) -> None:
    model = _Model(tmp_path, OwnDisk(str(tmp_path / "disk.img")))
    report = await save(model, tmp_path / "snapshot", live=live, keep=True)
    assert model.vcpus and model.disk.read_bytes() == b"on" * 64
    assert (tmp_path / "snapshot" / "disk.0").read_bytes() == b"stopped" * 64
    done = model.steps.index("blockdev-set-active")
    assert model.steps.index("wait completed") < done < model.steps.index("resume") < model.steps.index("cont")
    snapshot = await open_snapshot(tmp_path / "snapshot")
    (record,) = snapshot.manifest.disks or []
    assert record.known and changed(record), "it went on since"
    assert not report.notices
    (tmp_path / "snapshot" / "disk.0").write_bytes(b"stopper" * 64)
    with pytest.raises(StateError, match=r"disk\.0 was changed after the snapshot was made"):
        await open_snapshot(tmp_path / "snapshot")


@pytest.mark.parametrize("running", [True, False])
async def test_own_guest_save_whose_disk_cannot_be_copied_leaves_the_vm_as_it_was(
    tmp_path: Path, running: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _Model(tmp_path, OwnDisk(str(tmp_path / "disk.img")))
    model.vcpus = running

    def fails(*_: object, **__: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(own_disks, "copy_file", fails)
    with pytest.raises(SaveFailed, match="No space left") as caught:
        await save(model, tmp_path / "snapshot")
    assert caught.value.source_alive and model.vcpus == running and model.device == "running"
    assert model.steps[-1] == ("cont" if running else "blockdev-set-active"), "QEMU has its disks again"
    assert os.listdir(tmp_path) == ["disk.img"]  # noqa: PTH208 - names only


async def test_own_guest_disk_that_somebody_else_writes_to_is_in_no_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _Model(tmp_path, OwnDisk(str(tmp_path / "disk.img")))
    copy = own_disks.copy_file

    def meanwhile(source: Path, target: Path, **more: Any) -> int:
        size = copy(source, target, **more)
        model.disk.write_bytes(b"other")
        return size

    monkeypatch.setattr(own_disks, "copy_file", meanwhile)
    with pytest.raises(SaveFailed, match="changed by somebody else while it was saved"):
        await save(model, tmp_path / "snapshot")
    assert not (tmp_path / "snapshot").exists() and model.vcpus


class _Blocks(ModelVm):
    """QEMU's snapshots in images: of checkpoints, and of a disk that an earlier VM had."""

    def __init__(self, folder: Path) -> None:
        super().__init__(vm_with(OwnDisk("/d.qcow2"), OwnDisk("/ro.qcow2", read_only=True)), None, folder)
        self.inside: dict[str, list[str]] = {"disk0": ["mine", "vmbus-old@own-12345678", "vmbus-kept@87654321"]}
        self.jobs: dict[str, str] = {}

    async def perform(self, command: str, given: dict[str, Any]) -> Any:
        match command:
            case "blockdev-add":
                self.inside.setdefault(given["node-name"], [])
            case "query-named-block-nodes":
                return [{"node-name": node, "image": self._image(names)} for node, names in self.inside.items()]
            case "snapshot-save" | "snapshot-delete":
                for node in given["devices"]:
                    if command == "snapshot-save":
                        self.inside[node].append(given["tag"])
                    elif given["tag"] in self.inside[node]:
                        self.inside[node].remove(given["tag"])
            case "query-jobs":
                return [{"id": name, "status": "concluded"} for name in self.jobs]
            case "job-dismiss":
                self.jobs.pop(given["id"])
                return {}
        if "job-id" in given:
            self.jobs[given["job-id"]] = command
        return {}

    def _image(self, names: list[str]) -> dict[str, Any]:
        times = {"vm-state-size": 1, "date-sec": 2, "date-nsec": 3}
        return {"snapshots": [{"name": name, **times} for name in names]}


async def test_own_guest_checkpoints_are_inside_the_disks_and_end_with_their_vm(tmp_path: Path) -> None:
    blocks = _Blocks(tmp_path)
    image = image_in(blocks, None)
    await image.open()
    assert blocks.inside["disk0"] == ["mine", "vmbus-kept@87654321"], "another directory's, and the user's, stay"
    await image.save("a")
    (name,) = set(blocks.inside["disk0"]) - {"mine", "vmbus-kept@87654321"}
    assert name.startswith("vmbus-a@own-") and name in blocks.inside["checkpoints-0"]
    found = await image.find("a")
    assert found is not None and await image.find_disks("a") == [found]
    await image.delete("a")
    assert blocks.inside["disk0"] == ["mine", "vmbus-kept@87654321"] and await image.find("a") is None
    await image.save("left")
    await image.reclaim()  # nobody has written its record
    assert blocks.inside["disk0"] == ["mine", "vmbus-kept@87654321"]
