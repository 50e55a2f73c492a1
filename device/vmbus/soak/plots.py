"""The plots of a report.

Each function returns markup with everything escaped, or "" where there is nothing to draw. However many operations
there are, a plot stays below some hundred kilobytes: points are thinned out, and what stands out stays (`thinned`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from markupsafe import Markup

from vmbus.soak.measures import QUANTITIES, SHOW, known, quantile
from vmbus.soak.records import EpisodeRecord, OperationRecord
from vmbus.soak.svg import (
    COLOURS,
    Scale,
    frame,
    legend,
    logarithmic,
    mark,
    note,
    tag,
    title,
    words,
    x_axis,
    y_axis,
)
from vmbus.soak.text import clean, count_text, seconds_text

WIDTH, HEIGHT = 560.0, 300.0
"""Of a plot, in the units of its own coordinates; the page scales it."""
LEFT, RIGHT, TOP, BOTTOM = 74.0, 14.0, 12.0, 46.0

MAXIMUM_POINTS = 700
MAXIMUM_BARS = 112
MAXIMUM_BAR = 36.0
"""The width of a bar."""
MAXIMUM_ROWS = 14
"""Kinds of operations that a plot shows; the rarest are left out, and said."""

BEFORE, AFTER, STEP = 2.0, 8.0, 0.25
"""Seconds around an operation's start, and the grid for throughput."""

_STATES = {"queued": 0, "sent": 1, "held": 2}
"""Those that every report has come first: they keep their colours from one report to the next."""


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    series: int
    title: str
    failed: bool = False


@dataclass(frozen=True)
class Operations:
    """Operations in the order of time, and their kinds, the most frequent first."""

    ordered: Sequence[OperationRecord]
    kinds: Sequence[str]

    @classmethod
    def of(cls, records: Sequence[OperationRecord], episodes: Sequence[EpisodeRecord]) -> Operations:
        """Episodes run side by side: their operations are ordered by the clock."""
        starts = {record.episode: _instant(record.started) for record in episodes}
        counts = Counter(record.kind for record in records)
        return cls(
            sorted(records, key=lambda one: (starts.get(one.episode, 0.0) + one.at, one.episode, one.number)),
            sorted(counts, key=lambda kind: (-counts[kind], kind)),
        )

    def series(self, used: Iterable[str]) -> tuple[list[str], dict[str, int]]:
        """Return the names of series for these kinds, and each kind's number; rare kinds share the last one."""
        wanted = set(used)
        kinds = [kind for kind in self.kinds if kind in wanted]
        if len(kinds) <= MAXIMUM_ROWS:
            return kinds, {kind: number for number, kind in enumerate(kinds)}
        names = [*kinds[: MAXIMUM_ROWS - 1], "others"]
        return names, {kind: min(number, MAXIMUM_ROWS - 1) for number, kind in enumerate(kinds)}


def _instant(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return 0.0


def usable(value: float | None) -> bool:
    """Tell whether a value can stand on a logarithmic axis."""
    return value is not None and math.isfinite(value) and value > 0


def thinned(points: Sequence[Point], limit: int = MAXIMUM_POINTS) -> list[Point]:
    """Return at most about `limit` points: of each stretch the lowest and the highest, and what failed."""
    if len(points) <= limit:
        return list(points)
    ordered = sorted(points, key=lambda point: point.x)
    stretch = math.ceil(len(ordered) / (limit // 2))
    kept: list[Point] = []
    for begin in range(0, len(ordered), stretch):
        some = ordered[begin : begin + stretch]
        failed = [one for one in some if one.failed][:2]
        ends = (min(some, key=lambda one: one.y), max(some, key=lambda one: one.y))
        kept += {id(one): one for one in (*ends, *failed)}.values()
    return kept


def _name(record: OperationRecord) -> str:
    return f"episode {record.episode}, operation {record.number}, {record.kind}"


# --- over time -----------------------------------------------------------------------------------------------------


def over_time(operations: Operations, label: str, *quantities: str) -> Markup:
    """A mark for each of some quantities in each operation, on a logarithmic axis; of a single one by kinds."""
    names, series = operations.series(one.kind for one in operations.ordered if known([one], quantities[0]))
    if len(quantities) > 1:
        names = list(quantities)
    points = []
    for place, one in enumerate(operations.ordered, 1):
        for number, quantity in enumerate(quantities):
            value = QUANTITIES[quantity].value(one)
            if value is not None and usable(value):
                said = f"{_name(one)}: {quantity} {SHOW[QUANTITIES[quantity].unit](value)}"
                which = number if len(quantities) > 1 else series[one.kind]
                points.append(Point(place, value, which, said, one.outcome == "failed"))
    if not points:
        return Markup("")
    shown, unit = thinned(points), QUANTITIES[quantities[0]].unit
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    x = Scale(0.5, max(len(operations.ordered), 1) + 0.5, LEFT, right)
    y = logarithmic([point.y for point in points], bottom, TOP)
    contents = [
        *y_axis(y, y.byte_ticks() if unit == "size" else y.ticks(), SHOW[unit], LEFT, right),
        *x_axis(x, x.whole_ticks(), count_text, bottom, "operations, in the order of time"),
        *(mark(x(one.x), y(one.y), one.series, one.title, failed=one.failed) for one in shown),
    ]
    said_of_all = [frame(contents, label, WIDTH, HEIGHT), legend(names)]
    if len(shown) < len(points):
        many = f"{count_text(len(shown))} of {count_text(len(points))} marks: the extremes of each stretch."
        said_of_all.append(note(many))
    return Markup("").join(said_of_all)


# --- by kind -------------------------------------------------------------------------------------------------------


def by_kind(operations: Operations, quantity: str) -> Markup:
    """Durations on a line for each kind of operation, with their median and their greatest; the shortest on top."""
    found = {
        kind: [value for value in known((one for one in operations.ordered if one.kind == kind), quantity) if value > 0]
        for kind in operations.kinds
    }
    kinds = [kind for kind in operations.kinds if found[kind]][:MAXIMUM_ROWS]
    if not kinds:
        return Markup("")
    kinds.sort(key=lambda kind: quantile(found[kind], 0.5))
    left, right = 146.0, WIDTH - 116
    row = max(19.0, (HEIGHT - TOP - BOTTOM) / max(len(kinds), 5))
    bottom = TOP + row * len(kinds)
    x = logarithmic([value for kind in kinds for value in found[kind]], left, right)
    contents = x_axis(x, x.ticks(3), seconds_text, bottom, quantity)
    columns = (("median", WIDTH - 58), ("max", WIDTH - 2))
    for number, kind in enumerate(kinds):
        middle, greatest = quantile(found[kind], 0.5), found[kind][-1]
        at, y = x(middle), TOP + row * (number + 0.5)
        said = f"{kind}: {len(found[kind])} operations, median {seconds_text(middle)}, maximum {seconds_text(greatest)}"
        contents += [
            tag("line", class_="grid", x1=left, x2=right, y1=y, y2=y),
            words(_shortened(kind, 21), class_="tick", x=left - 8, y=y + 4, text_anchor="end"),
            *(
                tag("circle", class_="dot s0", cx=place, cy=y, r=3)
                for place in sorted({round(x(value)) for value in found[kind]})
            ),
            tag("line", title(said), class_="median", x1=at, x2=at, y1=y - 7, y2=y + 7),
            *(
                words(seconds_text(value), class_="tick figure", x=place, y=y + 4, text_anchor="end")
                for value, (_, place) in zip((middle, greatest), columns, strict=True)
            ),
        ]
    contents += [words(name, class_="tick", x=place, y=bottom + 17, text_anchor="end") for name, place in columns]
    return frame(contents, f"{quantity.capitalize()} by kind of operation", WIDTH, bottom + BOTTOM)


def _shortened(text: str, length: int) -> str:
    cleaned = clean(text).replace("\n", " ").replace("_", " ")
    return cleaned if len(cleaned) <= length else cleaned[: length - 1] + "…"


# --- packets -------------------------------------------------------------------------------------------------------


def packets_in_flight(operations: Operations) -> Markup:
    """Packets in flight at each operation, by state, on top of each other."""
    used = [one for one in operations.ordered if any(count > 0 for count in one.packets.values())]
    if not used:
        return Markup("")
    totals: Counter[str] = Counter()
    for one in used:
        totals.update({state: max(0, count) for state, count in one.packets.items()})
    states = sorted(totals, key=lambda state: (_STATES.get(state, len(_STATES)), -totals[state], state))
    parts = [(state, [state]) for state in states[: COLOURS - 1]]
    if states[COLOURS - 1 :]:
        parts.append(("other states", states[COLOURS - 1 :]))
    each = math.ceil(len(used) / MAXIMUM_BARS)
    groups = [used[begin : begin + each] for begin in range(0, len(used), each)]
    bars = [
        [sum(max(0, one.packets.get(state, 0)) for one in group for state in some) / len(group) for _, some in parts]
        for group in groups
    ]
    bottom, right = HEIGHT - BOTTOM, min(WIDTH - RIGHT, LEFT + MAXIMUM_BAR * len(bars))
    x = Scale(0, len(bars), LEFT, right)
    y = Scale(0, max(max(sum(bar) for bar in bars), 1) * 1.05, bottom, TOP)
    contents = y_axis(y, y.ticks(), count_text, LEFT, WIDTH - RIGHT)
    width = (right - LEFT) / len(bars)
    gap = min(2.0, width * 0.2)
    for series in range(len(parts)):
        path = []
        for number, bar in enumerate(bars):
            if bar[series] > 0:
                low, high = y(sum(bar[:series])), y(sum(bar[: series + 1]))
                path.append(f"M{x(number) + gap / 2:.1f} {low:.1f}V{high:.1f}h{width - gap:.1f}V{low:.1f}z")
        contents.append(tag("path", class_=f"area s{series}", d="".join(path)))
    for number, (group, bar) in enumerate(zip(groups, bars, strict=True)):
        counted = ", ".join(f"{count_text(count)} {name}" for count, (name, _) in zip(bar, parts, strict=True) if count)
        whose = _name(group[0]) if len(group) == 1 else f"{len(group)} operations, on average"
        area = {"x": x(number), "y": TOP, "width": width, "height": bottom - TOP}
        contents.append(tag("rect", title(f"{whose}: {counted}"), class_="over", **area))
    every = Scale(0.5, len(used) + 0.5, LEFT, right)
    contents += x_axis(every, every.whole_ticks(), count_text, bottom)
    label = "operations with packets in flight, in the order of time"
    contents.append(words(label, class_="label", x=(LEFT + WIDTH - RIGHT) / 2, y=bottom + 38, text_anchor="middle"))
    said = [
        frame(contents, "Packets in flight at each operation, by state", WIDTH, HEIGHT),
        legend([name for name, _ in parts]),
    ]
    if each > 1:
        said.append(note(f"Each bar is the average of {each} operations."))
    return Markup("").join(said)


# --- throughput around operations ----------------------------------------------------------------------------------


Moment = tuple[float, float, float, float]
"""Seconds from the start; tenth percentile, median and ninetieth percentile of the throughput."""


@dataclass(frozen=True)
class Curve:
    """Throughput around the operations of one kind, in transactions a second, at each moment of the grid."""

    kind: str
    operations: int
    seconds: float
    """How long such an operation takes: the median."""
    points: Sequence[Moment]


def throughput_curves(operations: Operations, episodes: Sequence[EpisodeRecord]) -> list[Curve]:
    """Return a curve for each kind of operation around which samples were taken.

    Around an operation means: from the end of the one before it to the start of the next one in its episode.
    """
    samples = {}
    for episode in episodes:
        ordered = sorted(episode.samples, key=lambda sample: sample.at)
        samples[episode.episode] = ([one.at for one in ordered], [one.transactions for one in ordered])
    cells = [-BEFORE + STEP * (number + 0.5) for number in range(int((BEFORE + AFTER) / STEP))]
    rates: dict[str, list[list[float]]] = {}
    durations: dict[str, list[float]] = {}
    neighbours = _neighbours(operations.ordered)
    for one in operations.ordered:
        times, transactions = samples.get(one.episode, ([], []))
        if len(times) < 2:
            continue
        earliest, latest = neighbours[one.episode, one.number]
        durations.setdefault(one.kind, []).append(one.seconds)
        of_kind = rates.setdefault(one.kind, [[] for _ in cells])
        for number, cell in enumerate(cells):
            after = bisect_right(times, one.at + cell)
            if 0 < after < len(times) and earliest <= (times[after - 1] + times[after]) / 2 <= latest:
                elapsed = times[after] - times[after - 1]
                done = transactions[after] - transactions[after - 1]
                # A VM that goes back in time takes its transactions with it; what counts them may be a step behind.
                fallen = done < 0 or (after > 1 and transactions[after - 1] < transactions[after - 2])
                if elapsed > 0 and not fallen:
                    of_kind[number].append(done / elapsed)
    curves = []
    for kind in [kind for kind in operations.kinds if kind in rates][:MAXIMUM_ROWS]:
        points = []
        for cell, values in zip(cells, rates[kind], strict=True):
            if values:
                values.sort()
                points.append((cell, quantile(values, 0.1), quantile(values, 0.5), quantile(values, 0.9)))
        if len(points) > 1:
            curves.append(Curve(kind, len(durations[kind]), quantile(sorted(durations[kind]), 0.5), points))
    return curves


def _neighbours(ordered: Sequence[OperationRecord]) -> dict[tuple[int, int], tuple[float, float]]:
    """For each operation, by episode and number: the end of the one before it, and the start of the one after it."""
    episodes: dict[int, list[OperationRecord]] = {}
    for one in ordered:
        episodes.setdefault(one.episode, []).append(one)
    found = {}
    for some in episodes.values():
        some.sort(key=lambda one: one.at)
        ends = [-math.inf, *(one.at + one.seconds for one in some)]
        starts = [*(one.at for one in some), math.inf]
        for place, one in enumerate(some):
            found[one.episode, one.number] = (ends[place], starts[place + 1])
    return found


def _runs(points: Sequence[Moment]) -> list[list[Moment]]:
    """Stretches of neighbouring points: what is not known in between is not drawn."""
    runs: list[list[Moment]] = []
    for point in points:
        if not runs or point[0] - runs[-1][-1][0] > 1.5 * STEP:
            runs.append([])
        runs[-1].append(point)
    return runs


def throughput(curves: Sequence[Curve]) -> list[Markup]:
    """Return one small plot for each curve, all on the same scale."""
    if not curves:
        return []
    width, height, left, bottom, top = 270.0, 150.0, 48.0, 118.0, 22.0
    greatest = max(point[3] for curve in curves for point in curve.points)
    y = Scale(0, max(greatest, 1.0) * 1.05, bottom, top)
    moments = [point[0] for curve in curves for point in curve.points]
    x = Scale(min(math.floor(min(moments)), -1), max(math.ceil(max(moments)), 1), left, width - 8)
    plots = []
    for curve in curves:
        band, line = [], []
        for some in _runs(curve.points):
            ends = [(x(at), y(high)) for at, _, _, high in some] + [(x(at), y(low)) for at, low, _, _ in some[::-1]]
            band.append("M" + "L".join(f"{at:.1f} {value:.1f}" for at, value in ends) + "z")
            line.append("M" + "L".join(f"{x(at):.1f} {y(middle):.1f}" for at, _, middle, _ in some))
        contents = [
            *y_axis(y, y.ticks(4), count_text, left, width - 8),
            tag("rect", class_="during", x=x(0), y=top, width=max(1.0, x(curve.seconds) - x(0)), height=bottom - top),
            tag("path", class_="band s0", d="".join(band)),
            tag("path", class_="line s0", d="".join(line)),
            tag("line", class_="start", x1=x(0), x2=x(0), y1=top, y2=bottom),
            *x_axis(x, x.ticks(5), lambda value: f"{value:+g} s" if value else "0", bottom),
            words(_shortened(curve.kind, 24), class_="name", x=left, y=14),
            words(f"{count_text(curve.operations)} ×", class_="tick", x=width - 8, y=14, text_anchor="end"),
        ]
        plots.append(frame(contents, f"Throughput around {curve.kind}", width, height, "plot small"))
    return plots
