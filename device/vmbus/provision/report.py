"""How the set-up shows what it is doing. Standard library only; the second stage has a prettier implementation."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Protocol, TextIO


class Reporter(Protocol):
    """Told about steps, one at a time; `total` and `done` count whatever the step consists of."""

    def begin(self, text: str) -> None:
        """A step starts."""

    def progress(self, done: int, total: int, text: str = "") -> None:
        """The running step has got to `done` of `total`; `text` names what is at hand."""

    def end(self, text: str = "") -> None:
        """The running step is over; `text` says what came of it."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""


class SilentReporter:
    def begin(self, text: str) -> None: ...

    def progress(self, done: int, total: int, text: str = "") -> None: ...

    def end(self, text: str = "") -> None: ...

    def note(self, text: str) -> None: ...


class PlainReporter:
    """One line per step on a stream; on a terminal the line shows the progress too."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._text = ""
        self._start = 0.0

    def begin(self, text: str) -> None:
        self._text = text
        self._start = time.monotonic()
        self._write(f"{text} ...", ending="" if self._terminal else "\n")

    def progress(self, done: int, total: int, text: str = "") -> None:
        if self._terminal:
            line = f"{self._text} ... {done}/{total} {text}"
            self._write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1], ending="")

    def end(self, text: str = "") -> None:
        seconds = time.monotonic() - self._start
        lead = "\r\x1b[K" if self._terminal else ""
        self._write(f"{lead}{self._text}: {text or 'done'} ({seconds:.1f} s)")

    def note(self, text: str) -> None:
        self._write(text)

    def _write(self, text: str, ending: str = "\n") -> None:
        self._stream.write(text + ending)
        self._stream.flush()
