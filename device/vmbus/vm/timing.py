"""How long each phase of an operation took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str], None]
"""Told the name of a phase when it begins."""


class Phases:
    """Durations of named phases in seconds, in the order in which they were entered.

    A phase entered more than once adds up. Phases follow each other; they do not nest.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measures the block as part of phase `name`."""
        if self._progress is not None:
            self._progress(name)
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
