"""What a campaign is to do: its settings, on the command line or in a schedule file (TOML or JSON)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.soak.workloads import ALL_RECIPES, RECIPES, STOCK_RECIPES
from vmbus.util.explaining import explain

Kind = Literal[
    "save_restore",
    "save_restore_live",
    "migrate",
    "cancelled_migration",
    "sabotaged_migration",
    "full_disk",
    "checkpoint",
    "revert",
    "clone",
    "pause",
    "hot_add",
    "rescind",
    "kill",
    "driver_kill",
]
"""Operations; `vmbus.soak.operations` carries them out."""

WEIGHTS: dict[Kind, float] = {
    "save_restore": 3.0,
    "save_restore_live": 3.0,
    "migrate": 4.0,
    "cancelled_migration": 1.0,
    "sabotaged_migration": 1.0,
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
"""How often each is drawn, where settings do not say otherwise."""

DEFAULT_OPERATIONS = 100

LOSE_ONE_IN_A_THOUSAND: Literal["lose-one-in-a-thousand"] = "lose-one-in-a-thousand"
"""A sabotage: the burst provider forgets every thousandth packet that is restored to it."""

DISK_LOSES_A_BLOCK: Literal["disk-loses-a-block"] = "disk-loses-a-block"
"""A sabotage: after each restore of a VM with Linux's own drivers its disk has forgotten a write."""

Scalar = str | int | float | bool
Weight = Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class Step(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One operation of a `script`. What `parameters` does not say is drawn."""

    kind: Kind
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
    weights: dict[Kind, Weight] = {}
    """How often operations are drawn; those that are not named keep WEIGHTS; 0: never."""
    workloads: dict[str, Annotated[float, msgspec.Meta(ge=0, le=1)]] = {}
    """Share of the episodes in which a workload runs; those that are not named keep that of their recipe."""
    linux: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.25
    """Share of the episodes whose guest has Linux's own drivers, where `description` leaves that open."""
    script: list[Step] = []
    """These operations, in this order, in every episode, instead of drawn ones."""
    audit: bool = True
    """Whether both ends keep records of each packet, which the auditor checks at the end of an episode."""
    description: str = ""
    """The machine: a VM description by name or path. Providers that workloads need are added. Empty: a small one."""
    packets: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64
    """Wanted in flight, queued and sent each, before an operation begins."""
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
        for name, share in self.workloads.items():
            if name not in ALL_RECIPES:
                raise ValueError(f"there is no workload {name!r}; known: {', '.join(sorted(ALL_RECIPES))}")
            if not math.isfinite(share):
                raise ValueError(f"the share of workload {name!r} is no number")
        if not any(self.share(name) == 1 for name in RECIPES if RECIPES[name].sends):
            names = ", ".join(sorted(name for name in RECIPES if RECIPES[name].sends))
            raise ValueError(f"one of the workloads {names} must have the share 1: nothing else makes the host send")
        if self.linux and not any(self.share(name) == 1 for name in STOCK_RECIPES):
            names = ", ".join(sorted(STOCK_RECIPES))
            raise ValueError(f"one of the workloads {names} must have the share 1, or 'linux' be 0")
        if not self.script and not any(self.weight(kind) for kind in WEIGHTS if kind not in ("revert", "rescind")):
            raise ValueError("all weights are 0: no operation is left (revert and rescind need others before them)")

    def weight(self, kind: Kind) -> float:
        """How often an operation is drawn."""
        return self.weights.get(kind, WEIGHTS[kind])

    def share(self, workload: str) -> float:
        """Of the episodes in which a workload runs."""
        return self.workloads.get(workload, ALL_RECIPES[workload].share)

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
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EnvironmentProblem(f"cannot read schedule {path}: {error.strerror}") from error
    form = "JSON" if path.suffix == ".json" else "TOML"
    try:
        values = json.loads(data) if form == "JSON" else msgspec.toml.decode(data)
    except (ValueError, RecursionError) as error:  # what is not text, or not of the form
        raise UsageError(f"{path}: not {form}: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a schedule is an object with the fields {', '.join(Settings.__struct_fields__)}")
    return values
