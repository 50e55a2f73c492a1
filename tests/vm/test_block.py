"""A file system on the block device, with a writer that knows what it wrote: through saves, restores, checkpoints, a
server that is killed, a disk that goes and comes back, and a guest's driver that dies."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support import slow_disk
from support.boot import boot
from support.locks import in_use
from support.writer import ENDLESS, clean, finish, more, until_acknowledged, writing
from vmbus.errors import EnvironmentProblem, VmbusError
from vmbus.migration.address import parse_address
from vmbus.migration.channel import listen
from vmbus.migration.source import MigrateFailed
from vmbus.qemu.command_line import Programs
from vmbus.qemu.description import VmDescription, load_description
from vmbus.qemu.machine import VirtualMachine
from vmbus.qemu.moments import Hook, Moment, no_hook

pytestmark = [pytest.mark.vm, pytest.mark.long]

Run = Callable[[Coroutine[Any, Any, Any]], Any]
SECRET = secrets.token_bytes(32)
CHECKOUT = Path(__file__).resolve().parents[2]
ECHO = {"kind": "echo", "name": "echo", "instance": "6f1b4b0e-5d2c-4a53-9d0a-0f2f1f3c7a01"}


@pytest.fixture(autouse=True)
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "disks"
    monkeypatch.setenv("VMBUS_DISKS", str(directory))
    return directory


@pytest.fixture(scope="module")
def description() -> VmDescription:
    """The disk of qemu_configs, and something beside it: so that the disk can be withdrawn."""
    return described()


def described(**options: Any) -> VmDescription:
    plain = msgspec.to_builtins(load_description(CHECKOUT / "qemu_configs" / "disk.toml"))
    plain["device"]["providers"][0]["options"] |= options
    plain["device"]["providers"].append(ECHO)
    return msgspec.convert(plain, VmDescription)


async def disk(vm: VirtualMachine) -> dict[str, Any]:
    assert vm.control is not None
    return dict((await vm.control.call("status"))["providers"]["disk"])


# ---- saves and restores ----------------------------------------------------------------------------------------------


def test_block_survives_saves_restores_and_checkpoints(
    run: Run, programs: Programs, tmp_path: Path, disks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Storage that takes its time, so that requests are in flight at the saves.
    monkeypatch.setenv("VMBUS_PROVIDER_PATH", str(CHECKOUT / "tests"))
    monkeypatch.setenv("VMBUS_PROVIDERS", slow_disk.KIND)
    plain = msgspec.to_builtins(described())
    plain["device"]["providers"][0]["kind"] = slow_disk.KIND
    description = msgspec.convert(plain, VmDescription)

    async def story() -> tuple[list[dict[str, Any]], list[int]]:
        vm, job = await writing(description, programs)
        first = tmp_path / "save-0"
        held = []
        directory = first
        for generation, live in enumerate((False, True, True)):
            async with vm:
                await more(vm, job)
                directory = tmp_path / f"save-{generation}"
                report = await vm.save(directory, live=live)
                held.append(report.incoming_held)
            vm = await VirtualMachine.restore(directory, programs)
        results = []
        async with vm:
            await more(vm, job)
            checkpoint = await vm.save(tmp_path / "checkpoint", live=True, keep=True)
            print(f"checkpoint: downtime {checkpoint.downtime:.3f} s, phases {checkpoint.phases}")
            held.append(checkpoint.incoming_held)
            while not sum(held) and len(held) < 15:  # between two requests of the writer every time: try again
                held.append((await vm.save(tmp_path / f"again-{len(held)}", live=True, keep=True)).incoming_held)
            await more(vm, job)
            results.append(await finish(vm, job))
            assert (await disk(vm))["errors"] == 0
        # An old snapshot has the disk of its time, however far the image went on; and it has it again and again.
        for directory in (tmp_path / "checkpoint", first):
            vm = await VirtualMachine.restore(directory, programs)
            async with vm:
                await more(vm, job, 50)
                results.append(await finish(vm, job))
        return results, held

    results, held = run(story())
    print(f"requests in flight at the saves, and finished: {held}")
    assert sum(held) > 0
    for result in results:
        clean(result, 150)
    assert results[0]["acknowledged"] > results[-1]["acknowledged"]
    assert [path.name for path in disks.iterdir()] == ["disk.img"]


def test_block_survives_a_server_that_is_killed(
    run: Run, description: VmDescription, programs: Programs, tmp_path: Path, disks: Path
) -> None:
    """Twice: from the last snapshot with its disk, and from the image alone in a fresh machine."""

    async def story() -> tuple[int, int, dict[str, Any], dict[str, Any]]:
        vm, job = await writing(description, programs)
        seen = 0

        def progress(event: dict[str, Any]) -> None:
            nonlocal seen
            if event.get("job") == job and event.get("event") == "progress":
                seen = max(seen, event["progress"]["acknowledged"])

        async with vm:
            await more(vm, job)
            await vm.save(tmp_path / "checkpoint", live=True, keep=True)
            saved = await until_acknowledged(vm, job, 0)
            vm.on_agent_event = progress
            await more(vm, job, 200)
            assert vm.server is not None
            os.kill(vm.server.process.pid, signal.SIGKILL)
            with pytest.raises(VmbusError):
                await vm.wait_ended()
        shutil.copyfile(disks / "disk.img", disks / "after.img")
        vm = await boot(described(image="after.img", create=False), programs)
        async with vm:
            await vm.wait_ready()
            report = await vm.call_agent(
                "run",
                driver="disk-writer",
                parameters={"mode": "check", "slots": ENDLESS["slots"], "acknowledged": seen},
                timeout=90.0,
            )
            after = report["result"]
        vm = await VirtualMachine.restore(tmp_path / "checkpoint", programs)
        async with vm:
            await more(vm, job)
            return saved, seen, after, await finish(vm, job)

    saved, seen, after, restored = run(story())
    print(f"acknowledged: {saved} at the checkpoint, {seen} at the kill, {after['acknowledged']} in the journal then")
    assert seen > saved
    clean(after, seen)
    clean(restored, 200)


def test_block_survives_with_a_shared_image_and_refuses_an_old_one(
    run: Run, programs: Programs, tmp_path: Path, disks: Path
) -> None:
    shared = described(snapshot="shared")

    async def story() -> tuple[dict[str, Any], str]:
        vm, job = await writing(shared, programs)
        async with vm:
            await vm.save(tmp_path / "save", live=True)
        assert not list((tmp_path / "save").glob("file.*"))
        vm = await VirtualMachine.restore(tmp_path / "save", programs)
        async with vm:
            await more(vm, job)
            result = await finish(vm, job)
        with pytest.raises(VmbusError) as caught:
            await VirtualMachine.restore(tmp_path / "save", programs)
        return result, str(caught.value)

    result, refusal = run(story())
    clean(result, 200)
    print(refusal)
    assert "was written to after the VM was saved" in refusal


def test_block_survives_alone_on_its_image(
    run: Run, description: VmDescription, programs: Programs, tmp_path: Path
) -> None:
    """Another VM on the same image is refused, at power-on and at a restore; the first one notices nothing."""

    async def story() -> tuple[list[str], dict[str, Any]]:
        refusals = []
        vm, job = await writing(description, programs)
        async with vm:
            await vm.save(tmp_path / "checkpoint", live=True, keep=True)
            with pytest.raises(VmbusError) as caught:
                await VirtualMachine.launch(description, programs)  # as booted: it is refused
            refusals.append(str(caught.value))
            with pytest.raises(VmbusError) as caught:
                await VirtualMachine.restore(tmp_path / "checkpoint", programs)
            refusals.append(str(caught.value))
            await more(vm, job)
            return refusals, await finish(vm, job)

    refusals, result = run(story())
    for refusal in refusals:
        print(refusal)
        assert "is in use: another virtual machine" in refusal
    clean(result, 200)


def test_block_survives_reverts_and_in_clones(
    run: Run, description: VmDescription, programs: Programs, tmp_path: Path, disks: Path
) -> None:
    """Taken back in place the VM has the disk of that moment, and clones have disks of their own."""

    async def story() -> tuple[list[dict[str, Any]], dict[str, float], dict[str, float]]:
        vm, job = await writing(description, programs)
        async with vm:
            taken = await vm.checkpoint("then")
            noted = await until_acknowledged(vm, job, 0)
            await more(vm, job, 200)
            reverted = await vm.revert("then")
            await vm.revert("then")
            await more(vm, job, noted // 2)
            await vm.save(tmp_path / "save", live=True, keep=True)
            results = [await finish(vm, job)]
            clones = [await VirtualMachine.restore(tmp_path / "save", programs, clone=True) for _ in range(2)]
            async with clones[0], clones[1]:
                for clone in clones:
                    await more(clone, job)
                await clones[1].stop()
                await clones[1].cont()
                await clones[0].checkpoint("clone")
                await clones[0].revert("clone")
                results += [await finish(clone, job) for clone in clones]
            assert not [clone for clone in clones if clone.run_directory.path.exists()]
            return results, taken.phases, reverted.phases

    results, taken, reverted = run(story())
    print(f"checkpoint: {taken}; revert: {reverted}")
    assert [path.name for path in disks.iterdir()] == ["disk.img"]
    for result in results:
        clean(result, 100)


def test_block_survives_a_live_migration_with_a_shared_image(
    run: Run, programs: Programs, tmp_path: Path, disks: Path
) -> None:
    """There and back; in between one that fails when the destination has the lock. Without sharing it is refused."""
    seen: list[tuple[str, bool, bool]] = []

    async def look(vm: VirtualMachine, now: Moment) -> None:
        """Who has the image: the source by its own word, anybody by the kernel's."""
        if now in (Moment.RAM_COPY, Moment.WRITING, Moment.BEFORE_GO, Moment.AFTER_GO):
            seen.append((now.name, bool((await disk(vm))["locked"]), in_use(disks / "disk.img")))

    async def fail(now: Moment) -> None:
        if now is Moment.BEFORE_GO:
            raise EnvironmentProblem("on purpose")

    async def move(vm: VirtualMachine, at: Hook = no_hook) -> VirtualMachine:
        listener = await listen(parse_address(f"unix:{tmp_path / 'm.sock'}"), SECRET)
        receiving = asyncio.create_task(VirtualMachine.receive(listener, programs, timeout=60))
        try:
            report = await vm.migrate(str(listener.address), SECRET, at=at)
            print(f"downtime {report.downtime * 1000:.0f} ms: {report.spans}")
            return await receiving
        finally:
            await asyncio.wait({receiving}, timeout=30)
            receiving.cancel()

    async def story() -> tuple[dict[str, Any], str]:
        vm, job = await writing(described(snapshot="shared"), programs)
        async with vm:
            for _ in range(2):
                with pytest.raises(MigrateFailed, match=r"on purpose.*the VM runs on"):
                    await move(vm, fail)
                assert (await disk(vm))["locked"]
                await more(vm, job)
                there = await move(vm, partial(look, vm))
                assert vm.ended and (await disk(there))["locked"]
                vm = there
                await more(vm, job)
            result = await finish(vm, job)
            await vm.kill()
        vm, job = await writing(described(), programs)
        async with vm:
            with pytest.raises(MigrateFailed, match=r"nothing takes them along.*the VM runs on") as caught:
                await move(vm)
            await more(vm, job)
            clean(await finish(vm, job), 200)
        return result, str(caught.value)

    result, refusal = run(story())
    print(refusal)
    print(seen)
    clean(result, 500)
    # Who has it: the source while it runs, then nobody, and the destination before the decision that it may run.
    assert list(dict.fromkeys(seen)) == [
        ("RAM_COPY", True, True),
        ("WRITING", False, False),
        ("BEFORE_GO", False, True),
        ("AFTER_GO", False, True),
    ]
    assert [path.name for path in disks.iterdir()] == ["disk.img"]


# ---- a disk that goes and comes back, a driver that dies -------------------------------------------------------------


def test_block_survives_being_withdrawn_and_offered_again(
    run: Run, description: VmDescription, programs: Programs, tmp_path: Path
) -> None:
    offer = msgspec.to_builtins(description.device.providers[0])

    async def story() -> tuple[dict[str, Any], dict[str, Any]]:
        vm, job = await writing(description, programs)
        async with vm:
            assert vm.control is not None
            for number in range(3):
                await vm.control.call("rescind", name="disk")
                if number == 2:
                    # Saved while the disk is away: the requests wait in the guest.
                    await vm.save(tmp_path / "away", live=True, keep=True)
                await vm.control.call("offer", provider=offer)
                await more(vm, job)
            services = await vm.call_agent("poll", job=1)
            return services["progress"], await finish(vm, job)

    service, result = run(story())
    print(f"the service: {service}")
    assert service["reopened"] == 3 and service["errors"] == 0
    clean(result, 300)


def test_block_survives_a_guest_driver_that_is_killed(
    run: Run, description: VmDescription, programs: Programs, tmp_path: Path
) -> None:
    """The kernel loses its device in mid-write; what was acknowledged is on the disk, and a new driver finds it."""

    async def story() -> tuple[int, dict[str, Any]]:
        vm, job = await writing(description, programs)
        async with vm:
            acknowledged = await more(vm, job)
            assert (await vm.call_agent("kill", job=1))["state"] == "killed"
            report = await vm.call_agent("wait", job=job, timeout=60.0)
            assert report["state"] != "running"
            print(f"the writer on a disk that is gone: {report.get('error') or report['result']}")
            await vm.call_agent("start", driver="services", parameters={"services": ["block"]})
            report = await vm.call_agent(
                "run",
                driver="disk-writer",
                parameters={"mode": "check", "slots": ENDLESS["slots"], "acknowledged": acknowledged},
                timeout=90.0,
            )
            assert report["state"] == "finished", report
            return acknowledged, report["result"]

    acknowledged, result = run(story())
    clean(result, acknowledged)
