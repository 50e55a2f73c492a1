"""Saving a running VM and its device into a snapshot: the order of steps, and the way back from each of them.

QEMU's migration stream leaves the device out, and it does not see what the server writes to guest memory. Both are
mended from outside (docs/packet-42.md follows one packet through it):

* stopped: the vCPUs stop, the device server comes to rest and saves its state, QEMU writes all of RAM. Nothing is
  written to guest memory behind QEMU's back after that, so nothing can be missed.
* live: RAM is copied while everything runs and the server logs the pages that it writes. QEMU stops at
  pre-switchover with the vCPUs halted; the server comes to rest, saves its state, and writes the logged pages
  once more through QEMU; QEMU sends the last pages and the rest of its state.

The same steps serve a snapshot and a live migration; what differs is where everything goes, and that is a `Target`:
files, or another host (`vmbus.operations.migration.source`).

A VM may have several devices, each with a server of its own: each step is taken with all of them before the next one.

A QEMU that migrates the device itself (see `vmbus.qemu.probe`) needs none of that: it has the device stopped and saved
through the protocol, and the server only writes a copy of the state that QEMU takes.

A failure anywhere leads back: the migration is cancelled, the server resumes, the vCPUs run if they ran before,
and `SaveFailed` says so. Only if that way back is blocked too is the VM lost, and the error says that.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

from vmbus.errors import Code, EnvironmentProblem, VmbusError, code_of
from vmbus.operations.own_disks import take_again
from vmbus.operations.stream import StreamSettings, begin_stream, growing_limit, set_migration, stop_time
from vmbus.operations.target import Captured, CapturedDevice, Target
from vmbus.operations.vm import Vm
from vmbus.qemu.device import DeviceInstance, ask_each, each, resume_if_paused
from vmbus.qemu.probe import driven_by_client
from vmbus.qemu.qmp import MIGRATION_ENDS, give_migration_up
from vmbus.util.interruptible import uninterrupted
from vmbus.util.patience import patient
from vmbus.vm.errors import SaveFailed
from vmbus.vm.moments import NO_SABOTAGE, Hook, Moment, Sabotage, no_hook
from vmbus.vm.timing import Phases

LIVE_ATTEMPTS = 3
"""How often a live save starts again when the dirty log could not be kept (the guest unmapped a dirty page)."""

PAUSE_TIMEOUT = 30.0
"""Seconds to wait for the device to come to rest; the server gives its providers less than that."""

PROVIDERS_TIMEOUT = 30.0
"""Seconds that the providers' save callbacks may take; then the server interrupts them, and the VM runs on."""

SAVE_TIMEOUT = 60.0
"""Seconds for the server to ask its providers for their state and to write it; the vCPUs stand meanwhile."""

FILES_TIMEOUT = 600.0
"""Seconds more for that where providers have files which are copied, too."""

TAKE_BACK_TIMEOUT = 30.0
"""Seconds for which a device that runs on tries to take back what its providers gave up at the pause (locks). Whoever
has it is a destination that is just ending: it hears of a cut link within `vmbus.operations.migration.link.SILENCE`."""


class Capture:
    """One save's dealings with QEMU and the device servers.

    ``async with capture.taken() as captured:`` brings the VM to its saved point and holds it there, stopped, while
    the block runs. If anything fails, in it or before it, the VM is put back as it was and `SaveFailed` is raised.
    Leaving the block normally leaves it stopped: call `resume` for a VM that is to run on.
    """

    def __init__(
        self,
        vm: Vm,
        target: Target,
        phases: Phases,
        *,
        live: bool,
        stream: StreamSettings | None = None,
        sabotage: Sabotage = NO_SABOTAGE,
        at: Hook = no_hook,
        operation: str = "save",
    ) -> None:
        self._vm = vm
        self._monitor = vm.monitor
        self._devices = vm.devices
        self._target = target
        self._phases = phases
        self._live = live
        self._stream = stream or StreamSettings()
        self._sabotage = sabotage
        self._at = at
        self._operation = operation  # what error messages call this
        self._was_running = False
        self._migrating = False
        self._logging = False
        self._flushing = False  # whether a server may still be writing memory through QEMU
        self._driven = False  # whether QEMU migrates the devices: then what follows is its affair, not ours
        self._touched = False  # whether there is anything to undo
        self._bar0: dict[str, int | None] = {}  # where that of each device was before the vCPUs stopped
        # A slow disk takes 20 MiB/s; whatever is slower than that is stuck.
        self._stream_timeout = self._stream.timeout or patient(60.0 + vm.description.memory_mib / 20)

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[Captured]:
        """See the class. Raises `SaveFailed`, or the original error if that is a cancellation."""
        attempt = 1
        try:
            while True:
                try:
                    captured = await (self._take_live() if self._live else self._take_stopped())
                    break
                except VmbusError as error:
                    if code_of(error) != Code.LOG_BROKEN:
                        raise
                    if attempt == LIVE_ATTEMPTS:
                        raise EnvironmentProblem(
                            f"{error} (attempt {attempt} of {LIVE_ATTEMPTS}: each time the guest unmapped memory that "
                            "the device had written meanwhile; let it keep its memory mapped, or stop it for the save)",
                            code=Code.NOT_CONVERGING,
                        ) from error
                    attempt += 1
                    await self._target.again()
                    await self._undo()
            captured.attempts = attempt
            yield captured
        except BaseException as error:
            if not self._touched:  # nothing was changed yet, or the VM was set running again already
                if isinstance(error, VmbusError):
                    raise SaveFailed(f"{self._operation} failed: {error}; the VM runs on", source_alive=True) from error
                raise
            room = self._no_room(error)
            try:
                await uninterrupted(self._undo())
            except (VmbusError, OSError) as second:
                raise SaveFailed(
                    f"{self._operation} failed: {error}{room}; "
                    f"the VM is lost, since it could not be set running again: {second}",
                    source_alive=False,
                ) from error
            if isinstance(error, VmbusError):
                fate = "the VM runs on" if self._was_running else "the VM stays paused as it was"
                text = f"{self._operation} failed: {error}{room}; {fate}"
                raise SaveFailed(text, source_alive=True, code=Code.DISK_FULL if room else "") from error
            raise

    def _no_room(self, error: BaseException) -> str:
        """To be said beside an error if the disk is full: QEMU calls that an input/output error at times."""
        folder = self._target.state(0).parent
        with contextlib.suppress(OSError):
            if code_of(error) != Code.DISK_FULL and not os.statvfs(folder).f_bavail:
                return f" ({os.strerror(errno.ENOSPC)} in {folder})"
        return ""

    def hand_over(self) -> None:
        """From here on the VM is somebody else's: nothing is undone any more. `resume` still works."""
        self._touched = False

    async def resume(self) -> None:
        """Lets a VM that was saved run on: the checkpoint's last step."""
        if not self._driven:
            await ask_each(self._devices, "resume", **_taking_back())
        if self._was_running:
            await self._monitor.cont()
        else:
            await take_again(self._vm)
        self._touched = False
        if self._logging:
            self._logging = False
            await ask_each(self._devices, "log-stop")

    async def _take_stopped(self) -> Captured:
        self._was_running = await self._monitor.running()
        await set_migration(self._monitor, self._stream, live=False)
        await self._look_at_device()
        await self._at(Moment.BEFORE_STREAM)
        channels = await self._target.begin()
        self._touched = True
        with self._phases("stop"):
            stopped_at = await self._stop()
        if not self._driven:
            captured = await self._save_stopped(stopped_at)
        with self._phases("ram"):
            await self._write_ram(channels)
        if self._driven:  # it has taken the state by now
            captured = await self._save_stopped(stopped_at)
        await self._at(Moment.STOPPED)
        return captured

    async def _save_stopped(self, stopped_at: float) -> Captured:
        with self._phases("device"):
            captured = await self._save_device(stopped_at)
            await self._target.saved(captured)
        return captured

    async def _write_ram(self, channels: list[dict[str, object]]) -> None:
        """Everything that QEMU has, with the vCPUs stopped and the device at rest."""
        self._migrating = True
        await begin_stream(self._monitor, channels, self._target.way)
        await self._at(Moment.RAM_COPY)
        await self._monitor.wait_migration({"completed"}, self._stream_timeout, "QEMU to write the guest's memory")

    async def _take_live(self) -> Captured:
        self._was_running = await self._monitor.running()
        await set_migration(self._monitor, self._stream, live=True)
        await self._look_at_device()
        await self._at(Moment.BEFORE_STREAM)
        channels = await self._target.begin()
        self._touched = True
        with self._phases("ram"):
            if not self._driven:
                self._logging = True
                await ask_each(self._devices, "log-start")
            with self._monitor.listen("STOP") as stops:
                self._migrating = True
                await begin_stream(self._monitor, channels, self._target.way)
                await self._at(Moment.RAM_COPY)
                async with growing_limit(self._monitor, self._stream):
                    await self._monitor.wait_migration(
                        {"pre-switchover"}, self._stream_timeout, "the copy of the guest's memory to catch up with it"
                    )
                stopped_at = stop_time(stops)
        reached_at = time.monotonic()
        await self._at(Moment.PRE_SWITCHOVER)
        with self._phases("device"):
            captured = await self._save_device(stopped_at)
            captured.reached_at = reached_at
        with self._phases("flush"):
            # Two ways that do not meet: pages through QEMU, and the state to where it goes.
            await _both(self._target.saved(captured), self._flush(captured))
        captured.flushed_at = time.monotonic()
        with self._phases("switchover"):
            await self._monitor.execute("migrate-continue", {"state": "pre-switchover"})
            await self._monitor.wait_migration({"completed"}, self._stream_timeout, "QEMU to write the last pages")
        captured.written_at = time.monotonic()
        await self._at(Moment.STOPPED)
        return captured

    async def _look_at_device(self) -> None:
        """What need not be asked for again while the vCPUs stand."""
        self._driven = await driven_by_client(self._devices)
        for device in self._devices:
            self._bar0[device.name] = (await device.control.call("pci"))["bar0"]

    async def _flush(self, captured: Captured) -> None:
        if self._driven:
            return
        devices = [device for device in self._devices if not self._sabotage.of(device.name).skip_flush]
        self._flushing = True
        flushed = await ask_each(devices, "flush", self._stream_timeout)
        self._flushing = False
        captured.flushed_pages = sum(int(one.get("pages", 0)) for one in flushed)
        captured.flushed_bytes = sum(int(one.get("bytes", 0)) for one in flushed)

    async def _stop(self) -> float:
        with self._monitor.listen("STOP") as stops:
            await self._monitor.execute("stop")
            return stop_time(stops)

    async def _save_device(self, stopped_at: float) -> Captured:
        """Barrier, pause and state, with the vCPUs stopped."""
        with_files: set[str] = set()
        if not self._driven:
            await each(self._devices, lambda device: device.barrier(self._bar0[device.name]))
            paused = await ask_each(self._devices, "pause", PAUSE_TIMEOUT)
            with_files = {device.name for device, one in zip(self._devices, paused, strict=True) if one.get("files")}
        await self._at(Moment.SAVING)

        async def save(device: DeviceInstance) -> CapturedDevice:
            target = self._target
            arguments: dict[str, Any] = {"seconds": PROVIDERS_TIMEOUT, "durable": target.durable}
            timeout = SAVE_TIMEOUT
            if target.files is None and not self._driven:
                arguments["moving"] = True
            elif device.name in with_files:
                arguments["files"] = str(target.files)
                timeout += FILES_TIMEOUT
            path = str(target.state(self._devices.index(device)))
            return CapturedDevice.told(await device.control.call("save", timeout, path=path, **arguments))

        captured = Captured(
            stopped_at=stopped_at,
            was_running=self._was_running,
            devices=await each(self._devices, save),
            driven=self._driven,
        )
        captured.saved_at = time.monotonic()
        await self._at(Moment.WRITING)
        return captured

    async def _undo(self) -> None:
        """Puts everything back as it was before; raises if that is impossible.

        Each step is tried even if an earlier one fails: a dead server must not keep QEMU's migration going.
        """
        failures: list[Exception] = []
        if self._flushing:
            # We may have been interrupted while a server flushes, and it goes on. Cancelling makes QEMU set the
            # vCPUs running, and a request of the guest's in between would garble the flush: the connection would be
            # lost, and the device with it. The answer to this comes when the flush is over.
            with _collect(failures):
                await ask_each(self._devices, "status")
            self._flushing = False
        if self._migrating:
            with _collect(failures):
                status, _ = await self._monitor.migration_status()
                if status not in MIGRATION_ENDS:
                    await give_migration_up(self._monitor)
                self._migrating = False
        with _collect(failures):
            await each(self._devices, functools.partial(resume_if_paused, **_taking_back()))
        if self._logging:
            with _collect(failures):
                await ask_each(self._devices, "log-stop")
                self._logging = False
        if self._was_running:
            with _collect(failures):
                await self._monitor.cont()
                if not await self._monitor.running():
                    raise EnvironmentProblem("QEMU does not run the VM after 'cont'")
        else:
            with _collect(failures):
                await take_again(self._vm)
        self._target.discard()
        if failures:
            raise failures[0]
        self._touched = False


def _taking_back() -> dict[str, Any]:
    """Bounds of a device's `resume`, which may have to wait for what its providers own."""
    return {"timeout": TAKE_BACK_TIMEOUT + 10.0, "seconds": TAKE_BACK_TIMEOUT}


async def _both(first: Coroutine[Any, Any, None], second: Coroutine[Any, Any, None]) -> None:
    """Waits for the end of both, also if one fails, so that neither is left half done; the first's error wins."""
    for result in await asyncio.gather(first, second, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


@contextlib.contextmanager
def _collect(failures: list[Exception]) -> Iterator[None]:
    try:
        yield
    except (VmbusError, OSError) as error:
        failures.append(error)
