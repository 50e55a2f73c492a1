"""What a campaign is to do: its settings, on the command line or in a schedule file (TOML or JSON)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from vmbus.errors import UsageError, os_error
from vmbus.soak.entries import (
    OperationEntry,
    Share,
    Weight,
    WorkloadEntry,
    located,
    operation_of_package,
    workload_of_package,
)
from vmbus.soak.plan import Scalar
from vmbus.soak.workloads import ALL_RECIPES, RECIPES, STOCK_RECIPES
from vmbus.util.explaining import explain

WEIGHTS: dict[str, float] = {
    "save_restore": 3.0,
    "save_restore_live": 3.0,
    "migrate": 4.0,
    "cancelled_migration": 1.0,
    "sabotaged_migration": 1.0,
    "far_migration": 0.5,
    "full_disk": 0.5,
    "checkpoint": 1.0,
    "revert": 1.5,
    "clone": 0.5,
    "pause": 0.5,
    "hot_add": 0.5,
    "rescind": 0.5,
    "kill": 1.0,
    "driver_kill": 0.5,
}
"""Operations, and how often each is drawn where settings do not say otherwise; `vmbus.soak.operations` carries them
out."""

OTHERS = "*"
"""In `workloads`: all of ours that are not named."""

DEFAULT_OPERATIONS = 100

LOSE_ONE_IN_A_THOUSAND: Literal["lose-one-in-a-thousand"] = "lose-one-in-a-thousand"
"""A sabotage: the burst provider forgets every thousandth packet that is restored to it."""

DISK_LOSES_A_BLOCK: Literal["disk-loses-a-block"] = "disk-loses-a-block"
"""A sabotage: after each restore of a VM with Linux's own drivers its disk has forgotten a write."""


class Step(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One operation of a `script`. What `parameters` does not say is drawn."""

    kind: str
    parameters: dict[str, Scalar] = {}


class Settings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """See each field. Everything that happens follows from these: the same settings are the same schedule."""

    seed: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = 1
    operations: Annotated[int, msgspec.Meta(ge=1, le=10_000_000)] | None = None
    """How many in all. Without it and `seconds`: DEFAULT_OPERATIONS."""
    seconds: Annotated[float, msgspec.Meta(gt=0, le=1e8)] | None = None
    """No episode begins after this time."""
    per_episode: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 12
    """Operations between the boot of a VM and the comparison of all books at its end."""
    weights: dict[str, Weight] = {}
    """How often operations are drawn; those that are not named keep WEIGHTS; 0: never."""
    workloads: dict[str, Share] = {}
    """Share of the episodes in which a workload runs; those that are not named keep that of their recipe, or have that
    of OTHERS, if it is given."""
    linux: Share = 0.25
    """Share of the episodes whose guest has Linux's own drivers, where `description` leaves that open."""
    script: list[Step] = []
    """These operations, in this order, in every episode, instead of drawn ones."""
    workload: list[WorkloadEntry] = []
    """Workloads of one's own."""
    operation: list[OperationEntry] = []
    """Operations of one's own."""
    path: list[str] = []
    """Directories in which the modules of one's own are; for a schedule file its own, unless it says otherwise."""
    audit: bool = True
    """Whether both ends keep records of each packet, which the auditor checks at the end of an episode."""
    description: str = ""
    """The machine: a VM description by name or path. Providers that workloads need are added. Empty: a small one."""
    packets: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64
    """Wanted in flight, queued and sent each, before an operation begins, where a workload runs that sees to it."""
    pace: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 1000
    """Transactions that are completed between two operations: drawn from a quarter of this to this."""
    operation_seconds: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 180.0
    """Bound of one operation, with the wait for load before it."""
    finish_seconds: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 120.0
    """Bound of the workloads' end."""
    stall_seconds: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 30.0
    """Without progress for so long, by its own clock, a workload gives up."""
    sabotage: Literal["", "lose-one-in-a-thousand", "disk-loses-a-block"] = ""
    """Only for tests of the soak itself."""

    def __post_init__(self) -> None:
        if self.operations is not None and self.seconds is not None:
            raise ValueError("'operations' and 'seconds' are both given: a campaign ends by one of them")
        for taken, entries in ((ALL_RECIPES, self.workload), (WEIGHTS, self.operation)):
            names = [entry.name for entry in entries]
            for name in names:
                if name in taken or names.count(name) > 1:
                    raise ValueError(f"there are two of the name {name!r}: give yours another one")
        for name, share in self.workloads.items():
            if name not in (OTHERS, *ALL_RECIPES) and name not in [entry.name for entry in self.own_workloads()]:
                known = ", ".join(sorted([*ALL_RECIPES, *(entry.name for entry in self.workload)]))
                raise ValueError(f"there is no workload {name!r}; known: {known}")
            if not math.isfinite(share):
                raise ValueError(f"the share of workload {name!r} is no number")
        for kind in [*self.weights, *(step.kind for step in self.script)]:
            if kind not in WEIGHTS and self.own_operation(kind) is None:
                known = ", ".join([*WEIGHTS, *(entry.name for entry in self.operation)])
                raise ValueError(f"there is no operation {kind!r}; known: {known}")
        if not self.description and self.linux < 1:
            self._require_one(
                [name for name in RECIPES if RECIPES[name].sends], False, "nothing else makes the host send"
            )
        if not self.description and self.linux:
            self._require_one(list(STOCK_RECIPES), True, "or 'linux' be 0")
        if not self.script and not any(self.weight(kind) for kind in self.kinds if kind not in ("revert", "rescind")):
            raise ValueError("all weights are 0: no operation is left (revert and rescind need others before them)")

    def _require_one(self, names: list[str], stock: bool, why: str) -> None:
        own = [entry.name for entry in self.own_workloads() if entry.stock == stock]
        if not any(self.share(name) == 1 for name in [*names, *own]):
            raise ValueError(f"one of the workloads {', '.join(sorted([*names, *own]))} must have the share 1: {why}")

    def own_workloads(self) -> list[WorkloadEntry]:
        """Those that are none of ours: of the settings, and of packages as far as `workloads` names them."""
        there = {entry.name for entry in self.workload}
        named = (
            workload_of_package(name)
            for name in self.workloads
            if name not in there and name not in (OTHERS, *ALL_RECIPES)
        )
        return [*self.workload, *filter(None, named)]

    def own_operation(self, kind: str) -> OperationEntry | None:
        """An operation that is none of ours: of the settings, or of a package."""
        return next((entry for entry in self.operation if entry.name == kind), None) or operation_of_package(kind)

    @property
    def kinds(self) -> list[str]:
        """All operations of this campaign."""
        return list(dict.fromkeys([*WEIGHTS, *(entry.name for entry in self.operation), *self.weights]))

    def weight(self, kind: str) -> float:
        """How often an operation is drawn."""
        own = {entry.name: entry.weight for entry in self.operation}
        return self.weights.get(kind, WEIGHTS[kind] if kind in WEIGHTS else own.get(kind, 0.0))

    def share(self, workload: str) -> float:
        """Of the episodes in which a workload runs."""
        if workload in self.workloads:
            return self.workloads[workload]
        if workload in ALL_RECIPES:
            return self.workloads.get(OTHERS, ALL_RECIPES[workload].share)
        return next(entry.share for entry in self.workload if entry.name == workload)

    @property
    def total(self) -> int | None:
        """Operations of the whole campaign; None when it runs for a time."""
        if self.seconds is not None:
            return None
        return DEFAULT_OPERATIONS if self.operations is None else self.operations

    @property
    def length(self) -> int:
        """Operations of an episode."""
        return len(self.script) or self.per_episode


def settings_from(values: dict[str, Any], source: str) -> Settings:
    """Settings from plain data. Raises UsageError that names the source, the field and what is wrong."""
    try:
        return msgspec.convert(values, Settings)
    except msgspec.ValidationError as error:
        raise UsageError(f"{source}: {explain(error, Settings)}") from error


def load_settings(path: Path) -> Settings:
    """Reads a schedule file: settings as TOML, or as JSON if its name ends in .json.

    Raises EnvironmentProblem if it cannot be read, UsageError (file, field, reason) if it is wrong.
    """
    return settings_from(read_values(path), str(path))


def read_values(path: Path) -> dict[str, Any]:
    """What a schedule file says, as plain data. Raises as `load_settings` does for what is not TOML, or not JSON."""
    with os_error(f"cannot read schedule {path}"):
        data = path.read_bytes()
    form = "JSON" if path.suffix == ".json" else "TOML"
    try:
        values = json.loads(data) if form == "JSON" else msgspec.toml.decode(data)
    except (ValueError, RecursionError) as error:  # what is not text, or not of the form
        raise UsageError(f"{path}: not {form}: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a schedule is an object with the fields {', '.join(Settings.__struct_fields__)}")
    return located(values, path.absolute().parent)
