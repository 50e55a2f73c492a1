"""Figures and what is made of them: medians and spreads, targets, the report as JSON. No I/O.

A single number says nothing about how far to trust it. So everything is measured several times, and a `Sample` keeps
all the values in the order in which they were taken.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from vmbus.errors import UsageError

SCHEMA = 1


class Sample(msgspec.Struct, frozen=True):
    """Repeated measurements of one thing. `spread` is the interquartile range over the median: one value that went
    astray is seen in `maximum`, and does not hide how close the others are."""

    values: list[float]
    unit: str
    median: float
    minimum: float
    maximum: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float], unit: str) -> Sample:
        """The sample of these values. Raises UsageError if there are none."""
        if not values:
            raise UsageError(f"no value to make a sample of (unit {unit})")
        kept = [_significant(value) for value in values]
        median = statistics.median(kept)
        low, high = min(kept), max(kept)
        first, _, third = statistics.quantiles(kept, n=4, method="inclusive") if len(kept) > 1 else (low, low, high)
        spread = (third - first) / median if median else 0.0
        return cls(kept, unit, _significant(median), low, high, round(spread, 3))


def _significant(value: float) -> float:
    """Six significant digits: more would only pretend."""
    return float(f"{value:.6g}")


def ratio(values: Sequence[float], baseline: Sequence[float]) -> Sample:
    """How many times its baseline each value is; values and baselines were taken in pairs.

    Paired, since what else the machine was doing at the time hits both. Raises UsageError for lists of different
    lengths, or a baseline of zero.
    """
    if len(values) != len(baseline):
        raise UsageError(f"{len(values)} values cannot be compared with {len(baseline)} baselines one by one")
    if not all(baseline):
        raise UsageError("a baseline of zero")
    return Sample.of([value / base for value, base in zip(values, baseline, strict=True)], "x")


class Target(msgspec.Struct, frozen=True):
    """What was to be reached, and what was: judged by the median. `why`: the note, if it is missed."""

    name: str
    target: float
    direction: Literal["at least", "at most"]
    value: float
    unit: str
    reached: bool
    why: str = ""

    @classmethod
    def judge(
        cls, name: str, sample: Sample, direction: Literal["at least", "at most"], target: float, why: str = ""
    ) -> Target:
        """Compare the sample's median with the target. `why`: what there is to say should it be missed."""
        reached = sample.median >= target if direction == "at least" else sample.median <= target
        return cls(name, target, direction, sample.median, sample.unit, reached, "" if reached else why)


class Row(msgspec.Struct, frozen=True):
    """One line of a part's table: a figure, what it is compared with, and how many times that it is.

    `details` are figures behind it, such as the phases that it is the sum of.
    """

    name: str
    figure: Sample
    baseline: Sample | None = None
    ratio: Sample | None = None
    note: str = ""
    details: dict[str, Sample] = {}


class Part(msgspec.Struct):
    """One part of the benchmark. `parameters` say how it was measured."""

    name: str
    title: str
    parameters: dict[str, Any]
    baseline: str
    rows: list[Row]
    targets: list[Target]
    seconds: float = 0.0


class Report(msgspec.Struct):
    started: str
    quick: bool
    machine: dict[str, Any]
    parts: list[Part]
    seconds: float = 0.0
    schema: int = SCHEMA

    @property
    def targets(self) -> list[Target]:
        """Those of all parts."""
        return [target for part in self.parts for target in part.targets]

    def to_json(self) -> bytes:
        """As a JSON text, with the verdicts together at the top level."""
        content = msgspec.to_builtins(self)
        content["targets"] = msgspec.to_builtins(self.targets)
        return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def readable(value: float, unit: str) -> str:
    if unit == "x":
        return f"{value:.2f}x" if value < 100 else f"{value:.0f}x"
    if abs(value) >= 1000:
        return f"{value:,.0f} {unit}"
    return f"{value:.3g} {unit}"


def readable_sample(sample: Sample) -> str:
    """Median and spread of a sample for people."""
    text = readable(sample.median, sample.unit)
    return text if len(sample.values) == 1 else f"{text} ± {50 * sample.spread:.0f} %"


def readable_target(target: Target) -> str:
    verdict = "reached" if target.reached else "missed"
    return (
        f"{verdict}: {target.name} is {readable(target.value, target.unit)} "
        f"({target.direction} {readable(target.target, target.unit)})" + (f"; {target.why}" if target.why else "")
    )
