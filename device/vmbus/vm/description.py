"""VM descriptions: one TOML file says what machine to build and which devices it gets.

A description names no programs and no files of this machine: those come from the set-up. So a description can be
stored in a snapshot and used on another machine. The exception is a guest of one's own (`vmbus.vm.own_guest`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from vmbus.device.description import DeviceDescription
from vmbus.errors import EnvironmentProblem, UsageError, os_error
from vmbus.places import DESCRIPTIONS
from vmbus.util.explaining import Name, explain
from vmbus.vm.own_guest import OwnGuest

IMAGE_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Names of images in the disk directory."""

MOST_DEVICES = 8
"""VMBus devices of one VM."""

_Slot = Annotated[int, msgspec.Meta(ge=4, le=30)]
_SLOTS = range(4, 31)


class GuestDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The guest's side of a VM description."""

    huge_pages: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 8
    """2 MiB pages that the guest sets aside for rings and buffers of the userspace driver."""
    kernel_arguments: Annotated[
        list[Annotated[str, msgspec.Meta(pattern=r"^[!-~]+$")]], msgspec.Meta(max_length=32)
    ] = []
    """Words added to the guest kernel's command line."""
    services: list[str] = []
    """Empty: there are none any more. Manifests have it."""
    driver: Literal["userspace", "linux", "both"] | msgspec.UnsetType = msgspec.UNSET
    """Who drives the device: programs over VFIO (``userspace``, unless it is said), or Linux's own VMBus drivers
    (``linux``; with ``both``, programs can drive further devices). See docs/linux-guest.md. Left out
    of manifests if it is not said: older ones do not have it."""

    root: Annotated[str, msgspec.Meta(pattern=IMAGE_PATTERN)] | msgspec.UnsetType = msgspec.UNSET
    """The image, in the disk directory, with the root file system that the guest goes on with: a Debian, made if the
    image is not there (docs/debian-guest.md). One of the device's disks has to have it. Left out of manifests as
    above."""

    @property
    def linux(self) -> bool:
        """Whether Linux's own drivers drive the device."""
        return self.driver in ("linux", "both")

    @property
    def vfio(self) -> bool:
        """Whether programs can drive functions over VFIO."""
        return self.driver != "linux"

    def __post_init__(self) -> None:
        if self.services:
            raise ValueError(
                f"guest.services = {self.services}: there are none any more; Linux's own drivers do that, with "
                'guest.driver = "linux"'
            )


class FurtherDevice(DeviceDescription, frozen=True, forbid_unknown_fields=True):
    """A VMBus device beside the first one."""

    slot: _Slot
    """Its PCI device number on bus 0."""


class VmDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A virtual machine: size, devices, and the guest's settings."""

    name: Name
    """Names the running VM for the tools; a second VM of the same name gets a number."""
    device: DeviceDescription
    """The VMBus device and its providers."""
    memory_mib: Annotated[int, msgspec.Meta(ge=128, le=65536, multiple_of=2)] = 256
    """Guest memory in MiB."""
    cpus: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """Virtual CPUs."""
    slot: _Slot = 5
    """PCI device number of the VMBus device on bus 0. The rest belongs to the machine."""
    guest: GuestDescription = GuestDescription()
    own: OwnGuest | msgspec.UnsetType = msgspec.UNSET
    """A guest of one's own instead of ours, and what else of QEMU's is wanted. Left out of manifests as above."""
    devices: Annotated[list[FurtherDevice], msgspec.Meta(max_length=MOST_DEVICES - 1)] | msgspec.UnsetType = (
        msgspec.UNSET
    )
    """Further VMBus devices. Left out of manifests as above."""

    @property
    def mine(self) -> OwnGuest:
        """What is said of one's own guest; nothing, if nothing is."""
        return OwnGuest() if self.own is msgspec.UNSET else self.own

    @property
    def foreign(self) -> bool:
        """Whether what boots is not ours: there may be no agent in the guest."""
        return self.mine.foreign

    def __post_init__(self) -> None:
        for what, values in (
            ("devices in slot", self.slots),
            ("devices called", [one.name for one in self.all_devices]),
            ("providers called", [provider.name for one in self.all_devices for provider in one.providers]),
        ):
            # A tool names a provider without its device.
            if again := [value for value, count in Counter(values).items() if count > 1]:
                raise ValueError(f"there are two {what} {again[0]}")
        if self.foreign and (self.guest.root or self.guest.kernel_arguments):
            raise ValueError(
                "guest.root and guest.kernel_arguments are of our own guest, and 'own' has another one: append is its "
                "kernel's command line"
            )
        if self.foreign:
            return
        # The kernel wants room beside the huge pages; a VM that cannot hold them fails late and obscurely.
        if self.guest.vfio and self.guest.huge_pages * 2 > self.memory_mib // 2:
            raise ValueError(
                f"guest.huge_pages = {self.guest.huge_pages} ({self.guest.huge_pages * 2} MiB) is more than half of "
                f"memory_mib = {self.memory_mib}; allowed: up to {self.memory_mib // 4}"
            )
        if self.further and self.guest.linux and not self.guest.vfio:
            raise ValueError(
                "Linux's own drivers drive the first device alone, and nobody would drive further ones with "
                'guest.driver = "linux"; "both" lets programs do that'
            )

    @property
    def further(self) -> list[FurtherDevice]:
        """The VMBus devices beside the first one."""
        return [] if self.devices is msgspec.UNSET else self.devices

    @property
    def all_devices(self) -> list[DeviceDescription]:
        """The VMBus devices, the first one first."""
        return [self.device, *(DeviceDescription(one.name, one.providers) for one in self.further)]

    @property
    def slots(self) -> list[int]:
        """Their PCI device numbers, in the same order."""
        return [self.slot, *(one.slot for one in self.further)]

    def with_devices(self, devices: Sequence[DeviceDescription]) -> VmDescription:
        """With so described devices in the place of those that it has, in the same slots.

        Raises UsageError if they do not go together: providers that came while it ran may be called like others.
        """
        first, *rest = devices
        further = [FurtherDevice(one.name, one.providers, slot) for one, slot in zip(rest, self.slots[1:], strict=True)]
        try:
            return msgspec.structs.replace(self, device=first, devices=further or self.devices)
        except ValueError as error:
            raise UsageError(f"VM {self.name!r}: {error}") from error


def with_further(vm: VmDescription, others: Sequence[VmDescription]) -> VmDescription:
    """With the devices of other descriptions beside its own. One whose slot or name is taken gets another: the next
    slot that is free, and a number behind its name; so does a provider. Linux's own drivers keep the first device, and
    programs drive the others. Raises UsageError if there are too many."""
    if not others:
        return vm
    guest = msgspec.structs.replace(
        vm.guest,
        driver="both" if vm.guest.linux else vm.guest.driver,
        huge_pages=min(sum(one.guest.huge_pages for one in (vm, *others) if one.guest.vfio), vm.memory_mib // 4),
    )
    devices, slots = list(vm.all_devices), list(vm.slots)
    names = {one.name for one in devices}
    providers = {provider.name for one in devices for provider in one.providers}
    for other in others:
        for device, slot in zip(other.all_devices, other.slots, strict=True):
            renamed = [msgspec.structs.replace(one, name=_free(one.name, providers)) for one in device.providers]
            devices.append(DeviceDescription(_free(device.name, names), renamed))
            slots.append(next(one for one in (*_SLOTS[slot - _SLOTS[0] :], *_SLOTS) if one not in slots))
    if len(devices) > MOST_DEVICES:
        raise UsageError(f"VM {vm.name!r} would have {len(devices)} devices; allowed: {MOST_DEVICES}")
    further = [FurtherDevice(one.name, one.providers, slot) for one, slot in list(zip(devices, slots, strict=True))[1:]]
    try:
        return msgspec.structs.replace(vm, devices=further, guest=guest)
    except ValueError as error:
        raise UsageError(f"VM {vm.name!r}: {error}") from error


def _free(name: str, taken: set[str]) -> str:
    """The name, with a number if it is taken; it is then."""
    numbered = (f"{name[: 31 - len(str(number))]}-{number}" for number in range(2, 10_000))
    found = name if name not in taken else next(one for one in numbered if one not in taken)
    taken.add(found)
    return found


def with_options(vm: VmDescription, options: Mapping[str, Mapping[str, Any]]) -> VmDescription:
    """With further options of providers, by their names, in the place of those that it has.

    Raises UsageError for a name that it does not have.
    """
    if unknown := sorted(set(options) - {one.name for device in vm.all_devices for one in device.providers}):
        raise UsageError(f"there is no provider {', '.join(unknown)}, whose options were to be others")
    return vm.with_devices(
        [
            DeviceDescription(
                device.name,
                [
                    msgspec.structs.replace(one, options={**one.options, **options.get(one.name, {})})
                    for one in device.providers
                ],
            )
            for device in vm.all_devices
        ]
    )


def parse_description(data: str | bytes, source: str) -> VmDescription:
    """Decodes a VM description from TOML text; `source` names it in errors.

    Raises `UsageError` that names the source, the field, and what is allowed there.
    """
    try:
        return msgspec.toml.decode(data, type=VmDescription)
    except msgspec.ValidationError as error:
        raise UsageError(f"{source}: {explain(error, VmDescription)}") from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise UsageError(f"{source}: not TOML: {error}") from error


def load_description(path: Path) -> VmDescription:
    """Reads a VM description from a TOML file; the files that it names are relative to it.

    Raises `EnvironmentProblem` if the file cannot be read, `UsageError` if its content is wrong.
    """
    with os_error(f"cannot read VM description {path}"):
        data = path.read_bytes()
    found = parse_description(data, str(path))
    if found.own is msgspec.UNSET:
        return found
    return msgspec.structs.replace(found, own=found.own.below(path.parent.absolute()))


def named_description(name: str) -> VmDescription:
    """Reads one of ours by its name, or any by its path. Raises as `find_description` and `load_description`."""
    return load_description(find_description(name, DESCRIPTIONS))


def find_description(name: str, folder: Path) -> Path:
    """Finds a description by path, or by bare name in `folder` (``demo`` means ``FOLDER/demo.toml``).

    Raises `EnvironmentProblem` that lists what there is.
    """
    direct = Path(name)
    if direct.suffix == ".toml" or "/" in name:
        return direct
    candidate = folder / f"{name}.toml"
    if candidate.is_file():
        return candidate
    known = ", ".join(sorted(entry.stem for entry in folder.glob("*.toml"))) or "none"
    raise EnvironmentProblem(
        f"no VM description {name!r} in {folder}; there: {known}; a path to a .toml file works too"
    )
