"""An owner of a VM that a test of the failure matrix kills: ``python -m support.matrix_owner WHAT``.

WHAT is an `Errand` as JSON. It prints a line ``ready`` when its VM runs, waits for a line on standard input, performs
the operation, and prints the name of each moment that it reaches; at the errand's moment it stays for ever. When all is
done it prints ``done``, or ``failed MESSAGE``.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec

from support import pace
from support.failure_matrix import Operation
from vmbus.errors import VmbusError
from vmbus.operations.machine import VirtualMachine
from vmbus.operations.migration.address import parse_address
from vmbus.operations.migration.listener import listen
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.moments import Moment

TAG = "before"


class Errand(msgspec.Struct):
    """What to do. `receive`: as the destination of a migration. `halt`: the moment at which it stays."""

    operation: Operation
    programs: Programs
    description: VmDescription
    folder: str
    """Of the snapshot, or of the checkpoints."""
    address: str = ""
    secret: str = ""
    receive: bool = False
    halt: Moment | None = None


async def perform(errand: Errand) -> None:
    async def at(moment: Moment) -> None:
        print(moment.name, flush=True)
        if moment is errand.halt:
            await asyncio.Event().wait()

    folder = Path(errand.folder)
    secret = bytes.fromhex(errand.secret)
    if errand.receive:
        listener = await listen(parse_address(errand.address), secret)
        print("ready", flush=True)
        vm = await VirtualMachine.receive(listener, errand.programs, timeout=pace.seconds(60), at=at)
    elif errand.operation is Operation.RESTORE:
        print("ready", flush=True)
        vm = await VirtualMachine.restore(folder, errand.programs, at=at)
    else:
        vm = await VirtualMachine.launch(errand.description, errand.programs)
        if errand.operation is Operation.REVERT:
            await vm.call_agent("freeze")
            await vm.checkpoint(TAG, directory=folder)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        match errand.operation:
            case Operation.SAVE:
                await vm.save(folder, at=at)
            case Operation.LIVE_SAVE:
                await vm.save(folder, live=True, keep=True, at=at)
            case Operation.CHECKPOINT:
                await vm.checkpoint(TAG, directory=folder, at=at)
            case Operation.REVERT:
                await vm.revert(TAG, directory=folder, at=at)
            case Operation.MIGRATE:
                await vm.migrate(errand.address, secret, at=at)
    print("done", flush=True)
    await vm.wait_ended()


if __name__ == "__main__":
    try:
        errand = msgspec.json.decode(sys.argv[1], type=Errand, dec_hook=lambda kind, value: kind(value))
        asyncio.run(perform(errand))
    except VmbusError as error:
        print("failed", " ".join(str(error).split()), flush=True)
        sys.exit(1)
