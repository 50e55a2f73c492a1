"""The native core, built into the cache by the C compiler that libvfio-user needs anyway.

Python's headers are the running Python's where they are installed, else those of a Debian package: with the stable ABI
any version's will do. `VMBUS_CORE=pure` goes without the native core; without a compiler that is what happens too,
unless `VMBUS_CORE=native` asks for it. See docs/native-core.md.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from vmbus import native
from vmbus.errors import EnvironmentProblem
from vmbus.native import build
from vmbus.provision.cache import Cache, publish_bytes
from vmbus.provision.libvfio_user import find_compiler
from vmbus.provision.programs import ask, complaint
from vmbus.provision.report import Reporter, SilentReporter
from vmbus.provision.roots import RootRecipe, make_root
from vmbus.provision.sources import SUITE

HEADERS_RECIPE = RootRecipe("python-headers", (SUITE,), ("libpython3.13-dev",), closure=False)
_HEADERS = ("usr/include/python3.13", "usr/include")

LOAD_TIMEOUT = 60.0

_LOAD = """
import sys
from importlib import machinery, util
loader = machinery.ExtensionFileLoader("_core", sys.argv[1])
loader.exec_module(util.module_from_spec(util.spec_from_loader("_core", loader)))
"""
"""Run by the Python that the file is for, in a process of its own."""


def settled(cache: Cache, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether there is nothing to build: it is there, is not wanted, or cannot be for want of a compiler."""
    setting = native.wanted(environment.get(native.SETTING, ""))
    if setting == "pure" or native.find(cache.root) is not None:
        return True
    return setting != "native" and not _compiler()


def find(cache: Cache, reporter: Reporter | None = None, environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the native core's file, built if need be; None: the pure twin is to run.

    The caller holds the cache's lock. Raises EnvironmentProblem (no compiler for what `VMBUS_CORE` asks for, a failed
    build), ProgramFailed, WaitTimeout.
    """
    reporter = reporter or SilentReporter()
    setting = native.wanted(environment.get(native.SETTING, ""))
    if setting == "pure":
        return None
    found = native.find(cache.root)
    if found is not None:
        return found
    compiler = find_compiler() if setting == "native" else _compiler()
    if not compiler:
        reporter.note("no C compiler: rings and packets are served by Python alone")
        return None
    headers = python_headers(cache, reporter)
    final = cache.path("native", build.key())
    with cache.publish_directory(final) as partial:
        reporter.begin("Building the native core")
        try:
            build.compile_core(compiler, headers, partial / build.FILE_NAME)
            check([sys.executable, "-I"], partial / build.FILE_NAME)
        except build.BuildError as error:
            raise EnvironmentProblem(
                f"building the native core failed; set {native.SETTING}=pure to go without it:\n{error}"
            ) from error
        facts = {"compiler": compiler, "headers": str(headers[0])}
        publish_bytes(partial / "build.json", (json.dumps(facts, indent=1) + "\n").encode())
        reporter.end()
    return final / build.FILE_NAME


def _compiler() -> str:
    """A compiler, or nothing."""
    try:
        return find_compiler()
    except EnvironmentProblem:
        return ""


def python_headers(cache: Cache, reporter: Reporter) -> list[Path]:
    """Return the folders with Python's headers, fetched if need be. The caller holds the cache's lock."""
    installed = Path(sysconfig.get_path("include"))
    if (installed / "Python.h").exists():
        return [installed]
    root = make_root(cache, HEADERS_RECIPE, reporter)
    return [root.path / folder for folder in _HEADERS]


def check(python: list[str], file: Path) -> None:
    """Raise BuildError if this Python (the start of its command line) cannot load the file."""
    done = ask([*python, "-c", _LOAD, str(file)], python[0], LOAD_TIMEOUT)
    if done.returncode != 0:
        raise build.BuildError(complaint(done))
