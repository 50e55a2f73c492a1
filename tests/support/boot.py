"""Booting a guest for a test: by default every one is saved and restored once, right after its boot.

So whatever a VM test is about, it is about a VM that has been through a save and a restore, in other processes than
those that booted it. A test that must not have this calls `VirtualMachine.launch` itself, and says why in a comment of
the form `as booted: REASON` on the same line (tests/unit/test_vm_boot.py looks for it).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from vmbus.operations.machine import VirtualMachine
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.run_directory import RunDirectory

seconds: list[float] = []
"""What each save and restore has taken, for the summary of a test run."""


async def boot(
    description: VmDescription,
    programs: Programs,
    run_directory: RunDirectory | None = None,
    *,
    audit: Path | None = None,
) -> VirtualMachine:
    """A VM whose guest's agent answers, saved live and restored since. Raises what these raise."""
    vm = await VirtualMachine.launch(description, programs, run_directory, audit=audit)
    with tempfile.TemporaryDirectory(prefix="vmbus-boot-") as directory:
        snapshot = Path(directory) / "booted"
        async with vm:
            await vm.wait_ready()
            start = time.monotonic()
            await vm.save(snapshot, live=True)
        vm = await VirtualMachine.restore(snapshot, programs, audit=audit)
        try:
            await vm.wait_ready()
        except BaseException:
            await vm.kill()
            raise
        # The same files as those in the snapshot, which is going now.
        vm.programs = programs
    seconds.append(time.monotonic() - start)
    return vm
