"""How a guest ends or boots again, from QEMU's events and the guest's console."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp.events import EventListener
from qemu.qmp.message import Message

from vmbus.qemu import ends
from vmbus.qemu.ends import Ends

PANIC = "[   14.1] Kernel panic - not syncing: Attempted to kill init!\n[   14.2] Call Trace:\n"


class Events:
    """A monitor that tells of what a test says."""

    def __init__(self) -> None:
        self.listeners: list[EventListener] = []

    @contextlib.contextmanager
    def listening(self, *listeners: EventListener) -> Iterator[None]:
        self.listeners += listeners
        yield

    async def tell(self, event: str, **data: Any) -> None:
        for listener in self.listeners:
            await listener.put(Message({"event": event, "data": data}))


@contextlib.asynccontextmanager
async def watching(log: Path, reboots: list[int]) -> Any:
    monitor = Events()
    watched = Ends(monitor, log)  # type: ignore[arg-type]
    task = asyncio.create_task(watched.run(lambda: reboots.append(1)))
    await asyncio.sleep(0)
    yield monitor, watched
    task.cancel()
    await asyncio.wait({task})


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_fault_m9_a_panic_is_named(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_text("Booting\n" + PANIC)

    reboots: list[int] = []
    async with watching(log, reboots) as (monitor, watched):
        await monitor.tell("RESET", guest=True, reason="guest-reset")
        await settled()
        assert watched.panicked.done() and reboots == []
        words = watched.panicked.result()
        assert words.startswith("not syncing: Attempted to kill init!") and "Call Trace" in words


async def test_fault_m10_a_reboot_is_none_and_happens_once_for_each_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The firmware may reset the machine once more. A panic of an earlier boot, or a host's reset, is no panic now."""
    log = tmp_path / "console.log"

    reboots: list[int] = []
    async with watching(log, reboots) as (monitor, watched):
        for text in ("Restarting system\n", "", ""):
            with log.open("a") as file:
                file.write(text)
            await monitor.tell("RESET", guest=True, reason="guest-reset")
            await settled()
        await monitor.tell("RESET", guest=False, reason="snapshot-load")
        await settled()
        assert reboots == [1] and not watched.panicked.done()
        monkeypatch.setattr(ends, "_ONE_BOOT", 0.0)
        await monitor.tell("RESET", guest=True, reason="guest-reset")
        await settled()
        assert reboots == [1, 1]


async def test_fault_m9_a_log_that_was_shortened_meanwhile_still_tells(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_text("x" * 100_000)

    reboots: list[int] = []
    async with watching(log, reboots) as (monitor, watched):
        await monitor.tell("RESET", guest=True, reason="guest-reset")
        await settled()
        log.write_text(PANIC)
        await monitor.tell("RESET", guest=True, reason="guest-reset")
        await settled()
        assert watched.panicked.done()


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("guest-shutdown", "the guest powered off"),
        ("host-signal", "QEMU was ended by a signal"),
        ("host-qmp-quit", "told to quit"),
        ("host-ui", r"QEMU ended \(host-ui\)"),
        (None, "said no reason"),
    ],
)
def test_fault_m9_only_a_guest_that_powered_off_is_said_to_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str | None, words: str
) -> None:
    """QEMU ends with status 0 in all of these cases."""
    monkeypatch.setattr(ends, "_PATIENCE", 0.05)

    async def body() -> str:
        async with watching(tmp_path / "none", []) as (monitor, watched):
            if reason is not None:
                await monitor.tell("SHUTDOWN", guest=False, reason=reason)
                await settled()
            return await watched.how()

    assert re.search(words, asyncio.run(body()))
