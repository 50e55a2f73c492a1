"""Test drivers on the command line: which there are, which to start with which parameters, a user's own from a file."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from vmbus.cli.agent import parse_parameters
from vmbus.cli.results import paper, print_json
from vmbus.errors import UsageError
from vmbus.testkit.driver_file import DriverFile, trouble_of
from vmbus_guest.testdrivers import CATALOGUE
from vmbus_guest.testdrivers.describe import COMMON, check_parameters, describe


class Drive(NamedTuple):
    """A test driver to start."""

    driver: str
    parameters: dict[str, Any]


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


def jobs_for(drives: list[Drive], own: list[DriverFile]) -> list[Drive]:
    """What to start in the guest. Workloads share their device, so several of them on one device become one `mixed`.

    Raises UsageError for one that does not exist, or does not take these parameters. (What one of a user's own takes
    is only known in the guest.)
    """
    workloads = {one.name for one in own if one.workload}
    known = {one.name for one in own} | set(CATALOGUE)
    together: dict[str, list[Drive]] = {}
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
        device = str(drive.parameters.get("function", ""))
        (together.setdefault(device, []) if is_workload else alone).append(drive)
    return alone + [_mixed(some) if len(some) > 1 else some[0] for some in together.values()]


def _mixed(drives: list[Drive]) -> Drive:
    return Drive("mixed", {"workloads": [{"driver": one.driver, **one.parameters} for one in drives]})


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


def show_drivers(own: list[DriverFile], *, as_json: bool = False) -> None:
    """The catalogue, with the parameters of each driver; what many have in common comes once, at the end."""
    if as_json:
        known = [{"name": name, "summary": entry.summary, **describe(entry)} for name, entry in CATALOGUE.items()]
        print_json({"drivers": known, "own": [one.name for one in own]})
        return
    console = paper()
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
