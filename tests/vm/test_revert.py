"""Reverts in place: the running QEMU and device server are taken back in mid-traffic, to any checkpoint, any time.

The guest's books go back with the guest, the providers' with the device: after every revert the traffic of that moment
runs to its end, and both are compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.boot import books, in_traffic
from support.pace import eventually, seconds
from vmbus.errors import EnvironmentProblem, StateError, UsageError, VmbusError
from vmbus.operations.machine import VirtualMachine
from vmbus.operations.revert import RevertReport
from vmbus.qemu.qmp import QmpCommandFailed
from vmbus.testkit.story import Figures, Story
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.errors import RevertFailed, SaveFailed
from vmbus.vm.moments import Sabotage
from vmbus.vm.process import ProcessDied

pytestmark = [pytest.mark.vm, pytest.mark.long]

Run = Callable[[Coroutine[Any, Any, Any]], Any]

# The traffic goes on until it is stopped: so it never has run out when somebody was slow to look. Under TCG the guest's
# clock jumps at a revert by all that was undone, which is no stall.
STORY = Story(packets=128, echo_count=0, burst_count=0, stall_seconds=120.0)
NEW = {"kind": "echo", "name": "added", "instance": "00000000-0000-4000-8000-0000000000aa", "options": {"hold": 2}}


async def to_the_end(vm: VirtualMachine, job: int) -> Figures:
    """The traffic goes on for a while, and runs out; both sides' books."""
    await until_ahead(vm, await progress(vm) + 2000)
    return await books(vm, job, None)


def pids(vm: VirtualMachine) -> list[int]:
    return [child.pid for child in vm.children]


async def progress(vm: VirtualMachine) -> int:
    status = await vm.control.call("status")
    return sum(one["tally"]["completed"] for one in status["providers"].values())


async def until_ahead(vm: VirtualMachine, of: int) -> None:
    async def ahead() -> bool:
        return await progress(vm) > of

    await eventually(ahead, f"the device to get beyond {of} transactions", 30)


async def a_migration_that_fails(vm: VirtualMachine) -> None:
    """QEMU remembers it, and would fail its next load for it."""
    with contextlib.suppress(QmpCommandFailed):
        await vm.monitor.execute("migrate", {"uri": "unix:/no/such/socket"})

    async def failed() -> bool:
        return "error-desc" in await vm.monitor.execute("query-migrate")

    await eventually(failed, "the migration to nowhere to fail", 20)


def show(what: str, report: RevertReport) -> None:
    print(
        f"{what} {report.tag}: {report.packets} packets, {report.channels} channels, down {report.downtime:.3f} s, "
        + ", ".join(f"{name} {seconds:.3f}" for name, seconds in report.phases.items())
    )


async def test_revert_in_mid_traffic_to_any_checkpoint_and_forward_again(
    demo_description: VmDescription, programs: Programs, tmp_path: Path
) -> None:
    """Three checkpoints with names that QEMU could take for numbers, out of order; the first is gone back to twice."""

    vm, job = await in_traffic(demo_description, programs, STORY)
    async with vm:
        processes = pids(vm)
        seen: dict[str, int] = {}
        for tag in ("3", "1", "2"):
            taken = await vm.checkpoint(tag)
            print(f"checkpoint {tag}: {taken}")
            # How long the disk takes for the guest's memory is not ours.
            assert taken.downtime - taken.phases["ram"] < seconds(10)
            seen[tag] = taken.packets["queued"] + taken.packets["sent"]
            await until_ahead(vm, await progress(vm) + 1000)
        assert [one.tag for one in vm.checkpoints()] == ["3", "1", "2"]
        with vm.own_migration():
            await a_migration_that_fails(vm)
        for tag in ("1", "3", "2"):
            report = await vm.revert(tag)
            show("back to", report)
            assert sum(report.packets.values()) == seen[tag] and report.channels == 2 and not report.forced
            await until_ahead(vm, 0)
        for tag in ("3", "2", "1", "3"):
            show("back to", await vm.revert(tag))
            figures = await to_the_end(vm, job)
            assert not figures.reasons, figures.reasons
            print(f"from {tag} to the end: {figures.completed} of {figures.transactions} transactions")
            assert figures.completed == figures.transactions > 2000
        await vm.delete_checkpoint("1")
        with pytest.raises(UsageError, match=r"there is no checkpoint '1'.*there: 2, 3"):
            await vm.revert("1")
        await vm.checkpoint("1")  # the name is free again; the VM is idle now
        show("back to", await vm.revert("1"))
        assert (await vm.call_agent("poll", job=job))["state"] == "finished"
        assert pids(vm) == processes
        path = vm.run_directory / "checkpoints"
        assert all(entry.stat().st_mode & 0o077 == 0 for entry in (path, *path.iterdir()))
        # QEMU lets go of its images at the end of a save, and takes them again when it runs: this one does not run.
        await vm.stop()
        await vm.save(tmp_path / "paused", live=True, keep=True)
        show("of a VM saved while it was paused, back to", await vm.revert("3"))
        assert not await vm.monitor.running()
        with pytest.raises(SaveFailed, match="sends one that stands still only once"):
            await vm.save(tmp_path / "again", keep=True)
        await vm.checkpoint("4")
        await vm.cont()
        figures = await to_the_end(vm, job)
        assert not figures.reasons, figures.reasons
    assert not path.exists()


async def test_revert_undoes_what_became_of_the_device_and_of_requests_to_the_agent(
    demo_description: VmDescription, programs: Programs
) -> None:
    """A provider came after one checkpoint and is there in another; the agent's jobs and answers are of their time."""

    vm, job = await in_traffic(demo_description, programs, STORY)
    async with vm:
        await vm.checkpoint("before")
        await vm.control.call("offer", provider=NEW)
        later = int((await vm.call_agent("start", driver="burst", parameters={}))["job"])
        assert later == job + 1  # it fails soon, since the device is in use
        await vm.checkpoint("after")
        waiting = asyncio.ensure_future(vm.call_agent("wait", job=job, timeout=60.0))
        while not vm.agent._answers:  # noqa: ASYNC110 - asked within a turn or two of the loop
            await asyncio.sleep(0)
        await vm.revert("before")
        with pytest.raises(EnvironmentProblem, match="taken back to checkpoint 'before' meanwhile: ask again"):
            await waiting
        assert list((await vm.control.call("status"))["providers"]) == ["echo", "burst"]
        with pytest.raises(VmbusError, match="job"):
            await vm.call_agent("poll", job=later)
        # The same job number again, for another driver: the answer is to the new question.
        again = await vm.call_agent("start", driver="echo", parameters={})
        assert again["job"] == later
        assert (await vm.call_agent("poll", job=later))["driver"] == "echo"
        await vm.revert("after")
        status = await vm.control.call("status")
        assert status["description"]["providers"][-1] == NEW
        assert (await vm.call_agent("poll", job=later))["driver"] == "burst"
        figures = await to_the_end(vm, job)
        assert not figures.reasons, figures.reasons


def test_revert_refused_changes_nothing_and_checkpoints_outlive_their_vm(
    run: Run, demo_description: VmDescription, programs: Programs, tmp_path: Path
) -> None:
    """Every damaged part is refused with the VM running on; then a new VM is taken to a checkpoint of the old one."""
    directory = tmp_path / "checkpoints"

    async def first() -> int:
        vm, job = await in_traffic(demo_description, programs, STORY)
        async with vm:
            await vm.checkpoint("one", directory=directory)
            await until_ahead(vm, await progress(vm) + 500)
            await vm.checkpoint("two", directory=directory)
            with pytest.raises(UsageError, match="already"):
                await vm.checkpoint("two", directory=directory)
            for wrong in ("", "Two", "../x", "a" * 33):
                with pytest.raises(UsageError, match="not a usable name"):
                    await vm.checkpoint(wrong, directory=directory)
            # Sabotage: the device's state of another checkpoint; a changed record; another snapshot under the name.
            state, record = directory / "one.state", directory / "one.json"
            good, text = state.read_bytes(), record.read_bytes()
            state.write_bytes((directory / "two.state").read_bytes())
            with pytest.raises(StateError, match="not the device's state of checkpoint 'one'"):
                await vm.revert("one", directory=directory)
            state.write_bytes(good[:-1])
            with pytest.raises(StateError, match="not the device's state of checkpoint 'one'"):
                await vm.revert("one", directory=directory)
            state.write_bytes(good)
            record.write_bytes(text.replace(b'"incoming_held"', b'"incoming_helt"'))
            with pytest.raises(StateError, match="incoming_he"):
                await vm.revert("one", directory=directory)
            record.write_bytes((directory / "two.json").read_bytes())
            with pytest.raises(StateError, match="is the record of the checkpoint 'two'"):
                await vm.revert("one", directory=directory)
            record.write_bytes(text)
            node = "checkpoints-0"
            assert await vm.monitor.running()
            figures = await to_the_end(vm, job)
            assert not figures.reasons, figures.reasons
            await vm.revert("one", directory=directory)
            await vm.stop()
            with vm.own_migration():
                from vmbus.qemu.jobs import run_job

                for command in ("snapshot-delete", "snapshot-save"):
                    arguments: dict[str, Any] = {"tag": "vmbus-two", "devices": [node]}
                    if command == "snapshot-save":
                        arguments["vmstate"] = node
                    await run_job(vm.monitor, command, arguments, 30.0, "replacing QEMU's part")
            with pytest.raises(StateError, match="does not have QEMU's part of checkpoint 'two'"):
                await vm.revert("two", directory=directory)
            await vm.cont()
            figures = await to_the_end(vm, job)
            assert not figures.reasons, figures.reasons
        return job

    async def second(job: int) -> None:
        async with await VirtualMachine.launch(demo_description, programs) as vm:  # as booted: it has not yet
            report = await vm.revert("one", directory=directory)
            show("in a new VM, back to", report)
            figures = await to_the_end(vm, job)
            assert not figures.reasons, figures.reasons
        small = msgspec.structs.replace(demo_description, memory_mib=512)
        async with await VirtualMachine.launch(small, programs) as vm:  # as booted: it is refused
            with pytest.raises(StateError, match="another VM"):
                await vm.revert("one", directory=directory)
            with pytest.raises(UsageError, match=r"no checkpoint 'three'.*there: one, two"):
                await vm.revert("three", directory=directory)

    job = run(first())
    run(second(job))


def test_revert_sabotage_without_the_pci_replay_and_deaths_on_the_way(
    run: Run, demo_description: VmDescription, programs: Programs, tmp_path: Path
) -> None:
    """Half way back there is no way on: the VM is ended, and the message names the way to restore it."""
    directory = tmp_path / "checkpoints"

    async def make() -> None:
        vm, _ = await in_traffic(demo_description, programs, STORY)
        async with vm:
            await vm.checkpoint("here", directory=directory)
            with pytest.raises(RevertFailed, match=r"not put back as it was saved(.|\n)*has been ended(.|\n)*run-vm"):
                await vm.revert("here", directory=directory, sabotage=Sabotage(skip_pci_replay=True))
            assert vm.ended

    async def die(victim: str, phase: str) -> None:
        async with await VirtualMachine.launch(demo_description, programs) as vm:  # as booted: it is reverted

            def strike(now: str) -> None:
                if now == phase:
                    os.kill(getattr(vm, victim).pid, signal.SIGKILL)

            with pytest.raises((RevertFailed, ProcessDied), match="killed by SIGKILL"):
                await vm.revert("here", directory=directory, progress=strike)
            if not vm.ended:
                await vm.kill()

    run(make())
    for victim, phase in (("server", "ram"), ("qemu", "ram"), ("server", "channels")):
        run(die(victim, phase))
