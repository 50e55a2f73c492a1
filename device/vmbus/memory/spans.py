"""Disjoint pieces of an address space in address order, and sets of its pages.

Both are for what a guest can make large, 65,536 mappings or a gigabyte of written pages: whatever is asked of one
piece, or of one range, costs the logarithm of all there is plus what is found.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Set
from typing import Generic, Protocol, TypeVar

_LONGEST_BLOCK = 1024  # starts in one list: what an insertion may have to move
_CHUNK_SHIFT = 9
_CHUNK_PAGES = 1 << _CHUNK_SHIFT
_ALL = (1 << _CHUNK_PAGES) - 1


class Span(Protocol):
    """One piece of the address space: from `iova` up to `end`, which is not in it."""

    @property
    def iova(self) -> int:
        """The first address."""

    @property
    def end(self) -> int:
        """The address behind the last."""


T = TypeVar("T", bound=Span)


class SpanMap(Generic[T]):
    """Disjoint spans, in address order. An operation costs O(log n), and moves at most a block of starts."""

    __slots__ = ("_blocks", "_bounds", "_by_start")

    def __init__(self) -> None:
        self._by_start: dict[int, T] = {}
        # The sorted starts, cut into blocks of which none is empty; block i has those from _bounds[i] on.
        self._blocks: list[list[int]] = []
        self._bounds: list[int] = []

    def __len__(self) -> int:
        return len(self._by_start)

    def __iter__(self) -> Iterator[T]:
        for block in self._blocks:
            for start in block:
                yield self._by_start[start]

    def get(self, start: int) -> T | None:
        return self._by_start.get(start)

    def find(self, address: int) -> T | None:
        index = bisect_right(self._bounds, address) - 1
        if index < 0:
            return None
        block = self._blocks[index]
        place = bisect_right(block, address) - 1
        if place < 0:  # what began at the block's bound is gone
            if not index:
                return None
            block = self._blocks[index - 1]
        span = self._by_start[block[place]]
        return span if address < span.end else None

    def overlapping(self, start: int, end: int) -> Iterator[T]:
        """The spans that have an address of `start`..`end` in them. Nothing may be added or removed meanwhile."""
        first = self.find(start)
        if first is not None and first.iova < start < end:
            yield first
        for index in range(max(bisect_right(self._bounds, start) - 1, 0), len(self._bounds)):
            block = self._blocks[index]
            for place in range(bisect_left(block, start), len(block)):
                if block[place] >= end:
                    return
                yield self._by_start[block[place]]

    def inside(self, start: int, end: int) -> Iterator[T]:
        """The spans that lie in `start`..`end` as a whole. Nothing may be added or removed meanwhile."""
        return (span for span in self.overlapping(start, end) if start <= span.iova and span.end <= end)

    def add(self, span: T) -> bool:
        """Add a span. False, and nothing is changed, if it overlaps one that is there."""
        if next(self.overlapping(span.iova, span.end), None) is not None:
            return False
        start = span.iova
        self._by_start[start] = span
        if not self._blocks:
            self._blocks.append([start])
            self._bounds.append(start)
            return True
        index = max(bisect_right(self._bounds, start) - 1, 0)
        self._bounds[index] = min(self._bounds[index], start)
        block = self._blocks[index]
        insort(block, start)
        if len(block) > _LONGEST_BLOCK:
            half = block[_LONGEST_BLOCK // 2 :]
            del block[_LONGEST_BLOCK // 2 :]
            self._blocks.insert(index + 1, half)
            self._bounds.insert(index + 1, half[0])
        return True

    def remove(self, span: T) -> None:
        del self._by_start[span.iova]
        index = bisect_right(self._bounds, span.iova) - 1
        block = self._blocks[index]
        del block[bisect_left(block, span.iova)]
        if not block:
            del self._blocks[index], self._bounds[index]

    def take(self, start: int, end: int) -> list[T]:
        """Remove the spans that lie in `start`..`end` as a whole, and return them in address order."""
        taken: list[T] = []
        index = max(bisect_right(self._bounds, start) - 1, 0)
        while index < len(self._blocks) and self._bounds[index] < end:
            block = self._blocks[index]
            low, high = bisect_left(block, start), bisect_left(block, end)
            if high > low and self._by_start[block[high - 1]].end > end:
                high -= 1
            taken += map(self._by_start.pop, block[low:high])
            if high - low == len(block):
                del self._blocks[index], self._bounds[index]
            else:
                del block[low:high]
                index += 1
        return taken


class PageSet(Set[int]):
    """A set of page numbers, kept as bit masks of 512 pages; made for runs of pages and for questions about ranges."""

    __slots__ = ("_chunks",)

    def __init__(self, pages: Iterable[int] = ()) -> None:
        self._chunks: dict[int, int] = {}
        for page in pages:
            self.add(page)

    def __contains__(self, page: object) -> bool:
        return isinstance(page, int) and bool(
            self._chunks.get(page >> _CHUNK_SHIFT, 0) >> (page & _CHUNK_PAGES - 1) & 1
        )

    def __iter__(self) -> Iterator[int]:
        return (page for first, count in self._stretches() for page in range(first, first + count))

    def __len__(self) -> int:
        return sum(map(int.bit_count, self._chunks.values()))

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def __repr__(self) -> str:
        return f"PageSet({[f'{first}+{count}' for first, count in self.runs(1 << 62)]})"

    def add(self, page: int) -> None:
        """Add one page."""
        chunk = page >> _CHUNK_SHIFT
        self._chunks[chunk] = self._chunks.get(chunk, 0) | 1 << (page & _CHUNK_PAGES - 1)

    def add_range(self, first: int, last: int) -> None:
        """Add the pages from `first` to `last`, both included; none if `last` comes before `first`."""
        if last < first:
            return
        for chunk in range(first >> _CHUNK_SHIFT, (last >> _CHUNK_SHIFT) + 1):
            self._chunks[chunk] = self._chunks.get(chunk, 0) | _mask(chunk, first, last)

    def meets(self, first: int, last: int) -> bool:
        """Whether there is a page from `first` to `last`, both included."""
        return any(self._chunks[chunk] & _mask(chunk, first, last) for chunk in self._known(first, last))

    def take(self, first: int, last: int) -> "PageSet":
        """Remove the pages from `first` to `last`, both included; returns those that were there."""
        taken = PageSet()
        for chunk in self._known(first, last):
            pages = self._chunks[chunk]
            if found := pages & _mask(chunk, first, last):
                taken._chunks[chunk] = found
                if pages == found:
                    del self._chunks[chunk]
                else:
                    self._chunks[chunk] = pages ^ found
        return taken

    def runs(self, longest: int) -> list[tuple[int, int]]:
        """The pages as (first page, count) with counts of at most `longest`, in order."""
        runs: list[tuple[int, int]] = []
        for first, count in self._stretches():
            if runs and sum(runs[-1]) == first:
                before, length = runs.pop()
                first, count = before, length + count
            while count > longest:
                runs.append((first, longest))
                first, count = first + longest, count - longest
            runs.append((first, count))
        return runs

    def _known(self, first: int, last: int) -> list[int]:
        """The chunks of pages `first` to `last` of which there is any page."""
        low, high = first >> _CHUNK_SHIFT, last >> _CHUNK_SHIFT
        if high - low < len(self._chunks):
            return [chunk for chunk in range(low, high + 1) if chunk in self._chunks]
        return [chunk for chunk in self._chunks if low <= chunk <= high]

    def _stretches(self) -> Iterator[tuple[int, int]]:
        """(first page, count) of pages in a row, cut where a chunk ends."""
        for chunk in sorted(self._chunks):
            page, bits = chunk << _CHUNK_SHIFT, self._chunks[chunk]
            while bits:
                gap = (bits & -bits).bit_length() - 1
                bits >>= gap
                count = (bits ^ bits + 1).bit_length() - 1
                yield page + gap, count
                bits >>= count
                page += gap + count


def _mask(chunk: int, first: int, last: int) -> int:
    """Which of a chunk's pages are from `first` to `last`, as bits."""
    mask, start = _ALL, chunk << _CHUNK_SHIFT
    if first > start:
        mask &= _ALL << (first - start)
    if last < start + _CHUNK_PAGES - 1:
        mask &= _ALL >> (start + _CHUNK_PAGES - 1 - last)
    return mask
