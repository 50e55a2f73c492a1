"""What each of the services does with its exchange; see also `vmbus.providers.integration.kvp` and `freezing`."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from vmbus.errors import UsageError, VmbusError
from vmbus.providers.base import Host, Timer
from vmbus.providers.integration.exchange import Exchange, Request
from vmbus.wire import ic

LOST_AFTER = 3
"""Heartbeats that may be due without an answer before the guest counts as lost."""
STEPPED = 0.25
"""Seconds by which the clock has gone another way than time, since the guest was told it, beyond which it was set."""

Answer = Future[dict[str, Any]]


def settle(answer: Answer, result: dict[str, Any] | None, error: Exception | None = None) -> None:
    """Answer a command, unless whoever gave it has gone."""
    if answer.done():
        return
    if result is None:
        answer.set_exception(error or UsageError("the guest gave no answer"))
    else:
        answer.set_result(result)


class Periodic:
    """A call every so often while its channel is started; nothing with 0 seconds."""

    def __init__(self, host: Host, seconds: float, call: Callable[[], None]) -> None:
        self._host = host
        self._seconds = seconds
        self._call = call
        self._timer: Timer | None = None

    def start(self) -> None:
        """The first call is due after one interval."""
        if self._seconds and self._timer is None:
            self._timer = self._host.call_later(self._seconds, self._fire)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        self._timer = None
        self.start()
        self._call()


class Part:
    """One service. Its `numbers` are saved."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.numbers: dict[str, int] = {}
        exchange.on_ready = self.ready
        exchange.on_suspend = self.suspend
        exchange.on_closed = self.closed

    def ready(self) -> None:
        """Requests can go out, for the first time or again."""

    def suspend(self) -> None:
        """The channel comes to rest: no timers."""

    def closed(self) -> None:
        """The guest's service has gone."""

    def status(self) -> dict[str, Any]:
        return self.exchange.status() | self.numbers


class Heartbeat(Part):
    """Asks the guest every so often whether it is still there; never twice at once."""

    def __init__(self, exchange: Exchange, host: Host, seconds: float) -> None:
        super().__init__(exchange)
        self.numbers = {"sequence": 0, "beats": 0, "wrong": 0, "silent": 0}
        self._timer = Periodic(host, seconds, self._beat)
        exchange.on_old_answer = self._answered

    def ready(self) -> None:
        self._timer.start()

    def suspend(self) -> None:
        self._timer.stop()

    def _beat(self) -> None:
        if not self.exchange.idle:
            self.numbers["silent"] += 1
            return
        sequence = self.numbers["sequence"]
        self.exchange.ask(
            Request(ic.MessageType.HEARTBEAT, ic.heartbeat(sequence), self._answered, patient=True),
        )

    def _answered(self, message: ic.Message | None, error: VmbusError | None) -> None:
        if message is None:
            return
        try:
            right = ic.parse_heartbeat(message.body) == (self.numbers["sequence"] + 1) % (1 << 64)
        except ic.IcError:
            right = False
        self.numbers["beats" if right else "wrong"] += 1
        self.numbers["silent"] = 0
        self.numbers["sequence"] = (self.numbers["sequence"] + 1) % (1 << 63)

    def status(self) -> dict[str, Any]:
        alive = self.numbers["beats"] > 0 and self.numbers["silent"] < LOST_AFTER
        return super().status() | {"alive": alive and self.exchange.version is not None}


class Time(Part):
    """Tells the guest the time.

    To set its clock: whenever it may have lost it (the device begins to run again, or this machine's clock was set, or
    stood still while the machine slept), and every so often besides, since a guest's clock may also go wrong by itself
    and no answer says so. In between, as samples, by which a guest that disciplines its clock can keep it right.
    """

    def __init__(
        self,
        exchange: Exchange,
        host: Host,
        seconds: float,
        sync_seconds: float,
        clock: Callable[[], float],
        steady: Callable[[], float],
    ) -> None:
        """`seconds` between two messages (0: none besides those that are needed), `sync_seconds` between two that set
        the clock (0: only those that are needed). `clock`: seconds since 1970; `steady`: seconds in which the guest
        could run."""
        super().__init__(exchange)
        self.numbers = {"syncs": 0, "samples": 0}
        self._clock = clock
        self._steady = steady
        self._sync_seconds = sync_seconds
        self._synced_at = 0.0  # by the steady clock
        self._offset = 0.0  # between the two, then
        self._waits = False  # to be told the time that it is then
        self._timer = Periodic(host, seconds, self._due)

    def ready(self) -> None:
        self._timer.start()
        if not self._waits:
            self.tell(ic.TimeFlag.SYNC)

    def suspend(self) -> None:
        self._timer.stop()

    def _due(self) -> None:
        if not self.exchange.idle:
            return  # it does not answer; the next one will have the time of then
        now, steady = self._clock(), self._steady()
        stepped = abs(now - steady - self._offset) >= STEPPED
        late = bool(self._sync_seconds) and steady - self._synced_at >= self._sync_seconds
        self.tell(ic.TimeFlag.SYNC if stepped or late else ic.TimeFlag.SAMPLE)

    def tell(
        self, flag: ic.TimeFlag, done: Callable[[ic.Message | None, VmbusError | None], None] | None = None
    ) -> None:
        """Send the time, as it is at the moment of the send."""

        def body() -> bytes:
            assert self.exchange.version is not None
            self._waits = False
            now = self._clock()
            if flag is ic.TimeFlag.SYNC:
                self._synced_at = self._steady()
                self._offset = now - self._synced_at
            return ic.time_sync(ic.TimeSync(now, flag), self.exchange.version)

        request = Request(ic.MessageType.TIME, body, patient=done is None)
        if done is not None:
            request.done = done
        self._waits = True
        self.exchange.ask(request, bounded=done is not None)
        self.numbers["syncs" if flag is ic.TimeFlag.SYNC else "samples"] += 1


class Shutdown(Part):
    MODES: Mapping[str, tuple[int, tuple[int, int]]] = {
        "power-off": (0, (1, 0)),
        "restart": (ic.ShutdownFlag.RESTART, (3, 1)),
        "hibernate": (ic.ShutdownFlag.HIBERNATE, (3, 2)),
    }
    """Flags, and the version from which the guest knows them."""

    def request(self, mode: str, *, force: bool, text: str) -> Answer:
        """The answer says whether the guest does it: `accepted`, and its `status`. Raises UsageError."""
        if mode not in self.MODES:
            raise UsageError(f"there is no way {mode!r} to shut down; there are {', '.join(self.MODES)}")
        flags, since = self.MODES[mode]
        version = self.exchange.version
        if version is not None and version < since:
            raise UsageError(f"the guest's shutdown service speaks version {version}, and cannot {mode}")
        answer: Answer = Future()

        def done(message: ic.Message | None, error: VmbusError | None) -> None:
            accepted = message is not None and message.status == ic.IcStatus.OK
            settle(answer, None if message is None else {"accepted": accepted, "status": message.status}, error)

        body = ic.shutdown(ic.Shutdown(flags | (ic.ShutdownFlag.FORCE if force else 0), text=text))
        self.exchange.ask(Request(ic.MessageType.SHUTDOWN, body, done, keep=True))
        return answer
