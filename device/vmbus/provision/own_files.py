"""The guest's kernel and user space by setting, in place of Debian's.

    VMBUS_KERNEL       a kernel image (bzImage), with one of these two:
    VMBUS_MODULES      the folder of its modules (as /lib/modules/VERSION): the guest's image is made with them
    VMBUS_INITRAMFS    a whole initial file system, which is booted as it is

Modules are taken as they are for Debian's kernel, decompressed, with what they depend on. Those that only some guests
want may be missing. Our own kernel module is taken if the folder has it (`vmbus_pci.ko`, built for that kernel);
without it, guests have the userspace driver.

Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vmbus.errors import EnvironmentProblem
from vmbus.provision.cache import Cache, digest, prune, publish_bytes
from vmbus.provision.digests import damaged, write_digests
from vmbus.provision.guest_files import (
    KERNEL_RECORD,
    MODULES,
    USERSPACE_DRIVER,
    VIRTIO,
    Kernel,
    module_name,
    plain,
    read_kernel,
    take_module,
)
from vmbus.provision.kernel_module import NAME, KernelModule
from vmbus.provision.report import Reporter

KERNEL_SETTING = "VMBUS_KERNEL"
MODULES_SETTING = "VMBUS_MODULES"
INITRAMFS_SETTING = "VMBUS_INITRAMFS"
SETTINGS = (KERNEL_SETTING, MODULES_SETTING, INITRAMFS_SETTING)

KEPT = 4
RECIPE = 1
"""Changed when what is taken changes."""

_MAGIC = 0x202
_VERSION_AT = 0x20E
"""Where the header of a bzImage has its magic number, and the place of the version's text (less 512)."""


@dataclass(frozen=True)
class OwnFiles:
    """What the settings name; all of it is there. One of the last two is set."""

    kernel: Path
    modules: Path | None
    initramfs: Path | None


def wanted(environment: Mapping[str, str] = os.environ) -> OwnFiles | None:
    """Return what the settings name, or None. Raises EnvironmentProblem if they do not fit, or name nothing."""
    named = {name: value for name in SETTINGS if (value := environment.get(name, "").strip())}
    if not named:
        return None
    if KERNEL_SETTING not in named:
        raise EnvironmentProblem(f"{', '.join(named)} without {KERNEL_SETTING}: name the kernel that belongs to it")
    if len(named) != 2:
        raise EnvironmentProblem(
            f"{KERNEL_SETTING} wants one of two more: {MODULES_SETTING}, the folder with its modules, or "
            f"{INITRAMFS_SETTING}, a whole initial file system"
        )
    paths = {name: Path(value).expanduser().absolute() for name, value in named.items()}
    for name, path in paths.items():
        right = path.is_dir() if name == MODULES_SETTING else path.is_file()
        if not right:
            kind = "folder" if name == MODULES_SETTING else "file"
            raise EnvironmentProblem(f"{name} is {named[name]}, and there is no such {kind}")
    return OwnFiles(paths[KERNEL_SETTING], paths.get(MODULES_SETTING), paths.get(INITRAMFS_SETTING))


def identity(own: OwnFiles | None) -> list[object]:
    """What changes when one of the files is replaced."""
    if own is None:
        return []
    files = [own.kernel, *([own.initramfs] if own.initramfs else []), *(_modules(own).values() if own.modules else [])]
    return [[str(path), (status := path.stat()).st_size, status.st_mtime_ns] for path in files]


def _modules(own: OwnFiles) -> dict[str, Path]:
    """File by module."""
    assert own.modules is not None
    return {module_name(path.name): path for path in sorted(own.modules.rglob("*.ko*")) if path.is_file()}


def kernel_version(image: Path) -> str:
    """Return what `uname -r` will say under this kernel, as its header has it. Raises EnvironmentProblem."""
    with image.open("rb") as file:
        head = file.read(1 << 16)
    if head[_MAGIC : _MAGIC + 4] != b"HdrS":
        raise EnvironmentProblem(f"{KERNEL_SETTING} is {image}, which is no bzImage (a kernel as boot loaders take it)")
    (place,) = struct.unpack_from("<H", head, _VERSION_AT)
    version = head[place + 512 :].split(b"\0", 1)[0].split(b" ", 1)[0].decode("ascii", "replace")
    if not place or not version or "\ufffd" in version:
        raise EnvironmentProblem(f"{KERNEL_SETTING} is {image}, whose header tells no version")
    return version


def find_kernel(cache: Cache, own: OwnFiles, reporter: Reporter) -> Kernel:
    """Return the kernel, with its modules taken into the cache. The caller holds the cache's lock.

    Raises EnvironmentProblem, for instance for a module that every guest needs and that is not there.
    """
    version = kernel_version(own.kernel)
    if own.modules is None:
        return Kernel(own.kernel, version, {}, "")
    folder = cache.path("own-kernel", digest(RECIPE, VIRTIO, MODULES, identity(own)))
    if not (folder / KERNEL_RECORD).exists() or damaged(folder):
        there = _Files(_modules(own))
        with cache.publish_directory(folder) as partial:
            reporter.begin(f"Taking modules from {own.modules}")
            shutil.copyfile(own.kernel, partial / "vmlinuz")
            order = _take(own, there, partial / "modules")
            if NAME in there:
                (partial / f"{NAME}.ko").write_bytes(plain(there[NAME]))
            facts = {"version": version, "package": "", "modules": order, "vmbus": {}}
            publish_bytes(partial / KERNEL_RECORD, (json.dumps(facts, indent=1) + "\n").encode())
            write_digests(partial)
            reporter.end(f"{len(order)} modules")
        prune(folder, KEPT)
    return read_kernel(folder)


def _take(own: OwnFiles, there: _Files, folder: Path) -> dict[str, tuple[str, ...]]:
    assert own.modules is not None
    folder.mkdir()
    listed = own.modules / "modules.builtin"
    builtin = {module_name(line) for line in listed.read_text().split()} if listed.is_file() else set()
    needed = {module_name(name) for name in (*VIRTIO, *USERSPACE_DRIVER)}
    order: dict[str, tuple[str, ...]] = {}
    for name in map(module_name, (*VIRTIO, *MODULES)):
        try:
            take_module(name, there, builtin, folder, order)
        except EnvironmentProblem as error:
            if name in needed:
                raise EnvironmentProblem(
                    f"{MODULES_SETTING} is {own.modules}: {error}, which guests need; nor does its modules.builtin say "
                    "that the kernel has it built in"
                ) from None
    return order


class _Files(Mapping[str, bytes]):
    """The contents of files, read when they are asked for."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._paths = paths

    def __getitem__(self, name: str) -> bytes:
        return self._paths[name].read_bytes()

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def kernel_module(kernel: Kernel) -> KernelModule:
    """Our module, if the folder has it."""
    path = kernel.image.parent / f"{NAME}.ko"
    if kernel.modules and path.is_file():
        return KernelModule(path)
    return KernelModule(None, f"{MODULES_SETTING} has no {NAME}.ko for {kernel.version}")


def image_key(own: OwnFiles) -> str:
    """Digest over an initial file system that is booted as it is, and its kernel."""
    assert own.initramfs is not None
    parts = []
    for path in (own.kernel, own.initramfs):
        with path.open("rb") as file:
            parts.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digest(*parts)
