"""Saving a running VM and its device into a snapshot: the order of steps, and the way back from each of them.

QEMU's migration stream leaves the device out, and it does not see what the server writes to guest memory. Both are
mended from outside (docs/packet-42.md follows one packet through it):

* stopped: the vCPUs stop, the device server comes to rest and saves its state, QEMU writes all of RAM. Nothing is
  written to guest memory behind QEMU's back after that, so nothing can be missed.
* live: RAM is copied while everything runs and the server logs the pages that it writes. QEMU stops at
  pre-switchover with the vCPUs halted; the server comes to rest, saves its state, and writes the logged pages
  once more through QEMU; QEMU sends the last pages and the rest of its state.

A failure anywhere leads back: the migration is cancelled, the server resumes, the vCPUs run if they ran before,
and `SaveFailed` says so. Only if that way back is blocked too is the VM lost, and the error says that.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
from qemu.qmp.events import EventListener

from vmbus.errors import EnvironmentProblem, StateError, VmbusError
from vmbus.qemu.qmp import MIGRATION_ENDS, MigrationFailed, file_channel
from vmbus.qemu.timing import Phases
from vmbus.snapshot.manifest import FILE_PREFIX

MAGIC = 0x53424D56
"""What a read of the first register of BAR0 gives ("VMBS")."""

MAX_BANDWIDTH = 8 << 30
"""Bytes per second for QEMU's stream into a file: no limit in practice (its default suits a shared network)."""

LIVE_ATTEMPTS = 3
"""How often a live save starts again when the dirty log could not be kept (the guest unmapped a dirty page)."""

SAVE_TIMEOUT = 600.0
"""Seconds to wait for the device's state, and the copies of its providers' files, to be on disk."""

PAUSE_TIMEOUT = 30.0
"""Seconds to wait for the device to come to rest; the server gives its providers less than that."""


class SaveFailed(EnvironmentProblem):
    """A save did not work out. `source_alive` tells whether the VM runs on as before."""

    def __init__(self, message: str, *, source_alive: bool) -> None:
        super().__init__(message)
        self.source_alive = source_alive


class Control(Protocol):
    """The device server's control connection (see `vmbus.server.control.ControlClient`)."""

    async def call(self, command: str, /, timeout: float = ..., **arguments: Any) -> dict[str, Any]: ...


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
    files: dict[str, int] = field(default_factory=dict)
    """Providers' files that were copied beside the state: name and size in bytes."""
    flushed_pages: int = 0
    flushed_bytes: int = 0
    attempts: int = 1


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
        ram: Path,
        state: Path,
        phases: Phases,
        *,
        live: bool,
        memory_mib: int = 256,
        sabotage: Sabotage = NO_SABOTAGE,
    ) -> None:
        self._monitor = monitor
        self._control = control
        self._ram = ram
        self._state = state
        self._phases = phases
        self._live = live
        self._sabotage = sabotage
        self._was_running = False
        self._migrating = False
        self._logging = False
        self._touched = False  # whether there is anything to undo
        # A slow disk takes 20 MiB/s; whatever is slower than that is stuck.
        self._stream_timeout = 60.0 + memory_mib / 20

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
                    if not _log_broken(error) or attempt == LIVE_ATTEMPTS:
                        raise
                    attempt += 1
                    await self._undo()
            captured.attempts = attempt
            yield captured
        except BaseException as error:
            if not self._touched:  # nothing was changed yet, or the VM was set running again already
                if isinstance(error, VmbusError):
                    raise SaveFailed(f"save failed: {error}; the VM runs on", source_alive=True) from error
                raise
            try:
                await self._undo()
            except (VmbusError, OSError) as second:
                raise SaveFailed(
                    f"save failed: {error}; the VM is lost, since it could not be set running again: {second}",
                    source_alive=False,
                ) from error
            if isinstance(error, VmbusError):
                fate = "the VM runs on" if self._was_running else "the VM stays paused as it was"
                raise SaveFailed(f"save failed: {error}; {fate}", source_alive=True) from error
            raise

    async def resume(self) -> None:
        """Lets a VM that was saved run on: the checkpoint's last step."""
        await self._control.call("resume")
        if self._was_running:
            await self._monitor.cont()
        self._touched = False
        if self._logging:
            self._logging = False
            await self._control.call("log-stop")

    async def _take_stopped(self) -> Captured:
        self._was_running = await self._monitor.running()
        await self._set_migration(pause_before_switchover=False)
        self._touched = True
        with self._phases("stop"):
            stopped_at = await self._stop()
        captured = await self._save_device(stopped_at)
        with self._phases("ram"):
            await self._migrate()
            await self._monitor.wait_migration({"completed"}, self._stream_timeout, "QEMU to write the guest's memory")
        return captured

    async def _take_live(self) -> Captured:
        self._was_running = await self._monitor.running()
        await self._set_migration(pause_before_switchover=True)
        self._touched = True
        with self._phases("ram"):
            await self._control.call("log-start")
            self._logging = True
            with self._monitor.listen("STOP") as stops:
                await self._migrate()
                await self._monitor.wait_migration(
                    {"pre-switchover"}, self._stream_timeout, "the copy of the guest's memory to catch up with it"
                )
                stopped_at = _stop_time(stops)
        captured = await self._save_device(stopped_at)
        with self._phases("flush"):
            if not self._sabotage.skip_flush:
                flushed = await self._control.call("flush", timeout=self._stream_timeout)
                captured.flushed_pages = int(flushed.get("pages", 0))
                captured.flushed_bytes = int(flushed.get("bytes", 0))
        with self._phases("switchover"):
            await self._monitor.execute("migrate-continue", {"state": "pre-switchover"})
            await self._monitor.wait_migration({"completed"}, self._stream_timeout, "QEMU to write the last pages")
        return captured

    async def _stop(self) -> float:
        with self._monitor.listen("STOP") as stops:
            await self._monitor.execute("stop")
            return _stop_time(stops)

    async def _set_migration(self, *, pause_before_switchover: bool) -> None:
        await self._monitor.execute(
            "migrate-set-capabilities",
            {
                "capabilities": [
                    {"capability": "events", "state": True},
                    {"capability": "pause-before-switchover", "state": pause_before_switchover},
                ]
            },
        )
        await self._monitor.execute("migrate-set-parameters", {"max-bandwidth": MAX_BANDWIDTH})

    async def _migrate(self) -> None:
        self._migrating = True
        await self._monitor.execute("migrate", {"channels": file_channel(self._ram)})

    async def _save_device(self, stopped_at: float) -> Captured:
        """Barrier, pause and state, with the vCPUs stopped."""
        with self._phases("device"):
            await barrier(self._monitor, self._control)
            await self._control.call("pause", timeout=PAUSE_TIMEOUT)
            saved = await self._control.call(
                "save", timeout=SAVE_TIMEOUT, path=str(self._state), files=str(self._state.parent)
            )
            config = (await self._control.call("pci"))["config"]
        packets = saved.get("packets", {})
        return Captured(
            stopped_at=stopped_at,
            was_running=self._was_running,
            packets={"queued": int(packets.get("queued", 0)), "sent": int(packets.get("sent", 0))},
            incoming_held=int(saved.get("incoming_held", 0)),
            state_sha256=str(saved["sha256"]),
            pci_config=bytes.fromhex(config),
            files={str(name): int(size) for name, size in saved.get("files", {}).items()},
        )

    async def _undo(self) -> None:
        """Puts everything back as it was before; raises if that is impossible.

        Each step is tried even if an earlier one fails: a dead server must not keep QEMU's migration going.
        """
        failures: list[Exception] = []
        if self._migrating:
            with _collect(failures):
                status, _ = await self._monitor.migration_status()
                if status not in MIGRATION_ENDS:
                    await self._monitor.execute("migrate_cancel")
                    with contextlib.suppress(MigrationFailed):  # "failed" is an end as good as "cancelled"
                        await self._monitor.wait_migration(
                            {"cancelled", "completed", "none"}, 60.0, "QEMU to give the migration up"
                        )
                self._migrating = False
        with _collect(failures):
            if (await self._control.call("status"))["phase"] in ("pausing", "paused"):
                await self._control.call("resume")
        if self._logging:
            with _collect(failures):
                await self._control.call("log-stop")
                self._logging = False
        if self._was_running:
            with _collect(failures):
                await self._monitor.cont()
                if not await self._monitor.running():
                    raise EnvironmentProblem("QEMU does not run the VM after 'cont'")
        for path in (self._ram, self._state, *self._state.parent.glob(f"{FILE_PREFIX}*")):
            path.unlink(missing_ok=True)
        if failures:
            raise failures[0]
        self._touched = False


async def barrier(monitor: QemuMonitor, control: Control) -> None:
    """Makes sure that every register write which the guest has posted reached the device server.

    Writes are posted: QEMU may still have some under way when the vCPUs stop. A read comes after them on the same
    connection, and its answer proves that they were handled. Without a mapped BAR there cannot be any.
    """
    bar0 = (await control.call("pci"))["bar0"]
    if bar0 is None:
        return
    output = await monitor.human(f"xp /1xw {bar0:#x}")
    word = output.rpartition(":")[2].strip()
    try:
        value = int(word, 16)
    except ValueError:
        value = -1
    if value != MAGIC:
        raise StateError(f"the VMBus device does not answer at its BAR0 {bar0:#x}: QEMU's monitor says {output!r}")


def _stop_time(stops: EventListener) -> float:
    """CLOCK_MONOTONIC of the STOP event among `stops`, or now if there is none (the VM was stopped already)."""
    now, wall = time.monotonic(), time.time()
    for event in stops.history:
        stamp = event.get("timestamp")
        if isinstance(stamp, dict):
            lag = wall - (float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6)
            return now - min(max(lag, 0.0), 60.0)  # QEMU stamps with the wall clock, which may be set meanwhile
    return now


def _log_broken(error: VmbusError) -> bool:
    return getattr(error, "kind", None) == "log-broken"


@contextlib.contextmanager
def _collect(failures: list[Exception]) -> Iterator[None]:
    try:
        yield
    except (VmbusError, OSError) as error:
        failures.append(error)
