"""The command line: parsing, the console's keys, and errors as one line."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import io
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from vmbus.cli import console, main
from vmbus.cli.agent import build_request, parse_parameters
from vmbus.cli.console import ESCAPE, EscapeFilter, raw_terminal
from vmbus.cli.drivers import jobs_for, parse_drive
from vmbus.cli.outputs import output
from vmbus.cli.terminal import Steps
from vmbus.cli.vm import _boot_sign, _follow
from vmbus.errors import EnvironmentProblem, StateError, UsageError, VmbusError, WaitTimeout
from vmbus.observe.inspection.target import Running
from vmbus.qemu.agent import AgentError, GuestWentBack
from vmbus.qemu.ends import GuestPanicked
from vmbus.util.screen import screen
from vmbus.vm.errors import MigrateFailed, MigrationInDoubt, RevertFailed, SaveFailed
from vmbus.vm.run_directory import RunDirectory

CHECKOUT = Path(__file__).resolve().parents[2]


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
    assert result.exit_code in (UsageError.status, EnvironmentProblem.status)
    assert result.output.startswith(message)
    assert result.output.count("\n") == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", [["run-vm"], ["restore", "/no/such"], ["run-vm", "--receive", "tcp:here:0"]])
@pytest.mark.parametrize("name", ["../x", "Bad/Name", "..", "/x", "", "x\n", "-x", "x" * 33])
def test_fault_n7_the_name_of_a_vm_stays_a_name(
    command: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmbus.cli.vm.provision", lambda: pytest.fail("the set-up began"))
    result = run(*command, "--name", name)
    assert (
        result.exit_code == UsageError.status and "is not a usable name of a VM; allowed: 1 to 32" in result.output
    ), result.output
    with pytest.raises(UsageError, match="usable name"):
        RunDirectory.create(name, base=tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="usable name"):
        Running.vm(name)


@pytest.mark.parametrize("command", [["demo"], ["bench"]])
@pytest.mark.parametrize("place", ["nope/x.json", "folder"])
def test_fault_n8_a_file_that_cannot_be_written_is_refused_before_the_work(
    command: list[str], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    for module in ("demo", "bench"):
        monkeypatch.setattr(f"vmbus.cli.{module}.provision", lambda: pytest.fail("the work began"))
    result = run(*command, "--json", str(tmp_path / place))
    assert result.exit_code in (1, 2, 10) and "Traceback" not in result.output, result.output
    assert place in result.output.replace("\n", "") and "x.json" not in {path.name for path in tmp_path.rglob("*")}


def test_fault_n8_an_output_is_opened_first_and_written_last(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"what was there before")
    for path in (old, new):
        with pytest.raises(ZeroDivisionError), output(path):
            raise ZeroDivisionError
    assert old.read_bytes() == b"what was there before" and not new.exists()
    for path in (old, new):
        with output(path) as write:
            assert path.exists()
            write(b"figures")
        assert path.read_bytes() == b"figures"
    with output(None) as write:
        write(b"nowhere")
    with pytest.raises(EnvironmentProblem, match="No space left"), output(Path("/dev/full")) as write:
        write(b"figures")


@pytest.mark.parametrize("raised", [KeyboardInterrupt, click.Abort])
def test_fault_n15_an_interrupted_command_says_so_in_one_word(
    raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise raised

    monkeypatch.setattr("vmbus.cli.running.running_vms", interrupted)
    result = run("list")
    assert (result.exit_code, result.output) == (130, "interrupted\n")


def test_fault_n15_ctrl_c_in_the_first_moments_leaves_no_traceback(tmp_path: Path) -> None:
    """Of the script, of the interpreter, and of the command, wherever it is by then."""
    script = Path(__file__).resolve().parents[2] / "scripts" / "run-vm"
    lines = (script.parent / "_run").read_text().splitlines()
    ready = next(number for number, line in enumerate(lines, 1) if line.startswith("handle(SIGINT"))
    statuses = []
    for wait in (0.0, 0.05, 0.1, 0.2, 0.4):
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
        process = subprocess.Popen(
            [script, "no-such-vm"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True,
            process_group=0, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        time.sleep(wait)  # as a person does, who waits for nothing in particular
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=60)
        statuses.append(process.returncode)
        at = re.findall(r'/_run", line (\d+)', told)
        if "Traceback" in told and all(int(line) <= ready for line in at):
            continue  # on a busy machine: of an interpreter that has not come to the end of our first statements
        assert "Traceback" not in told and "Aborted" not in told, (wait, told)
        assert process.returncode in (130, -signal.SIGINT, EnvironmentProblem.status), (wait, told)
        assert process.returncode != 1 or "no VM description" in told  # it was through
    assert {130, -signal.SIGINT} & set(statuses)


@pytest.mark.parametrize(
    ("drive", "message"),
    [
        ("echo:foo=1", "--drive echo: unknown parameter 'foo'; known: access, "),
        ("echo:count=-1", "--drive echo: parameter 'count' is -1; it must be "),
        ("echo:window=many", "--drive echo: parameter 'window' must be of type int"),
        ("disk-writer:foo=1", "--drive disk-writer: unknown parameter 'foo'"),
        ("ping:count=x", "--drive ping: parameter 'count' must be of type int"),
    ],
)
def test_fault_n16_a_drivers_parameters_are_refused_before_the_boot(
    drive: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmbus.cli.vm.provision", lambda: pytest.fail("the set-up began"))
    result = run("run-vm", "--drive", "echo:count=3", "--drive", drive)
    assert result.exit_code == UsageError.status and result.output.startswith(f"error: {message}"), result.output


class _Reverted:
    """A VM that is taken back while somebody waits for its test driver. `after`: what the agent says then."""

    ended = False

    def __init__(self, *after: Any) -> None:
        self._answers = [GuestWentBack("the VM was taken back"), *after]

    async def call_agent(self, command: str, *, job: int, **_: Any) -> dict[str, Any]:
        assert (command, job) == ("wait", 7)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)


@pytest.mark.parametrize(
    ("after", "told"),
    [
        ([{"state": "running"}, {"state": "finished", "result": {"verdict": "passed"}}], "finished, passed"),
        ([GuestWentBack("again"), {"state": "finished", "result": {"verdict": "passed"}}], "finished, passed"),
        ([AgentError("wait", "unknown-job", "no job 7")], "is undone: it was started after the checkpoint"),
    ],
)
def test_fault_n11_a_drivers_verdict_comes_after_a_revert(
    after: list[Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("vmbus.cli.vm._notice", said.append)
    vm: Any = _Reverted(*after)
    asyncio.run(_follow(vm, "echo", 7))
    assert len(said) == 1 and f"test driver 'echo' (job 7) {told}" in said[0]


def test_fault_n16_what_the_pages_show_is_taken() -> None:
    for drive in ("many:channels=64,count=0", 'storm:{"count": 0}', "echo:count=10000,external=0.3", "burst:hold=10"):
        assert jobs_for([parse_drive(drive)], [])


def test_fault_n17_what_is_allowed_is_named() -> None:
    for words, message in (
        (["--set", "weights.foo=1"], "there is no operation 'foo'; known: save_restore, "),
        (["--set", "sabotage=foo"], "field 'sabotage': Invalid enum value 'foo'; allowed: , disk-loses-a-block, "),
        (["--set", "foo=1"], "unknown field `foo`"),
    ):
        result = run("soak", "--plan", *words)
        assert result.exit_code != 0 and message in result.output, result.output
    assert "clone" in run("soak", "--plan", "--set", "weights.foo=1").output


# --- what is typed and shown: tests of the faults that people found


def test_fault_u1_a_text_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are no markup, words between colons no pictures; neither in a title, a table's cell nor a notice."""
    path = "/tmp/x[/b] [red]y[/red] :smile: [link=z]"
    for console_ in (screen(), screen(width=200)):
        console_.print(path)
        table = Table(show_header=False, box=None)
        table.add_row("snapshot", path)
        console_.print(table)
    out = capsys.readouterr().out
    assert out.count(path) == 4, out


@pytest.mark.parametrize("terminal", [False, True])
def test_fault_u1_steps_with_brackets(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    path = "/tmp/x[/b]:smile:"
    shown = Console(file=io.StringIO(), force_terminal=terminal, markup=False, emoji=False, highlight=False, width=200)
    monkeypatch.setattr("vmbus.cli.terminal.console", shown)
    with Steps(f"save of {path}") as steps:
        steps(f"phase {path}")
        time.sleep(0.2 if terminal else 0)  # the moving sign is drawn
    out = shown.file.getvalue()  # type: ignore[attr-defined]
    assert f"save of {path}" in out and f"phase {path}" in out


def test_fault_u1_no_console_is_made_elsewhere() -> None:
    """The kind: whoever makes a console of his own, or asks for markup, is found here."""
    found = []
    for folder in ("device", "bench"):
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            source = path.read_text()
            suspect = any(word in source for word in ("Console", "markup", "emoji", "TextColumn"))
            for node in ast.walk(ast.parse(source)) if suspect else ():
                if isinstance(node, ast.Call):
                    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                    takes = name in ("TextColumn",) and not any(word.arg == "markup" for word in node.keywords)
                    wants = any(
                        word.arg in ("markup", "emoji") and getattr(word.value, "value", None) is True
                        for word in node.keywords
                    )
                    if name in ("Console", "from_markup") or takes or wants:
                        found.append(f"{path.relative_to(CHECKOUT)}:{node.lineno}")
                if isinstance(node, ast.ImportFrom) and node.module == "rich.markup":
                    found.append(f"{path.relative_to(CHECKOUT)}:{node.lineno}")
    assert [one.rpartition(":")[0] for one in found] == ["device/vmbus/util/screen.py"], found


WITHOUT_STANDARD_FILES = """
import os, sys
from vmbus.cli import main
sys.argv = ["vmbus", "list"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
from vmbus.cli.console import own_terminal
assert own_terminal() is None
assert all(os.fstat(number).st_ino for number in range(3)) and sys.stdin.read() == ""
print("nobody reads this")
os._exit(42)
"""


@pytest.mark.parametrize("closed", ["<&- 2>&-", ">&-", "<&- >&- 2>&-"])
def test_fault_u2_standard_files_may_be_closed(closed: str) -> None:
    words = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, WITHOUT_STANDARD_FILES]
    assert subprocess.run(words, timeout=60).returncode == 42


IN_THE_BACKGROUND = """
import asyncio, os, sys, tempfile
from vmbus.cli import console
async def guest(reader, writer):
    writer.write(b"hello\\n"); await writer.drain(); await asyncio.sleep(0.3); writer.close()
async def body():
    path = tempfile.mktemp()
    server = await asyncio.start_unix_server(guest, path=path)
    await console.attach(path, lambda: None)
    os.unlink(path)
asyncio.run(body())
"""

ON_A_TERMINAL = """
import os, subprocess, sys, termios
before = termios.tcgetattr(0)
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], process_group=0)
_, status = os.waitpid(child.pid, os.WUNTRACED)
stopped = os.WIFSTOPPED(status)
if stopped:
    child.kill()
print("stopped" if stopped else f"ended {os.waitstatus_to_exitcode(status)}", termios.tcgetattr(0) == before)
"""


def on_a_terminal_of_its_own(*words: str) -> bytes:
    """What a script says there."""
    pid, master = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", *words])
    out = b""
    with contextlib.suppress(OSError):
        while data := os.read(master, 4096):
            out += data
    os.waitpid(pid, 0)
    os.close(master)
    return out


def test_fault_u3_in_the_background_of_a_terminal_nothing_stops_us() -> None:
    """As `timeout 60 scripts/run-vm` has it, or an `&`: the console is only shown."""
    out = on_a_terminal_of_its_own(ON_A_TERMINAL, IN_THE_BACKGROUND)
    assert b"hello" in out and b"ended 0 True" in out, out


SENT_TO_THE_BACKGROUND = """
import os, signal, sys, termios
from vmbus.cli.console import raw_terminal
before = termios.tcgetattr(0)
with raw_terminal(0):
    # Somebody else is in the foreground when it is put back.
    other = os.fork()
    if other == 0:
        os.setpgid(0, 0)
        signal.pause()
    os.setpgid(other, other)
    os.tcsetpgrp(0, other)
os.kill(other, signal.SIGKILL)
os.waitpid(other, 0)
print("put back", termios.tcgetattr(0) == before)
"""


def test_fault_u3_the_terminal_is_put_back_from_the_background() -> None:
    out = on_a_terminal_of_its_own(SENT_TO_THE_BACKGROUND)
    assert b"put back True" in out, out


def hints() -> Iterator[tuple[str, str]]:
    """Every option that a text of ours names (docstrings of commands are help): where, and what stands before it."""
    for folder in ("device/vmbus", "guest/vmbus_guest", "bench"):
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            source = path.read_text()
            for node in ast.walk(ast.parse(source)) if HINT.search(source) else ():
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    for match in HINT.finditer(node.value):
                        yield f"{path.relative_to(CHECKOUT)}:{node.lineno}", match[0]


HINT = re.compile(
    r"(?:scripts/(?P<script>[a-z-]+)|vmbus (?P<command>[a-z-]+))?(?P<between>[^\n;,(]*?)(?P<option>--[a-z][a-z-]+)"
)


def options_of(command: click.Command) -> set[str]:
    found = {option for one in command.params for option in [*one.opts, *one.secondary_opts]} | {"--help"}
    if isinstance(command, click.Group):
        found |= set().union(*(options_of(one) for one in command.commands.values()))
    return found


def all_options() -> dict[str, set[str]]:
    from vmbus.cli.serve import main as server
    from vmbus.provision.__main__ import main as setup

    found = {name: options_of(command) for name, command in main.commands.items()}
    return found | {"setup": options_of(setup), "server": options_of(server)}


def test_fault_u4_hints_name_options_that_exist() -> None:
    known = all_options()
    every = set().union(*known.values(), options_of(main))
    wrong = []
    for where, text in hints():
        found = HINT.search(text)
        assert found is not None
        name, option = found["script"] or found["command"], found["option"]
        ours = every | FOREIGN if "vmbus/cli/" in where else None
        allowed = ours if name is None else known.get(name)
        if allowed is not None and option not in allowed:
            wrong.append(f"{where}: {text!r}")
    assert not wrong, "\n".join(wrong)


FOREIGN = {"--arguments", "--no-files", "--parameters", "--path"}
"""Options of programs that are not ours, named in the commands' texts."""


@pytest.mark.parametrize(
    "words",
    [
        ("save", "/x"), ("checkpoint", "now"), ("checkpoint", "--list"), ("revert", "now"),
        ("migrate", "--resolve", "run"), ("migrate", "tcp:there:1", "--secret-file", "/x"), ("agent", "list"),
        ("provider", "a", "b"), ("ssh",),
        ("audit",), ("capture", "--status"), ("inspect",),
    ],
    ids=" ".join,
)  # fmt: skip
def test_fault_u4_how_one_of_several_vms_is_chosen(words: tuple[str, ...]) -> None:
    """The hint is tried: it is an option of that very command, or a word in front."""
    for name in ("one", "two"):
        RunDirectory.create(name)
    result = run(*words)
    if words == ("audit",):  # needs no VM
        return
    assert "several VMs are running (one, two)" in result.output, result.output
    options = re.findall(r"--[a-z-]+", result.output)
    assert all(option in options_of(main.commands[words[0]]) for option in options), result.output
    if options:
        again = run(words[0], *options, "one", *words[1:])
    else:
        assert "NAME" in result.output or "say which one" in result.output
        again = run(words[0], "one", *words[1:])
    assert "several VMs" not in again.output, again.output


def test_fault_u6_failures_are_told_apart_by_their_status() -> None:
    kinds = [UsageError, EnvironmentProblem, StateError, SaveFailed, MigrationInDoubt, GuestPanicked]
    errors = [kind("x", source_alive=True) if kind is SaveFailed else kind("x") for kind in kinds]  # type: ignore[call-arg]
    errors += [SaveFailed("x", source_alive=False), WaitTimeout("x", 1), VmbusError("x")]
    statuses = [error.status for error in errors]
    assert len(set(statuses)) == len(statuses) and 0 not in statuses
    assert MigrateFailed("x", source_alive=False).status == RevertFailed("x", source_alive=False).status == 14
    table = (CHECKOUT / "README.md").read_text()
    for status in statuses:
        assert re.search(rf"^\| {status} \| ", table, re.MULTILINE), f"README lists no status {status}"


@pytest.mark.parametrize("kind", [UsageError, EnvironmentProblem, StateError, MigrationInDoubt])
def test_fault_u6_a_command_ends_with_the_status_of_its_error(
    monkeypatch: pytest.MonkeyPatch, kind: type[VmbusError]
) -> None:
    def fail() -> list[str]:
        raise kind("on purpose")

    monkeypatch.setattr("vmbus.cli.running.running_vms", fail)
    result = run("list")
    assert (result.exit_code, result.output) == (kind.status, "error: on purpose\n")


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


@pytest.mark.parametrize("terminal", [True, False])
async def test_fault_n26_there_is_a_sign_of_life_until_the_console_shows_something(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(
        "vmbus.cli.vm.console", Console(file=out, force_terminal=terminal, color_system=None, width=100)
    )

    shown = asyncio.Event()
    sign = asyncio.create_task(_boot_sign(shown))
    while "\r  0 s" not in out.getvalue() and not sign.done():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    shown.set()
    await asyncio.wait_for(sign, 10)
    assert out.getvalue().startswith("the guest boots")
    assert ("\r  0 s" in out.getvalue()) is terminal


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


ALONE = """
import sys
from vmbus.cli import main
main.commands[sys.argv[1]]
print(sorted(set(sys.argv[2:]) & set(sys.modules)))
"""


@pytest.mark.parametrize("name", ["agent", "list", "save", "stop"])
def test_a_command_that_asks_a_running_vm_does_not_load_what_runs_one(name: str) -> None:
    """They are typed, and completed, all the time; with everything loaded each took half a second more."""
    heavy = ["vmbus.cli.soak", "vmbus.cli.supervisor", "vmbus.operations.machine", "pyroute2"]
    done = subprocess.run([sys.executable, "-c", ALONE, name, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
