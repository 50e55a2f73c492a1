"""What a campaign is measured by: figures of its operations and of the whole, for report and budgets."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from vmbus.soak.records import OperationRecord, Report
from vmbus.soak.text import byte_text, count_text, seconds_text

Unit = Literal["time", "size", "number"]


@dataclass(frozen=True)
class Quantity:
    """Something of one operation; its value is None where the operation has no such thing."""

    value: Callable[[OperationRecord], float | None]
    unit: Unit = "time"


QUANTITIES = {
    "downtime": Quantity(lambda one: one.downtime),
    "duration": Quantity(lambda one: one.seconds),
    "save": Quantity(lambda one: one.save_seconds),
    "restore": Quantity(lambda one: one.restore_seconds),
    "memory": Quantity(lambda one: one.memory_bytes, "size"),
    "state": Quantity(lambda one: one.state_bytes, "size"),
    "packets": Quantity(lambda one: sum(one.packets.values()) if one.packets else None, "number"),
}

SHOW: dict[Unit, Callable[[float], str]] = {"time": seconds_text, "size": byte_text, "number": count_text}
_FACTORS: dict[Unit, tuple[dict[str, float], str]] = {
    "time": ({"": 1, "ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86400}, "time, such as 90, 200ms, 20m or 8h"),
    "size": ({"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}, "size, such as 4096, 300k or 1.5m"),
    "number": ({"": 1}, "number"),
}


@dataclass(frozen=True)
class Measure:
    """One figure of a campaign, or of its operations of one kind, that can be bounded."""

    text: str
    """What it is, for people."""
    unit: Unit
    side: Literal["max", "min"] = "max"
    """Which bound it may have."""
    quantity: str = ""
    """Of QUANTITIES; empty for what is no quantity of single operations."""
    part: float = 1.0
    """Which quantile of that."""

    def show(self, value: float) -> str:
        """A value for people."""
        return SHOW[self.unit](value)


MEASURES: dict[str, Measure] = {
    "downtime-p50": Measure("median of the downtimes", "time", quantity="downtime", part=0.5),
    "downtime-p95": Measure("95th percentile of the downtimes", "time", quantity="downtime", part=0.95),
    "downtime": Measure("longest downtime", "time", quantity="downtime"),
    "duration-p95": Measure("95th percentile of what operations take", "time", quantity="duration", part=0.95),
    "save-p95": Measure("95th percentile of the saves", "time", quantity="save", part=0.95),
    "restore-p95": Measure("95th percentile of the restores", "time", quantity="restore", part=0.95),
    "state-p95": Measure("95th percentile of the device state's size", "size", quantity="state", part=0.95),
    "operations": Measure("operations that were carried out", "number", "min"),
    "throughput": Measure("transactions a second of all episodes", "number", "min"),
}
"""By the name that the option has: --max-downtime-p95."""


def value_of(report: Report, name: str, kind: str = "") -> float | None:
    """A measure of a campaign, of all its operations or those of one kind; None where nothing was measured."""
    measure = MEASURES[name]
    carried_out = [one for one in report.operation_records if one.outcome != "failed" and kind in ("", one.kind)]
    if name == "operations":
        return len(carried_out)
    if name == "throughput":
        seconds = sum(one.seconds for one in report.episode_records)
        return report.transactions / seconds if seconds > 0 else None
    values = known(carried_out, measure.quantity)
    return quantile(values, measure.part) if values else None


def known(records: Iterable[OperationRecord], quantity: str) -> list[float]:
    """What a quantity is in the operations that have it, in ascending order."""
    values = (QUANTITIES[quantity].value(one) for one in records)
    return sorted(value for value in values if value is not None and math.isfinite(value))


def quantile(values: Sequence[float], part: float) -> float:
    """The quantile `part` of ascending values, at least one, interpolated."""
    place = part * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (place - below)


def parse(text: str, unit: Unit) -> float:
    """A number with its unit, such as 90, 200ms, 20m or 8h. Raises ValueError, which says so."""
    factors, wanted = _FACTORS[unit]
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]*)", text)
    if found is None or found[2] not in factors:
        raise ValueError(f"{text!r} is no {wanted}")
    return float(found[1]) * factors[found[2]]
