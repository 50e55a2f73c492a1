"""Images of disks: finding, making, locking and replacing them, and a disk whose image is moved under it; the storage's
errors that must not be forgotten. On the SCSI provider, with real files."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support import storvsc
from support.kit_storage import MIB, ONE, Guest
from support.storvsc import pattern
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.providers.disk.backend import FileBackend
from vmbus.providers.disk.image import open_image
from vmbus.providers.scsi import ScsiProvider
from vmbus.testkit import ProviderTest
from vmbus.util.copying import copy_content
from vmbus.wire import scsi


@pytest.fixture(autouse=True)
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "disks"
    monkeypatch.setenv("VMBUS_DISKS", str(directory))
    directory.mkdir()
    return directory


def one(**unit: Any) -> ProviderTest:
    """A controller with one disk."""
    return ProviderTest(ScsiProvider, options={"luns": [unit]})


def made(**unit: Any) -> ProviderTest:
    """The same; its image is made if need be."""
    return one(**ONE["luns"][0] | unit)


@pytest.fixture
def guest() -> Iterator[Guest]:
    with made() as kit:
        yield Guest(kit)


def refused(**unit: Any) -> str:
    with pytest.raises((UsageError, EnvironmentProblem)) as caught, one(**unit):
        pass
    return str(caught.value)


def stopped(kit: ProviderTest) -> bytes:
    """The state of a device that has come to rest, and has let go of its images."""
    kit.hosted.quiesce("saved")
    kit.hosted.deactivate()
    return kit.provider.save()


def goes_on(kit: ProviderTest) -> None:
    kit.hosted.activate()
    for channel in kit.channels:
        channel.unquiesce()


# ---- the back-end ----------------------------------------------------------------------------------------------------


def test_short_reads_and_writes_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_read, real_write = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real_read(fd, [views[0][:700]], at))
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: real_write(fd, [views[0][:900]], at))
    (tmp_path / "image").write_bytes(bytes(8192))
    backend = FileBackend(os.open(tmp_path / "image", os.O_RDWR))
    data = pattern(8192)
    backend.write(0, [memoryview(data)[:1000], memoryview(data)[1000:1001], memoryview(data)[1001:]], durable=False)
    found = bytearray(8192)
    backend.read(0, [memoryview(found)[:5000], memoryview(found)[5000:]])
    assert bytes(found) == data
    backend.close()
    with pytest.raises(OSError, match="closed"):
        backend.flush()


def test_more_buffers_than_one_call_takes(tmp_path: Path) -> None:
    backend = FileBackend(os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT))
    data = bytearray(pattern(8 * 2500))
    views = [memoryview(data)[start : start + 8] for start in range(0, len(data), 8)]
    backend.write(0, views, durable=True)
    assert (tmp_path / "image").read_bytes() == bytes(data)
    backend.close()


def test_zeroes_are_written_where_the_file_system_cannot_make_them(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmbus.providers.disk.backend._allocate", lambda *_: False)
    data = pattern(MIB)
    assert guest.write(0, data).good
    flags = scsi.NO_DATA_BIT | scsi.UNMAP_BIT
    assert guest.ask(storvsc.long_form(scsi.Opcode.WRITE_SAME_16, 1, MIB // 512 - 2, flags)).good
    assert guest.read(0, MIB) == data[:512] + bytes(MIB - 1024) + data[-512:]
    assert guest.unmap((0, 1)).good
    assert guest.read(0, 512) == data[:512]


# ---- finding, making, locking ----------------------------------------------------------------------------------------


def test_a_new_image_is_zero_and_its_owners_alone(disks: Path) -> None:
    disks.rmdir()
    with made() as kit:
        assert Guest(kit).read(0, MIB) == bytes(MIB)
    assert stat.S_IMODE((disks / "disk.img").stat().st_mode) == 0o600
    assert stat.S_IMODE(disks.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("unit", "said"),
    [
        ({}, "image"),
        ({"image": "../secret"}, "image"),
        ({"image": "/etc/passwd"}, "image"),
        ({"image": ".hidden.new"}, "image"),
        ({"image": "disk.img\n"}, "image"),
        ({"image": "a", "create": True}, "needs size_mib"),
        ({"image": "a", "create": True, "size_mib": 1, "read_only": True}, "read_only"),
        ({"image": "a", "size_mib": 0}, "size_mib"),
        ({"image": "a", "block_size": 1024}, "block_size"),
        ({"image": "a", "snapshot": "never"}, "snapshot"),
        ({"image": "a"}, "No such file or directory; 'create = true'"),
    ],
)
def test_wrong_options_are_named(unit: dict[str, Any], said: str) -> None:
    assert said in refused(**unit)


def test_images_that_do_not_fit_are_refused(disks: Path) -> None:
    (disks / "odd").write_bytes(bytes(1000))
    assert "multiple of its block_size" in refused(image="odd")
    (disks / "empty").touch()
    assert "has 0 bytes" in refused(image="empty")
    (disks / "big").write_bytes(bytes(2 * MIB))
    assert "has 2097152 bytes, and the disk 'scsi lun 0' has 1048576" in refused(image="big", size_mib=1)
    (disks / "folder").mkdir()
    assert "directory" in refused(image="folder")
    os.mkfifo(disks / "pipe")
    assert "neither a file nor a block device" in refused(image="pipe")
    (disks / "loop").symlink_to("loop")
    assert "loop" in refused(image="loop")


def test_an_image_has_one_user() -> None:
    with made() as kit:
        assert "is in use: another virtual machine" in refused(image="disk.img")
        assert "is in use" in refused(image="disk.img", read_only=True)
        assert kit.provider.status()["luns"][0]["locked"]
        kit.hosted.deactivate()
        assert not kit.provider.status()["luns"][0]["locked"]
        with made(), pytest.raises(EnvironmentProblem, match="in use"):
            kit.hosted.activate()
        kit.hosted.activate()
    with one(image="disk.img", read_only=True) as kit, one(image="disk.img", read_only=True) as other:
        assert Guest(kit).read(0, 512) == Guest(other).read(0, 512)
        assert "is in use" in refused(image="disk.img")


def test_other_programs_see_the_lock(disks: Path) -> None:
    # As QEMU's tools do: a shared lock on certain bytes.
    one_byte = struct.pack("@hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 100, 1, 0)

    def lock() -> None:
        with (disks / "disk.img").open("rb") as file:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, one_byte)

    with made(), pytest.raises(BlockingIOError):
        lock()
    lock()


def test_what_a_killed_restore_has_left_is_removed(disks: Path) -> None:
    (disks / ".disk.img.new").write_bytes(b"half a copy")
    (disks / ".other.img.new").write_bytes(b"somebody else's")
    with made():
        assert sorted(path.name for path in disks.iterdir()) == [".other.img.new", "disk.img"]


def test_an_image_may_be_a_link_of_the_owners(disks: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.raw"
    elsewhere.write_bytes(bytes(MIB))
    (disks / "disk.img").symlink_to(elsewhere)
    with one(image="disk.img") as kit:
        guest = Guest(kit)
        assert guest.write(0, b"linked.." * 64).good
        kit.save_restore()
        assert guest.read(0, 512) == b"linked.." * 64
    assert (disks / "disk.img").is_symlink() and elsewhere.read_bytes()[:8] == b"linked.."
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disks", "elsewhere.raw"]


def test_an_image_that_is_replaced_while_it_is_opened(disks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opened the old file and locked it after a restore has put another in its place has locked nothing."""
    path = disks / "disk.img"
    path.write_bytes(b"old" + bytes(MIB - 3))
    real = fcntl.fcntl
    done: list[int] = []

    def slow(*arguments: Any) -> Any:
        if arguments[1] == fcntl.F_OFD_SETLK and not done:
            done.append(1)
            (disks / "new").write_bytes(b"new" + bytes(MIB - 3))
            (disks / "new").rename(path)
        return real(*arguments)

    monkeypatch.setattr(fcntl, "fcntl", slow)
    image = open_image("disk.img", read_only=False, create=None)
    found = bytearray(3)
    image.backend.read(0, [memoryview(found)])
    image.close()
    assert found == b"new"


@pytest.mark.parametrize("reflink", [True, False])
def test_copies_keep_content_and_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reflink: bool) -> None:
    if not reflink:
        monkeypatch.setattr(fcntl, "ioctl", lambda *_: (_ for _ in ()).throw(OSError(errno.EOPNOTSUPP, "no")))
    with (tmp_path / "a").open("w+b") as source, (tmp_path / "b").open("w+b") as target:
        os.truncate(source.fileno(), 64 * MIB)
        os.pwrite(source.fileno(), b"begin", 0)
        os.pwrite(source.fileno(), b"middle", 20 * MIB)
        copy_content(source.fileno(), target.fileno())
        assert os.fstat(target.fileno()).st_size == 64 * MIB
        assert os.pread(target.fileno(), 5, 0) == b"begin" and os.pread(target.fileno(), 6, 20 * MIB) == b"middle"
        assert os.fstat(target.fileno()).st_blocks * 512 < 8 * MIB


# ---- saves and restores ----------------------------------------------------------------------------------------------


def restored(state: bytes, copy: Path | None) -> ProviderTest:
    """Another device with this state, and with the image that came along; not active yet."""
    kit = ProviderTest(ScsiProvider)
    kit.hosted.deactivate()
    kit.provider.restore_files({} if copy is None else {"lun-0": copy})
    kit.provider.restore(state)
    return kit


@pytest.mark.parametrize("there", [True, False])
def test_a_restore_puts_the_copy_into_place_and_leaves_the_copy_alone(disks: Path, tmp_path: Path, there: bool) -> None:
    with made() as kit:
        guest = Guest(kit)
        assert guest.write(0, pattern(4096, 1)).good
        state = stopped(kit)
        copy = tmp_path / "copy"
        copy.write_bytes((disks / "disk.img").read_bytes())
        goes_on(kit)
        assert guest.write(0, pattern(4096, 2)).good
    copy.chmod(0o400)
    if not there:
        (disks / "disk.img").unlink()
    with restored(state, copy) as kit:
        kit.hosted.activate()
        guest = Guest(kit)
        assert guest.read(0, 4096) == pattern(4096, 1)
        assert guest.write(0, pattern(4096, 3)).good
    assert copy.read_bytes()[:4096] == pattern(4096, 1)
    assert (disks / "disk.img").read_bytes()[:4096] == pattern(4096, 3)
    assert [path.name for path in disks.iterdir()] == ["disk.img"]


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("link", [False, True])
def test_fault_d2_a_restore_replaces_no_image_but_its_own(
    disks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool, link: bool
) -> None:
    """Whoever made the snapshot has chosen the name. What is somebody else's stays, also behind a link."""
    with made() as kit:
        assert Guest(kit).write(0, pattern(4096, 1)).good
        state = stopped(kit)
        copy = tmp_path / "copy"
        copy.write_bytes((disks / "disk.img").read_bytes())
        kit.hosted.activate()
    identity = msgspec.msgpack.decode(state)["units"][0]["disk"]["identity"]
    assert identity or pytest.skip("no extended attributes here")
    (disks / "disk.img").unlink()
    foreign = tmp_path / "foreign" if link else disks / "disk.img"
    foreign.write_bytes(b"mine" * (MIB // 4))
    if link:
        (disks / "disk.img").symlink_to(foreign)
    if allowed:
        monkeypatch.setenv("VMBUS_REPLACE_DISKS", "1")
    with restored(state, copy) as kit:
        if not allowed:
            with pytest.raises(EnvironmentProblem, match="not the disk that the snapshot was taken of"):
                kit.hosted.activate()
            assert foreign.read_bytes() == b"mine" * (MIB // 4)
            foreign.write_bytes(b"")  # an empty file is nobody's
        kit.hosted.activate()
        assert foreign.read_bytes()[:4096] == pattern(4096, 1)
        assert Guest(kit).read(0, 4096) == pattern(4096, 1)


def test_shared_images_are_not_part_of_a_snapshot_and_must_not_have_changed(disks: Path) -> None:
    with made(snapshot="shared") as kit:
        guest = Guest(kit)
        assert guest.write(0, pattern(4096)).good
        assert kit.provider.files() == {}
        kit.save_restore()
        assert guest.read(0, 4096) == pattern(4096)
        state = stopped(kit)
        before = (disks / "disk.img").stat().st_mtime_ns
        with restored(state, None) as other:
            os.utime(disks / "disk.img", ns=(0, before + 1))
            with pytest.raises(EnvironmentProblem, match="was written to after the VM was saved"):
                other.hosted.activate()
            os.utime(disks / "disk.img", ns=(0, before))
            other.hosted.activate()
            other.hosted.deactivate()
        os.utime(disks / "disk.img", ns=(0, before + 1))
        with pytest.raises(EnvironmentProblem, match="somebody else while the device stood still"):
            kit.hosted.activate()
        os.utime(disks / "disk.img", ns=(0, before))
        goes_on(kit)
        assert guest.read(0, 4096) == pattern(4096)


def test_a_state_of_a_disk_of_another_size_is_refused(disks: Path) -> None:
    (disks / "disk.img").write_bytes(bytes(MIB))
    unit = {"options": {"image": "disk.img"}, "disk": {"size": 2 * MIB, "block_size": 512, "stamp": 0}, "grown": False}
    state = {"version": 1, "phase": "ready", "protocol": 0x0602, "asked": 0, "offered": [], "units": [unit]}
    with restored(msgspec.msgpack.encode(state), None) as kit:
        with pytest.raises(EnvironmentProblem, match="has 1048576 bytes, and the disk 'scsi lun 0' has 2097152"):
            kit.hosted.activate()
        os.truncate(disks / "disk.img", 2 * MIB)
        os.utime(disks / "disk.img", ns=(0, 0))
        kit.hosted.activate()


# ---- an image that is cut, renamed or replaced under a running disk --------------------------------------------------


def test_an_image_that_was_cut_gives_errors(guest: Guest, disks: Path) -> None:
    os.truncate(disks / "disk.img", MIB // 2)
    assert guest.ask(storvsc.read_10(MIB // 1024 - 1, 2), 1024).sense == scsi.UNRECOVERED_READ_ERROR
    assert guest.ask(storvsc.read_10(0, 1), 512).good


@pytest.mark.parametrize("other", [b"", b"X" * MIB], ids=["removed", "replaced"])
def test_the_disk_stays_the_file_that_was_opened(guest: Guest, disks: Path, other: bytes) -> None:
    """Over a pause, and in a snapshot; whatever has its name meanwhile is not touched by either."""
    kit = guest.kit
    assert guest.write(0, pattern(4096, 1)).good
    (disks / "disk.img").rename(disks / "moved.img")
    if other:
        (disks / "disk.img").write_bytes(other)
    assert guest.write(8, pattern(4096, 2)).good
    stopped(kit)
    (copied,) = kit.provider.files().values()
    assert copied.read_bytes()[:8192] == pattern(4096, 1) + pattern(4096, 2)
    goes_on(kit)
    assert guest.read(0, 8192) == pattern(4096, 1) + pattern(4096, 2)
    assert guest.write(0, pattern(512, 3)).good
    assert not other or (disks / "disk.img").read_bytes() == other


def test_a_shared_image_that_was_replaced_refuses_the_save(disks: Path) -> None:
    with made(snapshot="shared") as kit:
        assert Guest(kit).write(0, pattern(512)).good
        (disks / "disk.img").rename(disks / "moved.img")
        with pytest.raises(EnvironmentProblem, match=r"disk\.img is not the file any more that disk 'scsi lun 0' has"):
            kit.provider.save()
        (disks / "moved.img").rename(disks / "disk.img")
        kit.provider.save()


# ---- errors that the kernel tells once -------------------------------------------------------------------------------


def fails(number: int) -> Callable[[int], None]:
    """An fdatasync or fsync that fails the first time."""
    real, told = os.fdatasync, []

    def sync(fd: int) -> None:
        if not told:
            told.append(fd)
            raise OSError(number, os.strerror(number))
        real(fd)

    return sync


def test_a_lack_of_space_that_comes_with_the_sync_is_lost_data(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever hears that pages were lost, no later flush says that all is well."""
    assert guest.write(0, pattern(4096)).good
    monkeypatch.setattr(os, "fdatasync", fails(errno.ENOSPC))
    assert guest.write(16, pattern(512), fua=True).sense == scsi.WRITE_ERROR
    assert guest.ask(storvsc.SYNCHRONIZE).sense == scsi.INTERNAL_TARGET_FAILURE


def test_an_error_at_a_pause_is_not_forgotten(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert guest.write(0, pattern(4096)).good
    with monkeypatch.context() as patch, pytest.raises(OSError, match="stable storage"):
        patch.setattr(os, "fsync", fails(errno.EIO))
        guest.kit.hosted.deactivate()
    guest.kit.hosted.activate()
    assert guest.ask(storvsc.SYNCHRONIZE).sense == scsi.INTERNAL_TARGET_FAILURE
    with pytest.raises(EnvironmentProblem, match="stable storage"):
        guest.provider.save()


def test_fault_n18_a_home_that_cannot_be_written_to_is_said_with_the_setting_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setenv("VMBUS_DISKS", str(tmp_path / "home" / "disks"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", read_only)
        with pytest.raises(
            EnvironmentProblem, match=r"disks for the disk image a.img: Read-only .*; VMBUS_DISKS names"
        ):
            open_image("a.img", read_only=False, create=1 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        with pytest.raises(EnvironmentProblem, match=r"cannot open .*a.img: Read-only file system; VMBUS_DISKS names"):
            open_image("a.img", read_only=False, create=1 << 20)
