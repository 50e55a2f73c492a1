"""Find a QEMU that can do the work: 10.1 or later, with the `vfio-user-pci` device.

The order is `VMBUS_QEMU` (a path; nothing else is tried then), the `qemu-system-x86_64` on PATH if it qualifies, and a
private root with Debian's package from trixie-backports, which runs on older hosts through its own loader.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vmbus.errors import EnvironmentProblem
from vmbus.provision.cache import Cache
from vmbus.provision.programs import ask, said
from vmbus.provision.report import Reporter, SilentReporter
from vmbus.provision.roots import Root, RootRecipe, find_root, make_root
from vmbus.provision.sources import BACKPORTS, SUITE

MINIMUM_VERSION = (10, 1, 0)
"""The first release with a vfio-user client."""

DEVICE = "vfio-user-pci"
PROGRAM = "qemu-system-x86_64"
QUERY_TIMEOUT = 60.0

ROOT_RECIPE = RootRecipe(
    name="qemu",
    suites=(SUITE, BACKPORTS),
    packages=("qemu-system-x86", "qemu-utils"),
    target_release=BACKPORTS,
)


@dataclass(frozen=True)
class QemuProgram:
    argv: tuple[str, ...]
    """Start of every command line: the loader if there is one, the program, where it finds its firmware."""
    version: tuple[int, int, int]
    source: str
    """Where it comes from, in words."""
    image_argv: tuple[str, ...] = ()
    """Start of a qemu-img command line; empty if there is none."""

    @property
    def version_text(self) -> str:
        return ".".join(str(part) for part in self.version)


def parse_version(text: str) -> tuple[int, int, int]:
    """Return (major, minor, micro) from what `qemu-system-x86_64 --version` prints.

    Raises ValueError if there is no version in it.
    """
    match = re.search(r"QEMU emulator version (\d+)\.(\d+)(?:\.(\d+))?", text)
    if match is None:
        raise ValueError(f"no version in {text[:200]!r}")
    return int(match[1]), int(match[2]), int(match[3] or 0)


def query(argv: tuple[str, ...], source: str, image_argv: tuple[str, ...] = ()) -> QemuProgram:
    """Return the program behind `argv` if it is new enough and has the device.

    Raises EnvironmentProblem, naming what it lacks.
    """
    name = argv[0] if len(argv) == 1 else " ".join(argv)
    try:
        version = parse_version(_output((*argv, "--version"), name))
    except ValueError as error:
        raise EnvironmentProblem(f"{name} is not QEMU: {error}") from error
    text = ".".join(str(part) for part in version)
    if version < MINIMUM_VERSION:
        wanted = ".".join(str(part) for part in MINIMUM_VERSION[:2])
        raise EnvironmentProblem(f"{name} is QEMU {text}; {wanted} is the first one with {DEVICE}")
    if f'name "{DEVICE}"' not in _output((*argv, "-machine", "none", "-device", "help"), name):
        raise EnvironmentProblem(f"{name} (QEMU {text}) was built without the device {DEVICE}")
    return QemuProgram(argv=argv, version=version, source=source, image_argv=image_argv)


def find_qemu(
    cache: Cache | None = None,
    reporter: Reporter | None = None,
    environment: Mapping[str, str] = os.environ,
) -> QemuProgram:
    """Return a QEMU that qualifies, fetched into the cache if need be. The caller holds the cache's lock.

    Raises EnvironmentProblem if an explicit setting does not qualify or none can be had; ProgramFailed, WaitTimeout.
    """
    cache = cache or Cache()
    reporter = reporter or SilentReporter()
    explicit = environment.get("VMBUS_QEMU", "").strip()
    if explicit:
        path = Path(explicit).expanduser()
        found = str(path.absolute()) if path.is_file() else shutil.which(explicit, path=environment.get("PATH"))
        if found is None:
            raise EnvironmentProblem(f"VMBUS_QEMU is {explicit}, and there is no such program")
        try:
            return query((found,), "VMBUS_QEMU", _sibling_image_tool(found))
        except EnvironmentProblem as error:
            raise EnvironmentProblem(f"VMBUS_QEMU cannot be used: {error}; unset it to have one fetched") from error
    installed = shutil.which(PROGRAM, path=environment.get("PATH"))
    if installed is not None:
        try:
            return query((installed,), "PATH", _sibling_image_tool(installed))
        except EnvironmentProblem as error:
            if find_root(cache, ROOT_RECIPE) is None:
                reporter.note(f"{error}; fetching Debian's")
    return from_root(make_root(cache, ROOT_RECIPE, reporter))


def from_root(root: Root) -> QemuProgram:
    """Return the QEMU of a private root."""
    data = [part for name in ("qemu", "seabios") for part in ("-L", str(root.path / "usr/share" / name))]
    argv = (*root.program(f"usr/bin/{PROGRAM}"), *data)
    package = root.packages.get("qemu-system-x86", "of unknown version")
    return query(argv, f"Debian package qemu-system-x86 {package}", tuple(root.program("usr/bin/qemu-img")))


def _sibling_image_tool(program: str) -> tuple[str, ...]:
    beside = Path(program).with_name("qemu-img")
    found = str(beside) if beside.is_file() else shutil.which("qemu-img")
    return (found,) if found else ()


def _output(argv: tuple[str, ...], name: str) -> str:
    done = ask(argv, name, QUERY_TIMEOUT)
    if done.returncode != 0:
        raise EnvironmentProblem(f"{name} failed with status {done.returncode}: {said(done)}")
    return done.stdout
