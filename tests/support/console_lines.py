"""The console lines of README.md and docs/: what a reader types, on the host and in a guest, and what comes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).resolve().parents[2]
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
PROMPT = "vmbus-guest:/# "
_HOST = re.compile(r"^(?:\$ )?((?:[A-Z_]+=\S+ )*)(sudo )?scripts/(\S+)(.*)$")


class HostLine(NamedTuple):
    """A line for the host's shell: the script's name, and its arguments."""

    page: str
    script: str
    arguments: list[str]
    sudo: bool


class GuestLine(NamedTuple):
    """A line for a guest's shell, on the console, and what the page says that it prints."""

    command: str
    prints: list[str]


class Story(NamedTuple):
    """What a page does on the console of the VM `name`."""

    page: str
    name: str
    sudo: bool
    lines: list[GuestLine]


def _fences() -> Iterator[tuple[str, list[str]]]:
    """Each fence of no language, or of the shell's: its page, and its lines."""
    for path in PAGES:
        language: str | None = None
        lines: list[str] = []
        for line in path.read_text().splitlines():
            if not line.startswith("```"):
                lines.append(line)
            elif language is None:
                language, lines = line.strip("`"), []
            else:
                if language in ("", "sh", "console"):
                    yield path.name, lines
                language = None


def _host(page: str, line: str) -> HostLine | None:
    found = _HOST.match(line)
    if found is None:
        return None
    _, sudo, script, rest = found.groups()
    return HostLine(page, script, shlex.split(rest, comments=True), bool(sudo))


def host_lines() -> list[HostLine]:
    """Every line that runs a script."""
    lines = [_host(page, line) for page, block in _fences() for line in block]
    return [line for line in lines if line is not None]


def stories() -> list[Story]:
    """Every fence in which a VM is started and something typed on its console."""
    found = []
    for page, block in _fences():
        story: Story | None = None
        for line in block:
            host = _host(page, line)
            if host is not None and host.script == "run-vm":
                story = Story(page, host.arguments[0] if host.arguments else "demo", host.sudo, [])
                found.append(story)
            elif story is None or host is not None:
                story = None
            elif line.startswith(PROMPT):
                story.lines.append(GuestLine(line.removeprefix(PROMPT), []))
            elif story.lines:
                story.lines[-1].prints.append(line)
    return [one for one in found if one.lines]


def shape(line: str) -> str:
    """A line without what differs from one run to the next: numbers, and how columns are filled."""
    return " ".join(re.sub(r"\d+", "0", line).replace("[ 0", "[0").split())
