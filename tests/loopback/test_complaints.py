"""A real server whose guest and client misbehave as fast as they can: its log stays short, and says what is missing."""

from __future__ import annotations

import asyncio
import io
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loopback.test_control import Process
from support import pace
from vmbus.bus.synic import Register
from vmbus.observe.inspection.document import Inspection, from_answer
from vmbus.observe.inspection.tree import age_text, render
from vmbus.server.control import ControlClient
from vmbus.testkit.loopback.client import RemoteError, VfioUserClient
from vmbus.testkit.loopback.function import LoopbackFunction
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.transport.library import Library
from vmbus.util.complaints import BURST
from vmbus_guest.driver import VmbusDriver

TIMES = 3000


def shown(document: Inspection) -> str:
    console = Console(width=1000, file=io.StringIO())
    console.print(render(document))
    return console.file.getvalue()


def ask(path: Path, command: str) -> dict[str, Any]:
    async def body() -> dict[str, Any]:
        client = ControlClient(path)
        try:
            return await client.call(command)
        finally:
            client.close()

    return asyncio.run(body())


def bad_posts(socket: Path) -> int:
    """5 bytes of nonsense to the bus, again and again."""
    with LoopbackFunction(socket) as function:
        driver = VmbusDriver(function)
        driver._post(4, b"\xff" * 240)
        for _ in range(TIMES - 1):
            function.write32(Register.POST_MESSAGE, 1)
        function.barrier()
        driver.close()
    return TIMES


def unknown_commands(socket: Path) -> int:
    """The library complains of each."""
    with VfioUserClient(socket) as client:
        for _ in range(TIMES):
            with pytest.raises(RemoteError):
                client.request(200, bytes(4))
    return TIMES


def coming_and_going(socket: Path) -> int:
    """Each is a line when it comes, and one when it leaves."""
    for _ in range(60):
        VfioUserClient(socket).close()
    return 100  # the last ones may still be on their way


@pytest.mark.parametrize("misbehave", [bad_posts, unknown_commands, coming_and_going])
def test_the_log_of_a_server_stays_short(
    misbehave: Callable[[Path], int], libvfio_user: Library, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with log.open("wb") as errors, Process(tmp_path, libvfio_user, errors=errors) as server:
        server.listening()
        began = time.monotonic()
        happened = misbehave(server.socket)
        took = time.monotonic() - began
        status = ask(server.control, "status")
        tree = shown(from_answer(ask(server.control, "inspect"), "echo"))
        server.process.send_signal(signal.SIGTERM)
        assert server.end()[0] == 0
    text = log.read_text()
    kinds = text.count("left out in the last") + 3
    assert len(text.splitlines()) <= kinds * (BURST + took / 10 + 2) and len(text) < 20_000
    complaints = status["complaints"]
    assert complaints["left_out"] > 0.3 * happened and complaints["written"] + complaints["left_out"] >= happened
    said = sum(int(number) for number in re.findall(r"(\d+) more like this left out in the last", text))
    assert said >= complaints["left_out"], "what was left out is said at the end at the latest"
    assert f"{complaints['left_out']} complaints left out of its log" in tree
    assert sum(complaints["most"].values()) == complaints["left_out"]


def test_the_longest_turn_is_named(libvfio_user: Library) -> None:
    with LoopbackServer(describe("echo"), libvfio_user) as server:
        before = server.command("status")["longest_turn"]
        assert set(before) == {"seconds", "what", "last_minute"}

        def slow() -> None:
            time.sleep(0.25)

        server.on_loop(lambda: server.server.timers.call_later(0.0, slow))
        # It is on its way through the same loop before this is.
        deadline = time.monotonic() + pace.seconds(10)
        while (after := server.command("status")["longest_turn"])["seconds"] < 0.25:
            assert time.monotonic() < deadline, after
        assert after["what"].startswith("timer ") and after["what"].endswith("slow")
        assert after["last_minute"] == {"seconds": after["seconds"], "what": after["what"]}
        document = from_answer(server.command("inspect"), "echo")
        assert document.server is not None and document.server.longest_turn == after
        assert f"(longest turn {age_text(after['seconds'])}: " in shown(document)


def test_a_guests_request_that_takes_long_is_named(libvfio_user: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    with LoopbackServer(describe("echo"), libvfio_user) as server, server.function() as function:
        device = server.server.device
        original = device.bar_write

        def slow(offset: int, data: bytes) -> None:
            if offset == Register.EOM:
                time.sleep(0.2)
            original(offset, data)

        monkeypatch.setattr(device, "bar_write", slow)
        function.write32(Register.EOM, 0)
        function.barrier()
        longest = server.command("status")["longest_turn"]
        assert longest["what"] == "requests of the client" and longest["seconds"] >= 0.2
        function.abandon()
