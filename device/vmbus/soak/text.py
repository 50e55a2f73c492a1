"""Figures and foreign text as a reader of the report sees them."""

from __future__ import annotations

import re

_UNWANTED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufffe\uffff]"
)
"""Controls, halves of surrogates, and what turns the direction of text around or is invisible."""


def clean(text: str, limit: int = 4000) -> str:
    """Return text from a record, fit to be shown: without control characters (a tab and a newline stay), shortened.

    It is not escaped: whoever puts it into markup does that.
    """
    if len(text) > limit:
        text = f"{text[:limit]} … ({len(text) - limit} more characters)"
    return _UNWANTED.sub("\ufffd", text)


def count_text(value: float) -> str:
    """Return a whole number with its thousands apart."""
    return f"{value:,.0f}"


def seconds_text(value: float | None) -> str:
    """Return a duration with three digits or so: 850 µs, 12.5 ms, 1.23 s; minutes and hours from two minutes on."""
    if value is None:
        return "–"
    if value < 0:
        return "-" + seconds_text(-value)
    if value == 0:
        return "0 s"
    if value < 0.9995e-3:
        return f"{value * 1e6:.0f} µs"
    if value < 0.9995:
        return f"{_three(value * 1e3)} ms"
    if value < 120:
        return f"{_three(value)} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 120:
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def byte_text(value: float | None) -> str:
    """Return a size in bytes, KiB, MiB, GiB or TiB."""
    if value is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1023.5:
            return f"{_three(value)} {unit}"
        value /= 1024
    return f"{_three(value)} TiB"


def _three(value: float) -> str:
    """Three digits, without zeros at the end of a fraction."""
    if abs(value) >= 99.95:
        return f"{value:.0f}"
    text = f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"
    return text.rstrip("0").rstrip(".")
