"""A real QEMU is asked who migrates the device."""

from __future__ import annotations

import pytest

from vmbus.operations.machine import VirtualMachine
from vmbus.qemu.probe import require_same
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription

pytestmark = pytest.mark.vm


async def test_stock_qemu_leaves_the_device_to_us(programs: Programs, demo_description: VmDescription) -> None:
    """It does not ask the server, whichever library that has: so all our cures are in force."""
    async with await VirtualMachine.launch(demo_description, programs) as vm:  # as booted: only QEMU is asked
        status = await vm.control.call("status")
        assert status["connected"] and status["driven_by_client"] is False
        assert status["migration"] == {"state": "running", "complete": False}
        await require_same(vm.devices, in_stream=False, what="a snapshot")
        print(f"QEMU {programs.qemu_version}, {status['libvfio_user']}")
