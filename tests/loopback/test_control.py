"""The control socket and the server process: whatever is said to them, the device runs on; ends are clean."""

import asyncio
import json
import logging
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import pace
from vmbus.errors import EnvironmentProblem, StateError, UsageError, VmbusError, WaitTimeout
from vmbus.kmcl.status import Status
from vmbus.providers.echo import EchoProvider
from vmbus.server.control import ControlClient, ControlError
from vmbus.testkit.loopback.client import RemoteError
from vmbus.testkit.loopback.function import LoopbackFunction
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.transport import protocol
from vmbus.transport.library import Generation, Library
from vmbus.transport.migration import LONGEST_DATA
from vmbus.wire.workload import ECHO_TYPE, echo_request, parse_echo_reply
from vmbus_guest.driver import VmbusDriver


@pytest.fixture
def server(libvfio_user: Library) -> Iterator[LoopbackServer]:
    with LoopbackServer(describe("echo"), libvfio_user) as server:
        yield server


class Raw:
    """A bare connection to a control socket."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rb")

    def say(self, line: bytes) -> dict[str, Any]:
        self.socket.sendall(line + b"\n")
        return json.loads(self.file.readline())

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        return self.say(json.dumps({"id": 5, "command": command, "arguments": arguments}).encode())

    def close(self) -> None:
        self.file.close()
        self.socket.close()


@pytest.fixture
def raw(server: LoopbackServer) -> Iterator[Raw]:
    connection = Raw(server.control_path)
    yield connection
    connection.close()


def transact(driver: VmbusDriver, channel: Any, number: int = 0) -> None:
    answers: list[bytes] = []
    packet = channel.allocate_packet()
    packet.completion_routine = lambda packet, status, reply: answers.append(reply)
    packet.send(echo_request(number, b"data", inline=True))
    driver.run_until(lambda: bool(answers), 10, "an echo")
    parsed = parse_echo_reply(answers[0])
    assert parsed is not None and (parsed.sequence, parsed.status) == (number, 0)


def opened(server: LoopbackServer) -> tuple[VmbusDriver, Any]:
    driver = VmbusDriver(server.function())
    channel = driver.client_channel(ECHO_TYPE, name="echo")
    driver.enable(channel)
    return driver, channel


# ---- abuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\xfe\x00",
        b'{"id": 1, "command": "status", "more": 1}',
        b'{"id": 1, "command": "status", "arguments": {"a": ' + b"[" * 100_000,
    ],
)
def test_what_is_not_a_request_is_answered_and_the_connection_stays(raw: Raw, line: bytes) -> None:
    assert raw.say(line)["error"]["kind"] == "usage"
    assert raw.call("status")["result"]["phase"] == "running"


@pytest.mark.parametrize(
    ("command", "arguments", "word"),
    [
        ("", {}, "known: "),
        ("reboot", {}, "reboot"),
        ("_status", {}, "known: "),
        ("status", {"verbose": True}, "verbose"),
        ("save", {}, "path"),
        ("save", {"path": "/x", "again": 1}, "again"),
        ("pause", {"seconds": "soon"}, "seconds"),
        ("pause", {"seconds": -1}, "seconds"),
        ("pause", {"seconds": 1e300}, "seconds"),
        ("pause", {"seconds": True}, "seconds"),
        ("pause", {"seconds": None}, "seconds"),
        ("save", {"path": "/tmp/x"}, "paused"),
        ("flush", {}, "paused"),
        ("resume", {}, "paused"),
        ("restore-finish", {}, "restoring"),
    ],
)
def test_wrong_commands_and_arguments_are_explained(
    raw: Raw, command: str, arguments: dict[str, Any], word: str
) -> None:
    error = raw.call(command, **arguments)["error"]
    assert error["kind"] == "usage" and word in error["message"]
    assert raw.call("status")["result"]["phase"] == "running"


def test_wrong_arguments_while_paused(raw: Raw) -> None:
    raw.call("pause")
    assert raw.call("pause")["error"]["kind"] == "usage"
    assert raw.call("save", path=7)["error"]["kind"] == "usage"
    assert raw.call("save", path="/tmp/x\0y")["error"]["kind"] == "environment"
    assert raw.call("save", path="/nowhere/at/all")["error"]["kind"] == "environment"
    assert raw.call("flush")["error"]["message"].startswith("no dirty log")
    assert raw.call("status")["result"]["phase"] == "paused"
    assert raw.call("resume") == {"id": 5, "result": {}}


def test_a_second_save_to_the_same_file_is_refused_and_the_first_stays(server: LoopbackServer, tmp_path: Path) -> None:
    server.command("pause")
    path = tmp_path / "state"
    report = server.command("save", path=str(path))
    data = path.read_bytes()
    assert len(data) == report["bytes"] and stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(EnvironmentProblem, match="exists"):
        server.command("save", path=str(path))
    assert path.read_bytes() == data
    other = server.command("save", path=str(tmp_path / "other"), durable=False)
    assert (tmp_path / "other").read_bytes() == data
    assert other["sha256"] == report["sha256"]
    assert other["config"] == server.command("pci")["config"]
    assert other["description"] == server.command("status")["description"]


def test_lines_may_come_in_pieces_and_in_crowds(raw: Raw) -> None:
    for byte in b'{"id": 1, "command": "pci"}\n':
        raw.socket.sendall(bytes([byte]))
    assert json.loads(raw.file.readline())["id"] == 1
    raw.socket.sendall(b"".join(b'{"id": %d, "command": "status"}\n' % number for number in range(200)))
    assert [json.loads(raw.file.readline())["id"] for _ in range(200)] == list(range(200))


def test_clients_that_hang_up_leave_nothing_behind(server: LoopbackServer) -> None:
    for _ in range(20):
        rude = Raw(server.control_path)
        rude.socket.sendall(b'{"id": 1, "command": "inspect"}\n' * 50)
        rude.close()
    polite = Raw(server.control_path)
    assert polite.call("status")["result"]["phase"] == "running"
    polite.close()


def test_an_endless_line_ends_the_connection_alone(server: LoopbackServer, monkeypatch: pytest.MonkeyPatch) -> None:
    rude, polite = Raw(server.control_path), Raw(server.control_path)
    try:
        rude.socket.sendall(b"x" * (17 << 20))
        assert rude.socket.recv(1) == b""
    except ConnectionError:
        pass
    assert polite.call("status")["result"]["phase"] == "running"
    rude.close()
    polite.close()


def test_sockets_are_the_owners_alone(server: LoopbackServer) -> None:
    for path in (server.socket_path, server.control_path):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


async def test_the_client_says_what_is_wrong(server: LoopbackServer, tmp_path: Path) -> None:
    client = ControlClient(server.control_path)
    with pytest.raises(ControlError, match="device server, resume: resume needs a server that is paused") as error:
        await client.call("resume")
    assert error.value.kind == "usage"
    assert (await client.call("pause"))["incoming_held"] == 0
    client.close()
    with pytest.raises(EnvironmentProblem, match="gone or never was there"):
        await ControlClient(tmp_path / "nobody").call("status")


# ---- pausing ---------------------------------------------------------------------------------------------------------


class Miser(EchoProvider):
    """Keeps every packet, whatever happens, until it is told to let go."""

    def _answer(self, completion, payload: bytes) -> None:
        self.kept = [*getattr(self, "kept", []), (completion, payload)]

    def let_go(self) -> None:
        for completion, payload in self.kept:
            super()._answer(completion, payload)
        self.kept = []


@pytest.fixture
def miser(libvfio_user: Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackServer]:
    monkeypatch.setitem(sys.modules["vmbus.providers"].PROVIDERS, "echo", Miser)
    with LoopbackServer(describe("echo"), libvfio_user) as server:
        yield server


def keep_one(server: LoopbackServer) -> tuple[VmbusDriver, Any, list[bytes]]:
    driver, channel = opened(server)
    answers: list[bytes] = []
    packet = channel.allocate_packet()
    packet.completion_routine = lambda packet, status, reply: (
        answers.append(reply) if status == Status.SUCCESS else None
    )
    packet.send(echo_request(0, b"kept", inline=True))
    driver.function.barrier()
    while not server.on_loop(lambda: getattr(server.server.providers[0], "kept", [])):
        driver.step(0.01)
    return driver, channel, answers


def test_a_provider_that_keeps_a_packet_lets_the_pause_time_out_and_the_device_runs_on(miser: LoopbackServer) -> None:
    driver, _, answers = keep_one(miser)
    for _ in range(2):
        with pytest.raises(WaitTimeout, match=r"incoming packets \{'echo': \[1\]\}"):
            miser.command("pause", seconds=0.05)
        status = miser.command("status")
        assert (status["phase"], status["incoming_held"]) == ("running", 1)
    miser.on_loop(miser.server.providers[0].let_go)
    driver.run_until(lambda: len(answers) == 1, 10, "the packet that was kept")
    miser.command("pause")
    miser.command("resume")
    driver.close(graceful=False)


async def test_nothing_can_be_saved_while_a_pause_is_going_on(miser: LoopbackServer, tmp_path: Path) -> None:
    driver, _, answers = keep_one(miser)

    one, other = ControlClient(miser.control_path), ControlClient(miser.control_path)
    pause = asyncio.create_task(one.call("pause", seconds=10))
    while (await other.call("status"))["phase"] == "running":
        pass
    assert (await other.call("status"))["phase"] == "pausing"
    for command, arguments in (
        ("save", {"path": str(tmp_path / "state")}),
        ("flush", {}),
        ("pause", {}),
    ):
        with pytest.raises(ControlError, match="pausing"):
            await other.call(command, **arguments)
    await asyncio.to_thread(miser.on_loop, miser.server.providers[0].let_go)
    await pause
    assert (await other.call("status"))["phase"] == "paused"
    await other.call("resume")
    one.close()
    other.close()
    driver.run_until(lambda: len(answers) == 1, 10, "the packet that was kept")
    driver.close(graceful=False)


async def test_resume_calls_a_pause_off_that_still_waits(miser: LoopbackServer) -> None:
    driver, _, answers = keep_one(miser)

    one, other = ControlClient(miser.control_path), ControlClient(miser.control_path)
    pause = asyncio.create_task(one.call("pause", seconds=10))
    while (await other.call("status"))["phase"] == "running":
        pass
    await other.call("resume")
    with pytest.raises(ControlError, match="called off"):
        await pause
    assert (await other.call("status"))["phase"] == "running"
    one.close()
    other.close()
    miser.on_loop(miser.server.providers[0].let_go)
    driver.run_until(lambda: len(answers) == 1, 10, "the packet that was kept")
    driver.close(graceful=False)


def test_a_paused_device_takes_nothing_and_goes_on_where_it_was(server: LoopbackServer) -> None:
    driver, channel = opened(server)
    server.command("pause")
    answers: list[bytes] = []
    for number in range(10):
        packet = channel.allocate_packet()
        packet.completion_routine = lambda packet, status, reply: answers.append(reply)
        packet.send(echo_request(number, b"x", inline=True))
    driver.function.barrier()
    driver.step(0.0)
    assert not answers and server.command("status")["providers"]["echo"]["tally"]["started"] == 0
    server.command("resume")
    driver.run_until(lambda: len(answers) == 10, 10, "the answers")
    driver.close()


# ---- the process -----------------------------------------------------------------------------------------------------


class Process:
    """`python -m vmbus.cli.serve` with the arguments given."""

    def __init__(
        self, directory: Path, library: Library, *arguments: str, errors: Any = subprocess.PIPE, **paths: Path
    ) -> None:
        self.socket = paths.get("socket", directory / "vfio.sock")
        self.control = paths.get("control", directory / "control.sock")
        description = directory / "device.json"
        description.write_bytes(describe("echo").to_json())
        command = [sys.executable, "-m", "vmbus.cli.serve", str(description)]
        command += ["--socket", str(self.socket), "--control", str(self.control)]
        command += ["--libvfio-user", str(library.path), *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)

    def listening(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def end(self) -> tuple[int, str, str]:
        output, errors = self.process.communicate(timeout=pace.seconds(20))
        return self.process.returncode, output, errors

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, "stop"])
def test_a_server_ends_cleanly(libvfio_user: Library, tmp_path: Path, end: Any) -> None:
    with Process(tmp_path, libvfio_user) as server:
        line = server.listening()
        assert line == {"event": "listening", "socket": str(server.socket), "control": str(server.control)}
        function = LoopbackFunction(server.socket)
        driver = VmbusDriver(function)
        channel = driver.client_channel(ECHO_TYPE, name="echo")
        driver.enable(channel)
        transact(driver, channel)
        if end == "stop":
            raw = Raw(server.control)
            assert raw.call("stop")["result"] == {}
            raw.close()
        else:
            server.process.send_signal(end)
        status, _, errors = server.end()
        assert status == 0, errors
        assert "Traceback" not in errors
        assert not server.socket.exists() and not server.control.exists()
        function.abandon()


def test_sockets_in_use_are_said_and_left_alone(libvfio_user: Library, tmp_path: Path) -> None:
    with Process(tmp_path, libvfio_user) as first:
        first.listening()
        for name in ("socket", "control"):
            others = {"socket": tmp_path / "other.sock", "control": tmp_path / "other-control.sock"}
            others[name] = getattr(first, name)
            with Process(tmp_path, libvfio_user, **others) as second:
                status, output, errors = second.end()
                assert status == EnvironmentProblem.status and output == ""
                assert errors.splitlines()[-1].startswith("device server: ")
                assert str(others[name]) in errors and "Traceback" not in errors
            others.pop(name)
            assert not any(path.exists() for path in others.values()), "what it had made is gone again"
        raw = Raw(first.control)
        assert raw.call("status")["result"]["phase"] == "running"
        raw.close()
        with LoopbackFunction(first.socket) as function:
            VmbusDriver(function).close()


def test_stale_sockets_of_a_killed_server_are_replaced(libvfio_user: Library, tmp_path: Path) -> None:
    with Process(tmp_path, libvfio_user) as first:
        first.listening()
        first.process.kill()
        first.end()
        assert first.socket.exists() and first.control.exists()
    with Process(tmp_path, libvfio_user) as second:
        second.listening()
        raw = Raw(second.control)
        assert raw.call("status")["result"]["pid"] == second.process.pid
        raw.close()


def test_damaged_state_is_refused_before_anything_listens(libvfio_user: Library, tmp_path: Path) -> None:
    with LoopbackServer(describe("echo"), libvfio_user) as server:
        server.command("pause")
        server.command("save", path=str(tmp_path / "state"))
    data = bytearray((tmp_path / "state").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "state").write_bytes(data)
    with Process(tmp_path, libvfio_user, "--restore", str(tmp_path / "state")) as process:
        status, output, errors = process.end()
        assert (status, output) == (StateError.status, "") and "SHA-256" in errors and "Traceback" not in errors
        assert not process.socket.exists() and not process.control.exists()


def test_state_of_another_device_is_refused_before_anything_listens(libvfio_user: Library) -> None:
    with LoopbackServer(describe("burst"), libvfio_user) as server:
        state = server.save()
    with pytest.raises(StateError, match="providers"):
        LoopbackServer(describe("echo"), libvfio_user, restore=state)


def test_commands_of_a_server_that_waits_for_its_guest(libvfio_user: Library, tmp_path: Path) -> None:
    with LoopbackServer(describe("echo"), libvfio_user) as server:
        state = server.save()
    with LoopbackServer(describe("echo"), libvfio_user, restore=state) as server:
        assert server.command("status")["phase"] == "restoring"
        for command, arguments in (("pause", {}), ("save", {"path": str(tmp_path / "x")}), ("resume", {})):
            with pytest.raises(UsageError, match="restoring"):
                server.command(command, **arguments)
        assert server.command("restore-finish")["channels"] == 0
        assert server.command("status")["phase"] == "running"


# ---- who drives ------------------------------------------------------------------------------------------------------


def test_the_server_knows_whether_its_client_drives(libvfio_user: Library, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "vmbus.transport.library_context.library")
    with LoopbackServer(describe("echo"), libvfio_user) as server, server.function() as function:
        assert server.command("status")["driven_by_client"] is False
        if libvfio_user.generation is Generation.OLD:
            with pytest.raises(RemoteError):
                function.client.migration_flags()
            assert server.command("status")["driven_by_client"] is False
            assert function.client.longest_transfer == 1 << 20
            return
        with pytest.raises(VmbusError):
            function.client.feature(99, protocol.FEATURE_GET, room=8)
        assert server.command("status")["driven_by_client"] is False, "that was another question"
        flags = function.client.migration_flags()
        assert flags == protocol.MIGRATION_STOP_COPY | protocol.MIGRATION_PRE_COPY
        assert server.command("status")["driven_by_client"] is True
        assert function.client.longest_transfer == LONGEST_DATA
        function.close()
        pace.until(lambda: not server.on_loop(lambda: server.server.context.attached), "the client's end")
        assert server.command("status")["driven_by_client"] is False
