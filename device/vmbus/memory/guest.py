"""Guest memory: the one object through which anything of ours is written into it.

The transport tells which parts of the guest's I/O address space are reachable (`map`, `unmap`); everybody else opens
*windows* (rings, message pages: long-lived, revoked when the guest unmaps them) or takes *grants* (external data of
one packet). All writes go through these, so the dirty log that migration needs cannot be by-passed: while a log runs,
every page written, or merely granted for writing, is in it.

A view handed out by a grant may outlive the guest's unmapping: the transport guarantees that touching it stays
harmless (`vmbus.transport.mapping`), so a stale view is never a crash.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn, Protocol, cast

from vmbus.errors import Code, PeerError, UsageError, VmbusError
from vmbus.memory.reach import Reach, reach
from vmbus.memory.spans import PageSet, SpanMap
from vmbus.wire.gpa import PAGE_SIZE

_PAGE_SHIFT = 12
MAX_REGIONS = 65536


class MemoryFault(PeerError):
    """The guest named memory that it has not made reachable, or only for reading."""


class MemoryRevoked(PeerError):
    """The guest unmapped memory that is in use here."""


class DirtyLogBroken(VmbusError):
    """Pages that must be copied again can no longer be reached; this migration pass cannot be trusted."""

    code = Code.LOG_BROKEN


class _RevokedView:
    """Stands in for the views of a revoked window: any access raises."""

    def _raise(self, *_: object) -> NoReturn:
        raise MemoryRevoked("the guest unmapped this memory while it was in use")

    __getitem__ = _raise
    __setitem__ = _raise


_REVOKED = cast(memoryview, _RevokedView())


class Region:
    """One contiguous piece of reachable I/O address space, with what is open over it.

    windows: in the order in which they were opened. lent: what each grant for writing has of it, as (I/O address,
    length) pairs. Both go with the region when the guest unmaps it.
    """

    __slots__ = ("end", "iova", "lent", "view", "windows", "writable")

    def __init__(self, iova: int, view: memoryview, writable: bool) -> None:
        self.iova = iova
        self.end = iova + len(view)
        self.view = view
        self.writable = writable
        self.windows: dict[Window, None] = {}
        self.lent: dict[Grant, list[tuple[int, int]]] = {}


class DirtyLog:
    """The pages (I/O address / 4096) written by us since the log was started."""

    __slots__ = ("broken", "pages")

    def __init__(self) -> None:
        self.pages = PageSet()
        self.broken: str | None = None


class Loan(Protocol):
    """A window's memory in other hands (the native core's)."""

    def release(self) -> None:
        """Never touch it again. Harmless when repeated."""


class Window:
    """Guest memory opened for longer than one access: `size` bytes addressed from 0.

    Offsets and lengths are the caller's to keep in range; 32-bit accesses are single aligned loads and stores.
    Any access raises MemoryRevoked once the guest has unmapped part of it.
    """

    __slots__ = ("_loan", "_memory", "iova", "on_revoke", "size")

    def __init__(self, memory: "GuestMemory", iova: int, size: int) -> None:
        self._loan: Loan | None = None
        self._memory = memory
        self.iova = iova
        self.size = size
        self.on_revoke: Callable[[], None] | None = None

    def read(self, offset: int, length: int) -> bytes:
        """A private copy of `length` bytes at `offset`."""
        raise NotImplementedError

    def write(self, offset: int, data: bytes) -> None:
        """Store `data` at `offset`."""
        raise NotImplementedError

    def load32(self, offset: int) -> int:
        """The aligned 32-bit word at `offset`, in one load."""
        raise NotImplementedError

    def store32(self, offset: int, value: int) -> None:
        """Set the aligned 32-bit word at `offset`, in one store."""
        raise NotImplementedError

    def revoke(self) -> None:
        """Make every later access raise MemoryRevoked."""
        if self._loan is not None:
            self._loan.release()

    def lend(self, borrow: "Callable[[GuestMemory, list[tuple[int, memoryview]]], Loan]") -> Loan:
        """Let the native core access the pieces itself, (I/O address, memory) each, until they are revoked.

        Who has borrowed them looks at the memory's `log` after each store, and calls `mark` while there is one. There
        is one loan of a window: a second borrower gets the first one's.
        """
        if self._loan is None:
            self._loan = borrow(self._memory, self.pieces())
        return self._loan

    def pieces(self) -> list[tuple[int, memoryview]]:
        """(I/O address, memory) of each contiguous piece; none after `revoke`."""
        raise NotImplementedError

    def close(self) -> None:
        """Forget the window; like `revoke`, without telling the owner."""
        self._memory.forget(self)
        self.revoke()


class LinearWindow(Window):
    """A window whose bytes are contiguous in our address space."""

    __slots__ = ("_view", "_words")

    def __init__(self, memory: "GuestMemory", iova: int, view: memoryview) -> None:
        super().__init__(memory, iova, len(view))
        self._view = view
        aligned = view[: len(view) & ~3]
        self._words = aligned.cast("I") if iova % 4 == 0 else _REVOKED

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._view[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self._view[offset : offset + len(data)] = data
        if self._memory.log is not None:
            self._memory.mark(self.iova + offset, len(data))

    def load32(self, offset: int) -> int:
        return self._words[offset >> 2]

    def store32(self, offset: int, value: int) -> None:
        self._words[offset >> 2] = value
        if self._memory.log is not None:
            self._memory.mark(self.iova + offset, 4)

    def revoke(self) -> None:
        super().revoke()
        self._view = self._words = _REVOKED

    def pieces(self) -> list[tuple[int, memoryview]]:
        return [] if self._view is _REVOKED else [(self.iova, self._view)]


class ScatteredWindow(Window):
    """A window made of several pieces, each contiguous; words never straddle two since pieces are 8-byte aligned."""

    __slots__ = ("_pieces", "_starts")

    def __init__(self, memory: "GuestMemory", pieces: Sequence[LinearWindow]) -> None:
        super().__init__(memory, pieces[0].iova, sum(piece.size for piece in pieces))
        self._pieces = list(pieces)
        self._starts: list[int] = []
        start = 0
        for piece in pieces:
            self._starts.append(start)
            start += piece.size

    def _cut(self, offset: int, length: int) -> Iterable[tuple[LinearWindow, int, int]]:
        index = bisect_right(self._starts, offset) - 1
        while length > 0:
            piece = self._pieces[index]
            inside = offset - self._starts[index]
            part = min(length, piece.size - inside)
            yield piece, inside, part
            offset += part
            length -= part
            index += 1

    def read(self, offset: int, length: int) -> bytes:
        return b"".join([piece.read(inside, part) for piece, inside, part in self._cut(offset, length)])

    def write(self, offset: int, data: bytes) -> None:
        done = 0
        for piece, inside, part in self._cut(offset, len(data)):
            piece.write(inside, data[done : done + part])
            done += part

    def load32(self, offset: int) -> int:
        index = bisect_right(self._starts, offset) - 1
        return self._pieces[index].load32(offset - self._starts[index])

    def store32(self, offset: int, value: int) -> None:
        index = bisect_right(self._starts, offset) - 1
        self._pieces[index].store32(offset - self._starts[index], value)

    def revoke(self) -> None:
        super().revoke()
        for piece in self._pieces:
            piece.revoke()

    def pieces(self) -> list[tuple[int, memoryview]]:
        return [one for piece in self._pieces for one in piece.pieces()]


class Grant:
    """Memory of one packet, handed to a provider as memoryviews in the order the guest listed it.

    `release` ends it; the views must not be used after that (they stay harmless, but the guest owns its memory again).
    Where the guest unmaps the memory before, the grant has ended there.
    """

    __slots__ = ("_memory", "extents", "views", "writable")

    def __init__(
        self, memory: "GuestMemory", extents: list[tuple[int, int]], views: list[memoryview], writable: bool
    ) -> None:
        self._memory = memory
        self.extents = extents
        self.views = views
        self.writable = writable

    @property
    def size(self) -> int:
        """Bytes in all views together."""
        return sum(length for _, length in self.extents)

    def release(self) -> None:
        """Give the memory back: its packet was completed. Harmless when repeated."""
        self._memory.end_grant(self, completed=True)

    def abandon(self) -> None:
        """The same for a packet whose channel was closed by force: its owner may not know yet."""
        self._memory.end_grant(self)


class GuestMemory:
    """The reachable part of the guest's I/O address space, and the dirty log over it.

    A guest decides how many regions, windows and written pages there are. So whatever concerns one region costs
    O(log n) and what is open over it, and a range of regions that much for each.
    """

    def __init__(self) -> None:
        self.log: DirtyLog | None = None
        self._regions: SpanMap[Region] = SpanMap()
        self._windows: dict[Window, list[Region]] = {}  # the open ones
        self._writable_grants: dict[Grant, list[Region]] = {}
        self._reach: Reach | None = None

    # ---- what the transport tells us -------------------------------------------------------------------------

    def map(self, iova: int, view: memoryview, writable: bool) -> None:
        """Add `len(view)` bytes at `iova`. An identical re-map replaces the old view. Raises MemoryFault on overlap."""
        size = len(view)
        if size == 0:
            return
        before = self._regions.get(iova)
        if before is not None and before.end == iova + size:
            self.unmap(iova, size)
        if len(self._regions) >= MAX_REGIONS:
            raise MemoryFault(f"more than {MAX_REGIONS} mappings")
        self._let_go()
        if not self._regions.add(Region(iova, view if writable else view.toreadonly(), writable)):
            raise MemoryFault(f"mapping {iova:#x}+{size:#x} overlaps one that exists")

    def unmap(self, iova: int, size: int) -> None:
        """Remove every region inside `iova`..`iova + size`: grants end there, windows over it are revoked.

        The windows' owners are told when all is done. A log that runs is broken if it has pages of what is removed.
        """
        self._let_go()
        windows: dict[Window, None] = {}
        for region in self._regions.take(iova, iova + size):
            if self.log is not None and self.log.broken is None and self.log.pages.meets(*_pages(region)):
                self.log.broken = f"the guest unmapped {region.iova:#x}+{region.end - region.iova:#x}, written by us"
            windows |= region.windows
            region.lent.clear()
        for window in windows:
            self.forget(window)
            window.revoke()
        for window in windows:
            if window.on_revoke is not None:
                window.on_revoke()

    def _let_go(self) -> None:
        if self._reach is not None:
            self._reach.release()
            self._reach = None

    def move_to(self, other: "GuestMemory") -> None:
        """Make everything that is reachable here reachable through `other` instead.

        Here it is unmapped: windows are revoked and their owners told.
        """
        if not self._regions:
            return
        *_, last = regions = list(self._regions)
        for region in regions:
            other.map(region.iova, region.view, region.writable)
        self.unmap(regions[0].iova, last.end - regions[0].iova)

    def mapped(self) -> list[tuple[int, int, bool]]:
        """(I/O address, size, writable) of every region, in address order."""
        return [(region.iova, region.end - region.iova, region.writable) for region in self._regions]

    # ---- access ------------------------------------------------------------------------------------------------

    def _pieces(self, iova: int, length: int, writable: bool) -> Iterable[tuple[Region, int, int]]:
        while length > 0:
            region = self._regions.find(iova)
            if region is None:
                raise MemoryFault(f"I/O address {iova:#x} is not mapped")
            if writable and not region.writable:
                raise MemoryFault(f"I/O address {iova:#x} is mapped read-only")
            part = min(length, region.end - iova)
            yield region, iova, part
            iova += part
            length -= part

    def read(self, iova: int, length: int) -> bytes:
        """A private copy. Raises MemoryFault when any of it is not mapped."""
        return b"".join(
            [
                bytes(region.view[at - region.iova : at - region.iova + part])
                for region, at, part in self._pieces(iova, length, False)
            ]
        )

    def write(self, iova: int, data: bytes) -> None:
        """Store `data`. Raises MemoryFault, before anything is written, when any of it is not mapped or read-only."""
        done = 0
        for region, at, part in list(self._pieces(iova, len(data), True)):
            region.view[at - region.iova : at - region.iova + part] = data[done : done + part]
            done += part
        if self.log is not None:
            self.mark(iova, len(data))

    def window(self, extents: Sequence[tuple[int, int]]) -> Window:
        """Open `extents`, (I/O address, length) pairs, as one writable window.

        Addresses and lengths must be multiples of 8. Raises MemoryFault when any of it is not mapped for writing.
        """
        pieces: list[LinearWindow] = []
        regions: list[Region] = []
        for iova, length in extents:
            if iova % 8 or length % 8:
                raise MemoryFault(f"memory at {iova:#x}+{length:#x} is not aligned to 8 bytes")
            for region, at, part in self._pieces(iova, length, True):
                pieces.append(LinearWindow(self, at, region.view[at - region.iova : at - region.iova + part]))
                regions.append(region)
        if not pieces:
            raise MemoryFault("an empty memory window")
        window: Window = pieces[0] if len(pieces) == 1 else ScatteredWindow(self, pieces)
        self._windows[window] = regions
        for region in regions:
            region.windows[window] = None
        return window

    def forget(self, window: Window) -> None:
        """A window is closed: stop tracking it. Harmless when repeated."""
        for region in self._windows.pop(window, ()):
            region.windows.pop(window, None)

    def revoke_windows(self) -> None:
        """Close all windows, without a word to their owners."""
        for window, regions in self._windows.items():
            window.revoke()
            for region in regions:
                region.windows.clear()
        self._windows.clear()

    def grant(self, extents: list[tuple[int, int]], *, writable: bool) -> Grant:
        """The memory of one packet as memoryviews (read-only ones unless `writable`). Raises MemoryFault."""
        pieces = [piece for iova, length in extents for piece in self._pieces(iova, length, writable)]
        views = [region.view[at - region.iova : at - region.iova + part] for region, at, part in pieces]
        if not writable:
            return Grant(self, extents, [view.toreadonly() for view in views], False)
        grant = Grant(self, extents, views, True)
        self._writable_grants[grant] = [region for region, _, _ in pieces]
        for region, at, part in pieces:
            region.lent.setdefault(grant, []).append((at, part))
            if self.log is not None:
                self.mark(at, part)
        return grant

    def end_grant(self, grant: Grant, *, completed: bool = False) -> None:
        """The provider has done with it (`completed`), or its channel is gone. Harmless when repeated."""
        for region in self._writable_grants.pop(grant, ()):
            region.lent.pop(grant, None)

    @property
    def reach(self) -> Reach | None:
        """All that is mapped, for moves that go past grants; None while a dirty log runs, which must be told of every
        write, and where there are no such moves."""
        if self.log is not None:
            return None
        if self._reach is None:
            self._reach = reach((region.iova, region.view) for region in self._regions)
        return self._reach

    # ---- the dirty log -----------------------------------------------------------------------------------------

    def mark(self, iova: int, length: int) -> None:
        """Record a write of `length` bytes in the log; only called while one runs."""
        assert self.log is not None
        first = iova >> _PAGE_SHIFT
        last = (iova + length - 1) >> _PAGE_SHIFT
        if first == last:
            self.log.pages.add(first)
        else:
            self.log.pages.add_range(first, last)

    def _mark_lent(self, regions: Iterable[Region]) -> None:
        for region in regions:
            for pieces in region.lent.values():
                for iova, length in pieces:
                    self.mark(iova, length)

    def start_log(self) -> None:
        """Start a log. Memory that is granted for writing, and still mapped, counts as written from the start."""
        if self.log is not None:
            raise UsageError("a dirty log is running already; stop it first")
        self.log = DirtyLog()
        self._mark_lent({region for regions in self._writable_grants.values() for region in regions})

    def stop_log(self) -> None:
        """Stop and forget the log. Harmless without one."""
        self.log = None

    def take_dirty(self, iova: int, size: int, *, written_on: bool) -> list[tuple[int, int]]:
        """Take the logged pages in `size` bytes at `iova` out of the log, as (I/O address, length) runs.

        `written_on`: the device goes on, so that what is granted for writing counts as written again from now on.
        Raises DirtyLogBroken as `dirty_runs` does, and UsageError without a log.
        """
        taken = self._trusted_log().pages.take(iova >> _PAGE_SHIFT, (iova + size - 1) >> _PAGE_SHIFT)
        if written_on:
            self._mark_lent(self._regions.overlapping(iova, iova + size))
        return _runs(taken, size)

    def dirty_runs(self, max_bytes: int = 1 << 20) -> list[tuple[int, int]]:
        """The logged pages as (I/O address, length) runs of at most `max_bytes`, in address order.

        Raises DirtyLogBroken when the guest has unmapped a logged page: that migration pass cannot be completed.
        """
        return _runs(self._trusted_log().pages, max_bytes)

    def _trusted_log(self) -> DirtyLog:
        if self.log is None:
            raise UsageError("no dirty log is running; start one before the migration begins")
        if self.log.broken is not None:
            raise DirtyLogBroken(f"{self.log.broken}; cancel this pass and start again")
        return self.log


def _pages(region: Region) -> tuple[int, int]:
    """The first and the last page of a region."""
    return region.iova >> _PAGE_SHIFT, (region.end - 1) >> _PAGE_SHIFT


def _runs(pages: PageSet, max_bytes: int) -> list[tuple[int, int]]:
    """Pages as (I/O address, length) runs of at most `max_bytes`, and at least a page, in address order."""
    return [(first * PAGE_SIZE, count * PAGE_SIZE) for first, count in pages.runs(max(max_bytes // PAGE_SIZE, 1))]


def first_bytes(views: Sequence[memoryview], length: int) -> list[memoryview]:
    """The first `length` bytes of memory; what there is, if there are fewer."""
    found = []
    for view in views:
        if length <= 0:
            break
        found.append(view[:length])
        length -= len(view)
    return found
