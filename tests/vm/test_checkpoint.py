"""Checkpoints into directories: saved again and again while the VM runs on; each can be restored later."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from support.boot import books, boot, clean, in_traffic
from support.failure_bench import Disk
from vmbus.observe.inspection.difference import compare
from vmbus.observe.inspection.saved import inspect_path
from vmbus.observe.inspection.target import Running
from vmbus.operations.machine import VirtualMachine
from vmbus.testkit.story import Figures, Story, until_in_flight
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.errors import SaveFailed

Run = Callable[[Coroutine[Any, Any, Any]], Any]

# However fast the machine is, the traffic is there at every checkpoint: it goes on until it is stopped.
STORY = Story(packets=128, echo_count=0, burst_count=0, stall_seconds=10.0)


async def to_the_end(vm: VirtualMachine, job: int) -> Figures:
    figures = await books(vm, job, None)
    clean(figures, 1_000)
    return figures


async def completed(vm: VirtualMachine) -> int:
    status = await vm.control.call("status")
    return sum(one["tally"]["completed"] for one in status["providers"].values())


def test_checkpoint_chain_and_restores_of_old_ones(
    run: Run, demo_description: VmDescription, programs: Programs, tmp_path: Path
) -> None:
    """Five checkpoints of one VM, live and stopped, the source unharmed; then old and new ones, out of order, and a
    chain that goes on from a restored one. The running VM and each of the snapshots are looked into."""

    async def body() -> None:
        reached: list[int] = []
        in_flight: list[dict[str, int]] = []
        vm, job = await in_traffic(demo_description, programs, STORY)
        async with vm:
            processes = [child.pid for child in vm.children]
            seen = await Running.vm(vm.name).look()
            assert seen.server is not None and seen.server.phase == "running" and seen.seconds is not None
            assert {channel.state for channel in seen.channels} == {"active"} and seen.in_flight.total > 0
            assert all(not ring.problem for channel in seen.channels for ring in channel.rings)
            print(f"looked into while it ran: {seen.in_flight}, {seen.seconds * 1000:.1f} ms on the server's loop")
            for number in range(5):
                report = await vm.save(tmp_path / f"{number}", live=number % 2 == 0, keep=True)
                inside = inspect_path(tmp_path / f"{number}")
                assert (inside.in_flight.queued, inside.in_flight.sent) == (
                    report.packets["queued"],
                    report.packets["sent"],
                )
                assert sum(len(channel.packets) for channel in inside.channels) == inside.in_flight.total > 0
                assert all(ring.used is not None for channel in inside.channels for ring in channel.rings)
                assert report.downtime is not None and report.downtime < 10
                reached.append(await completed(vm))
                in_flight.append(report.packets)
                print(
                    f"checkpoint {number} ({'live' if report.live else 'stopped'}): {report.packets}, "
                    f"down {report.downtime:.3f} s, {reached[-1]} transactions completed"
                )
            assert reached == sorted(reached)
            one, other = (inspect_path(tmp_path / name) for name in ("0", "1"))
            assert compare(one, one).same
            places = {tuple(change.where[:1]) for change in compare(one, other).changes}
            assert places >= {("channels",), ("providers",)} and ("description",) not in places
            await to_the_end(vm, job)
            assert [child.pid for child in vm.children] == processes
        for number in (3, 0):
            async with await VirtualMachine.restore(tmp_path / f"{number}", programs) as vm:
                assert vm.restored is not None and vm.restored.packets == in_flight[number]
                await until_in_flight(vm, job, STORY)
                if number == 3:
                    await vm.save(tmp_path / "3.1", live=True, keep=True)
                figures = await to_the_end(vm, job)
                print(f"checkpoint {number} to its end: {figures.completed} of {figures.transactions}")
        async with await VirtualMachine.restore(tmp_path / "3.1", programs) as vm:
            await to_the_end(vm, job)

    run(body())


async def test_checkpoint_to_a_directory_and_in_place_go_together(
    demo_description: VmDescription, programs: Programs, tmp_path: Path
) -> None:
    """A save between a checkpoint in place and the revert to it, and a restore of what was saved after the revert."""

    vm, job = await in_traffic(demo_description, programs, STORY)
    async with vm:
        await vm.checkpoint("here")
        await vm.save(tmp_path / "before", live=True, keep=True)
        report = await vm.revert("here")
        assert report.channels == 2
        await vm.checkpoint("again")
        await until_in_flight(vm, job, STORY)
        await vm.save(tmp_path / "after", live=False, keep=True)
        await vm.revert("again")
        await to_the_end(vm, job)
    for name in ("before", "after"):
        async with await VirtualMachine.restore(tmp_path / name, programs) as vm:
            # Checkpoints in place are no part of a snapshot.
            assert vm.checkpoints() == []
            await to_the_end(vm, job)


def test_fault_h13_a_checkpoint_on_a_full_disk_gives_its_space_back(
    run: Run, demo_description: VmDescription, programs: Programs, tmp_path: Path
) -> None:
    """With another checkpoint in the same image, which stays whole."""
    folder = tmp_path / "small"

    def free() -> int:
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize >> 20

    async def body() -> None:
        async with await boot(demo_description, programs) as vm:
            await vm.stop()
            size = (await vm.checkpoint("measured")).vm_state_bytes
            try:
                disks.append(Disk(folder, size * 3 // 2))
            except PermissionError as error:
                pytest.skip(str(error))
            there = folder / "checkpoints"
            before = free()
            report = await vm.checkpoint("first", directory=there)
            once = report.vm_state_bytes >> 20
            assert once < before < 2 * once, (before, once)
            left = free()
            with pytest.raises(SaveFailed, match=r"checkpoint 'second' failed.*No space left on device"):
                await vm.checkpoint("second", directory=there)
            print(f"MiB free: {before}, {left} with a checkpoint of {once}, {free()} after one that failed")
            assert free() >= left - 2
            await vm.revert("first", directory=there)
            await vm.delete_checkpoint("first", directory=there)
            assert free() >= before - 8, "a checkpoint that is deleted gives its space back, too"
            await vm.checkpoint("third", directory=there)

    disks: list[Disk] = []
    try:
        run(body())
    finally:
        for disk in disks:
            disk.remove()
