"""Migration that the client drives: what a device has to do for it, and what is checked before the library sees it.

A libvfio-user with migration v2 keeps the client's state machine and the bitmaps of dirty pages, and calls a
`MigrationHandler`. Three things it leaves to us, which is why the transport shows each DEVICE_FEATURE and DMA_UNMAP
command to the `FeatureGate` before the library gets it:

* The library is told of pages that the device wrote; it does not ask. So whenever the client is about to read a bitmap
  (LOGGING_REPORT, or DMA_UNMAP that asks for one), the device's own log of that memory is carried over first.
* Nothing tells us when logging starts and ends; we see it here.
* Some commands it would read beyond their end, and reports in pages of another size than the log's come out wrong.
  They are refused here.

All numbers are those of vfio-user's DEVICE_FEATURE, see `protocol`.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable
from typing import Protocol

from vmbus.errors import VmbusError
from vmbus.transport import bindings, protocol
from vmbus.transport.protocol import Command, DeviceState, Feature

LONGEST_DATA = 65536
"""Bytes in one message of a client that migrates the device. The library wants a message whole, and a longer one does
not fit into the socket's buffer; so this is what such a client is told as the largest transfer."""

LONGEST_LOOK = protocol.HEADER.size + protocol.DMA_UNMAP.size + protocol.DIRTY_BITMAP.size
"""Bytes of a message that the gate needs to see."""


class MigrationState(enum.Enum):
    """What the library calls the states that it leads the device through."""

    STOP = bindings.MIGRATION_STOP
    """The device stands still; its state is complete in itself and in guest memory."""
    RUNNING = bindings.MIGRATION_RUNNING
    STOP_COPY = bindings.MIGRATION_STOP_COPY
    """It stands still, and its state is being read."""
    PRE_COPY = bindings.MIGRATION_PRE_COPY
    """It runs, and a migration has begun."""
    RESUMING = bindings.MIGRATION_RESUMING
    """It stands still, and a state is being written."""


class MigrationRefused(VmbusError):
    """The device does not do what the client wants of it; `errno` is the one that the client gets."""

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class MigrationHandler(Protocol):
    """What a device does when its client migrates it. As with `DeviceHandler`, no method may call back into the
    `Context`. Each may raise MigrationRefused; the client gets its errno, and nothing has changed."""

    def transition(self, state: MigrationState) -> None:
        """Go into a state that the library allows from the present one."""

    def read_data(self, size: int) -> bytes:
        """The next at most `size` bytes of the state that is being saved; none at its end."""

    def write_data(self, data: bytes) -> None:
        """The next bytes of the state that is being loaded."""

    def about_to_go(self, target: DeviceState) -> None:
        """The client asks for `target`, to which the transitions lead that follow."""

    def log_start(self) -> None:
        """Log from now on which memory the device writes. Repeating it does nothing."""

    def log_stop(self) -> None:
        """End and forget the log. Harmless without one."""

    def log_take(self, iova: int, size: int, *, unmapping: bool) -> list[tuple[int, int]]:
        """The logged pages in `size` bytes at `iova`, as (address, size) runs, taken out of the log.

        `unmapping`: the memory goes away after this.
        """


class Dirty(Protocol):
    """What the gate needs of the transport."""

    def is_region(self, iova: int, size: int) -> bool:
        """Whether the client offers exactly this memory."""

    def smallest_region(self) -> int:
        """Bytes in the smallest region that we can reach; 0 without any."""

    def mark_dirty(self, iova: int, size: int) -> None:
        """Tell the library that memory was written. Raises MigrationRefused if it does not know it."""


class FeatureGate:
    """Looks at commands in front of the library. `handler` is None for a device (or library) without migration.

    Attributes:
        asked: whether this client has asked if the device can be migrated.
    """

    def __init__(self, handler: MigrationHandler | None, dirty: Dirty) -> None:
        self._handler = handler
        self._dirty = dirty
        self.asked = False

    @property
    def driven(self) -> bool:
        """Whether the client drives the device's migration: it asked, and was told that it can."""
        return self.asked and self._handler is not None

    def before(self, command: int, body: bytes) -> Callable[[], None] | None:
        """The library is about to get this command. Returns what to do when it has handled it, if anything.

        `body` may be cut after LONGEST_LOOK bytes of the message. Raises MigrationRefused if it must not get it.
        """
        if command == Command.DEVICE_FEATURE:
            return self._feature(body)
        if command == Command.DMA_UNMAP and self._handler is not None:
            self._unmap(self._handler, body)
        return None

    def _feature(self, body: bytes) -> Callable[[], None] | None:
        if len(body) < protocol.FEATURE.size:
            return None  # refused by the library
        room, flags = protocol.FEATURE.unpack_from(body)
        number, operations = flags & protocol.FEATURE_NUMBER_MASK, flags & ~protocol.FEATURE_NUMBER_MASK
        if number == Feature.MIGRATION:
            self.asked = True
        if self._handler is None or operations & protocol.FEATURE_PROBE:
            return None
        data = body[protocol.FEATURE.size :]
        asked = (number, operations)
        if asked == (Feature.DEVICE_STATE, protocol.FEATURE_SET):
            self._set_state(self._handler, data)
        elif asked == (Feature.LOGGING_START, protocol.FEATURE_SET):
            self._start(self._handler, data)
        elif asked == (Feature.LOGGING_STOP, protocol.FEATURE_SET):
            return self._handler.log_stop
        elif asked == (Feature.LOGGING_REPORT, protocol.FEATURE_GET):
            self._report(self._handler, room, data)
        return None

    def _set_state(self, handler: MigrationHandler, data: bytes) -> None:
        if len(data) < protocol.DEVICE_STATE.size:
            raise _cut("DEVICE_STATE", len(data), protocol.DEVICE_STATE.size)
        number, _ = protocol.DEVICE_STATE.unpack_from(data)
        try:
            target = DeviceState(number)
        except ValueError:
            raise MigrationRefused(f"migration state {number} does not exist here", errno.EINVAL) from None
        handler.about_to_go(target)

    def _start(self, handler: MigrationHandler, data: bytes) -> None:
        if len(data) < protocol.LOGGING_CONTROL.size:
            raise _cut("LOGGING_START", len(data), protocol.LOGGING_CONTROL.size)
        page_size, _, _ = protocol.LOGGING_CONTROL.unpack_from(data)
        _check_page_size("LOGGING_START", page_size)
        smallest = self._dirty.smallest_region()
        if 0 < smallest < protocol.LOGGED_PAGE:
            raise MigrationRefused(
                f"LOGGING_START: there is a memory region of only {smallest} bytes, less than a page", errno.EINVAL
            )
        handler.log_start()

    def _report(self, handler: MigrationHandler, room: int, data: bytes) -> None:
        if len(data) < protocol.LOGGING_REPORT.size:
            raise _cut("LOGGING_REPORT", len(data), protocol.LOGGING_REPORT.size)
        iova, size, page_size = protocol.LOGGING_REPORT.unpack_from(data)
        _check_page_size("LOGGING_REPORT", page_size)
        if not self._dirty.is_region(iova, size):
            # The library takes the beginning of a region too, and then forgets pages behind it.
            raise MigrationRefused(
                f"LOGGING_REPORT: {size} bytes at {iova:#x} are not a region of memory as it was mapped, and only "
                "whole regions are reported",
                errno.ENOTSUP,
            )
        if room < protocol.FEATURE.size + protocol.LOGGING_REPORT.size + protocol.bitmap_size(size):
            return  # no room for the answer: refused by the library
        self._mark(handler, iova, size, unmapping=False)

    def _unmap(self, handler: MigrationHandler, body: bytes) -> None:
        if len(body) < protocol.DMA_UNMAP.size:
            return
        answer, flags, iova, size = protocol.DMA_UNMAP.unpack_from(body)
        if flags != protocol.DMA_UNMAP_GET_DIRTY or not self._dirty.is_region(iova, size):
            return
        if len(body) < protocol.DMA_UNMAP.size + protocol.DIRTY_BITMAP.size:
            raise _cut("DMA_UNMAP", len(body), protocol.DMA_UNMAP.size + protocol.DIRTY_BITMAP.size)
        page_size, room = protocol.DIRTY_BITMAP.unpack_from(body, protocol.DMA_UNMAP.size)
        _check_page_size("DMA_UNMAP", page_size)
        if room != protocol.bitmap_size(size):
            raise MigrationRefused(
                f"DMA_UNMAP asks for a bitmap of {room} bytes, where {protocol.bitmap_size(size)} are needed",
                errno.EINVAL,
            )
        if answer < protocol.DMA_UNMAP.size + protocol.DIRTY_BITMAP.size + room:
            return  # no room for the answer: refused by the library
        self._mark(handler, iova, size, unmapping=True)

    def _mark(self, handler: MigrationHandler, iova: int, size: int, *, unmapping: bool) -> None:
        for start, length in handler.log_take(iova, size, unmapping=unmapping):
            first, end = max(start, iova), min(start + length, iova + size)  # regions need not be whole pages
            self._dirty.mark_dirty(first, end - first)


def _check_page_size(what: str, page_size: int) -> None:
    if page_size != protocol.LOGGED_PAGE:
        raise MigrationRefused(
            f"{what}: dirty memory is logged in pages of {protocol.LOGGED_PAGE} bytes, not {page_size}", errno.EINVAL
        )


def _cut(what: str, size: int, needed: int) -> MigrationRefused:
    return MigrationRefused(f"{what} has {size} bytes of data where {needed} are needed", errno.EINVAL)
