"""What a driver needs from a PCI function: registers, memory that the device reaches, and an interrupt.

The guest's driver is written against these protocols. `vmbus_guest.vfio` implements them over VFIO in the guest; the
loopback harness implements them on the host over a vfio-user socket, so the same driver runs in both places.
"""

from __future__ import annotations

from typing import Protocol

PAGE_SIZE = 4096
"""Bytes. DMA memory comes in whole pages of this size."""


class DmaBuffer(Protocol):
    """Memory that the driver and the device both reach, contiguous for both of them."""

    @property
    def iova(self) -> int:
        """I/O virtual address of the first byte, a multiple of `PAGE_SIZE`."""

    @property
    def size(self) -> int:
        """Bytes, a multiple of `PAGE_SIZE`."""

    @property
    def view(self) -> memoryview:
        """The memory itself: writable, format `B`, `size` bytes."""


class PciFunction(Protocol):
    """One PCI function with one memory BAR and one MSI."""

    @property
    def interrupt_fd(self) -> int:
        """A descriptor that is readable while an interrupt is pending; `wait_interrupt` drains it."""

    def read32(self, offset: int) -> int:
        """Read a BAR0 register. `offset` is in bytes and a multiple of 4. A synchronous round trip: slow."""

    def write32(self, offset: int, value: int) -> None:
        """Write a BAR0 register, 32 bits. Posted: returns before the device has seen it."""

    def allocate(self, size: int) -> DmaBuffer:
        """Return `size` bytes (rounded up to whole pages) of zeroed memory, mapped for the device until `close`, or
        `trim` after it was freed.

        Raises `EnvironmentProblem` when no memory is left.
        """

    def free(self, buffer: DmaBuffer) -> None:
        """Give the memory back. The device may still hold its address: free only what it was told to forget."""

    def trim(self) -> int:
        """Unmap what is mapped and wholly free: the device cannot reach it any more. Returns how many pieces."""

    def wait_interrupt(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the MSI. True if it fired since the last call (now drained), else False."""

    def close(self) -> None:
        """Stop interrupts and DMA and let the function go. Buffers must not be used any more. May be called twice."""
