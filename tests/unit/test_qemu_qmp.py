"""The monitor's layer, against a peer that speaks QMP and misbehaves on request."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from vmbus.errors import EnvironmentProblem, WaitTimeout
from vmbus.qemu.qmp import MigrationFailed, Monitor, QmpCommandFailed, file_channel

GREETING = {"QMP": {"version": {"qemu": {"major": 11, "minor": 1, "micro": 3}, "package": ""}, "capabilities": []}}

Answer = dict[str, Any] | None
"""The reply without its id; None for silence."""


async def documents(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON documents of a stream: in QMP nothing need be between them."""
    text = ""
    while data := await reader.read(4096):
        text += data.decode()
        while text := text.lstrip():
            try:
                found, end = json.JSONDecoder().raw_decode(text)
            except ValueError:
                break
            text = text[end:]
            yield found


class Peer:
    """A QMP server. `answer` gets (command, arguments) and says what to reply; `send` sends an event."""

    def __init__(self, answer: Callable[[str, dict[str, Any]], Answer]) -> None:
        self.answer = answer
        self.writer: asyncio.StreamWriter | None = None

    def send(self, message: dict[str, Any]) -> None:
        assert self.writer is not None
        self.writer.write(json.dumps(message).encode() + b"\r\n")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.send(GREETING)
        async for request in documents(reader):
            if request["execute"] == "qmp_capabilities":
                reply: Answer = {"return": {}}
            else:
                reply = self.answer(request["execute"], request.get("arguments", {}))
            if reply == {"hang up": True}:
                break
            if reply is not None:
                self.send({**reply, "id": request["id"]} if "id" in request else reply)
        writer.close()


@contextlib.asynccontextmanager
async def connected(path: Path, answer: Callable[[str, dict[str, Any]], Answer]) -> AsyncIterator[tuple[Monitor, Peer]]:
    peer = Peer(answer)
    server = await asyncio.start_unix_server(peer.serve, path=str(path))
    monitor = Monitor("the VM")
    try:
        await monitor.connect(path, timeout=10)
        yield monitor, peer
    finally:
        await monitor.close()
        server.close()


async def test_commands_and_their_values(tmp_path: Path) -> None:
    def answer(command: str, arguments: dict[str, Any]) -> Answer:
        return {
            "query-status": {"return": {"status": "paused", "running": False}},
            "human-monitor-command": {"return": f"<{arguments.get('command-line')}>\r\n"},
        }[command]

    async with connected(tmp_path / "s", answer) as (monitor, _):
        assert await monitor.status() == "paused"
        assert await monitor.running() is False
        assert await monitor.human("info pci") == "<info pci>"


async def test_a_refusal_carries_qemus_words(tmp_path: Path) -> None:
    refusal = {"error": {"class": "GenericError", "desc": "No space left"}}
    async with connected(tmp_path / "s", lambda *_: refusal) as (monitor, _):
        with pytest.raises(QmpCommandFailed, match="the VM refused 'migrate': No space left"):
            await monitor.execute("migrate")


async def test_silence_is_bounded_and_the_connection_survives_it(tmp_path: Path) -> None:
    replies: list[Answer] = [None, {"return": 7}]
    async with connected(tmp_path / "s", lambda *_: replies.pop(0)) as (monitor, _):
        with pytest.raises(WaitTimeout, match="monitor command 'stop'"):
            await monitor.execute("stop", timeout=0.05)
        assert await monitor.execute("again") == 7


async def test_a_lost_connection_is_an_environment_problem(tmp_path: Path) -> None:
    async with connected(tmp_path / "s", lambda *_: {"hang up": True}) as (monitor, _):
        for _ in range(2):
            with pytest.raises(EnvironmentProblem, match="lost the monitor of the VM during 'stop'"):
                await monitor.execute("stop", timeout=10)


async def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="cannot connect to the monitor"):
        await Monitor("the VM").connect(tmp_path / "absent", timeout=5)


async def test_a_peer_that_does_not_greet(tmp_path: Path) -> None:
    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    server = await asyncio.start_unix_server(mute, path=str(tmp_path / "s"))
    with pytest.raises(WaitTimeout, match="to greet"):
        await Monitor("the VM").connect(tmp_path / "s", timeout=0.05)
    server.close()


def statuses(*texts: str) -> Callable[[str, dict[str, Any]], Answer]:
    """Answers query-migrate with these statuses in turn, the last one for ever."""
    left = list(texts)

    def answer(command: str, _: dict[str, Any]) -> Answer:
        assert command == "query-migrate"
        status = left.pop(0) if len(left) > 1 else left[0]
        found = {"status": status} if status != "none" else {}
        if status == "failed":
            found["error-desc"] = "disk full"
        return {"return": found}

    return answer


async def test_a_migration_is_waited_for_with_and_without_events(tmp_path: Path) -> None:
    answer = statuses("none", "setup", "active", "pre-switchover")
    async with connected(tmp_path / "s", answer) as (monitor, _):
        assert await monitor.wait_migration({"pre-switchover"}, 10, "the copy") == "pre-switchover"

    held = {"status": "active"}
    async with connected(tmp_path / "s2", lambda *_: {"return": held}) as (monitor, peer):
        waiting = asyncio.create_task(monitor.wait_migration({"completed"}, 10, "the copy"))
        await asyncio.sleep(0)
        held["status"] = "completed"
        peer.send({"event": "MIGRATION", "data": {}, "timestamp": {"seconds": 0, "microseconds": 0}})
        assert await waiting == "completed"


async def test_a_failed_migration_ends_the_wait_with_the_reason(tmp_path: Path) -> None:
    async with connected(tmp_path / "s", statuses("active", "failed")) as (monitor, _):
        with pytest.raises(MigrationFailed, match="the copy: the migration of the VM failed: disk full"):
            await monitor.wait_migration({"completed"}, 10, "the copy")


async def test_a_migration_that_hangs(tmp_path: Path) -> None:
    async with connected(tmp_path / "s", statuses("active")) as (monitor, _):
        with pytest.raises(WaitTimeout, match=r"the copy .*is 'active'"):
            await monitor.wait_migration({"completed"}, 0.05, "the copy")


async def test_cont_waits_for_the_end_of_a_migration(tmp_path: Path) -> None:
    states = ["finish-migrate", "finish-migrate", "postmigrate"]
    commands = []

    def answer(command: str, _: dict[str, Any]) -> Answer:
        commands.append(command)
        return {"return": {"status": states.pop(0), "running": False} if command == "query-status" else {}}

    async with connected(tmp_path / "s", answer) as (monitor, _):
        await monitor.cont()
    assert commands == ["query-status"] * 3 + ["cont"]


def test_file_channels_take_any_path() -> None:
    (channel,) = file_channel(Path("/a,b=c/ram"))
    assert channel["addr"] == {"transport": "file", "filename": "/a,b=c/ram", "offset": 0}
