"""One VM with two VMBus devices, a server process each, traffic in both: whatever is done to the VM is done to both, or
to none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from vmbus.errors import VmbusError, code_of
from vmbus.observe.audit.checker import check_paths
from vmbus.observe.audit.guest import collect_audit
from vmbus.operations.machine import VirtualMachine
from vmbus.testkit.moving import move
from vmbus.testkit.story import Figures, Story, audit, begun, finish
from vmbus.util.patience import patient
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription, with_further
from vmbus.vm.errors import SaveFailed
from vmbus.vm.moments import Sabotage

Run = Callable[[Coroutine[Any, Any, Any]], Any]

STORY = Story(packets=64, echo_count=0, burst_count=0, stall_seconds=20.0)
NAMES = ("vmbus0", "vmbus0-2")


def workloads(name: str) -> dict[str, Any]:
    found = STORY.workloads()
    for one in found["workloads"]:
        one["function"] = name
    return found


async def status_of(vm: VirtualMachine, index: int) -> dict[str, Any]:
    """As if its providers were called like those of the description that it comes from."""
    status = await vm.devices[index].control.call("status")
    plain = {name.removesuffix("-2"): one for name, one in status["providers"].items()}
    return {**status, "providers": plain}


async def until_both_in_flight(vm: VirtualMachine) -> None:
    """Packets queued, sent and held on both devices at the same moment, or one after the other's."""
    deadline = asyncio.get_running_loop().time() + patient(60.0)
    while asyncio.get_running_loop().time() < deadline:
        found = [await status_of(vm, index) for index in range(2)]
        if all(one["packets"]["queued"] and one["packets"]["sent"] and one["incoming_held"] for one in found):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"not enough in flight: {[one['packets'] for one in found]}")


async def books(vm: VirtualMachine, jobs: list[int]) -> list[Figures]:
    """What both sides of each device say once its traffic has ended."""
    await asyncio.gather(*(vm.call_agent("stop", job=job) for job in jobs))
    found = []
    for index, job in enumerate(jobs):
        report = await finish(vm, job)
        figures = Figures()
        audit(figures, report, await status_of(vm, index), begun(report))
        found.append(figures)
    return found


def clean(found: list[Figures], what: str) -> None:
    for name, figures in zip(NAMES, found, strict=True):
        print(f"{what}, {name}: {figures.completed} of {figures.transactions} transactions completed")
        assert not figures.reasons, (name, figures.reasons)
        assert figures.completed == figures.transactions > 500


def test_own_guest_two_devices_are_saved_restored_reverted_and_migrated_together(
    run: Run, demo_description: VmDescription, programs: Programs, tmp_path: Path
) -> None:
    async def body() -> None:
        description = with_further(demo_description, [demo_description])
        assert tuple(one.name for one in description.all_devices) == NAMES
        good, broken, records = tmp_path / "good", tmp_path / "broken", tmp_path / "records"
        async with await VirtualMachine.launch(description, programs, audit=records) as vm:  # as booted: saved below
            assert len(vm.children) == 3
            await vm.wait_ready()
            started = [await vm.call_agent("start", driver="mixed", parameters=workloads(name)) for name in NAMES]
            jobs = [int(one["job"]) for one in started]
            await until_both_in_flight(vm)

            # The second device refuses, after all of memory was copied and the first one is at rest.
            await vm.devices[1].control.call("pause")
            with pytest.raises(SaveFailed, match="the VM runs on") as refused:
                await vm.save(tmp_path / "refused", live=True, keep=True)
            assert refused.value.source_alive and not code_of(refused.value) and not (tmp_path / "refused").exists()
            assert await vm.monitor.running()
            assert {(await status_of(vm, index))["phase"] for index in range(2)} == {"running"}
            before = [sum(one["tally"]["completed"] for one in (await status_of(vm, index))["providers"].values())
                      for index in range(2)]  # fmt: skip
            for index in range(2):
                await until_more(vm, index, before[index])

            await until_both_in_flight(vm)
            report = await vm.save(good, live=True, keep=True)
            print(f"saved live: {report.packets}, {report.incoming_held} held, {report.flushed_pages} pages flushed")
            assert report.packets["queued"] and report.packets["sent"] and report.flushed_pages
            await until_both_in_flight(vm)
            await vm.save(broken, live=True, sabotage=Sabotage(skip_flush=True, only=NAMES[1]))

        damaged = Sabotage(edit_state=lambda state: state[:-1], only=NAMES[1])
        with pytest.raises(VmbusError, match="the device server for 'vmbus0-2' of VM"):
            await VirtualMachine.restore(good, programs, sabotage=damaged)
        vm = await VirtualMachine.restore(good, programs, audit=records)
        async with vm:
            assert vm.restored is not None and vm.restored.packets == report.packets
            await until_both_in_flight(vm)
            await vm.checkpoint("here")
            await until_both_in_flight(vm)
            back = await vm.revert("here")
            print(f"taken back: {back.packets}, {back.channels} channels")
            assert back.channels == vm.restored.channels == 4 and back.packets["sent"]
            await until_both_in_flight(vm)
            vm, moved = await move(vm, audit=records)
            print(f"migrated: {moved.packets}, {moved.flushed_pages} pages flushed, down {moved.downtime:.2f} s")
            assert moved.flushed_pages and moved.packets["queued"] and moved.packets["sent"]
        async with vm:
            assert len(vm.children) == 3
            clean(await books(vm, jobs), "saved, restored, taken back and migrated")
            await collect_audit(vm)
            leaves = [one["uid"] for one in await vm.call_servers("audit")]
        found = check_paths([records], leaf=leaves)
        print(f"{found.packets} packets, {found.transactions} completed transactions, {len(found.timeline)} servers")
        assert found.clean and len(found.timeline) == 8 and len(found.channels) == 4, str(found)

        async with await VirtualMachine.restore(broken, programs) as vm:
            first, second = await books(vm, jobs)
        print(f"the alarm: {second.reasons}")
        assert not first.reasons, first.reasons
        assert second.reasons, "pages of the second device were left out, and nobody noticed"

    run(body(), timeout=300.0)


async def until_more(vm: VirtualMachine, index: int, completed: int) -> None:
    deadline = asyncio.get_running_loop().time() + patient(30.0)
    while asyncio.get_running_loop().time() < deadline:
        status = await status_of(vm, index)
        if sum(one["tally"]["completed"] for one in status["providers"].values()) > completed + 50:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"device {index} does not go on")
