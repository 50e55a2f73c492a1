"""What a device has to do for the transport."""

from __future__ import annotations

import enum
from typing import Protocol

from vmbus.errors import PeerError
from vmbus.transport import bindings


class ResetKind(enum.Enum):
    DEVICE = bindings.RESET_DEVICE
    """The client asks; memory and interrupts stay set up."""
    LOST_CONNECTION = bindings.RESET_LOST_CONN
    """The client is gone; all memory has been unmapped before."""
    FLR = bindings.RESET_PCI_FLR


class DeviceAccessError(PeerError):
    """A register or configuration access that the device refuses; the client is answered with EINVAL."""


class DeviceHandler(Protocol):
    """What a device does with the client's requests. Called on the event loop's thread, from within the library:
    no method may call back into the `Context`, `trigger` excepted."""

    def bar0_read(self, offset: int, size: int) -> bytes:
        """`size` bytes of BAR0. May raise DeviceAccessError."""

    def bar0_write(self, offset: int, data: bytes) -> None:
        """May raise DeviceAccessError (a posted write has nobody to tell it to)."""

    def config_read(self, offset: int, size: int) -> bytes:
        """`size` bytes of configuration space, any alignment."""

    def config_write(self, offset: int, data: bytes) -> None:
        """Any size and alignment."""

    def dma_map(self, iova: int, view: memoryview, writable: bool) -> None:
        """The guest gives memory: `view` (format "B") shows it, and stays safe to touch after `dma_unmap`."""

    def dma_map_unreachable(self, iova: int, size: int) -> None:
        """The guest gives memory that we cannot map."""

    def dma_unmap(self, iova: int, size: int) -> None:
        """The guest takes memory back. After the return, views no longer reach it."""

    def reset(self, kind: ResetKind) -> None:
        """The device is reset. For LOST_CONNECTION everything has been unmapped before."""
