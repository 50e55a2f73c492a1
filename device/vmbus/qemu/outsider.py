"""Processes of a VM that somebody else started: they are watched, and never ended by us.

What is known of them is a connection: when that ends, the process counts as gone.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from vmbus.vm.process import Child, ProcessDied


class Outsider(Child):
    """Stands where a child of ours would. `exited` is done when its connection has ended: 0 if it said why."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.log = Path("/dev/null")
        self.witness = None
        self._end: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.exited = asyncio.create_task(self._ended(), name=f"end of {name}")

    async def _ended(self) -> int:
        return await self._end

    def gone(self, *, told: bool) -> None:
        """Its connection has ended; `told`: after it had said why."""
        if not self._end.done():
            self._end.set_result(0 if told else 1)

    def death(self, doing: str = "") -> ProcessDied:
        """The error that says so."""
        during = f" while we waited for {doing}" if doing else ""
        return ProcessDied(f"{self.name} is gone, or has ended its connection to us{during}; it was started elsewhere")

    async def stop(self, grace: float = 0.0) -> None:
        """It is not ours to end."""


async def until_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, process: Outsider) -> None:
    """Holds a connection over which nothing is said until it ends, and the process with it."""
    try:
        with contextlib.suppress(OSError):
            while await reader.read(4096):
                pass
        process.gone(told=False)
    finally:
        writer.close()
