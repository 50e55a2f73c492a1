"""What becomes of work when whoever waits for it is interrupted: long work on files in a thread ends soon after, and a
way back is gone to its end.

A thread cannot be cancelled, and a process waits for its threads before it ends. So such work looks again and again
whether it is still wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, BinaryIO, TypeVar

T = TypeVar("T")

_CHUNK = 1 << 20


class Unwanted(Exception):
    """Nobody waits for the result any more. Raised inside of the work, and seen by nobody else."""


class Stop:
    """Given to the work: `check` raises `Unwanted` when it is to end."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def check(self) -> None:
        if self._event.is_set():
            raise Unwanted


NEVER = Stop()
"""For work that nobody interrupts."""


async def in_thread(work: Callable[[Stop], T]) -> T:
    """The work's result. If this is cancelled, the work is told so, and its end is waited for."""
    stop = Stop()
    task = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # it is of no interest any more
        raise


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Performs `work` to its end, also if we are cancelled meanwhile: half a way back would help nobody."""
    task = asyncio.create_task(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    return task.result()


def sha256(file: BinaryIO, stop: Stop = NEVER) -> str:
    """The digest, in hex, of what is left of a file. Raises OSError, and `Unwanted`."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:count])
        stop.check()
    return digest.hexdigest()
