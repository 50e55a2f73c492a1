"""Test driver `function`: the PCI function alone, without a bus on top.

Parameters:

    vendor, device  its ids (default: ours)
    function        which one of several of ours: its name or address (default: the first by address that Linux has not)
    registers       how many 32-bit registers of BAR0 to read
    huge_pages      how many 2 MiB pages to map
"""

from __future__ import annotations

import time
from typing import Any

from vmbus_guest.huge_pages import HUGE_PAGE
from vmbus_guest.testdrivers.context import Context
from vmbus_guest.vfio import DEVICE_ID, VENDOR_ID, VfioFunction, choose_function


def run(context: Context) -> dict[str, Any]:
    """Open, look, map, close. The verdict is "passed" if nothing raised and fresh memory reads as zero."""
    vendor = context.parameters.get("vendor", VENDOR_ID)
    device = context.parameters.get("device", DEVICE_ID)
    which = context.parameters.get("function", "")
    registers = context.parameters.get("registers", 4, minimum=0, maximum=1024)
    huge_pages = context.parameters.get("huge_pages", 1, minimum=0)
    context.parameters.check()
    start = time.monotonic()
    with VfioFunction.open(vendor, device, address=choose_function(which) if which else None) as function:
        opened = time.monotonic() - start
        values = [function.read32(4 * index) for index in range(registers)]
        zeroed = True
        buffers = [function.allocate(HUGE_PAGE) for _ in range(huge_pages)]
        for buffer in buffers:
            zeroed = zeroed and not any(buffer.view[:4096])
            buffer.view[:4] = b"mark"
        for buffer in buffers:
            function.free(buffer)
        command = int.from_bytes(function.read_config(4, 2), "little")
    return {
        "address": function.address,
        "registers": [f"{value:#010x}" for value in values],
        "command": f"{command:#06x}",
        "bar0_size": function.bar0_size,
        "iovas": [f"{buffer.iova:#x}" for buffer in buffers],
        "open_seconds": round(opened, 4),
        "seconds": round(time.monotonic() - start, 4),
        "verdict": "passed" if zeroed else "failed",
    }
