"""`ProviderTest`: one provider under test; `every_step`: a script with a save and restore at every step of it."""

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from uuid import UUID

from vmbus.bus.local import LocalBus
from vmbus.bus.replacing import key_of
from vmbus.errors import StateError, UsageError, VmbusError, WaitTimeout
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.saved import ChannelRecord
from vmbus.kmcl.server import ServerChannel
from vmbus.providers import Provider, provider_class
from vmbus.server.files import copy_files, files_of, wanted_files
from vmbus.testkit import contract
from vmbus.testkit.client import Client
from vmbus.testkit.contract import ChannelFailed, ContractViolation, differing, shorten
from vmbus.testkit.host import Clock, FakeHost
from vmbus.testkit.watch import KitMemory, Watch
from vmbus.util.complaints import COMPLAINTS
from vmbus.wire import messages as m

INSTANCE = UUID("00000000-0000-4000-8000-000000000001")
DEFAULT_RING_PAGES = 4
# As the device server's pause: how long a provider may take, in virtual seconds, to complete what it holds.
PAUSE_TIMEOUT = 10.0
TURNS = 100_000

Key = tuple[UUID, UUID, int]


class Saved(NamedTuple):
    """What a save found: the provider's own bytes, and how many outgoing packets were in use."""

    state: bytes
    queued: int
    sent: int


class _LastException(logging.Handler):
    """Keeps the exception that a channel has caught from its owner and only logs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.error: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.error = record.exc_info[1]


class ProviderTest:
    """A provider, started, with a virtual host and the guest's ends of its channels. A context manager: leaving it
    without an exception calls `finish`.

    Attributes:
        provider: the provider; after a save and restore, another object.
        bus: what joins its channels with the clients.
        steps: steps of the script so far: the points at which `every_step` saves.
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
        self._class = provider_class(provider) if isinstance(provider, str) else provider
        self._options = dict(options or {})
        self._name = name or self._class.kind
        self._instance = instance
        self._pause_timeout = pause_timeout
        self._clock = Clock()
        self._clients: dict[Key, Client] = {}
        self._failures: list[tuple[Channel, str]] = []
        self._errors: list[tuple[str, BaseException]] = []
        self._expected: list[BaseException] | None = None
        self._in_turn = False
        self._save_at: Callable[[int], bool] | None = None
        self._last_exception = _LastException()
        self._scratch = tempfile.TemporaryDirectory(prefix="vmbus-testkit-")
        self.steps = 0
        self.last_step = "the start"
        self.saves = 0
        self.bus = LocalBus(waiter=self._wait)
        self.bus.server_memory = KitMemory()
        self._watch = Watch(self._class, self._name)
        self.bus.on_failed = lambda channel, reason: self._failures.append((channel, reason))
        self.provider: Provider
        self._host: FakeHost
        logging.getLogger("vmbus.kmcl").addHandler(self._last_exception)
        COMPLAINTS.refill()  # what earlier ones said must not be what this one cannot say
        self._start_provider()
        self._activate()

    def __enter__(self) -> "ProviderTest":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            logging.getLogger("vmbus.kmcl").removeHandler(self._last_exception)
            self._scratch.cleanup()

    def _start_provider(self) -> None:
        self._host = FakeHost(self._clock, self.bus, self._name, Path(self._scratch.name))
        self._host.faults.on_seen = self._errors.append
        with self._watch.turn("start()"):
            self.provider = self._class(self._host, self._name, self._instance, self._options)
            self.provider.start()

    def _activate(self) -> None:
        with self._watch.turn("activate()"):
            self.provider.activate()
        self._host.active = True

    def _deactivate(self) -> None:
        try:
            self.provider.deactivate()
        finally:
            self._host.active = False

    # ---- time and turns ------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Virtual seconds since the start."""
        return self._clock.now

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Code of the provider or of the clients runs: no point to save at."""
        before, self._in_turn = self._in_turn, True
        try:
            with self._watch.turn("a turn"):
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
            calls = self._host.busy
            if not self._one_turn():
                return
            # A restore wakes all channels: turns in which nothing moves are no steps, or a save at every step would
            # never come to an end.
            if calls or self._progress() != before:
                self.step("a turn of run()")
        raise ContractViolation(
            f"provider {self._name} and its clients never become quiet: {TURNS} turns were not enough; does a callback "
            "cause another call of itself each time (call_soon, a packet sent for every completion)?"
        )

    def _progress(self) -> list[object]:
        ends: list[Channel] = [*self.bus.offers, *(client.channel for client in self._clients.values())]
        return [(end.state, tuple(end.counters.values()), len(end.outstanding)) for end in ends]

    def _one_turn(self) -> bool:
        if not self._host.busy and not self.bus.busy:
            self._raise_failures()
            return False
        with self._turn():
            if self._host.busy:
                self._host.run_soon()
            else:
                self.bus.service()
        return True

    def advance(self, seconds: float) -> None:
        """Run, then let virtual time pass; timers run out in their order, each followed by `run`."""
        end = self._clock.now + seconds
        self.run()
        while (due := self._host.next_due()) is not None and due <= end:
            with self._turn():
                self._host.fire_next()
            self.step("a timer")
            self.run()
        self._clock.now = max(self._clock.now, end)

    def _wait(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        """How blocking calls wait: in virtual time."""
        deadline = self._clock.now + timeout
        while not condition():
            if self._one_turn():
                continue
            due = self._host.next_due()
            if due is None or due > deadline:
                raise WaitTimeout(f"{what} (nothing is left to be done that could bring it)", timeout)
            with self._turn():
                self._host.fire_next()

    def waiting_for(self) -> str:
        """What may still happen, as the end of a message."""
        due = self._host.next_due()
        if due is None:
            return ""
        return f" (a timer of the provider runs out in {due - self._clock.now:g} s: kit.advance())"

    def step(self, what: str) -> None:
        """A step of the script is done; `every_step` may save here."""
        if self._in_turn:
            return
        self.steps += 1
        self.last_step = what
        if self._save_at is not None and self._save_at(self.steps):
            self.save_and_restore()

    def _raise_failures(self) -> None:
        if self._expected is not None:
            self._expected += [error for _, error in self._errors]
            self._errors.clear()
            self._failures.clear()
            return
        if self._errors:
            callback, error = self._errors[0]
            self._errors.clear()
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

        The channel is closed then, on both ends; the client may open it again. Raises ContractViolation when none
        failed.
        """
        try:
            self.run()
        except ChannelFailed as failure:
            self.run()
            return failure.reason
        raise ContractViolation("expected: a channel that fails (Completion.fail); all went well")

    # ---- clients -------------------------------------------------------------------------------------------------

    def client(self, channel: str | UUID | int | None = None, *, ring_pages: int = DEFAULT_RING_PAGES) -> Client:
        """The guest's end of a channel that the provider offers; the same object every time.

        Args:
            channel: its name, interface type, or number in the order of the offers; None for the only one.
            ring_pages: data pages (4096 bytes) of each ring. Small rings make packets queue.

        Raises UsageError when there is no such channel, or None is not enough.
        """
        offers = self.bus.offers
        if isinstance(channel, int):
            found = offers[channel : channel + 1]
        else:
            found = [one for one in offers if channel in (None, one.name, one.interface_type)]
        if len(found) != 1:
            raise UsageError(
                f"{'no' if not found else 'more than one'} channel is meant by {channel!r}; provider {self._name} "
                f"offers {[one.name for one in offers]}"
            )
        key = _key(found[0])
        if key not in self._clients:
            end = ClientChannel(
                key[0],
                key[1],
                ring_pages_in=ring_pages,
                ring_pages_out=ring_pages,
                name=found[0].name,
                subchannel_index=key[2],
            )
            if found[0].is_pipe:
                end.set_flags(1)
            self._clients[key] = Client(self, end)
        return self._clients[key]

    def open(
        self,
        channel: str | UUID | int | None = None,
        *,
        ring_pages: int = DEFAULT_RING_PAGES,
        answer: Callable[[Any], bytes | None] | None = None,
    ) -> Client:
        """Open a channel, and run. Arguments as for `client`; `answer` as in `Client`."""
        client = self.client(channel, ring_pages=ring_pages)
        if answer is not None:
            client.answer = answer
        client.open()
        self.run()
        return client

    def request_channel(self, service: UUID, endpoint: UUID) -> int | None:
        """The guest asks for a channel (TL_CONNECT_REQUEST), and the kit runs. Returns the status with which that was
        refused; None: it was not so far, and the channel may be among `channels`."""
        refusals = self._host.refusals
        refusals.clear()
        with self._turn():
            self._host.connects.requested(m.ConnectRequest(endpoint, service))
        self.step("request_channel()")
        self.run()
        return next((one.status for one in refusals if (one.endpoint, one.service) == (endpoint, service)), None)

    @property
    def channels(self) -> list[ServerChannel]:
        """The provider's ends, in the order of the offers."""
        return self.bus.offers

    # ---- save and restore ----------------------------------------------------------------------------------------

    def save_and_restore(self) -> Saved:
        """Save the provider and restore it in a fresh object, as when the VM moves to another process. Clients notice
        nothing; timers and calls of the old provider are gone.

        Raises ContractViolation for whatever the provider owes and does not do: see `vmbus.testkit.contract`.
        """
        before, self._in_turn = self._in_turn, True
        try:
            return self._save_and_restore()
        finally:
            self._in_turn = before

    def _save_and_restore(self) -> Saved:
        self.saves += 1
        with self._watch.turn("the suspend callbacks"):
            self._quiesce("saved")
        self._watch.saved(self.provider)
        self._deactivate()
        old = list(self.bus.offers)
        directory = Path(self._scratch.name) / str(self.saves)
        directory.mkdir()
        copy_files(wanted_files([self.provider]), directory)
        records = self._save_channels()
        state = self._save_provider()
        packets = {_key(channel): contract.packets_of(channel) for channel in old}
        saved = Saved(
            state, sum(channel.packets_queued for channel in old), sum(channel.packets_sent for channel in old)
        )
        # What a process that ends does not do, the old objects shall not do either.
        self._host.abandon()

        def make() -> None:
            with self._watch.turn("stop()"):
                self.provider.stop()
            self._watch.stopped()
            self._host.abandon()
            self._start_provider()
            # Sub-channels come with restore().
            missing = {_key(one): one.name for one in old if not (one.subchannel_index or one.force_new_channel)}
            for one in self.bus.offers:
                missing.pop(_key(one), None)
            if missing:
                raise ContractViolation(
                    f"channels {sorted(missing.values())} of provider {self._name} were saved, and start() of a fresh "
                    "one does not make them; expected: the same channels (type and instance) from the same options"
                )

        early = b""
        chunks = {record.key: record.chunks for record in records}

        def before_packets() -> None:
            nonlocal early
            try:
                self.provider.check(state)
                self.provider.restore_files(files_of(self.provider, directory))
                self.provider.restore(state)
            except Exception as error:
                raise ContractViolation(
                    f"restore() of provider {self._name} refused what save() had returned ({shorten(state)}): {error}"
                ) from error
            early = self.provider.save()

        def after_packets() -> None:
            # A provider may complete its own state out of its packets: either moment will do.
            if early != state:
                contract.check_provider_state(self._name, state, self.provider.save())
            for channel in self.bus.offers:
                saved_as = chunks.get(key_of(channel))
                if saved_as is not None and not channel.force_new_channel:
                    contract.check_packets(channel, packets[_key(channel)])
                    contract.check_channel_state(channel, saved_as[1:], channel.save()[1:])
            self._activate()

        try:
            self.bus.replace(records, make, before_packets, after_packets)
        except (ContractViolation, WaitTimeout):
            raise
        except (StateError, VmbusError) as error:
            raise ContractViolation(str(error)) from error
        self._raise_failures()
        return saved

    def _quiesce(self, what: str) -> None:
        """Suspend every channel and see that what the provider holds gets completed."""
        channels = self.bus.offers
        for channel in channels:
            channel.quiesce()
        self._raise_failures()
        deadline = self._clock.now + self._pause_timeout
        while any(channel.outstanding for channel in channels) or self._host.jobs:
            due = self._host.next_due()
            if self._host.busy:
                self._host.run_soon()
            elif due is not None and due <= deadline:
                self._host.fire_next()
            elif any(channel.outstanding for channel in channels):
                self._complain(channels, what)
            self._raise_failures()

    def _complain(self, channels: list[ServerChannel], what: str) -> None:
        for channel in channels:
            channel.unquiesce()
        for channel in channels:
            if channel.outstanding:
                client = self._clients.get(_key(channel))
                sent = {} if client is None else {one.transaction: one.payload for one in client.requests}
                shown = ", ".join(
                    f"{number} ({shorten(sent[number])})" if number in sent else str(number)
                    for number in channel.outstanding[:8]
                )
                raise ContractViolation(
                    f"channel {channel.name} cannot be {what}: packets {shown} were handed to process_packet and are "
                    f"not completed {self._pause_timeout:g} s after the suspend callback; expected: "
                    "completion.complete() for each of them, in the suspend callback or soon after it"
                )

    def _save_provider(self) -> bytes:
        state = self.provider.save()
        if not isinstance(state, bytes):
            raise ContractViolation(f"save() of provider {self._name} returned {type(state).__name__}; expected: bytes")
        contract.check_save_is_repeatable(f"provider {self._name}", "save()", state, self.provider.save())
        return state

    def _save_channels(self) -> list[ChannelRecord]:
        try:
            records, again = self.bus.save(), self.bus.save()
        except VmbusError as error:
            raise ContractViolation(str(error)) from error
        for channel, one, other in zip(self.bus.offers, records, again, strict=True):
            contract.check_save_is_repeatable(f"channel {channel.name}", "the save callback", one.chunks, other.chunks)
        return records

    def check_refuses(self, state: bytes) -> str:
        """A fresh provider must refuse these bytes with StateError, as it should refuse damage; returns its message.

        Raises ContractViolation when they are taken, or refused with another exception.
        """
        host = FakeHost(Clock(), LocalBus(), self._name, Path(self._scratch.name))
        provider = self._class(host, self._name, self._instance, self._options)
        provider.start()
        what = "check()"
        try:
            provider.check(state)
            what = "restore()"
            provider.restore(state)
        except StateError as error:
            return str(error)
        except Exception as error:
            raise ContractViolation(
                f"{what} of provider {self._name} raised {error!r} for {shorten(state)}; expected: StateError"
            ) from error
        finally:
            provider.stop()
        raise ContractViolation(f"restore() of provider {self._name} took {shorten(state)}; expected: StateError")

    # ---- the end -------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The device goes away: every channel is closed and the provider stopped.

        Raises ContractViolation when incoming packets stay uncompleted, or stop() leaves timers.
        """
        self.run()
        with self._turn():
            self._quiesce("closed")
            for channel in self.bus.offers:
                self.bus.disabled(channel)
        self._watch.grown(self.provider)
        with self._turn():
            self._deactivate()
            self.provider.stop()
        if self._host.watched:
            raise ContractViolation(
                f"stop() of provider {self._name} leaves descriptors {self._host.watched} watched; expected: "
                "remove_reader() and remove_writer(), before they are closed"
            )
        due = self._host.next_due()
        if due is not None:
            raise ContractViolation(
                f"stop() of provider {self._name} leaves a timer that runs out in {due - self.now:g} s; expected: "
                "Timer.cancel() of every one"
            )
        self._watch.stopped()

    def command(self, name: str, /, seconds: float = 10.0, **arguments: Any) -> dict[str, Any]:
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
        return {client.name: client.transcript() for client in self._clients.values()}


def _key(channel: ServerChannel) -> Key:
    return channel.interface_type, channel.interface_instance, channel.subchannel_index


Script = Callable[[ProviderTest], Any]
Outcome = Callable[[ProviderTest, Any], Any]


def _everything(kit: ProviderTest, returned: Any) -> Any:
    return {"returned": returned, "guests": kit.transcript()}


def every_step(
    script: Script,
    provider: type[Provider] | str,
    *,
    options: Mapping[str, Any] | None = None,
    outcome: Outcome = _everything,
    points: Iterable[int] | None = None,
) -> int:
    """Run a script once as it is, then once per step of it with a save and restore at that step, then once with one at
    every step; each must come to the same outcome: the same answers, exactly once.

    Args:
        script: called with a fresh `ProviderTest`; must do the same every time (no real time, no random numbers).
        outcome: what is compared, from the kit and what the script returned; by default that and the transcripts of
            all clients.
        points: the steps to save at, from 1; None for all.

    Returns the number of runs with saves. Raises ContractViolation when an outcome differs, and what a run raised,
    with a note that says where the save was.
    """
    expected, steps, _ = _run(script, provider, options, outcome, None)
    chosen = range(1, steps + 1) if points is None else list(points)
    runs = 0
    for point in chosen:
        label = f"with a save and restore at step {point} of {steps}"
        runs += _compare(expected, _labelled(script, provider, options, outcome, {point}, label), label)
    label = "with a save and restore at every step"
    runs += _compare(expected, _labelled(script, provider, options, outcome, None, label), label)
    return runs


def _run(
    script: Script,
    provider: type[Provider] | str,
    options: Mapping[str, Any] | None,
    outcome: Outcome,
    save_at: Callable[[int], bool] | None,
    place: list[str] | None = None,
) -> tuple[Any, int, str]:
    with ProviderTest(provider, options=options) as kit:

        def asked(step: int) -> bool:
            if save_at is None or not save_at(step):
                return False
            if place is not None:
                place[:] = [kit.last_step]
            return True

        kit._save_at = asked
        result = outcome(kit, script(kit))
        kit._save_at = None
    return result, kit.steps, kit.last_step


def _labelled(
    script: Script,
    provider: type[Provider] | str,
    options: Mapping[str, Any] | None,
    outcome: Outcome,
    points: set[int] | None,
    label: str,
) -> tuple[Any, str]:
    place = ["?"]
    try:
        result, _, _ = _run(script, provider, options, outcome, lambda step: points is None or step in points, place)
    except Exception as error:
        error.add_note(f"{label}, after {place[0]}")
        raise
    return result, place[0]


def _compare(expected: Any, found: tuple[Any, str], label: str) -> int:
    result, place = found
    if result != expected:
        raise ContractViolation(f"{label}, after {place}, the outcome is another one: {difference(expected, result)}")
    return 1


def difference(expected: Any, found: Any, where: str = "") -> str:
    """The first place in which two outcomes differ, as text."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            if expected.get(key) != found.get(key):
                return difference(expected.get(key), found.get(key), f"{where}/{key}")
    if isinstance(expected, (list, tuple)) and isinstance(found, (list, tuple)):
        for index, (one, other) in enumerate(zip(expected, found, strict=False)):
            if one != other:
                return difference(one, other, f"{where}/{index}")
        return f"{where or 'the outcome'} has {len(found)} entries, and {len(expected)} without the save"
    if isinstance(expected, bytes) and isinstance(found, bytes):
        without, with_save = differing(expected, found)
        return f"{where or 'the outcome'} is {with_save}, and {without} without the save"
    return f"{where or 'the outcome'} is {found!r}, and {expected!r} without the save"
