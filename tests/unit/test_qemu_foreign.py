"""Migrations that somebody else starts: told apart from ours by their place among the answers to our commands."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import pytest
from qemu.qmp.events import EventListener

from vmbus.qemu.foreign import MigrationGuard


class FakeMonitor:
    """QEMU, as far as the guard looks at it."""

    def __init__(self) -> None:
        self.migration = "none"
        self.run_state = "running"
        self.jobs: list[dict[str, str]] = []
        self.commands: list[str] = []
        self.listener: EventListener | None = None

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        self.commands.append(command)
        if command == "query-jobs":
            return self.jobs
        if command == "migrate_cancel":
            self.migration = "cancelled"
        return None

    async def running(self) -> bool:
        return self.run_state == "running"

    async def status(self) -> str:
        return self.run_state

    async def cont(self) -> None:
        self.commands.append("cont")
        self.run_state = "running"

    async def migration_status(self) -> tuple[str, str]:
        return self.migration, ""

    async def wait_migration(self, wanted: Collection[str], timeout: float, what: str) -> str:
        assert self.migration in wanted
        return self.migration

    @contextlib.contextmanager
    def listening(self, listener: EventListener) -> Iterator[None]:
        self.listener = listener
        yield

    async def tell(self, event: str, **data: str) -> None:
        assert self.listener is not None
        await self.listener.put({"event": event, "data": data})


@contextlib.asynccontextmanager
async def guarded(monitor: FakeMonitor) -> Any:
    notices: asyncio.Queue[str] = asyncio.Queue()
    guard = MigrationGuard(monitor, notices.put_nowait)  # type: ignore[arg-type]
    await guard.start()
    task = asyncio.create_task(guard.run())
    await asyncio.sleep(0)
    try:
        yield guard, notices
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_foreign_migration_is_cancelled() -> None:
    monitor = FakeMonitor()
    async with guarded(monitor) as (_, notices):
        assert monitor.commands == ["migrate-set-capabilities"]  # or no event would ever come
        monitor.migration = "active"
        await monitor.tell("MIGRATION", status="setup")
        assert "was cancelled" in await asyncio.wait_for(notices.get(), 5)
        assert "migrate_cancel" in monitor.commands and "cont" not in monitor.commands


@pytest.mark.parametrize("ran", [True, False])
async def test_one_that_is_over_already_leaves_the_vm_as_it_was(ran: bool) -> None:
    monitor = FakeMonitor()
    async with guarded(monitor) as (_, notices):
        if not ran:
            await monitor.tell("STOP")
        monitor.migration, monitor.run_state = "completed", "postmigrate"
        await monitor.tell("MIGRATION", status="setup")
        await monitor.tell("MIGRATION", status="active")
        await monitor.tell("STOP")
        assert "completed before it could be cancelled" in await asyncio.wait_for(notices.get(), 5)
        await asyncio.sleep(0)
        assert ("cont" in monitor.commands) == ran and "migrate_cancel" not in monitor.commands


async def test_a_snapshot_job_is_told_and_left_alone() -> None:
    monitor = FakeMonitor()
    async with guarded(monitor) as (_, notices):
        monitor.jobs = [{"id": "x", "type": "snapshot-save"}]
        monitor.migration = "setup"
        await monitor.tell("MIGRATION", status="setup")
        assert "a snapshot was taken" in await asyncio.wait_for(notices.get(), 5)
        assert "migrate_cancel" not in monitor.commands


async def test_our_own_are_left_alone() -> None:
    monitor = FakeMonitor()
    async with guarded(monitor) as (guard, notices):
        with guard.ours():
            for status in ("setup", "active", "pre-switchover", "device"):
                await monitor.tell("MIGRATION", status=status)
        await monitor.tell("MIGRATION", status="completed")  # a moment late
        for _ in range(5):
            await asyncio.sleep(0)
        assert notices.empty() and monitor.commands == ["migrate-set-capabilities"]
