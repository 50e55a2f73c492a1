"""Child processes and run directories that never outlive their owner.

A child runs in a session of its own (a terminal's Ctrl-C reaches us, not it), dies with us (`launcher`), and logs
to a file in the run directory, which stays bounded (`logs`). Whoever waits for something that a child does waits
through `Child.guard`: if the child dies first, the wait ends at once with an error that shows the end of its log.

A run directory holds one VM's sockets and logs. Its owner holds a lock on its record, so a directory whose owner is
gone is recognised, also by a process in another container, and cleared away. What may become large is in the state
directory (`RunDirectory.room`): the directory for what runs is often a small file system in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Awaitable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from vmbus.errors import EnvironmentProblem, UsageError, VmbusError, WaitTimeout
from vmbus.util.directories import state_directory, state_folder
from vmbus.util.explaining import check_name
from vmbus.util.lockfile import LockFile, held
from vmbus.util.patience import patient
from vmbus.vm.logs import LOOK_EVERY, shorten

T = TypeVar("T")

SOCKET_PATH_LIMIT = 107
"""Bytes that a unix socket's path may have (sun_path without its end)."""

OWNER = "owner.json"
"""The record in a directory that has an owner."""

_LAUNCHER = Path(__file__).with_name("launcher.py")
_LONGEST_SOCKET_NAME = len("/supervisor.sock")
_ROOM = "run"  # in the state directory
_UNFINISHED_AGE = 60.0  # seconds after which a directory without an owner record counts as abandoned


class ProcessDied(EnvironmentProblem):
    """A program that we started ended when it should have run on."""


# What every QEMU with this device says when the guest's IOMMU switches address spaces: it unmaps what was not mapped.
_HARMLESS = re.compile(r"vfio_container_dma_unmap\(.*No such file|vfio_user_(process|wait_reqs)\b.*No such file")


def log_tail(path: Path, lines: int = 12) -> str:
    """The last telling lines of a log file, indented for an error message; empty if there are none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 32768))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    telling = [line for line in text.splitlines() if line.strip() and not _HARMLESS.search(line)]
    return "\n".join(f"    {line}" for line in telling[-lines:])


class Child:
    """One running child process.

    Use `spawn` to make one. `exited` is a future of the exit status (negative: the signal that killed it). A death with
    status 0 has its reason elsewhere: then the error quotes `witness`, if there is one: what it is, and its file. That
    one is kept bounded like `log`; whoever writes it has to append.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.log = log
        self.witness: tuple[str, Path] | None = None
        self.process = process
        self.exited: asyncio.Task[int] = asyncio.create_task(process.wait(), name=f"exit of {name}")
        self._bounding: asyncio.Task[None] = asyncio.create_task(self._keep_logs_bounded(), name=f"logs of {name}")

    @classmethod
    async def spawn(
        cls,
        name: str,
        argv: Sequence[str],
        log: Path,
        *,
        environment: dict[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        capture_stdout: bool = False,
    ) -> Child:
        """Starts `argv` with its output in `log`.

        `environment` is added to ours. With `capture_stdout`, standard output is readable as
        ``child.process.stdout`` instead. Raises `EnvironmentProblem` if the program cannot be started at all.
        """
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise EnvironmentProblem(f"cannot write {log}: {error.strerror}") from error
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                str(_LAUNCHER),
                str(os.getpid()),
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if capture_stdout else descriptor,
                stderr=descriptor,
                env={**os.environ, **(environment or {})},
                pass_fds=tuple(pass_fds),
                start_new_session=True,
            )
        except OSError as error:
            raise EnvironmentProblem(f"cannot start {name} ({argv[0]}): {error.strerror}") from error
        finally:
            os.close(descriptor)
        return cls(name, process, log)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return not self.exited.done()

    def death(self, doing: str = "") -> ProcessDied:
        """The error that says how this (ended) child ended, with the end of its log."""
        status = self.exited.result()
        if status < 0:
            try:
                how = f"was killed by {signal.Signals(-status).name}"
            except ValueError:
                how = f"was killed by signal {-status}"
        else:
            how = f"ended with status {status}"
        during = f" while we waited for {doing}" if doing else ""
        tail = log_tail(self.log)
        text = f"{self.name} {how}{during}" + (f"; its last words:\n{tail}" if tail else "; its log says nothing")
        if status == 0 and self.witness is not None:
            what, file = self.witness
            told = log_tail(file)
            text += f"\n{what}:\n{told}" if told else f"\n{what} is empty"
        return ProcessDied(text)

    async def guard(self, work: Awaitable[T], what: str, timeout: float) -> T:
        """Waits for `work`, at most `timeout` seconds and only while this child lives. See `guard_all`."""
        return await guard_all([self], work, what, timeout)

    async def stop(self, grace: float = 0.0) -> None:
        """Ends the child: with SIGTERM and `grace` seconds first if `grace` is not 0, then with SIGKILL."""
        if self.running and grace > 0:
            self._signal(signal.SIGTERM)
            await asyncio.wait({self.exited}, timeout=grace)
        if self.running:
            self._signal(signal.SIGKILL)
        # After SIGKILL only the kernel can be slow; still no wait of ours is unbounded.
        done, _ = await asyncio.wait({self.exited}, timeout=30)
        if not done:
            raise WaitTimeout(f"{self.name} (process {self.pid}) to end after SIGKILL", 30)
        await asyncio.wait({self._bounding}, timeout=1)  # it is ending; no bare await, since it may be cancelled

    async def _keep_logs_bounded(self) -> None:
        """Looks at the sizes of this child's files while it runs, and once more when it has ended."""
        running = True
        while running:
            running = not (await asyncio.wait({self.exited}, timeout=LOOK_EVERY))[0]
            shorten(self.log)
            if self.witness is not None:
                shorten(self.witness[1])

    def _signal(self, number: signal.Signals) -> None:
        # The child leads a process group of its own, so its own children get the signal too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


async def guard_all(children: Iterable[Child], work: Awaitable[T], what: str, timeout: float) -> T:
    """Waits for `work`, at most `timeout` seconds (of a usual machine: see `util.patience`), and only while every one
    of `children` lives.

    Raises `ProcessDied` as soon as a child ends (unless the work is done by then), `WaitTimeout` naming `what` when
    time is up, and whatever the work raises. The work is cancelled in every case but its own end.
    """
    timeout = patient(timeout)
    task = asyncio.ensure_future(work)
    watched = list(children)
    ends = {child.exited for child in watched}
    try:
        await asyncio.wait({task, *ends}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        problem = task.exception() if task.done() and not task.cancelled() else None
        if isinstance(problem, (VmbusError, OSError, EOFError)) and ends:
            # Often the first sign of a dying process is its broken connection, or what the other one says of that: let
            # the death be the error.
            await asyncio.wait(ends, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
        elif task.done():
            return task.result()
        for child in watched:
            if not child.running:
                raise child.death(what) from problem
        if task.done():
            return task.result()
        raise WaitTimeout(what, timeout)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=5)


# --- run directories ---------------------------------------------------------------------------------------------


class Owner(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Whose directory it is: a process, told apart from later ones with the same id by its start time."""

    pid: int
    start_time: int
    """Clock ticks since boot at which the process started (field 22 of /proc/PID/stat)."""
    boot: str
    """The kernel's random id of this boot."""
    locked: bool = False
    """The owner holds a lock on this record. Older ones do not; then its process is looked for."""

    @classmethod
    def current(cls) -> Owner:
        pid = os.getpid()
        started = _start_time(pid)
        assert started is not None
        return cls(pid, started, boot_id(), locked=True)

    def alive(self, path: Path) -> bool:
        """Whether it lives; `path` is the directory."""
        if self.locked:
            return held(path / OWNER)
        return self.boot == boot_id() and _start_time(self.pid) == self.start_time


def own(path: Path) -> LockFile:
    """Makes a directory ours for as long as the lock is open. Raises `OSError`."""
    lock = LockFile(path / OWNER)  # locked before there is a record, so that nobody finds it without
    lock.append(msgspec.json.encode(Owner.current()))
    return lock


def boot_id() -> str:
    """The kernel's random id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_time(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the program's name in parentheses and may contain anything.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


def runtime_base() -> Path:
    """The directory that holds all run directories of this user's VMs. See `private_base`."""
    return private_base("vmbus")


def private_base(name: str, *, large: bool = False) -> Path:
    """A directory of this user for things that run: made if need be, 0700, ours.

    It is $XDG_RUNTIME_DIR/NAME, or NAME-UID in the directory for temporary files. Both are often small file systems in
    memory, so for what is `large` it is in the state directory. Raises `EnvironmentProblem` if it belongs to somebody
    else, is not a directory, or cannot be made.
    """
    if large:
        return state_folder(name)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK | os.X_OK):
        base = Path(runtime) / name
    else:
        base = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            base.mkdir(mode=0o700)
        status = base.lstat()
    except OSError as error:
        raise EnvironmentProblem(f"cannot make the run directory's parent {base}: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise EnvironmentProblem(
            f"{base} must be a directory of user {os.getuid()} that nobody else may enter (mode 0700); "
            "move it away, or point XDG_RUNTIME_DIR at a directory of your own"
        )
    return base


class RunDirectory:
    """One VM's directory of sockets and logs; `create` makes it, `remove` ends it."""

    def __init__(self, path: Path, lock: LockFile | None = None) -> None:
        self.path = path
        self._lock = lock
        self._room: RunDirectory | None = None

    @property
    def name(self) -> str:
        return self.path.name

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @classmethod
    def create(cls, name: str, *, exact: bool = False, base: Path | None = None, sockets: bool = True) -> RunDirectory:
        """Claims a directory called `name`, or ``name-2`` and so on if that is in use (unless `exact`).

        Directories of owners that are gone are cleared away first. Raises `UsageError` for a name that is not usable,
        and if `exact` and in use, and
        `EnvironmentProblem` if the directory cannot be made, or its path is too long for `sockets`.
        """
        check_name(name)
        base = base or runtime_base()
        clean_stale(base)
        if (large := state_directory() / _ROOM).is_dir():
            clean_stale(large)
        longest = len(os.fsencode(base)) + 1 + len(name) + len("-99") + _LONGEST_SOCKET_NAME
        if sockets and longest > SOCKET_PATH_LIMIT:
            raise EnvironmentProblem(
                f"socket paths under {base / name} would have {longest} bytes; a socket's path may have "
                f"{SOCKET_PATH_LIMIT}: use a shorter XDG_RUNTIME_DIR or TMPDIR"
            )
        try:
            fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=base))
        except OSError as error:
            raise EnvironmentProblem(f"cannot make a run directory in {base}: {error.strerror}") from error
        lock: LockFile | None = None
        try:
            try:
                lock = own(fresh)
            except OSError as error:
                raise EnvironmentProblem(f"cannot write a run directory in {base}: {error.strerror}") from error
            for number in range(1, 100):
                path = base / (name if number == 1 else f"{name}-{number}")
                try:
                    fresh.rename(path)  # atomic; refused if the target is a directory with something in it
                    return cls(path, lock)
                except OSError as error:
                    if not path.is_dir():
                        raise EnvironmentProblem(f"cannot make run directory {path}: {error.strerror}") from error
                if exact:
                    break
            owner = read_owner(base / name)
            by = f" (process {owner.pid})" if owner else ""
            raise UsageError(f"a VM called {name!r} is running already{by}; choose another name")
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            if lock is not None:
                lock.close()
            raise

    def room(self, name: str) -> Path:
        """A directory in it, made if need be, for what may become large: a link to one in the state directory, which
        ends with this one. Raises `EnvironmentProblem`."""
        path = self.path / name
        if self._room is None:
            self._room = RunDirectory.create(self.name, base=private_base(_ROOM, large=True), sockets=False)
        try:
            if not path.is_symlink():
                (self._room / name).mkdir(mode=0o700)
                path.symlink_to(self._room / name)
        except OSError as error:
            raise EnvironmentProblem(f"cannot make {path}: {error.strerror}") from error
        return path

    def remove(self) -> None:
        """Removes the directory and all in it. Does nothing if it is gone."""
        _remove(self.path)
        if self._lock is not None:
            self._lock.close()
        if self._room is not None:
            self._room.remove()


def read_owner(path: Path) -> Owner | None:
    """The owner recorded in a run directory, or None if there is no (readable) record."""
    try:
        return msgspec.json.decode((path / OWNER).read_bytes(), type=Owner)
    except (OSError, msgspec.DecodeError, ValueError, RecursionError):
        return None


def running_vms(base: Path | None = None) -> list[str]:
    """The names of this user's running VMs, sorted."""
    base = base or runtime_base()
    names = []
    for path in base.iterdir():
        if path.name.startswith(".") or not path.is_dir():
            continue
        owner = read_owner(path)
        if owner is not None and owner.alive(path):
            names.append(path.name)
    return sorted(names)


def clean_stale(base: Path) -> list[str]:
    """Removes the run directories whose owner is gone, and returns their names."""
    removed = []
    for path in base.iterdir():
        with contextlib.suppress(OSError):  # somebody else may be cleaning up too
            if not stat.S_ISDIR(path.lstat().st_mode):
                continue
            owner = read_owner(path)
            if owner.alive(path) if owner else time.time() - path.lstat().st_mtime < _UNFINISHED_AGE:
                continue
            _remove(path)
            removed.append(path.name)
    return removed


def _remove(path: Path) -> None:
    # Under a new name first: the old one is free at once, and two cleaners cannot both take a directory apart
    # under the feet of a new owner.
    doomed = path.with_name(f".dead-{secrets.token_hex(6)}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
