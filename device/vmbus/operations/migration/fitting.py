"""Whether the VM that a source sends can run here, and the files that it boots from."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Literal

from vmbus.errors import StateError, VmbusError
from vmbus.operations.migration.files import receive_file, record_of
from vmbus.operations.migration.link import Link
from vmbus.operations.migration.messages import Prepare, State, Wanted
from vmbus.snapshot.manifest import INITRAMFS, KERNEL, VENDOR_DEVICE, FileRecord, check_functions
from vmbus.util.interruptible import Stop, in_thread
from vmbus.vm.command_line import Programs, runs_under, serves_machine
from vmbus.vm.description import VmDescription


def check_machine(prepare: Prepare, programs: Programs, source: str) -> None:
    """Raises `StateError` unless such a VM can run on this machine."""
    machine = prepare.machine
    if machine.foreign != programs.foreign:
        raise StateError(
            f"{source} sends a VM whose QEMU somebody else started: receive it with scripts/attach --receive"
            if machine.foreign
            else f"{source} sends a VM of ours, and no other QEMU takes it: receive it with scripts/run-vm --receive"
        )
    if not programs.foreign and not serves_machine(programs.qemu_version, machine.type):
        raise StateError(
            f"{source} sends a VM of machine {machine.type} (QEMU {prepare.versions.qemu}), which the QEMU here is too "
            f"old for ({programs.qemu_version}): use that one or a later one (VMBUS_QEMU)"
        )
    if not runs_under(machine.accelerator, programs):
        raise StateError(
            f"{source} sends a VM that runs under {machine.accelerator}; it cannot run under {programs.accelerator}, "
            "which is used here (VMBUS_ACCELERATOR)"
        )
    check_functions(machine, prepare.vm, source)
    if any(config[:4] != VENDOR_DEVICE for config in machine.configs):
        raise StateError(f"{source} sends a VM with another PCI device than 5642:4d56")


def check_driven(source: str, *, there: bool, here: bool) -> None:
    """Raises `StateError` unless QEMU treats the device here as it does at the source, where nothing has been done to
    the VM yet. What one has in its stream the other would not look for."""
    if there != here:
        ways = {True: "QEMU migrates the device itself", False: "QEMU leaves the device to the device server"}
        raise StateError(
            f"at {source} {ways[there]}, and here {ways[here]}: the device's state would be lost between them; use the "
            "QEMU and the libvfio-user of the source (VMBUS_QEMU, VMBUS_LIBVFIO_USER)"
        )


def check_states(state: State, vm: VmDescription, source: str) -> None:
    """Raises `StateError` unless there is a state for each device."""
    if len(state.states) != len(vm.slots):
        raise StateError(f"{source} sends the states of {len(state.states)} devices; the VM has {len(vm.slots)}")


async def boot_files(
    link: Link, prepare: Prepare, programs: Programs, folder: Path, destination: str
) -> tuple[Path | None, Path | None]:
    """The source's kernel and initramfs: ours if they are the same, else received into the folder. `destination`: who
    we are, for the source."""
    files: dict[Literal["kernel", "initramfs"], tuple[Path | None, FileRecord | None, str]] = {
        "kernel": (programs.kernel, prepare.kernel, KERNEL),
        "initramfs": (programs.initramfs, prepare.initramfs, INITRAMFS),
    }
    found: dict[str, Path | None] = {}
    wanted: dict[Literal["kernel", "initramfs"], FileRecord] = {}
    for what, (ours, record, name) in files.items():
        found[what] = None
        if record is not None:
            same = ours is not None and await in_thread(functools.partial(_is, ours, record))
            found[what] = ours if same else folder / name
            if not same:
                wanted[what] = record
    await link.send(Wanted(files=list(wanted), destination=destination))
    for what, record in wanted.items():
        await receive_file(link, record, folder / files[what][2])
    return found["kernel"], found["initramfs"]


def _is(path: Path, record: FileRecord, stop: Stop) -> bool:
    with contextlib.suppress(VmbusError):
        return record_of(path, stop) == record
    return False
