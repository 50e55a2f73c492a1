"""GPA ranges: how guest memory is described in GPADL messages and in GPA-direct packets.

A range is `u32 byte_count, u32 byte_offset, u64 pfn[n]` with n = ceil((byte_offset + byte_count) / 4096): `byte_count`
bytes starting `byte_offset` bytes into the first of n pages. A PFN is an I/O address divided by 4096; pages need not
be contiguous.
"""

from collections.abc import Iterable, Sequence
from struct import Struct
from typing import NamedTuple

from vmbus.errors import PeerError

PAGE_SIZE = 4096
MAX_PFN = (1 << 52) - 1

_RANGE = Struct("<II")


class RangeError(PeerError):
    """A GPA range list is malformed."""


class GpaRange(NamedTuple):
    """`byte_count` bytes, from `byte_offset` (0..4095) in the first page of `pfns`."""

    byte_count: int
    byte_offset: int
    pfns: tuple[int, ...]

    def extents(self) -> list[tuple[int, int]]:
        """The range as (I/O address, length) pairs, adjacent pages merged, in order."""
        extents: list[tuple[int, int]] = []
        left = self.byte_count
        offset = self.byte_offset
        start = end = -1
        for pfn in self.pfns:
            address = pfn * PAGE_SIZE + offset
            length = min(PAGE_SIZE - offset, left)
            left -= length
            offset = 0
            if address == end:
                end += length
            else:
                if end > start:
                    extents.append((start, end - start))
                start, end = address, address + length
        if end > start:
            extents.append((start, end - start))
        return extents


def page_count(byte_count: int, byte_offset: int = 0) -> int:
    """How many pages a range touches."""
    return (byte_offset + byte_count + PAGE_SIZE - 1) // PAGE_SIZE


def range_for(address: int, length: int) -> GpaRange:
    """The range for `length` bytes of contiguous I/O address space at `address`."""
    first, offset = divmod(address, PAGE_SIZE)
    return GpaRange(length, offset, tuple(range(first, first + page_count(length, offset))))


def pack_ranges(ranges: Iterable[GpaRange]) -> bytes:
    """The wire form of a list of ranges."""
    return b"".join(_RANGE.pack(r.byte_count, r.byte_offset) + Struct(f"<{len(r.pfns)}Q").pack(*r.pfns) for r in ranges)


def parse_ranges(data: bytes, count: int, *, max_bytes: int, start: int = 0) -> tuple[list[GpaRange], int]:
    """Parse `count` ranges at `data[start:]`; returns them and the offset behind the last one.

    Raises RangeError when a range is empty, starts beyond its first page, names an impossible PFN, runs past the end
    of `data`, or when the ranges describe more than `max_bytes` bytes in all. The limits are checked before anything
    of that size is built.
    """
    ranges: list[GpaRange] = []
    position = start
    total = 0
    end = len(data)
    for number in range(count):
        if position + 8 > end:
            raise RangeError(f"range {number} of {count} starts beyond the end of its message")
        byte_count, byte_offset = _RANGE.unpack_from(data, position)
        position += 8
        total += byte_count
        if byte_count == 0 or byte_offset >= PAGE_SIZE:
            raise RangeError(f"range {number} has byte count {byte_count} and byte offset {byte_offset}")
        if total > max_bytes:
            raise RangeError(f"the ranges describe {total} bytes, more than the limit of {max_bytes}")
        pages = page_count(byte_count, byte_offset)
        if position + 8 * pages > end:
            raise RangeError(f"range {number} needs {pages} PFNs and has {(end - position) // 8}")
        pfns = Struct(f"<{pages}Q").unpack_from(data, position)
        if max(pfns) > MAX_PFN:
            raise RangeError(f"range {number} names PFN {max(pfns):#x}")
        position += 8 * pages
        ranges.append(GpaRange(byte_count, byte_offset, pfns))
    return ranges, position


def extents_of(ranges: Sequence[GpaRange]) -> list[tuple[int, int]]:
    """All ranges as (I/O address, length) pairs, in order."""
    return [extent for r in ranges for extent in r.extents()]
