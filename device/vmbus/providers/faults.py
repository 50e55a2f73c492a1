"""Errors that callbacks of a provider have raised: counted, named, and the end of what hangs on them.

A callback has no caller who could be told. So what it raises is written down here, where `status` and `inspect` find
it, and the channels whose packets its provider holds are failed with that cause: nobody would complete them any more.
Whoever waits for the provider (a pause, a command) ends with that cause too, instead of running out of time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from vmbus.errors import VmbusError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.util.complaints import bounded_log

log = bounded_log(__name__)

MOST_KINDS = 16
"""Different errors of one provider that are kept, the latest; all are counted."""
_MOST_TEXT = 400


def naming(what: str, call: Callable[..., Any]) -> str:
    """A callback's name: `what` it was given to, and its own."""
    inner = getattr(call, "func", call)
    return f"{what} ({getattr(inner, '__qualname__', type(inner).__name__)})"


def fail_held(channels: Iterable[Channel], cause: str) -> None:
    """Fail the channels whose incoming packets nobody will complete any more; one that is closing is closed."""
    for channel in channels:
        if channel.outstanding and channel.state is ChannelState.CLOSING:
            log.error("channel %s is closed without its owner: %s", channel.name, cause)
            channel.close(lambda: None, force=True)
        elif channel.outstanding:
            channel.fail(cause)


class ProviderRaised(VmbusError):
    """A callback of a provider has raised, so what was waited for does not come."""


class Fault(NamedTuple):
    """One kind of error: which callback raised what, how often, and when last (seconds since the epoch)."""

    callback: str
    error: str
    times: int
    last: float


Observer = Callable[[str, str, BaseException], None]

_observers: list[Observer] = []


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Inside, `observer(provider, callback, error)` is called for every error of providers in this process, on whatever
    thread it is: for tests, which such an error has to fail."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


class Faults:
    """Of one provider.

    Attributes:
        name: the provider's. count: all errors so far.
        on_raised: called with the cause when what hangs on the provider has to end; set by its host.
        on_seen: called with each error and the callback that raised it; set by whoever tests the provider.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.on_raised: Callable[[str], None] = lambda cause: None
        self.on_seen: Callable[[tuple[str, BaseException]], None] = lambda error: None
        self._kinds: dict[tuple[str, str], tuple[int, float]] = {}
        self._waits: list[Callable[[str], None]] = []

    def seen(self, callback: str, error: BaseException) -> None:
        """`callback` has raised, and whoever called it ends by itself what hangs on it (KMCL fails the channel)."""
        self.count += 1
        text = repr(error)
        key = callback, text if len(text) <= _MOST_TEXT else text[:_MOST_TEXT] + "..."
        before, _ = self._kinds.pop(key, (0, 0.0))
        self._kinds[key] = before + 1, time.time()
        if len(self._kinds) > MOST_KINDS:
            del self._kinds[next(iter(self._kinds))]
        if self.count <= MOST_KINDS or not self.count & (self.count - 1):  # a guest may cause it, again and again
            log.error("provider %s: %s raised (error %d of it)", self.name, callback, self.count, exc_info=error)
        self.on_seen((callback, error))
        for observer in list(_observers):
            observer(self.name, callback, error)

    def raised(self, callback: str, error: BaseException) -> None:
        """`callback` has raised, and nobody else ends what hangs on it."""
        self.seen(callback, error)
        cause = f"{callback} of provider {self.name} raised {error!r}"
        # First those who wait: a channel that has failed holds nothing any more, and would look like success.
        for tell in list(self._waits):
            tell(cause)
        self.on_raised(cause)

    def inherit(self, other: Faults) -> None:
        """Go on counting where another object for the same provider has ended."""
        self.count += other.count
        self._kinds = other._kinds | self._kinds

    @contextmanager
    def waiting(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Inside, `tell(cause)` is called when something raises on which a wait may hang."""
        self._waits.append(tell)
        try:
            yield
        finally:
            self._waits.remove(tell)

    @property
    def list(self) -> list[Fault]:
        """What was raised, the latest last."""
        return [Fault(callback, error, times, last) for (callback, error), (times, last) in self._kinds.items()]

    def as_dict(self) -> dict[str, Any]:
        return {"count": self.count, "errors": [fault._asdict() for fault in self.list]}
