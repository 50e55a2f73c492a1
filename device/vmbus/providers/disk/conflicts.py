"""Who touches which bytes of a disk, and so who has to wait for whom.

The disk's bytes are cut into spans, each with the last job that changes it and the jobs that read it since. Whoever
comes next waits for those, and through them for all before them. So a request costs what the spans that it touches
cost, however many jobs wait elsewhere, and a job that ends knows who waited for it.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Generic, Protocol, TypeVar


class Touches(Protocol):
    """A piece of work on the bytes from `offset` to `end`."""

    offset: int
    end: int
    changes: bool


One = TypeVar("One", bound=Touches)


class _Span(Generic[One]):
    """`writer`: the last that changes it. `readers`: of it since then."""

    __slots__ = ("end", "readers", "start", "writer")

    def __init__(self, start: int, end: int, writer: One | None, readers: set[One]) -> None:
        self.start = start
        self.end = end
        self.writer = writer
        self.readers = readers

    def continues(self, before: _Span[One]) -> bool:
        return before.end == self.start and before.writer is self.writer and before.readers == self.readers


class Conflicts(Generic[One]):
    """Of the jobs that have not ended."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._spans: list[_Span[One]] = []  # without overlap, in order; gaps are nobody's

    def __len__(self) -> int:
        return len(self._spans)

    def add(self, job: One) -> set[One]:
        """One more, after all that are there. Returns those that it has to wait for."""
        first, last = self._cut(job.offset), self._cut(job.end)
        spans = self._spans[first:last]
        waits: set[One] = set()
        for span in spans:
            if job.changes and span.readers:
                waits |= span.readers
            elif span.writer is not None:
                waits.add(span.writer)
        fresh: list[_Span[One]] = []
        if job.changes:
            fresh.append(_Span(job.offset, job.end, job, set()))
        else:
            at = job.offset
            for span in spans:
                if at < span.start:
                    fresh.append(_Span(at, span.start, None, {job}))
                span.readers.add(job)
                fresh.append(span)
                at = span.end
            if at < job.end:
                fresh.append(_Span(at, job.end, None, {job}))
        self._put(first, last, fresh)
        return waits

    def remove(self, job: One) -> None:
        """It has ended: nobody has to wait for it any more."""
        first = max(0, bisect_right(self._starts, job.offset) - 2)
        last = min(len(self._spans), bisect_right(self._starts, job.end) + 1)
        kept: list[_Span[One]] = []
        for span in self._spans[first:last]:
            span.readers.discard(job)
            if span.writer is job:
                span.writer = None
            if span.writer is None and not span.readers:
                continue
            if kept and span.continues(kept[-1]):
                kept[-1].end = span.end  # what cut them has gone
            else:
                kept.append(span)
        self._put(first, last, kept)

    def _put(self, first: int, last: int, spans: list[_Span[One]]) -> None:
        self._spans[first:last] = spans
        self._starts[first:last] = [span.start for span in spans]

    def _cut(self, at: int) -> int:
        """Let no span go over `at`. Returns the index of the first one that begins there or later."""
        index = bisect_right(self._starts, at)
        if not index:
            return 0
        span = self._spans[index - 1]
        if span.start == at:
            return index - 1
        if at < span.end:
            rest = _Span(at, span.end, span.writer, set(span.readers))
            span.end = at
            self._put(index, index, [rest])
        return index
