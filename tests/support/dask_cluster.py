"""A Dask scheduler and workers, as processes of their own on this machine."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import vmbus
import vmbus_guest
from support.pace import eventually
from vmbus.soak import remote
from vmbus.vm.process import Child

START = 60.0


class Checkout:
    """A copy of the project, as on another machine."""

    def __init__(self, folder: Path) -> None:
        packages = [(vmbus, folder / "device"), (vmbus_guest, folder / "guest")]
        self.roots = [root for _, root in packages]
        copies = []
        for package, root in packages:
            assert package.__file__ is not None
            source = Path(package.__file__).parent
            copies.append(root / source.name)
            shutil.copytree(source, copies[-1], ignore=shutil.ignore_patterns("__pycache__"))
        self.digest = remote.digest_of(copies)


class Cluster:
    """Use it as an asynchronous context manager."""

    def __init__(self, folder: Path, checkout: Checkout) -> None:
        self._folder = folder
        self._checkout = checkout
        self.address = ""
        self.scheduler: Child | None = None
        self.workers: list[Child] = []

    async def _spawn(self, name: str, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Child:
        return await Child.spawn(
            name,
            [sys.executable, "-m", f"distributed.cli.{module}", *arguments],
            self._folder / f"{name}.log",
            environment={
                "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "30s",
                "DASK_TEMPORARY_DIRECTORY": str(self._folder),
                **environment,
            },
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
        await eventually(lambda: "Scheduler at:" in log.read_text(), "the scheduler's address", START)
        self.address = log.read_text().partition("Scheduler at:")[2].split()[0]
        return self

    async def worker(self, *, threads: int = 1, project: bool = True) -> Child:
        """Start one more worker, and wait for it."""
        name = f"worker-{len(self.workers)}"
        path = os.pathsep.join(map(str, self._checkout.roots)) if project else ""
        child = await self._spawn(
            name,
            "dask_worker",
            [self.address, "--no-nanny", "--no-dashboard", "--nthreads", str(threads), "--name", name],
            {"PYTHONPATH": path},
        )
        self.workers.append(child)
        log = self._folder / f"{name}.log"
        await eventually(lambda: "Starting established connection" in log.read_text(), f"{name} to be there", START)
        return child

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        children = [*self.workers, *filter(None, [self.scheduler])]
        await asyncio.gather(*(child.stop() for child in children))
