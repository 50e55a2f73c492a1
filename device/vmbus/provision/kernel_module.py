"""The guest's kernel module (guest/kernel), built for the very kernel that is booted: with it Linux's own VMBus drivers
run on our device. See docs/linux-guest.md.

The kernel's headers come from Debian like the kernel itself, and are compiled against with the host's gcc. Debian's
build programs may want a newer C library than the host has, so they run with one of Debian's. What cannot be built is
no failure: the guest then has the userspace driver only, and a line says so. That is remembered for a day, or until the
programs are there that were missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmbus.errors import VmbusError
from vmbus.provision.apt import Apt
from vmbus.provision.cache import Cache, digest, prune, publish_bytes, remove
from vmbus.provision.guest_files import Kernel
from vmbus.provision.programs import ProgramFailed, run_lines
from vmbus.provision.report import Reporter, SilentReporter
from vmbus.provision.roots import RECORD, Root, discard, merge_usr, unpack, write_record
from vmbus.provision.sources import SUITE

NAME = "vmbus_pci"

SERIES = "6.12"
"""Linux 6.1 reaches its hypervisor by inlined code, which nothing can be put in place of; Debian's 7.x have hv_vmbus
built in, and that has given up before any module is loaded."""

RECIPE = 1
"""Changed when the way of building changes."""

KEPT = 8
"""Modules in the cache, of other kernels and older sources."""

TOOLS = ("make", "gcc", "ld", "objcopy")
BUILD_TIMEOUT = 300.0
PROBLEM_LASTS = 86400.0
"""Seconds until what could not be built is tried again."""

_LIBRARIES = ("libc6", "libelf1t64", "zlib1g", "libzstd1")
"""What Debian's build programs are linked with."""

_PROGRAMS = {"scripts/mod/modpost": "modpost.real-lsb-64", "tools/objtool/objtool": "objtool.real-x86"}
"""Build programs by the names that the build knows: small programs that start others, which want the C library."""

_WITHOUT = ("CONFIG_DEBUG_INFO_BTF_MODULES=", "CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT=")
"""Settings of the kernel's that a module need not share: one needs pahole, the other a newer gcc."""


@dataclass(frozen=True)
class KernelModule:
    """The module, or why there is none."""

    path: Path | None
    problem: str = ""


def source_folder() -> Path:
    """The module's sources: in a checkout, or as installed with the guest's package."""
    here = Path(__file__).resolve()
    checkout = here.parents[3] / "guest/kernel"
    return checkout if checkout.is_dir() else here.parents[2] / "vmbus_guest/kernel"


def sources(folder: Path) -> list[Path]:
    """The files that the module is made of, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".c", ".h") or path.name == "Kbuild")


def module_key(kernel: Kernel, folder: Path) -> str:
    """Digest over all that makes the module what it is."""
    contents = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in sources(folder)]
    return digest(RECIPE, kernel.version, kernel.package, _WITHOUT, contents)


def is_known(version: str) -> bool:
    """Whether the module is written for this kernel (as `uname -r` says it)."""
    return re.match(rf"{re.escape(SERIES)}(?![0-9])", version) is not None


def remembered(
    cache: Cache, kernel: Kernel, environment: Mapping[str, str] = os.environ, folder: Path | None = None
) -> KernelModule | None:
    """What an earlier `find` came to, if that still holds."""
    if not is_known(kernel.version):
        return KernelModule(None, f"the guest's kernel is {kernel.version}, and the module is for {SERIES}")
    directory = cache.path("module", module_key(kernel, folder or source_folder()))
    record = directory / "build.json"
    try:
        facts = json.loads(record.read_bytes())
        problem, missing = facts["problem"], facts["missing"]
        age = time.time() - record.stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError):
        return None
    path = directory / f"{NAME}.ko"
    if not problem:
        return KernelModule(path) if path.is_file() else None
    lasts = 0 <= age < PROBLEM_LASTS and missing == missing_tools(environment)
    return KernelModule(None, str(problem)) if lasts else None


def find(
    cache: Cache,
    kernel: Kernel,
    reporter: Reporter | None = None,
    environment: Mapping[str, str] = os.environ,
    folder: Path | None = None,
) -> KernelModule:
    """Return the module for this kernel, built if need be. The caller holds the cache's lock."""
    reporter = reporter or SilentReporter()
    folder = folder or source_folder()
    found = remembered(cache, kernel, environment, folder)
    if found is not None:
        return found
    directory = cache.path("module", module_key(kernel, folder))
    problem, missing = "", list[str]()
    with cache.publish_directory(directory) as partial:
        try:
            missing = missing_tools(environment)
            if missing:
                raise _CannotBuild(f"{', '.join(missing)} not found; run: sudo apt-get install -y gcc make")
            headers = find_headers(cache, kernel, reporter, environment)
            reporter.begin("Building the guest's kernel module")
            with cache.scratch() as scratch:
                built = build(headers, kernel, folder, Path(scratch))
                shutil.copyfile(built, partial / f"{NAME}.ko")
            reporter.end()
        except (VmbusError, OSError) as error:
            problem = str(error)
            reporter.note(f"the guest's kernel module cannot be built, so guests have the userspace driver: {problem}")
        facts = {"problem": problem, "missing": missing, "kernel": kernel.version, "package": kernel.package}
        publish_bytes(partial / "build.json", (json.dumps(facts, indent=1) + "\n").encode())
    prune(directory, KEPT)
    return KernelModule(None, problem) if problem else KernelModule(directory / f"{NAME}.ko")


class _CannotBuild(VmbusError):
    """There will be no module."""


def missing_tools(environment: Mapping[str, str]) -> list[str]:
    """The programs of the host that a build wants and that are not there."""
    return [name for name in TOOLS if shutil.which(name, path=environment.get("PATH")) is None]


def _headers_key(kernel: Kernel) -> str:
    return f"headers-{digest(RECIPE, kernel.version, kernel.package, _LIBRARIES, length=8)}"


def find_headers(cache: Cache, kernel: Kernel, reporter: Reporter, environment: Mapping[str, str] = os.environ) -> Root:
    """Return a root with the headers of this kernel and the programs to build with, fetched if need be. The caller
    holds the cache's lock.

    Raises EnvironmentProblem, ProgramFailed, WaitTimeout.
    """
    final = cache.path("root", _headers_key(kernel))
    if not (final / RECORD).exists():
        apt = Apt(cache, (SUITE,), reporter=reporter, environment=environment)
        flavour = f"linux-headers-{kernel.version}"
        try:
            needed = [name for name in apt.depends(flavour) if re.match(r"linux-(headers|kbuild)-", name)]
        except ProgramFailed as error:
            raise _CannotBuild(
                f"Debian has no headers of {kernel.version} any more; remove {cache.path('kernel')} to have "
                "its present kernel fetched"
            ) from error
        debs = apt.download([flavour, *needed, *_LIBRARIES])
        with cache.publish_directory(final) as partial:
            reporter.begin("Unpacking the kernel's headers")
            merge_usr(partial)
            installed = unpack(debs, partial, reporter)
            versions = {package.version for package in installed if package.name.startswith("linux-headers-")}
            if versions != {kernel.package}:
                raise _CannotBuild(f"the headers are of {sorted(versions)}, the kernel is {kernel.package}")
            _relocate(partial, final, kernel)
            write_record(partial, installed, (SUITE,))
            reporter.end()
        discard(debs)
        for old in final.parent.glob("headers-*"):
            if old != final:
                remove(old)
    record = json.loads((final / RECORD).read_bytes())
    return Root(final, {entry["name"]: entry["version"] for entry in record["packages"]})


def _relocate(root: Path, final: Path, kernel: Kernel) -> None:
    """Make headers that were unpacked into `root` fit for building with the host's gcc, once they are in `final`."""
    headers = root / "usr/src" / f"linux-headers-{kernel.version}"
    makefile = headers / "Makefile"
    makefile.write_text(makefile.read_text().replace("/usr/src/", f"{final}/usr/src/"))
    # Debian's names its own compiler here, and asks dpkg.
    (headers / ".kernelvariables").write_text(f"override ARCH = x86\noverride KERNELRELEASE = {kernel.version}\n")
    tools = (headers / "scripts").resolve().parent
    there = Root(final, {})
    for name, real in _PROGRAMS.items():
        program = tools / name
        argv = there.program(str((program.parent / real).relative_to(root.resolve())))
        program.unlink()
        program.write_text(f'#!/bin/sh\nexec {" ".join(argv)} "$@"\n')
        program.chmod(0o755)


def build(headers: Root, kernel: Kernel, folder: Path, scratch: Path, more: Sequence[str] = ()) -> Path:
    """Build the module in the empty folder `scratch`; return its file, without what only a debugger wants.

    Raises VmbusError with what the compiler said.
    """
    complaints: list[str] = []

    def on_line(line: str) -> None:
        if "error:" in line or "ERROR:" in line:
            complaints.append(line.replace(f"{scratch}/", "").strip())

    for path in sources(folder):
        shutil.copyfile(path, scratch / path.name)
    tree = headers.path / "usr/src" / f"linux-headers-{kernel.version}"
    argv: list[str | Path] = ["make", "-C", tree, f"M={scratch}", "CC=gcc", *_WITHOUT, *more, "modules"]
    try:
        run_lines(argv, "building the guest's kernel module", BUILD_TIMEOUT, on_line)
    except ProgramFailed as error:
        raise _CannotBuild("\n".join(complaints[:10]) or str(error)) from error
    module = scratch / f"{NAME}.ko"
    run_lines(["objcopy", "--strip-debug", module], "stripping the guest's kernel module", BUILD_TIMEOUT)
    return module
