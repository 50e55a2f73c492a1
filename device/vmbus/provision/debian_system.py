"""A Debian for the guest: the image of a disk with a root file system of packages, as somebody would have installed it.

It is made without root rights and without network in the guest. apt downloads and verifies the packages on the host
(`vmbus.provision.apt`); they become one tar (`vmbus.provision.dpkg_tree`), and that an ext4 file system, by mke2fs;
then a machine of QEMU's own, without a device of ours, boots once and has the packages on its disk configure
themselves. Nothing in the image belongs to one machine: no host keys, no machine id, no password.

The image is in the cache, and nobody writes to it: a VM has a copy (`vmbus.vm.root`). It is made anew when the recipe
changes; its packages are as new as they were when it was made.

Standard library only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from vmbus.errors import EnvironmentProblem
from vmbus.provision.accel import Accelerator
from vmbus.provision.apt import Apt
from vmbus.provision.archive import command_output
from vmbus.provision.cache import Cache, digest, prune, remove
from vmbus.provision.dpkg_tree import TreeWriter, write_packages
from vmbus.provision.guest_files import Kernel
from vmbus.provision.programs import ProgramFailed, run_lines
from vmbus.provision.qemu import QemuProgram
from vmbus.provision.report import Reporter
from vmbus.provision.roots import (
    RECORD,
    InstalledPackage,
    Root,
    RootRecipe,
    discard,
    make_root,
    package_fields,
    write_record,
)
from vmbus.provision.sources import SUITE

RECIPE = 1
"""Changed when the way of making the image changes; what goes into it is part of the key anyway."""

PACKAGES = (
    "?essential",
    *("systemd", "systemd-sysv", "udev", "kmod", "dbus", "libpam-systemd", "login"),
    *("apt", "e2fsprogs", "hyperv-daemons", "iproute2", "iputils-ping", "less", "openssh-server"),
    *("python3.13-minimal", "libpython3.13-stdlib"),  # for the host's agent
)
"""Installed with all that they depend on. The first word is apt's for the packages that no Debian is without."""

LABEL = "vmbus-root"
"""The file system's, by which the guest finds it."""

SIZE = 2 << 30
"""Bytes of the file system. Most of the file is a hole."""

TOOLS_RECIPE = RootRecipe(name="filesystem", suites=(SUITE,), packages=("e2fsprogs", "libarchive13t64"))
"""mke2fs makes a file system of a tar, with the owners and modes that are in there, if it has libarchive."""

IMAGE = "root.img"
MAKE_TIMEOUT = 120.0
CONFIGURE_TIMEOUT = 1200.0
"""Seconds for the packages' own scripts: they take 1 to 3 minutes on an emulated CPU."""

MEMORY_MIB = 1024
KEPT = 2
"""Images: a checkout beside this one may have another recipe."""

KEYS_CREDENTIAL = "ssh.ephemeral-authorized_keys-all"
"""systemd's name for keys that may log in by the sockets that it opens for the host; here for root by TCP, too."""

ARCHIVE_PORT = 3142
"""Of the guest's loopback, and of its sockets to the host: where its apt finds Debian's archive."""

_COMPLETE = "vmbus: the image is complete"
_MODULE = "virtio_blk"

NOT_LOADED = ("kvm_amd", "kvm_intel", "ahci", "powernow_k8", "acpi_cpufreq", "sg", "qemu_fw_cfg", "serio_raw", "evdev")
"""Modules of the guest's kernel."""

FILES: Mapping[str, str] = {
    "etc/hostname": "debian\n",
    "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 debian\n::1 localhost ip6-localhost ip6-loopback\n",
    "etc/fstab": f"LABEL={LABEL} / ext4 defaults 0 1\n",
    "etc/default/locale": "LANG=C.UTF-8\n",
    # The host of the VM has the archive, wherever that is; it is verified in the guest as usual.
    "etc/apt/sources.list.d/debian.sources": (
        f"Types: deb\nURIs: http://localhost:{ARCHIVE_PORT}/debian\nSuites: {SUITE} {SUITE}-updates\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    ),
    "etc/apt/apt.conf.d/20emulated": 'Acquire::Languages "none";\n',  # descriptions once more, 6 MB
    # Large, for hardware that is there in name only, and udev would load them at each boot.
    "etc/modprobe.d/emulated.conf": "".join(f"blacklist {name}\n" for name in NOT_LOADED),
    # The console is its owner's alone, who may do anything to the machine anyway.
    "etc/systemd/system/serial-getty@ttyS0.service.d/owner.conf": (
        "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200 - $TERM\n"
    ),
    # Debian makes host keys at a first boot only, which systemd does not take this for, and one is enough.
    "etc/systemd/system/sshd-keygen.service.d/key.conf": (
        "[Unit]\nConditionFirstBoot=\nConditionPathExists=!/etc/ssh/ssh_host_ed25519_key\n"
        "[Service]\nExecStart=\nExecStart=ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key\n"
    ),
    # Unless the kernel's command line has another setting (`ip=`): those come first.
    # The keys that the VM's owner has given the host, on the kernel's command line (`vmbus.cli.keys`).
    "etc/ssh/sshd_config.d/owner.conf": (
        f"Match User root\n  AuthorizedKeysFile .ssh/authorized_keys /run/credentials/@system/{KEYS_CREDENTIAL}\n"
    ),
    "etc/systemd/network/90-card.network": (
        "[Match]\nName=eth*\n\n[Link]\nRequiredForOnline=no\n\n[Network]\nDHCP=yes\n"
    ),
}
"""What is in the image beside packages: (path, content)."""


@dataclass(frozen=True)
class DebianSystem:
    """An image in the cache. It is for copying."""

    image: Path
    key: str
    packages: Mapping[str, str]
    """Version by package name."""


@dataclass(frozen=True)
class Tools:
    """What the making needs of a finished set-up."""

    qemu: QemuProgram
    kernel: Kernel
    userland: Root
    accelerator: Accelerator


def key(kernel: Kernel) -> str:
    """Return the digest over all that decides what is in the image, but for the versions that the mirror has."""
    scripts = [_script("debian-init.sh"), _script("debian-configure.sh")]
    return digest(RECIPE, SUITE, PACKAGES, LABEL, SIZE, sorted(FILES.items()), scripts, kernel.version, kernel.package)


def own_cache(cache: Cache) -> Cache:
    """The part of the cache where images are, with a lock of its own: making one takes minutes, and keeps nobody else
    from setting up."""
    return Cache(cache.path("debian"))


def find(cache: Cache, kernel: Kernel) -> DebianSystem | None:
    """Return the image if it has been made."""
    name = key(kernel)
    directory = own_cache(cache).path("image", name)
    try:
        record = json.loads((directory / RECORD).read_bytes())
        packages = {entry["name"]: entry["version"] for entry in record["packages"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    image = directory / IMAGE
    return DebianSystem(image, name, packages) if image.is_file() else None


def make(cache: Cache, tools: Tools, reporter: Reporter, environment: Mapping[str, str] = os.environ) -> DebianSystem:
    """Return the image, made now if it does not exist. The caller does not hold the cache's lock.

    Raises EnvironmentProblem, ProgramFailed, WaitTimeout.
    """
    own = own_cache(cache)
    with own.lock(on_wait=reporter.note):
        found = find(cache, tools.kernel)
        if found is not None:
            return found
        directory = own.path("image", key(tools.kernel))
        with own.publish_directory(directory) as partial, own.scratch() as scratch:
            tree = Path(scratch) / "tree.tar"
            with cache.lock(on_wait=reporter.note):
                filesystem, packages = _fetch(cache, tools.kernel, tree, reporter, environment)
            image = partial / IMAGE
            make_file_system(filesystem, tree, image)
            tree.unlink()
            configure(image, tools, Path(scratch), len(packages), reporter)
            image.chmod(0o400)  # it is for copying
            write_record(partial, packages, (SUITE,))
        prune(directory, KEPT)
        found = find(cache, tools.kernel)
        assert found is not None
        return found


def _fetch(
    cache: Cache, kernel: Kernel, tree: Path, reporter: Reporter, environment: Mapping[str, str]
) -> tuple[Root, list[InstalledPackage]]:
    """Write the tar of everything that is in the image; return the root with mke2fs, and which packages these are. The
    caller holds the cache's lock."""
    apt = Apt(cache, (SUITE,), reporter=reporter, environment=environment)
    filesystem = make_root(cache, TOOLS_RECIPE, reporter, apt)
    debs = apt.install_closure(PACKAGES)
    modules = _kernel_package(apt, kernel, reporter)
    reporter.begin("Debian: unpacking")
    with tree.open("wb") as output:
        writer = TreeWriter(output)
        packages = write_packages(writer, debs)
        for name, text in FILES.items():
            writer.file(name, text.encode())
        if modules is not None:
            with command_output(["dpkg-deb", "--fsys-tarfile", str(modules)], f"reading {modules.name}") as stream:
                writer.package(stream, only="usr/lib/modules/")
        writer.close()
    reporter.end(f"{len(packages)} packages")
    discard([*debs, *([modules] if modules is not None else [])])
    remove(cache.path("apt"))  # lists, out of date by the time they might be wanted again
    return filesystem, packages


def make_file_system(tools: Root, tree: Path, image: Path) -> None:
    """Make `image` an ext4 file system with the content of the tar `tree`. Raises ProgramFailed, WaitTimeout."""
    with image.open("wb") as file:
        file.truncate(SIZE)
    options = ["-q", "-t", "ext4", "-L", LABEL, "-m", "1", "-E", "root_owner=0:0"]
    run_lines(
        [*tools.program("usr/sbin/mke2fs"), *options, "-d", tree, image], "making Debian's file system", MAKE_TIMEOUT
    )


def configure(image: Path, tools: Tools, scratch: Path, packages: int, reporter: Reporter) -> None:
    """Boot a machine whose disk is `image`, and have its packages configured.

    Raises EnvironmentProblem if they cannot be, ProgramFailed, WaitTimeout.
    """
    initramfs = scratch / "configure.cpio"
    initramfs.write_bytes(_initramfs(tools))
    complete = False
    done = 0
    last = ""

    def on_line(line: str) -> None:
        nonlocal complete, done, last
        line = line.strip()
        complete = complete or line == _COMPLETE
        if line.startswith("Setting up "):
            done += 1
            reporter.progress(min(done, packages), packages, line.split()[2])
        last = line or last

    reporter.begin("Debian: packages configure themselves")
    drive = f"file={str(image).replace(',', ',,')},format=raw,if=virtio,cache=unsafe,discard=unmap"
    lines = run_lines(
        [
            *tools.qemu.argv,
            *tools.accelerator.arguments,
            *("-machine", "q35", "-cpu", "max", "-smp", "2", "-m", str(MEMORY_MIB)),
            *("-no-user-config", "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"),
            *("-kernel", tools.kernel.image, "-initrd", initramfs),
            *("-append", "console=ttyS0 rdinit=/init panic=-1 no_timer_check cryptomgr.notests quiet"),
            *("-drive", drive),
        ],
        "configuring Debian's packages",
        CONFIGURE_TIMEOUT,
        on_line,
    )
    if not complete:
        tail = "\n  ".join([line for line in lines if line.strip()][-15:])
        raise EnvironmentProblem(f"Debian's packages could not be configured; their machine said at the end:\n  {tail}")
    reporter.end(f"{image.stat().st_blocks * 512 / 1e6:.0f} MB")


def _initramfs(tools: Tools) -> bytes:
    from vmbus_guest import newc  # its package imports this one

    modules = tools.kernel.closure([_MODULE])
    return newc.write(
        [
            *(newc.directory(name) for name in ("dev", "disk", "proc", "sys")),
            newc.character_device("dev/console", 5, 1),
            newc.file("bin/busybox", (tools.userland.path / "usr/bin/busybox").read_bytes(), 0o755),
            newc.file("init", _script("debian-init.sh").replace("@complete@", _COMPLETE).encode(), 0o755),
            newc.file("configure", _script("debian-configure.sh").encode()),
            newc.file("modules/order", "".join(f"{name}\n" for name in modules).encode()),
            *(newc.file(f"modules/{name}.ko", tools.kernel.module_path(name).read_bytes()) for name in modules),
        ]
    )


def _kernel_package(apt: Apt, kernel: Kernel, reporter: Reporter) -> Path | None:
    """The package of the guest's kernel, for all its modules; None if the archive has another version by now."""
    try:
        (deb,) = apt.download([f"linux-image-{kernel.version}={kernel.package}"])
    except ProgramFailed:
        deb = None
    if deb is None or package_fields(deb).version != kernel.package:
        reporter.note(
            f"the archive has no package of the guest's kernel {kernel.package} any more: Debian goes without more "
            "modules than the guest is booted with"
        )
        return None
    return deb


def _script(name: str) -> str:
    return resources.files("vmbus").joinpath("templates", name).read_text(encoding="utf-8")
