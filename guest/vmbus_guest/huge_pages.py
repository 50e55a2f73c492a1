"""Memory in 2 MiB huge pages, and such of it whose physical addresses are known.

A device without an IOMMU in front of it is told physical addresses, so its memory must not move while it knows them:
huge pages are neither swapped nor migrated. Each is a file of its own that stays when its user goes. A process may be
killed while the device still writes for it; the page then still belongs to the pool, and not to somebody else's program
or file, and its next user takes longer to start than the kernel needs to close the dead one's channel.
"""

# os instead of pathlib: imports are slow in an emulated guest.
# ruff: noqa: PTH102

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterator

from vmbus.errors import EnvironmentProblem, UsageError
from vmbus_guest.kernel_files import read_text, write_text
from vmbus_guest.pci import PAGE_SIZE, DmaBuffer

HUGE_PAGE = 2 << 20
"""Bytes of one huge page."""

MAXIMUM_PHYSICAL_PAGES = 12
"""Huge pages of the pool."""

DIRECTORY = "/dev/hugepages"

# mmap(2): not in Python's module. The page size is encoded as log2 << 26.
MAP_HUGETLB = 0x40000
MAP_HUGE_2MB = 21 << 26

_COUNT = "/proc/sys/vm/nr_hugepages"
_PRESENT = 1 << 63
_FRAME = (1 << 55) - 1


class Extents:
    """First-fit allocator of page-granular extents in a stretch of `size` bytes; neighbours merge when freed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[tuple[int, int]] = [(0, size)] if size else []  # (start, length), ascending, never adjacent

    @property
    def free_bytes(self) -> int:
        return sum(length for _, length in self._free)

    @property
    def largest(self) -> int:
        """Bytes of the largest allocation that would succeed now."""
        return max((length for _, length in self._free), default=0)

    def is_free(self, start: int, length: int) -> bool:
        return any(first <= start and start + length <= first + size for first, size in self._free)

    def take(self, length: int) -> int | None:
        """Return the lowest start of `length` free bytes, now taken, or None."""
        for index, (start, available) in enumerate(self._free):
            if available >= length:
                if available == length:
                    del self._free[index]
                else:
                    self._free[index] = (start + length, available - length)
                return start
        return None

    def give(self, start: int, length: int) -> None:
        """Take back what `take` gave out, or a part of it. Raises `UsageError` if any of it is free already."""
        if length <= 0 or start < 0 or start + length > self.size:
            raise UsageError(f"extent {start:#x}+{length:#x} is outside of the {self.size:#x} bytes managed here")
        index = 0
        while index < len(self._free) and self._free[index][0] < start:
            index += 1
        before = self._free[index - 1] if index > 0 else None
        after = self._free[index] if index < len(self._free) else None
        if (before and before[0] + before[1] > start) or (after and start + length > after[0]):
            raise UsageError(f"extent {start:#x}+{length:#x} was freed twice")
        if after and start + length == after[0]:
            length += after[1]
            del self._free[index]
        if before and before[0] + before[1] == start:
            self._free[index - 1] = (before[0], before[1] + length)
        else:
            self._free.insert(index, (start, length))


class Buffer:
    """A `DmaBuffer`."""

    __slots__ = ("iova", "size", "view")

    def __init__(self, iova: int, size: int, view: memoryview) -> None:
        self.iova = iova
        self.size = size
        self.view = view

    def __repr__(self) -> str:
        return f"<Buffer iova={self.iova:#x} size={self.size:#x}>"


def all_huge_pages() -> int:
    """How many 2 MiB pages the kernel has set aside, whoever has them. 0 without."""
    try:
        return int(read_text(_COUNT) or 0)
    except ValueError:
        return 0


def free_huge_pages() -> int:
    """Return the number of 2 MiB huge pages that a new mapping could have."""
    root = "/sys/kernel/mm/hugepages/hugepages-2048kB"
    return int(read_text(f"{root}/free_hugepages") or 0) - int(read_text(f"{root}/resv_hugepages") or 0)


def physical_address(virtual: int, pagemap: str = "/proc/self/pagemap") -> int:
    """Where this process' memory at `virtual` is. Raises EnvironmentProblem if that cannot be known."""
    descriptor = os.open(pagemap, os.O_RDONLY | os.O_CLOEXEC)
    try:
        entry = os.pread(descriptor, 8, virtual // PAGE_SIZE * 8)
    finally:
        os.close(descriptor)
    (word,) = struct.unpack("<Q", entry) if len(entry) == 8 else (0,)
    if not word & _PRESENT or not word & _FRAME:
        raise EnvironmentProblem("the kernel does not tell physical addresses: that needs root")
    return int((word & _FRAME) * PAGE_SIZE + virtual % PAGE_SIZE)


class _Page:
    """A huge page of the pool that this process has. `iova`: its physical address."""

    def __init__(self, file: int, physical: Callable[[int], int]) -> None:
        self._file = file
        self._memory = _mapped(file)
        self.view = memoryview(self._memory)
        self.view[0:1] = bytes(1)  # so that it is there
        self.iova = physical(ctypes.addressof(ctypes.c_char.from_buffer(self._memory)))
        self.extents = Extents(HUGE_PAGE)

    def close(self) -> None:
        """Let it go, unless someone still holds a view of a buffer: then it goes with that view."""
        with contextlib.suppress(BufferError):
            self.view.release()
            self._memory.close()
        os.close(self._file)


class PhysicalMemory:
    """Buffers in the pool's pages: `iova` is the physical address. Up to 2 MiB each, contiguous for both sides."""

    def __init__(self, directory: str = DIRECTORY, physical: Callable[[int], int] = physical_address) -> None:
        self._directory = directory
        self._physical = physical
        self._pages: list[_Page] = []

    def allocate(self, size: int) -> Buffer:
        """Return `size` bytes (rounded up to whole pages) of zeroed memory.

        Raises `UsageError` for a size that is not positive, `EnvironmentProblem` for one beyond 2 MiB, and without
        huge pages.
        """
        if size <= 0:
            raise UsageError(f"cannot allocate {size} bytes of DMA memory")
        size = -(-size // PAGE_SIZE) * PAGE_SIZE
        if size > HUGE_PAGE:
            raise EnvironmentProblem(f"{size} bytes are not contiguous for a device without an IOMMU; {HUGE_PAGE} are")
        for page in self._all_pages():
            start = page.extents.take(size)
            if start is not None:
                view = page.view[start : start + size]
                view[:] = bytes(size)
                return Buffer(page.iova + start, size, view)
        raise EnvironmentProblem(f"all {MAXIMUM_PHYSICAL_PAGES} huge pages in {self._directory} are in use")

    def free(self, buffer: DmaBuffer) -> None:
        """Give a buffer of `allocate` back. Raises `UsageError` if it is not one, or was freed before."""
        for page in self._pages:
            if page.iova <= buffer.iova < page.iova + HUGE_PAGE:
                page.extents.give(buffer.iova - page.iova, buffer.size)
                return
        raise UsageError(f"memory at {buffer.iova:#x} is not of this pool")

    def close(self) -> None:
        """Let all of it go."""
        for page in self._pages:
            page.close()
        self._pages.clear()

    def _all_pages(self) -> Iterator[_Page]:
        """Those that we have, then, one after the other, more."""
        yield from list(self._pages)
        if not self._pages:
            _mount(self._directory)
        for number in range(MAXIMUM_PHYSICAL_PAGES):
            path = f"{self._directory}/vmbus-{number}"
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                # Our own, too: a lock belongs to the open file, not to the process.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(file, HUGE_PAGE)
                page = _Page(file, self._physical)
            except BlockingIOError:
                os.close(file)
                continue
            except BaseException:
                os.close(file)
                raise
            self._pages.append(page)
            yield page


def _mapped(file: int) -> mmap.mmap:
    for attempt in range(2):
        try:
            return mmap.mmap(file, HUGE_PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            if not attempt:
                write_text(_COUNT, str(int(read_text(_COUNT) or 0) + 1))
    raise EnvironmentProblem(
        "no 2 MiB huge page is free, and the kernel finds no memory for another; give it 'hugepages=4' at its start"
    )


def _mount(directory: str) -> None:
    """Have huge pages as files, where nobody has seen to that. A test's own directory is left alone."""
    if directory != DIRECTORY or os.path.ismount(directory):
        return
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o755)
    words = ["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "hugetlbfs", directory]
    _, status = os.waitpid(os.posix_spawnp(words[0], words, dict(os.environ)), 0)
    if status:
        raise EnvironmentProblem(f"no file system of huge pages could be mounted on {directory}: status {status}")
