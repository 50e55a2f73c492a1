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

A QEMU that migrates the device itself (see `vmbus.qemu.probe`) needs none of that: it has the device stopped and saved
through the protocol, and the server only writes a copy of the state that QEMU takes.

A failure anywhere leads back: the migration is cancelled, the server resumes, the vCPUs run if they ran before,
and `SaveFailed` says so. Only if that way back is blocked too is the VM lost, and the error says that.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
from qemu.qmp.events import EventListener

from vmbus.errors import Code, EnvironmentProblem, StateError, UsageError, VmbusError, WaitTimeout, code_of
from vmbus.qemu.probe import Control, driven_by_client
from vmbus.qemu.qmp import MIGRATION_ENDS, MigrationFailed, file_channel
from vmbus.snapshot.manifest import FILE_PREFIX
from vmbus.util.patience import patient
from vmbus.vm.moments import Hook, Moment, no_hook
from vmbus.vm.timing import Phases

T = TypeVar("T")

MAGIC = 0x53424D56
"""What a read of the first register of BAR0 gives ("VMBS")."""

MAX_BANDWIDTH = 8 << 30
"""Bytes per second for QEMU's stream into a file: no limit in practice (its default suits a shared network)."""

DOWNTIME_LIMITS = (20, 40, 80, 160, 300)
"""Milliseconds that QEMU may plan for its last pass of a live copy: the first at first, the next ones if that does not
suffice. QEMU's own default is the last. It stops the vCPUs as soon as it expects to send the rest in that time, so on a
fast way it would stop them with a hundred megabytes to go, where a further pass of the running VM leaves nearly none.
Where the guest writes faster than that, only a higher limit lets the copy end."""
DOWNTIME_PATIENCE = 2.0
"""Seconds with one of these limits, counted from the end of QEMU's first pass."""

LIVE_ATTEMPTS = 3
"""How often a live save starts again when the dirty log could not be kept (the guest unmapped a dirty page)."""

REFUSED_CAPABILITIES = {
    "background-snapshot": "it protects only QEMU's own view of guest memory, and the device server writes past it",
    "mapped-ram": "its file has another layout than the one that is loaded here, and a network stream cannot have it",
    "postcopy-ram": "the device server would read guest memory that has not arrived yet",
    "x-colo": "it runs the guest twice, and there is one device",
    "x-ignore-shared": "guest memory is shared with the device server, so it would be left out of the stream",
}
"""Capabilities of QEMU's migration that break what is promised here, and why. None of them is ever switched off in
silence: whoever switched it on wanted something."""

CONNECT_TIMEOUT = 10.0
"""Seconds for QEMU to reach another host: TCP itself tries for minutes."""

_CONNECTED = {"active", "device", "pre-switchover", "completed"}  # statuses of a migration whose stream has begun

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


class SaveFailed(EnvironmentProblem):
    """A save did not work out. `source_alive` tells whether the VM runs on as before."""

    def __init__(self, message: str, *, source_alive: bool, code: str = "") -> None:
        super().__init__(message, code=code)
        self.source_alive = source_alive
        self.status = 13 if source_alive else 14


class QemuMonitor(Protocol):
    """What a save needs of `vmbus.qemu.qmp.Monitor`."""

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = ...
    ) -> Any: ...
    async def human(self, line: str, *, timeout: float = ...) -> str: ...
    async def cont(self) -> None: ...
    async def running(self) -> bool: ...
    async def migration_status(self) -> tuple[str, str]: ...
    async def wait_migration(self, wanted: Collection[str], timeout: float, what: str) -> str: ...
    def listen(self, *events: str) -> AbstractContextManager[EventListener]: ...


@dataclass(frozen=True)
class Sabotage:
    """Damage done on purpose, for tests that prove that the damage is noticed. Nothing else sets these."""

    skip_flush: bool = False
    skip_pci_replay: bool = False
    edit_state: Callable[[bytes], bytes] | None = None


NO_SABOTAGE = Sabotage()


class SaveReport(msgspec.Struct, kw_only=True):
    """What a save did. Times in seconds, sizes in bytes."""

    directory: str
    live: bool
    phases: dict[str, float]
    stopped_at: float
    """CLOCK_MONOTONIC when the vCPUs stopped; comparable within this boot of the host."""
    downtime: float | None = None
    """From there until they ran again; None if they do not (the VM ends with the save)."""
    packets: dict[str, int]
    """Outgoing packets saved: ``queued`` and ``sent``."""
    incoming_held: int
    ram_bytes: int = 0
    state_bytes: int = 0
    flushed_pages: int = 0
    flushed_bytes: int = 0
    attempts: int = 1

    @property
    def total(self) -> float:
        return sum(self.phases.values())


@dataclass
class Captured:
    """The result of the capture, before it is sealed."""

    stopped_at: float
    was_running: bool
    packets: dict[str, int]
    incoming_held: int
    state_sha256: str
    pci_config: bytes
    device: dict[str, Any]
    """The description of the device at this moment: providers may have come and gone since the launch."""
    state_bytes: int = 0
    files: dict[str, int] = field(default_factory=dict)
    """Providers' files that were copied beside the state: name and size in bytes."""
    flushed_pages: int = 0
    flushed_bytes: int = 0
    attempts: int = 1
    reached_at: float = 0.0
    """CLOCK_MONOTONIC when QEMU was seen at pre-switchover (live only)."""
    saved_at: float = 0.0
    """When the device server had written its state."""
    flushed_at: float = 0.0
    """When the logged pages had been written through QEMU, and the target was done with the state."""
    written_at: float = 0.0
    """When QEMU had sent its last page (live only)."""
    driven: bool = False
    """QEMU migrates the device itself: its state is in QEMU's stream, and the file is only a copy."""


@dataclass(frozen=True)
class StreamSettings:
    """How QEMU sends its stream. `multifd` is the number of connections for memory, 0 for none of their own.

    `timeout` bounds, in seconds, the copy of memory while the guest runs; None allows for a slow disk.
    `downtime_limit` is what QEMU may plan for its last pass, in milliseconds; None: `DOWNTIME_LIMITS`. `bandwidth` is
    the most that it sends, in bytes per second, while the guest runs; None: `MAX_BANDWIDTH`.
    """

    multifd: int = 0
    timeout: float | None = None
    downtime_limit: int | None = None
    bandwidth: int | None = None


class Target(Protocol):
    """Where a capture goes."""

    @property
    def durable(self) -> bool:
        """Whether the state has to be on the disk as soon as it is written: a file that only lives for a while need
        not."""

    @property
    def way(self) -> str | None:
        """The TCP address of another host to which QEMU's stream goes, in words; None: it goes elsewhere."""

    @property
    def state(self) -> Path:
        """The file, not there yet, that the device server writes its state into."""

    @property
    def files(self) -> Path | None:
        """The directory for copies of the providers' files. None: it is a migration; none go along, and those that
        would have to prevent it."""

    async def begin(self) -> list[dict[str, object]]:
        """A pass begins: the `channels` for QEMU's migrate. The VM runs as ever and has not been touched."""

    async def saved(self, captured: Captured) -> None:
        """The device's state is in its file. The vCPUs stand, and QEMU has still to write its last pages; it does not
        before this returns. In a live capture the logged pages are written through QEMU meanwhile."""

    def discard(self) -> None:
        """The pass is given up: removes what it left."""


class FileTarget:
    """QEMU's stream and the device's state go into two files."""

    durable = True
    way = None

    def __init__(self, ram: Path, state: Path) -> None:
        self.ram = ram
        self.state = state
        self.files = state.parent

    async def begin(self) -> list[dict[str, object]]:
        return file_channel(self.ram)

    async def saved(self, captured: Captured) -> None:
        pass

    def discard(self) -> None:
        for path in (self.ram, self.state, *self.files.glob(f"{FILE_PREFIX}*")):
            path.unlink(missing_ok=True)


class Capture:
    """One save's dealings with QEMU and the device server.

    ``async with capture.taken() as captured:`` brings the VM to its saved point and holds it there, stopped, while
    the block runs. If anything fails, in it or before it, the VM is put back as it was and `SaveFailed` is raised.
    Leaving the block normally leaves it stopped: call `resume` for a VM that is to run on.
    """

    def __init__(
        self,
        monitor: QemuMonitor,
        control: Control,
        target: Target,
        phases: Phases,
        *,
        live: bool,
        memory_mib: int = 256,
        stream: StreamSettings | None = None,
        sabotage: Sabotage = NO_SABOTAGE,
        at: Hook = no_hook,
        operation: str = "save",
    ) -> None:
        self._monitor = monitor
        self._control = control
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
        self._flushing = False  # whether the server may still be writing memory through QEMU
        self._driven = False  # whether QEMU migrates the device: then what follows is its affair, not ours
        self._touched = False  # whether there is anything to undo
        self._bar0: int | None = None  # where it was before the vCPUs stopped
        # A slow disk takes 20 MiB/s; whatever is slower than that is stuck.
        self._stream_timeout = self._stream.timeout or patient(60.0 + memory_mib / 20)

    @property
    def was_running(self) -> bool:
        """Whether the vCPUs ran before the capture began."""
        return self._was_running

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
        folder = self._target.state.parent
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
            await _resume(self._control)
        if self._was_running:
            await self._monitor.cont()
        self._touched = False
        if self._logging:
            self._logging = False
            await self._control.call("log-stop")

    async def _take_stopped(self) -> Captured:
        self._was_running = await self._monitor.running()
        await self._set_migration(pause_before_switchover=False)
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
        await self._migrate(channels)
        await self._at(Moment.RAM_COPY)
        await self._monitor.wait_migration({"completed"}, self._stream_timeout, "QEMU to write the guest's memory")

    async def _take_live(self) -> Captured:
        self._was_running = await self._monitor.running()
        await self._set_migration(pause_before_switchover=True)
        await self._look_at_device()
        await self._at(Moment.BEFORE_STREAM)
        channels = await self._target.begin()
        self._touched = True
        with self._phases("ram"):
            if not self._driven:
                self._logging = True
                await self._control.call("log-start")
            with self._monitor.listen("STOP") as stops:
                await self._migrate(channels)
                await self._at(Moment.RAM_COPY)
                async with self._growing_limit():
                    await self._monitor.wait_migration(
                        {"pre-switchover"}, self._stream_timeout, "the copy of the guest's memory to catch up with it"
                    )
                stopped_at = _stop_time(stops)
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
        self._driven = await driven_by_client(self._control)
        self._bar0 = (await self._control.call("pci"))["bar0"]

    async def _flush(self, captured: Captured) -> None:
        if self._sabotage.skip_flush or self._driven:
            return
        self._flushing = True
        flushed = await self._control.call("flush", timeout=self._stream_timeout)
        self._flushing = False
        captured.flushed_pages = int(flushed.get("pages", 0))
        captured.flushed_bytes = int(flushed.get("bytes", 0))

    async def _stop(self) -> float:
        with self._monitor.listen("STOP") as stops:
            await self._monitor.execute("stop")
            return _stop_time(stops)

    async def _set_migration(self, *, pause_before_switchover: bool) -> None:
        await refuse_unsafe_settings(self._monitor)
        # All that matter are set each time: an earlier operation, or somebody else, may have left them otherwise.
        wanted = {
            "events": True,
            "pause-before-switchover": pause_before_switchover,
            "multifd": self._stream.multifd > 0,
        }
        await self._monitor.execute(
            "migrate-set-capabilities",
            {"capabilities": [{"capability": name, "state": state} for name, state in wanted.items()]},
        )
        parameters: dict[str, object] = {"max-bandwidth": self._stream.bandwidth or MAX_BANDWIDTH}
        if self._stream.multifd:
            parameters["multifd-channels"] = self._stream.multifd
        if self._live:
            parameters["downtime-limit"] = self._stream.downtime_limit or DOWNTIME_LIMITS[0]
        await self._monitor.execute("migrate-set-parameters", parameters)

    @asynccontextmanager
    async def _growing_limit(self) -> AsyncIterator[None]:
        """While the block waits for the copy to catch up: see `DOWNTIME_LIMITS`."""
        caught_up = asyncio.Event()
        growing = asyncio.create_task(self._grow_limit(caught_up))
        try:
            yield
        except BaseException:
            caught_up.set()
            await asyncio.gather(growing, return_exceptions=True)  # what the block says is what matters
            raise
        caught_up.set()
        await growing

    async def _grow_limit(self, caught_up: asyncio.Event) -> None:
        if self._stream.downtime_limit is not None:
            return
        limits = iter(DOWNTIME_LIMITS[1:])
        while not await _set_within(caught_up, DOWNTIME_PATIENCE):
            ram = (await self._monitor.execute("query-migrate")).get("ram", {})
            if int(ram.get("dirty-sync-count", 0)) < 2:  # all of memory is sent once, however long that takes
                continue
            limit = next(limits, None)
            if limit is None:
                return
            await self._monitor.execute("migrate-set-parameters", {"downtime-limit": limit})

    async def _migrate(self, channels: list[dict[str, object]]) -> None:
        self._migrating = True
        await self._monitor.execute("migrate", {"channels": channels})
        if (way := self._target.way) is not None:
            try:
                await self._monitor.wait_migration(_CONNECTED, CONNECT_TIMEOUT, f"QEMU to connect to {way}")
            except (WaitTimeout, MigrationFailed) as error:
                raise EnvironmentProblem(
                    f"{error}; guest memory goes to {way}, a port of its own: it has to be let through (and forwarded, "
                    "if the other one is), and scripts/run-vm --receive ADDRESS --stream-port PORT says which one it is"
                ) from error

    async def _save_device(self, stopped_at: float) -> Captured:
        """Barrier, pause and state, with the vCPUs stopped."""
        target = self._target
        arguments: dict[str, Any] = {"seconds": PROVIDERS_TIMEOUT, "durable": target.durable}
        timeout = SAVE_TIMEOUT
        if not self._driven:
            await barrier(self._monitor, self._control, self._bar0)
            paused = await self._control.call("pause", timeout=PAUSE_TIMEOUT)
            if target.files is None:
                arguments["moving"] = True
            elif paused.get("files"):
                arguments["files"] = str(target.files)
                timeout += FILES_TIMEOUT
        await self._at(Moment.SAVING)
        saved = await self._control.call("save", timeout=timeout, path=str(target.state), **arguments)
        packets = saved.get("packets", {})
        captured = Captured(
            stopped_at=stopped_at,
            was_running=self._was_running,
            packets={"queued": int(packets.get("queued", 0)), "sent": int(packets.get("sent", 0))},
            incoming_held=int(saved.get("incoming_held", 0)),
            state_sha256=str(saved["sha256"]),
            state_bytes=int(saved.get("bytes", 0)),
            pci_config=bytes.fromhex(saved["config"]),
            files={str(name): int(size) for name, size in saved.get("files", {}).items()},
            device=saved["description"],
            saved_at=time.monotonic(),
            driven=self._driven,
        )
        await self._at(Moment.WRITING)
        return captured

    async def _undo(self) -> None:
        """Puts everything back as it was before; raises if that is impossible.

        Each step is tried even if an earlier one fails: a dead server must not keep QEMU's migration going.
        """
        failures: list[Exception] = []
        if self._flushing:
            # We may have been interrupted while the server flushes, and it goes on. Cancelling makes QEMU set the
            # vCPUs running, and a request of the guest's in between would garble the flush: the connection would be
            # lost, and the device with it. The answer to this comes when the flush is over.
            with _collect(failures):
                await self._control.call("status")
            self._flushing = False
        if self._migrating:
            with _collect(failures):
                status, _ = await self._monitor.migration_status()
                if status not in MIGRATION_ENDS:
                    await self._monitor.execute("migrate_cancel")
                    with contextlib.suppress(MigrationFailed):  # "failed" is an end as good as "cancelled"
                        await self._monitor.wait_migration(
                            {"cancelled", "completed", "none"}, patient(60.0), "QEMU to give the migration up"
                        )
                self._migrating = False
        with _collect(failures):
            if (await self._control.call("status"))["phase"] in ("pausing", "paused"):
                await _resume(self._control)
        if self._logging:
            with _collect(failures):
                await self._control.call("log-stop")
                self._logging = False
        if self._was_running:
            with _collect(failures):
                await self._monitor.cont()
                if not await self._monitor.running():
                    raise EnvironmentProblem("QEMU does not run the VM after 'cont'")
        self._target.discard()
        if failures:
            raise failures[0]
        self._touched = False


async def _resume(control: Control) -> None:
    await control.call("resume", timeout=TAKE_BACK_TIMEOUT + 10.0, seconds=TAKE_BACK_TIMEOUT)


async def refuse_unsafe_settings(monitor: QemuMonitor) -> None:
    """Raises `UsageError` if somebody has set QEMU's migration to something that would break what is promised."""
    found = await monitor.execute("query-migrate-capabilities")
    for name in sorted(one["capability"] for one in found if one["state"]):
        if name in REFUSED_CAPABILITIES:
            raise UsageError(
                f"QEMU's migration capability {name!r} is switched on, and does not go together with the VMBus device: "
                f"{REFUSED_CAPABILITIES[name]}; switch it off (migrate-set-capabilities)"
            )
    mode = (await monitor.execute("query-migrate-parameters")).get("mode", "normal")
    if mode != "normal":
        raise UsageError(
            f"QEMU's migration mode is {mode!r}, which keeps guest memory where it is instead of sending it, and knows "
            "nothing of the VMBus device; set it to 'normal' (migrate-set-parameters)"
        )


async def barrier(monitor: QemuMonitor, control: Control, known: int | None = None) -> None:
    """Makes sure that every register write which the guest has posted reached the device server.

    Writes are posted: QEMU may still have some under way when the vCPUs stop. A read comes after them on the same
    connection, and its answer proves that they were handled. Without a mapped BAR there cannot be any.

    `known`: where BAR0 was a while ago. The device is asked for its place only if it does not answer there any more.
    """
    if known is not None and _value(await _read(monitor, known)) == MAGIC:
        return
    bar0 = (await control.call("pci"))["bar0"]
    if bar0 is None:
        return
    output = await _read(monitor, bar0)
    if _value(output) != MAGIC:
        raise StateError(
            f"the VMBus device does not answer at its BAR0 {bar0:#x}: QEMU's monitor says {output!r}; if the guest has "
            "put it where something else is, it cannot be saved before the guest moves it"
        )


async def _read(monitor: QemuMonitor, address: int) -> str:
    return await monitor.human(f"xp /1xw {address:#x}")


def _value(output: str) -> int:
    """The word in the output of the monitor's ``xp``; -1 if there is none."""
    try:
        return int(output.rpartition(":")[2].strip(), 16)
    except ValueError:
        return -1


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event is set by then."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


async def _both(first: Coroutine[Any, Any, None], second: Coroutine[Any, Any, None]) -> None:
    """Waits for the end of both, also if one fails, so that neither is left half done; the first's error wins."""
    for result in await asyncio.gather(first, second, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Performs `work` to its end, also if we are cancelled meanwhile: half a way back would help nobody."""
    task = asyncio.create_task(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    return task.result()


def _stop_time(stops: EventListener) -> float:
    """CLOCK_MONOTONIC of the STOP event among `stops`, or now if there is none (the VM was stopped already)."""
    now, wall = time.monotonic(), time.time()
    for event in stops.history:
        stamp = event.get("timestamp")
        if isinstance(stamp, dict):
            lag = wall - (float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6)
            return now - min(max(lag, 0.0), 60.0)  # QEMU stamps with the wall clock, which may be set meanwhile
    return now


@contextlib.contextmanager
def _collect(failures: list[Exception]) -> Iterator[None]:
    try:
        yield
    except (VmbusError, OSError) as error:
        failures.append(error)
