"""What a VM without a terminal has instead: a console for several viewers, and a command that waits until it runs."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from support import owners, pace
from support.processes import alive
from vmbus.cli import detach
from vmbus.cli.results import Failure, print_failure
from vmbus.cli.viewers import LATEST, MOST_UNREAD, MOST_VIEWERS, Viewers
from vmbus.cli.vm import _notice
from vmbus.errors import EnvironmentProblem
from vmbus.vm.logs import LOG_LIMIT
from vmbus.vm.run_directory import RunDirectory


class Guest:
    """What QEMU has at the other end of the console."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.typed = bytearray()
        self.writer: asyncio.StreamWriter | None = None
        self.there = asyncio.Event()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.there.set()
        while data := await reader.read(4096):
            self.typed += data
        writer.close()

    def says(self, data: bytes) -> None:
        assert self.writer is not None
        self.writer.write(data)


@contextlib.asynccontextmanager
async def served(folder: Path) -> AsyncIterator[tuple[Guest, Path, asyncio.Task[None]]]:
    guest = Guest(folder / "console.sock")
    server = await asyncio.start_unix_server(guest.connected, path=str(guest.path))
    path = folder / "viewers.sock"
    task = asyncio.create_task(Viewers(guest.path, path).serve())
    await guest.there.wait()
    await until(path.exists)
    try:
        yield guest, path, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        server.close()
        assert not path.exists()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(pace.seconds(10)):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_detached_console_has_several_viewers_and_none_is_waited_for(tmp_path: Path) -> None:
    async with served(tmp_path) as (guest, path, task):
        assert path.stat().st_mode & 0o777 == 0o600
        guest.says(b"x" * LATEST + b"login: ")
        (one, one_types), (slow, _) = [await asyncio.open_unix_connection(str(path), limit=4096) for _ in range(2)]
        latest = await one.readexactly(LATEST)
        assert latest.endswith(b"login: "), "who comes later sees the latest"
        one_types.write(b"root\r")
        await until(lambda: guest.typed == b"root\r")
        guest.says(b"#1 ")
        assert await one.readexactly(3) == b"#1 "
        # One does not read: the other sees all, and the slow one hears how much it has not.
        sent = 0
        while sent < 4 * MOST_UNREAD:
            guest.says(b"y" * 65536)
            sent += len(await one.readexactly(65536))
        assert await slow.readexactly(LATEST + 3) == latest + b"#1 "
        while True:
            guest.says(b".")
            await one.readexactly(1)
            found = await slow.read(65536)
            if b"bytes left out ...]" in found:
                break
        more = [await asyncio.open_unix_connection(str(path)) for _ in range(MOST_VIEWERS - 1)]
        assert b"as many as can" in await more[-1][0].readline()
        for _, writer in more:
            writer.close()
        guest.writer.close()  # type: ignore[union-attr]
        await asyncio.wait_for(task, 10)
        while await slow.read(65536):
            pass
    with pytest.raises(EnvironmentProblem, match="cannot connect to the console"):
        await Viewers(tmp_path / "absent", tmp_path / "v").serve()


# ---- a console's terminal, as a shell with job control has it --------------------------------------------------------

ATTACHED = """
import asyncio, sys
from pathlib import Path
from vmbus.cli import console
async def body():
    left = asyncio.Event()
    looking = asyncio.create_task(console.attach(Path(sys.argv[1]), left.set))
    await left.wait()
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
asyncio.run(body())
"""

SHELL = """
import os, signal, subprocess, sys, termios, time
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
before = termios.tcgetattr(0)
def mode():
    return "cooked" if termios.tcgetattr(0) == before else "raw"
def until(wanted):
    end = time.monotonic() + 60
    while mode() != wanted:
        assert time.monotonic() < end, wanted
        time.sleep(0.01)
def say(text):
    os.write(1, f"<{text}>".encode())
child = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], process_group=0)
os.tcsetpgrp(0, child.pid)
until("raw")
say("attached")
for how in ("by the key", "by a signal"):
    _, status = os.waitpid(child.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGTSTP, status
    say(f"stopped {how} {mode()}")
    os.tcsetpgrp(0, os.getpgrp())
    os.kill(child.pid, signal.SIGCONT)  # bg
    say(f"background {sys.stdin.readline().strip()} {mode()}")
    os.tcsetpgrp(0, child.pid)  # fg, of a job that runs
    until("raw")
    say(f"foreground {how}")
    if how == "by the key":
        os.kill(child.pid, signal.SIGTSTP)
_, status = os.waitpid(child.pid, 0)
os.tcsetpgrp(0, os.getpgrp())
say(f"left {os.waitstatus_to_exitcode(status)} {mode()}")
"""


class Screen:
    """A terminal of its own with a program on it."""

    def __init__(self, *words: str) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.execv(words[0], list(words))
        self.shown = b""

    async def expect(self, text: bytes) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(pace.seconds(60)):
            while text not in self.shown:
                data = await loop.run_in_executor(None, self._read)
                assert data, self.shown
                self.shown += data
        self.shown = self.shown.partition(text)[2]

    def _read(self) -> bytes:
        try:
            return os.read(self.master, 4096)
        except OSError:
            return b""

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.master)


async def test_detached_consoles_are_stopped_and_continued_as_other_jobs(tmp_path: Path) -> None:
    """Ctrl-] z and SIGTSTP stop it with the terminal as it was; in the background it only shows; `fg` gives it the
    keys."""
    async with served(tmp_path) as (guest, path, _):
        screen = Screen(sys.executable, "-c", SHELL, ATTACHED, str(path))
        try:
            await screen.expect(b"<attached>")
            screen.type(b"a\x1a")  # Ctrl-Z is the guest's
            await until(lambda: guest.typed == b"a\x1a")
            screen.type(b"\x1dz")
            for how in (b"by the key", b"by a signal"):
                await screen.expect(b"<stopped " + how + b" cooked>")
                guest.says(b"(shown)")
                await screen.expect(b"(shown)")
                screen.type(b"shell\n")
                await screen.expect(b"<background shell cooked>")
                await screen.expect(b"<foreground " + how + b">")
                guest.typed.clear()
            screen.type(b"b")
            await until(lambda: guest.typed == b"b")
            screen.type(b"\x1dq")
            await screen.expect(b"<left 0 cooked>")
        finally:
            screen.close()


# ---- the terminal's end ----------------------------------------------------------------------------------------------

HUNG_UP = """
import asyncio, os, signal, sys
from vmbus.cli.terminal import run
if sys.argv[2] == "ignored":
    signal.signal(getattr(signal, sys.argv[1]), signal.SIG_IGN)
async def work():
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    await asyncio.sleep(0.2)
    print("on")
try:
    run(work())
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM", "SIGINT"])
def test_detached_by_nohup_is_detached_too(name: str) -> None:
    """A signal that whoever started us has us ignore is ignored."""
    for how, said in (("heeded", "interrupted\n"), ("ignored", "on\n")):
        words = [sys.executable, "-c", HUNG_UP, name, how]
        assert subprocess.run(words, capture_output=True, text=True, timeout=pace.seconds(60)).stdout == said


def test_detached_terminals_are_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("vmbus.cli.vm.console", Console(file=Gone()))
    _notice("nobody reads this")
    monkeypatch.setattr("sys.stderr", Gone())
    print_failure(Failure("interrupted", "interrupted", "", 130), as_json=False)


# ---- the command that starts an owner --------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, variable in (("r", "XDG_RUNTIME_DIR"), ("s", "VMBUS_STATE")):
        (tmp_path / name).mkdir(mode=0o700)
        monkeypatch.setenv(variable, str(tmp_path / name))
    yield tmp_path
    assert not [path for path in (tmp_path / "s" / "logs").iterdir() if path.name.startswith(".")]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "vmbus", *words]


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["run-vm", "no-such-vm", "--detach"], EnvironmentProblem.status, "error: no VM description 'no-such-vm'"),
        (["run-vm", "--name", "No", "--detach"], 2, "error: 'No' is not a usable name of a VM"),
        (["run-vm", "--nonsense", "--detach"], 2, "No such option"),
    ],
)
def test_a_detached_vm_that_cannot_run_says_why(folders: Path, words: list[str], status: int, text: str) -> None:
    (folders / "s" / "logs").mkdir(mode=0o700)
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=pace.seconds(60))
    assert (done.returncode, done.stdout) == (status, ""), done
    assert done.stderr.count(text) == 1 and "Traceback" not in done.stderr
    assert not list((folders / "s" / "logs").iterdir())


OWNER = """
import asyncio, os, sys
from pathlib import Path
from vmbus.cli import detach
from vmbus.cli.asking import Status
owner = detach.this_owner()
assert owner is not None and os.environ.get("VMBUS_DETACHED") is None
async def life():
    command, looks = os.getppid(), 0
    print("coming up", file=sys.stderr, flush=True)
    mark = Path(os.environ["MARK"])
    try:
        while not mark.exists():
            await asyncio.sleep(0.01)
            looks += os.getppid() != command
            if looks > 10:  # the command's end was there to be heard at the first
                Path(os.environ["MARK"] + ".alone").touch()
                return
        owner.named("demo")
        mark.write_text(str(os.getpid()))
        owner.runs([Status(name="demo", state="running", pid=os.getpid(), log=str(owner.log))])
        sys.stderr.write("x" * 200 * 20000)
        sys.stderr.flush()
        async with asyncio.timeout(100):  # should the test fail
            while await asyncio.sleep(0.01, result=mark.exists()):  # a signal is heard before the end is seen
                pass
    except asyncio.CancelledError:
        Path(os.environ["MARK"] + ".cancelled").touch()
        raise
detach.serve(life())
"""
DEAF = OWNER.replace("detach.serve", "detach.run")
"""It lives as in a terminal: hears a hang-up, and not that its command ends."""

STARTER = """
import subprocess, sys
real = subprocess.Popen
def popen(words, **options):
    options["env"]["PYTHONPATH"] += ":" + sys.argv[1]
    return real([words[0], "-m", "vmbus_owner"], **options | {changed})
from vmbus.cli import detach
subprocess.Popen = popen
print(detach.start(["list"])[0].name)
"""


def starter(folder: Path, owner: str = OWNER, changed: str = "{}") -> list[str]:
    """A command that waits for an owner, which is a program of the test's own in place of ``python -m vmbus``.
    `changed`: how it is started in another way."""
    (folder / "package" / "vmbus_owner").mkdir(parents=True)
    (folder / "package" / "vmbus_owner" / "__main__.py").write_text(owner)
    return [sys.executable, "-c", STARTER.replace("{changed}", changed), str(folder / "package")]


@pytest.mark.parametrize(
    ("owner", "changed", "held", "lives"),
    [
        pytest.param(OWNER, "{}", None, True, id="as it is"),
        pytest.param(OWNER, "{'stdin': None}", "/dev/pts/", True, id="sabotage: its terminal open"),
        pytest.param(DEAF, "{'start_new_session': False}", "session", False, id="sabotage: in its terminal's session"),
    ],
)
async def test_a_detached_owner_outlives_its_terminal_and_its_log_is_bounded(
    folders: Path, monkeypatch: pytest.MonkeyPatch, owner: str, changed: str, held: str | None, lives: bool
) -> None:
    mark, log = folders / "mark", folders / "s" / "logs" / "demo.log"
    monkeypatch.setenv("MARK", str(mark))
    mark.touch()
    screen = Screen("/bin/sh", "-c", '"$@"; read gone', "sh", *starter(folders, owner, changed))
    try:
        await screen.expect(b"coming up\r\n")
        await screen.expect(b"demo\r\n")
        pid = int(mark.read_text())
        assert [one for one in owners.held_by_a_terminal(pid) if held is None or not one.startswith(held)] == []
        assert bool(owners.held_by_a_terminal(pid)) == (held is not None)
    finally:
        screen.close()  # the kernel hangs up
    if lives:
        os.kill(pid, signal.SIGHUP)  # that of somebody else is nothing to it either
        owners.until(lambda: log.stat().st_size <= LOG_LIMIT and b"bytes left out" in log.read_bytes(), "a short log")
        assert log.read_bytes().startswith(b"coming up\n")
    mark.unlink()
    owners.until(lambda: not alive(pid), "the owner to end")
    assert (folders / "mark.cancelled").exists() == (not lives)


@pytest.mark.parametrize(
    ("number", "owner"),
    [
        *((number, OWNER) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)),
        pytest.param(signal.SIGKILL, DEAF, id="sabotage: an owner that does not listen"),
    ],
)
def test_a_detached_owner_ends_with_its_command_until_its_vm_runs(
    folders: Path, number: signal.Signals, owner: str
) -> None:
    process = subprocess.Popen(
        starter(folders, owner), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "MARK": str(folders / "mark")}, process_group=0,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == "coming up\n", "what the owner says is shown at once"
    process.send_signal(number)
    process.communicate(timeout=pace.seconds(60))
    owners.until(lambda: list(folders.glob("mark.*")), "the owner to end, or to go on alone")
    assert [path.name for path in folders.glob("mark.*")] == ["mark.alone" if owner == DEAF else "mark.cancelled"]
    if number == signal.SIGKILL:
        for path in (folders / "s" / "logs").iterdir():  # nobody is there who could; the next of many does
            path.unlink()


def test_detached_owners_logs_are_the_latest_few(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path = folders / "s" / "logs"
    tmp_path.mkdir(mode=0o700)
    running = RunDirectory.create("vm-4")
    monkeypatch.setattr(detach, "MOST_LOGS", 3)
    for age in range(5):
        path = tmp_path / f"vm-{age}.log"
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    detach._tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vm-0.log", "vm-1.log", "vm-2.log", "vm-4.log"]
    running.remove()
