"""The project as its wheel installs it: in a folder without a checkout, by what pyproject.toml says is in a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

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
