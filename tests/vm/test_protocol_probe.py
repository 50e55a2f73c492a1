"""A real QEMU is asked who migrates the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmbus.operations.machine import VirtualMachine
from vmbus.qemu.probe import probe, require_same
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription

pytestmark = pytest.mark.vm


def test_stock_qemu_leaves_the_device_to_us(
    run: Callable[..., Any], programs: Programs, demo_description: VmDescription, tmp_path: Path
) -> None:
    """It does not ask the server, whichever library that has: so all our cures are in force."""

    async def story() -> str:
        async with await VirtualMachine.launch(demo_description, programs) as vm:  # as booted: only QEMU is asked
            status = await vm.control.call("status")
            assert status["connected"] and status["driven_by_client"] is False
            assert status["migration"] == {"state": "running", "complete": False}
            found = await probe(vm.monitor, vm.control)
            assert not found.driven and not found.offered
            await require_same(vm.control, in_stream=False, what="a snapshot")
            return f"QEMU {programs.qemu_version}, {status['libvfio_user']}: {found}"

    print(run(story()))
