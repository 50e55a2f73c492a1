"""A guest driver that is killed in mid-traffic, and its successor."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.boot import boot
from vmbus.operations.machine import VirtualMachine
from vmbus.testkit.story import Story, until_in_flight
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription

pytestmark = pytest.mark.vm


STORY = Story(packets=128, echo_count=1_000_000, burst_count=1_000_000)


async def in_traffic(description: VmDescription, programs: Programs) -> tuple[VirtualMachine, int]:
    vm = await boot(description, programs)
    try:
        await vm.wait_ready()
        job = int((await vm.call_agent("start", driver="mixed", parameters=STORY.workloads()))["job"])
        await until_in_flight(vm, job, STORY)
    except BaseException:
        await vm.kill()
        raise
    return vm, job


async def test_a_guest_driver_killed_in_mid_traffic_and_started_again(
    demo_description: VmDescription, programs: Programs
) -> None:
    results = []
    vm, job = await in_traffic(demo_description, programs)
    async with vm:
        for _ in range(3):
            report = await vm.call_agent("kill", job=job)
            assert report["state"] == "killed", report
            pid = vm.children[0].process.pid
            for driver in ("echo", "burst"):
                done = await vm.call_agent(
                    "run", driver=driver, parameters={"count": 1000, "window": 128}, timeout=60.0
                )
                results.append(done["result"])
            status = await vm.control.call("status")
            assert status["pid"] == pid, "the server is another process"
            assert status["packets"] == {"queued": 0, "sent": 0}
            job = int((await vm.call_agent("start", driver="mixed", parameters=STORY.workloads()))["job"])
            await until_in_flight(vm, job, STORY)
    results = results
    print(f"{len(results)} runs after 3 kills: {results}")
    assert all(result["verdict"] == "passed" and result["completed"] == 1000 for result in results)


async def test_a_vm_saved_after_its_guest_driver_was_killed(
    demo_description: VmDescription, programs: Programs, tmp_path: Path
) -> None:
    """The guest unmaps a dead driver's memory lazily: pages of the saved device are gone at the restore."""

    vm, job = await in_traffic(demo_description, programs)
    async with vm:
        await vm.call_agent("kill", job=job)
        saved = await vm.save(tmp_path / "snapshot")
    results = []
    async with await VirtualMachine.restore(tmp_path / "snapshot", programs) as vm:
        status = await vm.control.call("status")
        for driver in ("echo", "burst"):
            parameters = {"count": 1000, "window": 128}
            done = await vm.call_agent("run", driver=driver, parameters=parameters, timeout=60.0)
            results.append(done["result"])
    (packets, status, results) = saved.packets, status, results
    print(f"saved with {packets} of a dead driver; after the restore {status['packets']}, new drivers: {results}")
    assert status["packets"] == {"queued": 0, "sent": 0}
    assert all(result["verdict"] == "passed" and result["completed"] == 1000 for result in results)
