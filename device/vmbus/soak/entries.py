"""Workloads and operations of a user's own: `[[workload]]` and `[[operation]]` of a schedule, and those of packages.

A package offers them as entry points, of the groups `vmbus.soak.workloads` (a `WorkloadEntry`, or its fields as a dict)
and `vmbus.soak.operations` (an async function as `Call` describes). What is merely installed changes no schedule: it
runs where the settings name it, in `workloads` or `weights`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from vmbus.errors import UsageError
from vmbus.providers import provider_class
from vmbus.providers.loading import ALLOW_VARIABLE, PATH_VARIABLE, author_directories, is_external
from vmbus.soak.draw import Draw, drawn
from vmbus.testkit.driver_file import read_driver_file
from vmbus.util.explaining import MODULE_PATTERN, Kind, Name, explain
from vmbus_guest.testdrivers import CATALOGUE, FileEntry
from vmbus_guest.testdrivers.describe import check_parameters

if TYPE_CHECKING:
    from vmbus.soak.figures import Figures
    from vmbus.soak.stage import Stage

WORKLOADS, OPERATIONS = "vmbus.soak.workloads", "vmbus.soak.operations"
"""The groups of entry points."""

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Weight = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
Argv = Annotated[list[str], msgspec.Meta(max_length=256)]
_Module = Annotated[str, msgspec.Meta(pattern=rf"^({MODULE_PATTERN})?\Z")]

Call = Callable[["Stage", dict[str, Any]], Awaitable["Figures"]]
"""An operation: it gets the stage and its parameters, and returns its figures. What it raises fails the episode."""


class WorkloadEntry(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A provider, what uses it in the guest, and what has to come of it. One of `driver`, `driver_file` and `command`
    is given. Values of `options` and `parameters` are taken as they are, or drawn: see `vmbus.soak.draw.drawn`."""

    name: Name
    provider: Kind | None = None
    """The kind of its provider, such as "door_bell:DoorBell"; None: it needs none."""
    options: dict[str, Any] = {}
    """The provider's."""
    driver: str = ""
    """A test driver of the catalogue."""
    driver_file: str = ""
    """A test driver of one's own; relative to the schedule's file."""
    command: Argv = []
    """A program in the guest and its arguments, run again and again; each run has to end with status 0."""
    parameters: dict[str, Any] = {}
    """The driver's."""
    share: Share = 1.0
    """Of the episodes of its kind in which it runs."""
    linux: bool | None = None
    """Whether it runs in the episodes with Linux's own drivers, or in the others. None: a command does."""
    verdict: dict[str, str] = {}
    """Which counts have to agree in the end: of the guest's result (key) and of the provider's status (value)."""

    def __post_init__(self) -> None:
        given = [name for name in ("driver", "driver_file", "command") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"workload {self.name!r} has {' and '.join(given) or 'neither'}: give it one of 'driver', "
                             "'driver_file' and 'command'")  # fmt: skip
        if self.driver and self.driver not in CATALOGUE:
            raise ValueError(f"workload {self.name!r}: there is no test driver {self.driver!r}; known: "
                             f"{', '.join(sorted(CATALOGUE))}")  # fmt: skip
        if self.verdict and self.provider is None:
            raise ValueError(f"workload {self.name!r} has a verdict over its provider's status, and no provider")

    @property
    def stock(self) -> bool:
        """Whether it is for guests with Linux's own drivers."""
        return bool(self.command) if self.linux is None else self.linux


class OperationEntry(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One of `call`, `guest` and `command` is given."""

    name: Name
    weight: Weight = 1.0
    call: _Module = ""
    """An async function, "module:function", see `Call`."""
    parameters: dict[str, Any] = {}
    """What it gets; a value may be drawn."""
    guest: Argv = []
    """A program in the guest and its arguments; it has to end with status 0."""
    provider: str = ""
    """The provider that gets `command`: its name, which is its workload's."""
    command: str = ""
    arguments: dict[str, Any] = {}
    """The command's."""

    def __post_init__(self) -> None:
        given = [name for name in ("call", "guest", "command") if getattr(self, name)]
        if len(given) != 1 or bool(self.command) != bool(self.provider):
            raise ValueError(f"operation {self.name!r}: give it one of 'call', 'guest', and 'provider' with 'command'")


# ---- files and modules -----------------------------------------------------------------------------------------------


def located(values: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Settings as plain data with the paths of their entries as seen from `directory`. Where entries name code, it is
    looked for there, unless `path` says otherwise. What is not of the right form is left to whoever checks it."""
    entries = [one for field in ("workload", "operation") for one in _objects(values.get(field))]
    found = dict(values)
    for one in entries:
        if isinstance(one.get("driver_file"), str) and one["driver_file"]:
            one["driver_file"] = str((directory / one["driver_file"]).absolute())
    path = found.get("path") or ([""] if entries else [])
    if path and isinstance(path, list) and all(isinstance(one, str) for one in path):
        found["path"] = [str((directory / one).absolute()) for one in path]
    return found


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """A context in which these variables of the environment are set."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def code_from(path: list[str], kinds: list[str]) -> Iterator[None]:
    """A context in which modules are found in these directories too, and snapshots may ask for these providers: what a
    plan names, its owner has named."""
    allowed = [*filter(None, os.environ.get(ALLOW_VARIABLE, "").split(",")), *filter(is_external, kinds)]
    places = [*path, *author_directories()]
    with environment(**{ALLOW_VARIABLE: ",".join(allowed), PATH_VARIABLE: os.pathsep.join(places)}):
        yield


def function_of(call: str, path: list[str]) -> Call:
    """The function that "module:function" names. Raises UsageError."""
    module_name, _, name = call.partition(":")
    for directory in path:
        if directory not in sys.path:
            sys.path.append(directory)
    try:
        found = getattr(importlib.import_module(module_name), name)
    except Exception as error:
        raise UsageError(f"operation {call!r} cannot be had: {error!r}") from error
    if not callable(found):
        raise UsageError(f"operation {call!r} is no function")
    function: Call = found
    return function


def check_workload(entry: WorkloadEntry, path: list[str]) -> None:
    """Raises UsageError for a provider that is not there, and for options and parameters that it, or a driver, does not
    take, as far as that can be known without a guest. Imports the code that the entry names."""
    draw = Draw(0)
    if entry.provider is not None:
        with code_from(path, []):
            kind = provider_class(entry.provider)
        try:
            msgspec.convert(drawn(entry.options, draw), kind.Options)
        except msgspec.ValidationError as error:
            reason = explain(error, kind.Options)
            raise UsageError(f"workload {entry.name!r}, options of its provider: {reason}") from error
    if not entry.command:
        driver = CATALOGUE.get(entry.driver)
        if driver is None:
            read_driver_file(Path(entry.driver_file))
            driver = FileEntry(entry.driver_file, "")
        try:
            check_parameters(driver, drawn(entry.parameters, draw))
        except UsageError as error:
            raise UsageError(f"workload {entry.name!r}: {error}") from error


# ---- of packages -----------------------------------------------------------------------------------------------------


def _offered(group: str, name: str) -> EntryPoint | None:
    return next(iter(entry_points(group=group, name=name)), None)


def workload_of_package(name: str) -> WorkloadEntry | None:
    """What an installed package offers under this name. Raises ValueError for one that is none."""
    point = _offered(WORKLOADS, name)
    if point is None:
        return None
    try:
        found = point.load()
        if isinstance(found, Mapping):
            found = msgspec.convert({"name": name, **found}, WorkloadEntry)
    except Exception as error:
        raise ValueError(f"workload {name!r} of a package cannot be had: {error}") from error
    if not isinstance(found, WorkloadEntry):
        raise ValueError(f"workload {name!r} of a package is no WorkloadEntry, and no dict, but {found!r}")
    return found


def operation_of_package(name: str) -> OperationEntry | None:
    """What an installed package offers under this name."""
    point = _offered(OPERATIONS, name)
    return None if point is None else OperationEntry(name=name, call=point.value)
