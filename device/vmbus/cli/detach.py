"""`--detach`: an owner that outlives the terminal, and the command that started it.

The command starts itself once more: in a session of its own, with nothing of the terminal's open. What that one says
goes into its log, in the state directory; the command shows it until the VM runs, says so, and ends. Between the two is
a socket: the owner says on it what runs, or why nothing does; and if the command ends before that, so does the owner.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

import click
import msgspec

from vmbus.cli.asking import Status
from vmbus.cli.results import Failure, print_result
from vmbus.cli.terminal import heeded, run
from vmbus.cli.words import words_of
from vmbus.errors import EnvironmentProblem, ReportedError, VmbusError, os_error
from vmbus.places import command, import_path
from vmbus.util.directories import state_folder
from vmbus.vm.logs import LOOK_EVERY, shorten
from vmbus.vm.run_directory import running_vms

T = TypeVar("T")

FOLDER = "logs"
"""In the state directory."""
MOST_LOGS = 64
"""Logs that are kept, the latest."""
_VARIABLE = "VMBUS_DETACHED"  # of the owner's alone: descriptor and log
_GRACE = 30.0  # seconds that an owner has for cleaning up, once it is not wanted
_MESSAGE_LIMIT = 1 << 20


class _Message(msgspec.Struct):
    """One of these."""

    vms: list[Status] | None = None
    error: Failure | None = None


# ---- the owner -------------------------------------------------------------------------------------------------------


class Owner:
    """This process, if it was started by a command that waits."""

    def __init__(self, connection: socket.socket, log: Path) -> None:
        self._connection = connection
        self._watched = True
        self.log = log

    @property
    def awaited(self) -> bool:
        """Whether the command has heard nothing yet."""
        return self._watched

    def named(self, name: str) -> Path:
        """Where the log is from now on: it has its VM's name."""
        path = self.log.with_name(f"{name}.log")
        with contextlib.suppress(OSError):  # then it keeps the name that it has
            self.log.rename(path)
            self.log = path
        return self.log

    def runs(self, vms: Sequence[Status]) -> None:
        """These VMs run: the command ends, and what happens to it is nothing to us any more."""
        self._say(_Message(vms=list(vms)))

    def failed(self, error: VmbusError) -> None:
        """Why nothing runs."""
        self._say(_Message(error=Failure.of(error)))

    def _say(self, message: _Message) -> None:
        self._watched = False
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            asyncio.get_running_loop().remove_reader(self._connection)
        with contextlib.suppress(OSError):  # the command is gone, in the very last moment
            self._connection.setblocking(True)
            self._connection.sendall(msgspec.json.encode(message) + b"\n")
        self._connection.close()

    async def attending(self, work: Coroutine[Any, Any, T]) -> T:
        """Does the owner's work: it ends with the command until the VM runs, and its log stays bounded."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        loop.add_signal_handler(signal.SIGHUP, lambda: None)  # there is no terminal whose end this could be
        loop.add_reader(self._connection, task.cancel)  # the command says nothing; it only ends
        bounding = asyncio.create_task(self._keep_log_bounded())
        try:
            return await work
        finally:
            bounding.cancel()
            if self._watched:
                loop.remove_reader(self._connection)

    async def _keep_log_bounded(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            shorten(self.log)


OWNER: Owner | None = None


def this_owner() -> Owner | None:
    """This process as a detached owner, if it is to be one."""
    global OWNER
    if OWNER is None and (found := os.environ.pop(_VARIABLE, "")):
        descriptor, _, log = found.partition(":")
        OWNER = Owner(socket.socket(fileno=int(descriptor)), Path(log))
        os.set_inheritable(int(descriptor), False)
    return OWNER


def serve(work: Coroutine[Any, Any, T]) -> T:
    """Runs a VM's life, in this terminal's owner or in a detached one."""
    owner = this_owner()
    return run(work if owner is None else owner.attending(work))


# ---- the command that starts one -------------------------------------------------------------------------------------


def start(words: Sequence[str]) -> list[Status]:
    """Starts an owner with these words of the command line, and returns what runs once it does.

    What the owner says until then goes to standard error. Raises `ReportedError` as it had it, `EnvironmentProblem` if
    it cannot be started or dies; Ctrl-C (or SIGTERM, SIGHUP) ends it.
    """
    folder = state_folder(FOLDER)
    _tidy(folder)
    log = folder / f".starting-{secrets.token_hex(6)}.log"
    with os_error(f"cannot write {log}"):
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
    ours, theirs = socket.socketpair()
    try:
        environment = os.environ | {_VARIABLE: f"{theirs.fileno()}:{log}", "PYTHONPATH": import_path()}
        with log.open("rb") as output, os_error("cannot start a process"):
            process = subprocess.Popen(
                [sys.executable, "-m", "vmbus", *words],
                stdin=subprocess.DEVNULL, stdout=descriptor, stderr=descriptor,
                pass_fds=[theirs.fileno()], env=environment, start_new_session=True,
            )  # fmt: skip
            theirs.close()
            try:
                with _signals():
                    found = _follow(ours, output)
            except BaseException:
                ours.close()  # which it takes for our end
                _end(process)
                raise
            finally:
                _show(output)
        if found.error is not None:
            error = found.error
            _end(process)
            raise ReportedError(error.message, error.kind, error.code, error.status)
        if found.vms is None:
            raise EnvironmentProblem(f"the VM's owner ended with status {process.wait()} before the VM ran")
        process.returncode = 0  # it is nobody's child any more once we have ended: no complaint that it runs
        return found.vms
    finally:
        log.unlink(missing_ok=True)  # of a VM that runs, it has another name by now
        os.close(descriptor)
        ours.close()
        theirs.close()


def detached(*, as_json: bool) -> bool:
    """What a command with `--detach` begins with: True in the one that was called, once what it has started runs (which
    it has said then), False in the owner itself."""
    if this_owner() is not None:
        return False
    vms = start(words_of(click.get_current_context()))
    lines = [
        f"VM {one.name!r} runs detached (process {one.pid}); {command('console')} {one.name} shows its console, "
        f"{command('stop')} {one.name} ends it; log: {one.log}"
        for one in vms
    ]
    print_result({"vms": vms}, as_json, "\n".join(lines))
    return True


def _follow(connection: socket.socket, output: IO[bytes]) -> _Message:
    """Shows what the owner says until it has told how things are; an empty message if it ends before."""
    told = bytearray()
    while not told.endswith(b"\n"):
        if select.select([connection], [], [], 0.1)[0]:
            data = connection.recv(65536)
            if not data or len(told) > _MESSAGE_LIMIT:
                return _Message()
            told += data
        _show(output)
    try:
        return msgspec.json.decode(bytes(told), type=_Message)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise EnvironmentProblem(f"what the VM's owner says cannot be understood: {error}") from error


def _show(output: IO[bytes]) -> None:
    if data := output.read():
        sys.stderr.write(data.decode(errors="replace"))
        sys.stderr.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    """It is ending by itself."""
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in heeded(signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tidy(folder: Path) -> None:
    """The logs of VMs that run, and the latest, stay."""
    with contextlib.suppress(OSError):
        logs = sorted(folder.glob("*.log"), key=lambda path: path.lstat().st_mtime, reverse=True)
        running = set(running_vms())
        for path in logs[MOST_LOGS:]:
            if path.stem not in running:
                path.unlink(missing_ok=True)
