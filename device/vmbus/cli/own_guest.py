"""The options of `run-vm` for a guest of one's own, and the description with them. See docs/own-guest.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from vmbus.errors import UsageError
from vmbus.operations.machine import VirtualMachine
from vmbus.util.explaining import complaint
from vmbus.vm.description import VmDescription
from vmbus.vm.own_disks import check_disks
from vmbus.vm.own_guest import OwnGuest, check_boot_files, parse_disk, parse_nic

F = TypeVar("F", bound=Callable[..., Any])


def _checked_gdb(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        _own_guest({"gdb": value})
    return value


def _own_guest(values: Mapping[str, Any]) -> OwnGuest:
    """Raises UsageError that names the option."""
    try:
        return msgspec.convert(values, OwnGuest)
    except msgspec.ValidationError as error:
        field, what = complaint(error, OwnGuest)
        option = f"--{field.partition('[')[0].replace('_', '-').rstrip('s')}: " if field else ""
        raise UsageError(f"{option}{what}") from error


_GDB = click.option(
    "--gdb",
    metavar="socket|PORT",
    callback=_checked_gdb,
    help="Let gdb in, at gdb.sock in the VM's directory or 127.0.0.1:PORT.",
)
_OPTIONS = (
    click.option(
        "--kernel", metavar="FILE", help="Boot this kernel instead of ours; with --initrd or a root of yours."
    ),
    click.option("--initrd", metavar="FILE", help="Boot with this initramfs instead of ours."),
    click.option("--append", metavar="TEXT", help="Your kernel's whole command line; or more words for ours."),
    click.option("--memory", metavar="SIZE", help="Guest memory: MiB, or with a unit, such as 2G."),
    click.option("--cpus", type=click.IntRange(1, 64), metavar="N", help="Virtual CPUs."),
    click.option("--machine", metavar="TYPE[,KEY=VALUE]...", help="QEMU's machine: q35, pc-q35-10.2, with properties."),
    click.option("--cpu", metavar="MODEL[,FEATURE]...", help="QEMU's CPU model (default: qemu64)."),
    click.option(
        "--disk",
        "disks",
        multiple=True,
        metavar="FILE[,KEY=VALUE]...",
        help="A disk of QEMU's, raw or *.qcow2; without a kernel it is booted. Keys: format, bus, snapshot, read_only.",
    ),
    click.option(
        "--nic",
        "nics",
        multiple=True,
        metavar="user[,hostfwd=RULE]...",
        help="A network card on QEMU's user-mode network. hostfwd=tcp::2222-:22 leads a port of this host into it.",
    ),
    click.option(
        "--qemu-arg",
        "qemu_args",
        multiple=True,
        metavar="WORD",
        help="One more word for QEMU's command line, as it is.",
    ),
    _GDB,
)

TRUST = click.option(
    "--trust",
    is_flag=True,
    help="The VM is no stranger's: take its arguments for QEMU, and files of this machine that it names.",
)


def own_restore_options(function: F) -> F:
    """The options of a restore; their values come as keywords."""
    disks = click.option(
        "--disks",
        metavar="DIR",
        type=click.Path(path_type=Path, file_okay=False),
        help="Put disks of QEMU's that are in the snapshot there, in the place of where they were.",
    )
    return disks(TRUST(_GDB(function)))


def own_guest_options(function: F) -> F:
    """The options; their values come as keywords."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def check_restore(values: Mapping[str, Any], count: int) -> None:
    """Raises UsageError for options that are not for so many VMs."""
    if count != 1 and (values["disks"] is not None or values["gdb"] is not None):
        raise UsageError("--disks and --gdb are for one VM: each clone has disks of its own, in its own directory")


def look_at_files(description: VmDescription) -> None:
    """Looks at what the VM boots and at its disks, before anything is set up. Raises EnvironmentProblem, UsageError."""
    check_boot_files(description.mine)
    check_disks(description.mine.disks)


def sayings(vm: VirtualMachine, *, drivers: bool) -> list[str]:
    """What is to be said of a VM that has come up, and perhaps is to have test `drivers`."""
    said = []
    if vm.gdb is not None:
        said.append(f"gdb: target remote {vm.paths.gdb if vm.gdb == 'socket' else f'127.0.0.1:{vm.gdb}'}")
    if vm.description.foreign and drivers:
        said.append("test drivers need our agent in the guest, which is your own (docs/guest-package.md)")
    return said


def given(values: Mapping[str, Any]) -> list[str]:
    """The options that were used, as they are called."""
    names = {"disks": "disk", "nics": "nic", "qemu_args": "qemu-arg"}
    return [f"--{names.get(key, key)}" for key, value in values.items() if value not in (None, ())]


def with_options(description: VmDescription, values: Mapping[str, Any]) -> VmDescription:
    """The description with what the options say instead; those that may be given several times come in the place of
    the description's, too. Raises UsageError."""
    if not given(values):
        return description
    found = dict(values)
    memory, cpus = found.pop("memory"), found.pop("cpus")
    own = {key: value for key, value in found.items() if value not in (None, ())}
    if "disks" in own:
        own["disks"] = [parse_disk(text) for text in own["disks"]]
    if "nics" in own:
        own["nics"] = [parse_nic(text) for text in own["nics"]]
    more: dict[str, Any] = {}
    if memory is not None:
        more["memory_mib"] = parse_memory(memory)
    if cpus is not None:
        more["cpus"] = cpus
    if own:
        merged = msgspec.to_builtins(description.mine) | msgspec.to_builtins(own)
        more["own"] = _own_guest(merged).below(Path.cwd())
    try:
        # Not replace(): that would believe every value.
        return msgspec.convert(msgspec.to_builtins(description) | msgspec.to_builtins(more), VmDescription)
    except msgspec.ValidationError as error:
        field, what = complaint(error, VmDescription)
        option = {"memory_mib": "--memory", "cpus": "--cpus"}.get(field, field)
        raise UsageError(f"{option}: {what}" if option else what) from error


def parse_memory(text: str) -> int:
    """MiB from such as ``512``, ``512M``, ``2G``. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,6})\s*([MG]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"--memory {text!r} is no size; MiB, or with a unit: 512, 512M, 2G")
    return int(match[1]) << (10 if match[2].upper() == "G" else 0)
