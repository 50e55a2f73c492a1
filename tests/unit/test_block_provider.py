"""The block provider on real channels with a scripted guest and real files: requests, errors, images, saves."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.disk import Fault, FaultyBackend
from vmbus.copying import copy_content
from vmbus.errors import EnvironmentProblem, StateError, UsageError
from vmbus.providers.block import BlockProvider
from vmbus.providers.disk.backend import Backend, FileBackend
from vmbus.providers.disk.image import Image, open_image
from vmbus.testkit import ContractViolation, ProviderTest, every_step
from vmbus.testkit.client import Client, Request
from vmbus.wire import block as wire
from vmbus.wire.block import Disk, Feature, Flag, Hello, Op, Status, parse_disk, parse_status

pytestmark = pytest.mark.unit

MIB = 1 << 20
OPTIONS: dict[str, Any] = {"image": "disk.img", "size_mib": 1, "create": True}


@pytest.fixture(autouse=True)
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "disks"
    monkeypatch.setenv("VMBUS_DISKS", str(directory))
    return directory


class Guest:
    """The guest's end of a disk."""

    def __init__(self, kit: ProviderTest, hello: bool = True) -> None:
        self.kit = kit
        self.client: Client = kit.open()
        self.memory = self.client.memory(bytes(2 * MIB))
        self.disk: Disk | None = None
        if hello:
            self.disk = parse_disk(self.client.request(Hello().pack()))

    def send(self, op: int, offset: int = 0, length: int = 0, flags: int = 0, at: int = 0) -> Request:
        external = self.memory.part(at, length) if op in (Op.READ, Op.WRITE) else None
        return self.client.send(wire.Request(op, flags, offset, length).pack(), external=external)

    def ask(self, op: int, offset: int = 0, length: int = 0, flags: int = 0) -> int:
        request = self.send(op, offset, length, flags)
        self.kit.run()
        return parse_status(request.reply)

    def write(self, offset: int, data: bytes, flags: int = 0) -> int:
        self.memory.data = data
        return self.ask(Op.WRITE, offset, len(data), flags)

    def read(self, offset: int, length: int) -> bytes:
        self.memory.data = b"\xee" * length
        assert self.ask(Op.READ, offset, length) == Status.OK
        return self.memory.data[:length]


@pytest.fixture
def guest() -> Iterator[Guest]:
    with ProviderTest(BlockProvider, options=OPTIONS) as kit:
        yield Guest(kit)


def faulty(*faults: Fault) -> type[BlockProvider]:
    class Faulty(BlockProvider):
        def make_backend(self, image: Image) -> Backend:
            return FaultyBackend(image.backend, list(faults))

    return Faulty


def pattern(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


# ---- requests --------------------------------------------------------------------------------------------------------


def test_hello_tells_what_the_disk_is(guest: Guest) -> None:
    disk = guest.disk
    assert disk is not None
    assert (disk.version, disk.size, disk.block_size) == (1, MIB, 512)
    assert disk.features == Feature.FUA | Feature.DISCARD | Feature.WRITE_ZEROES
    assert disk.identity == guest.kit.provider.instance.bytes


def test_requests_before_hello_are_refused() -> None:
    with ProviderTest(BlockProvider, options=OPTIONS) as kit:
        guest = Guest(kit, hello=False)
        assert guest.ask(Op.READ, 0, 512) == Status.NO_HELLO
        assert parse_status(guest.client.request(Hello(version=0).pack())) == Status.UNSUPPORTED
        assert parse_status(guest.client.request(b"\1\0\0\0")) == Status.INVALID
        assert parse_status(guest.client.request(b"\2\0\0\0\0\0\0\0")) == Status.INVALID
        assert parse_disk(guest.client.request(Hello(version=9, features=0xFFFF_FFFF).pack())) is not None
        assert guest.ask(Op.READ, 0, 512) == Status.OK


def test_a_new_disk_is_zero_and_keeps_what_is_written(guest: Guest, disks: Path) -> None:
    assert guest.read(0, MIB) == bytes(MIB)
    data = pattern(65536)
    assert guest.write(4096, data) == Status.OK
    assert guest.read(4096, 65536) == data
    assert guest.read(0, 8192)[:4096] == bytes(4096)
    assert guest.ask(Op.FLUSH) == Status.OK
    content = (disks / "disk.img").read_bytes()
    assert len(content) == MIB and content[4096 : 4096 + 65536] == data
    assert stat.S_IMODE((disks / "disk.img").stat().st_mode) == 0o600
    assert stat.S_IMODE(disks.stat().st_mode) == 0o700


def test_zeroes_discard_and_durable_writes(guest: Guest) -> None:
    data = pattern(MIB)
    assert guest.write(0, data, Flag.FUA) == Status.OK
    assert guest.ask(Op.WRITE_ZEROES, 4096, 8192) == Status.OK
    assert guest.ask(Op.WRITE_ZEROES, 65536, 4096, Flag.MAY_UNMAP | Flag.FUA) == Status.OK
    assert guest.ask(Op.DISCARD, 512 * 1024, 65536) == Status.OK
    expected = bytearray(data)
    expected[4096 : 4096 + 8192] = bytes(8192)
    expected[65536 : 65536 + 4096] = bytes(4096)
    found = guest.read(0, MIB)
    # What is discarded is nobody's: the old bytes, or zeroes.
    same = found[: 512 * 1024] == bytes(expected[: 512 * 1024])
    same = same and found[512 * 1024 + 65536 :] == bytes(expected[512 * 1024 + 65536 :])
    assert same


def test_a_model_disk_agrees(guest: Guest) -> None:
    choose = random.Random(3)
    model = bytearray(MIB)
    for number in range(300):
        offset = 512 * choose.randrange(MIB // 512)
        length = min(512 * choose.choice([1, 2, 7, 64, 300]), MIB - offset)
        kind = choose.randrange(4)
        if kind == 0:
            same = guest.read(offset, length) == bytes(model[offset : offset + length])
            assert same, number
        elif kind == 1:
            assert guest.ask(Op.WRITE_ZEROES, offset, length, choose.choice([0, Flag.MAY_UNMAP])) == Status.OK
            model[offset : offset + length] = bytes(length)
        else:
            data = pattern(length, number)
            assert guest.write(offset, data, choose.choice([0, 0, Flag.FUA])) == Status.OK
            model[offset : offset + length] = data
    same = guest.read(0, MIB) == bytes(model)
    assert same


def test_external_data_of_another_length_or_out_of_reach_is_refused(guest: Guest) -> None:
    client, memory = guest.client, guest.memory
    before = guest.read(0, MIB)
    for length, external in (
        (1024, memory.part(0, 512)),
        (512, memory.part(0, 1024)),
        (512, None),
        (512, [(memory.address + (1 << 40), 512)]),
    ):
        for op in (Op.READ, Op.WRITE):
            request = client.send(wire.Request(op, 0, 0, length).pack(), external=external)
            guest.kit.run()
            assert parse_status(request.reply) == Status.BAD_MEMORY, (op, length, external)
    assert guest.read(0, MIB) == before


def test_a_write_takes_data_that_the_guest_shows_read_only_places_of_too(guest: Guest) -> None:
    data = pattern(3000 // 8 * 8)
    guest.memory.data = data
    pieces = [(guest.memory.address + start, 512) for start in (0, 1024, 2048)]
    request = guest.client.send(wire.Request(Op.WRITE, 0, 0, 1536).pack(), external=pieces)
    guest.kit.run()
    assert parse_status(request.reply) == Status.OK
    assert guest.read(0, 1536) == data[:512] + data[1024:1536] + data[2048:2560]


def test_a_new_open_needs_a_new_hello(guest: Guest) -> None:
    guest.client.close()
    guest.kit.run()
    guest.client.open()
    guest.kit.run()
    assert guest.ask(Op.READ, 0, 512) == Status.NO_HELLO


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "status"),
    [(errno.EIO, Status.IO_ERROR), (errno.ENOSPC, Status.NO_SPACE), (errno.EDQUOT, Status.NO_SPACE)],
)
def test_errors_of_the_storage_are_passed_on(number: int, status: int) -> None:
    with ProviderTest(faulty(Fault("write", number), Fault("read", number)), options=OPTIONS) as kit:
        guest = Guest(kit)
        assert guest.write(0, pattern(512)) == status
        assert guest.ask(Op.READ, 0, 512) == status
        assert guest.write(0, pattern(512)) == Status.OK
        assert guest.read(0, 512) == pattern(512)
        assert kit.provider.status()["errors"] == 2
        kit.save_and_restore()
        assert guest.read(0, 512) == pattern(512)


def test_a_disk_whose_flush_failed_is_not_saved() -> None:
    with ProviderTest(faulty(Fault("flush")), options=OPTIONS) as kit:
        guest = Guest(kit)
        assert guest.write(0, pattern(512)) == Status.OK
        assert guest.ask(Op.FLUSH) == Status.IO_ERROR
        assert guest.ask(Op.FLUSH) == Status.IO_ERROR
        with pytest.raises(EnvironmentProblem, match=r"stable storage .*EIO"):
            kit.provider.save()


def test_an_image_that_was_cut_gives_errors(guest: Guest, disks: Path) -> None:
    os.truncate(disks / "disk.img", MIB // 2)
    assert guest.ask(Op.READ, MIB // 2 - 512, 1024) == Status.IO_ERROR
    assert guest.ask(Op.READ, 0, 512) == Status.OK


def test_zeroes_are_written_where_the_file_system_cannot_make_them(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmbus.providers.disk.backend._allocate", lambda *_: False)
    data = pattern(MIB)
    assert guest.write(0, data) == Status.OK
    assert guest.ask(Op.WRITE_ZEROES, 512, MIB - 1024, Flag.MAY_UNMAP) == Status.OK
    assert guest.read(0, MIB) == data[:512] + bytes(MIB - 1024) + data[-512:]
    assert guest.ask(Op.DISCARD, 0, 512) == Status.OK
    assert guest.read(0, 512) == data[:512]


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


# ---- images ----------------------------------------------------------------------------------------------------------


def refused(options: dict[str, Any]) -> str:
    with pytest.raises((UsageError, EnvironmentProblem)) as caught, ProviderTest(BlockProvider, options=options):
        pass
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "image"),
        ({"image": "../secret"}, "image"),
        ({"image": "/etc/passwd"}, "image"),
        ({"image": ".hidden.new"}, "image"),
        ({"image": "a", "create": True}, "needs size_mib"),
        ({"image": "a", "create": True, "size_mib": 1, "read_only": True}, "read_only"),
        ({"image": "a", "size_mib": 0}, "size_mib"),
        ({"image": "a", "block_size": 1024}, "block_size"),
        ({"image": "a", "queue_depth": 0}, "queue_depth"),
        ({"image": "a", "snapshot": "never"}, "snapshot"),
        ({"image": "a"}, "No such file or directory; 'create = true'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], said: str) -> None:
    assert said in refused(options)


def test_images_that_do_not_fit_are_refused(disks: Path) -> None:
    disks.mkdir()
    (disks / "odd").write_bytes(bytes(1000))
    assert "multiple of its block_size" in refused({"image": "odd"})
    (disks / "empty").touch()
    assert "has 0 bytes" in refused({"image": "empty"})
    (disks / "big").write_bytes(bytes(2 * MIB))
    assert "has 2097152 bytes, and the disk 'block' has 1048576" in refused({"image": "big", "size_mib": 1})
    (disks / "folder").mkdir()
    assert "directory" in refused({"image": "folder"})
    os.mkfifo(disks / "pipe")
    assert "neither a file nor a block device" in refused({"image": "pipe"})
    (disks / "loop").symlink_to("loop")
    assert "loop" in refused({"image": "loop"})


def test_an_image_has_one_user(disks: Path) -> None:
    with ProviderTest(BlockProvider, options=OPTIONS) as kit:
        assert "is in use: another virtual machine" in refused(OPTIONS)
        assert "is in use" in refused({"image": "disk.img", "read_only": True})
        assert kit.provider.status()["locked"]
        kit._deactivate()
        assert not kit.provider.status()["locked"]
        with ProviderTest(BlockProvider, options=OPTIONS), pytest.raises(EnvironmentProblem, match="in use"):
            kit._activate()
        kit._activate()
    reader = {"image": "disk.img", "read_only": True}
    with ProviderTest(BlockProvider, options=reader) as kit, ProviderTest(BlockProvider, options=reader) as other:
        assert Guest(kit).read(0, 512) == Guest(other).read(0, 512)
        assert "is in use" in refused(OPTIONS)


def test_other_programs_see_the_lock(disks: Path) -> None:
    # As QEMU's tools do: a shared lock on certain bytes.
    one_byte = struct.pack("@hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 100, 1, 0)

    def lock() -> None:
        with (disks / "disk.img").open("rb") as file:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, one_byte)

    with ProviderTest(BlockProvider, options=OPTIONS), pytest.raises(BlockingIOError):
        lock()
    lock()


def test_what_a_killed_restore_has_left_is_removed(disks: Path) -> None:
    disks.mkdir()
    (disks / ".disk.img.new").write_bytes(b"half a copy")
    (disks / ".other.img.new").write_bytes(b"somebody else's")
    with ProviderTest(BlockProvider, options=OPTIONS):
        assert sorted(path.name for path in disks.iterdir()) == [".other.img.new", "disk.img"]


def test_a_read_only_disk(disks: Path) -> None:
    disks.mkdir()
    data = pattern(MIB)
    (disks / "disk.img").write_bytes(data)
    (disks / "disk.img").chmod(0o400)
    with ProviderTest(BlockProvider, options={"image": "disk.img", "read_only": True}) as kit:
        guest = Guest(kit)
        assert guest.disk is not None and guest.disk.features == Feature.READ_ONLY
        assert guest.write(0, pattern(512)) == Status.READ_ONLY
        assert guest.ask(Op.WRITE_ZEROES, 0, 512) in (Status.READ_ONLY, Status.UNSUPPORTED)
        assert guest.ask(Op.FLUSH) == Status.OK
        assert kit.provider.files() == {}
        kit.save_and_restore()
        assert guest.read(0, MIB) == data


def test_an_image_may_be_a_link_of_the_owners(disks: Path, tmp_path: Path) -> None:
    disks.mkdir()
    elsewhere = tmp_path / "elsewhere.raw"
    elsewhere.write_bytes(bytes(MIB))
    (disks / "disk.img").symlink_to(elsewhere)
    with ProviderTest(BlockProvider, options={"image": "disk.img"}) as kit:
        guest = Guest(kit)
        guest.write(0, b"linked.." * 64)
        kit.save_and_restore()
        assert guest.read(0, 512) == b"linked.." * 64
    assert (disks / "disk.img").is_symlink() and elsewhere.read_bytes()[:8] == b"linked.."
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disks", "elsewhere.raw"]


def test_an_image_that_is_replaced_while_it_is_opened(disks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opened the old file and locked it after a restore has put another in its place has locked nothing."""
    disks.mkdir()
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


# ---- saves -----------------------------------------------------------------------------------------------------------


def script(kit: ProviderTest) -> object:
    guest = Guest(kit)
    result: list[object] = [guest.disk]
    requests = []
    for number in range(4):
        at = number * 8192
        guest.memory._buffer.view[at : at + 8192] = pattern(8192, number)
        requests.append(guest.send(Op.WRITE, number * 4096, 8192, flags=number % 2, at=at))  # each over the one before
    requests.append(guest.send(Op.FLUSH))
    requests.append(guest.send(Op.WRITE_ZEROES, 1024, 512))
    requests.append(guest.send(Op.READ, 0, 20480, at=MIB))
    kit.run()
    result += [parse_status(one.reply) for one in requests]
    result.append(hash(guest.memory.data[MIB : MIB + 20480]))
    return result


def test_block_survives_a_save_and_restore_at_every_step() -> None:
    # All runs use one image, so the script writes whatever it reads.
    assert every_step(script, BlockProvider, options=OPTIONS) > 8


def test_shared_images_are_not_part_of_a_snapshot_and_must_not_have_changed(disks: Path) -> None:
    options = OPTIONS | {"snapshot": "shared"}
    with ProviderTest(BlockProvider, options=options) as kit:
        guest = Guest(kit)
        guest.write(0, pattern(4096))
        assert kit.provider.files() == {}
        kit.save_and_restore()
        assert guest.read(0, 4096) == pattern(4096)
        original = BlockProvider.restore

        def meddled(self: BlockProvider, state: bytes) -> None:
            original(self, state)
            os.pwrite(fd, b"meddled", 0)
            os.utime(fd, ns=(0, 12345))

        fd = os.open(disks / "disk.img", os.O_WRONLY)
        try:
            BlockProvider.restore = meddled  # type: ignore[method-assign]
            with pytest.raises((ContractViolation, EnvironmentProblem), match="was written to after the VM was saved"):
                kit.save_and_restore()
        finally:
            BlockProvider.restore = original  # type: ignore[method-assign]
            os.close(fd)
        kit._host.abandon()
        kit.provider.restore_files({})
        kit.provider.disk._restored = None  # type: ignore[attr-defined]
        kit._activate()


def test_somebody_else_wrote_while_the_device_stood_still(disks: Path) -> None:
    with ProviderTest(BlockProvider, options=OPTIONS) as kit:
        Guest(kit).write(0, pattern(512))
        kit._deactivate()
        before = (disks / "disk.img").stat().st_mtime_ns
        os.utime(disks / "disk.img", ns=(0, before + 1))
        with pytest.raises(EnvironmentProblem, match="somebody else while the device stood still"):
            kit._activate()
        os.utime(disks / "disk.img", ns=(0, before))
        kit._activate()


def test_a_restore_puts_the_copy_into_place_and_leaves_the_copy_alone(disks: Path, tmp_path: Path) -> None:
    with ProviderTest(BlockProvider, options=OPTIONS) as kit:
        guest = Guest(kit)
        guest.write(0, pattern(4096, 1))
        kit._quiesce("saved")
        kit._deactivate()
        state = kit.provider.save()
        copy = tmp_path / "copy"
        copy.write_bytes((disks / "disk.img").read_bytes())
        kit._activate()
        for channel in kit.channels:
            channel.unquiesce()
        guest.write(0, pattern(4096, 2))
    copy.chmod(0o400)
    before = copy.read_bytes()
    for image_there in (True, False):
        if not image_there:
            (disks / "disk.img").unlink()
        restored = ProviderTest(BlockProvider, options=OPTIONS)
        restored._deactivate()
        if not image_there:
            (disks / "disk.img").unlink()  # made by this one, and nobody's
        provider = restored.provider
        assert isinstance(provider, BlockProvider)
        provider.restore_files({"disk": copy})
        provider.restore(state)
        restored._activate()
        with restored as kit:
            guest = Guest(kit)
            assert guest.read(0, 4096) == pattern(4096, 1)
            guest.write(0, pattern(4096, 3))
        same = copy.read_bytes() == before
        assert same
        assert (disks / "disk.img").read_bytes()[:4096] == pattern(4096, 3)
        assert [path.name for path in disks.iterdir()] == ["disk.img"]


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("link", [False, True])
def test_a_restore_replaces_no_image_but_its_own(
    disks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool, link: bool
) -> None:
    """Whoever made the snapshot has chosen the name. What is somebody else's stays, also behind a link."""
    with ProviderTest(BlockProvider, options=OPTIONS) as kit:
        Guest(kit).write(0, pattern(4096, 1))
        kit._quiesce("saved")
        kit._deactivate()
        state = kit.provider.save()
        copy = tmp_path / "copy"
        copy.write_bytes((disks / "disk.img").read_bytes())
    assert msgspec.msgpack.decode(state)["identity"] or pytest.skip("no extended attributes here")
    (disks / "disk.img").unlink()
    foreign = tmp_path / "foreign" if link else disks / "disk.img"
    foreign.write_bytes(b"mine" * (MIB // 4))
    if link:
        (disks / "disk.img").symlink_to(foreign)
    if allowed:
        monkeypatch.setenv("VMBUS_REPLACE_DISKS", "1")
    restored = ProviderTest(BlockProvider, options=OPTIONS | {"image": "other.img"})
    restored._deactivate()
    provider = restored.provider
    assert isinstance(provider, BlockProvider)
    provider.disk.options = msgspec.structs.replace(provider.disk.options, image="disk.img")
    provider.restore(state)
    provider.restore_files({"disk": copy})
    if allowed:
        restored._activate()
        assert foreign.read_bytes()[:4096] == pattern(4096, 1)
    else:
        with pytest.raises(EnvironmentProblem, match="not the disk that the snapshot was taken of"):
            restored._activate()
        assert foreign.read_bytes() == b"mine" * (MIB // 4)
        foreign.unlink()
        foreign.touch()  # an empty file is nobody's
        restored._activate()
    with restored as kit:
        assert Guest(kit).read(0, 4096) == pattern(4096, 1)


def _break(change: Callable[[dict[str, Any]], None]) -> bytes:
    fields: dict[str, Any] = {"version": 1, "features": 0, "size": MIB, "block_size": 512, "stamp": 0}
    change(fields)
    return msgspec.msgpack.encode(fields)


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"\xff",
        _break(lambda one: one.update(version=2)),
        _break(lambda one: one.update(size=-1)),
        _break(lambda one: one.update(size=1000)),
        _break(lambda one: one.update(size="x")),
        _break(lambda one: one.update(block_size=4096)),
        _break(lambda one: one.update(features=1 << 20)),
        _break(lambda one: one.update(features=1 << 40)),
        _break(lambda one: one.update(more=1)),
        _break(lambda one: one.update(identity="x")),
        _break(lambda one: one.pop("stamp")),
    ],
)
def test_damaged_state_is_refused(state: bytes) -> None:
    with ProviderTest(BlockProvider, options=OPTIONS) as kit:
        kit.check_refuses(state)


def test_a_state_of_a_disk_of_another_size_is_refused() -> None:
    with ProviderTest(BlockProvider, options=OPTIONS | {"image": "other"}) as kit:
        kit._deactivate()
        provider = kit.provider
        assert isinstance(provider, BlockProvider)
        provider.restore(_break(lambda one: one.update(size=2 * MIB)))
        with pytest.raises(EnvironmentProblem, match="has 1048576 bytes, and the disk 'block' has 2097152"):
            provider.activate()
        with pytest.raises(StateError, match="one file"):
            provider.restore_files({"other": Path("/dev/null")})
        provider.disk._restored = None
        kit._activate()


# ---- an image that is renamed or replaced under a running disk -------------------------------------------------------


@pytest.mark.parametrize("other", [b"", b"X" * MIB], ids=["removed", "replaced"])
def test_the_disk_stays_the_file_that_was_opened(disks: Path, other: bytes) -> None:
    """Over a pause, and in a snapshot; whatever has its name meanwhile is not touched by either."""
    with ProviderTest(BlockProvider, options=OPTIONS) as kit:
        guest = Guest(kit)
        guest.write(0, pattern(4096, 1))
        (disks / "disk.img").rename(disks / "moved.img")
        if other:
            (disks / "disk.img").write_bytes(other)
        guest.write(4096, pattern(4096, 2))
        kit._quiesce("saved")
        kit._deactivate()
        (copied,) = kit.provider.files().values()
        found = copied.read_bytes()
        kit._activate()
        for channel in kit.channels:
            channel.unquiesce()
        assert found == (disks / "moved.img").read_bytes() and found[4096:8192] == pattern(4096, 2)
        assert guest.read(0, 8192) == pattern(4096, 1) + pattern(4096, 2)
        assert guest.write(0, pattern(512, 3)) == Status.OK
        if other:
            assert (disks / "disk.img").read_bytes() == other


def test_a_shared_image_that_was_replaced_refuses_the_save(disks: Path) -> None:
    with ProviderTest(BlockProvider, options=OPTIONS | {"snapshot": "shared"}) as kit:
        Guest(kit).write(0, pattern(512))
        (disks / "disk.img").rename(disks / "moved.img")
        with pytest.raises(EnvironmentProblem, match=r"disk\.img is not the file any more that disk 'block' has open"):
            kit.provider.save()
        (disks / "moved.img").rename(disks / "disk.img")
        kit.provider.save()


def test_a_lack_of_space_that_comes_with_the_sync_is_lost_data(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says once that pages were lost: whoever hears it, no later flush says that all is well."""
    assert guest.write(0, pattern(4096)) == Status.OK
    real = os.fdatasync
    told: list[int] = []

    def once(fd: int) -> None:
        if not told:
            told.append(fd)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    monkeypatch.setattr(os, "fdatasync", once)
    assert guest.write(8192, pattern(512), Flag.FUA) == Status.IO_ERROR
    assert guest.ask(Op.FLUSH) == Status.IO_ERROR


def test_an_error_at_a_pause_is_not_forgotten(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert guest.write(0, pattern(4096)) == Status.OK

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="stable storage"):
        patch.setattr(os, "fsync", fail)
        guest.kit._deactivate()
    guest.kit._activate()
    assert guest.ask(Op.FLUSH) == Status.IO_ERROR
    with pytest.raises(EnvironmentProblem, match="stable storage"):
        guest.kit.provider.save()
