"""A provider that is added to a running VM is in the snapshot, and is there after the restore."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.boot import boot
from vmbus.operations.machine import VirtualMachine
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription

pytestmark = pytest.mark.vm

NEW = {"kind": "echo", "name": "added", "instance": "00000000-0000-4000-8000-0000000000aa", "options": {"hold": 2}}


async def test_a_hot_added_provider_is_saved(
    programs: Programs, tmp_path: Path, demo_description: VmDescription
) -> None:
    async with await boot(demo_description, programs) as vm:
        await vm.wait_ready()
        await vm.control.call("offer", provider=NEW)
        await vm.control.call("offer", provider={**NEW, "name": "gone", "instance": NEW["instance"][:-1] + "b"})
        await vm.control.call("rescind", name="gone")
        await vm.save(tmp_path / "s")
    async with await VirtualMachine.restore(tmp_path / "s", programs) as vm:
        assert [one.name for one in vm.description.device.providers][-1] == "added"
        status = await vm.control.call("status")
        assert status["description"]["providers"][-1] == NEW
        assert len(status["providers"]) == len(demo_description.device.providers) + 1
        found = await vm.call_agent("run", driver="echo", parameters={"count": 200}, timeout=60.0)
        assert found["result"]["verdict"] == "passed"
        await vm.control.call("rescind", name="added")
        await vm.shutdown()
