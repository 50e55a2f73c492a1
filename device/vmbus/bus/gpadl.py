"""The host's table of GPADLs: guest memory described by a stream of 8-byte words over several messages.

Life of one: in progress (HEADER came, BODYs may follow), complete, tearing down (the guest asked for its memory while
a channel still uses it), gone. A GPADL in progress is found by its handle alone, since BODY carries no relid.

What a channel's owner maps beyond the rings is kept in `Mappings`, one for each open channel.
"""

from collections.abc import Iterable
from typing import Annotated, NamedTuple

import msgspec

from vmbus.errors import PeerError, StateError
from vmbus.memory.guest import Grant, GuestMemory, Window
from vmbus.util.pieces import Pieces
from vmbus.util.records import U16, U32, Relid, StructVersion, decode
from vmbus.wire.gpa import MAX_PFN, PAGE_SIZE, GpaRange, RangeError, extents_of, page_count, parse_ranges

MAX_GPADLS = 4096
MAX_IN_PROGRESS = 64
MAX_RANGES = 4096
MAX_BYTES = 256 << 20
# Of range lists of all GPADLs of a connection: 8 bytes for each page, so this is about 4 GiB of guest memory.
MAX_DESCRIPTION = 8 << 20


class GpadlError(PeerError):
    """A GPADL message that does not fit the table's state."""


class GpadlMapped(GpadlError):
    """The GPADL is mapped already; there is one mapping of a GPADL at a time."""


class Gpadl(NamedTuple):
    """A complete GPADL."""

    relid: int
    handle: int
    ranges: tuple[GpaRange, ...]

    @property
    def size(self) -> int:
        """Bytes described."""
        return sum(one.byte_count for one in self.ranges)

    def extents(self) -> list[tuple[int, int]]:
        """The described memory as (I/O address, length) pairs, in order."""
        return extents_of(self.ranges)

    def page_extents(self, first: int, count: int | None = None) -> list[tuple[int, int]]:
        """Extents of `count` pages (all that follow when None) from page `first`, for rings.

        Raises GpadlError unless the GPADL is one range of whole pages that holds them.
        """
        if len(self.ranges) != 1 or self.ranges[0].byte_offset or self.ranges[0].byte_count % 4096:
            raise GpadlError(f"GPADL {self.handle:#x} is not one range of whole pages, which a ring needs")
        pfns = self.ranges[0].pfns
        chosen = pfns[first:] if count is None else pfns[first : first + count]
        if not chosen or (count is not None and len(chosen) < count):
            raise GpadlError(f"GPADL {self.handle:#x} has {len(pfns)} pages; {count} from page {first} were asked for")
        return GpaRange(len(chosen) * 4096, 0, chosen).extents()


def ring_extents(gpadl: Gpadl, split: int) -> list[list[tuple[int, int]]]:
    """Extents of the four parts of two rings, each a header and its data; the second ring begins at page `split`.

    Raises GpadlError when they do not fit, or the GPADL is not one range of whole pages.
    """
    pages = gpadl.size // PAGE_SIZE
    if split < 2 or pages < split + 2:
        raise GpadlError(f"{pages} ring pages split at page {split}: each ring needs a header and a data page")
    return [
        gpadl.page_extents(first, count)
        for first, count in ((0, 1), (1, split - 1), (split, 1), (split + 1, pages - split - 1))
    ]


class PartialGpadl:
    """A GPADL whose range list has not arrived completely."""

    __slots__ = ("data", "handle", "range_bytes", "range_count", "relid")

    def __init__(self, relid: int, handle: int, range_bytes: int, range_count: int, data: bytes) -> None:
        self.relid = relid
        self.handle = handle
        self.range_bytes = range_bytes
        self.range_count = range_count
        self.data = data


class Mappings:
    """The GPADLs of one open channel that its owner has mapped, at most once each.

    A mapping for writing counts as written the whole time for the dirty log; one for reading never does; of a window
    what is written through it does.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._grants: dict[int, Grant | Window] = {}

    def __contains__(self, handle: int) -> bool:
        return handle in self._grants

    def __len__(self) -> int:
        return len(self._grants)

    @property
    def handles(self) -> list[int]:
        """What is mapped, in the order of mapping."""
        return list(self._grants)

    def map(self, gpadl: Gpadl, *, read_only: bool) -> Grant:
        """The GPADL's memory as views. Raises GpadlMapped, and MemoryFault when it is not reachable."""
        self._require_free(gpadl)
        grant = self._memory.grant(gpadl.extents(), writable=not read_only)
        self._grants[gpadl.handle] = grant
        return grant

    def open(self, gpadl: Gpadl, most: int) -> Window:
        """The GPADL's memory as one window. Raises as `map`; GpadlError for more than `most` bytes, and MemoryFault for
        memory that is not aligned to 8 bytes."""
        self._require_free(gpadl)
        if gpadl.size > most:
            raise GpadlError(f"GPADL {gpadl.handle:#x} has {gpadl.size} bytes; {most} are taken")
        window = self._memory.window(gpadl.extents())
        self._grants[gpadl.handle] = window
        return window

    def _require_free(self, gpadl: Gpadl) -> None:
        if gpadl.handle in self._grants:
            raise GpadlMapped(f"GPADL {gpadl.handle:#x} is mapped already: unmap it first")

    def unmap(self, handle: int) -> None:
        """End a mapping. Raises GpadlError when there is none."""
        grant = self._grants.pop(handle, None)
        if grant is None:
            raise GpadlError(f"GPADL {handle:#x} is not mapped")
        _end(grant)

    def clear(self) -> None:
        for grant in self._grants.values():
            _end(grant)
        self._grants.clear()


def _end(mapping: Grant | Window) -> None:
    if isinstance(mapping, Window):
        mapping.close()
    else:
        mapping.release()


def _description_size(gpadl: Gpadl) -> int:
    return sum(8 + 8 * len(one.pfns) for one in gpadl.ranges)


class GpadlTable:
    """All GPADLs of one connection. `complete` (by relid and handle) and `partial` (by handle) are to be read only."""

    def __init__(self) -> None:
        self.complete: dict[tuple[int, int], Gpadl] = {}
        self.partial: dict[int, PartialGpadl] = {}
        self._handles: dict[int, dict[int, None]] = {}  # of complete ones, by relid
        self._described = 0

    def begin(self, relid: int, handle: int, range_bytes: int, range_count: int, words: bytes) -> Gpadl | None:
        """A HEADER. Returns the GPADL when it is complete. Raises GpadlError or RangeError; then it does not exist."""
        if handle in self.partial or (relid, handle) in self.complete:
            raise GpadlError(f"GPADL {handle:#x} exists already")
        if len(self.complete) + len(self.partial) >= MAX_GPADLS or len(self.partial) >= MAX_IN_PROGRESS:
            raise GpadlError(f"{len(self.complete)} GPADLs exist and {len(self.partial)} are in progress: no more")
        if self._described + range_bytes > MAX_DESCRIPTION:
            raise GpadlError(f"the range lists of all GPADLs have {self._described} bytes: no more")
        if not 0 < range_count <= MAX_RANGES or range_bytes % 8 or range_bytes < 16 * range_count:
            raise GpadlError(f"GPADL {handle:#x} with {range_count} ranges in {range_bytes} bytes")
        partial = PartialGpadl(relid, handle, range_bytes, range_count, words[:range_bytes])
        self.add_partial(partial)
        return self._finish_if_complete(partial)

    def extend(self, handle: int, words: bytes) -> tuple[PartialGpadl, Gpadl | None]:
        """A BODY. Raises GpadlError for an unknown handle; RangeError as `begin`, then it does not exist any more."""
        partial = self.partial.get(handle)
        if partial is None:
            raise GpadlError(f"a GPADL body for {handle:#x}, which is not in progress")
        # Some guests pad messages: what goes beyond the declared total is not part of the list.
        partial.data += words[: partial.range_bytes - len(partial.data)]
        return partial, self._finish_if_complete(partial)

    def _finish_if_complete(self, partial: PartialGpadl) -> Gpadl | None:
        if len(partial.data) < partial.range_bytes:
            return None
        self.abandon(partial.handle)
        ranges, end = parse_ranges(partial.data, partial.range_count, max_bytes=MAX_BYTES)
        if end != partial.range_bytes:
            raise RangeError(f"GPADL {partial.handle:#x}: the ranges take {end} of {partial.range_bytes} bytes")
        gpadl = Gpadl(partial.relid, partial.handle, tuple(ranges))
        self.add(gpadl)
        return gpadl

    def add(self, gpadl: Gpadl) -> None:
        """A complete one."""
        self.complete[gpadl.relid, gpadl.handle] = gpadl
        self._handles.setdefault(gpadl.relid, {})[gpadl.handle] = None
        self._described += _description_size(gpadl)

    def add_partial(self, partial: PartialGpadl) -> None:
        """One in progress."""
        self.partial[partial.handle] = partial
        self._described += partial.range_bytes

    def remove(self, relid: int, handle: int) -> None:
        """A complete one is torn down. Harmless when there is none."""
        gpadl = self.complete.pop((relid, handle), None)
        if gpadl is not None:
            del self._handles[relid][handle]
            self._described -= _description_size(gpadl)

    def abandon(self, handle: int) -> None:
        """One in progress will not be completed. Harmless when there is none."""
        partial = self.partial.pop(handle, None)
        if partial is not None:
            self._described -= partial.range_bytes

    def drop_channel(self, relid: int) -> None:
        for handle in list(self._handles.get(relid, ())):
            self.remove(relid, handle)
        self._handles.pop(relid, None)
        for handle, partial in list(self.partial.items()):
            if partial.relid == relid:
                self.abandon(handle)

    def clear(self) -> None:
        self.complete.clear()
        self.partial.clear()
        self._handles.clear()
        self._described = 0

    def save(self, tearing_down: set[tuple[int, int]]) -> tuple[list["GpadlState"], list["PartialState"]]:
        """Those that are complete, and those in progress. `tearing_down`: (relid, handle) that the guest wants back."""
        complete = [
            GpadlState(
                one.relid,
                one.handle,
                [RangeState(r.byte_count, r.byte_offset, list(r.pfns)) for r in one.ranges],
                tearing_down=(one.relid, one.handle) in tearing_down,
            )
            for one in self.complete.values()
        ]
        return complete, [
            PartialState(one.relid, one.handle, one.range_bytes, one.range_count, one.data)
            for one in self.partial.values()
        ]

    def restore(self, complete: list["GpadlState"], partial: list["PartialState"]) -> Pieces[None]:
        """Put what `check_gpadls` has passed into an empty table."""
        for gpadl in complete:
            self.add(gpadl.live)
            yield
        for one in partial:
            self.add_partial(PartialGpadl(one.relid, one.handle, one.range_bytes, one.range_count, one.data))


# ---- saved ---------------------------------------------------------------------------------------------------------


class RangeState(msgspec.Struct, frozen=True, array_like=True):
    byte_count: U32
    byte_offset: Annotated[int, msgspec.Meta(ge=0, le=PAGE_SIZE - 1)]
    pfns: Annotated[
        list[Annotated[int, msgspec.Meta(ge=0, le=MAX_PFN)]], msgspec.Meta(max_length=MAX_BYTES // PAGE_SIZE + 1)
    ]


class GpadlState(msgspec.Struct, frozen=True):
    """A complete GPADL. `tearing_down`: the guest wants it back, and the channel's owner had it mapped."""

    relid: Relid
    handle: U32
    ranges: list[RangeState]
    tearing_down: bool = False
    structure_version: StructVersion = 1

    @property
    def live(self) -> Gpadl:
        return Gpadl(
            self.relid, self.handle, tuple(GpaRange(r.byte_count, r.byte_offset, tuple(r.pfns)) for r in self.ranges)
        )


class PartialState(msgspec.Struct, frozen=True):
    """A GPADL of which some messages are still to come."""

    relid: Relid
    handle: U32
    range_bytes: U16
    range_count: U16
    data: Annotated[bytes, msgspec.Meta(max_length=65536)]
    structure_version: StructVersion = 1


class _GpadlPieces(GpadlState, frozen=True):
    ranges: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MAX_RANGES)]  # type: ignore[assignment]


_gpadl_decoder = msgspec.msgpack.Decoder(_GpadlPieces)
_range_decoder = msgspec.msgpack.Decoder(RangeState)


def decode_gpadls(pieces: Iterable[msgspec.Raw], described: int) -> list[GpadlState]:
    """GPADLs of a saved state, one range at a time: bytes that promise millions of ranges are refused at the table's
    limits, before anything of that size exists. `described`: bytes of range lists that those in progress take.

    Raises StateError.
    """
    gpadls = []
    for piece in pieces:
        gpadl = decode(_gpadl_decoder, piece, "a GPADL in the device state")
        what = f"a range of GPADL {gpadl.handle:#x} in the device state"
        ranges = []
        for one in gpadl.ranges:
            ranges.append(decode(_range_decoder, one, what))
            described += 8 + 8 * len(ranges[-1].pfns)
            if described > MAX_DESCRIPTION:
                raise StateError(f"the range lists of all GPADLs in the device state exceed {MAX_DESCRIPTION} bytes")
        gpadls.append(GpadlState(gpadl.relid, gpadl.handle, ranges, gpadl.tearing_down, gpadl.structure_version))
    return gpadls


def check_gpadls(complete: list[GpadlState], partial: list[PartialState], relids: set[int]) -> None:
    """Raises StateError for GPADLs that cannot be those of one table whose channels have these relids."""
    handles: set[tuple[int, int]] = set()
    for gpadl in complete:
        name = f"GPADL {gpadl.handle:#x} of relid {gpadl.relid}"
        if gpadl.relid not in relids or (gpadl.relid, gpadl.handle) in handles:
            raise StateError(f"{name} belongs to no channel or is there twice")
        handles.add((gpadl.relid, gpadl.handle))
        if not gpadl.ranges or any(
            one.byte_count == 0 or len(one.pfns) != page_count(one.byte_count, one.byte_offset) for one in gpadl.ranges
        ):
            raise StateError(f"{name} has no ranges, or one whose pages are not as many as its bytes need")
        if sum(one.byte_count for one in gpadl.ranges) > MAX_BYTES:
            raise StateError(f"{name} describes more than {MAX_BYTES} bytes")
    if len(complete) + len(partial) > MAX_GPADLS:
        raise StateError(f"the state has {len(complete) + len(partial)} GPADLs, and there are at most {MAX_GPADLS}")
    in_progress = set()
    for one in partial:
        size = len(one.data)
        if (
            one.relid not in relids
            or one.handle in in_progress
            or (one.relid, one.handle) in handles
            or one.range_bytes % 8
            or not 16 <= 16 * one.range_count <= one.range_bytes
            or one.range_count > MAX_RANGES
            or size % 8
            or size >= one.range_bytes
        ):
            raise StateError(f"GPADL {one.handle:#x} of relid {one.relid}, in progress, is not a possible one")
        in_progress.add(one.handle)
