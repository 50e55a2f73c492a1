"""What a campaign is expected to keep, besides losing nothing: budgets, and the figures of an earlier one.

Both are kept in its folder (`expected.json`), so that its report is made of the folder alone, whoever makes it. They
are no part of the campaign's settings: what is done in it does not depend on them, and they may be given anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from vmbus.errors import UsageError
from vmbus.provision.cache import publish_bytes
from vmbus.soak.measures import MEASURES, QUANTITIES, SHOW, known, parse, quantile, value_of
from vmbus.soak.records import BudgetResult, Change, Comparison, Environment, Report

EXPECTED_FILE = "expected.json"
COMPARED = ("downtime", "duration", "save", "restore", "state")
"""Quantities that are compared with an earlier campaign, by their medians, for each kind of operation."""
ENOUGH = 8
"""Operations of a kind that both campaigns need before a growth is called one."""
SMALL = {"state": 1024.0}
"""A growth by less than this is none (bytes; for all others 10 ms): it is within what a clock and a disk scatter."""


class Budget(msgspec.Struct, frozen=True):
    measure: str
    limit: float
    kind: str = ""
    """Only operations of this kind; empty for all."""


class Figure(msgspec.Struct, frozen=True):
    """The median of a quantity in the operations of a kind, in an earlier campaign."""

    kind: str
    quantity: str
    median: float
    operations: int


class Baseline(msgspec.Struct, frozen=True):
    """What is needed of an earlier campaign to compare with it."""

    seed: int
    started: str
    environment: Environment
    figures: list[Figure]


class Expected(msgspec.Struct, kw_only=True):
    """`expected.json`."""

    budgets: list[Budget] = []
    baseline: Baseline | None = None
    growth: float | None = None
    """By which share a median may be above the earlier campaign's; None: a growth is only shown."""

    @classmethod
    def of(cls, budgets: list[Budget], compare: Path | None, growth: float | None) -> Expected | None:
        """What a command line says; None where it says nothing, and what the folder has stays. Raises UsageError."""
        if growth is not None and compare is None:
            raise UsageError("--max-growth needs --compare: growth since when?")
        if not budgets and compare is None:
            return None
        return cls(budgets=budgets, baseline=load_baseline(compare) if compare is not None else None, growth=growth)

    def check(self, kinds: list[str]) -> None:
        """Raise UsageError if a budget is on a kind of operation that the campaign does not have."""
        for one in self.budgets:
            if one.kind and one.kind not in kinds:
                raise UsageError(f"there is no operation {one.kind!r}; known: {', '.join(sorted(kinds))}")

    def write(self, folder: Path) -> None:
        """Keep it in a campaign's folder. Raises OSError."""
        publish_bytes(folder / EXPECTED_FILE, msgspec.json.encode(self) + b"\n")


def read(folder: Path) -> Expected:
    """What the campaign in `folder` is expected to keep. Raises ValueError where that cannot be read."""
    try:
        found = msgspec.json.decode((folder / EXPECTED_FILE).read_bytes(), type=Expected)
        unknown = {one.measure for one in found.budgets} - MEASURES.keys()
        if unknown:
            raise ValueError(f"there is no measure {', '.join(sorted(unknown))}")
    except FileNotFoundError:
        return Expected()
    except (OSError, ValueError) as error:  # msgspec's errors and those of UTF-8 are ValueErrors
        raise ValueError(f"{EXPECTED_FILE}: what the campaign is to keep cannot be read: {error}") from error
    return found


def parse_budget(name: str, text: str) -> Budget:
    """A budget as on the command line: LIMIT or KIND=LIMIT. Raises ValueError, which says what is wrong."""
    kind, _, limit = text.rpartition("=")
    measure = MEASURES[name]
    if kind and name == "throughput":
        raise ValueError("throughput is that of all episodes, not of a kind of operation")
    return Budget(measure=name, kind=kind, limit=parse(limit, measure.unit))


def load_baseline(path: Path) -> Baseline:
    """The figures of an earlier campaign: its `report.json`, or its folder. Raises UsageError."""
    if path.is_dir():
        path = path / "report.json"
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except OSError as error:
        raise UsageError(f"cannot read the report to compare with, {path}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no report of a campaign: {error}") from error
    return Baseline(report.seed, report.started, report.environment, list(_figures(report)))


def _figures(report: Report) -> Iterator[Figure]:
    for kind in report.by_kind:
        carried_out = [one for one in report.operation_records if one.kind == kind and one.outcome != "failed"]
        for quantity in COMPARED:
            values = known(carried_out, quantity)
            if values:
                yield Figure(kind, quantity, quantile(values, 0.5), len(values))


# --- judging -------------------------------------------------------------------------------------------------------


def judge(report: Report, expected: Expected, *, finished: bool) -> tuple[list[BudgetResult], Comparison | None]:
    """What became of the budgets and of the comparison. Only a campaign that is finished can break them.

    A budget on something of which nothing was measured is not kept: a check that cannot fail is none.
    """
    results = []
    for one in expected.budgets:
        value = value_of(report, one.measure, one.kind)
        if value is None:
            kept = False
        else:
            kept = value <= one.limit if MEASURES[one.measure].side == "max" else value >= one.limit
        results.append(
            BudgetResult(
                measure=one.measure, kind=one.kind, limit=one.limit, value=value, kept=kept if finished else None
            )
        )
    if expected.baseline is None:
        return results, None
    return results, _compare(report, expected.baseline, expected.growth, finished)


def _compare(report: Report, baseline: Baseline, growth: float | None, finished: bool) -> Comparison:
    now = {(one.kind, one.quantity): one for one in _figures(report)}
    changes = []
    for before in baseline.figures:
        after = now.get((before.kind, before.quantity))
        if after is None:
            continue
        grown = after.median - before.median
        changes.append(
            Change(
                kind=before.kind,
                quantity=before.quantity,
                before=before.median,
                now=after.median,
                operations=(before.operations, after.operations),
                grown=growth is not None
                and finished
                and min(before.operations, after.operations) >= ENOUGH
                and grown > SMALL.get(before.quantity, 0.01)
                and grown > growth * before.median,
            )
        )
    there = baseline.environment
    names = ("project", "qemu", "libvfio_user", "guest_kernel", "accelerator", "processors")
    return Comparison(
        seed=baseline.seed,
        started=baseline.started,
        growth=growth,
        differences=[
            f"{name} was {getattr(there, name)}, and is {getattr(report.environment, name)}"
            for name in names
            if getattr(there, name) != getattr(report.environment, name)
        ],
        changes=changes,
    )


def broken(report: Report) -> list[str]:
    """What of its expectations a finished campaign has not kept, a line each, for people."""
    lines = [broken_text(one) for one in report.budgets if one.kept is False]
    return lines + [change_text(one) for one in report.comparison.changes if one.grown] if report.comparison else lines


def budget_text(one: BudgetResult) -> str:
    """A budget in a line: what it is on."""
    measure = MEASURES[one.measure]
    of = f" of {one.kind}" if one.kind else ""
    return f"{measure.text}{of}: {'at most' if measure.side == 'max' else 'at least'} {measure.show(one.limit)}"


def broken_text(one: BudgetResult) -> str:
    came = "nothing of it was measured" if one.value is None else f"it is {MEASURES[one.measure].show(one.value)}"
    return f"{budget_text(one)}, and {came}"


def change_text(one: Change) -> str:
    """A growth in a line, for people."""
    share = f"{(one.now / one.before - 1) * 100:+.0f} %" if one.before else "from nothing"
    show = SHOW[QUANTITIES[one.quantity].unit]
    return f"median {one.quantity} of {one.kind}: {show(one.before)} before, {show(one.now)} now ({share})"
