"""The device server: transport, device and providers on one event loop, and what tools may ask of them.

Phases: `running`; `pausing` while providers finish what they hold, and then `paused` until resume, when it can be
saved; `awaiting` from a start that announces a state until `load` brings it; `restoring` from the start with saved
state, or from `load`, until restore-finish, when QEMU has loaded the guest and its PCI function has been put back;
`driven` while a client that migrates the device through the protocol keeps it stopped (see driven.py).

`load` is also how a running device goes back to an earlier state: its present life is discarded (see life.py).

Providers come with the description, or later by the command `offer`; `rescind` withdraws one. The description that
`status` gives is always that of the providers which are there: a snapshot is restored with it.
"""

import asyncio
import contextlib
import functools
import hashlib
import inspect
import os
import select
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec

import vmbus
from vmbus.bus.offers import Offer
from vmbus.bus.replacing import channel_name
from vmbus.device import saved
from vmbus.device.description import DeviceDescription
from vmbus.device.device import Device
from vmbus.errors import EnvironmentProblem, PeerError, StateError, UsageError, VmbusError, WaitTimeout
from vmbus.kmcl.server import ServerChannel
from vmbus.memory.guest import DirtyLogBroken
from vmbus.native.choice import CORE
from vmbus.observe.audit.files import make_directory, recorder_in
from vmbus.observe.capture.capture import DEFAULT_EXTERNAL, Capture, CaptureOptions
from vmbus.observe.inspection.collect import Listing, inspect_device
from vmbus.observe.inspection.document import DEFAULT_PACKETS, ServerInfo, as_answer
from vmbus.providers import Provider
from vmbus.providers.faults import ProviderRaised
from vmbus.server.control import ControlServer
from vmbus.server.driven import Driven
from vmbus.server.files import copy_files, files_of, wanted_files
from vmbus.server.interrupt import bounded
from vmbus.server.life import Life
from vmbus.server.phase import Phase
from vmbus.server.services import Services
from vmbus.server.timers import Timers
from vmbus.server.turns import Turns
from vmbus.transport.context import (
    AddressNotMapped,
    ClientBusy,
    ClientGone,
    ClientRefused,
    Context,
    ResetKind,
    RunResult,
)
from vmbus.transport.library import Library
from vmbus.transport.pci import ConfigSpace
from vmbus.util.complaints import COMPLAINTS, bounded_log
from vmbus.util.explaining import explain
from vmbus.util.pieces import Pieces, at_once, in_turns

log = bounded_log(__name__)

# Batches of requests handled before others get their turn on the loop.
_DRAIN_LIMIT = 10_000
_FLUSH_TRIES = 100
TRANSPORT_SECONDS = 0.008
"""Time that requests of the client take in one turn, give or take a request."""
_LONGEST_PAUSE = 3600.0  # seconds
_OFFER_SECONDS = 30.0
_TAKE_AGAIN = 0.05  # seconds between tries to take outside resources that somebody else still has


class DeviceServer:
    """One device. `run` serves until `stop`.

    Implements the transport's `DeviceHandler`.
    """

    def __init__(
        self,
        description: DeviceDescription,
        library: Library,
        socket_path: Path,
        control_path: Path,
        *,
        restore: saved.DeviceState | None = None,
        awaiting: bool = False,
        files: Path | None = None,
        audit: Path | None = None,
        capture: Path | None = None,
        external: int = DEFAULT_EXTERNAL,
    ) -> None:
        """Builds the device and listens. `awaiting`: the device does nothing until `load` brings its state.
        `files`: the directory with the providers' files that belong to `restore`.
        `audit`: the directory for audit records, made if need be; None: nothing is recorded.
        `capture`: the file for a capture of all packets from the beginning on (docs/capture.md); None: no capture yet.
        `external`: bytes that it copies of each packet's external data.

        Raises StateError when `restore` is not of such a device (before anything listens), EnvironmentProblem for
        sockets and the library, UsageError for a wrong description.
        """
        if restore is not None and awaiting:
            raise UsageError("a server is started with a state or awaits one, not both")
        self.library = library
        self._phase = Phase.AWAITING if awaiting else Phase.RUNNING if restore is None else Phase.RESTORING
        self.config = ConfigSpace()
        self._loop = asyncio.get_running_loop()
        self._run_directory = control_path.absolute().parent
        self._turns = Turns()
        self._in_transport = False
        # Held while providers come and go, so that no pause falls into it.
        self._changing = asyncio.Lock()
        self._scheduled = False  # turns of channels will be given
        self._at_once = False  # by whoever is running now, without the event loop
        self._restore = restore
        self._files = files
        self._held_at_pause = 0
        self._quiet: asyncio.Future[None] | None = None
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._audit = audit
        self._began = time.monotonic()
        self._lives = 1
        if audit is not None:
            make_directory(audit)
        self._capture: Capture | None = (
            None if capture is None else Capture(capture.absolute(), CaptureOptions(external=external))
        )
        self._life = self._new_life(description)
        self.phase = self._phase
        self._life.build(from_snapshot=restore is not None or awaiting)
        if restore is not None:
            self._life.fit(restore)
        elif awaiting:
            self.device.freeze()
        self._control = ControlServer(control_path, self._command)
        self.driven = Driven(self)
        self._context: Context | None = Context(library, socket_path, self, migration=self.driven)

    @property
    def phase(self) -> Phase:
        """What the server does at the moment. Where that is nothing, no code of a provider runs but what we call: the
        state that is saved and guest memory must go on belonging together."""
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._phase = phase
        if phase in _WORKING:
            self.timers.thaw()
            self.services.thaw()
        else:
            self.timers.freeze()
            self.services.freeze()

    @property
    def device(self) -> Device:
        """The device of the present life."""
        return self._life.device

    @property
    def description(self) -> DeviceDescription:
        """What is there now, providers that came later included."""
        return self._life.description

    @property
    def providers(self) -> list[Provider]:
        """The providers of the present life, in the order of the description."""
        return self._life.providers

    @property
    def timers(self) -> Timers:
        """What the providers of the present life have scheduled."""
        return self._life.timers

    @property
    def services(self) -> Services:
        """What the providers of the present life have watched and done on other threads."""
        return self._life.services

    @property
    def changing(self) -> bool:
        """Whether a command is under way that adds, withdraws or pauses providers."""
        return self._changing.locked()

    # ---- life ----------------------------------------------------------------------------------------------------

    def _new_life(self, description: DeviceDescription, *, recorded: bool = True) -> Life:
        timers = Timers(self._loop, self._turns)
        services = Services(self._loop, self._turns)
        device = Device(
            self._interrupt,
            self._schedule,
            waiter=self.wait,
            carrier=services.call_from_thread,
            later=timers.call_later,
            local_schedule=self._schedule,
        )
        if self._audit is not None and recorded:
            device.recorder = recorder_in(self._audit, "host", description.name)
        device.set_capture(self._capture)
        return Life(description, device, timers, services, self._run_directory)

    async def run(self, ready: Callable[[], None]) -> None:
        """Serve until `stop`; `ready` is called when both sockets listen."""
        context = self._context
        assert context is not None
        try:
            await self._control.start()
            if self.phase is Phase.RUNNING:
                self._life.activate()
            self._loop.add_reader(context.poll_fd(), self._on_client)
            ready()
            await self._ended
        finally:
            self._loop.remove_reader(context.poll_fd())
            await self._control.close()
            self._life.stop()
            context.close()
            self._context = None
            if self._capture is not None:
                self._capture.stop()

    def stop(self) -> None:
        """End `run`."""
        if not self._ended.done():
            self._ended.set_result(None)

    def _on_client(self) -> None:
        """The client has something for us. Channels that it signals have their turns right after that: to go round the
        event loop first would cost a good part of a doorbell."""
        self._at_once = True
        try:
            self._turns.run("requests of the client", self._on_transport)
        finally:
            self._at_once = False
        if self._scheduled:
            self._turns.run("turns of channels", self._service)

    def _on_transport(self) -> None:
        try:
            self._run_transport()
        except Exception as error:
            log.exception("the transport failed")
            if not self._ended.done():
                self._ended.set_exception(EnvironmentProblem(f"the vfio-user transport failed: {error!r}"))

    def _run_transport(self) -> RunResult:
        assert self._context is not None
        # From inside a wait this may be called while no request is being handled, and only then.
        self._in_transport = True
        try:
            with self.device.backlog.turn():
                return self._context.run(seconds=TRANSPORT_SECONDS)
        finally:
            self._in_transport = False

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            if not self._at_once:
                self._loop.call_soon(self._turns.run, "turns of channels", self._service)

    def _service(self) -> None:
        self._scheduled = False
        self.device.service()
        if self.device.local_bus.busy and self.phase in _WORKING:
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
        if self._in_transport or self._context is None:
            raise UsageError(
                f"cannot wait for {what} here: a request of the guest's is being handled (state callbacks run in it); "
                "do it from a packet callback, a completion routine or a timer"
            )
        poller = select.poll()
        poller.register(self._context.poll_fd(), select.POLLIN)
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
        if self._context is not None and self.config.msi_enabled and self.config.bus_master:
            self._context.trigger(0)

    # ---- DeviceHandler -------------------------------------------------------------------------------------------

    def bar0_read(self, offset: int, size: int) -> bytes:
        """A register of BAR0."""
        return self.device.bar_read(offset, size)

    def bar0_write(self, offset: int, data: bytes) -> None:
        """A register of BAR0."""
        self.device.bar_write(offset, data)

    def config_read(self, offset: int, size: int) -> bytes:
        """Configuration space."""
        return self.config.read(offset, size)

    def config_write(self, offset: int, data: bytes) -> None:
        """Configuration space."""
        self.config.write(offset, data)

    def dma_map(self, iova: int, view: memoryview, writable: bool) -> None:
        """The guest gives memory."""
        self.device.memory.map(iova, view, writable)

    def dma_map_unreachable(self, iova: int, size: int) -> None:
        """The guest gives memory that we cannot map: touching it is a fault of the guest's."""
        log.debug("memory at %#x+%#x cannot be mapped here", iova, size)

    def dma_unmap(self, iova: int, size: int) -> None:
        """The guest takes memory back."""
        self.device.memory.unmap(iova, size)

    def reset(self, kind: ResetKind) -> None:
        """The function is reset, or the client is gone."""
        log.debug("reset: %s", kind.name)
        self.device.reset()
        self.config.reset()
        self.driven.reset(kind)

    # ---- commands ------------------------------------------------------------------------------------------------

    async def _command(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        handler = _COMMANDS.get(command)
        if handler is None:
            raise UsageError(f"there is no command {command!r}; known: {', '.join(sorted(_COMMANDS))}")
        try:
            bound = inspect.signature(handler).bind(self, **arguments)
        except TypeError as error:
            raise UsageError(f"{command} does not take the arguments {sorted(arguments)}: {error}") from error
        work: Coroutine[Any, Any, dict[str, Any]] = handler(*bound.args, **bound.kwargs)
        return await self._turns.steps(f"command {command}", work)

    def _require(self, phase: Phase, command: str) -> None:
        if self.phase is not phase:
            raise UsageError(f"{command} needs a server that is {phase.value}; this one is {self.phase.value}")

    def _packets(self) -> dict[str, int]:
        channels = self.device.channels
        return {
            "queued": sum(channel.packets_queued for channel in channels),
            "sent": sum(channel.packets_sent for channel in channels),
        }

    async def _status(self) -> dict[str, Any]:
        return {
            "device": self.description.name,
            "version": vmbus.__version__,
            "libvfio_user": self.library.description,
            "pid": os.getpid(),
            "phase": self.phase.value,
            "connected": self._context is not None and self._context.attached,
            "driven_by_client": self._context is not None and self._context.driven_by_client,
            "migration": {"state": self.driven.state.name.lower(), "complete": self.driven.complete},
            "bus": self.device.bus.state.value,
            "resets": self.device.resets,
            "packets": self._packets(),
            "incoming_held": sum(len(channel.outstanding) for channel in self.device.channels),
            "core": CORE,
            "requests": self.device.allowance.summary(),
            "internal_errors": self.device.internal_errors,
            "providers": self._life.status(),
            "faults": self._life.faults(),
            "bounds": self._life.bounds(),
            "longest_turn": self._turns.summary(),
            "complaints": COMPLAINTS.summary(),
            "description": msgspec.to_builtins(self.description),
        }

    async def _inspect(self, packets: int = DEFAULT_PACKETS, channels: list[str] | None = None) -> dict[str, Any]:
        """Everything about the device, see `vmbus.observe.inspection`.

        `packets`: how many of each sort are listed for each channel; 0: they are only counted. `channels`: of which
        channels, by name; None: of all.
        """
        if isinstance(packets, bool) or not isinstance(packets, int) or packets < 0:
            raise UsageError(f"inspect: packets is a number from 0, not {packets!r}")
        if channels is not None and not (isinstance(channels, list) and all(isinstance(one, str) for one in channels)):
            raise UsageError(f"inspect: channels is a list of names, not {channels!r}")
        context = self._context
        document = inspect_device(
            self.description.name,
            self.config.snapshot(),
            self.device,
            self.providers,
            self._life.hosts,
            Listing(packets, channels),
        )
        document.description = msgspec.to_builtins(self.description)
        document.server = ServerInfo(
            pid=os.getpid(),
            version=vmbus.__version__,
            libvfio_user=self.library.description,
            phase=self.phase.value,
            connected=context is not None and context.attached,
            driven_by_client=context is not None and context.driven_by_client,
            migration={"state": self.driven.state.name.lower(), "complete": self.driven.complete},
            life=self._lives,
            resets=self.device.resets,
            uptime=time.monotonic() - self._began,
            longest_turn=self._turns.summary(),
            complaints=COMPLAINTS.summary(),
            core=CORE,
            requests=self.device.allowance.summary(),
        )
        return as_answer(document)

    async def _pci(self) -> dict[str, Any]:
        return {"config": self.config.snapshot().hex(), "bar0": self.config.bar0_address}

    async def _audit_flush(self) -> dict[str, Any]:
        """Write the audit record up to now, and say which it is."""
        recorder = self.device.recorder
        if recorder is None:
            return {"on": False}
        position = recorder.flush("asked for")
        return {"on": True, "uid": recorder.uid, "position": position, "path": recorder.path, "failed": recorder.failed}

    async def _capture_start(self, path: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """Capture packets into a new file, or into a FIFO that is read; see docs/capture.md."""
        if not isinstance(path, str):
            raise UsageError(f"capture-start: path is a string, not {path!r}")
        try:
            wanted = msgspec.convert(options or {}, CaptureOptions)
        except msgspec.ValidationError as error:
            raise UsageError(f"capture-start: {error}") from error
        if self._capture is not None and self._capture.status()["running"]:
            raise UsageError(f"a capture is running already, to {self._capture.path}; stop that first (capture-stop)")
        self._capture = Capture(Path(path), wanted)
        self.device.set_capture(self._capture)
        return self._capture.status()

    async def _capture_stop(self) -> dict[str, Any]:
        """End the capture and write what is left of it. Its figures, also if it had ended by itself."""
        capture = self._capture
        if capture is None:
            raise UsageError("there is no capture to stop")
        self.device.set_capture(None)
        await asyncio.to_thread(capture.let_go())
        if self._capture is capture:
            self._capture = None
        return capture.status()

    async def _capture_status(self) -> dict[str, Any]:
        """How the capture goes; `running` is False, and nothing else is told, without one."""
        return {"running": False} if self._capture is None else self._capture.status()

    def _note(self, event: str) -> None:
        """Something that people want to see in a capture, between the packets."""
        if self._capture is not None:
            self._capture.note(event)

    async def _log_start(self) -> dict[str, Any]:
        self.device.memory.start_log()
        return {}

    async def _log_stop(self) -> dict[str, Any]:
        self.device.memory.stop_log()
        return {}

    async def _pause(self, seconds: float = 10.0) -> dict[str, Any]:
        """Take no new packets, and wait until providers have completed those that they hold."""
        _check_seconds("pause", seconds)
        self._require(Phase.RUNNING, "pause")
        async with self._no_changes("pause", seconds):
            self._require(Phase.RUNNING, "pause")
            return await self._pause_now(seconds)

    async def _pause_now(self, seconds: float) -> dict[str, Any]:
        started = time.monotonic()
        # What the guest wrote to registers before it was stopped must be seen before the state is taken.
        self._drain()
        while self.device.backlog:  # noqa: ASYNC110 - each turn does a part of it
            await asyncio.sleep(0)
        channels = self.device.channels
        self._held_at_pause = sum(len(channel.outstanding) for channel in channels)
        self.device.freeze()
        self.phase = Phase.PAUSING
        self._quiet = quiet = self._loop.create_future()
        waiting = len(channels)

        def one_quiet() -> None:
            nonlocal waiting
            waiting -= 1
            if not waiting and not quiet.done():
                quiet.set_result(None)

        for channel in channels:
            channel.quiesce()
            channel.when_quiet(one_quiet)
        try:
            with self._life.ends_with_faults(functools.partial(_fail, quiet)):
                if channels:
                    await asyncio.wait_for(quiet, seconds)
            await self.services.idle(started + seconds - time.monotonic())
            if self.phase is not Phase.PAUSING:
                raise UsageError(_CALLED_OFF)
            self._life.deactivate()
            files = sorted(wanted_files(self.providers))
            self.phase = Phase.PAUSED
            self._note("paused")
        except TimeoutError:
            missing = {channel.name: channel.outstanding[:8] for channel in channels if channel.outstanding}
            raise WaitTimeout(f"the owners of channels to complete incoming packets {missing}", seconds) from None
        finally:
            if self.phase is Phase.PAUSING:
                self.run_on()
        # Whoever saves now has to allow for the time that the copies of these take.
        return {"incoming_held": self._held_at_pause, "files": files, "seconds": time.monotonic() - started}

    def _drain(self) -> None:
        for _ in range(_DRAIN_LIMIT):
            if self._run_transport() is not RunResult.MORE:
                return
        raise EnvironmentProblem("the client sends requests without end; stop the vCPUs before pausing the device")

    async def _save(
        self, path: str, files: str | None = None, seconds: float = 30.0, durable: bool = True, moving: bool = False
    ) -> dict[str, Any]:
        """Write the state into a new file: if the client migrates the device, the one that it reads.

        `files`: the directory for copies of the providers' files. `seconds`: what the providers' callbacks may take.
        `durable`: the file is on the disk when this answers, as it has to be unless it only lives for a while, or the
        caller sees to that. `moving`: for a live migration, which takes no files along.
        """
        _check_seconds("save", seconds)
        given = self.driven.given if self.phase is Phase.DRIVEN else None
        if given is None:
            self._require(Phase.PAUSED, "save")
        if not isinstance(path, str) or not isinstance(files, str | None):
            raise UsageError(f"save: path and files are strings, not {path!r} and {files!r}")
        started = time.monotonic()
        sizes: dict[str, int] = {}
        if given is not None:
            state, data = saved.decode(given), given
        else:
            wanted = wanted_files(self.providers, moving=moving)
            if wanted and files is None:
                raise UsageError(
                    f"the files {sorted(map(str, wanted.values()))} of providers belong to the device's state, and "
                    "nothing takes them along here"
                )
            if wanted:
                assert files is not None
                sizes = await asyncio.to_thread(copy_files, wanted, Path(files))
                try:
                    self._require(Phase.PAUSED, "save")
                except UsageError:  # resumed meanwhile: what was copied may be of no moment at all
                    for name in sizes:
                        (Path(files) / name).unlink(missing_ok=True)
                    raise
            async with self._no_changes("save", seconds):
                self._require(Phase.PAUSED, "save")
                state, data = await self._state(seconds)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except (OSError, ValueError) as error:
            raise EnvironmentProblem(f"cannot write device state to {path!r}: {error}") from error
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(path)  # noqa: PTH108 - one call on a local file
            raise EnvironmentProblem(f"cannot write device state to {path!r}: {error}") from error
        self._note("saved")
        counts = saved.count_packets(state)
        return {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "files": sizes,
            "packets": {"queued": counts.queued, "sent": counts.sent},
            "completions_queued": counts.completions,
            "incoming_held": self._held_at_pause if given is None else self.driven.held,
            "config": self.config.snapshot().hex(),
            "description": msgspec.to_builtins(self.description),
            "seconds": time.monotonic() - started,
        }

    async def _state(self, seconds: float) -> tuple[saved.DeviceState, bytes]:
        deadline = time.monotonic() + seconds

        def around() -> AbstractContextManager[None]:
            return bounded(seconds, "the providers to give their state", deadline - time.monotonic())

        name, config = self.description.name, self.config.snapshot()
        with self._client_waits():
            state = await in_turns(saved.saving(name, config, self.device, self.providers), around)
            await asyncio.sleep(0)
            data = saved.encode(state)
            await asyncio.sleep(0)
            # What cannot be restored was not saved, and is said now, while the guest is still there.
            return await in_turns(saved.verifying(data, self.providers), around), data

    async def _flush(self) -> dict[str, Any]:
        """Write every page that we touched since log-start once more, through the client, so that it sees it."""
        self._require(Phase.PAUSED, "flush")
        async with self._no_changes("flush", _OFFER_SECONDS):
            self._require(Phase.PAUSED, "flush")
            return self._flush_now()

    def _flush_now(self) -> dict[str, Any]:
        assert self._context is not None
        started = time.monotonic()
        pages = size = 0
        runs = self.device.memory.dirty_runs()
        if runs and not self.config.bus_master:
            # Not for ever, if its driver was killed just now; so the pass is repeated, as when memory went away.
            raise DirtyLogBroken(
                "the guest has switched off the device's bus mastering, and QEMU writes no memory for it like that: "
                f"{len(runs)} runs of pages that the device has written cannot be copied; cancel this pass and start "
                "again, or save the VM stopped, which needs no such copies"
            )
        for iova, length in runs:
            try:
                data = self.device.memory.read(iova, length)
                for _ in range(_FLUSH_TRIES):
                    try:
                        self._context.write_through_client(iova, data)
                        break
                    except ClientBusy:
                        self._run_transport()
                else:
                    raise EnvironmentProblem("the client never stopped sending requests; are the vCPUs stopped?")
            except (PeerError, AddressNotMapped, ClientGone, ClientRefused) as error:
                raise DirtyLogBroken(f"{error}; cancel this pass and start again") from error
            pages += length // 4096
            size += length
        return {"pages": pages, "bytes": size, "seconds": time.monotonic() - started}

    async def _resume(self, seconds: float = 0.0) -> dict[str, Any]:
        """Go on as if there had been no pause; a pause that still waits for providers is called off.

        `seconds`: for how long it is tried if a provider cannot take back what it gave up at the pause. If that is in
        vain the server stays paused, and `resume` may be repeated.
        """
        _check_seconds("resume", seconds)
        if self.phase is not Phase.PAUSING:
            self._require(Phase.PAUSED, "resume")
            async with self._no_changes("resume", seconds + _OFFER_SECONDS):
                self._require(Phase.PAUSED, "resume")
                await self._go_on(seconds)
        else:
            if self._quiet is not None and not self._quiet.done():
                self._quiet.set_exception(UsageError(_CALLED_OFF))
            await self._go_on(seconds)
        return {}

    async def _go_on(self, seconds: float) -> None:
        await self._take_back(seconds)
        self.run_on()

    async def _take_back(self, seconds: float) -> None:
        """Activate the providers; for `seconds` again and again: whoever has what they want may just be ending."""
        phase, deadline = self.phase, time.monotonic() + seconds
        while True:
            try:
                return self._life.activate()
            except EnvironmentProblem as error:
                if time.monotonic() >= deadline:
                    raise
                log.info("%s; trying again", error)
            await asyncio.sleep(_TAKE_AGAIN)
            self._require(phase, "resume")

    def run_on(self) -> None:
        """Phase `running`: channels are released and get their turns.

        Raises EnvironmentProblem, and changes nothing, if a provider cannot take its outside resources.
        """
        self._life.activate()
        self.phase = Phase.RUNNING
        self._note("running")
        for channel in self.device.channels:
            channel.unquiesce()
        self.device.thaw()

    # ---- providers that come and go ------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _no_changes(self, command: str, seconds: float) -> AsyncIterator[None]:
        try:
            await asyncio.wait_for(self._changing.acquire(), seconds if self._changing.locked() else None)
        except TimeoutError:
            raise WaitTimeout(
                f"another command to end before {command} (offer, rescind, pause, save, load or restore-finish)",
                seconds,
            ) from None
        try:
            yield
        finally:
            self._changing.release()

    async def _offer(self, provider: dict[str, Any]) -> dict[str, Any]:
        """Add a provider, described as in a device description; its channels are offered at once."""
        async with self._no_changes("offer", _OFFER_SECONDS):
            self._require(Phase.RUNNING, "offer")
            now = msgspec.to_builtins(self.description)
            try:
                description = msgspec.convert(now | {"providers": [*now["providers"], provider]}, DeviceDescription)
            except msgspec.ValidationError as error:
                raise UsageError(f"offer: {explain(error)}") from error
            one = description.providers[-1]
            try:
                self._life.join(one)
            except VmbusError:
                raise
            except Exception as error:
                log.exception("provider %s could not be started", one.name)
                raise UsageError(f"provider {one.name!r} ({one.kind}) could not be started: {error!r}") from error
            self._life.description = description
            channels = self._life.hosts[one.name].channels
            return {"name": one.name, "relids": [self.device.relid_of(channel) for channel in channels]}

    async def _rescind(self, name: str, seconds: float = 10.0) -> dict[str, Any]:
        """Withdraw a provider: when it has completed what it holds, its channels are rescinded and it is stopped.

        Then the guest is waited for; `released` says whether it has given up all the channels in time.
        """
        _check_seconds("rescind", seconds)
        self._require(Phase.RUNNING, "rescind")
        async with self._no_changes("rescind", seconds):
            self._require(Phase.RUNNING, "rescind")
            provider = self._provider(name)
            if len(self.providers) == 1:
                raise UsageError(
                    f"provider {name!r} is the only one, and a device has at least one: offer another first"
                )
            started = time.monotonic()
            host = self._life.hosts[name]
            await self._departed(provider, seconds)
            try:
                await self._suspend(host.channels, max(0.0, started + seconds - time.monotonic()))
            except BaseException:
                provider.stay()
                raise
            offers = [offer for offer in self.device.bus.offers if offer.owner in host.channels]
            try:
                await self.services.idle(started + seconds - time.monotonic(), host)
            except WaitTimeout:
                for channel in host.channels:
                    channel.unquiesce()
                provider.stay()
                raise
            self._life.drop_provider(provider)
            self._life.description = msgspec.structs.replace(
                self.description, providers=[one for one in self.description.providers if one.name != name]
            )
            self._schedule()
            released = await self._released(offers, max(0.0, started + seconds - time.monotonic()))
            return {"name": name, "released": released, "seconds": time.monotonic() - started}

    async def _departed(self, provider: Provider, seconds: float) -> None:
        """A provider has told its guest that it goes, and has waited for it; half of the time at most."""
        departure = provider.depart()
        if departure is None:
            return
        try:
            await asyncio.wait_for(asyncio.wrap_future(departure), seconds / 2)
        except TimeoutError:
            log.warning(
                "the guest has not let go of provider %s after %g s: it is withdrawn", provider.name, seconds / 2
            )
        except BaseException:
            provider.stay()
            raise

    async def _command_provider(
        self, name: str, command: str, arguments: dict[str, Any] | None = None, seconds: float = 10.0
    ) -> dict[str, Any]:
        """A command of a provider's own."""
        _check_seconds("provider", seconds)
        self._require(Phase.RUNNING, "provider")
        provider = self._provider(name)
        if not isinstance(command, str) or not isinstance(arguments, dict | None):
            raise UsageError(f"provider: command is a string and arguments an object, not {command!r}, {arguments!r}")
        faults = self._life.hosts[name].faults
        try:
            answer = provider.command(command, arguments or {})
            if isinstance(answer, dict):
                return answer
            future = asyncio.wrap_future(answer)
            with faults.waiting(lambda cause: _fail(future, ProviderRaised(f"{cause}; {command!r} has no answer"))):
                return await asyncio.wait_for(future, seconds)
        except TimeoutError:
            raise WaitTimeout(f"the answer of provider {name!r} to {command!r}", seconds) from None
        except VmbusError:
            raise
        except Exception as error:
            faults.seen(f"command {command!r}", error)
            raise ProviderRaised(f"command {command!r} of provider {name!r} raised {error!r}") from error

    def _provider(self, name: str) -> Provider:
        for provider in self.providers:
            if provider.name == name:
                return provider
        raise UsageError(f"there is no provider {name!r}; there are {[one.name for one in self.providers]}")

    async def _suspend(self, channels: list[ServerChannel], seconds: float) -> None:
        """Suspend channels and wait until their owner has completed what it holds."""
        quiet: asyncio.Future[None] = self._loop.create_future()
        waiting = set(channels)

        def one_quiet(channel: ServerChannel) -> None:
            waiting.discard(channel)
            if not waiting and not quiet.done():
                quiet.set_result(None)

        for channel in channels:
            channel.quiesce()
            channel.when_quiet(functools.partial(one_quiet, channel))
        if not waiting:
            return
        try:
            with self._life.ends_with_faults(functools.partial(_fail, quiet)):
                await asyncio.wait_for(quiet, seconds)
        except TimeoutError:
            missing = {channel.name: channel.outstanding[:8] for channel in channels if channel.outstanding}
            raise WaitTimeout(f"the owners of channels to complete incoming packets {missing}", seconds) from None
        finally:
            for channel in channels:
                if channel.quiescing and waiting:
                    channel.unquiesce()

    async def _released(self, offers: list[Offer], seconds: float) -> bool:
        gone: asyncio.Future[None] = self._loop.create_future()
        bus = self.device.bus

        def look() -> None:
            if not any(offer in bus.offers for offer in offers) and not gone.done():
                gone.set_result(None)

        bus.on_released = look
        look()
        try:
            await asyncio.wait_for(gone, seconds)
        except TimeoutError:
            return False
        finally:
            bus.on_released = None
        return True

    async def _load(
        self,
        path: str,
        sha256: str,
        description: dict[str, Any] | None = None,
        check: bool = False,
        files: str | None = None,
    ) -> dict[str, Any]:
        """Take the state in a file for the device's own, and discard what the device is now.

        `description`: of the device in the state, when it is not the present one. `files`: the directory with the
        providers' files that belong to the state. Everything is checked first: a refusal leaves the server as it was.
        Then QEMU's part and restore-finish are awaited, as with a start from saved state. `check`: only say whether
        the state would be taken.
        """
        if not isinstance(files, str | None):
            raise UsageError(f"load: files is a string, not {files!r}")
        self._require_loadable()
        async with self._no_changes("load", _OFFER_SECONDS):
            self._require_loadable()
            directory = None if files is None else Path(files)
            return await self._load_now(path, sha256, description, check=check, files=directory)

    def _require_loadable(self) -> None:
        if self.phase not in _LOADABLE:
            phases = " or ".join(phase.value for phase in _LOADABLE)
            raise UsageError(f"load needs a server that is {phases}; this one is {self.phase.value}")
        if self.device.memory.log is not None:
            raise UsageError("load: a dirty log is running, so the device is being saved; end that first (log-stop)")

    async def _load_now(
        self,
        path: str,
        sha256: str,
        description: dict[str, Any] | None,
        *,
        check: bool = False,
        files: Path | None = None,
    ) -> dict[str, Any]:
        started = time.monotonic()
        state = _read_state(path, sha256)
        try:
            wanted = self.description if description is None else msgspec.convert(description, DeviceDescription)
        except msgspec.ValidationError as error:
            raise UsageError(f"load: {explain(error)}") from error
        await asyncio.sleep(0)
        counts = saved.count_packets(state)

        def before() -> None:
            # What the guest wrote to registers until now was meant for the life that ends.
            self._drain()
            self._require_loadable()

        def taken() -> None:
            self.phase = Phase.RESTORING
            self._restore = state
            self._files = files
            self._held_at_pause = 0

        if check:
            (await in_turns(self._fitting_life(state, wanted, recorded=False))).end()
        else:
            await in_turns(self._change_life(state, wanted, before, taken))
        return {
            "packets": {"queued": counts.queued, "sent": counts.sent},
            "channels": state.bus.open_channels,
            "seconds": time.monotonic() - started,
        }

    def _fitting_life(
        self, state: saved.DeviceState, wanted: DeviceDescription, *, recorded: bool = True
    ) -> Pieces[Life]:
        """A fresh device, standing still, to which the state fits. Raises StateError or UsageError."""
        life = self._new_life(wanted, recorded=recorded)
        life.timers.freeze()
        life.services.freeze()
        try:
            # Code that runs here already was chosen by the owner of this server; what a state asks for was not.
            trusted = {one.kind for one in self.description.providers}
            yield from life.building(from_snapshot=True, trusted=trusted)
            try:
                yield from life.fitting(state)
            except BaseException:
                life.end()
                raise
        except VmbusError:
            raise
        except Exception as error:
            log.exception("the device in a state could not be built")
            raise StateError(f"load: a provider of the state could not be started: {error!r}") from error
        return life

    def activate(self) -> None:
        """All providers own their outside resources from here on. Raises EnvironmentProblem; then none took any."""
        self._life.activate()

    def deactivate(self) -> None:
        """The providers have given up their outside resources. Raises EnvironmentProblem or WaitTimeout."""
        self._life.deactivate()

    def ends_with_faults(self, tell: Callable[[BaseException], None]) -> AbstractContextManager[None]:
        """Inside, somebody waits for providers: `tell` is told the cause when one raises that holds something."""
        return self._life.ends_with_faults(tell)

    def new_life(self, state: saved.DeviceState) -> None:
        """Put a fresh device, to which the state fits, in the place of the present one; it stands still.

        Raises StateError or UsageError, and changes nothing, if it does not fit the present description.
        """
        at_once(self._change_life(state, self.description, lambda: None, lambda: None))

    def _change_life(
        self,
        state: saved.DeviceState,
        wanted: DeviceDescription,
        before: Callable[[], None],
        taken: Callable[[], None],
    ) -> Pieces[None]:
        """`before`: called when all is checked and the present life is about to end; what it raises is a refusal.
        `taken`: called when another one is in its place."""
        life = yield from self._fitting_life(state, wanted)
        try:
            before()
        except BaseException:
            life.end()
            raise
        ended, self._life = self._life, life
        life.inherit(ended)
        self._lives += 1
        self.phase = self._phase
        taken()
        with self._client_waits():
            try:
                yield from ended.ending()
            finally:
                ended.device.memory.move_to(life.device.memory)

    async def _restore_finish(self, frozen: bool = False) -> dict[str, Any]:
        """QEMU has loaded the guest and the PCI function is back: rebuild everything and run.

        `frozen`: stand still until `resume`, as after a pause. Until then no provider does anything that another
        server, with the same state, would do once more.
        """
        self._require(Phase.RESTORING, "restore-finish")
        started = time.monotonic()
        async with self._no_changes("restore-finish", _OFFER_SECONDS):
            self._require(Phase.RESTORING, "restore-finish")
            restored = await self._restored()
            self._restore = None
            self._note("restored")
            if frozen:
                self.phase = Phase.PAUSED
            else:
                self.phase = Phase.RUNNING
                self.device.thaw()
        return {
            "packets": {"queued": restored.packets.queued, "sent": restored.packets.sent},
            "dropped": {"queued": restored.dropped.queued, "sent": restored.dropped.sent},
            "unsaved": {"queued": restored.unsaved.queued, "sent": restored.unsaved.sent},
            "renewed": restored.renewed,
            "broken": {channel_name(key): reason for key, reason in restored.broken.items()},
            "channels": sum(channel.active for channel in self.device.channels),
            "seconds": time.monotonic() - started,
        }

    async def _restored(self) -> saved.Restored:
        """In pieces: tools are answered meanwhile, the client afterwards. Raises StateError, EnvironmentProblem."""
        assert self._restore is not None
        self._drain()
        if self.config.snapshot() != self._restore.config:
            raise StateError(
                "the PCI function was not put back as it was saved: its configuration space is "
                f"{self.config.snapshot().hex()}, saved was {self._restore.config.hex()}"
            )
        work = saved.restoring(
            self._restore,
            self.device,
            self.providers,
            files={provider.name: files_of(provider, self._files) for provider in self.providers},
            before_start=self._life.activate,
        )
        with self._client_waits():
            return await in_turns(work)

    @contextlib.contextmanager
    def _client_waits(self) -> Iterator[None]:
        """Nothing that the client asks is done inside: what belongs together is read or written in several turns."""
        assert self._context is not None
        fd = self._context.poll_fd()
        self._loop.remove_reader(fd)
        try:
            yield
        finally:
            if self._context is not None:
                self._loop.add_reader(fd, self._on_client)

    async def _stop(self) -> dict[str, Any]:
        self._loop.call_soon(self.stop)
        return {}


def _fail(future: "asyncio.Future[Any]", error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _check_seconds(command: str, seconds: float) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= _LONGEST_PAUSE:
        raise UsageError(f"{command}: it may take 0 to {_LONGEST_PAUSE:g} seconds, not {seconds!r}")


_CALLED_OFF = "the pause was called off: resume came while it waited"
# In these phases providers work: their timers run out, and their local channels move.
_WORKING = (Phase.RUNNING, Phase.PAUSING)
# In these phases another state can take the place of what the device is.
_LOADABLE = (Phase.AWAITING, Phase.PAUSED, Phase.RUNNING)


def _read_state(path: str, sha256: str) -> saved.DeviceState:
    """The state in a file whose digest the caller knows. Raises UsageError, EnvironmentProblem or StateError."""
    if not isinstance(path, str) or not isinstance(sha256, str):
        raise UsageError(f"load: path and sha256 are strings, not {path!r} and {sha256!r}")
    try:
        data = saved.read_file(Path(path))
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"cannot read device state {path!r}: {error}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256.lower():
        raise StateError(f"the device state in {path} is not the one meant: its SHA-256 is {found}, not {sha256}")
    return saved.decode(data)


_COMMANDS: dict[str, Any] = {
    "status": DeviceServer._status,
    "inspect": DeviceServer._inspect,
    "pci": DeviceServer._pci,
    "audit": DeviceServer._audit_flush,
    "capture-start": DeviceServer._capture_start,
    "capture-stop": DeviceServer._capture_stop,
    "capture": DeviceServer._capture_status,
    "log-start": DeviceServer._log_start,
    "log-stop": DeviceServer._log_stop,
    "pause": DeviceServer._pause,
    "save": DeviceServer._save,
    "flush": DeviceServer._flush,
    "resume": DeviceServer._resume,
    "offer": DeviceServer._offer,
    "rescind": DeviceServer._rescind,
    "provider": DeviceServer._command_provider,
    "load": DeviceServer._load,
    "restore-finish": DeviceServer._restore_finish,
    "stop": DeviceServer._stop,
}
