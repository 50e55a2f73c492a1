"""Clones: several VMs from one snapshot that run at the same time, each with disks of its own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from vmbus.operations.restore import restore
from vmbus.vm.command_line import Programs
from vmbus.vm.run_directory import RunDirectory

if TYPE_CHECKING:
    from vmbus.operations.machine import VirtualMachine


async def clone(
    make: type[VirtualMachine],
    directory: Path,
    programs: Programs,
    count: int,
    *,
    name: str | None = None,
    audit: Path | None = None,
    trust: bool = False,
) -> list[VirtualMachine]:
    """So many VMs from the snapshot in `directory`, called `name` (None: as the saved one), with numbers. `trust`: as
    for `restore`.

    Raises what `restore` raises for any of them; the others are ended then.
    """

    async def one() -> VirtualMachine:
        run_directory = None if name is None else RunDirectory.create(name)
        return await restore(make, directory, programs, run_directory, audit=audit, clone=True, trust=trust)

    found = await asyncio.gather(*(one() for _ in range(count)), return_exceptions=True)
    clones = [vm for vm in found if not isinstance(vm, BaseException)]
    for failure in found:
        if isinstance(failure, BaseException):
            for vm in clones:
                await vm.kill()
            raise failure
    return clones
