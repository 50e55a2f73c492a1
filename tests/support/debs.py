"""Debian packages, and programs, for tests."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path


def make_deb(
    folder: Path,
    name: str,
    files: Mapping[str, str | bytes],
    control: Mapping[str, str] = {},
    fields: str = "",
    version: str = "1.0",
) -> Path:
    """A package with these files and control files; `fields`: more lines of its stanza.

    A file whose name ends in `*` may be run, as root. A content `->x` makes a symbolic link, `=>x` a hard one.
    """
    root = folder / f"tree-{name}"
    for path, content in files.items():
        target = root / path.rstrip("*")
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        elif content.startswith("->"):
            target.symlink_to(content[2:])
        elif content.startswith("=>"):
            target.hardlink_to(root / content[2:])
        else:
            target.write_text(content)
            target.chmod(0o4755 if path.endswith("*") else 0o644)
    (root / "DEBIAN").mkdir(parents=True)
    stanza = f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: n <n@example.org>\n"
    (root / "DEBIAN/control").write_text(f"{stanza}{fields}Description: d\n")
    for path, content in control.items():
        (root / "DEBIAN" / path).write_text(content)
        (root / "DEBIAN" / path).chmod(0o755 if path.endswith("inst") else 0o644)
    deb = folder / f"{name}_{version}_amd64.deb"
    command = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", root, deb]
    subprocess.run(command, check=True, capture_output=True)
    return deb


def script(path: Path, text: str) -> Path:
    """A program of the shell's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path
