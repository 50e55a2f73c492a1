"""A guest of one's own, as a VM is started with it: see `vmbus.vm.own_guest`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vmbus.errors import StateError, os_error
from vmbus.snapshot.manifest import INITRAMFS, KERNEL
from vmbus.util.copying import copy_file
from vmbus.util.interruptible import in_thread
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.own_guest import check_boot_files
from vmbus.vm.run_directory import RunDirectory


async def with_own_boot_files(description: VmDescription, programs: Programs, directory: RunDirectory) -> Programs:
    """The programs with what this VM boots.

    A kernel and an initrd of one's own are copied into the run directory: somebody builds the next ones while the VM
    runs, and a save, a migration and a reboot are to have those that it was started with. Raises EnvironmentProblem.
    """
    own = description.mine
    check_boot_files(own)

    async def kept(file: str | None, name: str, ours: Path | None) -> Path | None:
        if file is None:
            return ours
        target = directory.room("boot") / name
        with os_error(f"cannot copy {file}"):
            await in_thread(lambda stop: copy_file(Path(file), target, stop=stop))
        return target

    return dataclasses.replace(
        programs,
        kernel=await kept(own.kernel, KERNEL, programs.kernel if own.has_kernel else None),
        initramfs=await kept(own.initrd, INITRAMFS, programs.initramfs if own.has_initramfs else None),
    )


def require_trust(description: VmDescription, whose: str, *, trust: bool) -> None:
    """Raises StateError if a VM that comes from elsewhere has arguments for QEMU that nobody here has asked for: QEMU
    does anything that its user may do."""
    if description.mine.qemu_args and not trust:
        shown = " ".join(description.mine.qemu_args)
        raise StateError(f"{whose} brings arguments for QEMU: {shown}; --trust says that you want them")
