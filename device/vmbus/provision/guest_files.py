"""What the guest runs that is not ours: Debian's cloud kernel with some of its modules, busybox, Python, the tools for
ext4 file systems, and the daemons of Linux's integration driver.

The kernel package is large and most of it is of no use here, so only the image and the wanted modules (with whatever
they depend on) are unpacked from it, decompressed: the guest's loader is then as simple as can be.
"""

from __future__ import annotations

import json
import re
import tarfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmbus.errors import EnvironmentProblem
from vmbus.provision.apt import Apt
from vmbus.provision.archive import command_output, decompress
from vmbus.provision.cache import Cache, digest, publish_bytes
from vmbus.provision.digests import write_digests
from vmbus.provision.report import Reporter, SilentReporter
from vmbus.provision.roots import Root, RootRecipe, discard, make_root, package_fields, write_record
from vmbus.provision.sources import SUITE

KERNEL_PACKAGE = "linux-image-cloud-amd64"
"""Depends on the current kernel, whose package has its version in its name."""

USERSPACE_DRIVER = ("irqbypass", "vfio", "vfio_iommu_type1", "vfio-pci-core", "vfio-pci")
"""What a driver in userspace needs."""

VIRTIO = ("virtio_pci", "virtio_console")
"""What the agent's line to the host needs, and Debian's kernel has built in."""

LINUX_DRIVERS = ("hv_vmbus", "hv_utils", "sd_mod", "hv_storvsc", "hv_netvsc", "hv_sock", "uio_hv_generic")
"""Linux's own VMBus drivers, in the order in which they are loaded behind our kernel module."""

MODULES = (
    *USERSPACE_DRIVER,
    *LINUX_DRIVERS,
    "ext4",
    "crc32c_generic",  # ext4 asks for it by name only when it is used
    "veth",
    "virtio_blk",
    "virtio_net",
)
"""Modules to take, with what they depend on; modules that the kernel has built in are skipped."""

USERLAND_RECIPE = RootRecipe(
    name="guest",
    suites=(SUITE,),
    packages=(
        "busybox-static",
        "python3.13-minimal",
        "libpython3.13-minimal",
        "libpython3.13-stdlib",
        "e2fsprogs",
        "hyperv-daemons",
    ),
)

PYTHON = "python3.13"

KERNEL_RECORD = "kernel.json"


@dataclass(frozen=True)
class Kernel:
    """A kernel image and its modules, decompressed."""

    image: Path
    version: str
    """As `uname -r` says it."""
    modules: Mapping[str, tuple[str, ...]]
    """For each module (file name without suffix, in an order that can be loaded) the names it depends on."""
    package: str
    """Version of the Debian package; empty for a kernel of the user's own."""
    vmbus: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """All modules of the package that bind to VMBus devices, and the GUIDs of these."""

    def module_path(self, name: str) -> Path:
        return self.image.parent / "modules" / f"{name}.ko"

    def closure(self, names: Sequence[str]) -> list[str]:
        """These modules and all that they depend on, as far as they are not built in, in an order to load them."""
        found: list[str] = []

        def take(name: str) -> None:
            if name in self.modules and name not in found:
                for needed in self.modules[name]:
                    take(needed)
                found.append(name)

        for name in names:
            take(module_name(name))
        return found


def find_kernel(cache: Cache | None = None, reporter: Reporter | None = None, apt: Apt | None = None) -> Kernel:
    """Return the kernel, fetched (with `apt` for the suite, if given) if need be. The caller holds the cache's lock.

    Raises EnvironmentProblem, ProgramFailed, WaitTimeout.
    """
    cache = cache or Cache()
    reporter = reporter or SilentReporter()
    directory = kernel_folder(cache)
    if not (directory / KERNEL_RECORD).exists():
        apt = apt or Apt(cache, (SUITE,), reporter=reporter)
        concrete = [name for name in apt.depends(KERNEL_PACKAGE) if name.startswith("linux-image-")]
        if len(concrete) != 1:
            raise EnvironmentProblem(f"{KERNEL_PACKAGE} should name one kernel package; apt says {concrete}")
        deb = apt.download(concrete)[0]
        with cache.publish_directory(directory) as partial:
            reporter.begin(f"Unpacking {concrete[0]}")
            version, modules, vmbus = unpack_kernel(deb, partial)
            package = package_fields(deb)
            write_record(partial, [package], (SUITE,))
            facts = {"version": version, "package": package.version, "modules": modules, "vmbus": vmbus}
            publish_bytes(partial / KERNEL_RECORD, (json.dumps(facts, indent=1) + "\n").encode())
            write_digests(partial)
            reporter.end(f"{len(modules)} modules")
        discard([deb])
    return read_kernel(directory)


def kernel_folder(cache: Cache) -> Path:
    """Where the kernel and its modules are, once they are there."""
    return cache.path("kernel", digest(2, SUITE, KERNEL_PACKAGE, MODULES, length=8))


def read_kernel(directory: Path) -> Kernel:
    """Return the kernel that such a folder holds. Raises OSError, ValueError, KeyError."""
    facts = json.loads((directory / KERNEL_RECORD).read_text())
    return Kernel(
        image=directory / "vmlinuz",
        version=facts["version"],
        modules={name: tuple(needed) for name, needed in facts["modules"].items()},
        package=facts["package"],
        vmbus={name: tuple(guids) for name, guids in facts["vmbus"].items()},
    )


def find_userland(cache: Cache | None = None, reporter: Reporter | None = None, apt: Apt | None = None) -> Root:
    """Return the root with busybox, Python and the rest, fetched (with `apt` for the suite, if given) if need be. The
    caller holds the cache's lock.

    Raises EnvironmentProblem, ProgramFailed, WaitTimeout.
    """
    return make_root(cache or Cache(), USERLAND_RECIPE, reporter or SilentReporter(), apt)


def unpack_kernel(deb: Path, target: Path) -> tuple[str, dict[str, tuple[str, ...]], dict[str, list[str]]]:
    """Take the image and the wanted modules out of a kernel package; return the version, the modules' order, and what
    VMBus devices any of its modules bind to.

    Raises EnvironmentProblem if the package does not look like one.
    """
    compressed: dict[str, bytes] = {}
    builtin: set[str] = set()
    version = ""
    with (
        command_output(["dpkg-deb", "--fsys-tarfile", str(deb)], f"reading {deb.name}") as stream,
        tarfile.open(fileobj=stream, mode="r|") as tar,
    ):
        for member in tar:
            name = member.name.removeprefix("./")
            file = tar.extractfile(member) if member.isfile() else None
            if file is None:
                continue
            if name.startswith("boot/vmlinuz-"):
                version = name.removeprefix("boot/vmlinuz-")
                (target / "vmlinuz").write_bytes(file.read())
            elif name.endswith("/modules.builtin"):
                builtin = {module_name(line) for line in file.read().decode().split()}
            elif ".ko" in Path(name).suffixes:
                # Everything is kept until the dependencies are known: it is one pass over a stream.
                compressed[module_name(name)] = file.read()
    if not version:
        raise EnvironmentProblem(f"{deb.name} holds no kernel image")
    folder = target / "modules"
    folder.mkdir()
    order: dict[str, tuple[str, ...]] = {}
    for name in MODULES:
        take_module(module_name(name), compressed, builtin, folder, order)
    aliases = {name: vmbus_aliases(plain(data)) for name, data in sorted(compressed.items())}
    return version, order, {name: guids for name, guids in aliases.items() if guids}


def plain(data: bytes) -> bytes:
    """Return a module decompressed. Raises EnvironmentProblem."""
    return data if data.startswith(b"\x7fELF") else decompress(data)


def take_module(
    name: str, compressed: Mapping[str, bytes], builtin: set[str], folder: Path, order: dict[str, tuple[str, ...]]
) -> None:
    """Put a module and all that it depends on into `folder`, unless they are in `order`, which they are added to, or
    built in. Raises EnvironmentProblem for one that is not there."""
    if name in order or name in builtin:
        return
    try:
        data = compressed[name]
    except KeyError:
        raise EnvironmentProblem(f"there is no module {name}") from None
    data = plain(data)
    needed = module_dependencies(data)
    for other in needed:
        take_module(other, compressed, builtin, folder, order)
    (folder / f"{name}.ko").write_bytes(data)
    order[name] = tuple(other for other in needed if other not in builtin)


def module_name(path: str) -> str:
    """Return a module's name as the kernel spells it: no folder, no suffix, underscores."""
    return re.sub(r"\.ko(\.\w+)?$", "", path.rsplit("/", 1)[-1]).replace("-", "_")


def vmbus_aliases(data: bytes) -> list[str]:
    """Return the GUIDs of the VMBus devices that a module (an ELF object) says it binds to, in text form, sorted."""
    found = re.findall(rb"\0alias=vmbus:([0-9a-f]{32})(?=\0)", data)
    return sorted(str(uuid.UUID(bytes_le=bytes.fromhex(one.decode()))) for one in found)


def module_dependencies(data: bytes) -> Sequence[str]:
    """Return what a module (an ELF object) says it depends on, from its `.modinfo` strings."""
    match = re.search(rb"\0depends=([^\0]*)\0", data)
    if match is None or not match[1]:
        return ()
    return [module_name(name) for name in match[1].decode().split(",")]
