"""Faults of a VM's life that only a real guest can show: one story, from a snapshot of a VM that was paused."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from vmbus.operations.machine import VirtualMachine
from vmbus.qemu.agent import GuestWentBack
from vmbus.qemu.ends import GuestPanicked
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription, load_description

CONFIGURATION = Path(__file__).resolve().parents[2] / "qemu_configs" / "echo.toml"
RANDOM = ["sh", "-c", "head -c 16 /dev/urandom | od -An -tx1"]
BOOT = ["cat", "/proc/sys/kernel/random/boot_id"]


async def said(vm: VirtualMachine, argv: list[str]) -> str:
    return (await vm.run_in_guest(argv)).output.strip()


async def reboots(vm: VirtualMachine) -> None:
    notices: list[str] = []
    vm.on_notice = notices.append
    before = await said(vm, BOOT)
    ended = asyncio.create_task(vm.wait_ended())
    with pytest.raises(GuestWentBack):
        await vm.run_in_guest(["reboot", "-f"])
    await vm.wait_ready()
    assert await said(vm, BOOT) != before and not ended.done() and notices == ["the guest boots again"]
    report = await vm.call_agent("run", driver="echo", parameters={"count": 200}, timeout=120.0)
    assert report["state"] == "finished" and report["result"]["completed"] == 200, report
    assert report["result"]["lost"] == report["result"]["duplicated"] == 0
    ended.cancel()


async def panics(vm: VirtualMachine) -> None:
    ended = asyncio.create_task(vm.wait_ended())
    asking = asyncio.create_task(vm.run_in_guest(["sh", "-c", "echo c >/proc/sysrq-trigger"]))
    with pytest.raises(GuestPanicked, match=r"panicked: not syncing: sysrq triggered crash(.|\n)*last lines:\n"):
        await asyncio.wait_for(ended, 60)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


@pytest.fixture
def description() -> VmDescription:
    return load_description(CONFIGURATION)


async def test_fault_m8_fault_m9_fault_m10_fault_m14_clones_of_a_paused_vm(
    description: VmDescription, programs: Programs, tmp_path: Path
) -> None:
    """Both come back paused. Set running, they have other random numbers; one reboots and works, the other panics."""

    directory = tmp_path / "paused"
    async with await VirtualMachine.launch(description, programs) as vm:  # as booted: it is saved paused
        await vm.wait_ready()
        await vm.stop()
        await vm.save(directory)
    async with (
        await VirtualMachine.restore(directory, programs, clone=True) as one,
        await VirtualMachine.restore(directory, programs, clone=True) as other,
    ):
        for vm in (one, other):
            assert vm.restored is not None and vm.restored.paused
            assert await vm.monitor.status() in ("paused", "prelaunch") and not await vm.monitor.running()
            await vm.cont()
        numbers = await asyncio.gather(*(said(vm, RANDOM) for vm in (one, other)))
        print(f"random bytes read at once in both clones: {numbers}")
        assert len(set(numbers)) == 2 and all(len(one.split()) == 16 for one in numbers)
        assert "reseed" in await said(one, ["sh", "-c", "dmesg | grep -i 'crng reseeded'"]), "it was told"
        await reboots(one)
        await panics(other)
