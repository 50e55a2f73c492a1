"""The device server: transport, device and providers on one event loop, and what tools may ask of them.

What it does at the moment is its phase, and what leads to another one a table (`vmbus.server.phase`). What tools may
ask is a table too, of commands in rooms of their own. A client that migrates the device through the protocol is served
by `vmbus.server.driven`. The device with its providers is a session, which a saved state may replace by another one
(`vmbus.server.session`).

Providers come with the description, or later by the command `offer`; `rescind` withdraws one. The description that
`status` gives is always that of the providers which are there: a snapshot is restored with it.
"""

import asyncio
import contextlib
import select
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from vmbus.device import saved
from vmbus.device.description import DeviceDescription
from vmbus.device.device import Device
from vmbus.device.pci import ConfigSpace
from vmbus.errors import EnvironmentProblem, StateError, UsageError, VmbusError, WaitTimeout
from vmbus.providers import Provider
from vmbus.server import commands, lineup, restoring, suspending
from vmbus.server.control import ControlServer
from vmbus.server.driven import Driven
from vmbus.server.instruments import Instrument
from vmbus.server.phase import WORKING, Phase, Step, after, require
from vmbus.server.services import Services
from vmbus.server.session import Session
from vmbus.server.timers import Timers
from vmbus.server.turns import Turns
from vmbus.transport.context import Context, ResetKind, RunResult
from vmbus.transport.library import Library
from vmbus.util.complaints import bounded_log
from vmbus.util.listening import Listener
from vmbus.util.pieces import Pieces, at_once

log = bounded_log(__name__)

# Batches of requests handled before others get their turn on the loop.
_DRAIN_LIMIT = 10_000
TRANSPORT_SECONDS = 0.008
"""Time that requests of the client take in one turn, give or take a request."""
_ALONE_SECONDS = 30.0
_COMMANDS = commands.COMMANDS | suspending.COMMANDS | restoring.COMMANDS | lineup.COMMANDS


class DeviceServer:
    """One device. `run` serves until `stop`.

    Implements the transport's `DeviceHandler`, and what `driven` asks of a server.

    Attributes:
        library, config, loop, turns, driven: of this process.
        session: the device and its providers, now; `sessions`: how many there were.
        context: the transport; None before the beginning and after the end.
        instruments: what looks at its devices.
        restore, files: the state that awaits its restore-finish, and the directory with the files that belong to it.
        held_at_pause: incoming packets that providers had at the last pause. pausing: done when that is through.
    """

    def __init__(
        self,
        description: DeviceDescription,
        library: Library,
        socket_path: Path | Listener,
        control_path: Path | Listener,
        *,
        restore: saved.DeviceState | None = None,
        awaiting: bool = False,
        files: Path | None = None,
        instruments: Sequence[Instrument] = (),
        once: bool = False,
    ) -> None:
        """Builds the device and listens, at paths or on sockets that were handed over. `awaiting`: the device does
        nothing until `load` brings its state. `files`: the directory with the providers' files that belong to
        `restore`. `once`: it ends when its first client has gone.

        Raises StateError when `restore` is not of such a device (before anything listens), EnvironmentProblem for
        sockets and the library, UsageError for a wrong description.
        """
        if restore is not None and awaiting:
            raise UsageError("a server is started with a state or awaits one, not both")
        self.library = library
        self.config = ConfigSpace()
        self.loop = asyncio.get_running_loop()
        self.turns = Turns()
        self.began = time.monotonic()
        self.instruments = instruments
        self.restore = restore
        self.files = files
        self.held_at_pause = 0
        self.pausing: asyncio.Future[None] | None = None
        self.context: Context | None = None
        self._once = once
        self._run_directory = (
            (control_path.path if isinstance(control_path, Listener) else control_path).absolute().parent
        )
        self._in_transport = False
        # Held while something goes on that no other command may fall into.
        self._alone = asyncio.Lock()
        self._scheduled = False  # turns of channels will be given
        self._at_once = False  # by whoever is running now, without the event loop
        self._ended: asyncio.Future[None] = self.loop.create_future()
        self._commands = dict(_COMMANDS)
        for instrument in instruments:
            self._commands |= instrument.commands
        self.sessions = 1
        self.session = self._new_session(description)
        self._enter(Phase.AWAITING if awaiting else Phase.RUNNING if restore is None else Phase.RESTORING)
        self.session.build(from_snapshot=restore is not None or awaiting)
        if restore is not None:
            self.session.fit(restore)
        elif awaiting:
            self.device.freeze()
        self._control = ControlServer(control_path, self.command)
        self.driven = Driven(self)
        self.context = Context(library, socket_path, self, migration=self.driven)

    # ---- phases --------------------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        return self._phase

    def step(self, step: Step) -> None:
        """Go where it leads from here."""
        self._enter(after(self._phase, step))

    def _enter(self, phase: Phase) -> None:
        """Where providers do not work, no code of theirs runs but what we call: the state that is saved and guest
        memory must go on belonging together."""
        self._phase = phase
        if phase in WORKING:
            self.timers.thaw()
            self.services.thaw()
        else:
            self.timers.freeze()
            self.services.freeze()

    def run_on(self) -> None:
        """Phase `running`: providers own their outside resources, channels are released and get their turns.

        Raises EnvironmentProblem, and changes nothing, if a provider cannot take its outside resources.
        """
        self.activate()
        self.step(Step.RUN)
        self.note("running")
        for channel in self.device.channels:
            channel.unquiesce()
        self.device.thaw()

    def note(self, event: str) -> None:
        """Something that people want to see between the packets."""
        for observer in self.device.observers:
            observer.note(event)

    # ---- the session -----------------------------------------------------------------------------------------------

    @property
    def device(self) -> Device:
        return self.session.device

    @property
    def description(self) -> DeviceDescription:
        """What is there now, providers that came later included."""
        return self.session.description

    @property
    def providers(self) -> list[Provider]:
        """The providers of the present session, in the order of the description."""
        return self.session.providers

    @property
    def timers(self) -> Timers:
        """What the providers of the present session have scheduled."""
        return self.session.timers

    @property
    def services(self) -> Services:
        """What the providers of the present session have watched and done on other threads."""
        return self.session.services

    def activate(self) -> None:
        """All providers own their outside resources from here on. Raises EnvironmentProblem; then none took any."""
        self.session.activate()

    def deactivate(self) -> None:
        """The providers have given up their outside resources. Raises EnvironmentProblem or WaitTimeout."""
        self.session.deactivate()

    def ends_with_faults(self, tell: Callable[[BaseException], None]) -> AbstractContextManager[None]:
        """Inside, somebody waits for providers: `tell` is told the cause when one raises that holds something."""
        return self.session.ends_with_faults(tell)

    def _new_session(self, description: DeviceDescription, *, observed: bool = True) -> Session:
        timers = Timers(self.loop, self.turns)
        services = Services(self.loop, self.turns)
        device = Device(
            self._interrupt,
            self.schedule,
            waiter=self.wait,
            carrier=services.call_from_thread,
            later=timers.call_later,
            local_schedule=self.schedule,
        )
        for instrument in self.instruments if observed else ():
            if (observer := instrument.observer(description.name)) is not None:
                device.add_observer(observer)
        return Session(description, device, timers, services, self._run_directory)

    def fitting_session(
        self, state: saved.DeviceState, wanted: DeviceDescription, *, observed: bool = True
    ) -> Pieces[Session]:
        """A fresh device, standing still, to which the state fits. Raises StateError or UsageError."""
        session = self._new_session(wanted, observed=observed)
        session.timers.freeze()
        session.services.freeze()
        try:
            # Code that runs here already was chosen by the owner of this server; what a state asks for was not.
            trusted = {one.kind for one in self.description.providers}
            yield from session.building(from_snapshot=True, trusted=trusted)
            try:
                yield from session.fitting(state)
            except BaseException:
                session.end()
                raise
        except VmbusError:
            raise
        except Exception as error:
            log.exception("the device in a state could not be built")
            raise StateError(f"load: a provider of the state could not be started: {error!r}") from error
        return session

    def changing_session(
        self,
        state: saved.DeviceState,
        wanted: DeviceDescription,
        before: Callable[[], None] = lambda: None,
        taken: Callable[[], None] = lambda: None,
    ) -> Pieces[None]:
        """Put a fresh device, to which the state fits, in the place of the present one; it stands still.

        Raises StateError or UsageError, and changes nothing then.

        `before`: called when all is checked and the present session is about to end; what it raises is a refusal.
        `taken`: called when another one is in its place.
        """
        session = yield from self.fitting_session(state, wanted)
        try:
            before()
        except BaseException:
            session.end()
            raise
        ended, self.session = self.session, session
        session.inherit(ended)
        self.sessions += 1
        taken()
        with self.client_waits():
            try:
                yield from ended.ending()
            finally:
                ended.device.memory.move_to(session.device.memory)

    def change_session(self, state: saved.DeviceState) -> None:
        """All of `changing_session` at once, with the present description."""
        at_once(self.changing_session(state, self.description))

    # ---- the event loop ----------------------------------------------------------------------------------------------

    async def run(self, ready: Callable[[], None]) -> None:
        """Serve until `stop`; `ready` is called when both sockets listen."""
        context = self.context
        assert context is not None
        try:
            await self._control.start()
            if self.phase is Phase.RUNNING:
                self.activate()
            self.loop.add_reader(context.poll_fd(), self._on_client)
            ready()
            await self._ended
        finally:
            self.loop.remove_reader(context.poll_fd())
            await self._control.close()
            self.session.stop()
            context.close()
            self.context = None
            for instrument in self.instruments:
                instrument.close()

    def stop(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    def _on_client(self) -> None:
        """The client has something for us. Channels that it signals have their turns right after that: to go round the
        event loop first would cost a good part of a doorbell."""
        self._at_once = True
        try:
            self.turns.run("requests of the client", self._on_transport)
        finally:
            self._at_once = False
        if self._scheduled:
            self.turns.run("turns of channels", self._service)

    def _on_transport(self) -> None:
        try:
            self.run_transport()
            if self.context is not None and self.context.deserted:
                self.stop()
        except Exception as error:
            log.exception("the transport failed")
            if not self._ended.done():
                self._ended.set_exception(EnvironmentProblem(f"the vfio-user transport failed: {error!r}"))

    def run_transport(self) -> RunResult:
        """Handle some of what the client asks."""
        assert self.context is not None
        # From inside a wait this may be called while no request is being handled, and only then.
        self._in_transport = True
        try:
            with self.device.backlog.turn():
                return self.context.run(seconds=TRANSPORT_SECONDS)
        finally:
            self._in_transport = False

    def schedule(self) -> None:
        """Have channels given their turns soon."""
        if not self._scheduled:
            self._scheduled = True
            if not self._at_once:
                self.loop.call_soon(self.turns.run, "turns of channels", self._service)

    def _service(self) -> None:
        self._scheduled = False
        self.device.service()
        if self.device.local_bus.busy and self.phase in WORKING:
            self.device.local_bus.service()

    def wait(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        """Serve until `condition()` holds: how blocking calls of a provider wait, in a callback or a timer.

        The guest's requests, turns of channels and timers go on meanwhile, also those of other providers; the event
        loop (and so the control socket) does not. The channel in whose packet callback this is called takes no further
        packets until it returns.

        Raises WaitTimeout after `timeout` seconds, saying `what`; UsageError from inside a request of the guest's
        (state callbacks, such as opened and closed), which has to be answered first.
        """
        if condition():
            return
        if self._in_transport or self.context is None:
            raise UsageError(
                f"cannot wait for {what} here: a request of the guest's is being handled (state callbacks run in it); "
                "do it from a packet callback, a completion routine or a timer"
            )
        poller = select.poll()
        poller.register(self.context.poll_fd(), select.POLLIN)
        poller.register(self.services.fileno(), select.POLLIN)
        deadline = time.monotonic() + timeout
        while True:
            self._on_transport()
            self.timers.run_due()
            self.services.run_ready()
            self._service()
            if condition():
                return
            left = deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeout(what, timeout)
            if self._ended.done():
                raise EnvironmentProblem(f"the device server is ending: nothing is left to wait for ({what})")
            if not self.device.busy and not self.device.local_bus.busy:
                due = self.timers.next_in()
                poller.poll(1000 * (left if due is None else min(left, due)) + 1)

    def _interrupt(self) -> None:
        if self.context is not None and self.config.msi_enabled and self.config.bus_master:
            self.context.trigger(0)

    # ---- DeviceHandler -------------------------------------------------------------------------------------------

    def bar0_read(self, offset: int, size: int) -> bytes:
        return self.device.bar_read(offset, size)

    def bar0_write(self, offset: int, data: bytes) -> None:
        self.device.bar_write(offset, data)

    def config_read(self, offset: int, size: int) -> bytes:
        return self.config.read(offset, size)

    def config_write(self, offset: int, data: bytes) -> None:
        self.config.write(offset, data)

    def dma_map(self, iova: int, view: memoryview, writable: bool) -> None:
        self.device.memory.map(iova, view, writable)

    def dma_map_unreachable(self, iova: int, size: int) -> None:
        """The guest gives memory that we cannot map: touching it is a fault of the guest's."""
        log.debug("memory at %#x+%#x cannot be mapped here", iova, size)

    def dma_unmap(self, iova: int, size: int) -> None:
        """The guest takes memory back."""
        self.device.memory.unmap(iova, size)

    def reset(self, kind: ResetKind) -> None:
        log.debug("reset: %s", kind.name)
        self.device.reset()
        self.config.reset()
        self.driven.reset(kind)
        if self._once and kind is ResetKind.LOST_CONNECTION:
            self.stop()

    # ---- commands ------------------------------------------------------------------------------------------------

    async def command(self, name: str, arguments: dict[str, Any]) -> commands.Answer:
        """Do what a tool asks. Raises UsageError for what there is not, or not now; and what the command raises."""
        command = self._commands.get(name)
        if command is None:
            raise UsageError(f"there is no command {name!r}; known: {', '.join(sorted(self._commands))}")
        asked = command.decode(name, arguments)
        if command.phases:
            require(self.phase, command.phases, name)

        async def work() -> commands.Answer:
            return await command.do(self, asked)

        return await self.turns.steps(f"command {name}", work())

    @property
    def changing(self) -> bool:
        """Whether a command is under way that adds, withdraws, pauses, saves or restores."""
        return self._alone.locked()

    @contextlib.asynccontextmanager
    async def alone(
        self, command: str, phases: tuple[Phase, ...], seconds: float = _ALONE_SECONDS
    ) -> AsyncIterator[None]:
        """Inside, no other command of this sort is under way, and the phase was one of these at the beginning.

        Raises UsageError; WaitTimeout after `seconds` of another such command.
        """
        require(self.phase, phases, command)
        try:
            await asyncio.wait_for(self._alone.acquire(), seconds if self._alone.locked() else None)
        except TimeoutError:
            others = "offer, rescind, pause, save, load or restore-finish"
            raise WaitTimeout(f"another command to end before {command} ({others})", seconds) from None
        try:
            require(self.phase, phases, command)
            yield
        finally:
            self._alone.release()

    @contextlib.contextmanager
    def client_waits(self) -> Iterator[None]:
        """Nothing that the client asks is done inside: what belongs together is read or written in several turns."""
        assert self.context is not None
        fd = self.context.poll_fd()
        self.loop.remove_reader(fd)
        try:
            yield
        finally:
            if self.context is not None:
                self.loop.add_reader(fd, self._on_client)

    def drain(self) -> None:
        """Handle all that the client has asked so far. Raises EnvironmentProblem if it asks without end."""
        for _ in range(_DRAIN_LIMIT):
            if self.run_transport() is not RunResult.MORE:
                return
        raise EnvironmentProblem("the client sends requests without end; stop the vCPUs before pausing the device")
