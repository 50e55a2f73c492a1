"""A guest driver that is killed in mid-traffic, and its successors: in the same server, and after a save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.boot import in_traffic
from vmbus.operations.machine import VirtualMachine
from vmbus.testkit.story import Story, until_in_flight
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription

STORY = Story(packets=128, echo_count=1_000_000, burst_count=1_000_000)


async def successors(vm: VirtualMachine) -> None:
    for driver in ("echo", "burst"):
        parameters: dict[str, Any] = {"count": 1000, "window": 128}
        result = (await vm.call_agent("run", driver=driver, parameters=parameters, timeout=60.0))["result"]
        print(f"after the driver was killed: {result}")
        assert result["verdict"] == "passed" and result["completed"] == 1000
    assert (await vm.control.call("status"))["packets"] == {"queued": 0, "sent": 0}


async def test_a_guest_driver_killed_in_mid_traffic_and_its_successors(
    demo_description: VmDescription, programs: Programs, tmp_path: Path
) -> None:
    """The guest unmaps a dead driver's memory lazily: pages of the saved device are gone at the restore."""
    vm, job = await in_traffic(demo_description, programs, STORY)
    async with vm:
        pid = vm.children[0].process.pid
        assert (await vm.call_agent("kill", job=job))["state"] == "killed"
        await successors(vm)
        assert (await vm.control.call("status"))["pid"] == pid, "the server is another process"
        job = int((await vm.call_agent("start", driver="mixed", parameters=STORY.workloads()))["job"])
        await until_in_flight(vm, job, STORY)
        await vm.call_agent("kill", job=job)
        saved = await vm.save(tmp_path / "snapshot")
    print(f"saved with {saved.packets} of a dead driver")
    async with await VirtualMachine.restore(tmp_path / "snapshot", programs) as vm:
        assert (await vm.control.call("status"))["packets"] == {"queued": 0, "sent": 0}
        await successors(vm)
