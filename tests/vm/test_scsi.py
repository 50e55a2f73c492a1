"""Linux's own hv_storvsc on our controller: a file system with a writer that knows what it wrote, through all that is
done to virtual machines; disks that come, grow and go; and nothing in the guest's log that should not be there."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support import slow_disk
from support.boot import boot
from support.captures import said_in
from support.in_guest import require_no_complaints, shell, until_prints
from support.kit_storage import disks as disks
from support.locks import in_use
from support.writer import ENDLESS, clean, finish, more, until_acknowledged, writing
from vmbus.errors import EnvironmentProblem, VmbusError
from vmbus.observe.audit.checker import check_paths
from vmbus.observe.audit.guest import collect_audit
from vmbus.operations.machine import VirtualMachine
from vmbus.testkit.moving import move
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription, load_description
from vmbus.vm.errors import MigrateFailed
from vmbus.vm.moments import Moment

pytestmark = [pytest.mark.vm, pytest.mark.long]

Note = Callable[[str], None]
SECRET = secrets.token_bytes(32)
CHECKOUT = Path(__file__).resolve().parents[2]
ECHO = {"kind": "echo", "name": "echo", "instance": "6f1b4b0e-5d2c-4a53-9d0a-0f2f1f3c7a01"}
WRITER = {"device": "/dev/sda"}
KNOWN = ("fua", "discard_max_bytes")
COMPLAINTS = (
    r"Invalid pkt|Incorrect transaction ID|Invalid packet|Obsolete Hyper-V|Unaligned partial|tag#\d+.*(status|srb)"
)
REMOVAL = r"cmd 0x35 status: scsi 0x2 srb 0x20"
"""A disk that goes gets a last SYNCHRONIZE CACHE, and is not there any more: Linux says so."""


def described(kind: str = "scsi", cpus: int = 2, **unit: Any) -> VmDescription:
    """The machine of qemu_configs, with its controller alone."""
    plain = msgspec.to_builtins(load_description(CHECKOUT / "qemu_configs" / "linux.toml"))
    plain["cpus"] = cpus
    (controller,) = [one for one in plain["device"]["providers"] if one["kind"] == "scsi"]
    controller["kind"] = kind
    controller["options"]["luns"][0] |= {"image": "disk.img", "size_mib": 64} | unit
    plain["device"]["providers"] = [controller, ECHO]  # something beside it, so that it can be withdrawn
    return msgspec.convert(plain, VmDescription)


async def watched(vm: VirtualMachine) -> None:
    """From here on the guest's kernel tells of tasks that hang for this long, not for two minutes only."""
    await shell(vm, "echo 15 > /proc/sys/kernel/hung_task_timeout_secs")


async def command(vm: VirtualMachine, name: str, **arguments: Any) -> dict[str, Any]:
    return await vm.control.call("provider", name="storage", command=name, arguments=arguments)


async def storage(vm: VirtualMachine) -> dict[str, Any]:
    return dict((await vm.call_server("status"))["providers"]["storage"])


async def test_scsi_survives_saves_restores_a_revert_and_disks_that_come_and_go(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: Note
) -> None:
    # Storage that takes its time, so that requests are in flight at the saves.
    monkeypatch.setenv("VMBUS_PROVIDER_PATH", str(CHECKOUT / "tests"))
    monkeypatch.setenv("VMBUS_PROVIDERS", slow_disk.KIND)

    async def plug(vm: VirtualMachine, image: str) -> None:
        """A second disk comes, is used, grows and goes."""
        await command(vm, "add-lun", lun=1, image=image, size_mib=8, create=True)
        await until_prints(vm, "cat /sys/block/sdb/size 2>/dev/null", str(8 << 11))
        await shell(vm, "dd if=/dev/zero of=/dev/sdb bs=1M count=4 oflag=direct 2>&1")
        await command(vm, "resize", lun=1, size_mib=16)
        await until_prints(vm, "cat /sys/block/sdb/size", str(16 << 11))
        await command(vm, "remove-lun", lun=1)
        await until_prints(vm, "ls /sys/block | grep -c sdb", "0")

    audit, captured = tmp_path / "audit", tmp_path / "disk.pcapng"
    vm, job = await writing(described(slow_disk.KIND), programs, audit=audit, **WRITER)
    await watched(vm)
    held = []
    for generation, live in enumerate((False, True)):
        async with vm:
            assert (await storage(vm))["sub_channels"] == 1
            await more(vm, job, 40)
            report = await vm.save(tmp_path / f"save-{generation}", live=live)
            held.append(report.incoming_held)
        record = captured if generation else None
        vm = await VirtualMachine.restore(tmp_path / f"save-{generation}", programs, audit=audit, capture=record)
    async with vm:
        await more(vm, job, 40)
        await vm.checkpoint("then")
        await more(vm, job, 40)
        await plug(vm, "more.img")
        trimmed = await shell(vm, "fstrim -v /run/disk-writer")
        await vm.revert("then")
        await more(vm, job, 40)
        await plug(vm, "again.img")
        while not sum(held) and len(held) < 15:  # between two requests of the writer every time: try again
            held.append((await vm.save(tmp_path / f"again-{len(held)}", live=True, keep=True)).incoming_held)
        result = await finish(vm, job)
        assert [one["errors"] for one in (await storage(vm))["luns"]] == [0]
        await require_no_complaints(vm, COMPLAINTS, but=REMOVAL)
        # The driver lets go, and begins anew: its sub-channel goes and comes again.
        device = described().device.providers[0].instance
        bind = "cd /sys/bus/vmbus/drivers/hv_storvsc && echo {0} > unbind && echo {0} > bind"
        for _ in range(2):
            await shell(vm, bind.format(device))
            await until_prints(vm, "cat /sys/block/sda/size 2>/dev/null", str(64 << 11))
            await shell(vm, "dd if=/dev/sda of=/dev/null bs=64k count=16 iflag=direct 2>&1")
            await until_prints(vm, f"ls /sys/bus/vmbus/devices/{device}/channels | wc -l", "2")
        await require_no_complaints(vm, COMPLAINTS, but=REMOVAL)
        await collect_audit(vm)
    halves = check_paths([audit])
    assert halves.clean and halves.half_transactions > 500, str(halves)
    assert {one.driver for one in halves.channels} == {"hv_storvsc"} and len(halves.timeline) == 5
    said = set(said_in(captured))
    assert {one.split()[0] for one in said} >= {"WRITE(10)", "SYNCHRONIZE", "READ(10)", "INQUIRY", "REPORT"}, said
    assert not [one for one in said if not one or "does not have" in one]
    note(f"hv_storvsc: {halves.half_transactions} requests completed once each, by the host's half of the records")
    clean(result, 120, KNOWN)
    assert sum(held) > 0
    note(f"hv_storvsc: {result['acknowledged']} writes acknowledged, {held} requests in flight at saves; {trimmed}")


async def test_scsi_survives_a_live_migration_and_a_server_that_is_killed(
    programs: Programs, tmp_path: Path, disks: Path, note: Note
) -> None:
    seen_by: list[tuple[str, bool, bool]] = []

    async def look(vm: VirtualMachine, now: Moment) -> None:
        """Who has the image: the source by its own word, anybody by the kernel's."""
        if now in (Moment.RAM_COPY, Moment.WRITING, Moment.BEFORE_GO, Moment.AFTER_GO):
            seen_by.append((now.name, (await storage(vm))["luns"][0]["locked"], in_use(disks / "disk.img")))

    async def fail(now: Moment) -> None:
        if now is Moment.BEFORE_GO:
            raise EnvironmentProblem("on purpose")

    seen = 0
    vm, job = await writing(described(snapshot="shared"), programs, **WRITER)
    await watched(vm)

    def progress(event: dict[str, Any]) -> None:
        nonlocal seen
        if event.get("job") == job and event.get("event") == "progress":
            seen = max(seen, event["progress"]["acknowledged"])

    async with vm:
        await more(vm, job)
        with pytest.raises(MigrateFailed, match=r"on purpose.*the VM runs on"):
            await move(vm, programs=programs, at=fail)  # when the other one has the lock
        await more(vm, job)
        there, moved = await move(vm, programs=programs, at=partial(look, vm))
        print(f"downtime {moved.downtime * 1000:.0f} ms: {moved.spans}")
    async with there as vm:
        vm.on_agent_event = progress
        await vm.save(tmp_path / "old", live=True, keep=True)
        assert not list((tmp_path / "old").glob("file.*"))
        await more(vm, job, 200)
        await require_no_complaints(vm, COMPLAINTS, but=REMOVAL)
        assert vm.server is not None
        os.kill(vm.server.process.pid, signal.SIGKILL)
        with pytest.raises(VmbusError):
            await vm.wait_ended()
    with pytest.raises(VmbusError, match="was written to after the VM was saved"):
        await VirtualMachine.restore(tmp_path / "old", programs)
    shutil.copyfile(disks / "disk.img", disks / "after.img")
    # 1 CPU: one channel.
    async with await boot(described(image="after.img", create=False, cpus=1), programs) as vm:
        await vm.wait_ready()
        await watched(vm)
        checked = WRITER | {"mode": "check", "slots": ENDLESS["slots"], "acknowledged": seen}
        report = await vm.call_agent("run", driver="disk-writer", parameters=checked, timeout=90.0)
        assert report["state"] == "finished", report
        assert (await storage(vm))["sub_channels"] == 0
        await require_no_complaints(vm, COMPLAINTS, but=REMOVAL)
        result = dict(report["result"])
        await command(vm, "add-lun", lun=2, image="disk.img", read_only=True)
        await until_prints(vm, "cat /sys/block/sdb/ro 2>/dev/null", "1")
        await shell(vm, "dd if=/dev/sdb of=/dev/null bs=1M count=8 iflag=direct 2>&1")
        # Withdrawn under load: I/O errors, and nobody who waits for ever. Offered anew it is there again.
        job = int((await vm.call_agent("start", driver="disk-writer", parameters=ENDLESS | WRITER))["job"])
        await until_acknowledged(vm, job, 50)
        withdrawn = await vm.control.call("rescind", name="storage", seconds=20.0)
        assert withdrawn["released"]
        note(f"hv_storvsc: withdrawn under load, let go of in {withdrawn['seconds']:.1f} s")
        assert (await vm.call_agent("wait", job=job, timeout=60.0))["state"] == "failed"
        await until_prints(vm, "ls /sys/block | grep -c sd", "0")
        await vm.control.call("offer", provider=msgspec.to_builtins(described(image="after.img").device.providers[0]))
        await until_prints(vm, "cat /sys/block/sda/size 2>/dev/null", str(64 << 11))
        await shell(vm, "dd if=/dev/sda of=/dev/null bs=1M count=64 iflag=direct 2>&1")
        assert not [line for line in (await shell(vm, "dmesg")).splitlines() if "blocked for more" in line]
    assert seen > 200
    clean(result, seen, KNOWN)
    # Who has it: the source while it runs, then nobody, and the destination before the decision that it may run.
    assert list(dict.fromkeys(seen_by)) == [
        ("RAM_COPY", True, True),
        ("WRITING", False, False),
        ("BEFORE_GO", False, True),
        ("AFTER_GO", False, True),
    ]


async def test_scsi_survives_alone_on_its_image_with_a_clone_and_from_its_last_snapshot(
    programs: Programs, tmp_path: Path, disks: Path, note: Note
) -> None:
    description, then = described(), tmp_path / "then"

    vm, job = await writing(description, programs, **WRITER)
    async with vm:
        await vm.save(then, live=True, keep=True)
        saved = await until_acknowledged(vm, job, 0)
        # Another VM on the same image is refused.
        with pytest.raises(VmbusError, match="is in use: another virtual machine"):
            await VirtualMachine.launch(description, programs)  # as booted: it is refused
        with pytest.raises(VmbusError, match="is in use: another virtual machine"):
            await VirtualMachine.restore(then, programs)
        async with await VirtualMachine.restore(then, programs, clone=True) as clone:
            await more(clone, job, 40)
            last = await more(vm, job, 40)
            results = [await finish(clone, job)]
            await require_no_complaints(clone, COMPLAINTS, but=REMOVAL)
        assert vm.server is not None
        os.kill(vm.server.process.pid, signal.SIGKILL)
        with pytest.raises(VmbusError):
            await vm.wait_ended()
    async with await VirtualMachine.restore(then, programs) as vm:
        await more(vm, job, 40)
        results.append(await finish(vm, job))
        await require_no_complaints(vm, COMPLAINTS, but=REMOVAL)
    note(f"hv_storvsc: {saved} writes acknowledged at the snapshot, {last} when the server was killed")
    for result in results:
        clean(result, 100, KNOWN)
    assert [path.name for path in disks.iterdir()] == ["disk.img"]  # noqa: ASYNC240 - quick
