"""Guest memory: windows, grants, revocation, the dirty log."""

import pytest

from vmbus.errors import UsageError
from vmbus.memory import DirtyLogBroken, GuestMemory, MemoryFault, MemoryRevoked

pytestmark = pytest.mark.unit

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


def test_overlaps_are_refused_and_identical_maps_replace(memory: GuestMemory) -> None:
    with pytest.raises(MemoryFault, match="overlaps"):
        memory.map(0x11000, memoryview(bytearray(PAGE)), True)
    fresh = bytearray(b"n" * 4 * PAGE)
    memory.map(0x10000, memoryview(fresh), True)
    assert memory.read(0x10000, 2) == b"nn"


def test_a_scattered_window_is_one_memory(memory: GuestMemory) -> None:
    window = memory.window([(0x12000, PAGE), (0x10000, PAGE), (0x13000, 2 * PAGE)])
    assert window.size == 4 * PAGE
    data = bytes(range(256)) * 64
    window.write(0, data)
    assert window.read(0, 4 * PAGE) == data
    assert memory.read(0x10000, PAGE) == data[PAGE : 2 * PAGE]
    window.store32(2 * PAGE - 4, 0xAABBCCDD)
    assert window.load32(2 * PAGE - 4) == 0xAABBCCDD
    assert memory.read(0x10FFC, 4) == b"\xdd\xcc\xbb\xaa"


def test_unaligned_windows_are_refused(memory: GuestMemory) -> None:
    with pytest.raises(MemoryFault, match="aligned"):
        memory.window([(0x10004, 8)])


def test_unmapping_revokes_windows_and_tells_their_owner(memory: GuestMemory) -> None:
    told = []
    linear = memory.window([(0x10000, PAGE)])
    scattered = memory.window([(0x13000, 2 * PAGE)])
    for window in (linear, scattered):
        window.on_revoke = lambda window=window: told.append(window)
    memory.unmap(0x14000, 2 * PAGE)
    assert told == [scattered]
    for access in (
        lambda: scattered.read(PAGE, 8),
        lambda: scattered.write(0, b"x"),
        lambda: scattered.load32(0),
        lambda: scattered.store32(0, 1),
    ):
        with pytest.raises(MemoryRevoked):
            access()
    assert linear.read(0, 4) == bytes(4)


def test_a_closed_window_tells_nobody(memory: GuestMemory) -> None:
    window = memory.window([(0x10000, PAGE)])
    window.on_revoke = lambda: pytest.fail("told of a window that it closed itself")
    window.close()
    memory.unmap(0x10000, 4 * PAGE)
    with pytest.raises(MemoryRevoked):
        window.read(0, 1)


# ---- the dirty log ---------------------------------------------------------------------------------------------------


def test_everything_written_is_in_the_log(memory: GuestMemory) -> None:
    window = memory.window([(0x10000, 2 * PAGE)])
    memory.write(0x13000, b"before the log")
    memory.start_log()
    window.write(PAGE - 1, b"xy")
    memory.write(0x14008, b"z")
    assert memory.dirty_runs() == [(0x10000, 2 * PAGE), (0x14000, PAGE)]
    window.store32(8, 1)
    memory.stop_log()
    assert memory.log is None


def test_runs_are_split_at_the_limit(memory: GuestMemory) -> None:
    memory.start_log()
    memory.write(0x10000, bytes(4 * PAGE))
    assert memory.dirty_runs(max_bytes=3 * PAGE) == [(0x10000, 3 * PAGE), (0x13000, PAGE)]


def test_memory_granted_for_writing_counts_as_written(memory: GuestMemory) -> None:
    early = memory.grant([(0x10000, 10)], writable=True)
    done = memory.grant([(0x11000, 10)], writable=True)
    done.release()
    memory.start_log()
    late = memory.grant([(0x12FFF, 2)], writable=True)
    memory.grant([(0x14000, 10)], writable=False)
    assert memory.dirty_runs() == [(0x10000, PAGE), (0x12000, 2 * PAGE)]
    early.release()
    late.release()
    assert memory.dirty_runs() == [(0x10000, PAGE), (0x12000, 2 * PAGE)]


def test_unmapping_a_dirty_page_breaks_the_log(memory: GuestMemory) -> None:
    memory.start_log()
    memory.write(0x10000, b"x")
    memory.unmap(0x14000, 2 * PAGE)
    assert memory.dirty_runs() == [(0x10000, PAGE)]
    memory.unmap(0x10000, 4 * PAGE)
    with pytest.raises(DirtyLogBroken, match="unmapped 0x10000"):
        memory.dirty_runs()


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
    memory.unmap(0x20000, 0x8000)
    with pytest.raises(DirtyLogBroken, match="unmapped"):
        memory.take_dirty(0x10000, 0x8000, written_on=True)
