"""Small files of the kernel's, in sysfs and procfs."""

# os instead of pathlib: imports are slow in an emulated guest.
# ruff: noqa: PTH115, PTH119, PTH123

from __future__ import annotations

import os

from vmbus.errors import EnvironmentProblem


def read_text(path: str) -> str | None:
    """What it says, without the white space around it; None if it cannot be read."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return None


def write_text(path: str, text: str) -> None:
    """Say it. Raises EnvironmentProblem."""
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write '{text}' to {path}: {error.strerror}") from error


def link_name(path: str) -> str | None:
    """The last part of where a link leads; None if there is none."""
    try:
        return os.path.basename(os.readlink(path))
    except OSError:
        return None
