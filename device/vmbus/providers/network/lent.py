"""Memory that a guest has lent to the card, and who has which part of it."""

from __future__ import annotations

import contextlib
from collections import deque

from vmbus.errors import PeerError
from vmbus.kmcl.server import ServerChannel
from vmbus.kmcl.status import KmclError
from vmbus.memory.guest import Window

MOST_BUFFER = 32 << 20
"""Bytes of one of the two buffers."""


class Lent:
    """A GPADL of the card's primary channel. It is opened when it is used first: after a restore, too.

    `read` and `write` raise PeerError or KmclError when it is gone, and ValueError for what lies outside.
    """

    def __init__(self, channel: ServerChannel, gpadl: int) -> None:
        self._channel = channel
        self.gpadl = gpadl
        self._window: Window | None = None

    def open(self) -> Window:
        """The memory. Raises KmclError when there is none to be opened under that number."""
        if self._window is None:
            self._window = self._channel.open_gpadl(self.gpadl, MOST_BUFFER)
        return self._window

    def read(self, offset: int, length: int) -> bytes:
        """A private copy."""
        window = self.open()
        if not 0 <= offset <= window.size - length:
            raise ValueError(f"{length} bytes at {offset} of {window.size}")
        return window.read(offset, length)

    def look(self, offset: int, length: int) -> bytes:
        """The same for somebody who looks on. Raises PeerError, whatever the reason."""
        try:
            return self.read(offset, length)
        except (KmclError, ValueError) as error:
            raise PeerError(str(error)) from error

    def write(self, offset: int, data: bytes) -> None:
        """Store `data`, and have it logged."""
        window = self.open()
        if not 0 <= offset <= window.size - len(data):
            raise ValueError(f"{len(data)} bytes at {offset} of {window.size}")
        window.write(offset, data)

    def close(self) -> None:
        """Never touch it again; the guest may take it back. Harmless when repeated."""
        window, self._window = self._window, None
        if window is not None:
            with contextlib.suppress(KmclError, PeerError):
                self._channel.unmap_gpadl(self.gpadl)


class _Piece:
    """What one packet has of an arena, up to position `end`. `back`: the guest has completed it."""

    __slots__ = ("back", "end")

    def __init__(self, end: int) -> None:
        self.end = end
        self.back = False


class Arena:
    """`size` bytes from `start` of the receive buffer, used as a ring: a packet takes the next part, in one piece for
    each message. Parts come back in the order in which they were taken; one that comes early waits for those before.

    Positions count on for ever; the place of one is its remainder. When everything is back, the ring begins anew at its
    beginning, so that a guest that keeps up sees few pages used, and a switchover copies few.
    """

    __slots__ = ("_begun", "_head", "_pieces", "_tail", "size", "start")

    def __init__(self, start: int, size: int) -> None:
        self.start = start
        self.size = size
        self._head = self._tail = self._begun = 0
        self._pieces: deque[_Piece] = deque()

    @property
    def used(self) -> int:
        """Bytes that are not to be had."""
        return self._head - self._tail

    def _after_gap(self, length: int) -> int:
        """Where the next piece of `length` bytes would begin."""
        left = self.size - self._head % self.size
        return self._head if length <= left else self._head + left

    def fits(self, length: int) -> bool:
        return self._after_gap(length) + length - self._tail <= self.size

    def take(self, length: int) -> int | None:
        """Room for a message, as an offset into the receive buffer; None when there is none."""
        at = self._after_gap(length)
        if at + length - self._tail > self.size:
            return None
        self._head = min(at + (length + 7 & ~7), at + self.size - at % self.size)
        return self.start + at % self.size

    def finish(self) -> tuple[int, int]:
        """What was taken since the last call is one packet's: positions from where to where, for `give_back`."""
        begin, self._begun = self._begun, self._head
        self._pieces.append(_Piece(self._head))
        return begin, self._head

    def give_back(self, end: int) -> None:
        """A packet is done, whose part ended there."""
        for piece in self._pieces:
            if piece.end == end and not piece.back:
                piece.back = True
                break
        while self._pieces and self._pieces[0].back:
            self._tail = self._pieces.popleft().end
        if not self._pieces and self._begun == self._head:
            self._head = self._tail = self._begun = 0

    def restore(self, begin: int, end: int) -> bool:
        """A packet has this part, behind all those that were restored before; False when that cannot be."""
        if not self._head <= begin <= end or end - (self._tail if self._pieces else begin) > self.size:
            return False
        if not self._pieces:
            self._tail = begin
        self._head = self._begun = end
        self._pieces.append(_Piece(end))
        return True
