"""What a disk does here and now, on the event loop, where that needs no waiting: reads and writes without FUA."""

from collections.abc import Callable, Sequence

from vmbus.providers.disk.backend import Backend, Movable
from vmbus.providers.disk.core import Core
from vmbus.providers.disk.request import Op


class AtOnce:
    """Of a disk with an open image. A back-end need not have these ways; then nothing is done here."""

    def __init__(self, backend: Backend, core: Core, counters: dict[str, int]) -> None:
        """`counters`: the disk's, with `bytes_read` and `bytes_written`."""
        self._core = core
        self._counters = counters
        self._read: Callable[[int, Sequence[memoryview]], bool] | None = getattr(backend, "read_now", None)
        self._write: Callable[[int, Sequence[memoryview], int], bool] | None = getattr(backend, "write_now", None)
        self._move: Callable[..., bool] | None = getattr(backend, "move_now", None)

    def transfer(self, op: int, offset: int, length: int, views: Sequence[memoryview]) -> bool:
        """A request that may begin, if it is one of these; whether it is done."""
        if op == Op.READ:
            return self._read is not None and self._read(offset, views) and self._done(length, write=False)
        # A flush writes the file system's journal, for which a write would wait.
        if op != Op.WRITE or self._write is None or self._core.flushing:
            return False
        return self._write(offset, views, length) and self._done(length, write=True)

    def move(self, memory: Movable, offset: int, length: int, *, write: bool) -> bool:
        """All the memory of a packet, if nothing runs or waits; whether it is done. If not, nothing was."""
        core, move = self._core, self._move
        if move is None or not core.undisturbed or (write and core.flushing):
            return False
        return move(memory, offset, length, write=write) and self._done(length, write=write)

    def _done(self, length: int, *, write: bool) -> bool:
        if write:
            self._core.unflushed = True
            self._counters["bytes_written"] += length
        else:
            self._counters["bytes_read"] += length
        return True
