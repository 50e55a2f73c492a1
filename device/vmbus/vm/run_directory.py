"""Run directories: one VM's sockets and logs, and who owns them.

The owner holds a lock on the directory's record. So a directory whose owner is gone is recognised, also by a process in
another container, where process ids say nothing, and cleared away. What may become large is in the state directory
(`RunDirectory.room`): the directory for what runs is often a small file system in memory.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
import time
from pathlib import Path

import msgspec

from vmbus.errors import EnvironmentProblem, UsageError, os_error
from vmbus.util.directories import state_directory, state_folder
from vmbus.util.explaining import check_name
from vmbus.util.listening import LONGEST_PATH
from vmbus.util.lockfile import LockFile, held

OWNER = "owner.json"
"""The record in a directory that has an owner."""

_LONGEST_SOCKET_NAME = len("/supervisor.sock")
_ROOM = "run"  # in the state directory
_UNFINISHED_AGE = 60.0  # seconds after which a directory without an owner's record counts as abandoned


class _Owner(msgspec.Struct):
    pid: int
    """For people alone: in another container it is somebody else's."""


def own(path: Path) -> LockFile:
    """Makes a directory ours for as long as the lock is open. Raises `OSError`."""
    lock = LockFile(path / f".{OWNER}")  # nobody finds a record that is not locked
    lock.append(msgspec.json.encode(_Owner(os.getpid())))
    (path / f".{OWNER}").rename(path / OWNER)
    return lock


def remove_abandoned(path: Path) -> bool:
    """Removes a directory whose owner is gone; False if it is somebody's, or perhaps just being made. Raises
    `OSError`."""
    try:
        lock = LockFile(path / OWNER, create=False)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        if time.time() - path.lstat().st_mtime < _UNFINISHED_AGE:
            return False
        _remove(path)
        return True
    try:
        # Two may be cleaning up: the other one was faster, perhaps, and the name is a new owner's by now.
        found = lock.is_at(path / OWNER)
        if found:
            _remove(path)
        return found
    finally:
        lock.close()


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
    with os_error(f"cannot make the run directory's parent {base}"):
        with contextlib.suppress(FileExistsError):
            base.mkdir(mode=0o700)
        status = base.lstat()
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
        if sockets and longest > LONGEST_PATH:
            raise EnvironmentProblem(
                f"socket paths under {base / name} would have {longest} bytes; a socket's path may have "
                f"{LONGEST_PATH}: use a shorter XDG_RUNTIME_DIR or TMPDIR"
            )
        with os_error(f"cannot make a run directory in {base}"):
            fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=base))
        lock: LockFile | None = None
        try:
            with os_error(f"cannot write a run directory in {base}"):
                lock = own(fresh)
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
            pid = read_owner(base / name)
            by = "" if pid is None else f" (process {pid})"
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
        with os_error(f"cannot make {path}"):
            if not path.is_symlink():
                (self._room / name).mkdir(mode=0o700)
                path.symlink_to(self._room / name)
        return path

    def remove(self) -> None:
        """Removes the directory and all in it. Does nothing if it is gone."""
        _remove(self.path)
        if self._lock is not None:
            self._lock.close()
        if self._room is not None:
            self._room.remove()


def read_owner(path: Path) -> int | None:
    """The process that is said to own a run directory, or None if there is no (readable) record."""
    try:
        return msgspec.json.decode((path / OWNER).read_bytes(), type=_Owner).pid
    except (OSError, msgspec.DecodeError, ValueError, RecursionError):
        return None


def running_vms(base: Path | None = None) -> list[str]:
    """The names of this user's running VMs, sorted."""
    found = (base or runtime_base()).iterdir()
    return sorted(path.name for path in found if not path.name.startswith(".") and held(path / OWNER))


def clean_stale(base: Path) -> list[str]:
    """Removes the run directories whose owner is gone, and returns their names."""
    removed = []
    for path in base.iterdir():
        with contextlib.suppress(OSError):  # somebody else may be cleaning up too
            if stat.S_ISDIR(path.lstat().st_mode) and remove_abandoned(path):
                removed.append(path.name)
    return removed


def _remove(path: Path) -> None:
    doomed = path.with_name(f".dead-{secrets.token_hex(6)}")  # under a new name first: the old one is free at once
    with contextlib.suppress(FileNotFoundError):
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
