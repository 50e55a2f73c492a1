"""What a destination takes: VMs, and what of this host they would use, by names.

A rule is the name of a VM's description, or KIND:NAME; names may have the wildcards of a shell. Once there is a rule,
whatever none of them names is refused: before anything starts here, and once more when the device's state has come,
since a disk may have been added meanwhile. Arguments for QEMU want a rule in any case, as `restore` wants `--trust`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from vmbus.device import saved
from vmbus.device.description import DeviceDescription
from vmbus.errors import StateError, UsageError
from vmbus.providers.loading import is_external
from vmbus.providers.network.card import CardOptions
from vmbus.providers.scsi.provider import ScsiOptions, images_in
from vmbus.providers.vsock.provider import VsockOptions
from vmbus.vm.description import VmDescription
from vmbus.vm.own_guest import OwnGuest

KINDS = {
    "vm": "the name of the description",
    "disk": "an image in the disk directory",
    "network": "an interface, a bridge or a namespace; `vmnet` for an interface without a name; `user`: QEMU's own",
    "socket": "the path of a socket outside of the VM's run directory",
    "provider": "a provider of one's own, `package.module:Class`",
    "file": "a disk of QEMU's own, or an image behind it",
    "port": "a port of this host that leads into the guest, as `hostfwd` has it",
    "qemu-arg": "an argument for QEMU",
}
ALWAYS = frozenset({"qemu-arg"})
"""Kinds that are refused without a rule, and whose rules restrict nothing else: who may choose these may do whatever
the receiving user may."""

Use = tuple[str, str]
"""A kind and a name."""


class Accept:
    """The rules of one destination."""

    def __init__(self, rules: Collection[str]) -> None:
        """Raises `UsageError` for what is no rule."""
        self._rules: list[Use] = []
        for rule in rules:
            kind, _, name = rule.partition(":") if ":" in rule else ("vm", "", rule)
            if kind not in KINDS or not name:
                raise UsageError(f"--accept {rule!r}: write NAME or KIND:NAME, with a kind of {', '.join(KINDS)}")
            self._rules.append((kind, name))
        self._restricts = any(kind not in ALWAYS for kind, _ in self._rules)

    def check(self, vm: VmDescription, source: str, files: Iterable[str] = ()) -> None:
        """Raises `StateError` that names what is not taken, for people at both sides. `files`: those behind disks of
        QEMU's own."""
        uses = [("vm", vm.name), *chain.from_iterable(map(_uses, vm.all_devices)), *_own(vm.mine)]
        self._refuse([*uses, *(("file", file) for file in files)], source)

    def check_saved(self, device: DeviceDescription, state: Path, source: str) -> None:
        """The same for the device as it is when it stands still, and for its saved state in a file, which says what
        disks there are by now. Raises `StateError`."""
        if not self._restricts:
            return
        self._refuse(_uses(device), source)
        images = (images_in(one.state) for one in saved.decode(saved.read_file(state)).providers if one.kind == "scsi")
        self._refuse((("disk", image) for several in images for image in several), source)

    def _refuse(self, uses: Iterable[Use], source: str) -> None:
        for kind, name in uses:
            asked = self._restricts or kind in ALWAYS
            if asked and not any(kind == one and fnmatchcase(name, pattern) for one, pattern in self._rules):
                what = f"VM {name!r}" if kind == "vm" else f"a VM with the {kind} {name!r}"
                raise StateError(
                    f"{source} sends {what}, which is not accepted here "
                    f"(run-vm --receive ... --accept {kind}:{name} would)"
                )


EVERYTHING = Accept(())


def _own(guest: OwnGuest) -> Iterator[Use]:
    """What a guest of one's own would use."""
    for disk in guest.disks:
        yield "file", disk.file
    for nic in guest.nics:
        yield "network", nic.kind
        for forward in nic.hostfwd:
            yield "port", forward
    for argument in guest.qemu_args:
        yield "qemu-arg", argument


def _disks(options: ScsiOptions) -> Iterator[Use]:
    for lun in options.luns:
        yield "disk", lun.image


def _interfaces(options: CardOptions) -> Iterator[Use]:
    for name in (options.interface or "vmnet", options.bridge, options.namespace):
        if name is not None:
            yield "network", name


def _sockets(options: VsockOptions) -> Iterator[Use]:
    if options.path is not None:
        yield "socket", options.path


_OF_KIND: dict[str, tuple[type[Any], Callable[[Any], Iterator[Use]]]] = {
    "scsi": (ScsiOptions, _disks),
    "network": (CardOptions, _interfaces),
    "vsock": (VsockOptions, _sockets),
}


def _uses(device: DeviceDescription) -> Iterator[Use]:
    """What a device would use of its host."""
    for provider in device.providers:
        if is_external(provider.kind):
            yield "provider", provider.kind
        elif provider.kind in _OF_KIND:
            options, uses = _OF_KIND[provider.kind]
            try:
                found = msgspec.convert(provider.options, options)
            except msgspec.ValidationError as error:
                raise StateError(f"options of provider {provider.name!r} ({provider.kind}): {error}") from error
            yield from uses(found)
