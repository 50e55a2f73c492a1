"""A report as one HTML file that can be sent to somebody: readable without network and without JavaScript.

The page carries a policy that forbids it to load anything and to run anything but its own script, by digest. So even a
text in the records that got past the escaping could do nothing.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Any, TypeVar

import jinja2
from markupsafe import Markup

from vmbus.soak import plots
from vmbus.soak.expected import COMPARED, ENOUGH, broken, budget_text
from vmbus.soak.measures import MEASURES, QUANTITIES, SHOW, known, quantile
from vmbus.soak.records import CAMPAIGN, Change, EpisodeRecord, EventRecord, OperationRecord, Report
from vmbus.soak.text import byte_text, clean, count_text, seconds_text

MAXIMUM_OPERATIONS = 3000
"""Rows of the table of operations: those that failed, then those with the longest downtime."""
MAXIMUM_EPISODES = 1000
MAXIMUM_EVENTS = 300
MAXIMUM_FAILURES = 100
MAXIMUM_SERIOUS = 20

R = TypeVar("R", EpisodeRecord, OperationRecord)
_TITLES = {"passed": "Passed", "failed": "Failed", "interrupted": "Interrupted"}
_MARKS = {"passed": "✓", "failed": "✗", "interrupted": "–"}


def render(report: Report) -> str:
    """Return the page. Everything from the records is escaped, and shortened where it is long."""
    style, script = _template("report.css"), _template("report.js")
    return _page().render(
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}; "
        "base-uri 'none'; form-action 'none'",
        report=report,
        title=_TITLES[report.verdict],
        mark=_MARKS[report.verdict],
        lead=lead(report),
        began=_moment(report.started),
        tiles=_tiles(report),
        failures=report.failures[:MAXIMUM_FAILURES],
        budgets=[(budget_text(one), one) for one in report.budgets],
        measures=MEASURES,
        comparison=_comparison(report),
        compared=COMPARED,
        earlier=_moment(report.comparison.started) if report.comparison else "",
        enough=ENOUGH,
        kinds=_kinds(report),
        figures=_figures(report),
        operations=_chosen(
            report.operation_records, MAXIMUM_OPERATIONS, lambda one: (one.outcome != "failed", -(one.downtime or 0.0))
        ),
        episodes=_chosen(report.episode_records, MAXIMUM_EPISODES, lambda one: (one.verdict != "failed", one.episode)),
        events=report.events[-MAXIMUM_EVENTS:],
        serious=_serious(report),
        surroundings=_surroundings(report),
        settings=[(name, _value(value)) for name, value in report.settings.items() if value not in (None, "", {}, [])],
        campaign=CAMPAIGN,
        cell=_cell,
        size=_size,
        details=_details,
        command=_command,
    )


@functools.cache
def _page() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {
        "count": count_text,
        "seconds": seconds_text,
        "bytes": byte_text,
        "short": _short,
        "things": _things,
    }
    return environment.from_string(_template("report.html.j2"))


def lead(report: Report) -> str:
    """Return the verdict in a sentence."""
    done = f"{_things(report.operations, 'operation')} with {_things(report.packets, 'packet')} in flight"
    if report.verdict == "passed":
        return f"{done}: each packet came out exactly once, in order and intact."
    if report.verdict == "failed":
        many = len(report.failures)
        if not many:
            many = len(broken(report))
            return f"No packet was lost, but {_things(many, 'bound')} broken. {done} were carried out."
        what = "one episode" if many == 1 else f"{count_text(many)} episodes"
        return f"{what.capitalize()} failed, of {count_text(_known(report))}. {done} were carried out."
    return f"The campaign is not finished. Up to now {done} were carried out, and nothing has failed."


def _known(report: Report) -> int:
    return len({one.episode for one in report.episode_records} | {one.episode for one in report.failures})


def _template(name: str) -> str:
    return resources.files("vmbus").joinpath("templates", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _shown(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else clean(value)


def _short(text: str, limit: int = 300) -> str:
    return clean(text, limit)


def _things(number: int, name: str) -> str:
    """A number of things."""
    return f"{count_text(number)} {name}" + ("" if number == 1 else "s")


def _unbroken(text: str) -> str:
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _value(value: object) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _cell(value: float | None) -> Markup:
    """A cell with a duration; the exact value is for sorting."""
    return _with_value(None if value is None else round(value, 6), seconds_text(value))


def _size(value: int | None) -> Markup:
    return _with_value(value, byte_text(value))


def _with_value(value: float | None, text: str) -> Markup:
    if value is None:
        return Markup("<td></td>")
    return Markup('<td class="n" data-v="{}">{}</td>').format(value, text)


def _details(one: OperationRecord) -> str:
    parameters = ", ".join(f"{name} {_value(value)}" for name, value in one.parameters.items())
    return _short("; ".join(text for text in (parameters, one.message) if text))


def _command(text: str) -> Markup:
    """A command line that is broken before options only; what is copied is the same."""
    words = re.split(r" (?=--?\w)", clean(text))
    return Markup(" ").join(
        Markup("<span>{}</span>").format(word) if len(word) < 40 else Markup("{}").format(word) for word in words
    )


def _moment(text: str) -> str:
    """A time stamp for people; as it is, when it is none."""
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None:
            moment = moment.astimezone(UTC)
    except (ValueError, OverflowError):
        return text
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """The figures on top: name, figure, and what goes with it."""
    downtimes = known(report.operation_records, "downtime")
    refused = sum(count.get("refused", 0) for count in report.by_kind.values())
    planned = report.episodes_planned
    carried_out = f"{count_text(refused)} refused, as meant" if refused else "carried out"
    all_of = f"of {count_text(planned)} planned" if planned is not None else "until the time was up"
    many = len(report.failures)
    tiles = [
        ("Operations", count_text(report.operations), carried_out),
        ("Packets in flight", count_text(report.packets), "carried through the operations"),
        ("Transactions", count_text(report.transactions), "completed and checked"),
        ("Episodes", count_text(len(report.episode_records)), all_of),
        ("Failures", count_text(many), "episode" if many == 1 else "episodes"),
    ]
    if downtimes:
        most = f"median; at most {_unbroken(seconds_text(downtimes[-1]))}"
        tiles.append(("Downtime", seconds_text(quantile(downtimes, 0.5)), most))
    tiles.append(("Ran for", seconds_text(report.seconds), "all sittings together"))
    return tiles


def _comparison(report: Report) -> list[tuple[str, list[tuple[str, str, bool] | None]]]:
    """A row for each kind of operation: what each compared quantity was and is, and whether it has grown too much."""
    changes = report.comparison.changes if report.comparison else []
    found = {(one.kind, one.quantity): one for one in changes}
    return [
        (kind, [_change(found.get((kind, quantity))) for quantity in COMPARED])
        for kind in dict.fromkeys(one.kind for one in changes)
    ]


def _change(one: Change | None) -> tuple[str, str, bool] | None:
    if one is None:
        return None
    show = SHOW[QUANTITIES[one.quantity].unit]
    share = f"{(one.now / one.before - 1) * 100:+.0f} %" if one.before else ""
    return f"{show(one.before)} → {show(one.now)}", share, one.grown


def _kinds(report: Report) -> list[dict[str, Any]]:
    """A row for each kind of operation."""
    rows = []
    for kind, count in sorted(report.by_kind.items(), key=lambda item: (-sum(item[1].values()), item[0])):
        records = [one for one in report.operation_records if one.kind == kind]
        values = {quantity: known(records, quantity) for quantity in QUANTITIES}
        downtimes = values.pop("downtime")
        row: dict[str, Any] = {name: quantile(some, 0.5) if some else None for name, some in values.items()}
        row["downtime"] = [quantile(downtimes, part) for part in (0.5, 0.95, 1.0)] if downtimes else None
        rows.append({"kind": kind, "done": 0, "refused": 0, "failed": 0, **count, **row})
    return rows


def _figures(report: Report) -> list[tuple[str, str, Sequence[Markup]]]:
    """The plots: heading, what to see in it, the plot, or none; the last has one for each kind of operation."""
    operations = plots.Operations.of(report.operation_records, report.episode_records)
    by_kind = functools.partial(plots.by_kind, operations)
    over_time = functools.partial(plots.over_time, operations)
    in_flight = "At the moment of each operation, by state. Each had to come out exactly once."
    growth = "Should neither grow nor scatter as time goes by."
    downtimes = over_time("Downtime of each operation", "downtime")
    saves = over_time("Time of each save and restore", "save", "restore")
    sizes = over_time("Size of each snapshot or stream", "memory", "state")
    single = [
        ("Downtime by kind of operation", "For how long the guest stood still.", by_kind("downtime")),
        ("Duration by kind of operation", "From the request until the VM runs on.", by_kind("duration")),
        ("Downtime over the campaign", growth, downtimes),
        ("Save and restore", "From the request to the end of each.", saves),
        ("Size of snapshots and streams", "Guest memory and the device's own state.", sizes),
        ("Packets in flight", in_flight, plots.packets_in_flight(operations)),
    ]
    throughput = (
        "Throughput around each operation",
        "Transactions a second, as far as no other operation is near: the line is the median, the band holds "
        "80 % of the operations, the shade is how long one takes.",
        plots.throughput(plots.throughput_curves(operations, report.episode_records)),
    )
    return [*((heading, text, [plot] if plot else []) for heading, text, plot in single), throughput]


def _chosen(records: Sequence[R], limit: int, rank: Callable[[R], tuple[bool, float]]) -> list[R]:
    """Some of many records, those that come first by `rank`; in their own order."""
    best = {id(one) for one in sorted(records, key=rank)[:limit]}
    return [one for one in records if id(one) in best]


def _serious(report: Report) -> list[EventRecord]:
    """What a reader should know besides the failures."""
    failed = {failure.episode for failure in report.failures}
    return [event for event in report.events if event.serious and event.episode not in failed][-MAXIMUM_SERIOUS:]


def _surroundings(report: Report) -> list[tuple[str, str]]:
    one = report.environment
    rows = [
        ("This project", one.project),
        ("QEMU", one.qemu),
        ("Accelerator", one.accelerator),
        ("libvfio-user", one.libvfio_user),
        ("Guest kernel", one.guest_kernel),
        ("Host kernel", one.kernel),
        ("Python", one.python),
        ("Processors", str(one.processors) if one.processors else ""),
        ("Memory", byte_text(one.memory_bytes) if one.memory_bytes else ""),
    ]
    return [(name, value) for name, value in rows if value]
