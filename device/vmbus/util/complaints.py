"""What a guest or a client of the transport makes us log: at a bounded rate, with a count of what was left out.

A guest decides how often it does something wrong, and each time costs a line. So every module takes its logger from
`bounded_log`, and nobody who adds a line has to think of it. A *kind* of complaint is one place in the code. Each kind
has an allowance, and all kinds together have another. The first complaint of a kind that has been silent for long
always gets through, so that a guest cannot hide something new behind a flood of something old. What was left out is
counted, and said with the next one of its kind that gets through, or by `tell` at the end. Texts and tracebacks have a
longest length, too. Details for developers (level DEBUG) are not bounded: they are there only when asked for.

One set of allowances for a process, as logging itself is: a device server has one device. See docs/limits.md.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

BURST = 10
"""Complaints of one kind that are written one after the other."""
EVERY = 10.0
"""Seconds after which one more of a kind may be written."""
TOTAL_BURST = 100
"""Complaints of all kinds that are written one after the other."""
TOTAL_EVERY = 1.0
"""Seconds after which one more of any kind may be written."""
MAX_KINDS = 512
"""Kinds that are told apart; those that come later share one allowance."""
MAX_TEXT = 2000
"""Characters of one message."""
MAX_TRACEBACK = 6000
"""Characters of one traceback."""

_NAMED = 8  # kinds that `summary` names
_CHECKED = "vmbus_checked"  # attribute of a record that has had its token: handlers ask again


class Allowance:
    """A token bucket: `burst` at once, and one more every `every` seconds."""

    __slots__ = ("_burst", "_every", "_tokens", "_when")

    def __init__(self, burst: int, every: float, now: float) -> None:
        self._burst = burst
        self._every = every
        self._tokens = float(burst)
        self._when = now

    def look(self, now: float) -> float:
        """How many there are, at most `burst`."""
        self._tokens = min(self._burst, self._tokens + max(now - self._when, 0.0) / self._every)
        self._when = now
        return self._tokens

    def take(self, now: float) -> bool:
        """Take one. Returns whether there was one."""
        if self.look(now) < 1.0:
            return False
        self._tokens -= 1.0
        return True


class _Kind:
    """One place in the code, and what became of its complaints."""

    __slots__ = ("allowance", "left_out", "name", "since", "untold")

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.allowance = Allowance(BURST, EVERY, now)
        self.left_out = 0
        self.untold = 0
        self.since = now


class Complaints:
    """A filter for loggers and handlers that lets through what the allowances have room for.

    `clock` gives seconds, and never goes backwards. Safe from any thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.refill()

    def refill(self) -> None:
        """Begin anew: full allowances, nothing counted. For tests, where one process has many devices."""
        with self._lock:
            self._kinds: dict[tuple[str, int], _Kind] = {}
            self._total = Allowance(TOTAL_BURST, TOTAL_EVERY, self._clock())
            self.written = 0
            self.left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written. One that is may be shortened, and says what was left out before it."""
        if record.levelno < logging.INFO or hasattr(record, _CHECKED):
            return True
        with self._lock:
            now = self._clock()
            kind = self._kind(record, now)
            fresh = kind.allowance.look(now) == BURST
            if not kind.allowance.take(now) or not (self._total.take(now) or fresh):
                if not kind.untold:
                    kind.since = now
                kind.untold += 1
                kind.left_out += 1
                self.left_out += 1
                return False
            self.written += 1
            note = _note(kind, now)
            kind.untold = 0
        setattr(record, _CHECKED, True)
        _shorten(record, note)
        return True

    def _kind(self, record: logging.LogRecord, now: float) -> _Kind:
        place = (record.pathname, record.lineno)
        if place not in self._kinds and len(self._kinds) >= MAX_KINDS:
            place = ("", 0)
        kind = self._kinds.get(place)
        if kind is None:
            name = f"{record.name}: {str(record.msg)[:100]}" if place[0] else "all others"
            kind = self._kinds[place] = _Kind(name, now)
        return kind

    def tell(self) -> None:
        """Log what was left out and not said yet: for the end."""
        with self._lock:
            now = self._clock()
            untold = [(kind.name, _note(kind, now)) for kind in self._kinds.values() if kind.untold]
            for kind in self._kinds.values():
                kind.untold = 0
        for name, note in untold:
            logging.getLogger(__name__).warning("%s%s", name, note, extra={_CHECKED: True})

    def summary(self) -> dict[str, Any]:
        """How many were written and left out since the start, and what was left out most often."""
        with self._lock:
            worst = sorted((kind for kind in self._kinds.values() if kind.left_out), key=lambda kind: -kind.left_out)
            return {
                "written": self.written,
                "left_out": self.left_out,
                "most": {kind.name: kind.left_out for kind in worst[:_NAMED]},
            }


def _note(kind: _Kind, now: float) -> str:
    return f" ({kind.untold} more like this left out in the last {now - kind.since:.1f} s)" if kind.untold else ""


def _shorten(record: logging.LogRecord, note: str) -> None:
    try:
        text = record.getMessage()
    except Exception:
        return  # the handler will say what is wrong with it
    if note or len(text) > MAX_TEXT:
        record.msg, record.args = _middle_out(text, MAX_TEXT) + note, None
    if isinstance(record.exc_info, tuple) and record.exc_info[0] is not None:
        trace = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
        if len(trace) > MAX_TRACEBACK:
            record.exc_text = _middle_out(trace, MAX_TRACEBACK)  # formatters take it as it is


def _middle_out(text: str, most: int) -> str:
    """The beginning and the end of a text that is too long: a traceback says at its end what was wrong."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} ... {len(text) - 2 * half} characters left out ... {text[-half:]}"


COMPLAINTS = Complaints()
"""This process's."""


def bounded_log(name: str) -> logging.Logger:
    """The logger of a module of ours: what goes through it is bounded."""
    logger = logging.getLogger(name)
    logger.addFilter(COMPLAINTS)
    return logger
