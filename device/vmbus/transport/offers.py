"""The memory that a client offers, and which of its requests to map some the library does not get to see.

The 2022 library keeps the descriptor of a mapping that is asked for again, even after the client has gone, and closes
one twice whose file cannot be mapped. So a DMA_MAP request is looked at first, together with the descriptor that comes
with it: a repetition is answered here, and what cannot be mapped, or would use up this process's descriptors, is
refused.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vmbus.memory.spans import SpanMap
from vmbus.transport import protocol
from vmbus.transport.mapping import GuestMapping, mapping_error

_ADDRESS_SPACE = 1 << 64


class Offer(NamedTuple):
    """What a DMA_MAP request says: `size` bytes of a file from `offset` on, at I/O address `iova`."""

    flags: int
    offset: int
    iova: int
    size: int
    file: tuple[int, int] | None
    """Device and inode; None if it came without a descriptor."""

    @classmethod
    def read(cls, body: bytes, descriptors: Sequence[int]) -> Offer:
        """From the request's body, of at least DMA_MAP.size bytes. Raises OSError for a descriptor of nothing."""
        _, flags, offset, iova, size = protocol.DMA_MAP.unpack_from(body)
        if not descriptors:
            return cls(flags, offset, iova, size, None)
        status = os.fstat(descriptors[0])
        return cls(flags, offset, iova, size, (status.st_dev, status.st_ino))


@dataclass
class Region:
    """Memory that the client offers, from I/O address `iova` up to `end`; `mapping` is None if we cannot reach it."""

    iova: int
    end: int
    mapping: GuestMapping | None
    writable: bool
    offer: Offer | None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.iova


class Regions(SpanMap[Region]):
    """All that the client offers now."""

    __slots__ = ()

    def answer(self, offer: Offer, descriptors: Sequence[int]) -> int | None:
        """What to answer to an offer without asking the library: an errno, 0 for yes. None if the library decides."""
        known = self.get(offer.iova)
        if known is not None and known.size == offer.size:
            return 0 if known.offer == offer else errno.EINVAL
        if offer.iova + offer.size > _ADDRESS_SPACE:
            return errno.EINVAL
        if not descriptors:
            return None
        # Descriptors are numbered from below, so the number says how many there are. The rest is for everybody else.
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if most != resource.RLIM_INFINITY and descriptors[0] >= most * 3 // 4:
            return errno.EMFILE
        return mapping_error(descriptors[0], offer.offset, writable=bool(offer.flags & protocol.DMA_WRITE_FLAG)) or None

    def shrunk(self) -> Region | None:
        """A region whose file has become too short, as far as somebody has come across it."""
        return next((region for region in self if region.mapping is not None and region.mapping.lost), None)
