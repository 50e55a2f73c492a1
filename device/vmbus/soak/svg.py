"""SVG that stands inside a page: no library, no script, no network. Elements, scales, axes, marks.

Colours, line widths and fonts are the page's (classes, in report.css), so that light, dark and print are its business.
Everything is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from vmbus.soak.text import clean

COLOURS = 8
"""Classes s0 to s7; beyond that, colours come again with another shape."""

Text = Callable[[float], str]


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
    """Return a text at a place of the plot."""
    return tag("text", escape(clean(text)), **attributes)


def title(text: str) -> Markup:
    """Return what an element says when it is pointed at."""
    return tag("title", escape(clean(text)))


def note(text: str) -> Markup:
    """Return a line below a plot."""
    return tag("p", escape(text), class_="note")


def legend(names: Sequence[str]) -> Markup:
    """Return the names of series 0, 1, ... with their colours, as a list of the page."""
    items = []
    for number, name in enumerate(names):
        shape = "key" if number < COLOURS else "key other"
        key = tag("span", class_=f"{shape} s{number % COLOURS}", aria_hidden="true")
        items.append(tag("li", key, escape(clean(name))))
    return tag("ul", *items, class_="legend")


def frame(contents: Iterable[str], label: str, width: float, height: float, kind: str = "plot") -> Markup:
    """Return the plot; `label` is for those who cannot see it."""
    inner = Markup("").join(contents)
    return tag("svg", inner, class_=kind, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=clean(label))


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

    def whole_ticks(self) -> list[float]:
        """Return round values that count something, from 1."""
        return [value for value in self.ticks(6) if value >= 1 and value == int(value)] or [1.0]

    def byte_ticks(self) -> list[float]:
        """Return powers of two."""
        first, last = math.ceil(math.log2(self.low)), math.floor(math.log2(self.high))
        powers = range(first, last + 1)
        return [2.0**power for power in powers[:: max(1, math.ceil(len(powers) / 6))]]


def logarithmic(values: Sequence[float], start: float, end: float) -> Scale:
    """Return a scale on which all of some positive values have room."""
    return Scale(min(values) / 1.3, max(values) * 1.3, start, end, logarithmic=True)


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


# --- axes and marks ------------------------------------------------------------------------------------------------


def y_axis(scale: Scale, values: Iterable[float], text: Text, left: float, right: float) -> list[Markup]:
    """Return lines across the plot, with their values."""
    parts = []
    for value in values:
        y = scale(value)
        parts.append(tag("line", class_="grid", x1=left, x2=right, y1=y, y2=y))
        parts.append(words(text(value), class_="tick", x=left - 8, y=y + 4, text_anchor="end"))
    return parts


def x_axis(scale: Scale, values: Iterable[float], text: Text, bottom: float, label: str = "") -> list[Markup]:
    """Return the line below the plot, with marks at some values and what they are."""
    parts = [tag("line", class_="axis", x1=scale.start, x2=scale.end, y1=bottom, y2=bottom)]
    for value in values:
        x = scale(value)
        parts.append(tag("line", class_="axis", x1=x, x2=x, y1=bottom, y2=bottom + 4))
        parts.append(words(text(value), class_="tick", x=x, y=bottom + 17, text_anchor="middle"))
    if label:
        middle = (scale.start + scale.end) / 2
        parts.append(words(label, class_="label", x=middle, y=bottom + 38, text_anchor="middle"))
    return parts


def mark(x: float, y: float, series: int, said: str, *, failed: bool) -> Markup:
    """Return one mark: what failed is a cross, whatever its series."""
    if failed:
        return tag("path", title(said), class_="bad", d=f"M{x - 4:.1f} {y - 4:.1f}l8 8m0-8l-8 8")
    kind = f"dot s{series % COLOURS}"
    if series >= COLOURS:
        return tag("path", title(said), class_=kind, d=f"M{x:.1f} {y - 4:.1f}l4 4l-4 4l-4-4z")
    return tag("circle", title(said), class_=kind, cx=x, cy=y, r=3)
