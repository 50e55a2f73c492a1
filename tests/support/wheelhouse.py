"""This checkout as a wheel, with all that it wants, for a machine that has no network: what pip is given there."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support import installed, pace
from support.installed import CHECKOUT
from vmbus.provision.environment import PIP_QUIET

PIP = "pip==25.3 --hash=sha256:9655943313a94722b7774661c21049070f6bbb0a1516bf02f7c8d5d9201514cd\n"
"""For a system without one; it runs from its wheel."""


def wanted() -> str:
    """The lines of the lock file for all that the project wants, without its extras."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    texts = list(project["dependencies"])
    names: set[str] = set()
    while texts:
        one = Requirement(texts.pop())
        name = canonicalize_name(one.name)
        if name not in names and (one.marker is None or one.marker.evaluate({"extra": ""})):
            names.add(name)
            texts += requires(name) or []
    lock = (CHECKOUT / "requirements.lock").read_text()
    found = re.finditer(r"^([a-z0-9-]+)==.*?(?=^\S|\Z)", lock, re.MULTILINE | re.DOTALL)
    return "".join(block[0] for block in found if block[1] in names)


def fill(folder: Path, python: str) -> None:
    """Put the wheels for that version of Python (such as 3.13) into a new folder."""
    folder.mkdir(parents=True)
    source = folder.with_name(f"{folder.name}-sdist")
    source.mkdir()
    installed.wheel(folder, installed.sdist(source))
    pins = folder / "pins.txt"
    pins.write_text(PIP + wanted())
    foreign = ["--python-version", python, "--only-binary=:all:", "--no-deps", "--require-hashes"]
    pip = [sys.executable, "-m", "pip", "download", *PIP_QUIET]
    arguments = [*foreign, "--dest", str(folder), "--requirement", str(pins)]
    done = subprocess.run([*pip, *arguments], capture_output=True, text=True, timeout=pace.seconds(300))
    assert done.returncode == 0, done.stdout + done.stderr
