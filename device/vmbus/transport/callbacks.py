"""What the library calls: the device's handler behind it, and the memory that the client offers.

Nothing that is raised here gets into C: it is logged and the client is answered with EINVAL. What is no Exception
(KeyboardInterrupt and the like) is kept, and raised when the library has returned.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from typing import Any

from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.transport import bindings
from vmbus.transport.handler import DeviceAccessError, DeviceHandler, ResetKind
from vmbus.transport.mapping import GuestMapping
from vmbus.transport.migration import MigrationHandler, MigrationRefused, MigrationState
from vmbus.transport.offers import Offer, Region, Regions
from vmbus.util.complaints import bounded_log

logger = bounded_log(__name__)


class Callbacks:
    """For all clients of one device, one after the other.

    Attributes:
        handler, migration: what does the work; without the second, no client can migrate the device.
        regions: what the client offers now. offer: what the library is just being asked to map.
        lost_reported: whether the handler knows that there is no client.
    """

    def __init__(self, handler: DeviceHandler, migration: MigrationHandler | None) -> None:
        self.handler = handler
        self.migration = migration
        self.regions = Regions()
        self.offer: Offer | None = None
        self.lost_reported = True
        self._depth = 0
        self._escaped: BaseException | None = None

    @property
    def inside(self) -> bool:
        return self._depth > 0

    def raise_escaped(self) -> None:
        """Raise what a callback could not raise through C."""
        if self._escaped is not None:
            escaped, self._escaped = self._escaped, None
            raise escaped

    def posted(self, writes: list[tuple[int, bytes]], bar0_size: int) -> None:
        """Writes to BAR0 that were taken off the socket."""
        self._depth += 1
        try:
            for offset, value in writes:
                try:
                    if offset + len(value) <= bar0_size:
                        self.handler.bar0_write(offset, value)
                except DeviceAccessError as error:
                    logger.debug("BAR0 write at %#x refused: %s", offset, error)
                except Exception:
                    logger.exception("BAR0 write at %#x failed in the device", offset)
        finally:
            self._depth -= 1

    def report_lost(self) -> None:
        """Tell the handler that the client is gone, once."""
        if not self.lost_reported:
            self.lost_reported = True
            self.shielded("reset", self.handler.reset, ResetKind.LOST_CONNECTION)

    def shielded(self, what: str, function: Callable[..., Any], *arguments: Any) -> bool:
        """Call the handler; log instead of raising. True if it went well."""
        self._depth += 1
        try:
            function(*arguments)
            return True
        except Exception:
            logger.exception("the device's %s failed", what)
        except BaseException as error:
            self._escaped = error
        finally:
            self._depth -= 1
        return False

    def region_callback(
        self, what: str, read: Callable[[int, int], bytes], write: Callable[[int, bytes], None]
    ) -> Callable[[int, Any, int, int, bool], int]:
        """For accesses to a region: the handler is asked, and what it raises is an error for the client."""

        def callback(_context: int, buffer: Any, count: int, offset: int, is_write: bool) -> int:
            self._depth += 1
            try:
                if is_write:
                    write(offset, ctypes.string_at(buffer, count))
                    return count
                content = bytes(read(offset, count))
                if len(content) == count:
                    ctypes.memmove(buffer, content, count)
                    return count
                logger.error("%s read of %d bytes at %#x: the device gave %d", what, count, offset, len(content))
            except DeviceAccessError as error:
                logger.debug("%s access of %d bytes at %#x refused: %s", what, count, offset, error)
            except Exception:
                logger.exception("%s access of %d bytes at %#x failed in the device", what, count, offset)
            except BaseException as error:
                self._escaped = error
            finally:
                self._depth -= 1
            ctypes.set_errno(errno.EINVAL)
            return -1

        return callback

    def on_reset(self, _context: int, kind: int) -> int:
        if kind == bindings.RESET_LOST_CONN:
            # Also called for a context that never had a client, and again when it is destroyed.
            self.report_lost()
            return 0
        if self.shielded("reset", self.handler.reset, ResetKind(kind)):
            return 0
        ctypes.set_errno(errno.EINVAL)
        return -1

    def on_dma_register(self, _context: int, pointer: Any) -> None:
        self.shielded("DMA mapping", self._map, pointer.contents)

    def on_dma_unregister(self, _context: int, pointer: Any) -> None:
        """The client takes memory back."""
        info = pointer.contents
        region = self.regions.get(info.iova.base or 0)
        if region is not None and region.size == info.iova.len:
            self.unmap(region)

    def _map(self, info: bindings.DmaInfo) -> None:
        iova, size, address = info.iova.base or 0, info.iova.len, info.vaddr
        if size == 0:
            return
        writable = bool(info.prot & bindings.PROT_WRITE)
        mapping = None
        if address is not None:
            try:
                mapping = GuestMapping(address, size, writable=writable)
            except EnvironmentProblem as error:
                logger.warning("DMA region %#x cannot be used: %s", iova, error)
        if not self.regions.add(Region(iova, iova + size, mapping, writable, self.offer)):
            raise UsageError(f"libvfio-user mapped {size} bytes at {iova:#x} over memory that is there")
        if mapping is None:
            self.handler.dma_map_unreachable(iova, size)
        else:
            self.handler.dma_map(iova, mapping.view, writable)

    def unmap(self, region: Region) -> None:
        """Memory of the client's is out of reach from here on."""
        self.regions.remove(region)
        self.shielded("DMA unmapping", self.handler.dma_unmap, region.iova, region.size)
        if region.mapping is not None:
            try:
                region.mapping.revoke()
            except EnvironmentProblem as error:
                self._escaped = error  # guest memory must not stay in reach: `run` ends the server

    # -- migration ------------------------------------------------------------------------------------------------

    def _migrating(self, what: str, step: Callable[[MigrationHandler], int]) -> int:
        """One step of the handler's; its result, or -1 with errno set."""
        self._depth += 1
        code = errno.EIO
        try:
            assert self.migration is not None
            return step(self.migration)
        except MigrationRefused as refusal:
            logger.error("the client's migration: %s", refusal)
            code = refusal.errno
        except Exception:
            logger.exception("the client's migration: %s failed in the device", what)
        except BaseException as error:
            self._escaped = error
        finally:
            self._depth -= 1
        ctypes.set_errno(code)
        return -1

    def on_transition(self, _context: int, number: int) -> int:
        """The client leads the device through its migration."""

        def step(handler: MigrationHandler) -> int:
            handler.transition(MigrationState(number))
            return 0

        return self._migrating("a transition", step)

    def on_read_data(self, _context: int, buffer: int, count: int) -> int:
        """The client reads the device's state."""

        def step(handler: MigrationHandler) -> int:
            data = handler.read_data(count)
            if len(data) > count:
                raise MigrationRefused(f"the device gave {len(data)} bytes of state for {count}", errno.EIO)
            if data:
                ctypes.memmove(buffer, data, len(data))
            return len(data)

        return self._migrating("reading its state", step)

    def on_write_data(self, _context: int, buffer: int, count: int) -> int:
        def step(handler: MigrationHandler) -> int:
            handler.write_data(ctypes.string_at(buffer, count) if count else b"")
            return count

        return self._migrating("writing its state", step)
