"""A Chromium for looking at reports: only for the tests that do, and for pictures in the documentation.

The order is `VMBUS_CHROMIUM` (a path; nothing else is tried then), a Chromium or Chrome on PATH, and Debian's
headless shell in a private root. It is no part of the set-up: whoever wants it asks for it, and it is fetched then
(some 110 MB), verified by apt like everything else.

Unlike QEMU, Chromium cannot be run through a loader of its own: it starts itself again for each of its processes, and
would start the loader. So the packages are those of the host's suite, they are found by the host's loader, and the C
library, which belongs to the loader, is left out.

Standard library only.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

from vmbus.errors import EnvironmentProblem
from vmbus.provision.apt import Apt
from vmbus.provision.cache import Cache, publish_bytes, remove
from vmbus.provision.programs import ask, said
from vmbus.provision.report import Reporter, SilentReporter
from vmbus.provision.roots import Root, RootRecipe, discard, find_root, merge_usr, unpack, write_record
from vmbus.provision.sources import host_suite

MINIMUM_VERSION = 112
"""The first release with today's headless mode."""

ON_PATH = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chromium-headless-shell")
PROGRAM = "usr/lib/chromium/chromium-headless-shell"
QUERY_TIMEOUT = 60.0

BROWSER = ("chromium-headless-shell", "chromium-common")
"""Unpacked alone: what `chromium-common` depends on is for desktops, and large (X utilities, and through them LLVM)."""

FONTS = ("fonts-inter", "fonts-jetbrains-mono")
"""So that a page looks the same wherever its picture is taken."""

_C_LIBRARY = ("libc6", "libc-bin")
_FOLDERS = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/pulseaudio")
_FONT_SETTINGS = "fonts.conf"


@dataclass(frozen=True)
class ChromiumProgram:
    path: Path
    version: int
    """Major."""
    source: str
    """Where it comes from, in words."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What it needs besides the environment that it is started in."""


def recipe(suite: str | None = None) -> RootRecipe:
    """What the private root is made of, for a suite or this host's own."""
    return RootRecipe("chromium", (suite or host_suite(),), (*BROWSER, *FONTS), closure=False)


def find_chromium(
    cache: Cache | None = None,
    reporter: Reporter | None = None,
    environment: Mapping[str, str] = os.environ,
) -> ChromiumProgram:
    """Return a Chromium, fetched into the cache if need be; the cache's lock is taken for that.

    Raises EnvironmentProblem if an explicit setting cannot be used or none can be had; ProgramFailed, WaitTimeout.
    """
    cache = cache or Cache()
    reporter = reporter or SilentReporter()
    explicit = environment.get("VMBUS_CHROMIUM", "").strip()
    if explicit:
        try:
            return query(Path(explicit).expanduser().absolute(), "VMBUS_CHROMIUM")
        except EnvironmentProblem as error:
            raise EnvironmentProblem(f"VMBUS_CHROMIUM cannot be used: {error}; unset it to have one fetched") from error
    for name in ON_PATH:
        installed = shutil.which(name, path=environment.get("PATH"))
        if installed is not None and not _is_a_snap(Path(installed)):
            try:
                return query(Path(installed), "PATH")
            except EnvironmentProblem as error:
                reporter.note(f"{error}; looking further")
    root = find_root(cache, recipe())
    if root is None:
        with cache.lock(on_wait=reporter.note):
            root = make_chromium(cache, reporter)
    return from_root(root)


def make_chromium(cache: Cache, reporter: Reporter, apt: Apt | None = None) -> Root:
    """Return the private root, made now if it does not exist. The caller holds the cache's lock.

    Raises EnvironmentProblem, ProgramFailed, WaitTimeout.
    """
    wanted = recipe()
    found = find_root(cache, wanted)
    if found is not None:
        return found
    apt = apt or Apt(cache, wanted.suites, reporter=reporter)
    apt.update()
    libraries = [name for name in apt.depends(BROWSER[0]) if name not in BROWSER and not name.startswith("<")]
    debs = apt.install_closure(libraries)
    ours = [deb for deb in debs if deb.name.split("_")[0] not in _C_LIBRARY]
    alone = apt.download([*BROWSER, *FONTS])
    with cache.publish_directory(cache.path("root", wanted.key)) as partial:
        reporter.begin("Unpacking chromium")
        merge_usr(partial)
        installed = unpack([*ours, *alone], partial, reporter)
        write_record(partial, installed, wanted.suites)
        publish_bytes(partial / _FONT_SETTINGS, font_settings(cache.path("root", wanted.key)).encode())
        reporter.end(f"{len(installed)} packages")
    discard([*debs, *alone])
    remove(cache.path("apt"))
    root = find_root(cache, wanted)
    assert root is not None
    return root


def from_root(root: Root) -> ChromiumProgram:
    """Return the Chromium of a private root.

    Raises EnvironmentProblem if it does not run.
    """
    environment = {
        "LD_LIBRARY_PATH": ":".join(str(root.path / folder) for folder in _FOLDERS),
        "FONTCONFIG_FILE": str(root.path / _FONT_SETTINGS),
    }
    package = root.packages.get(BROWSER[0], "of unknown version")
    return query(root.path / PROGRAM, f"Debian package {BROWSER[0]} {package}", environment)


def font_settings(root: Path) -> str:
    """Return a fontconfig file that knows the root's fonts and no others."""
    names = {"system-ui": "Inter", "sans-serif": "Inter", "monospace": "JetBrains Mono"}
    aliases = "".join(
        f'<alias binding="strong"><family>{generic}</family><prefer><family>{font}</family></prefer></alias>\n'
        for generic, font in names.items()
    )
    return (
        '<?xml version="1.0"?>\n<!DOCTYPE fontconfig SYSTEM "fonts.dtd">\n<fontconfig>\n'
        f"<dir>{escape(str(root / 'usr/share/fonts'))}</dir>\n"
        f"<cachedir>{escape(str(root / 'var/cache/fontconfig'))}</cachedir>\n{aliases}</fontconfig>\n"
    )


def query(path: Path, source: str, environment: Mapping[str, str] | None = None) -> ChromiumProgram:
    """Return the program at `path` if it runs and is new enough.

    Raises EnvironmentProblem, naming what is wrong.
    """
    done = ask([str(path), "--version"], str(path), QUERY_TIMEOUT, **(environment or {}))
    match = re.search(r"Chrom\w*\D* (\d+)\.", done.stdout)
    if done.returncode != 0 or match is None:
        raise EnvironmentProblem(f"{path} is no Chromium that runs here (status {done.returncode}): {said(done)}")
    version = int(match[1])
    if version < MINIMUM_VERSION:
        raise EnvironmentProblem(f"{path} is Chromium {version}; {MINIMUM_VERSION} or later is needed")
    return ChromiumProgram(path, version, source, dict(environment or {}))


def _is_a_snap(path: Path) -> bool:
    """Tell whether this is a snap, or the script that starts one: it sees neither the cache nor a test's files."""
    try:
        return "/snap/" in str(path.resolve()) or b"/snap/" in path.read_bytes()[:4096]
    except OSError:
        return True
