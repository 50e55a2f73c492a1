"""Test drivers on the command line: which there are, which to start with which parameters, a user's own from a file."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from vmbus.cli.agent import parse_parameters
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.operations.machine import VirtualMachine
from vmbus_guest.testdrivers import CATALOGUE, NAME_RULE, is_name
from vmbus_guest.testdrivers.describe import COMMON, check_parameters, describe

LARGEST_FILE = 512 << 10
"""Bytes of a user's driver."""


class Drive(NamedTuple):
    """A test driver to start."""

    driver: str
    parameters: dict[str, Any]


class DriverFile(NamedTuple):
    """A user's test driver. `workload`: whether it can run beside others."""

    name: str
    source: str
    workload: bool


def parse_drive(text: str) -> Drive:
    """`NAME`, `NAME:KEY=VALUE,...` or `NAME:{JSON}`. Raises UsageError."""
    driver, _, settings = text.partition(":")
    if not driver:
        raise UsageError(f"--drive {text!r}: name a test driver, e.g. --drive echo:count=1000")
    if not settings.startswith("{"):
        return Drive(driver, parse_parameters(settings.split(",") if settings else []))
    try:
        parameters = json.loads(settings)
    except ValueError as error:
        raise UsageError(f"--drive {driver}: the parameters are not JSON: {error}") from None
    if not isinstance(parameters, dict):
        raise UsageError(f"--drive {driver}: the parameters are not a JSON object")
    return Drive(driver, parameters)


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


def jobs_for(drives: list[Drive], own: list[DriverFile]) -> list[Drive]:
    """What to start in the guest. Workloads share the device, so several of them become one `mixed`.

    Raises UsageError for one that does not exist, or does not take these parameters. (What one of a user's own takes
    is only known in the guest.)
    """
    workloads = {one.name for one in own if one.workload}
    known = {one.name for one in own} | set(CATALOGUE)
    together: list[Drive] = []
    alone: list[Drive] = []
    for drive in drives:
        if drive.driver not in known:
            raise UsageError(f"--drive {drive.driver}: no such test driver; there are {', '.join(sorted(known))}")
        entry = CATALOGUE.get(drive.driver)
        if entry is not None:
            try:
                check_parameters(entry, drive.parameters)
            except UsageError as error:
                raise UsageError(f"--drive {drive.driver}: {error}") from None
        is_workload = drive.driver in workloads or (entry is not None and entry.workload() is not None)
        (together if is_workload else alone).append(drive)
    if len(together) > 1:
        workloads_parameter = [{"driver": one.driver, **one.parameters} for one in together]
        together = [Drive("mixed", {"workloads": workloads_parameter})]
    return alone + together


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


def outcome(report: dict[str, Any]) -> str:
    """How a job of the agent's ended, in one line."""
    result = report.get("result")
    if report.get("state") != "finished" or not isinstance(result, dict):
        text = f"{report.get('state')}: {trouble_of(report)}"
    else:
        verdict = result.get("verdict", "without a verdict")
        text = f"finished, {verdict}: {json.dumps(result)}"
    rubbish = report.get("rubbish")
    if rubbish:
        text += f" (it printed {rubbish['lines']} lines that are no reports, the first of them {rubbish['first']})"
    return text


def show_drivers(console: Console, own: list[DriverFile]) -> None:
    """The catalogue, with the parameters of each driver; what many have in common comes once, at the end."""
    common: dict[str, Any] = {}
    for name, entry in CATALOGUE.items():
        found = describe(entry)
        _show(console, name, entry.summary)
        for parameter, about in found["parameters"].items():
            if parameter in COMMON and found["workload"]:
                common.setdefault(parameter, about)
            else:
                _show_parameter(console, parameter, about)
    _show(console, "all that use a channel", "defaults of the ring's pages differ")
    for parameter, about in common.items():
        _show_parameter(console, parameter, about)
    for one in own:
        _show(
            console,
            one.name,
            f'your own; in the guest: vmbus-test catalogue --parameters \'{{"driver": "{one.name}"}}\'',
        )


def _show(console: Console, name: str, summary: str) -> None:
    console.print(Text.assemble((name, "bold"), f"  {summary}"), soft_wrap=True)


def _show_parameter(console: Console, name: str, about: dict[str, Any]) -> None:
    """A parameter with its default, its limits and its text."""
    value = json.dumps(about["default"]) if about["default"] is not None else "LIST"
    if about["minimum"] is not None or about["maximum"] is not None:
        least, most = ("" if about[limit] is None else str(about[limit]) for limit in ("minimum", "maximum"))
        value += f" ({least}..{most})"
    console.print(f"    {name:16} {value:24} {about['text']}", soft_wrap=True)
