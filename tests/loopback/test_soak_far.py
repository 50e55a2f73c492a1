"""The way between two ends of a far migration: over the link of two hosts, and over nothing else."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from support.pace import seconds
from vmbus.soak.far import HERE, NEAR, far, free_port
from vmbus.testbed.hosts import Forbidden

DATA = bytes(range(256)) * 256


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


async def _story(base: Path) -> None:
    port = free_port()
    async with (
        await asyncio.start_server(_echo, HERE, port),
        far([port], base, rate=50e6, latency=0.0, loss=0.0) as hosts,
        asyncio.timeout(seconds(60)),
    ):
        reader, writer = await asyncio.open_connection(NEAR, port)

        async def answer() -> bytes:
            return await reader.readexactly(len(DATA))

        writer.write(DATA)
        assert await answer() == DATA
        sent = (await hosts.a.counters())["sent"]
        assert sent > len(DATA) < (await hosts.b.counters())["sent"], "over the link, both ways"

        await hosts.cut()
        before = (await hosts.b.counters())["received"]
        writer.write(DATA)
        waiting = asyncio.create_task(answer())
        done, _ = await asyncio.wait({waiting}, timeout=0.5)
        assert not done and (await hosts.b.counters())["received"] == before
        await hosts.mend()
        assert await waiting == DATA
        writer.close()


def test_what_is_sent_goes_over_the_link_alone_and_waits_while_that_is_cut(tmp_path: Path) -> None:
    try:
        asyncio.run(_story(tmp_path))
    except Forbidden as error:
        pytest.skip(str(error))
    assert list(tmp_path.iterdir()) == []
