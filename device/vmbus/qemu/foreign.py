"""Migrations that somebody else starts on the VM's second monitor (qmp-tools.sock).

QEMU lets anybody with a monitor start a migration, and leaves the VMBus device out of it without a word. So every
MIGRATION event outside of our own operations is looked into: the migration is cancelled, the VM runs on, and the owner
is told why. QEMU sends these events only with the capability ``events``, which is switched on when the VM starts.

A QEMU that migrates the device itself (`vmbus.qemu.probe`) is left alone: there the device is in what it sends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from qemu.qmp.events import EventListener

from vmbus.errors import VmbusError
from vmbus.qemu.qmp import MIGRATION_ENDS, MigrationFailed, Monitor, capabilities
from vmbus.util.patience import patient

_BEGINNINGS = frozenset({"setup", "active", "device", "pre-switchover"})
_CANCEL_TIMEOUT = 60.0


class MigrationGuard:
    """Watches one QEMU for migrations that are not ours. `ours` marks those that are."""

    def __init__(
        self, monitor: Monitor, notice: Callable[[str], None], driven: Callable[[], Awaitable[bool]] | None = None
    ) -> None:
        self._monitor = monitor
        self._notice = notice
        self._driven = driven  # whether QEMU has the device in its stream
        self._ours = 0
        self._ran = False  # whether the vCPUs ran when the foreign migration began
        self._runs = True
        self._listener = EventListener(["MIGRATION", "STOP", "RESUME"], self._see)

    @contextlib.contextmanager
    def ours(self) -> Iterator[None]:
        """Whatever migrates while this lasts was started by us."""
        self._ours += 1
        try:
            yield
        finally:
            self._ours -= 1

    def _see(self, event: Any) -> bool:
        """Called with each event as it comes in, so in its right place among the answers to our commands."""
        if event["event"] != "MIGRATION":
            self._runs = event["event"] == "RESUME"
            return False
        # The last event of one of our own migrations may come a moment late; a beginning never does.
        foreign = not self._ours and event["data"]["status"] in _BEGINNINGS
        if foreign:
            self._ran = self._ran or self._runs
        return foreign

    async def start(self) -> None:
        """Switches the events on. Raises what `Monitor.execute` raises."""
        await self._monitor.execute("migrate-set-capabilities", capabilities(events=True))
        self._runs = await self._monitor.running()

    async def run(self) -> None:
        """Watches until cancelled, or until the monitor is lost."""
        with self._monitor.listening(self._listener), contextlib.suppress(VmbusError):
            while True:
                await self._listener.get()
                if not self._ours and not await self._is_driven():
                    await self._end_it()
                self._listener.clear()
                self._ran = False

    async def _is_driven(self) -> bool:
        try:
            return self._driven is not None and await self._driven()
        except VmbusError:  # who cannot be asked has no device in any stream
            return False

    async def _end_it(self) -> None:
        why = "it was not started by the VM's owner, and QEMU leaves the VMBus device out of what it sends"
        if any(str(job["type"]).startswith("snapshot-") for job in await self._monitor.execute("query-jobs")):
            # Cancelling would leave QEMU's migration in a state that it never leaves again.
            self._notice(f"a snapshot was taken in QEMU without the VM's owner: the VMBus device is not in it ({why})")
            return
        status, _ = await self._monitor.migration_status()
        if status in _BEGINNINGS:
            await self._monitor.execute("migrate_cancel")
            with contextlib.suppress(MigrationFailed):
                status = await self._monitor.wait_migration(
                    MIGRATION_ENDS, patient(_CANCEL_TIMEOUT), "QEMU to cancel a migration that is not ours"
                )
        if status == "completed":
            self._notice(f"a migration was completed before it could be cancelled; its result is of no use: {why}")
            if self._ran and await self._monitor.status() in ("postmigrate", "finish-migrate"):
                await self._monitor.cont()
        else:
            self._notice(f"a migration was cancelled: {why}; use scripts/migrate or scripts/save")
