"""Live migration within one process: the VM goes to a second one on this host, and that one is what is left."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import Any

from vmbus.operations.machine import VirtualMachine
from vmbus.operations.migration.address import parse_address
from vmbus.operations.migration.listener import listen
from vmbus.operations.migration.report import MigrationReport
from vmbus.util.patience import patient
from vmbus.vm.command_line import Programs
from vmbus.vm.moments import Hook, no_hook


async def move(
    vm: VirtualMachine,
    address: str = "tcp:127.0.0.1:0",
    *,
    programs: Programs | None = None,
    audit: Path | None = None,
    destination_at: Hook = no_hook,
    **options: Any,
) -> tuple[VirtualMachine, MigrationReport]:
    """Migrate a running VM: the one that it is then, whose guest's agent answers, and the report.

    `programs` are those of the destination (the same, if not given), `options` of `VirtualMachine.migrate`. Raises
    MigrateFailed, whose `source_alive` tells whether the VM runs on as before; nothing of the destination is left then.
    """
    secret = secrets.token_bytes(32)
    listener = await listen(parse_address(address), secret)
    receiving = asyncio.create_task(
        VirtualMachine.receive(
            listener, programs or vm.programs, timeout=patient(60.0), audit=audit, at=destination_at
        ),
        name="destination",
    )
    try:
        report = await vm.migrate(str(listener.address), secret, **options)
        arrived = await receiving
    except BaseException:
        # It learns of the failure by itself; its end is waited for, so that nothing of it is left.
        await asyncio.wait({receiving}, timeout=patient(30.0))
        receiving.cancel()
        await asyncio.wait({receiving})
        if not receiving.cancelled() and receiving.exception() is None:
            await receiving.result().kill()
        raise
    await arrived.wait_ready()
    return arrived, report
