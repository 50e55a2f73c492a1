"""The plots of a report, as SVG that stands inside the page: no library, no script, no network.

Colours, line widths and fonts are the page's (classes, in report.css), so that light, dark and print are its business.
Each function returns markup with everything escaped, or "" where there is nothing to draw. However many operations
there are, a plot stays below some hundred kilobytes: points are thinned out, and what stands out stays (`thinned`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup, escape

from vmbus.soak.records import EpisodeRecord, OperationRecord
from vmbus.soak.text import byte_text, clean, count_text, seconds_text

WIDTH, HEIGHT = 560.0, 300.0
"""Of a plot, in the units of its own coordinates; the page scales it."""
LEFT, RIGHT, TOP, BOTTOM = 74.0, 14.0, 12.0, 46.0

COLOURS = 8
"""Classes s0 to s7; beyond that, colours come again with another shape."""
MAXIMUM_POINTS = 700
MAXIMUM_BARS = 112
MAXIMUM_BAR = 36.0
"""The width of a bar."""
MAXIMUM_ROWS = 14
"""Kinds of operations that a plot shows; the rarest are left out, and said."""

BEFORE, AFTER, STEP = 2.0, 8.0, 0.25
"""Seconds around an operation's start, and the grid for throughput."""

_STATES = {"queued": 0, "sent": 1, "held": 2}

Text = Callable[[float], str]


@dataclass(frozen=True)
class Point:
    """One mark of a plot."""

    x: float
    y: float
    series: int
    title: str
    failed: bool = False


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """Return an element; `_` in an attribute's name is `-`, and `class_` is `class`."""
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    said = Markup("").join(Markup(' {}="{}"').format(Markup(key), _plain(value)) for key, value in named.items())
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), said, Markup("").join(children))


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    return str(value)


def words(text: str, **attributes: object) -> Markup:
    return tag("text", escape(clean(text)), **attributes)


# --- scales --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Maps values to coordinates: linear, or logarithmic for what spans orders of magnitude."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Return round values within the scale."""
        return _decades(self.low, self.high, wanted) if self.logarithmic else _round_values(self.low, self.high, wanted)


def _round_values(low: float, high: float, wanted: int) -> list[float]:
    if high <= low:
        return [low]
    raw = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw), 10 * unit)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float, wanted: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        values = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        inside = [value for value in values if low * 0.999 <= value <= high * 1.001]
        if len(inside) <= wanted + 1:
            return inside
    return inside[:: math.ceil(len(inside) / wanted)]


def _logarithmic(values: Sequence[float], start: float, end: float) -> Scale:
    low, high = min(values), max(values)
    return Scale(low / 1.3, high * 1.3, start, end, logarithmic=True)


def _byte_ticks(scale: Scale) -> list[float]:
    first, last = math.floor(math.log2(scale.low)), math.ceil(math.log2(scale.high))
    powers = [power for power in range(first, last + 1) if scale.low <= 2.0**power <= scale.high]
    return [2.0**power for power in powers[:: max(1, math.ceil(len(powers) / 6))]]


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
        ends = {id(one): one for one in (min(some, key=lambda p: p.y), max(some, key=lambda p: p.y))}
        failed = {id(one): one for one in some if one.failed}
        kept += list({**ends, **dict(list(failed.items())[:2])}.values())
    return kept


def share(values: Sequence[float], part: float) -> float:
    """Return the quantile `part` of sorted values, interpolated."""
    place = part * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (place - below)


# --- what plots are made of ----------------------------------------------------------------------------------------


def _frame(contents: Iterable[str], label: str, width: float = WIDTH, height: float = HEIGHT, kind: str = "") -> Markup:
    inner = Markup("").join(contents)
    return tag(
        "svg", inner, class_=f"plot {kind}".strip(), viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label
    )


def _y_axis(scale: Scale, values: Iterable[float], text: Text, left: float, right: float) -> list[Markup]:
    parts = []
    for value in values:
        y = scale(value)
        parts.append(tag("line", class_="grid", x1=left, x2=right, y1=y, y2=y))
        parts.append(words(text(value), class_="tick", x=left - 8, y=y + 4, text_anchor="end"))
    return parts


def _x_axis(scale: Scale, values: Sequence[float], text: Text, bottom: float, label: str) -> list[Markup]:
    parts = [tag("line", class_="axis", x1=scale.start, x2=scale.end, y1=bottom, y2=bottom)]
    for value in values:
        x = scale(value)
        parts.append(tag("line", class_="axis", x1=x, x2=x, y1=bottom, y2=bottom + 4))
        parts.append(words(text(value), class_="tick", x=x, y=bottom + 17, text_anchor="middle"))
    if label:
        middle = (scale.start + scale.end) / 2
        parts.append(words(label, class_="label", x=middle, y=bottom + 38, text_anchor="middle"))
    return parts


def _mark(x: float, y: float, point: Point) -> Markup:
    if point.failed:
        shape = f"M{x - 4:.1f} {y - 4:.1f}l8 8m0-8l-8 8"
        return tag("path", tag("title", escape(clean(point.title))), class_="bad", d=shape)
    kind = f"dot s{point.series % COLOURS}"
    title = tag("title", escape(clean(point.title)))
    if point.series >= COLOURS:
        return tag("path", title, class_=kind, d=f"M{x:.1f} {y - 4:.1f}l4 4l-4 4l-4-4z")
    return tag("circle", title, class_=kind, cx=x, cy=y, r=3)


def legend(names: Sequence[str]) -> Markup:
    """Return the names of series 0, 1, ... with their colours, as a list of the page."""
    items = []
    for number, name in enumerate(names):
        shape = "key" if number < COLOURS else "key other"
        items.append(
            tag("li", tag("span", class_=f"{shape} s{number % COLOURS}", aria_hidden="true"), escape(clean(name)))
        )
    return tag("ul", *items, class_="legend")


def note(text: str) -> Markup:
    return tag("p", escape(text), class_="note")


def _over_time(
    points: Sequence[Point], names: Sequence[str], total: int, text: Text, label: str, in_bytes: bool = False
) -> Markup:
    """A mark for each point over the operations in order, on a logarithmic axis, with a legend."""
    if not points:
        return Markup("")
    shown = thinned(points)
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    x = Scale(0.5, max(total, 1) + 0.5, LEFT, right)
    y = _logarithmic([point.y for point in points], bottom, TOP)
    at = [value for value in x.ticks(6) if value >= 1 and value == int(value)] or [1.0]
    values = _byte_ticks(y) if in_bytes else y.ticks()
    contents = [
        *_y_axis(y, values, text, LEFT, right),
        *_x_axis(x, at, lambda value: count_text(int(value)), bottom, "operations, in the order of time"),
        *(_mark(x(point.x), y(point.y), point) for point in shown),
    ]
    said = [_frame(contents, label), legend(names)]
    if len(shown) < len(points):
        said.append(note(f"{count_text(len(shown))} of {count_text(len(points))} marks: the extremes of each stretch."))
    return Markup("").join(said)


# --- the plots -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operations:
    """Operations in the order of time, and their kinds, the most frequent first."""

    ordered: Sequence[OperationRecord]
    kinds: Sequence[str]

    @classmethod
    def of(cls, records: Sequence[OperationRecord], episodes: Sequence[EpisodeRecord]) -> Operations:
        """Episodes run side by side: their operations are ordered by the clock."""
        begin = {record.episode: record.started for record in episodes}
        starts = {number: _instant(text) for number, text in begin.items()}

        def when(record: OperationRecord) -> tuple[float, int, int]:
            return starts.get(record.episode, 0.0) + record.at, record.episode, record.number

        counts: dict[str, int] = {}
        for record in records:
            counts[record.kind] = counts.get(record.kind, 0) + 1
        kinds = sorted(counts, key=lambda kind: (-counts[kind], kind))
        return cls(sorted(records, key=when), kinds)

    def series(self, used: Iterable[str]) -> tuple[list[str], dict[str, int]]:
        """Return the names of series for these kinds, and each kind's number; rare kinds share the last one."""
        wanted = set(used)
        kinds = [kind for kind in self.kinds if kind in wanted]
        if len(kinds) <= MAXIMUM_ROWS:
            return kinds, {kind: number for number, kind in enumerate(kinds)}
        names = [*kinds[: MAXIMUM_ROWS - 1], "others"]
        return names, {kind: min(number, MAXIMUM_ROWS - 1) for number, kind in enumerate(kinds)}


def _instant(text: str) -> float:
    from datetime import datetime

    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return 0.0


def _name(record: OperationRecord) -> str:
    return f"episode {record.episode}, operation {record.number}, {record.kind}"


def downtime_over_time(operations: Operations) -> Markup:
    """How long the guest stood still in each operation."""
    used = [(place, one) for place, one in enumerate(operations.ordered, 1) if usable(one.downtime)]
    names, series = operations.series(one.kind for _, one in used)
    points = [
        Point(
            place,
            one.downtime or 0.0,
            series[one.kind],
            f"{_name(one)}: {seconds_text(one.downtime)}",
            one.outcome == "failed",
        )
        for place, one in used
    ]
    return _over_time(points, names, len(operations.ordered), seconds_text, "Downtime of each operation")


def downtime_by_kind(operations: Operations) -> Markup:
    """The downtimes of each kind of operation on a line of its own."""
    return _by_kind(operations, [(one.kind, one.downtime) for one in operations.ordered], "downtime")


def duration_by_kind(operations: Operations) -> Markup:
    """The same for how long the operations took."""
    return _by_kind(operations, [(one.kind, one.seconds) for one in operations.ordered], "duration")


def _by_kind(operations: Operations, values: Sequence[tuple[str, float | None]], what: str) -> Markup:
    """Durations on a line for each kind of operation, with their median and their greatest; the shortest on top."""
    found: dict[str, list[float]] = {}
    for kind, value in values:
        if value is not None and usable(value):
            found.setdefault(kind, []).append(value)
    kinds = [kind for kind in operations.kinds if kind in found][:MAXIMUM_ROWS]
    if not kinds:
        return Markup("")
    kinds.sort(key=lambda kind: median(found[kind]))
    left, right = 146.0, WIDTH - 116
    row = max(19.0, (HEIGHT - TOP - BOTTOM) / max(len(kinds), 5))
    bottom = TOP + row * len(kinds)
    x = _logarithmic([value for kind in kinds for value in found[kind]], left, right)
    contents = _x_axis(x, x.ticks(3), seconds_text, bottom, what)
    for number, kind in enumerate(kinds):
        ordered = sorted(found[kind])
        y = TOP + row * (number + 0.5)
        middle, greatest = median(ordered), ordered[-1]
        contents.append(tag("line", class_="grid", x1=left, x2=right, y1=y, y2=y))
        contents.append(words(_shortened(kind, 21), class_="tick", x=left - 8, y=y + 4, text_anchor="end"))
        places = sorted({round(x(value)) for value in ordered})
        contents += [tag("circle", class_="dot s0", cx=place, cy=y, r=3) for place in places]
        at = x(middle)
        title = f"{kind}: {len(ordered)} operations, median {seconds_text(middle)}, maximum {seconds_text(greatest)}"
        contents.append(
            tag("line", tag("title", escape(clean(title))), class_="median", x1=at, x2=at, y1=y - 7, y2=y + 7)
        )
        contents.append(words(seconds_text(middle), class_="tick figure", x=WIDTH - 58, y=y + 4, text_anchor="end"))
        contents.append(words(seconds_text(greatest), class_="tick figure", x=WIDTH - 2, y=y + 4, text_anchor="end"))
    heads = (("median", WIDTH - 58), ("max", WIDTH - 2))
    contents += [words(name, class_="tick", x=place, y=bottom + 17, text_anchor="end") for name, place in heads]
    return _frame(contents, f"{what.capitalize()} by kind of operation", height=bottom + BOTTOM)


def save_and_restore(operations: Operations) -> Markup:
    """How long each save and each restore took."""
    points = []
    for place, one in enumerate(operations.ordered, 1):
        for series, (name, value) in enumerate((("save", one.save_seconds), ("restore", one.restore_seconds))):
            if usable(value):
                said = f"{_name(one)}: {name} {seconds_text(value)}"
                points.append(Point(place, value or 0.0, series, said, one.outcome == "failed"))
    label = "Time of each save and restore"
    return _over_time(points, ("save", "restore"), len(operations.ordered), seconds_text, label)


def sizes(operations: Operations) -> Markup:
    """How large each snapshot or stream was."""
    names = ("guest memory", "device state")
    points = []
    for place, one in enumerate(operations.ordered, 1):
        for series, value in enumerate((one.memory_bytes, one.state_bytes)):
            if usable(value):
                said = f"{_name(one)}: {names[series]} {byte_text(value)}"
                points.append(Point(place, float(value or 0), series, said, one.outcome == "failed"))
    label = "Size of each snapshot or stream"
    return _over_time(points, names, len(operations.ordered), byte_text, label, in_bytes=True)


def packets_in_flight(operations: Operations) -> Markup:
    """Packets in flight at each operation, by state, on top of each other."""
    used = [one for one in operations.ordered if any(count > 0 for count in one.packets.values())]
    if not used:
        return Markup("")
    totals: dict[str, int] = {}
    for one in used:
        for state, count in one.packets.items():
            totals[state] = totals.get(state, 0) + max(0, count)
    # Those that every report has come first: they keep their colours from one report to the next.
    states = sorted(totals, key=lambda state: (_STATES.get(state, len(_STATES)), -totals[state], state))
    shown, others = states[: COLOURS - 1], states[COLOURS - 1 :]
    each = math.ceil(len(used) / MAXIMUM_BARS)
    groups = [used[begin : begin + each] for begin in range(0, len(used), each)]
    bars: list[list[float]] = []
    for group in groups:
        heights = [sum(max(0, one.packets.get(state, 0)) for one in group) / len(group) for state in shown]
        if others:
            heights.append(sum(max(0, one.packets.get(state, 0)) for one in group for state in others) / len(group))
        bars.append(heights)
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    right = min(right, LEFT + MAXIMUM_BAR * len(bars))
    x = Scale(0, len(bars), LEFT, right)
    y = Scale(0, max(max(sum(bar) for bar in bars), 1) * 1.05, bottom, TOP)
    names = [*shown, *(["other states"] if others else [])]
    contents = _y_axis(y, y.ticks(), lambda value: count_text(round(value)), LEFT, WIDTH - RIGHT)
    width = (right - LEFT) / len(bars)
    gap = min(2.0, width * 0.2)
    for series in range(len(names)):
        path = []
        for number, bar in enumerate(bars):
            below, height = sum(bar[:series]), bar[series]
            if height > 0:
                high, low = y(below + height), y(below)
                path.append(f"M{x(number) + gap / 2:.1f} {low:.1f}V{high:.1f}h{width - gap:.1f}V{low:.1f}z")
        contents.append(tag("path", class_=f"area s{series}", d="".join(path)))
    for number, (group, bar) in enumerate(zip(groups, bars, strict=True)):
        counted = [f"{count_text(bar[place])} {name}" for place, name in enumerate(names) if bar[place] > 0]
        parts = ", ".join(counted)
        said = f"{_name(group[0])}: {parts}" if len(group) == 1 else f"{len(group)} operations, on average: {parts}"
        area = {"x": x(number), "y": TOP, "width": width, "height": bottom - TOP}
        contents.append(tag("rect", tag("title", escape(clean(said))), class_="over", **area))
    every = Scale(0.5, len(used) + 0.5, LEFT, right)
    at = [value for value in every.ticks(6) if value >= 1 and value == int(value)]
    contents += _x_axis(every, at, lambda value: count_text(int(value)), bottom, "")
    label = "operations with packets in flight, in the order of time"
    contents.append(words(label, class_="label", x=(LEFT + WIDTH - RIGHT) / 2, y=bottom + 38, text_anchor="middle"))
    said_of_all = [_frame(contents, "Packets in flight at each operation, by state"), legend(names)]
    if each > 1:
        said_of_all.append(note(f"Each bar is the average of {each} operations."))
    return Markup("").join(said_of_all)


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
                points.append((cell, share(values, 0.1), share(values, 0.5), share(values, 0.9)))
        if len(points) > 1:
            curves.append(Curve(kind, len(durations[kind]), median(durations[kind]), points))
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
            *_y_axis(y, y.ticks(4), lambda value: count_text(round(value)), left, width - 8),
            tag("rect", class_="during", x=x(0), y=top, width=max(1.0, x(curve.seconds) - x(0)), height=bottom - top),
            tag("path", class_="band s0", d="".join(band)),
            tag("path", class_="line s0", d="".join(line)),
            tag("line", class_="start", x1=x(0), x2=x(0), y1=top, y2=bottom),
            *_x_axis(x, x.ticks(5), lambda value: f"{value:+g} s" if value else "0", bottom, ""),
            words(_shortened(curve.kind, 24), class_="name", x=left, y=14),
            words(f"{count_text(curve.operations)} ×", class_="tick", x=width - 8, y=14, text_anchor="end"),
        ]
        label = f"Throughput around {curve.kind}"
        plots.append(_frame(contents, clean(label), width, height, "small"))
    return plots


def _shortened(text: str, length: int) -> str:
    cleaned = clean(text).replace("\n", " ").replace("_", " ")
    return cleaned if len(cleaned) <= length else cleaned[: length - 1] + "…"
