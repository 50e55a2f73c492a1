"""Both ends of the soak's connections, over TCP on this machine: an end is counted by the right one, and made good."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from support.pace import eventually
from vmbus.soak.peer import Accept, Peer

SEED, SIZE, PAIRS = 7, 20000, 2


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as end:
        return int(end.getsockname()[1])


class Here:
    """A way to a guest that is this machine."""

    def __init__(self) -> None:
        self.port, self.guest_port = free_port(), free_port()

    async def listen(self, accept: Accept) -> asyncio.Server:
        return await asyncio.start_server(accept, "127.0.0.1", self.port)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.guest_port)


class Guest:
    """The test driver, and what it has said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said: dict[str, Any] = {"received": 0, "slowest": 0, "ends": 0}

    async def read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            report = json.loads(line)
            if report["event"] in ("progress", "result"):
                self.said = report.get("result", report)

    async def until(self, condition: Callable[[dict[str, Any]], bool], what: str) -> None:
        await eventually(lambda: condition(self.said), what, 30, every=0.01)


@asynccontextmanager
async def both(seed: int = SEED) -> AsyncIterator[tuple[Guest, Peer]]:
    way = Here()
    peer = Peer(way, SEED, SIZE, PAIRS)
    await peer.start()
    parameters = {"address": "127.0.0.1", "port": way.port, "listen": way.guest_port, "pairs": PAIRS, "size": SIZE}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vmbus_guest.testdrivers", "frames"),
        *("--parameters", json.dumps(parameters | {"seed": seed, "pace": 0.0})),
        stdout=asyncio.subprocess.PIPE,
    )
    guest = Guest(process)
    reading = asyncio.create_task(guest.read())
    try:
        yield guest, peer
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reading
        await peer.close()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 100))


def test_connections_that_are_forgotten_are_made_again_and_excused() -> None:
    async def story() -> None:
        async with both() as (guest, peer):
            for ends in (0, 2 * PAIRS, 4 * PAIRS):
                await guest.until(lambda said, ends=ends: said["ends"] == ends, f"{ends} ends")  # type: ignore[misc]
                slowest = guest.said["slowest"]
                await guest.until(lambda said, at=slowest: said["slowest"] > at + 20, "frames on all")  # type: ignore[misc]
                if ends < 4 * PAIRS:
                    peer.cut()
            guest.process.terminate()
            await guest.until(lambda said: "verdict" in said, "the end")
            assert guest.said["verdict"] == "passed" and not guest.said["wrong"], guest.said
            assert not peer.ends and not peer.wrong and peer.frames >= guest.said["received"] > 0

    run(story())


def test_sabotage_a_guest_that_drops_its_connections_and_other_bytes_are_noticed() -> None:
    async def drops() -> None:
        async with both() as (guest, peer):
            await guest.until(lambda said: said["slowest"] > 3, "frames on all")
            guest.process.kill()
            await guest.process.wait()
            await guest.until(lambda _: peer.ends == 2 * PAIRS, "the host to notice")

    async def other_bytes() -> None:
        async with both(seed=SEED + 1) as (guest, peer):
            await guest.until(lambda _: bool(peer.wrong), "the host to notice")
            assert "not those that were sent" in peer.wrong[0]

    run(drops())
    run(other_bytes())
