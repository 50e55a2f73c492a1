"""The guest takes memory back that the device has written during a live save. It cannot be copied once more, so the
pass is cancelled and begun again, the source running on; and if there is no end of it, the save says why.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest

from support import pace
from support.boot import boot
from vmbus.operations import capture
from vmbus.operations.machine import VirtualMachine
from vmbus.testkit.story import finish
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription, load_description
from vmbus.vm.errors import SaveFailed
from vmbus.vm.moments import Moment

ENDLESS: dict[str, Any] = {"count": 0, "window": 8, "size": 20_000, "pace": 0.002, "stall_seconds": 120.0}


@pytest.fixture
def description() -> VmDescription:
    """Its echo provider holds nothing back, so that a round of the guest takes no longer than it must."""
    return load_description(Path(__file__).resolve().parents[2] / "qemu_configs" / "echo.toml")


async def in_rounds(description: VmDescription, programs: Programs) -> tuple[VirtualMachine, int]:
    """A VM whose guest maps, uses and unmaps memory, until it is told to stop."""
    vm = await boot(description, programs)
    try:
        await vm.wait_ready()
        job = int((await vm.call_agent("start", driver="remap", parameters=ENDLESS))["job"])
        while (await vm.control.call("status"))["providers"]["echo"]["tally"]["completed"] < 100:
            assert (await vm.call_agent("poll", job=job))["state"] == "running"
    except BaseException:
        await vm.kill()
        raise
    return vm, job


async def completed(vm: VirtualMachine) -> int:
    return int((await vm.control.call("status"))["providers"]["echo"]["tally"]["completed"])


async def some_rounds(vm: VirtualMachine) -> None:
    """Has memory be copied slowly until the guest has certainly unmapped what was written since the pass began."""
    await vm.monitor.execute("migrate-set-parameters", {"max-bandwidth": 1 << 20})
    wanted = await completed(vm) + 3 * ENDLESS["window"]
    deadline = time.monotonic() + pace.seconds(20)
    while await completed(vm) < wanted:
        assert time.monotonic() < deadline, "the guest did not come through 3 rounds in 20 s"
    await vm.monitor.execute("migrate-set-parameters", {"max-bandwidth": 8 << 30})


async def books(vm: VirtualMachine, job: int) -> dict[str, Any]:
    report = await finish(vm, job)
    result: dict[str, Any] = report["result"]
    assert report["state"] == "finished" and result["verdict"] == "passed", report
    tally = (await vm.control.call("status"))["providers"]["echo"]["tally"]
    assert tally["completed"] == result["completed"] == result["sent"]
    assert not any(tally[kind] for kind in ("lost", "duplicated", "reordered", "corrupted"))
    return result


async def test_unmapped_while_dirty_the_pass_is_repeated_and_converges(
    description: VmDescription, programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How long the guest takes to stop is not what this is about.
    monkeypatch.setattr(capture, "LIVE_ATTEMPTS", 20)

    vm, job = await in_rounds(description, programs)
    passes = 0
    stopping: list[asyncio.Task[Any]] = []

    def watch(phase: str) -> None:
        # The first pass fails; the guest is told to stop in the second, which may fail, too.
        nonlocal passes
        if phase == "ram":
            passes += 1
            if passes == 2:
                stopping.append(asyncio.ensure_future(vm.call_agent("stop", job=job)))

    async def at(moment: Moment) -> None:
        if moment is Moment.RAM_COPY and passes == 1:
            await some_rounds(vm)

    async with vm:
        report = await vm.save(tmp_path / "s", live=True, keep=True, progress=watch, at=at)
        await stopping[0]
        assert 2 <= report.attempts == passes
        result = await books(vm, job)
        print(f"saved at attempt {report.attempts}, {result['rounds']} rounds, {result['unmapped']} pieces unmapped")
    async with await VirtualMachine.restore(tmp_path / "s", programs) as vm:
        await books(vm, job)


async def test_unmapped_while_dirty_without_end_is_said_and_the_source_runs_on(
    description: VmDescription, programs: Programs, tmp_path: Path
) -> None:
    vm, job = await in_rounds(description, programs)

    async def at(moment: Moment) -> None:
        if moment is Moment.RAM_COPY:
            await some_rounds(vm)

    async with vm:
        with pytest.raises(
            SaveFailed, match=r"the guest unmapped .*, written by us.*attempt 3 of 3.*the VM runs on"
        ) as caught:
            await vm.save(tmp_path / "s", live=True, keep=True, at=at)
        print(f"given up: {caught.value}")
        assert caught.value.source_alive and await vm.monitor.running() and not os.listdir(tmp_path)  # noqa: PTH208
        # Stopped, nothing can be unmapped, and nothing is written behind QEMU's back.
        report = await vm.save(tmp_path / "stopped", live=False, keep=True)
        assert report.attempts == 1
        await vm.call_agent("stop", job=job)
        await books(vm, job)
        assert (await vm.save(tmp_path / "live", live=True, keep=True)).attempts == 1
    async with await VirtualMachine.restore(tmp_path / "stopped", programs) as vm:
        await vm.call_agent("stop", job=job)
        await books(vm, job)
