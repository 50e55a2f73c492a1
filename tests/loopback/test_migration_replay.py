"""The PCI function of a live migration is put back before the state comes: real owners and servers, and a program in
QEMU's place. Whatever of that is left out or overtaken is noticed before the VM is handed over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from support import pace
from support.failure_bench import Bench
from support.failure_bench import bench as bench
from vmbus.device.pci import MSI_CONTROL, MSI_DATA
from vmbus.errors import VmbusError
from vmbus.operations.machine import VirtualMachine
from vmbus.operations.migration.address import UnixAddress
from vmbus.operations.migration.arrival import Arrival
from vmbus.operations.migration.listener import listen
from vmbus.qemu.device import DeviceInstance
from vmbus.vm.errors import MigrateFailed
from vmbus.vm.moments import Hook, Moment, no_hook

SECRET = bytes(range(32))
WRITES = 7
Patch = pytest.MonkeyPatch


async def move(bench: Bench, at: Hook = no_hook) -> VirtualMachine:
    """Migrates the bench's VM; the one that arrived. Raises what the source says, once the destination is gone."""
    vm = await bench.source()
    address = UnixAddress(str(bench.root / "d"))
    listener = await listen(address, SECRET)
    receiving = asyncio.create_task(VirtualMachine.receive(listener, bench.programs, timeout=pace.seconds(20)))
    try:
        await vm.migrate(str(address), SECRET, at=at)
    finally:
        await asyncio.gather(receiving, return_exceptions=True)
    return receiving.result()


async def arrived(bench: Bench, at: Hook = no_hook) -> int:
    """The number of writes to the PCI function of a VM that arrived, and runs there."""
    vm = await move(bench, at)
    assert vm.restored is not None
    writes = vm.restored.pci_writes
    await bench.arrived_runs(vm)
    await vm.kill()
    await bench.forget_source()
    return writes


async def nothing(*_: Any) -> int:
    return 0


def guest_writes(bench: Bench, moment: Moment) -> Hook:
    """While memory is copied, the guest changes its PCI function."""

    async def at(now: Moment) -> None:
        if now is moment:
            assert bench.vm is not None
            value = int.from_bytes(bytes.fromhex((await bench.vm.call_server("pci"))["config"])[0x4C:0x4E], "little")
            slot = bench.vm.devices[0].address
            for line in (f"o /w 0xcf8 {slot.latch(0x4C):#x}", f"o /h 0xcfc {value ^ 1:#x}"):
                assert await bench.vm.monitor.human(line) == ""

    return at


def test_fault_m3_only_the_interrupt_is_written_when_the_stream_is_loaded(bench: Bench, monkeypatch: Patch) -> None:
    """Where nothing has changed. It is not enabled before what it is translated by is there."""
    seen: list[bool] = []
    loaded = Arrival.loaded

    async def look(arrival: Arrival) -> None:
        config = bytes.fromhex((await arrival.vm.call_server("pci"))["config"])
        seen.append(bool(config[MSI_CONTROL] & 1))
        await loaded(arrival)

    monkeypatch.setattr(Arrival, "loaded", look)
    assert bench.run(arrived(bench)) == WRITES + 1
    assert seen == [False]


@pytest.mark.parametrize("moment", [Moment.BEFORE_STREAM, Moment.RAM_COPY])
def test_a_function_that_changes_meanwhile_is_written_again(bench: Bench, moment: Moment) -> None:
    assert bench.run(arrived(bench, guest_writes(bench, moment))) == 2 * WRITES


def test_a_function_that_was_not_written_ahead_is_written_then(bench: Bench, monkeypatch: Patch) -> None:
    monkeypatch.setattr(Arrival, "replay_ahead", nothing)
    assert bench.run(arrived(bench)) == WRITES


def refused(bench: Bench, message: str) -> None:
    async def body() -> None:
        with pytest.raises(MigrateFailed, match=message) as caught:
            await move(bench)
        assert caught.value.source_alive and bench.vm is not None
        await bench.goes_on(bench.vm)

    bench.run(body())


def test_sabotage_a_replay_that_is_left_out_is_refused(bench: Bench, monkeypatch: Patch) -> None:
    monkeypatch.setattr(Arrival, "replay_ahead", nothing)
    monkeypatch.setattr(Arrival, "replay", nothing)
    refused(bench, "was not put back as it was saved")


def test_sabotage_a_replay_ahead_that_nobody_compares_is_refused(bench: Bench, monkeypatch: Patch) -> None:
    """The destination's function loses a register after it was put back, and the comparison is left out."""
    ahead: Callable[..., Any] = Arrival.replay_ahead

    async def spoil(arrival: Arrival, configs: Sequence[bytes]) -> None:
        await ahead(arrival, configs)
        slot = arrival.vm.devices[0].address
        for line in (f"o /w 0xcf8 {slot.latch(MSI_DATA):#x}", "o /h 0xcfc 0x1234"):
            assert await arrival.vm.monitor.human(line) == ""

    monkeypatch.setattr(Arrival, "replay_ahead", spoil)
    assert bench.run(arrived(bench)) == 2 * WRITES  # compared, it is found and mended
    monkeypatch.setattr(Arrival, "replay", nothing)
    refused(bench, "was not put back as it was saved")


def test_sabotage_a_bar_that_does_not_answer_is_refused(bench: Bench, monkeypatch: Patch) -> None:
    """The server has its configuration, and QEMU does not lead there."""
    human: Callable[..., Any] = DeviceInstance.is_back

    async def deaf(device: DeviceInstance, config: bytes) -> bool:
        async def silence(line: str, **_: Any) -> str:
            return "fe000000: 0xffffffff"

        device.monitor.human = silence  # type: ignore[method-assign]
        return bool(await human(device, config))

    monkeypatch.setattr(DeviceInstance, "is_back", deaf)
    refused(bench, "does not answer at its BAR0")


def test_the_device_stands_still_until_go(bench: Bench, monkeypatch: Patch) -> None:
    """It is told to go on only then; one that is not would be there, and do nothing."""
    told: list[str] = []
    release = Arrival.release

    async def look(arrival: Arrival) -> None:
        told.append((await arrival.vm.call_server("status"))["phase"])
        await release(arrival)
        told.append((await arrival.vm.call_server("status"))["phase"])

    monkeypatch.setattr(Arrival, "release", look)
    bench.run(arrived(bench))
    assert told == ["paused", "running"]


def test_a_server_that_is_gone_after_go_is_noticed_before_the_vcpus_run(bench: Bench, monkeypatch: Patch) -> None:
    release = Arrival.release

    async def kill(arrival: Arrival) -> None:
        assert arrival.vm.server is not None
        arrival.vm.server.process.kill()
        await release(arrival)

    async def body() -> None:
        ran: list[Any] = []

        async def run(arrival: Arrival) -> None:
            ran.append(arrival)

        monkeypatch.setattr(Arrival, "release", kill)
        monkeypatch.setattr(Arrival, "run", run)
        with pytest.raises(VmbusError, match=r"after the decision.*killed by SIGKILL"):
            await move(bench)
        assert ran == [] and bench.vm is not None
        await bench.goes_on(bench.vm)

    bench.run(body())
