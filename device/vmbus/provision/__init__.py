"""Set-up: everything from outside that the project needs, found on the host or fetched into the cache.

`provision()` returns where it all is. It does the whole set-up where something is missing and takes some milliseconds
where nothing is; `python -m vmbus.provision` is the same with progress and a summary, and `scripts/setup` is that
with a virtual environment made first.

    qemu            QEMU >= 10.1 with vfio-user-pci: VMBUS_QEMU, PATH, or Debian's package in a private root
    libvfio_user    VMBUS_LIBVFIO_USER, the system's, or built from Debian's QEMU source package
    native          the native core, compiled (VMBUS_CORE)
    guest_files     Debian's kernel, busybox and Python for the guest
    own_files       a kernel and a user space of the user's own instead (VMBUS_KERNEL, VMBUS_MODULES, VMBUS_INITRAMFS)
    debian_system   a Debian on a disk, for guests that want one, fetched and made by those only
    dpkg_tree       its packages, unpacked into a tar
    kernel_module   our module for that kernel, compiled (without it, guests have the userspace driver only)
    accel           KVM if it runs a guest, else TCG (VMBUS_ACCELERATOR overrides)
    chromium        a browser for tests of the report, fetched by those only
    prebuilt        all of this in one file, for machines without apt, compiler or network
    environment     the virtual environment with the Python packages of requirements.lock
    needs           what is missing for set-up and for each feature, and the room for it, before anything is fetched
    sources, apt, roots               the host's archives, apt with a state of its own, its packages in private roots
    programs                          how programs are run
    cache, archive, report            the cache directory, unpacking, progress

Modules here use the standard library only (apart from `__main__`): the first stage of the set-up runs before there
is a virtual environment.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmbus.errors import EnvironmentProblem

if TYPE_CHECKING:
    from vmbus.provision.accel import Accelerator
    from vmbus.provision.cache import Cache
    from vmbus.provision.debian_system import DebianSystem
    from vmbus.provision.guest_files import Kernel
    from vmbus.provision.libvfio_user import VfioUserLibrary
    from vmbus.provision.qemu import QemuProgram
    from vmbus.provision.report import Reporter
    from vmbus_guest.image import GuestImage

SETTINGS = ("VMBUS_QEMU", "VMBUS_LIBVFIO_USER", "VMBUS_ACCELERATOR", "VMBUS_KERNEL", "VMBUS_MODULES", "VMBUS_INITRAMFS")
"""Environment variables that decide what is used (VMBUS_CACHE and VMBUS_DEBIAN_MIRROR only decide from where)."""


@dataclass(frozen=True)
class Provisioned:
    """Everything needed to start a virtual machine with one of our devices."""

    qemu: QemuProgram
    libvfio_user: Path
    libvfio_user_source: str
    kernel: Path
    """Kernel image."""
    kernel_version: str
    image: Path
    """Initial file system of the guest."""
    image_key: str
    """Digest over everything that is in the image."""
    accelerator: Accelerator
    native_core: Path | None
    """None: rings and packets are served by Python alone."""
    kernel_module_problem: str = ""
    """Why the image has no kernel module of ours, so that Linux's own drivers cannot be used in it; empty: it has."""


def provision(
    cache: Cache | None = None,
    reporter: Reporter | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Provisioned:
    """Return where everything is, having made what was missing.

    Without a `reporter`, longer work is reported on standard error. Raises EnvironmentProblem (with what to do),
    vmbus.provision.programs.ProgramFailed, WaitTimeout.
    """
    from vmbus.provision import needs
    from vmbus.provision.cache import Cache, remove
    from vmbus.provision.report import PlainReporter

    cache = cache or Cache()
    cache.require_own()
    parts = _remembered(cache, environment)
    found = _with_image(parts, cache, None, environment) if parts is not None else None
    if found is not None:
        return found
    reporter = reporter or PlainReporter()
    if parts is None:
        needs.require_room(cache, environment)
        if notice := needs.own_cache_notice(cache, environment):
            reporter.note(notice)
    with cache.lock(on_wait=reporter.note):
        # Somebody else may have done it while we waited.
        parts = _remembered(cache, environment) or _make(cache, reporter, environment)
        found = _with_image(parts, cache, reporter, environment)
        remove(cache.path("apt"))  # 300 MB of package lists, out of date by the time they might be wanted again
    assert found is not None
    return found


def provision_debian(
    cache: Cache | None = None,
    reporter: Reporter | None = None,
    environment: Mapping[str, str] = os.environ,
) -> DebianSystem:
    """Return the image with a Debian for guests, having made it (and everything that `provision` makes) if need be.

    Reports and raises as `provision`.
    """
    from vmbus.provision import debian_system, guest_files, own_files
    from vmbus.provision.cache import Cache
    from vmbus.provision.report import PlainReporter
    from vmbus.provision.roots import find_root

    cache = cache or Cache()
    if own_files.wanted(environment) is not None:
        raise EnvironmentProblem("the Debian for guests has Debian's kernel: unset VMBUS_KERNEL and what goes with it")
    provision(cache, reporter, environment)
    parts = _remembered(cache, environment)
    userland = find_root(cache, guest_files.USERLAND_RECIPE)
    assert parts is not None and userland is not None
    found = debian_system.find(cache, parts.kernel)
    if found is not None:
        return found
    reporter = reporter or PlainReporter()
    tools = debian_system.Tools(parts.qemu, parts.kernel, userland, parts.accelerator)
    return debian_system.make(cache, tools, reporter, environment)


def find_debian(cache: Cache | None = None, environment: Mapping[str, str] = os.environ) -> DebianSystem | None:
    """Return the image with a Debian for guests if it has been made."""
    from vmbus.provision import debian_system
    from vmbus.provision.cache import Cache

    cache = cache or Cache()
    parts = _remembered(cache, environment)
    return None if parts is None else debian_system.find(cache, parts.kernel)


def is_provisioned(cache: Cache, environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether a set-up with these settings has been completed and is still there."""
    from vmbus.provision import native

    return _remembered(cache, environment) is not None and native.settled(cache, environment)


@dataclass(frozen=True)
class _Parts:
    """What the slow part of the set-up found. The native core, the kernel module and the guest image are not in it:
    they follow the sources."""

    qemu: QemuProgram
    library: VfioUserLibrary
    kernel: Kernel
    userland: Path | None
    """None: the user has a whole initial file system of his own."""
    accelerator: Accelerator


def _make(cache: Cache, reporter: Reporter, environment: Mapping[str, str]) -> _Parts:
    from vmbus.provision import accel, guest_files, libvfio_user, own_files, qemu
    from vmbus.provision.apt import Apt
    from vmbus.provision.cache import publish_bytes
    from vmbus.provision.sources import SUITE

    own = own_files.wanted(environment)
    libvfio_user.check_prerequisites(cache, environment)  # before the large downloads
    program = qemu.find_qemu(cache, reporter, environment)
    library = libvfio_user.find(cache, reporter, environment)
    apt = Apt(cache, (SUITE,), reporter=reporter, environment=environment)
    kernel = (
        guest_files.find_kernel(cache, reporter, apt) if own is None else own_files.find_kernel(cache, own, reporter)
    )
    whole = own is not None and own.initramfs is not None
    userland = None if whole else guest_files.find_userland(cache, reporter, apt)
    accelerator = accel.choose_accelerator(program, kernel, userland, cache, reporter, environment)
    parts = _Parts(program, library, kernel, None if userland is None else userland.path, accelerator)
    publish_bytes(_memory(cache, environment), (json.dumps(_to_json(parts), indent=1) + "\n").encode())
    return parts


def _memory(cache: Cache, environment: Mapping[str, str]) -> Path:
    """Path of the record of a set-up: one per combination of all that may change the outcome."""
    from vmbus.provision import guest_files, libvfio_user, own_files, qemu
    from vmbus.provision.accel import KVM_DEVICE
    from vmbus.provision.cache import digest
    from vmbus.util.boot import boot_id

    installed = shutil.which(qemu.PROGRAM, path=environment.get("PATH"))
    key = digest(
        3,
        [environment.get(name, "") for name in SETTINGS],
        own_files.identity(own_files.wanted(environment)),
        [_identity(environment.get("VMBUS_QEMU")), _identity(installed)],
        [_identity(environment.get("VMBUS_LIBVFIO_USER"))],
        [qemu.ROOT_RECIPE.key, guest_files.USERLAND_RECIPE.key, guest_files.MODULES, libvfio_user.build_key()],
        [boot_id(), os.access(KVM_DEVICE, os.R_OK | os.W_OK)],
    )
    return cache.path("provisioned", f"{key}.json")


def _identity(path: str | None) -> list[object]:
    """Return what changes when a program is replaced."""
    if not path:
        return []
    try:
        status = Path(path).stat()
    except OSError:
        return [path]
    return [path, status.st_size, status.st_mtime_ns]


def _to_json(parts: _Parts) -> dict[str, Any]:
    def plain(value: object) -> str:
        if isinstance(value, Path):
            return str(value)
        raise TypeError(type(value).__name__)

    result: dict[str, Any] = json.loads(json.dumps(asdict(parts), default=plain))
    return result


def _remembered(cache: Cache, environment: Mapping[str, str]) -> _Parts | None:
    from vmbus.provision.accel import Accelerator
    from vmbus.provision.guest_files import Kernel
    from vmbus.provision.libvfio_user import VfioUserLibrary
    from vmbus.provision.qemu import QemuProgram

    try:
        known = json.loads(_memory(cache, environment).read_bytes())
        program, library, kernel = known["qemu"], known["library"], known["kernel"]
        major, minor, micro = program["version"]
        parts = _Parts(
            QemuProgram(tuple(program["argv"]), (major, minor, micro), program["source"], tuple(program["image_argv"])),
            VfioUserLibrary(Path(library["path"]), library["source"]),
            Kernel(
                Path(kernel["image"]),
                kernel["version"],
                {name: tuple(needed) for name, needed in kernel["modules"].items()},
                kernel["package"],
                {name: tuple(guids) for name, guids in kernel["vmbus"].items()},
            ),
            None if known["userland"] is None else Path(known["userland"]),
            Accelerator(**known["accelerator"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    files = [
        *(Path(part) for part in parts.qemu.argv if part.startswith("/")),
        *(parts.library.path, parts.kernel.image),
        *([parts.userland / "usr/bin/busybox"] if parts.userland else []),
        *(parts.kernel.module_path(name) for name in parts.kernel.modules),
    ]
    return parts if all(path.exists() for path in files) else None


def _with_image(
    parts: _Parts, cache: Cache, reporter: Reporter | None, environment: Mapping[str, str]
) -> Provisioned | None:
    """Add the native core and the guest image; without a reporter (and lock) only what is in the cache already."""
    from vmbus.provision import guest_files, kernel_module, native, own_files
    from vmbus.provision.roots import find_root
    from vmbus_guest import image  # imports this package

    if reporter is None and not native.settled(cache, environment):
        return None
    core = native.find(cache, reporter, environment)
    own = own_files.wanted(environment)
    if own is not None and own.initramfs is not None:
        key = own_files.image_key(own)
        built = image.find_image(cache, key)
        if built is None:
            if reporter is None:
                return None
            built = image.adopt_image(own.kernel, own.initramfs, key, cache)
        return _provisioned(parts, core, built, "")  # what is in it, its owner knows
    userland = find_root(cache, guest_files.USERLAND_RECIPE)
    if userland is None:
        return None
    module: kernel_module.KernelModule | None = own_files.kernel_module(parts.kernel) if own is not None else None
    if reporter is None:
        module = module or kernel_module.remembered(cache, parts.kernel, environment)
        if module is None:
            return None
        key = image.image_key(userland, parts.kernel, native_core=core, kernel_module=module.path)
        built = image.find_image(cache, key)
        if built is None:
            return None
    else:
        module = module or kernel_module.find(cache, parts.kernel, reporter, environment)
        built = image.build_image(userland, parts.kernel, cache, reporter, native_core=core, kernel_module=module.path)
    return _provisioned(parts, core, built, module.problem)


def _provisioned(parts: _Parts, core: Path | None, built: GuestImage, problem: str) -> Provisioned:
    return Provisioned(
        qemu=parts.qemu,
        libvfio_user=parts.library.path,
        libvfio_user_source=parts.library.source,
        kernel=built.kernel,
        kernel_version=parts.kernel.version,
        image=built.initramfs,
        image_key=built.key,
        accelerator=parts.accelerator,
        native_core=core,
        kernel_module_problem=problem,
    )
