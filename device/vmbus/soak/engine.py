"""Where episodes run: here, as processes of this machine, or wherever else an `Engine` takes them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Protocol

from vmbus.errors import EnvironmentProblem
from vmbus.soak.job import Job, run_job
from vmbus.soak.records import EpisodeRecord
from vmbus.soak.sink import Sink

PROCESSORS_EACH = 2
"""An episode keeps a QEMU and a device server busy, and at times a second pair of them."""
MEMORY_EACH = 1536 << 20
"""Bytes of memory for one episode: at most three VMs at a time (a VM and its two clones), and their servers."""


class EngineLost(EnvironmentProblem):
    """The engine cannot go on: what runs there is lost. The campaign can be gone on with later."""


class Engine(Protocol):
    @property
    def description(self) -> str:
        """For people."""

    async def slots(self) -> int:
        """How many episodes may run at once, as it is now. Raises `EngineLost`."""

    async def run(self, job: Job, folder: Path, sink: Sink, stop: asyncio.Event) -> EpisodeRecord:
        """Run one episode; what it leaves is in `folder` afterwards. `stop` ends it early. Raises `EngineLost`."""

    async def close(self) -> None:
        """Let go of everything."""


class LocalEngine:
    """Episodes are processes of this machine."""

    def __init__(self, parallel: int | None = None) -> None:
        """`parallel`: how many at once; None for as many as the machine has processors and memory for."""
        self.parallel = parallel or capacity()

    @property
    def description(self) -> str:
        return f"this machine, {self.parallel} at a time"

    async def slots(self) -> int:
        return self.parallel

    async def run(self, job: Job, folder: Path, sink: Sink, stop: asyncio.Event) -> EpisodeRecord:
        return await run_job(job, folder, sink, stop, where="here")

    async def close(self) -> None:
        pass


def capacity(processors: int | None = None, memory: int | None = None) -> int:
    """How many episodes this machine (or one with so many processors and bytes of memory) runs well at once."""
    if processors is None:
        processors = len(os.sched_getaffinity(0))
    if memory is None:
        memory = available_memory()
    return max(1, min(processors // PROCESSORS_EACH, memory // MEMORY_EACH))


def available_memory() -> int:
    """Bytes of memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
