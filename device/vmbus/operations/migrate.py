"""Live migration: a running VM moves to a destination that waits, and what is decided about it if that is in doubt.

The protocol between both sides is `vmbus.operations.migration`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vmbus.errors import UsageError
from vmbus.operations.migration.accept import EVERYTHING, Accept
from vmbus.operations.migration.address import parse_address
from vmbus.operations.migration.arrival import Arrival
from vmbus.operations.migration.asking import ASK_TIMEOUT
from vmbus.operations.migration.channel import NO_SECRET
from vmbus.operations.migration.destination import GO_TIMEOUT, Destination
from vmbus.operations.migration.listener import Listener
from vmbus.operations.migration.messages import Prepare
from vmbus.operations.migration.report import MigrationReport
from vmbus.operations.migration.source import Source
from vmbus.operations.migration.tls import Tls
from vmbus.operations.restore import RestoreReport
from vmbus.operations.stream import StreamSettings
from vmbus.operations.vm import Vm, alone, operation
from vmbus.util.patience import patient
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.moments import NO_SABOTAGE, Hook, Sabotage, no_hook
from vmbus.vm.run_directory import RunDirectory
from vmbus.vm.timing import Progress

if TYPE_CHECKING:
    from vmbus.operations.machine import VirtualMachine


@operation("migrate")
async def migrate(
    vm: Vm,
    address: str,
    secret: bytes = NO_SECRET,
    *,
    tls: Tls | None = None,
    multifd: int = 0,
    timeout: float | None = None,
    downtime_limit: int | None = None,
    bandwidth: int | None = None,
    progress: Progress | None = None,
    at: Hook = no_hook,
    silence: float | None = None,
    ask_timeout: float = ASK_TIMEOUT,
    sabotage: Sabotage = NO_SABOTAGE,
) -> MigrationReport:
    """Moves the running VM to the destination that waits at `address` (``tcp:HOST:PORT`` or ``unix:PATH``).

    `secret` is the 32 bytes that both sides know; it may be left out with `tls` (`vmbus.operations.migration.tls`).
    `multifd` connections are used for memory besides the main one. `timeout` bounds the copy of memory in seconds,
    `downtime_limit` is what QEMU plans for its last pass in milliseconds, `bandwidth` the most that it sends in bytes
    per second. When this returns, the VM runs there and has ended here.

    Raises `UsageError` if another operation is under way; `MigrateFailed`, whose `source_alive` tells whether the VM
    runs on as before; and `MigrationInDoubt`: then it stays stopped until `resolve`.
    """
    stream = StreamSettings(
        multifd=multifd,
        timeout=timeout or _copy_timeout(vm.description.memory_mib, bandwidth),
        downtime_limit=downtime_limit,
        bandwidth=bandwidth,
    )
    vm.departure = Source(
        vm, parse_address(address), secret, tls, stream=stream, progress=progress, at=at, silence=silence,
        ask_timeout=ask_timeout, sabotage=sabotage,
    )  # fmt: skip
    with vm.own_migration():
        return await vm.departure.run()


def _copy_timeout(memory_mib: int, bandwidth: int | None) -> float:
    """Seconds for the copy of memory: 2 MiB/s, or three times what the bandwidth allows for, should that be longer."""
    allowed = 0.0 if bandwidth is None else 3 * (memory_mib << 20) / bandwidth
    return patient(60.0 + max(memory_mib / 2, allowed))


async def resolve(vm: Vm, *, run: bool | None) -> None:
    """Decides about a migration in doubt: the VM runs on here, or it ends here since it runs at the destination; None
    asks the destination, and does what it says.

    Whoever lets it run has to be sure that it does not run there. Once made, a decision is carried out to its end;
    making it again changes nothing. Raises `UsageError` if nothing is in doubt, `MigrationInDoubt` if the destination
    cannot say, `MigrateFailed` if it cannot be set running again.
    """
    if vm.departure is None:
        raise UsageError(f"no migration of VM {vm.name!r} is in doubt")
    async with alone(vm):
        await vm.departure.resolve(run=run)


async def receive(
    make: type[VirtualMachine],
    listener: Listener,
    programs: Programs,
    run_directory: RunDirectory | None = None,
    *,
    timeout: float | None = None,
    progress: Progress | None = None,
    at: Hook = no_hook,
    silence: float | None = None,
    go_timeout: float = GO_TIMEOUT,
    ask_timeout: float = ASK_TIMEOUT,
    audit: Path | None = None,
    stream_port: int = 0,
    accept: Accept = EVERYTHING,
) -> VirtualMachine:
    """Waits on `listener` for a VM that migrates here, at most `timeout` seconds (None: as long as it takes), and
    returns when it runs; `vm.restored` has the report.

    The kernel and the initramfs of the source are used: those of `programs` if they are the same, else they are sent.
    QEMU's stream comes to a TCP port of its own, `stream_port` (0: any that is free), unless the listener's address is
    a unix socket; with TLS it comes to the listener's own. `accept` says what is taken. Serves one migration; the
    listener belongs to it, and is closed when the source has ended its VM.
    Raises `WaitTimeout` if nobody comes, and `MigrateFailed`; nothing is left behind then.
    """
    machines: list[VirtualMachine] = []
    directories = [] if run_directory is None else [run_directory]

    def claim(description: VmDescription) -> Path:
        if not directories:
            directories.append(RunDirectory.create(description.name))
        return directories[0].room("arrival")

    def build(prepare: Prepare, kernel: Path | None, initramfs: Path | None, host: str | None) -> Arrival:
        accelerator = prepare.machine.accelerator
        own = dataclasses.replace(programs, kernel=kernel, initramfs=initramfs, accelerator=accelerator)
        machines.append(make(prepare.vm, own, directories[0], audit=audit, like=prepare.machine))
        machines[0].disks = prepare.disks
        return Arrival(machines[0], host, stream_port)

    destination = Destination(
        listener, programs, claim, build, progress=progress, at=at, silence=silence, go_timeout=go_timeout,
        ask_timeout=ask_timeout, accept=accept,
    )  # fmt: skip
    try:
        await destination.run(timeout)
    except BaseException:
        for vm in machines:
            await vm.kill()
        for directory in directories:
            directory.remove()
        raise
    (vm,) = machines
    restored = destination.restored
    assert restored is not None
    vm.phases = destination.phases.seconds
    vm.restored = RestoreReport(
        directory=f"migration {destination.migration} from {destination.source}",
        phases=vm.phases,
        running_at=destination.running_at,
        packets=msgspec.structs.asdict(restored.packets),
        channels=restored.channels,
        pci_writes=restored.pci_writes,
        paused=destination.paused,
    )
    vm.background(destination.stay())
    return vm
