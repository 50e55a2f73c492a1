"""A guest whose device is driven by Linux's own VMBus drivers, behind our kernel module."""

from __future__ import annotations

import asyncio
import contextlib
import re
import struct
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from random import Random
from typing import Any

import pytest

from support import pace
from support.boot import boot
from support.in_guest import require_no_complaints, shell, until_prints
from support.linux_guest import GuestMemory, described, event_page, message_page
from vmbus.errors import VmbusError
from vmbus.operations.machine import VirtualMachine
from vmbus.testkit.moving import move
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription, with_further
from vmbus.vm.process import log_tail

pytestmark = [pytest.mark.vm, pytest.mark.long]

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Note = Callable[[str], None]
FUNCTION = "/sys/bus/pci/devices/0000:00:05.0"
ON_VMBUS = ("hv_utils", "hv_storvsc", "hv_netvsc", "hv_sock", "uio_hv_generic")


async def beats(vm: VirtualMachine) -> int:
    return int((await vm.call_server("status"))["providers"]["services"]["heartbeat"]["beats"])


async def until_beats(vm: VirtualMachine, count: int, seconds: float = 60.0) -> int:
    """Wait for so many answered heartbeats more than there are."""
    wanted = await beats(vm) + count

    async def beaten() -> bool:
        return await beats(vm) >= wanted

    await pace.eventually(beaten, f"{wanted} heartbeats", seconds)
    return await beats(vm)


async def counters(vm: VirtualMachine) -> dict[str, int]:
    """What our kernel module has counted."""
    lines = (await shell(vm, "cd /sys/bus/pci/drivers/vmbus_pci/0000:*/vmbus && grep . *")).splitlines()
    return {name: int(value) for name, _, value in (line.partition(":") for line in lines)}


async def without_daemons(vm: VirtualMachine) -> None:
    """Debian's daemons hold the devices of hv_utils open, and so keep it from being removed: end them for good."""
    await shell(vm, "sed -i /vmbus-hv-daemon/d /etc/inittab; kill -HUP 1; sleep 1; killall hv_kvp_daemon; sleep 1")


async def require_service(vm: VirtualMachine, parts: int = 4) -> None:
    """hv_utils has its devices, heartbeats are answered and the guest's kernel has nothing to complain of."""
    await until_beats(vm, 3)
    bound = (await shell(vm, "ls /sys/bus/vmbus/drivers/hv_utils")).split()
    assert sum("-" in name for name in bound) == parts, bound
    await require_no_complaints(vm)


async def over_a_save(vm: VirtualMachine, directory: Path, programs: Programs) -> VirtualMachine:
    await vm.save(directory)
    await vm.kill()
    vm = await VirtualMachine.restore(directory, programs)
    try:
        await vm.wait_ready()
    except BaseException:
        await vm.kill()
        raise
    return vm


async def test_linux_guest_over_saves_and_with_drivers_that_come_and_go(
    programs: Programs, tmp_path: Path, note: Note
) -> None:
    """One CPU. Then the end: a panic, in which Linux ends its connection and waits for the answer."""

    async with await boot(described(1, "panic=60"), programs) as vm:
        assert vm.notice == ""
        log = await shell(vm, "dmesg")
        assert "Vmbus version:5.3" in log, log
        assert abs(float(await shell(vm, "date +%s")) - time.time()) < 5
        await require_service(vm)
        await without_daemons(vm)
        # A live patch in the guest, or a person, may switch tracing off; our redirects must stay.
        await shell(vm, "! echo 0 > /proc/sys/kernel/ftrace_enabled")
        for _ in range(2):
            await shell(vm, "rmmod hv_utils && insmod /lib/modules/hv_utils.ko")
            await require_service(vm)
        before = await counters(vm)
        await shell(vm, f"rmmod {' '.join(reversed(ON_VMBUS))} hv_vmbus")
        assert (await vm.call_server("inspect"))["bus"]["version"] == ""
        # Without a function there is no connection, and hv_vmbus says so; with it there is one again.
        await shell(vm, f"echo 1 > {FUNCTION}/remove && ! insmod /lib/modules/hv_vmbus.ko")
        await shell(vm, "echo 1 > /sys/bus/pci/rescan")
        await shell(vm, f"for m in hv_vmbus {' '.join(ON_VMBUS)}; do insmod /lib/modules/$m.ko; done")
        await require_service(vm)
        rejected = (await vm.call_server("inspect"))["bus"]["rejected"]
        assert not rejected, log_tail(vm.run_directory / "server.log", 20)
        vm = await over_a_save(vm, tmp_path / "saved", programs)
    async with vm:
        await until_beats(vm, 5)
        await require_service(vm)
        after = await counters(vm)
        assert after["messages"] > before["messages"] and not after["bad_messages"] + after["faults"], after
        with contextlib.suppress(VmbusError):
            await vm.run_in_guest(["/bin/sh", "-c", "echo c > /proc/sysrq-trigger"], timeout=1.0)
        deadline = time.monotonic() + pace.seconds(60)
        while (await vm.call_server("inspect"))["bus"]["version"] != "":
            assert time.monotonic() < deadline, vm.paths.console_log.read_text()[-3000:]
            await asyncio.sleep(0.1)
        # It waits for ten seconds for the answer; without one the panic would not be over so soon.
        while "Rebooting in" not in (log := vm.paths.console_log.read_text()):
            assert time.monotonic() < deadline, log[-3000:]
            await asyncio.sleep(0.1)
    lines = re.findall(r"\[ *([0-9.]+)\] *(?:Kernel panic|Rebooting in)", log)
    begun, over = map(float, lines)
    assert over - begun < 5, log[-3000:]
    note(f"Linux's drivers, 1 CPU: a panic with UNLOAD and its answer took {over - begun:.2f} s")


async def test_linux_guest_with_a_host_that_writes_nonsense_and_a_function_that_is_reset(
    programs: Programs, tmp_path: Path, note: Note
) -> None:
    """Two CPUs."""

    async with await boot(described(2, "iomem=relaxed"), programs) as vm:
        await require_service(vm)
        messages_at, events_at = await message_page(vm), await event_page(vm)
        memory, random = GuestMemory(vm), Random(11)
        for _ in range(20):
            memory.write(events_at, random.randbytes(4096))
            slot = struct.pack("<IBBHQ", random.choice((2, 0x80000010, 0xFFFFFFFF)), 255, 255, 0xFFFF, 1)
            memory.write(messages_at, random.randbytes(512) + slot + random.randbytes(4096 - 512 - len(slot)))
            await until_beats(vm, 1)
        # As a channel message, of every length: what makes no sense is kept from Linux, which would warn of it.
        messages = [(0, 1), (7, 1), (241, 2), (8, 99), (239, 3), (240, 0), (20, 1), (196, 1), (8, 2), (12, 2)]
        messages += [(random.randrange(256), random.randrange(30)) for _ in range(20)]
        for size, number in messages:
            payload = struct.pack("<II", number, 0) + random.randbytes(232)
            memory.write(messages_at + 516, struct.pack("<BBHQ", size, 1, 0, 0) + payload)
            memory.write(messages_at + 512, struct.pack("<I", 1))
            await until_beats(vm, 1)
        bad = await counters(vm)
        assert bad["bad_messages"] >= 40 and bad["events"] < 500, bad
        assert "the host's message" in await shell(vm, "dmesg")
        await require_service(vm)

        # A reset behind Linux's back: without our module's help Linux waits for ever, with it it gets all anew.
        faults = bad["faults"]
        await shell(vm, "echo 0 > /sys/module/vmbus_pci/parameters/mend")
        address = await shell(vm, f"head -n 1 {FUNCTION}/resource")
        await shell(vm, f"devmem $(({address.split()[0]} + 0x10)) 32 2")
        answered = await beats(vm)
        await shell(vm, "sleep 8")
        assert await beats(vm) <= answered + 1 and (await counters(vm))["faults"] == faults
        await shell(vm, "echo 1 > /sys/module/vmbus_pci/parameters/mend")
        await until_prints(vm, "dmesg | grep 'lose 4 channels'")
        await until_beats(vm, 5)
        await until_bound(vm)
        assert (await counters(vm))["faults"] == faults + 1
        # And a function that is unplugged, and plugged in again.
        await shell(vm, f"echo 1 > {FUNCTION}/remove")
        await until_prints(vm, 'test -z "$(ls /sys/bus/vmbus/devices)" && echo none')
        await shell(vm, "echo 1 > /sys/bus/pci/rescan")
        await until_bound(vm)
        vm = await over_a_save(vm, tmp_path / "saved", programs)
    async with vm:
        await until_beats(vm, 5)
        await until_bound(vm)
        found = await counters(vm)
    note(f"Linux's drivers, 2 CPUs, a hostile host: {found}")


async def until_bound(vm: VirtualMachine) -> None:
    """hv_utils has its four devices, and heartbeats are answered."""
    await until_prints(vm, "test $(ls -d /sys/bus/vmbus/drivers/hv_utils/*-* | wc -l) = 4 && echo bound")
    await until_beats(vm, 3)


async def test_linux_guest_with_channels_that_move_between_four_cpus(
    programs: Programs, tmp_path: Path, note: Note
) -> None:
    async with await boot(described(4), programs) as vm:
        await require_service(vm)
        for cpu in (3, 1, 2):
            await shell(vm, f"for c in /sys/bus/vmbus/devices/*/channels/*/cpu; do echo {cpu} > $c; done")
            await until_beats(vm, 3)
            assert await shell(vm, "cat /sys/bus/vmbus/devices/*/channels/*/cpu") == "\n".join(4 * [str(cpu)])
        vm, _ = await move(vm, programs=programs)
    async with vm:
        await require_service(vm)
        wakes = (await counters(vm))["wakes"]
        await until_beats(vm, 5)
        assert (await counters(vm))["wakes"] >= wakes + 5, "events went to CPU 2"
        # Linux does not let a CPU go that has channels.
        await shell(vm, "! echo 0 > /sys/devices/system/cpu/cpu2/online")
        await shell(vm, "for c in /sys/bus/vmbus/devices/*/channels/*/cpu; do echo 1 > $c; done")
        await shell(vm, "echo 0 > /sys/devices/system/cpu/cpu2/online")
        await until_beats(vm, 3)
        await shell(vm, "echo 1 > /sys/devices/system/cpu/cpu2/online")
        await shell(vm, "for c in /sys/bus/vmbus/devices/*/channels/*/cpu; do echo 2 > $c; done")
        await require_service(vm)
        found = await counters(vm)
    assert not found["lost_events"] + found["bad_messages"] + found["bad_registers"] + found["bad_calls"], found
    note(f"Linux's drivers, 4 CPUs: {found}")


async def echoes(vm: VirtualMachine) -> int:
    """What the second device has completed."""
    return int((await vm.call_servers("status"))[1]["providers"]["echo"]["tally"]["completed"])


async def until_echoes(vm: VirtualMachine, more: int) -> None:
    wanted = await echoes(vm) + more

    async def done() -> bool:
        return await echoes(vm) >= wanted

    await pace.eventually(done, f"{wanted} echoes", 60.0)


async def test_linux_guest_with_both_drivers_on_two_devices(
    programs: Programs, demo_description: VmDescription, tmp_path: Path, note: Note
) -> None:
    """Linux has the first one, and a program the second one, before and after a save."""
    description = with_further(described(2), [demo_description])
    vm = await VirtualMachine.launch(description, programs)  # as booted: it is saved below
    async with vm:
        await vm.wait_ready()
        await require_service(vm)
        began = await beats(vm)
        job = (await vm.call_agent("start", driver="echo", parameters={"count": 0, "window": 128}))["job"]
        await until_echoes(vm, 100)
        await require_service(vm)
        for slot, driver in ((5, "vmbus_pci"), (6, "vfio-pci")):
            await until_prints(vm, f"readlink /sys/bus/pci/devices/0000:00:0{slot}.0/driver | grep {driver}$")
        # The function that Linux has cannot be had, by mistake or on purpose.
        await shell(vm, "! echo 0000:00:05.0 > /sys/bus/pci/drivers/vmbus_pci/unbind")
        vm = await over_a_save(vm, tmp_path / "saved", programs)
    async with vm:
        await require_service(vm)
        await until_echoes(vm, 100)
        await vm.call_agent("stop", job=job)
        report = await vm.call_agent("wait", job=job, timeout=120.0)
        assert report["state"] == "finished" and report["result"]["verdict"] == "passed", report
        assert report["result"]["completed"] == await echoes(vm) > 200
        note(
            f"both drivers in one guest, over a save: {report['result']['completed']} echoes beside "
            f"{await beats(vm) - began} heartbeats"
        )


async def test_linux_guest_where_an_iommu_translates_is_refused(programs: Programs) -> None:
    """The host would get the wrong memory. Nothing was done to the kernel then, and the module can go again."""

    described_so = described(1, "iommu=nopt", driver="both")
    vm = await VirtualMachine.launch(described_so, programs)  # as booted: its device is never used
    async with vm:
        await vm.wait_ready()
        log = await shell(vm, "dmesg")
        assert not await shell(vm, "ls /sys/bus/vmbus/devices 2>/dev/null || true")
        # Again, with another function, and none.
        await shell(vm, "rmmod vmbus_pci && insmod /lib/modules/vmbus_pci.ko function=0000:00:1f.7")
        await shell(vm, "! insmod /lib/modules/hv_vmbus.ko")
        await shell(vm, "rmmod vmbus_pci")
        await require_no_complaints(vm)
    assert "an IOMMU translates this function's addresses: boot with iommu=pt" in log, log
