"""The project as its wheel installs it: in a folder without a checkout, by what pyproject.toml says is in a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path

from support.pace import seconds
from vmbus.provision.cache import Cache
from vmbus.provision.environment import PIP_QUIET, find_pip
from vmbus.provision.report import SilentReporter
from vmbus.provision.roots import RootRecipe, make_root
from vmbus.provision.sources import SUITE

CHECKOUT = Path(__file__).resolve().parents[2]


def install(folder: Path) -> Path:
    """Put what is in the wheel into a new folder for modules. (The native core is a build hook's: set-up has one.)"""
    wheel = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    places = {package: Path(package).name for package in wheel["packages"]} | wheel["force-include"]
    for source, target in places.items():
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so")
        shutil.copytree(CHECKOUT / source, folder / target, ignore=ignored, dirs_exist_ok=True)
    return folder


def run(
    modules: Path, *arguments: str, cwd: Path, timeout: float = 120.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` with the installed project, in a folder where there is nothing of the checkout's."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**kept, "PYTHONPATH": str(modules), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


# --- really built, really installed ----------------------------------------------------------------------------

HATCHLING = RootRecipe(
    "hatchling",
    (SUITE,),
    ("python3-hatchling", "python3-packaging", "python3-pathspec", "python3-pluggy", "python3-trove-classifiers"),
    closure=False,
)
"""What the project's build wants, of Debian's: kept in the cache, so that a test needs no package index."""

BUILD_TIMEOUT = 120.0


def _hatchling(source: Path, target: str, output: Path) -> Path:
    """Build `target` (`sdist` or `wheel`) as pip or `build` have it built; return the one file in the folder."""
    cache = Cache()
    with cache.lock():
        root = make_root(cache, HATCHLING, SilentReporter())
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(output)],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(root.path / "usr/lib/python3/dist-packages")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds(BUILD_TIMEOUT),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = output.iterdir()
    return file


def sdist(folder: Path) -> Path:
    """The sdist of the checkout, in a new folder."""
    return _hatchling(CHECKOUT, "sdist", folder)


def wheel(folder: Path, source: Path) -> Path:
    """The wheel that this sdist builds, in a new folder."""
    unpacked = folder.with_name(f"{folder.name}-source")
    with tarfile.open(source) as tar:
        for member in tar:  # ours, just written; pip does the same
            tar.extract(member, unpacked)
    (top,) = unpacked.iterdir()
    return _hatchling(top, "wheel", folder)


def environment(folder: Path, wheel: Path) -> Path:
    """A virtual environment with the wheel in it, by pip, in a new folder; returns its program `vmbus`. What it depends
    on is what this Python has."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=seconds(BUILD_TIMEOUT))
    (packages,) = folder.glob("lib/python3.*/site-packages")
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    cache = Cache()
    with cache.lock(), cache.scratch() as scratch:
        pip = find_pip(cache, Path(sys.executable), SilentReporter(), Path(scratch))
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    quiet = (*PIP_QUIET, "--no-index", "--no-deps")
    done = subprocess.run(
        [sys.executable, *pip, "--python", folder / "bin/python", "install", *quiet, wheel],
        env=kept,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds(BUILD_TIMEOUT),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "bin/vmbus"


def command(
    program: Path, *words: str, cwd: Path, timeout: float = 120.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program of such an environment, in a folder of its own, with nothing of the checkout's about."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        [program, *words],
        cwd=cwd,
        env={**kept, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds(timeout),
    )
