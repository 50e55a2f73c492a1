"""Guests of one's own, without anything of ours in them: a kernel with an initramfs, and a disk that firmware boots."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support import pace
from support.own_guest import boot_disk, counts, initramfs, ticks
from vmbus.errors import StateError, UsageError
from vmbus.operations import own_disks
from vmbus.operations.machine import VirtualMachine
from vmbus.operations.migration.address import parse_address
from vmbus.operations.migration.listener import listen
from vmbus.provision import provision
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.own_guest import OwnDisk, OwnGuest, OwnNic

Run = Callable[[Coroutine[Any, Any, Any]], Any]
SECRET = bytes(range(32))


def own(description: VmDescription, **said: Any) -> VmDescription:
    return msgspec.structs.replace(description, memory_mib=128, own=OwnGuest(**said))


async def said(vm: VirtualMachine, enough: Callable[[str], bool], what: str) -> str:
    """The console of a VM, when it has said enough. A count that differs from the disk's ends it."""

    def found() -> str:
        text = vm.paths.console_log.read_text(errors="replace")
        assert "!" not in text, text[-400:]
        return text

    async with asyncio.timeout(pace.seconds(60)):
        while not enough(found()):
            assert vm.qemu is not None and vm.qemu.running, what
            await asyncio.sleep(0.05)
    return found()


async def counted(vm: VirtualMachine, least: int, of: Callable[[str], list[int]] = counts) -> int:
    """Where a guest's count is, once it has said `least` new ones in their order."""
    text = await said(vm, lambda text: len(of(text)) >= least, f"{least} counts")
    found = of(text)
    assert found == list(range(found[0], found[0] + len(found))), found
    return found[-1]


def first(vm: VirtualMachine, of: Callable[[str], list[int]] = counts) -> int:
    return of(vm.paths.console_log.read_text(errors="replace"))[0]


def test_own_guest_kernel_and_initramfs(
    run: Run, demo_description: VmDescription, programs: Programs, tmp_path: Path
) -> None:
    """Debian's kernel from a file of ours, and an initramfs that loads nothing: booted, looked at by gdb, saved live
    while its boot files are replaced, restored twice."""
    assert programs.kernel is not None
    kernel, initrd = tmp_path / "bzImage,new", initramfs(tmp_path / "initrd")
    kernel.write_bytes(programs.kernel.read_bytes())
    description = own(
        demo_description,
        kernel=str(kernel),
        initrd=str(initrd),
        append="console=ttyS0 quiet no_timer_check vmbus.own=1",
        cpu="max",
        nics=[OwnNic()],
        qemu_args=["-device", "virtio-rng-pci"],
        gdb="socket",
    )

    async def body() -> None:
        vm = await VirtualMachine.launch(description, programs)  # as booted: there is no agent in it
        async with vm:
            text = await said(vm, lambda text: "own guest: device" in text, "the guest's own words")
            assert "vmbus.own=1" in text and "device 0x5642" in text
            assert await stops_at(vm.paths.gdb) and await vm.monitor.running()
            kernel.write_bytes(b"the next one")
            initrd.unlink()
            await counted(vm, 5, ticks)
            report = await vm.save(tmp_path / "live", live=True)
            assert any("arguments for QEMU" in notice for notice in report.notices)
            assert any("-cpu max" in notice for notice in report.notices)
            before = await counted(vm, 5, ticks)
        with pytest.raises(StateError, match="-device virtio-rng-pci; --trust"):
            await VirtualMachine.restore(tmp_path / "live", programs)
        async with await VirtualMachine.restore(tmp_path / "live", programs, trust=True) as vm:
            assert not vm.paths.gdb.exists(), "it was of that run alone"
            await counted(vm, 5, ticks)
            assert abs(first(vm, ticks) - before) <= 1
            await vm.save(tmp_path / "again")
        async with await VirtualMachine.restore(tmp_path / "again", programs, trust=True) as vm:
            await counted(vm, 3, ticks)

    run(body())


async def stops_at(path: Path) -> bool:
    """What gdb does first: it asks why the machine stopped, and lets it go."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        writer.write(b"$?#3f")
        async with asyncio.timeout(pace.seconds(20)):
            answer = await reader.readuntil(b"#")
            writer.write(b"+$D#44")  # detach
            await reader.readuntil(b"OK#9a")
        return b"$T05" in answer
    finally:
        writer.close()


def test_own_guest_disk_is_booted_and_goes_along(
    run: Run, demo_description: VmDescription, programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A raw disk that firmware boots, whose guest compares what is on it with its memory at each step: saved live and
    stopped, kept running, restored to earlier moments, cloned, migrated; a disk that was changed is refused."""
    disk = boot_disk(tmp_path / "disk,1.img")
    description = own(demo_description, disks=[OwnDisk(str(disk))])

    async def body() -> None:
        async with await VirtualMachine.launch(description, programs) as vm:  # as booted: there is no agent in it
            await counted(vm, 10)
            kept = await vm.save(tmp_path / "kept", live=True, keep=True)
            at_kept = counts(vm.paths.console_log.read_text(errors="replace"))[-1]
            assert kept.downtime is not None
            await counted(vm, len(counts(vm.paths.console_log.read_text(errors="replace"))) + 10)  # it goes on
            with pytest.raises(UsageError, match="raw, and cannot go back"):
                await vm.checkpoint("here")
            await vm.save(tmp_path / "last")
            last = counts(vm.paths.console_log.read_text(errors="replace"))[-1]
        # The disk is as it was left: it is gone on with, and nothing is copied.
        inode = disk.stat().st_ino
        async with await VirtualMachine.restore(tmp_path / "last", programs) as vm:
            assert disk.stat().st_ino == inode
            await counted(vm, 10)
            assert first(vm) - last in (0, 1)
        # Without the look at the disk, which went on since, the guest finds out.
        with monkeypatch.context() as patch:
            patch.setattr(own_disks, "changed", lambda record: "")
            async with await VirtualMachine.restore(tmp_path / "last", programs) as vm:
                with pytest.raises(AssertionError, match="!"):
                    await counted(vm, 10_000)
        # It is taken back to each of them.
        for name, count in (("kept", at_kept), ("last", last)):
            async with await VirtualMachine.restore(tmp_path / name, programs) as vm:
                await counted(vm, 5)
                assert abs(first(vm) - count) <= 3, (name, first(vm), count)
        assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]  # noqa: PTH208 - names only
        # Somewhere else, and several at a time; the disk here may be anything.
        disk.write_bytes(b"another disk")
        content = disk.read_bytes()
        async with await VirtualMachine.restore(tmp_path / "last", programs, disks=tmp_path / "disks") as vm:
            await counted(vm, 5)
            assert (tmp_path / "disks" / disk.name).exists()
            target = f"unix:{tmp_path}/arrival"
            listener = await listen(parse_address(target), SECRET)
            arriving = asyncio.create_task(VirtualMachine.receive(listener, programs))
            await vm.migrate(target, SECRET)
            async with await arriving as arrived:
                await counted(arrived, 5)
        clones = await VirtualMachine.clones(tmp_path / "last", programs, 2)
        async with contextlib.AsyncExitStack() as stack:
            for clone in clones:
                await stack.enter_async_context(clone)
                await counted(clone, 5)
        disk.unlink()
        boot_disk(disk)
        with pytest.raises(StateError, match=r"not the disk that it was taken of; --disks DIR"):
            await VirtualMachine.restore(tmp_path / "last", programs)
        assert disk.read_bytes() != content

    run(body())


def test_own_guest_qcow2_goes_back_and_a_shared_one_is_refused_when_changed(
    run: Run, demo_description: VmDescription, programs: Programs, tmp_path: Path
) -> None:
    """An overlay over a raw image: checkpoints and reverts with the disk; and a snapshot that only refers to it."""
    base = boot_disk(tmp_path / "base.img")
    overlay = tmp_path / "overlay.qcow2"
    tool = provision().qemu.image_argv
    subprocess.run(
        [*tool, "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw", str(overlay)], check=True, cwd=tmp_path
    )
    description = own(demo_description, disks=[OwnDisk(str(overlay), snapshot="shared")])

    async def body() -> None:
        async with await VirtualMachine.launch(description, programs) as vm:  # as booted: there is no agent in it
            await counted(vm, 5)
            await vm.checkpoint("one")
            at_one = counts(vm.paths.console_log.read_text(errors="replace"))[-1]
            more = len(counts(vm.paths.console_log.read_text(errors="replace"))) + 10
            await said(vm, lambda text: len(counts(text)) >= more, "more counts")
            await vm.checkpoint("two")
            for tag in ("one", "two", "one"):
                await vm.revert(tag)
                length = len(counts(vm.paths.console_log.read_text(errors="replace")))
                text = await said(vm, lambda text, length=length: len(counts(text)) >= length + 5, "counts")
                found = counts(text)[length:]
                assert found == list(range(found[0], found[0] + len(found))), found
                assert tag == "two" or abs(found[0] - at_one) <= 3
            await vm.delete_checkpoint("two")
            with pytest.raises(UsageError, match="snapshot=shared"):
                await vm.save(tmp_path / "kept", keep=True)
            report = await vm.save(tmp_path / "shared", live=True)
            assert any(str(overlay) in notice for notice in report.notices)
            assert any(str(base) in notice for notice in report.notices)
            assert not (tmp_path / "shared" / "disk.0").exists()
            last = counts(vm.paths.console_log.read_text(errors="replace"))[-1]
        held = overlay.read_bytes()
        os.utime(base)
        with pytest.raises(StateError, match=r"base\.img was written to since then"):
            await VirtualMachine.restore(tmp_path / "shared", programs)
        snapshot = msgspec.json.decode((tmp_path / "shared" / "manifest.json").read_bytes())
        behind = snapshot["manifest"]["disks"][0]["behind"][0]
        os.utime(base, ns=(behind["stamp"], behind["stamp"]))
        async with await VirtualMachine.restore(tmp_path / "shared", programs) as vm:
            await counted(vm, 5)
            assert first(vm) - last in (0, 1)
            await vm.checkpoint("later")
        assert overlay.read_bytes() != held
        with pytest.raises(StateError, match=r"overlay\.qcow2 (was written to|has \d+ bytes)"):
            await VirtualMachine.restore(tmp_path / "shared", programs)

    run(body())
    listed = subprocess.run([*tool, "snapshot", "-l", str(overlay)], check=True, capture_output=True, text=True).stdout
    assert "vmbus-later@own-" in listed and "vmbus-one@" not in listed, "the first VM's have ended with it"
