"""Guest memory for moves that the kernel does between a file and the memory of a packet, with no look at it:
the native core finds the places of the pages that a packet names."""

from collections.abc import Iterable
from itertools import islice
from typing import Protocol

from vmbus.native.choice import core

MOST_IN_REACH = 64
"""Regions that a guest may have for that: with Linux's own drivers there are a few."""


class Reach(Protocol):
    """All memory of a guest, in the native core's hands."""

    def release(self) -> None:
        """Never touch it again. Harmless when repeated."""

    def move(self, body: bytes, length: int, fd: int, offset: int, write: bool, flags: int, /) -> int | None:
        """See `vmbus.kmcl.Completion.move`; `body`: the description in the packet. A negative number is an errno."""


def reach(regions: Iterable[tuple[int, memoryview]]) -> Reach | None:
    """Of these (I/O address, memory); None over the pure core, and if they are too many."""
    if core is None:
        return None
    found = list(islice(regions, MOST_IN_REACH + 1))
    return core.Reach(found) if len(found) <= MOST_IN_REACH else None
