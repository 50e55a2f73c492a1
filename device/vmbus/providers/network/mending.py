"""Getting the host's interface back, once others have removed it or taken it out of its bridge."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.providers.base import Host
from vmbus.providers.network.interface import Port
from vmbus.util.complaints import bounded_log

log = bounded_log(__name__)

RETRY_SECONDS = 1.0


class Mending:
    """Tries once a second, on another thread, until it has worked or is given up."""

    def __init__(
        self, host: Host, prepare: Callable[[], Callable[[], Port | None]], mended: Callable[[Port | None], None]
    ) -> None:
        """`prepare` returns the work for the next attempt, whose result `mended` is given: the interface's new end, or
        None where it has kept the one it had."""
        self._host = host
        self._prepare = prepare
        self._mended = mended
        self._made: Port | None = None
        self._over = False
        self._lock = threading.Lock()  # of the two above: an attempt may outlive its reason
        self._timer = host.call_later(RETRY_SECONDS, self._try)

    def _try(self) -> None:
        try:
            self._host.run_blocking(partial(self._work, self._prepare()), self._done)
        except UsageError as error:
            self._again(error)

    def _work(self, work: Callable[[], Port | None]) -> None:
        port = work()
        with self._lock:
            if not self._over:
                self._made = port
                return
        if port is not None:
            port.close()

    def _done(self, _: None, error: BaseException | None) -> None:
        if self._over:
            return
        if error is not None:
            self._again(error)
            return
        port, self._made = self._made, None
        self._over = True
        self._mended(port)

    def _again(self, error: BaseException) -> None:
        if not isinstance(error, EnvironmentProblem | UsageError):
            log.error("an interface was to be mended: %r", error)
        self._timer = self._host.call_later(RETRY_SECONDS, self._try)

    def give_up(self) -> None:
        """End it. What an attempt under way makes is removed again."""
        self._timer.cancel()
        with self._lock:
            self._over = True
            port, self._made = self._made, None
        if port is not None:
            port.close()
