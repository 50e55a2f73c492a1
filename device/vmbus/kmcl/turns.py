"""Giving channels their turns: one round over those that asked for one."""

from collections.abc import Callable
from typing import TypeVar

from vmbus.kmcl.channel import Channel

C = TypeVar("C", bound=Channel)


def one_round(ready: dict[C, None], stopped: Callable[[], bool] = lambda: False) -> None:
    """Give each channel that is in `ready` now one turn, oldest first; those that want another are put back.

    One at a time, taken out before its turn: an owner that waits in a callback has the others served from inside of
    its turn, by another round over the same `ready`. Ends early once `stopped()`.
    """
    for _ in range(len(ready)):
        if not ready or stopped():
            break
        channel = next(iter(ready))
        del ready[channel]
        if channel.process():
            ready[channel] = None
