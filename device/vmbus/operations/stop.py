"""The end of a VM as its guest would have it: the guest is asked to power off, by its agent or by ACPI's button."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from vmbus.errors import UsageError, VmbusError
from vmbus.util.patience import patient
from vmbus.vm.errors import OperationFailed

if TYPE_CHECKING:
    from vmbus.operations.machine import VirtualMachine

AGENT_SECONDS = 5.0
"""Seconds until the button is pressed as well, if the agent has not answered."""


class StopFailed(OperationFailed):
    """The guest did not power off."""


async def power_off(vm: VirtualMachine, timeout: float = 60.0) -> None:
    """Asks the guest to power off and returns when QEMU has ended, however that came about.

    Raises `UsageError` for a guest that cannot be asked, and `StopFailed` if it runs on after `timeout` seconds.
    """
    kill = f"scripts/stop --kill {vm.name} ends it as it is"
    if vm.ended or vm.qemu is None:
        raise UsageError(f"VM {vm.name!r} has ended: there is nothing to stop")
    if vm.in_doubt:
        raise UsageError(f"VM {vm.name!r} waits for a decision about its migration: scripts/migrate --resolve makes it")
    if not vm.idle.is_set():
        raise UsageError(f"VM {vm.name!r} is being saved or migrated: try again when that is over, or {kill}")
    if not await vm.guard(vm.monitor.running(), "QEMU's run state", 30.0):
        raise UsageError(f"VM {vm.name!r} is paused: its guest hears nothing; {kill}")
    asking = asyncio.create_task(_ask(vm, timeout))
    try:
        if not (await asyncio.wait({vm.qemu.exited}, timeout=timeout))[0]:
            raise StopFailed(
                f"the guest of VM {vm.name!r} did not power off in {timeout:g} s, and runs on; {kill}",
                source_alive=True,
            )
    finally:
        asking.cancel()
        await asyncio.wait({asking})


async def _ask(vm: VirtualMachine, timeout: float) -> None:
    """By the agent, also if it only comes up now; of a guest without one, by the button."""
    agent = asyncio.create_task(_ask_agent(vm, timeout))
    try:
        await asyncio.wait({agent}, timeout=patient(AGENT_SECONDS))
        if not agent.done() or not agent.result():
            with contextlib.suppress(VmbusError):
                await vm.monitor.execute("system_powerdown")
        await agent
    finally:
        agent.cancel()


async def _ask_agent(vm: VirtualMachine, timeout: float) -> bool:
    """Whether the agent has taken the request."""
    with contextlib.suppress(VmbusError):
        await vm.wait_ready(timeout)
        await vm.call_agent("poweroff", timeout=timeout)
        return True
    return False
