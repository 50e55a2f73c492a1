"""What a test has started, down to the children of its children."""

from __future__ import annotations

import os
from pathlib import Path


def children() -> dict[int, str]:
    """Living processes that descend from this one, by process id."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            state, parent = stat.rsplit(") ", 1)[1].split()[:2]
            if state != "Z":
                parents[int(entry.name)] = (int(parent), command)
    found = {os.getpid()}
    while more := {pid for pid, (parent, _) in parents.items() if parent in found and pid not in found}:
        found |= more
    return {pid: parents[pid][1] for pid in found - {os.getpid()}}
