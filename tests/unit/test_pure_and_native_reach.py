"""Moves between a file and the memory of a packet that go past grants: what they reach, and what they must not."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmbus.errors import PeerError
from vmbus.memory.guest import GuestMemory
from vmbus.memory.reach import MOST_IN_REACH, Reach
from vmbus.native.choice import core
from vmbus.wire.packet import parse_gpa_direct

pytestmark = [pytest.mark.unit, pytest.mark.skipif(core is None, reason="without the native core there is no reach")]

PAGE = 4096
# (first page, pages, writable): two that touch each other, a gap, one that is read-only, one far away
REGIONS = [(16, 4, True), (20, 3, True), (40, 2, False), (1 << 40, 4, True)]
PAGES = [page + n for page, count, _ in REGIONS for n in range(count)]


def memory_of(fill: int) -> GuestMemory:
    memory = GuestMemory()
    for number, (page, count, writable) in enumerate(REGIONS):
        memory.map(page * PAGE, memoryview(bytearray([fill + number]) * (count * PAGE)), writable)
    return memory


def content(memory: GuestMemory) -> list[bytes]:
    return [memory.read(page * PAGE, count * PAGE) for page, count, _ in REGIONS]


def body(offset: int, length: int, pages: list[int], ranges: int = 1) -> bytes:
    return struct.pack(f"<IIII{len(pages)}Q", 0, ranges, length, offset, *pages)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(16 * PAGE))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def reach_of(memory: GuestMemory) -> Reach:
    reach = memory.reach
    assert reach is not None
    return reach


def long_way(memory: GuestMemory, described: bytes, length: int, fd: int, offset: int, *, write: bool) -> int | None:
    """The same with a grant; None where there is none of this length, or not of one range."""
    try:
        ranges = parse_gpa_direct(described, max_bytes=1 << 20)
        if len(ranges) != 1 or ranges[0].byte_count != length:
            return None
        grant = memory.grant(ranges[0].extents(), writable=not write)
    except PeerError:
        return None
    moved = os.pwritev(fd, grant.views, offset) if write else os.preadv(fd, grant.views, offset)
    grant.release()
    return moved


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(
    offset=st.integers(0, PAGE + 1),
    length=st.integers(0, 5 * PAGE) | st.sampled_from([PAGE, 2 * PAGE, 4 * PAGE]),
    wrong=st.sampled_from([0, 0, 0, 1, -1]),
    pages=st.lists(st.sampled_from(PAGES) | st.sampled_from([0, 15, 39, 42, (1 << 52) - 1, 1 << 52]), max_size=7),
    ranges=st.sampled_from([1, 1, 1, 0, 2]),
    cut=st.sampled_from([0, 0, 0, 1, 8]),
    write=st.booleans(),
)
def test_it_moves_what_the_long_way_would_or_nothing(
    fd: int, offset: int, length: int, wrong: int, pages: list[int], ranges: int, cut: int, write: bool
) -> None:
    described = body(offset, max(length + wrong, 0), pages, ranges)
    described = described[: len(described) - cut]
    ours, theirs = memory_of(1), memory_of(1)
    before = os.pread(fd, 1 << 20, 0)
    there = len(before)
    moved = reach_of(ours).move(described, length, fd, PAGE, write, 0)
    mine = os.pread(fd, 1 << 20, 0)
    os.ftruncate(fd, there)
    os.pwrite(fd, before, 0)
    expected = long_way(theirs, described, length, fd, PAGE, write=write)
    if moved is None:
        assert content(ours) == content(memory_of(1)) and mine == before
        # It gives up at once only where something is wrong, or a page is in no region as a whole.
        assert expected is None
    else:
        assert moved == expected and content(ours) == content(theirs) and mine == os.pread(fd, 1 << 20, 0)
    os.ftruncate(fd, there)
    os.pwrite(fd, before, 0)


def test_neighbours_become_one_piece_and_errors_are_told(fd: int) -> None:
    memory = memory_of(0)
    # The end of one region and the start of the next: two pieces of our address space, one of the guest's.
    assert reach_of(memory).move(body(0, 4 * PAGE, [18, 19, 20, 21]), 4 * PAGE, fd, 0, False, 0) == 4 * PAGE
    assert memory.read(18 * PAGE, 4 * PAGE) == os.pread(fd, 4 * PAGE, 0)
    assert reach_of(memory).move(body(0, PAGE, [16]), PAGE, -1, 0, False, 0) == -9
    assert reach_of(memory).move(body(0, PAGE, [16]), PAGE, fd, 1 << 30, False, 0) == 0


def test_read_only_memory_can_be_written_from_and_not_read_into(fd: int) -> None:
    memory = memory_of(7)
    before = content(memory)
    assert reach_of(memory).move(body(0, PAGE, [40]), PAGE, fd, 0, False, 0) is None
    assert reach_of(memory).move(body(0, 2 * PAGE, [20, 40]), 2 * PAGE, fd, 0, False, 0) is None
    assert content(memory) == before
    assert reach_of(memory).move(body(0, PAGE, [40]), PAGE, fd, 0, True, 0) == PAGE
    assert os.pread(fd, PAGE, 0) == memory.read(40 * PAGE, PAGE)


def test_a_region_that_ends_inside_of_a_page(fd: int) -> None:
    memory = GuestMemory()
    memory.map(16 * PAGE, memoryview(bytearray(1000)), True)
    assert reach_of(memory).move(body(0, PAGE, [16]), PAGE, fd, 0, False, 0) is None
    assert reach_of(memory).move(body(500, 501, [16]), 501, fd, 0, False, 0) is None
    assert reach_of(memory).move(body(500, 500, [16]), 500, fd, 0, False, 0) == 500
    assert memory.read(16 * PAGE, 1000) == bytes(500) + os.pread(fd, 500, 0)


def test_what_is_taken_back_is_out_of_reach_at_once(fd: int) -> None:
    memory = memory_of(0)
    reach = reach_of(memory)
    assert reach.move(body(0, PAGE, [16]), PAGE, fd, 0, False, 0) == PAGE
    memory.unmap(16 * PAGE, 4 * PAGE)
    for page in PAGES:
        assert reach.move(body(0, PAGE, [page]), PAGE, fd, 0, False, 0) is None
    assert reach_of(memory).move(body(0, PAGE, [16]), PAGE, fd, 0, False, 0) is None
    assert reach_of(memory).move(body(0, PAGE, [20]), PAGE, fd, 0, False, 0) == PAGE
    memory.map(16 * PAGE, memoryview(bytearray(PAGE)), True)
    assert reach_of(memory).move(body(0, PAGE, [16]), PAGE, fd, 0, False, 0) == PAGE


def test_nothing_goes_past_a_dirty_log() -> None:
    memory = memory_of(0)
    assert memory.reach is not None
    memory.start_log()
    assert memory.reach is None, "whoever writes has to tell the log"
    memory.stop_log()
    assert memory.reach is not None


def test_a_guest_with_many_regions_has_no_reach() -> None:
    memory = GuestMemory()
    for number in range(MOST_IN_REACH):
        memory.map(2 * number * PAGE, memoryview(bytearray(PAGE)), True)
    assert memory.reach is not None
    memory.map(1 << 40, memoryview(bytearray(PAGE)), True)
    assert memory.reach is None
    with pytest.raises(ValueError, match="at most"):
        core.Reach([(0, memoryview(b""))] * (MOST_IN_REACH + 1))
    with pytest.raises(TypeError):
        core.Reach([(0, 1)])
