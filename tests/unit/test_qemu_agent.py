"""The agent's client, against a peer that loses, repeats and mixes things up."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from support import pace
from vmbus.errors import EnvironmentProblem, UsageError, WaitTimeout
from vmbus.qemu import agent
from vmbus.qemu.agent import AgentClient, AgentError
from vmbus_guest import jobs

Handler = Callable[[int, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def peer(path: Path, handler: Handler) -> AsyncIterator[None]:
    """An agent's socket; `handler` gets the connection's number, from 0."""
    count = 0

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        number, count = count, count + 1
        with contextlib.suppress(OSError):
            await handler(number, reader, writer)
        writer.close()

    server = await asyncio.start_unix_server(accept, path=str(path))
    try:
        yield
    finally:
        server.close()


async def requests(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    while line := await reader.readline():
        if line.strip():
            yield json.loads(line)


def reply(writer: asyncio.StreamWriter, request: dict[str, Any], result: dict[str, Any]) -> None:
    writer.write(json.dumps({"id": request["id"], "result": result}).encode() + b"\n")


async def test_requests_and_answers_may_cross(tmp_path: Path) -> None:
    async def handler(_: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen = []
        async for request in requests(reader):
            seen.append(request)
            if len(seen) == 3:
                for one in reversed(seen):
                    reply(writer, one, {"command": one["command"], **one["arguments"]})

    async with peer(tmp_path / "s", handler):
        client = AgentClient(tmp_path / "s")
        await client.connect()
        found = await asyncio.gather(*(client.call("echo", data=n) for n in range(3)))
        assert found == [{"command": "echo", "data": n} for n in range(3)]
        await client.close()


async def test_a_lost_connection_costs_nothing(tmp_path: Path) -> None:
    ids = []

    async def handler(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for request in requests(reader):
            ids.append(request["id"])
            if number == 0:
                writer.write(b'{"id": 12, "resu')  # half an answer, and gone
                return
            reply(writer, request, {"connection": number})

    async with peer(tmp_path / "s", handler):
        client = AgentClient(tmp_path / "s")
        await client.connect()
        assert await client.call("ping", timeout=10) == {"connection": 1}
        assert client.reconnects == 1
        assert len(set(ids)) == 1  # the same request, under the same id
        await client.close()


async def test_a_silent_agent_is_asked_again_under_the_same_id(tmp_path: Path) -> None:
    seen: list[int] = []

    async def handler(_: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for request in requests(reader):
            seen.append(request["id"])
            if len(seen) == 3:
                reply(writer, request, {})
                reply(writer, request, {"a second answer": "is ignored"})

    async with peer(tmp_path / "s", handler):
        client = AgentClient(tmp_path / "s", resend_interval=0.01)
        await client.connect()
        assert await client.call("ping", timeout=10) == {}
        assert seen == [seen[0]] * 3
        await client.close()


def test_two_clients_never_use_the_same_ids() -> None:
    first = {AgentClient(Path("x"))._next_id for _ in range(50)}
    assert len(first) == 50
    assert all(number < 2**53 for number in first)  # any JSON reader keeps them exact


async def test_events_and_noise(tmp_path: Path) -> None:
    async def handler(_: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'est of a line"}\n\xff\xfe\n[1]\n{"event": "ready", "version": 1}\n')
        async for request in requests(reader):
            reply(writer, request, {})

    events: list[dict[str, Any]] = []
    async with peer(tmp_path / "s", handler):
        client = AgentClient(tmp_path / "s", on_event=events.append)
        await client.connect()
        await client.call("ping")
        assert events == [{"event": "ready", "version": 1}]
        await client.close()


async def test_errors_have_the_agents_kind(tmp_path: Path) -> None:
    async def handler(_: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for request in requests(reader):
            error = {"kind": "no-such-job", "message": "there is no job 7"}
            writer.write(json.dumps({"id": request["id"], "error": error}).encode() + b"\n")

    async with peer(tmp_path / "s", handler):
        client = AgentClient(tmp_path / "s")
        await client.connect()
        with pytest.raises(AgentError, match="'poll': there is no job 7") as caught:
            await client.call("poll", job=7)
        assert caught.value.code == "no-such-job"
        await client.close()


async def test_waits_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(_: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    client = AgentClient(tmp_path / "s")
    with pytest.raises(UsageError, match="not connected"):
        await client.call("ping")
    with pytest.raises(WaitTimeout, match="agent's socket"):
        await client.connect(timeout=0.05)
    await client.close()
    async with peer(tmp_path / "s", handler):
        await client.connect()
        with pytest.raises(WaitTimeout, match="to answer 'ping'"):
            await client.call("ping", timeout=0.05)
        with pytest.raises(WaitTimeout, match=r"waited 0.05 s .* to come up"):
            await client.wait_ready(0.05)
        monkeypatch.setenv("VMBUS_PATIENCE", "2")
        with pytest.raises(WaitTimeout, match=r"waited 0.1 s .* to come up"):
            await client.wait_ready(0.05)
        monkeypatch.delenv("VMBUS_PATIENCE")
        waiting = asyncio.create_task(client.call("ping"))
        await asyncio.wait({waiting}, timeout=0.05)
        await client.close()
        with pytest.raises(EnvironmentProblem, match="was closed"):
            await waiting


def test_a_slow_machine_asks_for_no_more_than_the_agent_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMBUS_PATIENCE", "6")
    assert [agent.agents_bound(seconds) for seconds in (10.0, 1000.0, 4000.0)] == [60.0, 3600.0, 4000.0]
    assert agent.LONGEST_BOUND == jobs.LONGEST_WAIT


async def test_a_guest_that_goes_back_in_time_answers_nobody_twice(tmp_path: Path) -> None:
    """Requests under way are told; the rest of a line, and answers of a life that is undone, find nobody."""
    connections: list[asyncio.StreamWriter] = []
    seen: list[dict[str, Any]] = []

    async def handler(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        async for request in requests(reader):
            seen.append(request)
            if number == 0:
                if request["command"] == "before":
                    reply(writer, request, {"life": 0})
                else:  # in the middle of its answer the guest is taken back
                    writer.write(b'{"id": %d, "result": {"li' % request["id"])
            else:
                # The end of a line of then, an answer of then to what was asked then, and to what was told already.
                writer.write(b'fe": 7}}\n')
                for old in seen[:-1]:
                    reply(writer, old, {"life": 0})
                reply(writer, request, {"life": 1})

    async with peer(tmp_path / "s", handler):
        client = AgentClient(tmp_path / "s")
        await client.connect()
        assert await client.call("before") == {"life": 0}
        waiting = asyncio.ensure_future(client.call("wait"))
        while len(seen) < 2:  # noqa: ASYNC110 - the peer is in this very loop
            await asyncio.sleep(0)
        going = asyncio.ensure_future(client.go_back("the VM was taken back: ask again"))
        await asyncio.sleep(0)
        during = asyncio.ensure_future(client.call("during"))  # waits for the new connection
        with pytest.raises(EnvironmentProblem, match="ask again"):
            await waiting
        await going
        assert await during == {"life": 1}
        assert await client.call("after") == {"life": 1}
        assert len(connections) == 2
        assert len({request["id"] for request in seen}) == 4
        await client.close()


NONSENSE = [
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"id": ' + b"9" * 5000 + b', "result": 1}',
    b'{"id": 1e999, "result": 1}',
    b'{"id": NaN, "result": {}}',
    b"\xff\xfe",
    b'"\\ud800"',
    b"[1, 2]",
    b"",
]


@pytest.mark.parametrize("line", NONSENSE, ids=range(len(NONSENSE)))
async def test_fault_h7_one_bad_line_is_one_error(tmp_path: Path, line: bytes) -> None:
    """The client works on over the same connection, and a later one."""

    async def handler(_: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for request in requests(reader):
            writer.write(line + b"\n")
            reply(writer, request, {"ok": True})

    async with peer(tmp_path / "s", handler):
        client = AgentClient(tmp_path / "s")
        await client.connect()
        for _ in range(2):
            assert await client.call("ping", timeout=10) == {"ok": True}
        assert client.reconnects == 0
        await client.close()


@pytest.mark.parametrize("line", [b"\n", b'{"event": "x"}\n'])
async def test_fault_h7_endless_lines_take_no_timeout_away(tmp_path: Path, line: bytes) -> None:
    """What a guest sends without end is read in short turns: others run, and a timeout comes when it should."""

    async def handler(_: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not stop.is_set():
            writer.write(line * 60_000)
            await writer.drain()

    stop = asyncio.Event()
    async with peer(tmp_path / "s", handler):
        client = AgentClient(tmp_path / "s")
        await client.connect()
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        counting = asyncio.create_task(count())
        busy = asyncio.get_running_loop().time()
        with pytest.raises(WaitTimeout):
            await client.call("ping", timeout=1.0)
        took = asyncio.get_running_loop().time() - busy
        counting.cancel()
        assert turns > 20 and took < pace.seconds(5), (turns, took)
        stop.set()
        await client.close()


@pytest.mark.parametrize("result", [{}, {"code": "x", "output": 1, "bytes": 2, "expired": False}, {"expired": True}])
async def test_fault_h7_an_answer_of_another_shape_is_the_agents_error(tmp_path: Path, result: dict[str, Any]) -> None:
    async def handler(_: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for request in requests(reader):
            reply(writer, request, result)

    async with peer(tmp_path / "s", handler):
        client = AgentClient(tmp_path / "s")
        await client.connect()
        with pytest.raises(AgentError, match="its answer is not one"):
            await client.execute(["true"], timeout=5)
        await client.close()
