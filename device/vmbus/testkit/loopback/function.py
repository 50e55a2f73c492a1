"""The PCI function as a guest driver sees it, reached over vfio-user from the host itself.

Guest memory is one memfd. It is offered to the server in pieces of `map_size` bytes as it is used (2 MiB by default:
the 2022 libvfio-user takes only 16 pieces), at I/O addresses above 4 GiB.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vmbus.device import pci
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.testkit.loopback.client import Disconnected, VfioUserClient
from vmbus.transport import bindings
from vmbus.transport.mapping import _MAP_ANONYMOUS, _MAP_FIXED, _MAP_PRIVATE, _libc

PAGE_SIZE = 4096
_U32 = struct.Struct("<I")
_MSI_ADDRESS = 0xFEE0_0000
_MSI_DATA = 0x4021

_MAP_SHARED = 0x01
_PROT_READ_WRITE = 0x3


class Addressed(Protocol):
    """What names a buffer."""

    @property
    def iova(self) -> int:
        """I/O address of the first byte."""

    @property
    def size(self) -> int:
        """Bytes."""


@dataclass(eq=False)
class LoopbackBuffer:
    """Guest memory that the device can reach: `size` bytes at I/O address `iova`, seen by the guest as `view`."""

    iova: int
    size: int
    view: memoryview
    file_pages: tuple[int, ...]
    """Which pages of the guest's memory these are."""


class LoopbackFunction:
    """A set-up function: memory decoding, bus mastering and one MSI are on.

    ram_size: guest memory in bytes. map_size: bytes in each piece offered to the server. posted_writes: register
    writes do not wait for the server, as with QEMU. serve_dma: answer the server's DMA messages on a thread.
    Raises EnvironmentProblem if nobody listens or the function is not ours.
    """

    def __init__(
        self,
        socket_path: Path,
        *,
        ram_size: int = 32 << 20,
        map_size: int = 2 << 20,
        iova_base: int = 0x1_0000_0000,
        timeout: float = 10.0,
        posted_writes: bool = True,
        serve_dma: bool = True,
        bar0_address: int = 0xFE00_0000,
    ) -> None:
        if ram_size % map_size or map_size % PAGE_SIZE or iova_base % PAGE_SIZE:
            raise UsageError(f"guest memory of {ram_size} bytes in pieces of {map_size} at {iova_base:#x}: not aligned")
        self._map_size = map_size
        self._iova_base = iova_base
        self._posted_writes = posted_writes
        self._pages = ram_size // PAGE_SIZE
        self._used = bytearray(self._pages)  # 1 for each page in a buffer
        self._buffers: dict[int, LoopbackBuffer] = {}  # by I/O address
        self._maps: dict[int, int] = {}  # what is offered now: I/O address to size
        self._offsets: dict[int, tuple[int, bool]] = {}  # the same: I/O address to (file offset, writable)
        self._timeout = timeout
        self._serve_dma = serve_dma
        self._next_window = iova_base + ram_size  # I/O addresses of buffers made of scattered pages
        self._closed = False
        self._other_memory: dict[int, int] = {}  # of connections that the guest may move to, by their descriptors
        self._cleanup = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self.memory_fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC)
            stack.callback(os.close, self.memory_fd)
            os.ftruncate(self.memory_fd, ram_size)
            self._ram = memoryview(mmap.mmap(self.memory_fd, ram_size))
            self.interrupt_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.callback(os.close, self.interrupt_fd)
            self.client = stack.enter_context(VfioUserClient(socket_path, timeout=timeout))
            if serve_dma:
                stack.enter_context(self.client.serving())
            self._set_up(bar0_address)
            self._cleanup = stack.pop_all()

    def _set_up(self, bar0_address: int) -> None:
        """What firmware, the guest's kernel and its driver do."""
        vendor, device = struct.unpack("<HH", self.config_read(0, 4))
        if (vendor, device) != (pci.VENDOR_ID, pci.DEVICE_ID):
            raise EnvironmentProblem(f"the function is {vendor:04x}:{device:04x}, not ours")
        self.config_write(pci.BAR0, _U32.pack(0xFFFF_FFFF))
        (mask,) = _U32.unpack(self.config_read(pci.BAR0, 4))
        if -(mask & ~0xF) & 0xFFFF_FFFF != pci.BAR0_SIZE:
            raise EnvironmentProblem(f"BAR0 answers {mask:#010x} when sized: not {pci.BAR0_SIZE} bytes")
        self.config_write(pci.BAR0, _U32.pack(bar0_address))
        self.config_write(pci.MSI_ADDRESS_LOW, _U32.pack(_MSI_ADDRESS))
        self.config_write(pci.MSI_ADDRESS_HIGH, _U32.pack(0))
        self.config_write(pci.MSI_DATA, struct.pack("<H", _MSI_DATA))
        self.client.set_eventfds(bindings.IRQ_MSI, [self.interrupt_fd])
        (control,) = struct.unpack("<H", self.config_read(pci.MSI_CONTROL, 2))
        self.config_write(pci.MSI_CONTROL, struct.pack("<H", control | pci.MSI_ENABLE))
        command = pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER | pci.COMMAND_INTX_DISABLE
        self.config_write(pci.COMMAND, struct.pack("<H", command))

    # -- the driver's interface -----------------------------------------------------------------------------------

    def read32(self, offset: int) -> int:
        """A register of BAR0. Raises RemoteError if the device refuses."""
        (value,) = _U32.unpack(self.client.region_read(bindings.REGION_BAR0, offset, 4))
        return int(value)

    def write32(self, offset: int, value: int) -> None:
        """Write a register of BAR0."""
        self.client.region_write(bindings.REGION_BAR0, offset, _U32.pack(value), posted=self._posted_writes)

    def allocate(self, size: int) -> LoopbackBuffer:
        """`size` bytes (rounded up to whole pages), zeroed, in one piece of I/O address space.

        Raises UsageError if size is not above 0, EnvironmentProblem if guest memory is used up.
        """
        size = -(-size // PAGE_SIZE) * PAGE_SIZE
        first = self._take(size)
        pages = range(first, first + size // PAGE_SIZE)
        start = first * PAGE_SIZE
        self._offer(start, size)
        view = self._ram[start : start + size]
        view[:] = bytes(size)
        return self._keep(LoopbackBuffer(self._iova_base + start, size, view, tuple(pages)))

    def free(self, buffer: Addressed) -> None:
        """Give the buffer's pages back for reuse; the server can still reach them, as with a guest's huge pages.

        Raises UsageError if there is no such buffer.
        """
        ours = self._buffers.pop(buffer.iova, None)
        if ours is None:
            raise UsageError(f"there is no DMA buffer at I/O address {buffer.iova:#x}: freed twice?")
        for page in ours.file_pages:
            self._used[page] = 0

    def trim(self) -> int:
        """Take back the pieces in which nothing is allocated; returns how many."""
        idle = [
            (iova, size)
            for iova, size in self._maps.items()
            if not any(self._used[self._offsets[iova][0] // PAGE_SIZE :][: size // PAGE_SIZE])
        ]
        for iova, size in idle:
            self.unmap(iova, size)
        return len(idle)

    def wait_interrupt(self, timeout: float) -> bool:
        """Whether the interrupt fired (before, or within `timeout` s); takes all firings so far."""
        poll = select.poll()
        poll.register(self.interrupt_fd, select.POLLIN)
        if not poll.poll(timeout * 1000):
            return False
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.interrupt_fd)
        return True

    def close(self) -> None:
        """Hang up, as QEMU does when it ends. Buffers' views stay usable. Repeating it does nothing."""
        if not self._closed:
            self._closed = True
            self._cleanup.close()

    def __enter__(self) -> LoopbackFunction:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what tests do besides ------------------------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> bytes:
        """Configuration space."""
        return self.client.region_read(bindings.REGION_CONFIG, offset, size)

    def config_write(self, offset: int, data: bytes) -> None:
        """Configuration space."""
        self.client.region_write(bindings.REGION_CONFIG, offset, data)

    def barrier(self) -> None:
        """Return when the server has handled all posted writes so far."""
        self.config_read(0, 4)

    def allocate_permuted(self, order: Sequence[int]) -> LoopbackBuffer:
        """A buffer of len(order) pages whose page i is page order[i] of a run of guest memory.

        `order` is a permutation of range(len(order)). The server gets one piece for each run of pages that follow
        each other in guest memory too.
        """
        if sorted(order) != list(range(len(order))):
            raise UsageError("not a permutation of pages")
        first = self._take(len(order) * PAGE_SIZE)
        pages = tuple(first + index for index in order)
        size = len(pages) * PAGE_SIZE
        iova = self._next_window
        self._next_window += size + PAGE_SIZE  # a gap, so that running over the end is noticed
        start = 0
        for index in range(1, len(pages) + 1):
            if index == len(pages) or pages[index] != pages[index - 1] + 1:
                self.map(iova + start * PAGE_SIZE, (index - start) * PAGE_SIZE, pages[start] * PAGE_SIZE)
                start = index
        view = _scattered_view(self.memory_fd, pages)
        view[:] = bytes(size)
        return self._keep(LoopbackBuffer(iova, size, view, pages))

    def map(self, iova: int, size: int, file_offset: int, *, writable: bool = True) -> None:
        """Offer a piece of guest memory to the server."""
        self.client.dma_map(iova, size, self.memory_fd, file_offset, writable=writable)
        self._maps[iova] = size
        self._offsets[iova] = (file_offset, writable)

    def unmap(self, iova: int, size: int) -> None:
        """Take a piece back, at any moment; exactly as it was offered."""
        self.client.dma_unmap(iova, size)
        self._maps.pop(iova, None)

    def unmap_buffer(self, buffer: Addressed) -> None:
        """Take back every piece that has a page of `buffer`: the server loses it (and what shares a piece with it)."""
        for iova, size in list(self._maps.items()):
            if iova < buffer.iova + buffer.size and buffer.iova < iova + size:
                self.unmap(iova, size)

    def unmap_all(self) -> None:
        """Take everything back, piece by piece, as a VFIO container that is closed does."""
        for iova, size in list(self._maps.items()):
            self.unmap(iova, size)

    @property
    def maps(self) -> dict[int, int]:
        """What is offered now: I/O address to size in bytes."""
        return dict(self._maps)

    def reconnect(self, socket_path: Path, config: bytes | None) -> None:
        """Go on with another server, as a restored QEMU does: a reset, the same guest memory, and, unless `config` is
        None, the PCI function put back from its saved configuration space."""
        with contextlib.suppress(Disconnected):
            self.client.close()
        self.client = self._cleanup.enter_context(VfioUserClient(socket_path, timeout=self._timeout))
        if self._serve_dma:
            self._cleanup.enter_context(self.client.serving())
        for iova, size in self._maps.items():
            offset, writable = self._offsets[iova]
            self.client.dma_map(iova, size, self.memory_fd, offset, writable=writable)
        self.client.reset()
        if config is not None:
            self.replay(config)

    def reset(self) -> None:
        """A reset of the function, as at the start of QEMU's snapshot-load."""
        self.client.reset()

    def replay(self, config: bytes) -> None:
        """Put the PCI function back from its saved configuration space."""
        self.client.set_eventfds(bindings.IRQ_MSI, [self.interrupt_fd])
        for offset, size, value in pci.replay_writes(config):
            self.config_write(offset, value.to_bytes(size, "little"))

    # -- another VMM's memory -------------------------------------------------------------------------------------

    @property
    def ram(self) -> memoryview:
        """All of guest memory."""
        return self._ram

    def place_of(self, iova: int) -> int:
        """Where in guest memory the byte at an I/O address is. Raises UsageError if it is not offered."""
        for start, size in self._maps.items():
            if start <= iova < start + size:
                return self._offsets[start][0] + iova - start
        raise UsageError(f"no memory is offered at I/O address {iova:#x}")

    def another_client(self, socket_path: Path, content: bytes) -> VfioUserClient:
        """Connect to another server, with guest memory of its own that has this content, and the same interrupt.

        Nothing changes for the guest until `move_to`.
        """
        memory_fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC)
        self._cleanup.callback(os.close, memory_fd)
        _fill(memory_fd, content)
        client = VfioUserClient(socket_path, timeout=self._timeout)
        try:
            for iova, size in self._maps.items():
                offset, writable = self._offsets[iova]
                client.dma_map(iova, size, memory_fd, offset, writable=writable)
            client.set_eventfds(bindings.IRQ_MSI, [self.interrupt_fd])
        except BaseException:
            client.close()
            raise
        self._other_memory[client.fileno()] = memory_fd
        return client

    def move_to(self, client: VfioUserClient) -> None:
        """The guest goes on with what `another_client` gave: its memory takes the place of the present one, under
        every view of it, and the present connection is closed.

        Raises UsageError if there are buffers of scattered pages.
        """
        if any(buffer.iova >= self._iova_base + self._pages * PAGE_SIZE for buffer in self._buffers.values()):
            raise UsageError("a guest with buffers of scattered pages cannot be moved")
        memory_fd = self._other_memory.pop(client.fileno())
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._ram))
        size = self._pages * PAGE_SIZE
        if _libc.mmap(address, size, _PROT_READ_WRITE, _MAP_SHARED | _MAP_FIXED, memory_fd, 0) != address:
            raise EnvironmentProblem(f"cannot replace guest memory: {os.strerror(ctypes.get_errno())}")
        self.memory_fd = memory_fd
        with contextlib.suppress(Disconnected):
            self.client.close()
        self.client = self._cleanup.enter_context(client)
        if self._serve_dma:
            self._cleanup.enter_context(client.serving())

    def abandon(self) -> None:
        """Hang up in the middle of whatever is going on."""
        with contextlib.suppress(Disconnected):
            self.close()

    def _keep(self, buffer: LoopbackBuffer) -> LoopbackBuffer:
        self._buffers[buffer.iova] = buffer
        return buffer

    def _take(self, size: int) -> int:
        count = size // PAGE_SIZE
        if count <= 0:
            raise UsageError(f"a DMA buffer of {size} bytes")
        first = self._used.find(bytes(count))
        if first < 0:
            raise EnvironmentProblem(f"no {count} free pages in a row in the {self._pages} pages of guest memory")
        self._used[first : first + count] = b"\1" * count
        return first

    def _offer(self, start: int, size: int) -> None:
        for chunk in range(start // self._map_size, (start + size - 1) // self._map_size + 1):
            offset = chunk * self._map_size
            if self._iova_base + offset not in self._maps:
                self.map(self._iova_base + offset, self._map_size, offset)


def _fill(fd: int, content: bytes) -> None:
    """Make `content` that of an empty file."""
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def _scattered_view(fd: int, pages: Sequence[int]) -> memoryview:
    """Pages of `fd` one after the other in our address space."""
    size = len(pages) * PAGE_SIZE
    address = _libc.mmap(None, size, 0, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
    for index, page in enumerate(pages):
        place = address + index * PAGE_SIZE
        flags = _MAP_SHARED | _MAP_FIXED
        if _libc.mmap(place, PAGE_SIZE, _PROT_READ_WRITE, flags, fd, page * PAGE_SIZE) != place:
            raise EnvironmentProblem(f"cannot map page {page} of guest memory: {os.strerror(ctypes.get_errno())}")
    array = (ctypes.c_ubyte * size).from_address(address)
    finalizer = weakref.finalize(array, _libc.munmap, address, size)
    finalizer.atexit = False
    return memoryview(array).cast("B")
