"""Snapshots on disk: whole or absent when written, refused with a reason when anything is off."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import pace
from vmbus.errors import EnvironmentProblem, StateError, UsageError
from vmbus.operations.machine import VirtualMachine
from vmbus.operations.migration.files import record_of
from vmbus.snapshot import bundle
from vmbus.snapshot.bundle import Snapshot, SnapshotWriter, open_snapshot, utc_now
from vmbus.snapshot.manifest import (
    CONTENTS,
    INITRAMFS,
    KERNEL,
    MANIFEST,
    RAM,
    STATE,
    FileRecord,
    Machine,
    Manifest,
    Packets,
    Versions,
    decode_manifest,
    encode_manifest,
    is_content,
)
from vmbus.util.interruptible import Stop, Unwanted, in_thread
from vmbus.vm.command_line import Programs
from vmbus.vm.description import load_description

DEMO = load_description(Path(__file__).parents[2] / "qemu_configs" / "demo.toml")
ECHO = load_description(Path(__file__).parents[2] / "qemu_configs" / "echo.toml")
CONFIG = bytes.fromhex("4256564d") + bytes(252)
PROGRAMS = Programs(("qemu",), "11.1.3", "tcg", Path("k"), Path("i"))


def manifest(files: dict[str, FileRecord]) -> Manifest:
    return Manifest(
        created=utc_now(),
        live=True,
        vm=DEMO,
        machine=Machine(type="pc-q35-11.1", accelerator="tcg", pci_address="00:05.0", pci_config=CONFIG.hex()),
        versions=Versions(project="0", qemu="11.1.3", libvfio_user="test"),
        packets=Packets(queued=1, sent=2),
        incoming_held=3,
        files=files,
    )


async def write(target: Path, sources: Path, state: bytes = b"state") -> None:
    (sources / "kernel").write_bytes(b"kernel")
    (sources / "initramfs").write_bytes(b"initramfs")
    writer = SnapshotWriter.begin(target)
    await writer.add_boot_files(sources / "kernel", sources / "initramfs")
    writer.ram.write_bytes(b"ram" * 1000)
    writer.state(0).write_bytes(state)
    await writer.seal(RAM)
    await writer.seal(STATE)
    await writer.commit(manifest(writer.records))


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    sources = tmp_path / "sources"
    sources.mkdir()
    target = tmp_path / "snapshot"
    asyncio.run(write(target, sources))
    return target


def load(directory: Path, **expectations: object) -> Snapshot:
    return asyncio.run(open_snapshot(directory, **expectations))  # type: ignore[arg-type]


def test_what_is_written_can_be_opened(snapshot: Path) -> None:
    found = load(snapshot, programs=PROGRAMS, expected=DEMO)
    assert found.manifest.packets == Packets(queued=1, sent=2)
    assert found.manifest.vm == DEMO
    assert found.configs == [CONFIG]
    assert found.ram.read_bytes() == b"ram" * 1000
    assert found.kernel.read_bytes() == b"kernel"
    assert sorted(path.name for path in snapshot.iterdir()) == sorted([MANIFEST, *CONTENTS])
    assert stat.S_IMODE(snapshot.stat().st_mode) == 0o700
    assert {path.name for path in snapshot.parent.iterdir()} == {"snapshot", "sources"}  # nothing temporary is left


def test_files_of_providers_are_told_by_their_names() -> None:
    assert all(map(is_content, (RAM, "file.storage.lun-0", "file.a.b.c", "file.9-_.x")))
    assert not any(
        map(is_content, ("file.storage", "file.Storage.x", "file.storage.x\n", "file.storage.lun-0/..", "x"))
    )


def test_an_existing_target_is_refused_and_untouched(tmp_path: Path) -> None:
    target = tmp_path / "there"
    for make in (target.mkdir, target.touch):
        make()
        with pytest.raises(UsageError, match="exists already"):
            SnapshotWriter.begin(target)
        target.rmdir() if target.is_dir() else target.unlink()
    target.symlink_to("nowhere")
    with pytest.raises(UsageError, match="exists already"):
        SnapshotWriter.begin(target)


def test_a_target_that_appears_meanwhile_wins(tmp_path: Path) -> None:
    async def body() -> None:
        original = SnapshotWriter._commit

        def appear(self: SnapshotWriter, data: bytes) -> None:
            target.mkdir()
            original(self, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SnapshotWriter, "_commit", appear)
            await write(target, tmp_path)

    target = tmp_path / "snapshot"
    with pytest.raises(EnvironmentProblem, match="exists already"):
        asyncio.run(body())
    assert list(target.iterdir()) == []


def test_a_missing_parent_is_an_environment_problem(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="cannot make a directory"):
        SnapshotWriter.begin(tmp_path / "a" / "b")


SAVE_AND_DIE = """
import os, sys
from pathlib import Path
from vmbus.snapshot.bundle import SnapshotWriter
writer = SnapshotWriter.begin(Path(sys.argv[1]))
writer.ram.write_bytes(bytes(1 << 20))
(writer.directory / ".device.state.tmp").touch()
os._exit(0)
"""


def test_fault_h12_what_a_killed_save_left_is_reclaimed_by_any_later_one(tmp_path: Path) -> None:
    living = SnapshotWriter.begin(tmp_path / "snapshot")
    for name in ("snapshot", "another"):
        subprocess.run([sys.executable, "-c", SAVE_AND_DIE, str(tmp_path / name)], check=True)
    others = tmp_path / ".mine.partial-01234567"
    others.mkdir()
    (others / "letter").touch()  # of somebody else, by its content
    (tmp_path / ".vmbus-new-0").mkdir()
    (tmp_path / ".vmbus-new-1").mkdir()
    hour_ago = time.time() - 3600
    os.utime(tmp_path / ".vmbus-new-1", (hour_ago, hour_ago))
    # The first living save has not touched the second's: it is locked. At once, not only after a while:
    third = SnapshotWriter.begin(tmp_path / "third")
    assert {path.name for path in tmp_path.iterdir()} == {
        living.directory.name, third.directory.name, others.name, ".vmbus-new-0",
    }  # fmt: skip
    third.abort()
    living.abort()


def test_until_the_commit_there_is_no_snapshot(tmp_path: Path) -> None:
    writer = SnapshotWriter.begin(tmp_path / "snapshot")
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(".snapshot.partial-")
    with pytest.raises(UsageError, match="missing"):
        asyncio.run(writer.commit(manifest({})))
    assert not (tmp_path / "snapshot").exists()


def test_everything_is_flushed_before_the_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_fsync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    asyncio.run(write(tmp_path / "snapshot", tmp_path))
    at = len(events) - 1 - events[::-1].index("rename")  # the first is that of the temporary directory
    assert set(events[:at]) >= {*CONTENTS, MANIFEST}
    assert events[at - 2] == MANIFEST  # the last file; then its directory
    assert events[at + 1 :] == [tmp_path.name]


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", CONTENTS)
def test_a_changed_byte_is_noticed(snapshot: Path, name: str) -> None:
    change(snapshot / name)
    with pytest.raises(StateError, match=rf"{name} was changed"):
        load(snapshot)


@pytest.mark.parametrize("name", CONTENTS)
def test_a_shortened_file_is_noticed(snapshot: Path, name: str) -> None:
    data = (snapshot / name).read_bytes()
    (snapshot / name).unlink()
    (snapshot / name).write_bytes(data[:-1])
    with pytest.raises(StateError, match=rf"{name} has {len(data) - 1} bytes"):
        load(snapshot)


@pytest.mark.parametrize("name", [MANIFEST, *CONTENTS])
def test_a_missing_file_is_named(snapshot: Path, name: str) -> None:
    (snapshot / name).unlink()
    with pytest.raises(StateError, match=name):
        load(snapshot)


def test_an_extra_file_is_named(snapshot: Path) -> None:
    (snapshot / "extra").touch()
    with pytest.raises(StateError, match="contains 'extra'"):
        load(snapshot)


def test_special_files_are_refused(snapshot: Path) -> None:
    (snapshot / RAM).replace(snapshot.parent / "elsewhere")
    (snapshot / RAM).symlink_to(snapshot.parent / "elsewhere")
    with pytest.raises(StateError, match="symbolic link"):
        load(snapshot)
    (snapshot / RAM).unlink()
    os.mkfifo(snapshot / RAM)
    with pytest.raises(StateError, match="not a plain file"):
        load(snapshot)


def test_something_else_than_a_snapshot(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="there is no snapshot"):
        load(tmp_path / "absent")
    with pytest.raises(StateError, match=r"is not a snapshot: it has no manifest\.json"):
        load(tmp_path)
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(StateError, match="not a snapshot's manifest"):
        load(tmp_path)


def rewrite(snapshot: Path, edit: Callable[[Manifest], Manifest]) -> None:
    """Makes a manifest that is right in itself, but says something else."""
    data = (snapshot / MANIFEST).read_bytes()
    (snapshot / MANIFEST).write_bytes(encode_manifest(edit(decode_manifest(data, "x"))))


def test_another_version_is_refused_before_all_else(snapshot: Path) -> None:
    document = json.loads((snapshot / MANIFEST).read_bytes())
    document["manifest"] = {"format": "vmbus-snapshot", "version": 2, "whatever": 1}
    (snapshot / MANIFEST).write_text(json.dumps(document))
    (snapshot / "new-kind-of-file").touch()
    with pytest.raises(StateError, match="snapshot version 2; this program reads version 1"):
        load(snapshot)


def test_a_guest_with_services_of_ours_is_refused_in_a_line() -> None:
    document = json.loads(ENCODED)
    assert document["manifest"]["vm"]["guest"]["services"] == [], "as older snapshots have it"
    document["manifest"]["vm"]["guest"]["services"] = ["block"]
    with pytest.raises(StateError, match=r"^old: .*guest.services = \['block'\]: there are none any more[^\n]*$"):
        decode_manifest(json.dumps(document).encode(), "old")


def test_another_device_is_refused(snapshot: Path) -> None:
    other = bytes.fromhex("8680d310") + bytes(252)
    rewrite(
        snapshot,
        lambda found: msgspec.structs.replace(
            found, machine=msgspec.structs.replace(found.machine, pci_config=other.hex())
        ),
    )
    with pytest.raises(StateError, match="another device: PCI 8086:10d3"):
        load(snapshot)


def test_another_vm_is_refused_by_what_differs(snapshot: Path) -> None:
    with pytest.raises(StateError, match="another VM: its providers"):
        load(snapshot, expected=ECHO)
    with pytest.raises(StateError, match="another VM: its memory 256 should be 512"):
        load(snapshot, expected=msgspec.structs.replace(DEMO, memory_mib=512))


def test_fault_p6_a_snapshot_of_before_kvm_worked_runs_under_tcg_again(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was saved under is in it, and TCG is everywhere."""
    here = msgspec_replace(PROGRAMS, accelerator="kvm")
    load(snapshot, programs=here)
    used: list[str] = []

    class Stopped(Exception):
        pass

    def begin(self: VirtualMachine, description: object, programs: Programs, *_: object, **__: object) -> None:
        used.append(programs.accelerator)
        raise Stopped

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(snapshot.parent))
    monkeypatch.setattr(VirtualMachine, "__init__", begin)
    with pytest.raises(Stopped):
        asyncio.run(VirtualMachine.restore(snapshot, here))
    assert used == ["tcg"]
    rewrite(
        snapshot,
        lambda found: msgspec.structs.replace(found, machine=msgspec.structs.replace(found.machine, accelerator="kvm")),
    )
    load(snapshot, programs=here)
    with pytest.raises(StateError, match=r"saved under kvm and cannot run under tcg.*VMBUS_ACCELERATOR"):
        load(snapshot, programs=PROGRAMS)


def test_fault_m15_the_machine_type_decides(snapshot: Path) -> None:
    with pytest.raises(StateError, match=r"machine pc-q35-11\.1 .*at hand .11\.0\.9"):
        load(snapshot, programs=msgspec_replace(PROGRAMS, qemu_version="11.0.9"))
    load(snapshot, programs=msgspec_replace(PROGRAMS, qemu_version="11.1.9"))  # same machine
    load(snapshot, programs=msgspec_replace(PROGRAMS, qemu_version="12.0.0"))  # has it, too


def msgspec_replace(programs: Programs, **changes: str) -> Programs:
    return Programs(**{**programs.__dict__, **changes})


def test_names_in_the_manifest_lead_nowhere(snapshot: Path) -> None:
    def escape(found: Manifest) -> Manifest:
        files = dict(found.files)
        files["../sources/kernel"] = files.pop(KERNEL)
        return msgspec.structs.replace(found, files=files)

    rewrite_unchecked = encode_manifest(escape(decode_manifest((snapshot / MANIFEST).read_bytes(), "x")))
    (snapshot / MANIFEST).write_bytes(rewrite_unchecked)
    with pytest.raises(StateError, match="a snapshot has"):
        load(snapshot)


def test_fault_m7_fault_h10_a_snapshot_shares_no_file_with_the_cache(tmp_path: Path) -> None:
    asyncio.run(write(tmp_path / "snapshot", tmp_path))
    for name, source in ((KERNEL, "kernel"), (INITRAMFS, "initramfs")):
        assert (tmp_path / "snapshot" / name).stat().st_nlink == 1
        assert not (tmp_path / "snapshot" / name).samefile(tmp_path / source)
        with (tmp_path / "snapshot" / name).open("r+b") as file:  # damage in place
            file.write(b"x")
        assert (tmp_path / source).read_bytes() == source.encode()
    with pytest.raises(StateError, match=f"{KERNEL} was changed"):
        load(tmp_path / "snapshot")


def test_fault_h14_sizes_are_looked_at_before_digests(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snapshot / INITRAMFS).write_bytes(b"short")
    looked: list[str] = []
    monkeypatch.setattr(bundle, "sha256", lambda file, stop: looked.append(file.name))
    with pytest.raises(StateError, match=f"{INITRAMFS} has 5 bytes"):
        load(snapshot)
    assert looked == []


def test_fault_h14_a_digest_of_terabytes_ends_when_nobody_wants_it(tmp_path: Path) -> None:
    """As a signal does it; the process would wait for its thread."""
    huge = tmp_path / RAM
    with huge.open("wb") as file:
        file.truncate(4 << 40)
    record = FileRecord(4 << 40, "0" * 64)

    async def body() -> float:
        work = asyncio.create_task(in_thread(functools.partial(bundle._verify, huge, record)))
        await asyncio.sleep(0.2)
        begun = time.monotonic()
        work.cancel()
        await asyncio.wait({work})
        assert work.cancelled()
        return time.monotonic() - begun

    begun = time.monotonic()
    assert asyncio.run(body()) < pace.seconds(5)
    assert time.monotonic() - begun < pace.seconds(10), "the thread went on"


@pytest.mark.parametrize("what", ["seal", "copy", "record"])
def test_fault_h14_so_does_other_long_work_on_files(tmp_path: Path, what: str) -> None:
    huge = tmp_path / RAM
    with huge.open("wb") as file:
        file.truncate(4 << 40)
        file.write(b"x" * 4096)
    stop = Stop()
    stop.set()
    with pytest.raises(Unwanted):
        if what == "seal":
            bundle._seal(huge, stop)
        elif what == "record":
            record_of(huge, stop)
        else:
            bundle._copy(huge, tmp_path / "copy", stop)


ENCODED = encode_manifest(manifest({name: FileRecord(1, hashlib.sha256(b"x").hexdigest()) for name in CONTENTS}))


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, len(ENCODED) - 1), flip=st.integers(1, 255))
def test_every_changed_byte_of_a_manifest_is_refused(at: int, flip: int) -> None:
    damaged = bytearray(ENCODED)
    damaged[at] ^= flip
    with pytest.raises(StateError):
        decode_manifest(bytes(damaged), "manifest")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_garbage_is_no_manifest(data: bytes) -> None:
    with pytest.raises(StateError):
        decode_manifest(data, "manifest")
    with pytest.raises(StateError):
        decode_manifest(ENCODED + data + b"x", "manifest")
