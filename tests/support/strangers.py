"""Who connects to a listener, and proves nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from support.pace import eventually


async def _come(place: tuple[str, int], came: list[asyncio.StreamWriter], say: bytes) -> None:
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(*place)
            came.append(writer)
            writer.write(say)
            await reader.read(-1)
            writer.close()


@contextlib.asynccontextmanager
async def flood(place: tuple[str, int], strangers: int, say: bytes = b"") -> AsyncIterator[None]:
    """So many of them, all there at once: each says this much, and comes again when it is sent away."""
    came: list[asyncio.StreamWriter] = []
    tasks = [asyncio.create_task(_come(place, came, say)) for _ in range(strangers)]
    try:
        await eventually(lambda: len(came) >= strangers, "the flood", 10)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in came:
            writer.close()
