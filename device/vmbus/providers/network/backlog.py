"""Frames that wait for their guest over a pause."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator


class Backlog:
    """At most `most` bytes of frames, and one more frame. A deque, as far as it is used here."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.size = 0
        self._frames: deque[bytes] = deque()

    def __len__(self) -> int:
        return len(self._frames)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._frames)

    @property
    def first(self) -> bytes:
        """The frame that is next. Raises IndexError when there is none."""
        return self._frames[0]

    def append(self, frame: bytes) -> bool:
        """One more; False when there is no room."""
        if self.size >= self.most:
            return False
        self._frames.append(frame)
        self.size += len(frame)
        return True

    def popleft(self) -> bytes:
        """The frame that is next, which is taken out."""
        frame = self._frames.popleft()
        self.size -= len(frame)
        return frame

    def clear(self) -> None:
        self._frames.clear()
        self.size = 0
