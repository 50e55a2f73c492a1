"""What a test run leaves behind, however it ends: no process, and nothing in the directory for temporary files.

A run has a temporary directory of its own, and each of its workers one in that; pytest's own directories (`tmp_path`)
stay where they always are. It goes with the run. When the process that was started is killed, its workers hear of it
from the kernel, and have a moment to clean up; a small process that only waits for that takes the directory along. What
is killed all at once leaves the directory to the next run.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType

from support.processes import children, parents

PREFIX = "vt-"
"""Of runs' directories. Short, since sockets are below them."""
MOMENT = 2.0
"""Seconds that a worker has for cleaning up when its run was killed."""
_PDEATHSIG = 1
_HEIR = """
import fcntl, os, shutil, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdin.buffer.read()
end = time.monotonic() + float(sys.argv[2])
try:
    lock = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(sys.argv[1], ignore_errors=True)
            break
        except BlockingIOError:
            if time.monotonic() > end:
                break
            time.sleep(0.05)
except OSError:
    pass
"""
"""Waits for the end of the run's first process (its standard input), then for that of the workers (their locks)."""
_PYTESTS_OWN = "PYTEST_DEBUG_TEMPROOT"


class RunFolder:
    """The temporary directory of this process. `path`: where it is; `run`: that of the whole run."""

    def __init__(self, run: Path, path: Path, lock: int) -> None:
        self.run = run
        self.path = path
        self._lock = lock  # nobody clears the run's directory away while one of its processes has this
        self._heir: subprocess.Popen[bytes] | None = None
        self._before = {name: os.environ.get(name) for name in ("TMPDIR", _PYTESTS_OWN)}
        os.environ.setdefault(_PYTESTS_OWN, tempfile.gettempdir())
        os.environ["TMPDIR"] = tempfile.tempdir = str(path)

    @classmethod
    def of_the_run(cls) -> RunFolder:
        """A new one; those of runs that were killed are cleared away first."""
        clear_abandoned(Path(tempfile.gettempdir()))
        while True:
            path = Path(tempfile.mkdtemp(prefix=PREFIX))
            lock = _locked(path, fcntl.LOCK_SH)
            if lock is not None:
                folder = cls(path, path, lock)
                folder._heir = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _HEIR, str(path), "30"],
                    stdin=subprocess.PIPE,
                    start_new_session=True,  # what is sent to all of the run is not for this one
                )
                return folder

    @classmethod
    def of_a_worker(cls, name: str) -> RunFolder:
        """In that of the run, which is in the environment. From here on this process ends with the one above it."""
        run = Path(tempfile.gettempdir())
        path = run / name
        path.mkdir(exist_ok=True)
        lock = _locked(run, fcntl.LOCK_SH)
        assert lock is not None, f"{run} was cleared away under its run"
        folder = cls(run, path, lock)
        folder._end_with_the_run()
        return folder

    def remove(self) -> None:
        """The process is done."""
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        tempfile.tempdir = None
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        if self._heir is not None:
            self._heir.communicate(timeout=60)

    def _end_with_the_run(self) -> None:
        parent = os.getppid()
        signal.signal(signal.SIGHUP, self._orphaned)
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGHUP, 0, 0, 0)
        if os.getppid() != parent:  # it was quicker
            os.kill(os.getpid(), signal.SIGHUP)

    def _orphaned(self, number: int, frame: FrameType | None) -> None:
        threading.Thread(target=self._end, daemon=True).start()
        raise KeyboardInterrupt  # fixtures clean up

    def _end(self) -> None:
        time.sleep(MOMENT)
        for pid in children():  # what has a temporary file yet
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def _locked(path: Path, how: int) -> int | None:
    """A descriptor that holds the lock of a directory. None if that is gone, or somebody else's lock is in the way."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
        if path.stat().st_ino == os.fstat(lock).st_ino:
            return lock
    except OSError:
        pass
    os.close(lock)
    return None


def clear_abandoned(base: Path) -> None:
    """Removes the directories of runs of ours of which no process is left."""
    for path in base.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
                lock = _locked(path, fcntl.LOCK_EX)
                if lock is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    os.close(lock)


def tell_workers(number: int) -> None:
    """Sends a signal to the processes right below this one: workers that learn of an end earlier so than by a pipe."""
    for pid, parent in parents().items():
        if parent == os.getpid():
            with contextlib.suppress(OSError):
                os.kill(pid, number)


def left_in(path: Path) -> set[str]:
    """What is in a directory for temporary files, other than the bases that users' run directories have there, and what
    pytest keeps of its last runs."""
    found = set()
    with contextlib.suppress(OSError):
        for entry in path.iterdir():
            if entry.name.startswith("pytest-of-"):
                continue
            lasting = entry.name in {f"{name}-{os.getuid()}" for name in ("vmbus", "vmbus-soak")}
            if not lasting or any(part.is_file() or part.is_socket() or part.is_fifo() for part in entry.rglob("*")):
                found.add(entry.name)
    return found
