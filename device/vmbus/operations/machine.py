"""A virtual machine as its owner has it: one instance, and what can be done with it.

`VirtualMachine.launch` starts one, `restore` brings one back from a snapshot (`clones`: several), `receive` takes one
that migrates here.
"""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Self

import msgspec

from vmbus.operations import checkpoint as noting
from vmbus.operations import clone as cloning
from vmbus.operations import migrate as moving
from vmbus.operations import own_disks
from vmbus.operations import restore as restoring
from vmbus.operations import revert as reverting
from vmbus.operations import save as saving
from vmbus.operations import stop as stopping
from vmbus.operations.image import Image
from vmbus.operations.migration.source import Source
from vmbus.operations.own_guest import with_own_boot_files
from vmbus.operations.restore import RestoreReport
from vmbus.qemu.instance import Instance
from vmbus.snapshot.manifest import Machine
from vmbus.vm.command_line import Programs, with_available_driver
from vmbus.vm.description import VmDescription
from vmbus.vm.root import prepare_root
from vmbus.vm.run_directory import RunDirectory
from vmbus.vm.timing import Phases, Progress


class VirtualMachine(Instance):
    """One VM. Use `launch`, `restore` or `receive`; end it with `shutdown` or `kill`, or use it as an async context
    manager.

    Attributes for tools and tests, besides an `Instance`'s: `phases` (seconds of the launch or restore), `restored`
    (the report, after a restore or a migration), `notice` (a sentence for people, if the VM is not quite what its
    description says), `moved_to` (where it went, once a migration has succeeded: it has ended here then).
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.notice = ""
        self.restored: RestoreReport | None = None
        self.phases: dict[str, float] = {}
        self.moved_to: str | None = None
        self.departure: Source | None = None
        self.images: dict[Path, Image] = {}

    @classmethod
    async def launch(
        cls,
        description: VmDescription,
        programs: Programs,
        run_directory: RunDirectory | None = None,
        *,
        progress: Progress | None = None,
        audit: Path | None = None,
        capture: Path | None = None,
        external: int | None = None,
        like: Machine | None = None,
        gdb: str | None = None,
    ) -> Self:
        """Starts a VM from power-on and returns when it runs (the guest is then still booting; see `wait_ready`).

        `external` is how much a `capture` copies of each packet's external data, in bytes. The VM owns `run_directory`
        (made if not given) from here on. `like` is for machines as they were made once: to revert them to checkpoints
        of that time. `gdb` is as in `vmbus.vm.own_guest.OwnGuest`, and in the place of the
        description's. Raises `EnvironmentProblem` or `WaitTimeout`; nothing is left behind then.
        """
        directory = run_directory or RunDirectory.create(description.name)
        try:
            description, notice = with_available_driver(description, programs)
            await prepare_root(description, programs.debian)
            if description.own is not msgspec.UNSET:
                gdb = gdb or description.own.gdb
                description = msgspec.structs.replace(
                    description, own=msgspec.structs.replace(description.own, gdb=None)
                )
                programs = await with_own_boot_files(description, programs, directory)
            disks = await own_disks.found(description)
        except BaseException:
            directory.remove()
            raise
        vm = cls(description, programs, directory, audit=audit, capture=capture, external=external, like=like, gdb=gdb)
        vm.notice = notice
        vm.disks = disks
        phases = Phases(progress)
        return await vm.come_up(phases, vm.start(phases))

    async def come_up(self, phases: Phases, work: Awaitable[None]) -> Self:
        """The VM, when `work` has brought it up; if that fails, nothing is left behind."""
        try:
            await work
        except BaseException:
            await self.kill()
            raise
        self.phases = phases.seconds
        return self

    @property
    def in_doubt(self) -> bool:
        """Whether the VM stands still until `resolve`."""
        return self.departure is not None and self.departure.in_doubt

    restore = classmethod(restoring.restore)
    clones = classmethod(cloning.clone)
    receive = classmethod(moving.receive)
    save = saving.save
    checkpoint = noting.checkpoint
    checkpoints = noting.checkpoints
    delete_checkpoint = noting.delete_checkpoint
    revert = reverting.revert
    migrate = moving.migrate
    resolve = moving.resolve
    power_off = stopping.power_off
