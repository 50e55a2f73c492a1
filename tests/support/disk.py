"""Storage for tests of disks: one with a volatile cache and a power switch, and one with faults."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Sequence

from support import pace
from vmbus.providers.disk.backend import Backend
from vmbus.providers.disk.core import Geometry
from vmbus.providers.disk.request import Op, Request

BLOCK = 512
BLOCKS = 8
GEOMETRY = Geometry(BLOCKS * BLOCK, BLOCK, 4 * BLOCK, 4 * BLOCK, False)


def request(op: Op, first: int = 0, count: int = 1, flags: int = 0) -> Request:
    return Request(op, flags, first * BLOCK, count * BLOCK) if op != Op.FLUSH else Request(op, flags, 0, 0)


class CachedDisk:
    """A disk of blocks with a volatile cache: what a power cut takes back is what no flush covered.

    The effect of an operation comes in one moment, which the caller chooses: when it calls. Blocks are numbers, their
    contents any values.
    """

    def __init__(self, blocks: int) -> None:
        self.now: list[object] = [0] * blocks
        self.stable: list[object] = [0] * blocks
        self._dirty: dict[int, list[object]] = {}

    def change(self, first: int, values: Sequence[object], *, durable: bool) -> None:
        for index, value in enumerate(values, first):
            self.now[index] = value
            self._dirty.setdefault(index, []).append(value)
            if durable:
                self.stable[index] = value
                self._dirty.pop(index, None)

    def flush(self) -> None:
        for index in self._dirty:
            self.stable[index] = self.now[index]
        self._dirty.clear()

    def power_cut(self, choose: random.Random) -> None:
        """Of what was not flushed, anything may have got to stable storage, block by block."""
        for index, values in self._dirty.items():
            if choose.random() < 0.5:
                self.stable[index] = choose.choice(values)
        self._dirty.clear()
        self.now = list(self.stable)


class Fault:
    """What is to go wrong: of operation `op`, the next `count` calls raise `number`, or wait for `go` first.

    op: the back-end's method, such as "write". `hang`: wait for `go` (`begun` tells that it does) instead of raising.
    """

    def __init__(self, op: str, number: int = errno.EIO, *, count: int = 1, hang: bool = False) -> None:
        self.op = op
        self.number = number
        self.count = count
        self.hang = hang
        self.begun = threading.Event()
        self.go = threading.Event()


class FaultyBackend:
    """A back-end with another below it, and faults in front of that. `prompt`: whether it reads at once if it can."""

    prompt = True

    def __init__(self, below: Backend, faults: list[Fault]) -> None:
        self.below = below
        self.faults = faults

    def _call(self, op: str, work: Callable[[], None]) -> None:
        for fault in self.faults:
            if fault.op == op and fault.count:
                fault.count -= 1
                if not fault.hang:
                    raise OSError(fault.number, os.strerror(fault.number))
                fault.begun.set()
                fault.go.wait(pace.seconds(60))
        work()

    def read_now(self, offset: int, views: Sequence[memoryview]) -> bool:
        if not self.prompt or any(fault.op == "read" and fault.count for fault in self.faults):
            return False
        at_once = getattr(self.below, "read_now", None)
        return at_once is not None and bool(at_once(offset, views))

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        self._call("read", lambda: self.below.read(offset, views))

    def write(self, offset: int, views: Sequence[memoryview], *, durable: bool) -> None:
        self._call("write", lambda: self.below.write(offset, views, durable=durable))

    def flush(self) -> None:
        self._call("flush", self.below.flush)

    def discard(self, offset: int, length: int) -> None:
        self._call("discard", lambda: self.below.discard(offset, length))

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool, durable: bool) -> None:
        work = lambda: self.below.write_zeroes(offset, length, may_unmap=may_unmap, durable=durable)  # noqa: E731
        self._call("write_zeroes", work)

    def close(self) -> None:
        self.below.close()
