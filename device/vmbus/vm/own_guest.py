"""A guest of one's own: which kernel, disks and machine it has, as a description or the options of `run-vm` say it.

What is said here reaches QEMU's command line, and a snapshot may come from anybody: so each part has a form of its own,
and what can name files or programs of this machine is known by its place (`file`, `qemu_args`). See docs/own-guest.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.util.explaining import explain

T = TypeVar("T")
Format = Literal["raw", "qcow2"]

_File = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f]{1,4095}\Z")]

MACHINE = re.compile(r"(?P<type>q35|pc-q35-\d{1,3}\.\d{1,3})(?P<properties>(?:,[a-z0-9-]+=[^,\s]+)*)\Z")

_OUR_PROPERTIES = {
    "accel": "VMBUS_ACCELERATOR chooses it",
    "append": "it is --append",
    "dtb": "this machine has none",
    "dumpdtb": "this machine has none",
    "firmware": "it is --qemu-arg -bios --qemu-arg FILE",
    "initrd": "it is --initrd",
    "kernel": "it is --kernel",
    "kernel-irqchip": "interrupt remapping decides it",
    "memory-backend": "the device server maps that memory",
    "pflash0": "it is --qemu-arg -bios --qemu-arg FILE",
    "pflash1": "a snapshot would not have it",
    "type": "it comes first, by itself",
}
"""Properties of the machine that are not to be said there, and why."""

_DISK = "a disk that the VM writes to is --disk FILE, or else no snapshot has it"
_OURS = "the save, the restore and the migration decide that"
_ARGUMENTS = {
    **{f"-{name}": f"it is --{name}" for name in ("kernel", "initrd", "append", "cpu")},
    **dict.fromkeys(("-M", "-machine"), "it is --machine"),
    **dict.fromkeys(("-m", "-mem-path", "-mem-prealloc"), "memory is shared with the device server: --memory MIB"),
    "-smp": "it is --cpus N",
    "-gdb": "it is --gdb",
    "-s": "it is --gdb",
    **dict.fromkeys(("-accel", "-enable-kvm"), "VMBUS_ACCELERATOR chooses it"),
    **dict.fromkeys(("-incoming", "-S", "-loadvm", "-only-migratable", "-preconfig", "-no-shutdown"), _OURS),
    **dict.fromkeys(("-daemonize", "-pidfile", "-runas", "-run-with", "-chroot"), "whoever started the VM owns QEMU"),
    **dict.fromkeys(("-readconfig", "-snapshot", "-nodefaults", "-name"), "it would change what is here already"),
    **dict.fromkeys(("-fda", "-fdb", "-hda", "-hdb", "-hdc", "-hdd", "-mtdblock", "-pflash", "-sd"), _DISK),
}
"""Arguments of QEMU's that do not go with what is done here, and what does."""

_READ_ONLY = re.compile(r"""\breadonly=on\b|\bread-only=on\b|"read-only"\s*:\s*true\b""")


class OwnDisk(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A disk of QEMU's own. `file`: absolute, or relative to where the description is."""

    file: _File
    format: Format | msgspec.UnsetType = msgspec.UNSET
    """Not said: ``qcow2`` if the file's name ends so, else ``raw``. Never guessed from what a guest wrote into it."""
    bus: Literal["virtio", "sata"] = "virtio"
    read_only: bool = False
    snapshot: Literal["copy", "shared"] = "copy"
    """Whether a snapshot contains it, or refers to it."""

    @property
    def driver(self) -> Format:
        """The format."""
        if self.format is msgspec.UNSET:
            return "qcow2" if self.file.endswith(".qcow2") else "raw"
        return self.format

    @property
    def contained(self) -> bool:
        """Whether a snapshot has its content."""
        return self.snapshot == "copy" and not self.read_only


class OwnNic(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A network card of QEMU's own, behind QEMU's user-mode network."""

    kind: Literal["user"] = "user"
    hostfwd: Annotated[
        list[Annotated[str, msgspec.Meta(pattern=r"^(tcp|udp):[0-9.]*:\d{1,5}-[0-9.]*:\d{1,5}\Z")]],
        msgspec.Meta(max_length=64),
    ] = []
    """Ports of this host that lead into the guest, as QEMU writes them: ``tcp:127.0.0.1:2222-:22``. Without an address
    of the host's it is 127.0.0.1, and not QEMU's 0.0.0.0."""
    model: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,31}\Z")] = "virtio-net-pci"


class OwnGuest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Everything of a guest of one's own; each part may be missing."""

    kernel: _File | None = None
    initrd: _File | None = None
    append: Annotated[str, msgspec.Meta(pattern=r"^[ -~]*\Z", max_length=2047)] | None = None
    machine: Annotated[str, msgspec.Meta(max_length=1024)] | None = None
    cpu: (
        Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]+(,[+-]?[A-Za-z0-9_.=-]+)*\Z", max_length=4096)] | None
    ) = None
    disks: Annotated[list[OwnDisk], msgspec.Meta(max_length=8)] = []
    nics: Annotated[list[OwnNic], msgspec.Meta(max_length=4)] = []
    qemu_args: Annotated[
        list[Annotated[str, msgspec.Meta(pattern=r"^[^\x00]*\Z", max_length=4096)]], msgspec.Meta(max_length=64)
    ] = []
    gdb: Annotated[str, msgspec.Meta(pattern=r"^(socket|[1-9][0-9]{0,4})\Z")] | None = None
    """Where gdb reaches QEMU's stub: ``socket`` in the run directory, or a TCP port of 127.0.0.1. Of this run alone: no
    snapshot has it."""

    def __post_init__(self) -> None:
        if self.by_firmware and self.append is not None:
            raise ValueError(
                "append is for a kernel, and this VM boots a disk by its firmware: give a kernel, too, or leave append "
                "out"
            )
        if self.machine is not None:
            _check_machine(self.machine)
        _check_arguments(self.qemu_args)
        files = [disk.file for disk in self.disks]
        if twice := [file for file in files if files.count(file) > 1]:
            raise ValueError(f"two disks have the file {twice[0]}")
        if self.gdb not in (None, "socket") and int(self.gdb or 0) > 65535:
            raise ValueError(f"gdb = {self.gdb!r} is no TCP port; allowed: socket, or 1 to 65535")

    @property
    def foreign(self) -> bool:
        """Whether what boots is not ours, so that nothing is known of the guest."""
        return bool(self.kernel or self.initrd or self.disks)

    @property
    def by_firmware(self) -> bool:
        """Whether the machine's firmware boots a disk: there is no kernel."""
        return bool(self.disks) and not self.kernel and not self.initrd

    @property
    def has_kernel(self) -> bool:
        """Whether QEMU boots a kernel, ours or another."""
        return not self.by_firmware

    @property
    def has_initramfs(self) -> bool:
        """Whether that kernel gets an initramfs. Ours is for ours alone: its modules fit no other."""
        return bool(self.initrd) or not (self.kernel or self.by_firmware)

    @property
    def machine_type(self) -> str | None:
        """Without its properties."""
        found = MACHINE.match(self.machine or "")
        return found["type"] if found else None

    @property
    def machine_properties(self) -> str:
        """As they follow the type, each behind a comma."""
        found = MACHINE.match(self.machine or "")
        return found["properties"] if found else ""

    def below(self, folder: Path) -> OwnGuest:
        """With absolute files; relative ones are below a folder."""
        return msgspec.structs.replace(
            self,
            kernel=self.kernel and str((folder / self.kernel).absolute()),
            initrd=self.initrd and str((folder / self.initrd).absolute()),
            disks=[msgspec.structs.replace(one, file=str((folder / one.file).absolute())) for one in self.disks],
        )


def _check_machine(text: str) -> None:
    found = MACHINE.match(text)
    if found is None:
        raise ValueError(
            f"machine = {text!r}; allowed: q35 or pc-q35-VERSION, and properties behind it: q35,smm=off (the device is "
            "made for this family of machines)"
        )
    for word in found["properties"].split(",")[1:]:
        name = word.partition("=")[0]
        if name in _OUR_PROPERTIES:
            raise ValueError(f"machine = {text!r}: not its {name}: {_OUR_PROPERTIES[name]}")


def _check_arguments(arguments: list[str]) -> None:
    if arguments and not arguments[0].startswith("-"):
        raise ValueError(f"the first argument for QEMU, {arguments[0]!r}, is no option of QEMU's: those begin with '-'")
    for word, value in zip(arguments, [*arguments[1:], ""], strict=False):
        name = word.removeprefix("-") if word.startswith("--") else word
        if name in _ARGUMENTS:
            raise ValueError(f"{word} does not go as an argument for QEMU: {_ARGUMENTS[name]}")
        if name in ("-drive", "-blockdev") and not _READ_ONLY.search(value):
            raise ValueError(f"{word} {value} does not go as an argument for QEMU, unless read-only: {_DISK}")


def parse_disk(text: str) -> OwnDisk:
    """A disk as ``FILE[,format=F][,bus=B][,snapshot=S][,read_only]``; a comma in the file's name is doubled. Raises
    UsageError."""
    file, words = _split(text)
    values: dict[str, object] = dict(_pairs("--disk", words, switches=("read_only",)))
    if "read_only" in values:
        values["read_only"] = values["read_only"] == "on"
    return _converted(f"--disk {text}", {"file": file, **values}, OwnDisk)


def parse_nic(text: str) -> OwnNic:
    """A card as ``user[,hostfwd=...][,model=...]``. Raises UsageError."""
    kind, words = _split(text)
    forwards = [word.partition("=")[2] for word in words if word.startswith("hostfwd=")]
    others = _pairs("--nic", [word for word in words if not word.startswith("hostfwd=")])
    return _converted(f"--nic {text}", {"kind": kind, "hostfwd": forwards, **dict(others)}, OwnNic)


def _split(text: str) -> tuple[str, list[str]]:
    """At single commas; a doubled one is one."""
    first, *rest = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
    return first, rest


def _pairs(option: str, words: list[str], switches: tuple[str, ...] = ()) -> Mapping[str, str]:
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals and name in switches:
            value = "on"
        elif not equals:
            raise UsageError(f"{option}: {word!r} is no KEY=VALUE")
        found[name] = value
    return found


def _converted(what: str, values: dict[str, object], kind: type[T]) -> T:
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"{what}: {explain(error, kind)}") from error


def hostfwd(rule: str) -> str:
    """A rule as QEMU is given it: without an address, only this host may use the port."""
    protocol, address, rest = rule.split(":", 2)
    return f"{protocol}:{address or '127.0.0.1'}:{rest}"


def check_boot_files(own: OwnGuest) -> None:
    """Raises EnvironmentProblem if the kernel or the initrd cannot be read."""
    for what, name in (("kernel", own.kernel), ("initrd", own.initrd)):
        if name is None:
            continue
        path = Path(name)
        if not path.is_file():
            raise EnvironmentProblem(f"there is no {what} {path}" if not path.exists() else f"{path} is no file")
        if not os.access(path, os.R_OK):
            raise EnvironmentProblem(f"the {what} {path} cannot be read by you")
