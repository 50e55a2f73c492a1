"""A Dask scheduler and workers, as processes of their own on this machine."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from support.failure_bench import until
from vmbus.qemu.process import Child
from vmbus.soak.job import _IMPORT_ROOTS

START = 60.0


class Cluster:
    """Use it as an asynchronous context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.address = ""
        self.scheduler: Child | None = None
        self.workers: list[Child] = []

    async def _spawn(self, name: str, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Child:
        return await Child.spawn(
            name,
            [sys.executable, "-m", f"distributed.cli.{module}", *arguments],
            self._folder / f"{name}.log",
            environment={"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "30s", **environment},
        )

    async def __aenter__(self) -> Cluster:
        # Without the project on its path, as somebody's scheduler may be.
        self.scheduler = await self._spawn(
            "scheduler",
            "dask_scheduler",
            ["--host", "tcp://127.0.0.1:0", "--no-dashboard", "--no-show"],
            {"PYTHONPATH": ""},
        )
        log = self._folder / "scheduler.log"
        await until(lambda: "Scheduler at:" in log.read_text(), "the scheduler's address", START)
        self.address = log.read_text().partition("Scheduler at:")[2].split()[0]
        return self

    async def worker(
        self, *, threads: int = 1, project: bool = True, environment: Mapping[str, str] | None = None
    ) -> Child:
        """Start one more worker, and wait for it."""
        name = f"worker-{len(self.workers)}"
        path = os.pathsep.join(_IMPORT_ROOTS) if project else ""
        child = await self._spawn(
            name,
            "dask_worker",
            [self.address, "--no-nanny", "--no-dashboard", "--nthreads", str(threads), "--name", name],
            {"PYTHONPATH": path, **(environment or {})},
        )
        self.workers.append(child)
        log = self._folder / f"{name}.log"
        await until(lambda: "Starting established connection" in log.read_text(), f"{name} to be there", START)
        return child

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        children = [*self.workers, *filter(None, [self.scheduler])]
        await asyncio.gather(*(child.stop() for child in children))
