"""Guest memory: windows, grants, revocation, the dirty log."""

import gc
import random
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vmbus.errors import UsageError
from vmbus.memory import spans
from vmbus.memory.guest import DirtyLogBroken, Grant, GuestMemory, MemoryFault, MemoryRevoked, Window

PAGE = 4096


@pytest.fixture
def memory() -> GuestMemory:
    """Four pages at 0x10000, two at 0x20000 (apart in host memory), one read-only at 0x30000."""
    memory = GuestMemory()
    memory.map(0x10000, memoryview(bytearray(4 * PAGE)), True)
    memory.map(0x14000, memoryview(bytearray(2 * PAGE)), True)
    memory.map(0x30000, memoryview(bytearray(PAGE)), False)
    return memory


def test_reads_and_writes_cross_regions(memory: GuestMemory) -> None:
    memory.write(0x13FF0, b"a" * 32)
    assert memory.read(0x13FEF, 34) == b"\0" + b"a" * 32 + b"\0"


@pytest.mark.parametrize(("iova", "size"), [(0xFFFF, 2), (0x15FFF, 2), (0x90000, 1), (0x13FFF, 3 * PAGE)])
def test_unmapped_memory_is_a_fault_and_nothing_is_written(memory: GuestMemory, iova: int, size: int) -> None:
    with pytest.raises(MemoryFault):
        memory.write(iova, b"x" * size)
    assert memory.read(0x10000, 6 * PAGE) == bytes(6 * PAGE)


def test_read_only_memory_cannot_be_written_or_granted_for_writing(memory: GuestMemory) -> None:
    for write in (
        lambda: memory.write(0x30000, b"x"),
        lambda: memory.window([(0x30000, PAGE)]),
        lambda: memory.grant([(0x30000, 8)], writable=True),
    ):
        with pytest.raises(MemoryFault, match="read-only"):
            write()
    grant = memory.grant([(0x30000, 8)], writable=False)
    with pytest.raises(TypeError):
        grant.views[0][0] = 1


def test_unaligned_windows_are_refused(memory: GuestMemory) -> None:
    with pytest.raises(MemoryFault, match="aligned"):
        memory.window([(0x10004, 8)])


def test_a_closed_window_tells_nobody(memory: GuestMemory) -> None:
    window = memory.window([(0x10000, PAGE)])
    window.on_revoke = lambda: pytest.fail("told of a window that it closed itself")
    window.close()
    memory.unmap(0x10000, 4 * PAGE)
    with pytest.raises(MemoryRevoked):
        window.read(0, 1)


# ---- the dirty log ---------------------------------------------------------------------------------------------------


def test_runs_are_split_at_the_limit(memory: GuestMemory) -> None:
    memory.start_log()
    memory.write(0x10000, bytes(4 * PAGE))
    assert memory.dirty_runs(max_bytes=3 * PAGE) == [(0x10000, 3 * PAGE), (0x13000, PAGE)]


def test_pages_are_taken_out_of_the_log_by_region() -> None:
    memory = GuestMemory()
    for start in (0x10000, 0x20000):
        memory.map(start, memoryview(bytearray(0x8000)), True)
    with pytest.raises(UsageError, match="no dirty log"):
        memory.take_dirty(0x10000, 0x8000, written_on=True)
    lent = memory.grant([(0x11000, 16)], writable=True)
    memory.start_log()
    memory.write(0x12FFC, bytes(8))
    memory.write(0x20000, b"x")
    assert memory.take_dirty(0x10000, 0x8000, written_on=True) == [(0x11000, 0x3000)]
    # What a provider still has may be written again; the other region's page is still there.
    assert memory.take_dirty(0x10000, 0x8000, written_on=False) == [(0x11000, 0x1000)]
    assert memory.take_dirty(0x10000, 0x8000, written_on=False) == []
    lent.release()
    assert memory.take_dirty(0x20000, 0x8000, written_on=True) == [(0x20000, 0x1000)]
    assert memory.log is not None and memory.log.pages == set()
    memory.write(0x20000, b"x")
    memory.unmap(0x1F000, 0x2000)  # a part of it is none
    assert memory.take_dirty(0x10000, 0x8000, written_on=True) == []
    memory.unmap(0x20000, 0x8000)
    with pytest.raises(DirtyLogBroken, match="unmapped"):
        memory.take_dirty(0x10000, 0x8000, written_on=True)


def test_a_grant_ends_where_the_guest_unmaps_its_memory(memory: GuestMemory) -> None:
    lent = memory.grant([(0x13000, 2 * PAGE)], writable=True)
    memory.unmap(0x14000, 2 * PAGE)
    memory.start_log()
    assert memory.log is not None and memory.log.broken is None
    assert memory.dirty_runs() == [(0x13000, PAGE)], "what is still mapped may still be written"
    memory.read(0x13000, PAGE)
    lent.release()
    lent.release()
    memory.stop_log()
    memory.start_log()
    assert memory.dirty_runs() == []


def test_owners_of_revoked_windows_are_told_in_order_and_when_all_is_done() -> None:
    memory = GuestMemory()
    for start in range(0x10000, 0x20000, PAGE):
        memory.map(start, memoryview(bytearray(PAGE)), True)
    told: list[int] = []

    def tell(window: Window) -> None:
        told.append(window.iova)
        assert memory.mapped() == []
        window.close()

    for start in reversed(range(0x10000, 0x20000, PAGE)):
        window = memory.window([(start, PAGE)])
        window.on_revoke = lambda window=window: tell(window)
    memory.unmap(0, 1 << 64)
    assert told == list(range(0x10000, 0x20000, PAGE))


# ---- many of everything ----------------------------------------------------------------------------------------------


def _work(count: int) -> dict[str, float]:
    """Seconds of CPU for each kind of work on `count` regions of a page, in random order."""
    order = list(range(0x1000, 0x1000 + 2 * count, 2))
    random.Random(count).shuffle(order)
    memory, page = GuestMemory(), memoryview(bytearray(PAGE))
    took: dict[str, float] = {}

    def timed(what: str, work: Callable[[], object]) -> None:
        start = time.thread_time()
        work()
        took[what] = time.thread_time() - start

    def map_all() -> None:
        for number in order:
            memory.map(number * PAGE, page, True)

    timed("map", map_all)
    windows = [memory.window([(number * PAGE, PAGE)]) for number in order]
    timed("close windows", lambda: [window.close() for window in windows])
    lent = [memory.grant([(number * PAGE, 8)], writable=True) for number in order]
    memory.start_log()
    timed("take", lambda: [memory.take_dirty(number * PAGE, PAGE, written_on=True) for number in order])
    timed("release", lambda: [grant.release() for grant in lent])
    for number in order:
        memory.take_dirty(number * PAGE, PAGE, written_on=False)
    for number in range(count):
        memory.mark((1 << 40) + number * PAGE, 8)
    timed("unmap", lambda: [memory.unmap(number * PAGE, PAGE) for number in order])
    assert memory.log is not None and memory.log.broken is None and len(memory.log.pages) == count
    map_all()
    timed("move", lambda: memory.move_to(GuestMemory()))
    map_all()
    timed("unmap at once", lambda: memory.unmap(0, 1 << 64))
    return took


@pytest.fixture
def no_collector() -> Iterator[None]:
    """The garbage collector looks through all that other tests have left, at moments of its own."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_eight_times_the_regions_cost_about_eight_times_as_much() -> None:
    """Work that looks through all regions, grants or pages for each of them would cost 64 times as much. Caches and
    neighbours on the machine may multiply a time: one that looks too long is measured again."""
    few, many = _work(1500), _work(12000)
    for _ in range(5):
        if all(many[what] < 40 * few[what] for what in few):
            break
        for times, count in ((few, 1500), (many, 12000)):
            for what, took in _work(count).items():
                times[what] = min(times[what], took)
    slow = {what: f"{many[what] / few[what]:.1f} times as long" for what in few if many[what] >= 40 * few[what]}
    assert not slow


# ---- against a model -------------------------------------------------------------------------------------------------

_PAGES = 24
_page = st.integers(0, _PAGES - 1)
_count = st.integers(1, 5)


class MemoryModel(RuleBasedStateMachine):
    """GuestMemory beside what it should do, page by page: regions, lent pages and the log are plain dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(spans, "_LONGEST_BLOCK", 4)  # so that a few regions are several blocks
        self.memory = GuestMemory()
        self.regions: dict[int, tuple[int, bool]] = {}  # first page: (pages, writable)
        self.serial: dict[int, int] = {}  # mapped page: which mapping it belongs to
        self.count = 0
        self.windows: list[tuple[Window, dict[int, int]]] = []  # with the mapping that each page had
        self.grants: list[tuple[Grant, dict[int, int]]] = []
        self.log: set[int] | None = None
        self.broken = False

    def teardown(self) -> None:
        self.patch.undo()

    def _writable(self, first: int, count: int) -> bool:
        return all(
            any(start <= page < start + size and writable for start, (size, writable) in self.regions.items())
            for page in range(first, first + count)
        )

    def _pages(self, first: int, count: int) -> dict[int, int]:
        return {page: self.serial[page] for page in range(first, first + count)}

    def _live(self, pages: dict[int, int]) -> set[int]:
        return {page for page, serial in pages.items() if self.serial.get(page) == serial}

    def _remove(self, start: int) -> None:
        size, _ = self.regions.pop(start)
        for page in range(start, start + size):
            del self.serial[page]
            self.broken = self.broken or (self.log is not None and page in self.log)

    @rule(first=_page, count=_count, writable=st.booleans())
    def map(self, first: int, count: int, writable: bool) -> None:
        view = memoryview(bytearray(count * PAGE))
        if self.regions.get(first, (0, False))[0] == count:
            self._remove(first)
        elif any(page in self.serial for page in range(first, first + count)):
            with pytest.raises(MemoryFault):
                self.memory.map(first * PAGE, view, writable)
            return
        self.memory.map(first * PAGE, view, writable)
        self.count += 1
        self.regions[first] = count, writable
        self.serial |= dict.fromkeys(range(first, first + count), self.count)

    @rule(first=_page, count=st.integers(1, _PAGES))
    def unmap(self, first: int, count: int) -> None:
        self.memory.unmap(first * PAGE, count * PAGE)
        for start in [start for start, (size, _) in self.regions.items() if first <= start <= first + count - size]:
            self._remove(start)

    @rule(first=_page, count=_count)
    def window(self, first: int, count: int) -> None:
        if not self._writable(first, count):
            with pytest.raises(MemoryFault):
                self.memory.window([(first * PAGE, count * PAGE)])
            return
        self.windows.append((self.memory.window([(first * PAGE, count * PAGE)]), self._pages(first, count)))

    @precondition(lambda self: self.windows)
    @rule(data=st.data())
    def use_window(self, data: st.DataObject) -> None:
        window, pages = data.draw(st.sampled_from(self.windows))
        page = data.draw(st.integers(0, len(pages) - 1))
        if self._live(pages) != set(pages):
            with pytest.raises(MemoryRevoked):
                window.write(page * PAGE, b"x")
            return
        window.write(page * PAGE, b"x")
        if self.log is not None:
            self.log.add(min(pages) + page)

    @precondition(lambda self: self.windows)
    @rule(data=st.data())
    def close_window(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.windows) - 1))
        self.windows.pop(index)[0].close()

    @rule(first=_page, count=_count)
    def grant(self, first: int, count: int) -> None:
        if not self._writable(first, count):
            with pytest.raises(MemoryFault):
                self.memory.grant([(first * PAGE, count * PAGE)], writable=True)
            return
        lent = self.memory.grant([(first * PAGE, count * PAGE)], writable=True)
        self.grants.append((lent, self._pages(first, count)))
        if self.log is not None:
            self.log |= set(range(first, first + count))

    @precondition(lambda self: self.grants)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.grants) - 1))
        self.grants.pop(index)[0].release()

    @precondition(lambda self: self.log is None)
    @rule()
    def start_log(self) -> None:
        self.memory.start_log()
        self.log = set().union(*(self._live(pages) for _, pages in self.grants))
        self.broken = False

    @precondition(lambda self: self.log is not None)
    @rule()
    def stop_log(self) -> None:
        self.memory.stop_log()
        self.log, self.broken = None, False

    @precondition(lambda self: self.log is not None and self.regions)
    @rule(data=st.data(), written_on=st.booleans())
    def take(self, data: st.DataObject, written_on: bool) -> None:
        assert self.log is not None
        start = data.draw(st.sampled_from(sorted(self.regions)))
        size, _ = self.regions[start]
        if self.broken:
            with pytest.raises(DirtyLogBroken):
                self.memory.take_dirty(start * PAGE, size * PAGE, written_on=written_on)
            return
        pages = set(range(start, start + size))
        runs = self.memory.take_dirty(start * PAGE, size * PAGE, written_on=written_on)
        assert {page for at, length in runs for page in range(at // PAGE, (at + length) // PAGE)} == self.log & pages
        self.log -= pages
        if written_on:
            for _, lent in self.grants:
                self.log |= self._live(lent) & pages

    @invariant()
    def agrees(self) -> None:
        assert self.memory.mapped() == [
            (start * PAGE, size * PAGE, writable) for start, (size, writable) in sorted(self.regions.items())
        ]
        log = self.memory.log
        assert (log is None) == (self.log is None)
        if log is not None and not self.broken:
            assert log.broken is None
            assert log.pages == self.log and len(log.pages) == len(self.log or ())
            assert all(page in self.serial for page in log.pages), "a page that nobody can copy"
        elif log is not None:
            assert log.broken is not None

    @invariant()
    def keeps_only_what_is_open(self) -> None:
        open_windows = {id(window) for window, pages in self.windows if self._live(pages) == set(pages)}
        assert {id(window) for region in self.memory._regions for window in region.windows} == open_windows


TestMemoryAgainstAModel = MemoryModel.TestCase
TestMemoryAgainstAModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
