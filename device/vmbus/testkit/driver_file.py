"""A test driver of a user's own, in one file: read and checked on the host, installed in a guest."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vmbus.errors import EnvironmentProblem, UsageError
from vmbus_guest.testdrivers import CATALOGUE, NAME_RULE, is_name

if TYPE_CHECKING:
    from vmbus.operations.machine import VirtualMachine

LARGEST_FILE = 512 << 10
"""Bytes of a user's driver."""


class DriverFile(NamedTuple):
    """A user's test driver. `workload`: whether it can run beside others."""

    name: str
    source: str
    workload: bool


def read_driver_file(path: Path) -> DriverFile:
    """Read a user's driver, without running it. Raises EnvironmentProblem and UsageError."""
    name = path.name.removesuffix(".py").replace("_", "-")
    if path.suffix != ".py" or not is_name(name):
        raise UsageError(f"driver file {path}: the file's name is that of the driver, and '.py'; {NAME_RULE}, or '_'")
    if name in CATALOGUE:
        raise UsageError(f"driver file {path}: there is a test driver {name!r} already; give the file another name")
    try:
        source = path.read_text(encoding="utf-8")
    except OSError as error:
        raise EnvironmentProblem(f"cannot read driver file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"driver file {path} is not text in UTF-8: {error}") from error
    if len(source) > LARGEST_FILE:
        raise UsageError(f"driver file {path} has {len(source)} bytes; at most {LARGEST_FILE} can be installed")
    try:
        tree = ast.parse(source, str(path))
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UsageError(f"driver file {path}{line}: {error}") from error
    defined = _defined(tree)
    if not defined & {"WORKLOAD", "run"}:
        raise UsageError(f"driver file {path} defines neither WORKLOAD nor run(context); see docs/test-drivers.md")
    return DriverFile(name, source, "WORKLOAD" in defined)


def _defined(tree: ast.Module) -> set[str]:
    """The names that a module's top level defines."""
    found: set[str] = set()
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            found.add(statement.name)
        elif isinstance(statement, ast.Assign):
            found |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found.add(statement.target.id)
    return found


async def install(vm: VirtualMachine, own: Sequence[DriverFile]) -> None:
    """Put a user's drivers into the guest, and have each imported there once. Raises UsageError for one that fails."""
    for one in own:
        await vm.call_agent("install", name=one.name, source=one.source)
        report = await vm.call_agent("run", timeout=90.0, driver="catalogue", parameters={"driver": one.name})
        if report["state"] != "finished":
            raise UsageError(f"test driver {one.name!r} does not load in the guest: {trouble_of(report)}")


def trouble_of(report: dict[str, Any]) -> str:
    """Why a job of the agent's did not finish, in words."""
    error = report.get("error") or {}
    return f"{error.get('message', report.get('state'))}"
