"""How a guest ends, or begins anew: what QEMU's events and the guest's console say of it.

A guest that reboots boots again. One that panics reboots, too (`panic=-1`), and would do so for ever: it is told by the
last words on its console, and is the end of the VM. A QEMU that ends with status 0 says why by an event.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from qemu.qmp.events import EventListener

from vmbus.errors import EnvironmentProblem
from vmbus.qemu.qmp import Monitor
from vmbus.vm.process import log_tail

_PANIC = "Kernel panic - not syncing"
_TAIL = 64 << 10
_ONE_BOOT = 10.0  # seconds in which the firmware may have the machine reset once more
_PATIENCE = 1.0  # seconds for an event that was sent before QEMU ended

REASONS = {
    "guest-shutdown": "the guest powered off",
    "host-signal": "QEMU was ended by a signal",
    "host-qmp-quit": "QEMU was told to quit on its monitor",
    "host-qmp-system-reset": "QEMU was told to reset the VM on its monitor",
}
"""What a SHUTDOWN event's reason means; others are quoted."""


class GuestPanicked(EnvironmentProblem):
    """The guest's kernel gave up."""

    status = 16


class Ends:
    def __init__(self, monitor: Monitor, console_log: Path) -> None:
        self._monitor = monitor
        self._log = console_log
        self._rebooted = -_ONE_BOOT
        self._from = 0  # where the present boot's output begins in the log
        self._reason: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.panicked: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """The guest's last words."""

    @property
    def told(self) -> bool:
        """Whether QEMU has said that it ends, and why."""
        return self._reason.done()

    async def run(self, on_reboot: Callable[[], None]) -> None:
        """Until it is cancelled. `on_reboot` is called for each guest that boots again; it must not raise."""
        listener = EventListener(("RESET", "SHUTDOWN"))
        with self._monitor.listening(listener):
            while True:
                event = await listener.get()
                data = event.get("data")
                found = data if isinstance(data, dict) else {}
                if event["event"] == "SHUTDOWN":
                    if not self._reason.done():
                        self._reason.set_result(str(found.get("reason", "")))
                elif found.get("reason") in ("guest-reset", "guest-panic"):
                    self._reset(on_reboot)

    def _reset(self, on_reboot: Callable[[], None]) -> None:
        words = self._panic()
        if not words:
            now = time.monotonic()
            if now - self._rebooted > _ONE_BOOT:
                self._rebooted = now
                on_reboot()
        elif not self.panicked.done():
            self.panicked.set_result(words)

    def _panic(self) -> str:
        """The panic on the console since the last boot, with the log's end; empty if there is none."""
        try:
            with self._log.open("rb") as file:
                size = file.seek(0, 2)
                if size < self._from:  # it was shortened meanwhile (`vmbus.vm.logs`)
                    self._from = 0
                file.seek(max(self._from, size - _TAIL))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        self._from = size
        lines = [line.strip() for line in text.splitlines() if _PANIC in line]
        if not lines:
            return ""
        first = lines[0][lines[0].index(_PANIC) :].removeprefix("Kernel panic - ")
        return f"{first}; its console's last lines:\n{log_tail(self._log)}"

    async def how(self) -> str:
        """In words, for a QEMU that has ended with status 0."""
        await asyncio.wait({self._reason}, timeout=_PATIENCE)
        reason = self._reason.result() if self._reason.done() else ""
        return REASONS.get(reason, f"QEMU ended ({reason or 'and said no reason'})")
