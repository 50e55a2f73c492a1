"""`ProviderTest`: one provider under test, in one thread, with virtual time."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any
from uuid import UUID

from vmbus.bus.local import LocalBus
from vmbus.errors import UsageError, WaitTimeout
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.server import ServerChannel
from vmbus.providers import Provider, provider_class
from vmbus.testkit.contract import ChannelFailed, ContractViolation
from vmbus.testkit.device import RING_PAGES, DeviceUnderTest, InFlight
from vmbus.testkit.guest import TIMEOUT, BufferPages, ChannelEnd, Guest, HostPacket
from vmbus.testkit.hosted import Hosted, Key, Saved, key
from vmbus.util.complaints import COMPLAINTS
from vmbus.wire import messages as m

INSTANCE = UUID("00000000-0000-4000-8000-000000000001")
# As the device server's pause: how long a provider may take, in virtual seconds, to complete what it holds.
PAUSE_TIMEOUT = 10.0
TURNS = 100_000


class _LastException(logging.Handler):
    """Keeps the exception that a channel has caught from its owner and only logs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.error: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.error = record.exc_info[1]


class ProviderTest(DeviceUnderTest):
    """A provider, started, with a virtual host and the guest's ends of its channels. A context manager: leaving it
    without an exception calls `finish`.

    Attributes:
        bus: what joins its channels with the guest's ends.
        steps: steps of the script so far: the points at which `every_step` saves. last_step: what the last one was.
        hosted: the provider on its host, for what is not here.
        save_at: called with the number of each step: whether to save and restore there.
    """

    def __init__(
        self,
        provider: type[Provider] | str,
        *,
        options: Mapping[str, Any] | None = None,
        name: str = "",
        instance: UUID = INSTANCE,
        pause_timeout: float = PAUSE_TIMEOUT,
    ) -> None:
        """
        Args:
            provider: its class, or its kind as in a description.
            options: as in a description.
            pause_timeout: virtual seconds that the provider may take at a save to complete what it holds.

        Raises UsageError for wrong options.
        """
        class_ = provider_class(provider) if isinstance(provider, str) else provider
        self._name = name or class_.kind
        self._guests: dict[Key, Guest] = {}
        self._failures: list[tuple[Channel, str]] = []
        self._expected: list[BaseException] | None = None
        self._in_turn = False
        self._ended = False
        self._last_exception = _LastException()
        self.save_at: Callable[[int], bool] | None = None
        self.steps = 0
        self.last_step = "the start"
        self.saves = 0
        self.bus = LocalBus(waiter=self._wait)
        self.bus.on_failed = lambda channel, reason: self._failures.append((channel, reason))
        logging.getLogger("vmbus.kmcl").addHandler(self._last_exception)
        COMPLAINTS.refill()  # what earlier ones said must not be what this one cannot say
        self.hosted = Hosted(
            class_,
            self._name,
            instance,
            dict(options or {}),
            bus=self.bus,
            pause_timeout=pause_timeout,
            check=self._raise_failures,
            payloads=self._payloads,
        )
        self.hosted.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ended:
            return
        self._ended = True
        try:
            if error is None:
                self.finish()
        finally:
            logging.getLogger("vmbus.kmcl").removeHandler(self._last_exception)
            self.hosted.cleanup()

    @property
    def provider(self) -> Provider:
        """The provider; after a save and restore, another object."""
        return self.hosted.provider

    # ---- time and turns ------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Virtual seconds since the start."""
        return self.hosted.clock.now

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Code of the provider or of the guest's ends runs: no point to save at."""
        before, self._in_turn = self._in_turn, True
        try:
            with self.hosted.watch.turn("a turn"):
                yield
        finally:
            self._in_turn = before
        self._raise_failures()

    def turn(self) -> bool:
        """Let one turn pass, of the provider's host or of a channel, and return whether there was one: to do something
        in between two of them, such as closing a channel before what is due is called. `run` is many of these."""
        done = self._one_turn()
        if done:
            self.step("a turn")
        return done

    def run(self) -> None:
        """Let both ends take turns until nothing is left to be done at this moment. Virtual time stands still.

        Raises ContractViolation when a channel failed, with the reason, and whatever a call of the provider's host
        (`call_soon`) raised.
        """
        for _ in range(TURNS):
            before = self._progress()
            calls = self.hosted.host.busy
            if not self._one_turn():
                return
            # A restore wakes all channels: turns in which nothing moves are no steps, or a save at every step would
            # never come to an end.
            if calls or self._progress() != before:
                self.step("a turn of run()")
        raise ContractViolation(
            f"provider {self._name} and its guests never become quiet: {TURNS} turns were not enough; does a callback "
            "cause another call of itself each time (call_soon, a packet sent for every completion)?"
        )

    def _progress(self) -> list[object]:
        ends: list[Channel] = [*self.bus.offers, *(guest.channel for guest in self._guests.values())]
        return [(end.state, tuple(end.counters.values()), len(end.outstanding)) for end in ends]

    def _one_turn(self) -> bool:
        host = self.hosted.host
        if not host.busy and not self.bus.busy:
            self._raise_failures()
            return False
        with self._turn():
            if host.busy:
                host.run_soon()
            else:
                self.bus.service()
        return True

    def advance(self, seconds: float) -> None:
        """Run, then let virtual time pass; timers run out in their order, each followed by `run`."""
        self._pass_time(seconds, lambda: False)

    def _pass_time(self, seconds: float, enough: Callable[[], bool]) -> bool:
        end = self.now + seconds
        self.run()
        while not enough():
            due = self.hosted.host.next_due()
            if due is None or due > end:
                self.hosted.clock.now = max(self.now, end)
                return False
            with self._turn():
                self.hosted.host.fire_next()
            self.step("a timer")
            self.run()
        return True

    def wait_until(self, condition: Callable[[], bool], timeout: float = TIMEOUT, what: str = "a condition") -> None:
        """Run, and let virtual time pass until `condition()` holds: no longer than that takes. Raises WaitTimeout."""
        if not condition() and not self._pass_time(timeout, condition):
            raise WaitTimeout(what, timeout)

    def _wait(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        """How blocking calls wait: in virtual time."""
        deadline = self.now + timeout
        while not condition():
            if self._one_turn():
                continue
            due = self.hosted.host.next_due()
            if due is None or due > deadline:
                raise WaitTimeout(f"{what} (nothing is left to be done that could bring it)", timeout)
            with self._turn():
                self.hosted.host.fire_next()

    def waiting_for(self) -> str:
        """What may still happen, as the end of a message."""
        due = self.hosted.host.next_due()
        if due is None:
            return ""
        return f" (a timer of the provider runs out in {due - self.now:g} s: kit.advance())"

    def step(self, what: str) -> None:
        """A step of the script is done; `every_step` may save here."""
        if self._in_turn:
            return
        self.steps += 1
        self.last_step = what
        if self.save_at is not None and self.save_at(self.steps):
            self.save_restore()

    def _raise_failures(self) -> None:
        errors = self.hosted.errors
        if self._expected is not None:
            self._expected += [error for _, error in errors]
            errors.clear()
            self._failures.clear()
            return
        if errors:
            callback, error = errors[0]
            errors.clear()
            if not self._failures or self._last_exception.error is not error:
                self._failures.clear()
                error.add_note(f"raised by {callback} of provider {self._name}")
                raise error
        if not self._failures:
            return
        channel, reason = self._failures[0]
        self._failures.clear()
        cause, self._last_exception.error = self._last_exception.error, None
        raise ChannelFailed(channel.name, reason) from cause

    @contextmanager
    def expect_errors(self) -> Iterator[list[BaseException]]:
        """Inside, callbacks of the provider may raise, and channels fail for it: what was raised is in the list.

        Raises ContractViolation at the end when nothing was.
        """
        self._raise_failures()
        expected: list[BaseException] = []
        self._expected = expected
        try:
            yield expected
            self.run()
        finally:
            self._raise_failures()
            self._expected = None
        if not expected:
            raise ContractViolation(f"expected: a callback of provider {self._name} that raises; all went well")

    def expect_failure(self) -> str:
        """Run until a channel fails, and return the reason: for tests of what a provider does with bad packets.

        The channel is closed then, on both ends; the guest may open it again. Raises ContractViolation when none
        failed.
        """
        try:
            self.run()
        except ChannelFailed as failure:
            self.run()
            return failure.reason
        raise ContractViolation("expected: a channel that fails (Completion.fail); all went well")

    # ---- the guest -----------------------------------------------------------------------------------------------

    def guest(
        self,
        channel: str | UUID | int | None = None,
        *,
        instance: UUID | None = None,
        subchannel: int | None = None,
        ring_pages: int = RING_PAGES,
    ) -> Guest:
        """See `DeviceUnderTest.guest`; the same object every time. Here `channel` may also be a channel's name, or its
        number in the order of the offers.

        Raises UsageError when there is no such channel, or None is not enough.
        """
        offers = self.bus.offers
        if isinstance(channel, int):
            found = offers[channel : channel + 1]
        else:
            found = [
                one
                for one in offers
                if channel in (None, one.name, one.interface_type)
                and instance in (None, one.interface_instance)
                and subchannel in (None, one.subchannel_index)
            ]
        if len(found) != 1:
            raise UsageError(
                f"{'no' if not found else 'more than one'} channel is meant by {channel!r}; provider {self._name} "
                f"offers {[one.name for one in offers]}"
            )
        named = key(found[0])
        if named not in self._guests:
            end = ClientChannel(
                named[0],
                named[1],
                ring_pages_in=ring_pages,
                ring_pages_out=ring_pages,
                name=found[0].name,
                subchannel_index=named[2],
            )
            if found[0].is_pipe:
                end.set_flags(1)
            self._guests[named] = Guest(self, ChannelEnd(end, self.bus.open, self.bus.close))
        return self._guests[named]

    def open(
        self,
        channel: str | UUID | int | None = None,
        *,
        instance: UUID | None = None,
        subchannel: int | None = None,
        ring_pages: int = RING_PAGES,
        answer: Callable[[HostPacket], bytes | None] | None = None,
    ) -> Guest:
        """Open a channel, and run. Arguments as for `guest`; `answer` as in `Guest`."""
        guest = self.guest(channel, instance=instance, subchannel=subchannel, ring_pages=ring_pages)
        if answer is not None:
            guest.answer = answer
        guest.open()
        self.run()
        return guest

    def allocate(self, size: int) -> BufferPages:
        """Guest memory; tests use `Guest.memory`."""
        return BufferPages(self.bus.allocate(size), self.bus.free)  # type: ignore[arg-type]

    def request_channel(self, service: UUID, endpoint: UUID) -> int | None:
        """The guest asks for a channel (TL_CONNECT_REQUEST), and the kit runs. Returns the status with which that was
        refused; None: it was not so far, and the channel may be among `channels`."""
        refusals = self.hosted.host.refusals
        refusals.clear()
        with self._turn():
            self.hosted.host.connects.requested(m.ConnectRequest(endpoint, service))
        self.step("request_channel()")
        self.run()
        return next((one.status for one in refusals if (one.endpoint, one.service) == (endpoint, service)), None)

    @property
    def channels(self) -> list[ServerChannel]:
        """The provider's ends, in the order of the offers."""
        return self.bus.offers

    def _payloads(self, channel: ServerChannel) -> dict[int, bytes]:
        guest = self._guests.get(key(channel))
        return {} if guest is None else {one.transaction: one.payload for one in guest.requests}

    # ---- the host ------------------------------------------------------------------------------------------------

    def save_restore(self) -> Saved:
        """Save the provider and restore it in a fresh object, as when the VM moves to another process. Guests notice
        nothing; timers and calls of the old provider are gone.

        Raises ContractViolation for whatever the provider owes and does not do: see `vmbus.testkit.contract`.
        """
        return self._replace(moving=False)

    def migrate(self) -> Saved:
        """As `save_restore`, but that files stay where they are. Raises UsageError for files that are not shared."""
        return self._replace(moving=True)

    def _replace(self, *, moving: bool) -> Saved:
        before, self._in_turn = self._in_turn, True
        try:
            self.saves += 1
            return self.hosted.save_restore(moving=moving)
        finally:
            self._in_turn = before

    def in_flight(self) -> InFlight:
        """The device's packets in flight now."""
        offers = self.bus.offers
        return InFlight(sum(one.packets_queued for one in offers), sum(one.packets_sent for one in offers))

    def check_refuses(self, state: bytes) -> str:
        """A fresh provider must refuse these bytes with StateError, as it should refuse damage; returns its message.

        Raises ContractViolation when they are taken, or refused with another exception.
        """
        return self.hosted.check_refuses(state)

    def status(self) -> dict[str, Any]:
        """The provider's own status."""
        return self.provider.status()

    def command(self, name: str, /, seconds: float = TIMEOUT, **arguments: Any) -> dict[str, Any]:
        """A tool's command to the provider; the kit runs until it has answered. One step: a command does not outlive
        the process that it was given to.

        Raises what the provider raises, and ContractViolation when it has not answered after `seconds` of virtual time.
        """
        with self._turn():
            answer = self.provider.command(name, arguments)
            if not isinstance(answer, dict):
                try:
                    self.run()
                    self._wait(answer.done, seconds, f"the answer of provider {self._name} to command {name!r}")
                except WaitTimeout as error:
                    raise ContractViolation(str(error)) from error
                answer = answer.result(0)
        self.step(f"command {name!r}")
        return answer

    def transcript(self) -> dict[str, object]:
        """All that guests could tell, by channel."""
        return {guest.name: guest.transcript() for guest in self._guests.values()}

    # ---- the end -------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The device goes away: every channel is closed and the provider stopped.

        Raises ContractViolation when incoming packets stay uncompleted, or stop() leaves timers.
        """
        self.run()
        with self._turn():
            self.hosted.withdraw()
        self.hosted.watch.grown(self.provider)
        with self._turn():
            self.hosted.stop()
        self.hosted.check_stopped()
