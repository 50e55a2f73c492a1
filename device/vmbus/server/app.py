"""The device server: transport, device and providers on one event loop, and what tools may ask of them.

Phases: `running`; `pausing` while providers finish what they hold, and then `paused` until resume, when it can be
saved; `restoring` from the start with saved state until restore-finish, when QEMU has loaded the guest and its PCI
function has been put back.
"""

import asyncio
import contextlib
import hashlib
import inspect
import logging
import os
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import UUID

import vmbus
from vmbus import state as saved
from vmbus.description import DeviceDescription
from vmbus.device import Device
from vmbus.errors import EnvironmentProblem, PeerError, StateError, UsageError, WaitTimeout
from vmbus.kmcl.server import ServerChannel
from vmbus.memory import DirtyLogBroken
from vmbus.providers import Provider, provider_class
from vmbus.server.control import ControlServer
from vmbus.vfio_user.context import (
    AddressNotMapped,
    ClientBusy,
    ClientGone,
    ClientRefused,
    Context,
    ResetKind,
    RunResult,
)
from vmbus.vfio_user.library import Library
from vmbus.vfio_user.pci import ConfigSpace

log = logging.getLogger(__name__)

# Batches of requests handled before others get their turn on the loop.
_DRAIN_LIMIT = 10_000
_FLUSH_TRIES = 100
_LONGEST_PAUSE = 3600.0  # seconds


class Phase(Enum):
    """See the module's text."""

    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    RESTORING = "restoring"


class DeviceServer:
    """One device. `run` serves until `stop`.

    Implements the transport's `DeviceHandler` and the providers' `Host`.
    """

    def __init__(
        self,
        description: DeviceDescription,
        library: Library,
        socket_path: Path,
        control_path: Path,
        *,
        restore: saved.DeviceState | None = None,
    ) -> None:
        """Builds the device and listens. Raises StateError when `restore` is not of such a device (before anything
        listens), EnvironmentProblem for sockets and the library, UsageError for a wrong description."""
        self.description = description
        self.library = library
        self.phase = Phase.RUNNING if restore is None else Phase.RESTORING
        self.config = ConfigSpace()
        self.device = Device(self._interrupt, self._schedule)
        self._loop = asyncio.get_running_loop()
        self._scheduled = False
        self._restore = restore
        self._held_at_pause = 0
        self._quiet: asyncio.Future[None] | None = None
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self.providers: list[Provider] = []
        for one in description.providers:
            provider = provider_class(one.kind)(self, one.name, UUID(one.instance), one.options)
            self.providers.append(provider)
            provider.start()
        if restore is not None:
            saved.check_fits(restore, description.name, self.device, self.providers)
            self.device.freeze()
        self._control = ControlServer(control_path, self._command)
        self._context: Context | None = Context(library, socket_path, self)

    # ---- life ----------------------------------------------------------------------------------------------------

    async def run(self, ready: Callable[[], None]) -> None:
        """Serve until `stop`; `ready` is called when both sockets listen."""
        context = self._context
        assert context is not None
        try:
            await self._control.start()
            self._loop.add_reader(context.poll_fd(), self._on_transport)
            ready()
            await self._ended
        finally:
            self._loop.remove_reader(context.poll_fd())
            await self._control.close()
            for provider in self.providers:
                provider.stop()
            context.close()
            self._context = None

    def stop(self) -> None:
        """End `run`."""
        if not self._ended.done():
            self._ended.set_result(None)

    def _on_transport(self) -> None:
        assert self._context is not None
        try:
            self._context.run()
        except Exception as error:
            log.exception("the transport failed")
            if not self._ended.done():
                self._ended.set_exception(EnvironmentProblem(f"the vfio-user transport failed: {error!r}"))

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._service)

    def _service(self) -> None:
        self._scheduled = False
        self.device.service()

    def _interrupt(self) -> None:
        if self._context is not None and self.config.msi_enabled and self.config.bus_master:
            self._context.trigger(0)

    # ---- Host ----------------------------------------------------------------------------------------------------

    def add_channel(self, channel: ServerChannel) -> None:
        """A provider's channel."""
        self.device.add_channel(channel)

    def call_soon(self, call: Callable[[], None]) -> None:
        """From the event loop, soon."""
        self._loop.call_soon(call)

    def call_later(self, seconds: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        """From the event loop, after `seconds`."""
        return self._loop.call_later(seconds, call)

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

    # ---- commands ------------------------------------------------------------------------------------------------

    async def _command(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        handler = _COMMANDS.get(command)
        if handler is None:
            raise UsageError(f"there is no command {command!r}; known: {', '.join(sorted(_COMMANDS))}")
        try:
            bound = inspect.signature(handler).bind(self, **arguments)
        except TypeError as error:
            raise UsageError(f"{command} does not take the arguments {sorted(arguments)}: {error}") from error
        result: dict[str, Any] = await handler(*bound.args, **bound.kwargs)
        return result

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
            "bus": self.device.bus.state.value,
            "resets": self.device.resets,
            "packets": self._packets(),
            "incoming_held": sum(len(channel.outstanding) for channel in self.device.channels),
            "providers": {provider.name: provider.status() for provider in self.providers},
        }

    async def _inspect(self) -> dict[str, Any]:
        return await self._status() | {
            "device": self.device.describe() | {"name": self.description.name},
            "config": self.config.snapshot().hex(),
            "description": {
                "name": self.description.name,
                "providers": [
                    {"kind": one.kind, "name": one.name, "instance": one.instance} for one in self.description.providers
                ],
            },
        }

    async def _pci(self) -> dict[str, Any]:
        return {"config": self.config.snapshot().hex(), "bar0": self.config.bar0_address}

    async def _log_start(self) -> dict[str, Any]:
        self.device.memory.start_log()
        return {}

    async def _log_stop(self) -> dict[str, Any]:
        self.device.memory.stop_log()
        return {}

    async def _pause(self, seconds: float = 10.0) -> dict[str, Any]:
        """Take no new packets, and wait until providers have completed those that they hold."""
        self._require(Phase.RUNNING, "pause")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= _LONGEST_PAUSE:
            raise UsageError(f"pause: it may take 0 to {_LONGEST_PAUSE:g} seconds, not {seconds!r}")
        started = time.monotonic()
        # What the guest wrote to registers before it was stopped must be seen before the state is taken.
        self._drain()
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
            channel.hold()
            channel.when_quiet(one_quiet)
        try:
            if channels:
                await asyncio.wait_for(quiet, seconds)
            if self.phase is Phase.PAUSING:
                self.phase = Phase.PAUSED
        except TimeoutError:
            missing = {channel.name: channel.outstanding[:8] for channel in channels if channel.outstanding}
            raise WaitTimeout(f"the owners of channels to complete incoming packets {missing}", seconds) from None
        finally:
            if self.phase is Phase.PAUSING:
                self._run_on()
        return {"incoming_held": self._held_at_pause, "seconds": time.monotonic() - started}

    def _drain(self) -> None:
        assert self._context is not None
        for _ in range(_DRAIN_LIMIT):
            if self._context.run() is not RunResult.MORE:
                return
        raise EnvironmentProblem("the client sends requests without end; stop the vCPUs before pausing the device")

    async def _save(self, path: str) -> dict[str, Any]:
        """Write the state into a new file."""
        self._require(Phase.PAUSED, "save")
        if not isinstance(path, str):
            raise UsageError(f"save: the path is a string, not {path!r}")
        started = time.monotonic()
        state = saved.save_device(self.description.name, self.config.snapshot(), self.device, self.providers)
        data = saved.encode(state)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except (OSError, ValueError) as error:
            raise EnvironmentProblem(f"cannot write device state to {path!r}: {error}") from error
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(path)  # noqa: PTH108 - one call on a local file
            raise EnvironmentProblem(f"cannot write device state to {path!r}: {error}") from error
        counts = saved.count_packets(state)
        return {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "packets": {"queued": counts.queued, "sent": counts.sent},
            "completions_queued": counts.completions,
            "incoming_held": self._held_at_pause,
            "seconds": time.monotonic() - started,
        }

    async def _flush(self) -> dict[str, Any]:
        """Write every page that we touched since log-start once more, through the client, so that it sees it."""
        self._require(Phase.PAUSED, "flush")
        assert self._context is not None
        started = time.monotonic()
        pages = size = 0
        for iova, length in self.device.memory.dirty_runs():
            try:
                data = self.device.memory.read(iova, length)
                for _ in range(_FLUSH_TRIES):
                    try:
                        self._context.write_through_client(iova, data)
                        break
                    except ClientBusy:
                        self._context.run()
                else:
                    raise EnvironmentProblem("the client never stopped sending requests; are the vCPUs stopped?")
            except (PeerError, AddressNotMapped, ClientGone, ClientRefused) as error:
                raise DirtyLogBroken(f"{error}; cancel this pass and start again") from error
            pages += length // 4096
            size += length
        return {"pages": pages, "bytes": size, "seconds": time.monotonic() - started}

    async def _resume(self) -> dict[str, Any]:
        """Go on as if there had been no pause; a pause that still waits for providers is called off."""
        if self.phase is not Phase.PAUSING:
            self._require(Phase.PAUSED, "resume")
        elif self._quiet is not None and not self._quiet.done():
            self._quiet.set_exception(UsageError("the pause was called off: resume came while it waited"))
        self._run_on()
        return {}

    def _run_on(self) -> None:
        self.phase = Phase.RUNNING
        for channel in self.device.channels:
            channel.unhold()
        self.device.thaw()

    async def _restore_finish(self) -> dict[str, Any]:
        """QEMU has loaded the guest and the PCI function is back: rebuild everything and run."""
        self._require(Phase.RESTORING, "restore-finish")
        assert self._restore is not None
        started = time.monotonic()
        self._drain()
        if self.config.snapshot() != self._restore.config:
            raise StateError(
                "the PCI function was not put back as it was saved: its configuration space is "
                f"{self.config.snapshot().hex()}, saved was {self._restore.config.hex()}"
            )
        saved.restore_device(self._restore, self.device, self.providers)
        counts = saved.count_packets(self._restore)
        self._restore = None
        self.phase = Phase.RUNNING
        self.device.thaw()
        return {
            "packets": {"queued": counts.queued, "sent": counts.sent},
            "channels": sum(channel.active for channel in self.device.channels),
            "seconds": time.monotonic() - started,
        }

    async def _stop(self) -> dict[str, Any]:
        self._loop.call_soon(self.stop)
        return {}


_COMMANDS: dict[str, Any] = {
    "status": DeviceServer._status,
    "inspect": DeviceServer._inspect,
    "pci": DeviceServer._pci,
    "log-start": DeviceServer._log_start,
    "log-stop": DeviceServer._log_stop,
    "pause": DeviceServer._pause,
    "save": DeviceServer._save,
    "flush": DeviceServer._flush,
    "resume": DeviceServer._resume,
    "restore-finish": DeviceServer._restore_finish,
    "stop": DeviceServer._stop,
}
