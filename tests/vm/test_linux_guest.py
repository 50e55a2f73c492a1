"""A guest whose device is driven by Linux's own VMBus drivers, behind our kernel module."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.boot import boot
from vmbus.errors import WaitTimeout
from vmbus.qemu.command_line import Programs
from vmbus.qemu.description import VmDescription, load_description
from vmbus.qemu.machine import VirtualMachine

pytestmark = pytest.mark.vm

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Note = Callable[[str], None]
CHECKOUT = Path(__file__).resolve().parents[2]
BAD_WORDS = (
    "WARNING:",
    "BUG:",
    "blocked for more than",
    "Call Trace",
    "rcu_sched",
    "soft lockup",
    "general protection",
)


def described(cpus: int) -> VmDescription:
    """The machine of qemu_configs with its integration services alone, and faster heartbeats."""
    plain = msgspec.to_builtins(load_description(CHECKOUT / "qemu_configs" / "linux.toml"))
    plain["cpus"] = cpus
    plain["device"]["providers"] = [one for one in plain["device"]["providers"] if one["kind"] == "integration"]
    plain["device"]["providers"][0]["options"] |= {"heartbeat_seconds": 0.2}
    return msgspec.convert(plain, VmDescription)


async def shell(vm: VirtualMachine, command: str) -> str:
    """What a shell command in the guest prints. It has to succeed."""
    done = await vm.run_in_guest(["/bin/sh", "-c", command])
    assert done.code == 0, (command, done)
    return done.output.strip()


async def beats(vm: VirtualMachine) -> int:
    return int((await vm.call_server("status"))["providers"]["services"]["heartbeat"]["beats"])


async def until_beats(vm: VirtualMachine, count: int, seconds: float = 60.0) -> int:
    """Wait for so many answered heartbeats more than there are."""
    deadline = time.monotonic() + seconds
    wanted = await beats(vm) + count
    while (now := await beats(vm)) < wanted:
        if time.monotonic() > deadline:
            raise WaitTimeout(f"{wanted} heartbeats; there are {now}; {await shell(vm, 'dmesg | tail -n 40')}", seconds)
        await asyncio.sleep(0.02)
    return now


async def require_no_complaints(vm: VirtualMachine) -> None:
    """The guest's kernel has nothing to complain of."""
    lines = (await shell(vm, "dmesg")).splitlines()
    assert not [line for line in lines if any(word in line for word in BAD_WORDS)], lines


@pytest.mark.parametrize("cpus", [1, 2])
def test_linux_guest_over_a_save(run: Run, programs: Programs, tmp_path: Path, note: Note, cpus: int) -> None:
    async def story() -> None:
        async with await boot(described(cpus), programs) as vm:
            assert vm.notice == ""
            log = await shell(vm, "dmesg")
            assert "Vmbus version:5.3" in log, log
            assert int(await shell(vm, "nproc")) == cpus
            bound = (await shell(vm, "ls /sys/bus/vmbus/drivers/hv_utils")).split()
            assert sum("-" in name for name in bound) == 4, bound
            await until_beats(vm, 5)
            assert abs(float(await shell(vm, "date +%s")) - time.time()) < 5
            await require_no_complaints(vm)
            before = await beats(vm)
            await vm.save(tmp_path / "saved")
        async with await VirtualMachine.restore(tmp_path / "saved", programs) as vm:
            await vm.wait_ready()
            after = await until_beats(vm, 10)
            await require_no_complaints(vm)
            counters = await shell(vm, "cd /sys/bus/pci/drivers/vmbus_pci/0000:*/vmbus && grep . *")
            note(f"Linux's drivers, {cpus} CPUs: {before} heartbeats before a save, {after} since; {counters.split()}")

    run(story())
