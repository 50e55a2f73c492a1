"""The command line: parsing, the console's keys, and errors as one line."""

from __future__ import annotations

import asyncio
import os
import pty
import termios
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from vmbus.cli import console, main
from vmbus.cli.agent import build_request, parse_parameters
from vmbus.cli.console import ESCAPE, EscapeFilter, raw_terminal
from vmbus.errors import EnvironmentProblem, UsageError

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def run(*words: str) -> Any:
    return CliRunner().invoke(main, list(words))


def test_the_commands_are_there() -> None:
    help_text = run("--help").output
    for command in ("run-vm", "save", "restore", "checkpoint", "revert", "list", "agent", "provider", "ssh"):
        assert command in help_text
        assert run(command, "--help").exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["save", "/x"], "error: no VM is running; scripts/run-vm starts one\n"),
        (["agent", "list"], "error: no VM is running"),
        (["checkpoint", "now"], "error: no VM is running"),
        (["checkpoint", "a", "b"], "error: no VM 'a' is running"),
        (["checkpoint"], "error: give [NAME] TAG"),
        (["checkpoint", "--list", "a", "b"], "error: give [NAME] alone with --list"),
        (["checkpoint", "--list"], "error: no VM is running"),
        (["checkpoint", "--delete"], "error: give [NAME] TAG"),
        (["revert", "now"], "error: no VM is running"),
        (["revert"], "error: give [NAME] TAG"),
        (["provider", "services", "kvp-set", "key"], "error: 'key' is not of the form key=value"),
        (["provider", "services", "heartbeat"], "error: no VM is running"),
        (["ssh", "-L", "1:localhost:2"], "error: no VM is running"),
        (["agent", "run"], "error: agent run: name a test driver"),
        (["agent", "wait", "x"], "error: agent wait: give a job number"),
        (["agent", "start", "echo", "count"], "error: 'count' is not of the form key=value"),
        (["migrate"], "error: give [NAME] ADDRESS"),
        (["migrate", "tcp:there:1"], "error: no VM is running"),
        (["migrate", "a", "b", "c"], "error: give [NAME] ADDRESS"),
        (["migrate", "--resolve", "run", "a", "b"], "error: give [NAME] alone with --resolve"),
        (["run-vm", "--receive", "tcp:here:0"], "error: --secret-file is missing"),
        (["run-vm", "--receive", "tcp:here", "--secret-file", "/x"], "error: 'tcp:here' is not an address"),
        (["run-vm", "--receive", "tcp:here:0", "--secret-file", "/x"], "error: cannot read the secret /x"),
        (["run-vm", "demo", "--receive", "tcp:here:0"], "error: --receive takes no CONFIG"),
        (["run-vm", "--receive", "tcp:here:0", "--ssh-key", "/x"], "error: --receive takes no CONFIG"),
        (
            ["run-vm", "demo", "--ssh-key", "/x"],
            "error: --ssh-key is for a guest with a Debian, and VM 'demo' has none",
        ),
        (["run-vm", "debian", "--ssh-key", "/no/x.pub"], "error: cannot read /no/x.pub: No such file or directory"),
        (["run-vm", "--secret-file", "/x"], "error: --secret-file goes with --receive"),
        (["run-vm", "no-such-vm"], "error: no VM description 'no-such-vm'"),
        (["run-vm", "/no/such.toml"], "error: cannot read VM description /no/such.toml"),
    ],
)
def test_errors_are_one_readable_line(words: list[str], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 1
    assert result.output.startswith(message)
    assert result.output.count("\n") == 1
    assert "Traceback" not in result.output


def test_list_is_empty_without_vms() -> None:
    result = run("list")
    assert (result.exit_code, result.output) == (0, "")


def test_parameters_are_json_or_text() -> None:
    assert parse_parameters(["count=3", "name=x y", 'deep={"a": [1]}', "empty="]) == {
        "count": 3,
        "name": "x y",
        "deep": {"a": [1]},
        "empty": "",
    }
    with pytest.raises(UsageError, match="key=value"):
        parse_parameters(["=1"])


def test_agent_requests() -> None:
    assert build_request("run", ("echo", "count=1")) == {"driver": "echo", "parameters": {"count": 1}}
    assert build_request("poll", ("7",)) == {"job": 7}
    assert build_request("echo", ("data=x",)) == {"data": "x"}


# --- the console


def test_the_escape_key() -> None:
    escape = bytes([ESCAPE])
    assert EscapeFilter().feed(b"abc\x03") == (b"abc\x03", False)  # Ctrl-C belongs to the guest
    assert EscapeFilter().feed(b"ab" + escape + b"qcd") == (b"ab", True)
    assert EscapeFilter().feed(escape * 2) == (escape, False)
    assert EscapeFilter().feed(escape + b"xyz") == (b"yz", False)
    split = EscapeFilter()
    assert split.feed(b"a" + escape) == (b"a", False)
    assert split.feed(b"q") == (b"", True)


@given(st.lists(st.binary(max_size=8), max_size=8))
def test_how_the_keys_arrive_makes_no_difference(chunks: list[bytes]) -> None:
    whole = EscapeFilter().feed(b"".join(chunks))
    filter_, out, ended = EscapeFilter(), b"", False
    for chunk in chunks:
        part, ended = filter_.feed(chunk)
        out += part
        if ended:
            break
    assert (out, ended) == whole


def test_the_terminal_is_put_back() -> None:
    master, slave = pty.openpty()
    try:
        before = termios.tcgetattr(slave)
        with pytest.raises(ZeroDivisionError), raw_terminal(slave):
            during = termios.tcgetattr(slave)
            assert not during[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
            assert during[1] & termios.OPOST
            raise ZeroDivisionError
        assert termios.tcgetattr(slave) == before
    finally:
        os.close(master)
        os.close(slave)


def test_a_console_is_shown_without_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello from the guest\r\n")
        writer.close()

    async def body() -> bytes:
        shown = []
        server = await asyncio.start_unix_server(guest, path=str(tmp_path / "console.sock"))
        await console.attach(tmp_path / "console.sock", lambda: None, shown.append)
        server.close()
        with pytest.raises(EnvironmentProblem, match="cannot connect to the console"):
            await console.attach(tmp_path / "absent", lambda: None)
        return b"".join(shown)

    with open(os.devnull) as null:  # noqa: PTH123
        monkeypatch.setattr("sys.stdin", null)
        assert asyncio.run(body()) == b"hello from the guest\r\n"


def test_typed_keys_reach_the_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> tuple[bytes, bool]:
        received = bytearray()
        ended = asyncio.Event()
        connected = asyncio.Event()

        async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connected.set()
            while data := await reader.read(100):
                received.extend(data)
            writer.close()

        server = await asyncio.start_unix_server(guest, path=str(tmp_path / "console.sock"))
        attached = asyncio.create_task(console.attach(tmp_path / "console.sock", ended.set, lambda _: None))
        await connected.wait()
        os.write(master, b"ls\x03" + bytes([ESCAPE]) + b"q")
        await asyncio.wait_for(ended.wait(), 10)
        attached.cancel()
        await asyncio.gather(attached, return_exceptions=True)
        server.close()
        return bytes(received), ended.is_set()

    master, slave = pty.openpty()
    with open(slave, closefd=True) as terminal:  # noqa: PTH123
        tty_mode = termios.tcgetattr(slave)
        tty_mode[3] &= ~(termios.ICANON | termios.ISIG)  # what is typed before we are ready must not be interpreted
        termios.tcsetattr(slave, termios.TCSANOW, tty_mode)
        monkeypatch.setattr("sys.stdin", terminal)
        assert asyncio.run(body()) == (b"ls\x03", True)
    os.close(master)
