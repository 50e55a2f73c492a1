"""What programs rely on: results on standard output, a document with `--json`, exit statuses, completion, examples."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner, Result

from support import pace
from support.documents import STATUS, documents
from vmbus.cli import main
from vmbus.cli.asking import Status
from vmbus.cli.completion import SHELLS, script
from vmbus.cli.examples import EXAMPLES
from vmbus.cli.results import Failure, wants_json
from vmbus.cli.words import VARIABLE, from_a_script
from vmbus.errors import EnvironmentProblem, StateError, UsageError, VmbusError, WaitTimeout
from vmbus.operations.checkpoint import CheckpointReport
from vmbus.operations.migration.report import MigrationReport
from vmbus.operations.revert import RevertReport
from vmbus.operations.save import SaveReport
from vmbus.operations.stop import StopFailed
from vmbus.qemu.ends import GuestPanicked
from vmbus.vm.errors import MigrationInDoubt, SaveFailed
from vmbus.vm.run_directory import RunDirectory
from vmbus.vm.sockets import Sockets

CHECKOUT = Path(__file__).resolve().parents[2]
PAGE = CHECKOUT / "docs" / "command-line.md"
NO_DOCUMENT = {
    "attach": "serves a VM, and tells people how it goes",
    "completion": "a shell reads it",
    "console": "the guest's console",
    "serve": "says on standard output that it listens, as JSON already",
    "ssh": "what the guest says",
}
"""Commands without `--json`, and why."""
KINDS = ["usage", "environment", "state", "timeout", "failed", "interrupted"]


def commands(group: click.Group = main, lead: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{lead}{name} ")
        else:
            yield f"{lead}{name}", command


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


# ---- documents -------------------------------------------------------------------------------------------------------


def test_machine_readable_is_every_command() -> None:
    without = {name for name, one in commands() if not any("--json" in option.opts for option in one.params)}
    assert without == set(NO_DOCUMENT), (
        "a command that prints results takes --json (vmbus.cli.results.json_option), and its keys are in "
        "docs/command-line.md; one that prints none is in NO_DOCUMENT"
    )


def test_machine_readable_documents_are_as_the_page_says() -> None:
    told = {}
    for line in PAGE.read_text().partition("| Command with `--json`")[2].splitlines()[2:]:
        if not line.startswith("|"):
            break
        name, keys = (cell.strip() for cell in line.strip("|").split("|"))
        told[name.strip("`")] = tuple(re.findall(r"`([^`]+)`", keys))
    assert told == documents()
    text = " ".join(PAGE.read_text().split())
    assert f"Each of `vms` has {', '.join(f'`{key}`' for key in STATUS)};" in text
    assert f"`kind` is one of {', '.join(f'`{kind}`' for kind in KINDS)};" in text
    kinds = {one.kind for one in (UsageError, EnvironmentProblem, StateError, WaitTimeout, VmbusError)}
    assert kinds | {"interrupted"} == set(KINDS)


class Owner:
    """Answers for a VM: progress, and then this."""

    def __init__(self, name: str, answer: dict[str, Any]) -> None:
        self.directory = RunDirectory.create(name)
        self.asked: list[dict[str, Any]] = []
        self._answer = answer
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(Sockets(self.directory.path).supervisor))
        self._socket.listen(8)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                with connection, connection.makefile("rwb") as file:
                    self.asked.append(json.loads(file.readline()))
                    if self.asked[-1]["command"] == "stop" and "result" in self._answer:
                        self.directory.remove()
                    for line in ({"progress": "ram"}, self._answer):
                        file.write(json.dumps(line).encode() + b"\n")
                    file.flush()

    def close(self) -> None:
        self._socket.close()
        self.directory.remove()


def example(structure: type[msgspec.Struct]) -> dict[str, Any]:
    """One with something in each field."""
    values: dict[str, Any] = {"str": "x", "int": 3, "float": 0.5, "bool": True, "list": [], "dict": {}}
    fields = {one.name: str(getattr(one.type, "__name__", one.type)) for one in msgspec.structs.fields(structure)}
    plain = {name: values.get(kind) for name, kind in fields.items()}
    plain |= {name: {"queued": 1, "sent": 2} for name in fields if name == "packets"}
    return msgspec.to_builtins(msgspec.convert(plain, structure))


STATUS_ANSWER = msgspec.to_builtins(Status(name="demo", state="running", since=1.0, pid=1))
ASKED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "save": (["save", "/x"], example(SaveReport)),
    "checkpoint": (["checkpoint", "now"], example(CheckpointReport)),
    "checkpoint --list": (["checkpoint", "--list"], {"checkpoints": []}),
    "checkpoint --delete": (["checkpoint", "--delete", "now"], {}),
    "revert": (["revert", "now"], example(RevertReport)),
    "migrate": (["migrate", "tcp:there:1", "--secret-file", "SECRET"], example(MigrationReport)),
    "migrate --resolve": (["migrate", "--resolve", "ask"], {"runs": True}),
    "stop": (["stop", "--kill"], {"powered_off": False}),
    "list": (["list"], STATUS_ANSWER),
    "agent": (["agent", "jobs"], {"jobs": []}),
    "provider": (["provider", "services", "heartbeat"], {"alive": True}),
}
PROGRESS = {"save", "checkpoint", "revert", "migrate"}


def spelled(words: list[str], tmp_path: Path) -> list[str]:
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_bytes(bytes(range(32)))
    return [str(secret) if word == "SECRET" else word for word in words]


@pytest.mark.parametrize("name", ASKED)
def test_machine_readable_results_alone_are_on_standard_output(name: str, tmp_path: Path) -> None:
    words, answer = ASKED[name]
    for as_json in (False, True):
        owner = Owner("demo", {"result": answer})
        try:
            result = run(*spelled(words, tmp_path), *(["--json"] if as_json else []))
        finally:
            owner.close()
        assert result.exit_code == 0, (result.stdout, result.stderr)
        assert ("guest memory" in result.stderr) == (name in PROGRESS), "progress is not where results are"
        if as_json:
            document = json.loads(result.stdout)
            if name in documents():
                assert tuple(document) == documents()[name]
        else:
            assert result.stdout or name == "checkpoint --list"
            assert " s  guest memory" not in result.stdout


FAILURES = [
    UsageError("asked in a wrong way"),
    EnvironmentProblem("something is missing", code="disk-full"),
    StateError("damaged"),
    WaitTimeout("something", 3),
    SaveFailed("refused, and the VM runs on", source_alive=True),
    StopFailed("the VM runs on", source_alive=True),
    SaveFailed("the VM is lost", source_alive=False),
    MigrationInDoubt("nobody can tell"),
    GuestPanicked("the guest panicked"),
    VmbusError("something else"),
]


@pytest.mark.parametrize("name", [name for name in ASKED if name != "list"])
def test_machine_readable_failures_have_their_status_with_every_command(name: str, tmp_path: Path) -> None:
    words = spelled(ASKED[name][0], tmp_path)
    statuses = set()
    for error in FAILURES:
        owner = Owner("demo", {"error": msgspec.to_builtins(Failure.of(error))})
        try:
            plain, as_json = run(*words), run(*words, "--json")
        finally:
            owner.close()
        assert plain.exit_code == as_json.exit_code == error.status
        assert plain.stdout == "" and f"error: {error}\n" in plain.stderr and f"error: {error}\n" in as_json.stderr
        assert json.loads(as_json.stdout) == {
            "error": {"message": str(error), "kind": error.kind, "code": error.code, "status": error.status}
        }
        statuses.add(error.status)
    assert statuses == {1, 2, 10, 11, 12, 13, 14, 15, 16}


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["save", "/x", "--nonsense", "--json"], 2),
        (["save", "--json"], 2),
        (["save", "/x", "--json"], 2),
        (["demo", "--json", "--packets", "x"], 2),
        (["capture", "--json"], 2),
        (["capture", "show", "--json", "/no/such"], 10),
        (["restore", "/no/such", "--json"], 2),
        (["inspect", "diff", "a", "b", "--json"], 2),
        (["inspect", "diff", "a", "b", "--json", "--checkpoint", "x"], 2),
        (["soak", "--report-only", "--json"], 2),
        (["soak", "--report", "/no/such", "--resume", "--json"], 2),
        (["run-vm", "no-such-vm", "--list-drivers", "--driver-file", "/no/such.py", "--json"], 10),
        (["network", "demo", "--json"], 2),
    ],
)
def test_machine_readable_errors_are_documents(words: list[str], status: int) -> None:
    result = run(*words)
    (error,) = json.loads(result.stdout).values()
    assert result.exit_code == error["status"] == status and error["message"], result.stderr
    assert "Traceback" not in result.stderr and result.stderr
    without = run(*(word for word in words if word != "--json"))
    assert without.exit_code in (status, 2, 10, 11) and without.stdout == ""


def test_machine_readable_interruption_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vmbus.cli.running.running_vms", interrupted)
    result = run("list", "--json")
    assert json.loads(result.stdout)["error"] == {
        "message": "interrupted", "kind": "interrupted", "code": "", "status": 130,
    }  # fmt: skip
    assert result.exit_code == 130


def test_machine_readable_is_asked_for_only_where_it_says_so() -> None:
    for words, wanted in (
        (["save", "x", "--json"], True),
        (["save", "x"], False),
        (["save", "--", "--json"], False),
        (["demo", "--json"], True),
        (["demo", "--json", "--packets", "20"], True),
        (["demo", "--json", "figures.json"], False),
        (["ssh", "cat", "--json"], False),
        (["capture", "show", "--json"], True),
        (["nonsense", "--json"], False),
    ):
        assert wants_json(main, words) is wanted, words


def test_machine_readable_figures_go_to_standard_output_or_a_file() -> None:
    for name in ("demo", "bench"):
        command = main.commands[name]
        for words, found in ((["--json"], Path("-")), (["--json", "x"], Path("x")), ([], None)):
            assert command.make_context(name, list(words)).params["json_file"] == found


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["new-provider", "door_bell", "PLACE"], "new-provider"),
        (["setup", "--check"], "setup --check"),
        (["run-vm", "--list-drivers"], "run-vm --list-drivers"),
        (["soak", "--report-only", "--report", "REPORT"], "soak"),
    ],
)
def test_machine_readable_documents_of_commands_without_a_vm(words: list[str], keys: str, tmp_path: Path) -> None:
    shutil.copytree(CHECKOUT / "docs" / "examples" / "soak", tmp_path / "report")
    named = {"PLACE": str(tmp_path / "new"), "REPORT": str(tmp_path / "report")}
    line = [sys.executable, "-m", "vmbus", *(named.get(word, word) for word in words)]
    with (tmp_path / "out").open("w+b") as out:
        done = subprocess.run([*line, "--json"], stdout=out, stderr=subprocess.PIPE, timeout=pace.seconds(60))
        out.seek(0)
        text = out.read()
    if keys == "soak" and not (tmp_path / "report" / "campaign.json").exists():
        assert json.loads(text)["error"]["status"] == done.returncode == 2  # the example has the report alone
        return
    assert tuple(json.loads(text)) == documents()[keys] and done.returncode in (0, 1), done.stderr


# ---- examples --------------------------------------------------------------------------------------------------------


def test_machine_readable_help_ends_with_an_example_that_is_right() -> None:
    assert {name for name, _ in commands()} | {"capture"} == set(EXAMPLES), "one example for each command, at least"
    for name, lines in EXAMPLES.items():
        text = run(*name.split(), "--help").stdout
        for line in lines:
            assert f"  scripts/{line}\n" in text
            words = shlex.split(line)
            command: click.Command = main
            while isinstance(command, click.Group):
                if words[0] not in command.commands:
                    words = ["record", *words]  # of a capture
                command, called = command.commands[words[0]], words[0]
                words = words[1:]
            command.make_context(called, words)  # raises for an option or a value that there is not
        assert text.rstrip().endswith(f"scripts/{lines[-1]}")


def test_machine_readable_example_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXAMPLES, "save", ("save --nonsense /tmp/x",))
    with pytest.raises(AssertionError):
        test_machine_readable_help_ends_with_an_example_that_is_right()


# ---- completion ------------------------------------------------------------------------------------------------------


def completed(*line: str, arguments: tuple[str, ...] = (), monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What bash gets for a line whose last word is at the cursor."""
    environment = {VARIABLE: "bash_complete", "COMP_WORDS": "\n".join(line), "COMP_CWORD": str(len(line) - 1)}
    from_a_script(environment, arguments)
    monkeypatch.setattr("sys.argv", ["vmbus"])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(main, [], prog_name="vmbus", complete_var=VARIABLE)
    for name in environment:
        monkeypatch.delenv(name)
    return [one.removeprefix("plain,") for one in result.stdout.splitlines() if one]


def test_machine_readable_completion_knows_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"result": STATUS_ANSWER | {"providers": ["services", "disk"], "checkpoints": [{"tag": "before"}]}}
    owner = Owner("web", answer)
    try:
        assert completed("vmbus", "sa", monkeypatch=monkeypatch) == ["save"]
        assert completed("vmbus", "console", "", monkeypatch=monkeypatch) == ["web"]
        assert completed("vmbus", "save", "--vm", "w", monkeypatch=monkeypatch) == ["web"]
        assert completed("scripts/stop", "", arguments=("stop",), monkeypatch=monkeypatch) == ["web"]
        assert completed("scripts/stop", "--k", arguments=("stop",), monkeypatch=monkeypatch) == ["--kill"]
        assert completed("vmbus", "run-vm", "deb", monkeypatch=monkeypatch) == ["debian", "debian-network"]
        assert "echo" in completed("vmbus", "run-vm", "--drive", "", monkeypatch=monkeypatch)
        assert completed("vmbus", "revert", "", monkeypatch=monkeypatch) == ["before"]
        assert completed("vmbus", "revert", "web", "b", monkeypatch=monkeypatch) == ["before"]
        assert completed("vmbus", "provider", "se", monkeypatch=monkeypatch) == ["services"]
        other = RunDirectory.create("other")
        assert completed("vmbus", "migrate", "", monkeypatch=monkeypatch) == ["other", "web"]
        other.remove()
    finally:
        owner.close()
    assert completed("vmbus", "revert", "", monkeypatch=monkeypatch) == []


BASH = """
. <("$1/completion" bash)
cd "$2"
compopt() { :; }
for line in "$1/save --l" "scripts/save --l" "other/save --l"; do
    COMP_WORDS=($line); COMP_CWORD=1; COMPREPLY=()
    _vmbus_completion ${COMP_WORDS[0]}
    echo "${COMPREPLY[*]}"
done
complete -p scripts/save >/dev/null && echo registered
complete -p other/save 2>/dev/null
"""


def test_machine_readable_completion_by_the_real_bash(tmp_path: Path) -> None:
    """Of the scripts of this checkout, and of no other program that has the same name: that would be run."""
    (tmp_path / "scripts").symlink_to(CHECKOUT / "scripts")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "save").write_text("#!/bin/sh\necho plain,it-was-run\n")
    (tmp_path / "other" / "save").chmod(0o755)
    done = subprocess.run(
        ["bash", "--norc", "-c", BASH, "bash", str(CHECKOUT / "scripts"), str(tmp_path)],
        capture_output=True, text=True, timeout=pace.seconds(60),
    )  # fmt: skip
    assert done.stdout.splitlines() == ["--live", "--live", "", "registered"], done


@pytest.mark.parametrize("folder", [None, CHECKOUT / "scripts"], ids=["installed", "checkout"])
@pytest.mark.parametrize("shell", SHELLS)
def test_machine_readable_completion_is_right_for_each_shell(shell: str, folder: Path | None, tmp_path: Path) -> None:
    text = script(shell, folder)
    assert f"{VARIABLE}={shell}_complete" in text
    if folder is not None:
        named = set(re.findall(r"[\w-]+", text))
        assert {"run-vm", "new-provider"} <= named and not {"setup", "_run", "hatch_build"} & named
        assert not re.search(r"(?<![\w-])vmbus(?![\w-])(?!\n\n)", text.partition("\n")[2].replace("_vmbus", "")), text
    program = shutil.which(shell)
    if program is not None:  # Debian has each of them; a machine need not
        path = tmp_path / "script"
        path.write_text(text)
        done = subprocess.run([program, "-n", str(path)], capture_output=True, text=True, timeout=pace.seconds(60))
        assert done.returncode == 0 and not done.stderr, done
