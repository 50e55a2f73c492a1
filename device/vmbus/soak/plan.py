"""What happens in one episode, whole: whoever carries it out needs nothing else. It is written as `plan.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from vmbus.errors import UsageError, os_error
from vmbus.soak.entries import OperationEntry
from vmbus.soak.records import FORMAT
from vmbus.util.explaining import explain
from vmbus.vm.description import VmDescription

Scalar = str | int | float | bool
Parameters = dict[str, Scalar]


class WorkloadPlan(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    driver: str
    """Its name: that of its test driver, unless it is one of the user's."""
    provider: str
    """Its provider's name in the device's description; "" for none."""
    parameters: dict[str, Any]
    runs: str = ""
    """The test driver of a user's workload."""
    source: str = ""
    """Of a driver that has to be installed first."""
    alone: bool = False
    """Whether the driver runs in a process of its own: it is none that can run beside others."""
    verdict: dict[str, str] = {}
    """See `vmbus.soak.entries.WorkloadEntry`."""

    @property
    def own(self) -> bool:
        """Whether it is a user's. Then the guest counts, since nobody knows its provider's books."""
        return bool(self.runs)


class OperationPlan(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One operation. It begins when `after` further transactions are completed, and enough packets are in flight."""

    kind: str
    parameters: Parameters = {}
    after: int = 0


class EpisodePlan(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One episode, whole. Fields that settings have too are explained there."""

    format: int = FORMAT
    episode: int
    seed: int
    vm: VmDescription
    workloads: list[WorkloadPlan]
    operations: list[OperationPlan]
    audit: bool
    packets: int
    operation_seconds: float
    finish_seconds: float
    sabotage: str = ""
    own: list[OperationEntry] = []
    """Operations of the user's, as far as they occur."""
    path: list[str] = []
    """Where the user's modules are."""


def encode_plan(plan: EpisodePlan) -> bytes:
    """A plan as JSON for people and programs."""
    return msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n"


def load_plan(path: Path) -> EpisodePlan:
    """Reads a plan. Raises EnvironmentProblem if it cannot be read, UsageError (file, field, reason) if it is wrong."""
    with os_error(f"cannot read plan {path}"):
        data = path.read_bytes()
    try:
        found = json.loads(data)
        version = found.get("format") if isinstance(found, dict) else None
        if version != FORMAT:
            raise UsageError(f"{path}: a plan of format {version!r}; this version has format {FORMAT}")
        return msgspec.convert(found, EpisodePlan)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {explain(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON: {error}") from error
