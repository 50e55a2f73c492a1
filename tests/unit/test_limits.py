"""docs/limits.md has every bound, with its value."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
PAGE = CHECKOUT / "docs" / "limits.md"
DEVICE = CHECKOUT / "device"
HEADER = "| Bound | Constant | Value | When it is reached |"
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "s": 1}

LOOKS_LIKE_A_BOUND = re.compile(r"_?(MAX|MAXIMUM|MOST|LONGEST)(_|$)|.*_(LIMIT|MAXIMUM|MAX|BOUND)$")
"""Names of constants of which each has a row, or a line in NOT_BOUNDS."""

DEVELOPERS_TOOLS = ("soak", "cli", "provision", "testbed", "testkit")
"""Packages whose input is the developer's own."""

NOT_BOUNDS = {
    "vmbus.qemu.agent.LONGEST_BOUND": "of what is asked of the guest",
    "vmbus.kmcl.flow_pure.NO_LIMIT": "for the end that has no bound",
    "vmbus.memory.spans._LONGEST_BLOCK": "of a data structure",
    "vmbus.observe.capture.capture._MOST": "of an option",
    "vmbus.observe.capture.pcapng.MAX_BLOCK": "of a format, for a reader of files",
    "vmbus.observe.capture.pcapng.MAX_INTERFACES": "of a format, for a reader of files",
    "vmbus.observe.capture.record.MAX_EXTERNAL": "of a format, for a reader of files",
    "vmbus.observe.inspection.difference._MOST": "a tool's own",
    "vmbus.observe.inspection.tree._LONGEST": "a tool's own",
    "vmbus.operations.migration.verdicts._MOST_READ": "for a reader of our own files",
    "vmbus.vm.own_disks.LONGEST_CHAIN": "of the user's own files",
    "vmbus.vm.own_disks._LONGEST_NAME": "of a format",
    "vmbus.vm.run_directory._LONGEST_SOCKET_NAME": "a length",
    "vmbus.operations.stream.MAX_BANDWIDTH": "not our own work's",
    "vmbus.server.driven._LONGEST_NAP": "how often it looks",
    "vmbus.snapshot.bundle._MANIFEST_LIMIT": "for a reader of files",
    "vmbus.snapshot.checkpoints._RECORD_LIMIT": "for a reader of files",
    "vmbus.providers.network.interface._MOST_HOSTS": "of the host's own bridge",
    "vmbus.providers.network.tap.NAME_LIMIT": "the system's",
    "vmbus.transport.bindings.MAX_MESSAGE": "follows from another one",
    "vmbus.util.listening.LONGEST_PATH": "the system's",
    "vmbus.transport.migration.LONGEST_LOOK": "a length",
    "vmbus.wire.gpa.MAX_PFN": "of a format",
    "vmbus.wire.hvsock.MAX_PORT": "of a format",
}


def rows() -> list[list[str]]:
    lines = PAGE.read_text().splitlines()
    found = []
    for start in (index for index, line in enumerate(lines) if line == HEADER):
        for line in lines[start + 2 :]:
            if not line.startswith("|"):
                break
            found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def value(cell: str) -> float:
    number, _, unit = cell.partition(" ")
    return float(number) * UNITS[unit]


def resolve(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_every_row_is_true() -> None:
    table = rows()
    assert len(table) > 50 and all(len(row) == 4 for row in table)
    told = {row[1].strip("`"): value(row[2]) for row in table}
    assert told == {constant: resolve(constant) for constant in told}
    assert len(told) == len(table), "a constant has two rows"


def constants() -> set[str]:
    """The module-level constants of numbers, by dotted name, whose names look like a bound's."""
    found = set()
    for path in (DEVICE / "vmbus").rglob("*.py"):
        module = ".".join(path.relative_to(DEVICE).with_suffix("").parts)
        if module.split(".")[1] in DEVELOPERS_TOOLS:
            continue
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                name = statement.targets[0].id
                if LOOKS_LIKE_A_BOUND.match(name):
                    found.add(f"{module}.{name}")
    return {name for name in found if isinstance(resolve(name), int | float)}


def test_every_bound_has_its_row() -> None:
    told = {row[1].strip("`") for row in rows()}
    known = constants()
    assert known - told - NOT_BOUNDS.keys() == set(), "give these a row in docs/limits.md, or a line in NOT_BOUNDS"
    assert NOT_BOUNDS.keys() - known == set() and not told & NOT_BOUNDS.keys()
