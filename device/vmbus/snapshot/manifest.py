"""The manifest of a snapshot: what was saved, by which versions, and the size and digest of every file.

It is JSON in one exact form: whatever decodes but would not be written the same way again is refused, and a digest
over the body stands beside it. So a single changed byte is noticed wherever it is, in the manifest too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from vmbus.errors import StateError
from vmbus.server.files import PREFIX
from vmbus.util.explaining import NAME, explain
from vmbus.vm.description import MOST_DEVICES, VmDescription
from vmbus.vm.own_disks import DiskState

FORMAT = "vmbus-snapshot"
VERSION = 1
"""Version of the snapshot's layout. A reader refuses every other."""

MANIFEST = "manifest.json"
RAM = "ram.qemu"
STATE = "device.state"
KERNEL = "vmlinuz"
INITRAMFS = "initramfs.cpio"

CONTENTS = (RAM, STATE, KERNEL, INITRAMFS)
"""A snapshot's files besides the manifest: QEMU's stream, the device server's state, and what QEMU booted."""


def state_name(index: int) -> str:
    """The file with the state of the device of that number in its VM; the first is 0."""
    return STATE if index == 0 else f"device-{index + 1}.state"


STATES = tuple(map(state_name, range(MOST_DEVICES)))


def contents_of(vm: VmDescription, *, foreign: bool = False) -> tuple[str, ...]:
    """Those of a snapshot of that VM: one that boots a disk has no kernel, and perhaps the disk; what a QEMU that is
    not ours boots (`foreign`), its owner knows."""
    booted = ((KERNEL, vm.mine.has_kernel and not foreign), (INITRAMFS, vm.mine.has_initramfs and not foreign))
    disks = (disk_file(number) for number, disk in enumerate(vm.mine.disks) if disk.contained)
    return (RAM, *STATES[: len(vm.slots)], *(name for name, there in booted if there), *disks)


VENDOR_DEVICE = bytes.fromhex("4256564d")
"""The first bytes of the function's configuration space: vendor 0x5642, device 0x4d56."""

FILE_PREFIX = PREFIX
FILE_NAME = re.compile(rf"file\.{NAME}\.[a-z0-9][a-z0-9_-]{{0,31}}")
"""Files of providers: `file.PROVIDER.NAME`. A snapshot may have any number of them."""


DISK_NAME = re.compile(r"disk\.[0-7]")


def disk_file(number: int) -> str:
    """The file with the content of a disk of one's own."""
    return f"disk.{number}"


def is_content(name: str) -> bool:
    """Whether a snapshot may have a file of this name besides the manifest."""
    return name in (*CONTENTS, *STATES) or any(one.fullmatch(name) for one in (FILE_NAME, DISK_NAME))


_Count = Annotated[int, msgspec.Meta(ge=0)]


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and SHA-256 (hex) of one file."""

    size: _Count
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Packets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Outgoing packets in flight at the save: waiting for room in a ring; in a ring or taken, and not completed."""

    queued: _Count
    sent: _Count


class Versions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    project: str
    qemu: str
    """QEMU's version, e.g. 11.1.3."""
    libvfio_user: str
    """Which library the server ran on; for information."""


_Config = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{512}$")]


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The PCI function of a further device."""

    pci_address: str
    pci_config: _Config


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the RAM stream and the devices' configurations fit."""

    type: str
    """Versioned machine type, e.g. pc-q35-11.1."""
    accelerator: Literal["kvm", "tcg"]
    pci_address: str
    pci_config: _Config
    """The function's configuration space, 256 bytes in hex."""
    device_in_stream: bool = False
    """QEMU migrated the device itself: its stream has the device's state, and the file is a copy."""
    spare_cpus: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    """CPUs that the machine has room for and does not have: see `vmbus.vm.command_line.spare_cpus`."""
    generation_id: bool = False
    """The machine has a device by which the guest notices that it is a copy."""
    foreign: bool = False
    """QEMU was started by somebody else, who knows what it boots and what else is in it."""
    further: Annotated[list[Function], msgspec.Meta(max_length=MOST_DEVICES - 1)] = []
    """The functions of the devices beside the first one, in the order of the description."""

    @property
    def configs(self) -> list[bytes]:
        """The configuration spaces of all devices' functions, the first one's first."""
        return [bytes.fromhex(one) for one in (self.pci_config, *(function.pci_config for function in self.further))]

    def with_configs(self, configs: Sequence[bytes], *, driven: bool = False) -> Machine:
        """With these. `driven`: as `device_in_stream`."""
        further = [
            msgspec.structs.replace(function, pci_config=config.hex())
            for function, config in zip(self.further, configs[1:], strict=True)
        ]
        return msgspec.structs.replace(self, pci_config=configs[0].hex(), further=further, device_in_stream=driven)

    @property
    def bare(self) -> Machine:
        """As it is made: without the functions' configurations, which are the guest's doing."""
        return self.with_configs([b""] * (1 + len(self.further)))

    def __str__(self) -> str:
        parts = [f"{self.type} under {self.accelerator}, its device at {self.pci_address}"]
        parts += [f"another at {function.pci_address}" for function in self.further]
        parts.append(f"spare CPUs: {self.spare_cpus}")
        parts += ["started by somebody else"] * self.foreign
        return ", ".join(parts) + ("" if self.generation_id else ", no generation id")


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything about a snapshot but its bulk."""

    format: str = FORMAT
    version: int = VERSION
    created: str
    """UTC, ISO 8601."""
    live: bool
    """Whether the guest ran on while its memory was copied."""
    vm: VmDescription
    machine: Machine
    versions: Versions
    packets: Packets
    incoming_held: _Count
    """Packets from the guest that providers held when the save began."""
    files: dict[str, FileRecord]
    paused: Literal[True] | msgspec.UnsetType = msgspec.UNSET
    """The vCPUs stood when the save began, and stand after the restore; absent if they ran."""
    disks: list[DiskState] | msgspec.UnsetType = msgspec.UNSET
    """Disks of one's own, in their order, as they were at the save; absent if there are none."""


class _Header(msgspec.Struct):
    format: str
    version: int


class _HeaderFile(msgspec.Struct):
    manifest: _Header


class _File(msgspec.Struct, forbid_unknown_fields=True):
    manifest: Manifest
    sha256: str


def encode_manifest(manifest: Manifest) -> bytes:
    digest = hashlib.sha256(msgspec.json.encode(manifest)).hexdigest()
    return msgspec.json.format(msgspec.json.encode(_File(manifest, digest)), indent=2) + b"\n"


def check_functions(machine: Machine, vm: VmDescription, source: str) -> None:
    """Raises `StateError` unless the machine has a function for each device."""
    there = 1 + len(machine.further)
    if there != len(vm.slots):
        raise StateError(f"{source}: {there} PCI functions for {len(vm.slots)} devices")


def decode_manifest(data: bytes, source: str) -> Manifest:
    """Decodes and checks a manifest file's bytes; `source` names it in errors.

    Raises `StateError` that says what is wrong: not a snapshot, another version, a wrong field, or a changed byte.
    """
    try:
        header = msgspec.json.decode(data, type=_HeaderFile).manifest
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StateError(f"{source} is not a snapshot's manifest: {error}") from error
    if header.format != FORMAT:
        raise StateError(f"{source}: format {header.format!r}, expected {FORMAT!r}")
    if header.version != VERSION:
        raise StateError(f"{source}: snapshot version {header.version}; this program reads version {VERSION} only")
    try:
        found = msgspec.json.decode(data, type=_File)
    except msgspec.ValidationError as error:
        raise StateError(f"{source}: {explain(error)}") from error
    except (UnicodeDecodeError, RecursionError) as error:  # names of fields are not decoded before this
        raise StateError(f"{source} was changed after it was written: {error}") from error
    manifest = found.manifest
    if encode_manifest(manifest) != data:
        raise StateError(f"{source} was changed after it was written: its digest does not match")
    check_functions(manifest.machine, manifest.vm, source)
    needed = contents_of(manifest.vm, foreign=manifest.machine.foreign)
    strange = [name for name in manifest.files if name not in needed and not FILE_NAME.fullmatch(name)]
    if strange or not set(manifest.files) >= set(needed):
        raise StateError(
            f"{source} lists the files {sorted(manifest.files)}; a snapshot has {sorted(needed)}, "
            f"and files of providers are called {FILE_PREFIX}PROVIDER.NAME"
        )
    if len(manifest.disks or []) != len(manifest.vm.mine.disks):
        raise StateError(f"{source} says nothing of some of the VM's disks, or of more than it has")
    if re.fullmatch(r"[0-9A-Za-z._ -]{1,64}", manifest.machine.type) is None:
        raise StateError(f"{source}: {manifest.machine.type!r} is not a machine type")
    return manifest
