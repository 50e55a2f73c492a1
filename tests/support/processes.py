"""What a test has started, down to the children of its children; and who of them lives.

A zombie is dead: where nobody reaps (a process 1 that does not), it stays.
"""

from __future__ import annotations

import os
from pathlib import Path


def _stat(pid: int | str) -> tuple[str, int] | None:
    """State and parent of a process; None if there is none."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:2]
    except (OSError, ValueError):
        return None
    return state, int(parent)


def alive(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    found = _stat(pid)
    return found is not None and found[0] not in "ZX"


def command_lines() -> dict[int, str]:
    """Of all living processes, by process id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and alive(int(entry.name)):
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            found[int(entry.name)] = words.replace(b"\0", b" ").decode(errors="replace")
    return found


def parents() -> dict[int, int]:
    """Of all living processes, by process id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            one = _stat(entry.name)
            if one is not None and one[0] not in "ZX":
                found[int(entry.name)] = one[1]
    return found


def children() -> dict[int, str]:
    """Living processes that descend from this one, by process id."""
    above = parents()
    found = {os.getpid()}
    while more := {pid for pid, parent in above.items() if parent in found and pid not in found}:
        found |= more
    commands = command_lines()
    return {pid: commands.get(pid, "") for pid in found - {os.getpid()}}
