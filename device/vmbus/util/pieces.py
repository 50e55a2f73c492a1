"""Work that is too much for one turn of an event loop, as a generator: between two pieces others may have their turns.

Whoever writes such work sees to it that nothing which others do in between is in its way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")

Pieces = Generator[None, None, T]
"""Yields after each piece, and returns what all of it has come to."""

TURN_SECONDS = 0.004
"""Seconds of such work in one turn, give or take a piece."""


def at_once(work: Pieces[T]) -> T:
    """What the work comes to, without a pause. Raises what it raises."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result


def whole(work: Callable[P, Pieces[T]]) -> Callable[P, T]:
    """The function that does all of such work at once."""

    @wraps(work)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return at_once(work(*args, **kwargs))

    return call


async def in_turns(
    work: Pieces[T],
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
    clock: Callable[[], float] = time.perf_counter,
) -> T:
    """What the work comes to; the event loop has a turn whenever `TURN_SECONDS` are over. Raises what it raises.

    `around`: entered for each turn's part of the work.
    """
    try:
        while True:
            with around():
                until = clock() + TURN_SECONDS
                while True:
                    try:
                        next(work)
                    except StopIteration as end:
                        result: T = end.value
                        return result
                    if clock() >= until:
                        break
            await asyncio.sleep(0)
    finally:
        work.close()  # cancelled in between: the work undoes what it has begun
