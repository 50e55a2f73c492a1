"""Views of guest memory survive the guest's taking it back."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.transport.mapping import PAGE_SIZE, GuestMapping

SIZE = 4 * PAGE_SIZE


class Memory:
    """A memfd and the library's mapping of it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("test", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, SIZE)
        self.first = mmap.mmap(self.fd, SIZE)

    @property
    def address(self) -> int:
        import ctypes

        array = (ctypes.c_ubyte * SIZE).from_buffer(self.first)
        return ctypes.addressof(array)

    def content(self, offset: int, size: int) -> bytes:
        return os.pread(self.fd, size, offset)


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    os.close(memory.fd)


def test_shares_the_pages(memory: Memory) -> None:
    mapping = GuestMapping(memory.address, SIZE, writable=True)
    assert (mapping.view.format, len(mapping.view), mapping.view.readonly) == ("B", SIZE, False)
    mapping.view[PAGE_SIZE : PAGE_SIZE + 3] = b"abc"
    assert memory.content(PAGE_SIZE, 3) == b"abc"
    os.pwrite(memory.fd, b"xyz", 5)
    assert bytes(mapping.view[5:8]) == b"xyz"
    assert mapping.view[:8].cast("I")[1] == int.from_bytes(b"\0xyz", "little")


def test_survives_the_unmapping_of_the_first_mapping(memory: Memory) -> None:
    mapping = GuestMapping(memory.address, SIZE, writable=True)
    gc.collect()
    memory.first.close()
    mapping.view[0] = 7
    assert memory.content(0, 1) == b"\x07"


def test_stale_views_reach_nothing_after_revoke(memory: Memory) -> None:
    mapping = GuestMapping(memory.address, SIZE, writable=True)
    stale = mapping.view[PAGE_SIZE - 2 : PAGE_SIZE + 2]
    stale[:] = b"live"
    words = mapping.view.cast("I")
    mapping.revoke()
    mapping.revoke()
    assert mapping.revoked
    stale[:] = b"dead"
    words[0] = 0xFFFFFFFF
    assert bytes(stale) == b"dead"
    assert memory.content(PAGE_SIZE - 2, 4) == b"live"
    assert memory.content(0, 4) == bytes(4)
    os.pwrite(memory.fd, b"secret", 3 * PAGE_SIZE)
    assert words[3 * PAGE_SIZE // 4] == 0
    with pytest.raises(UsageError, match="taken it back"):
        _ = mapping.view


def test_read_only(memory: Memory) -> None:
    os.pwrite(memory.fd, b"xyz", 0)
    mapping = GuestMapping(memory.address, SIZE, writable=False)
    assert mapping.view.readonly
    with pytest.raises(TypeError):
        mapping.view[0] = 1
    assert bytes(mapping.view[:3]) == b"xyz"
    stale = mapping.view[:3]
    mapping.revoke()
    assert bytes(stale) == bytes(3)


def test_read_only_is_enforced_by_the_processor(memory: Memory) -> None:
    # In a process of its own: it must die of a write round the read-only view.
    code = f"""
import ctypes, mmap, os
from vmbus.transport.mapping import GuestMapping
fd = os.memfd_create("test"); os.ftruncate(fd, {SIZE}); first = mmap.mmap(fd, {SIZE})
mapping = GuestMapping(ctypes.addressof((ctypes.c_ubyte * {SIZE}).from_buffer(first)), {SIZE}, writable=False)
print("mapped", flush=True)
ctypes.memset(mapping._duplicate, 1, 1)
print("written", flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout == "mapped\n", done.stderr
    assert done.returncode == -11


def test_released_with_the_last_view(memory: Memory) -> None:
    def mapped(address: int) -> bool:
        with open("/proc/self/maps") as maps:  # noqa: PTH123 (procfs)
            ranges = [line.split()[0].split("-") for line in maps]
        return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)

    mapping = GuestMapping(memory.address, SIZE, writable=True)
    address = mapping._duplicate
    view = mapping.view[10:20].cast("B")
    mapping.revoke()
    gc.collect()
    assert mapped(address) and not mapping.released
    assert bytes(view) == bytes(10)
    del view
    gc.collect()
    assert mapping.released
    assert not mapped(address)


def test_unaligned_start(memory: Memory) -> None:
    mapping = GuestMapping(memory.address + 100, 200, writable=True)
    mapping.view[:3] = b"abc"
    assert memory.content(100, 3) == b"abc"
    assert len(mapping.view) == 200
    stale = mapping.view
    mapping.revoke()
    stale[:3] = b"xyz"
    assert memory.content(100, 3) == b"abc"


def test_memory_that_is_not_shared_is_refused() -> None:
    import ctypes

    private = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = (ctypes.c_ubyte * SIZE).from_buffer(private)
    with pytest.raises(EnvironmentProblem, match="share=on"):
        GuestMapping(ctypes.addressof(array), SIZE, writable=True)


def test_memory_beyond_the_end_of_its_file_is_refused(memory: Memory) -> None:
    address = memory.address
    os.ftruncate(memory.fd, SIZE - PAGE_SIZE)
    with pytest.raises(EnvironmentProblem, match="longer than the file"):
        GuestMapping(address, SIZE, writable=True)
    GuestMapping(address, SIZE - PAGE_SIZE, writable=True)


def test_size_zero_is_refused(memory: Memory) -> None:
    with pytest.raises(UsageError):
        GuestMapping(memory.address, 0, writable=True)
