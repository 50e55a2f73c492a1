"""The cache directory: things appear in it whole, or not at all.

Every product of the set-up (a private root, a build, an image, a virtual environment) is a file or a directory under
the cache. It is made under a temporary name beside its place and renamed there when it is complete, so that whoever
finds the final name finds a finished product, and an interrupted set-up simply goes on with the first one that is
missing. One lock file keeps two set-ups from making the same thing at the same time.

The location is `$VMBUS_CACHE`, else `$XDG_CACHE_HOME/vmbus-device`, else `~/.cache/vmbus-device`. The directory is
its owner's alone (mode 0700). Standard library only: the first stage of the set-up imports this module before there
is a virtual environment.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vmbus.errors import Code, EnvironmentProblem, VmbusError, WaitTimeout, code_of
from vmbus.util.directories import cache_directory

LOCK_TIMEOUT = 1800.0
"""Seconds to wait for another set-up: longer than one takes from nothing on a slow network."""

_NEARLY_FULL = 1 << 20
_SCRATCH = ".scratch-"
_PARTIAL = ".partial-"


def digest(*parts: object, length: int = 16) -> str:
    """Return a short hexadecimal key over `parts`, each of which JSON can represent."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


class Cache:
    """The cache directory, its lock, and the one way in which things appear in it."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = cache_directory() if root is None else root.absolute()

    def path(self, *parts: str) -> Path:
        """Return the path of an entry, whether or not it exists."""
        return self.root.joinpath(*parts)

    def prepare(self) -> None:
        """Create the directory if it is missing.

        Raises EnvironmentProblem if that is impossible.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.require_own()
            self.root.chmod(0o700)
        except OSError as error:
            raise EnvironmentProblem(
                f"cannot create the cache directory {self.root}: {error}; set VMBUS_CACHE to a writable place"
            ) from error

    def require_own(self) -> None:
        """Raise EnvironmentProblem if the directory is somebody else's: what lies in it is run. One that is not there
        is nobody's."""
        try:
            status = self.root.stat()
        except FileNotFoundError:
            return
        except OSError as error:
            raise EnvironmentProblem(f"cannot look at the cache directory {self.root}: {error.strerror}") from error
        if status.st_uid != os.getuid():
            raise EnvironmentProblem(
                f"the cache directory {self.root} belongs to user {status.st_uid}, and programs are run from it (we "
                f"are user {os.getuid()}); set VMBUS_CACHE to a place of your own"
            )

    def free(self) -> int:
        """Bytes that are left on the file system on which the directory is, or will be."""
        place = self.root
        while not place.exists() and place != place.parent:
            place = place.parent
        return shutil.disk_usage(place).free

    def require_room(self, size: int, what: str) -> None:
        """Raise EnvironmentProblem if there are no `size` bytes left for `what`."""
        free = self.free()
        if free < size:
            raise EnvironmentProblem(
                f"{what} needs about {size / 1e6:.0f} MB, and the file system of the cache directory {self.root} has "
                f"{free / 1e6:.0f} MB left: make room there, or set VMBUS_CACHE to a place that has it"
            )

    def is_full(self, error: BaseException | None = None) -> str:
        """What to tell if there is no room left, whatever a program that failed for it has said; empty if there is."""
        if code_of(error) != Code.DISK_FULL and self.free() >= _NEARLY_FULL:
            return ""
        return (
            f"the file system of the cache directory {self.root} is full ({self.free() / 1e6:.0f} MB are left): make "
            "room there, or set VMBUS_CACHE to a place that has it"
        )

    def size(self) -> int:
        """Bytes that everything in the directory takes."""
        seen = set()
        total = 0
        for folder, _, names in os.walk(self.root):
            for name in names:
                with suppress(OSError):
                    status = Path(folder, name).lstat()
                    if status.st_nlink == 1 or (status.st_dev, status.st_ino) not in seen:
                        seen.add((status.st_dev, status.st_ino))
                        total += status.st_blocks * 512
        return total

    def clear(self) -> int:
        """Remove everything; returns how many bytes that were. Raises EnvironmentProblem, WaitTimeout."""
        if not self.root.exists():
            return 0
        with self.lock():
            size = self.size()
            for entry in self.root.iterdir():
                if entry.name != "lock":
                    remove(entry)
        return size

    @contextmanager
    def lock(self, timeout: float = LOCK_TIMEOUT, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hold the lock; at most `timeout` seconds are spent waiting for whoever has it.

        `on_wait` is told once, in words, if somebody else holds the lock. The kernel releases the lock when its
        holder dies, so that a killed set-up never blocks the next one. Raises WaitTimeout.
        """
        self.prepare()
        path = self.path("lock")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + timeout
            announced = False
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "another process"
                    if time.monotonic() >= deadline:
                        raise WaitTimeout(f"the lock {path} held by {holder}", timeout) from None
                    if on_wait is not None and not announced:
                        on_wait(f"waiting for {holder}, which holds {path}")
                        announced = True
                    # flock() has no time limit of its own, and SIGALRM belongs to the application.
                    time.sleep(min(0.1, max(0.0, deadline - time.monotonic())))
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()}\n".encode(), 0)
            # What interrupted set-ups left: nobody else works here now.
            for stale in (*self.root.glob(f"{_SCRATCH}*"), *self.root.glob(f"*/.*{_PARTIAL}*")):
                with suppress(OSError):
                    remove(stale)
            yield
        finally:
            os.close(descriptor)

    def scratch(self) -> tempfile.TemporaryDirectory[str]:
        """Return a folder on the cache's file system for the duration of a `with` block. The caller holds the lock:
        who gets it next removes what is left of an interrupted set-up."""
        self.prepare()
        return tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=self.root)

    @contextmanager
    def publish_directory(self, final: Path) -> Iterator[Path]:
        """Give out an empty directory that becomes `final` when the block ends without an exception.

        The caller holds the lock. A directory that is in the way (a product found to be damaged) is replaced.
        """
        final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A name of its own: a program that a killed set-up had started may still be writing into an earlier one.
        partial = Path(tempfile.mkdtemp(prefix=f".{final.name}{_PARTIAL}", dir=final.parent))
        try:
            yield partial
            remove(final)
            partial.rename(final)
        except BaseException as error:
            full = self.is_full(error) if isinstance(error, OSError | VmbusError) else ""
            with suppress(OSError):  # what went wrong first is what the caller has to hear of
                remove(partial)
            if full:
                raise EnvironmentProblem(full) from error
            raise


def prune(current: Path, kept: int, recent: float = 0.0) -> None:
    """Remove the oldest of a product's other versions, but so many in all, and those of the last so many seconds: other
    checkouts share the cache."""
    others = [(path.stat().st_mtime, path) for path in current.parent.iterdir() if path.name[0] != "."]
    for made, old in sorted(((made, path) for made, path in others if path != current), reverse=True)[kept - 1 :]:
        if made <= time.time() - recent:
            remove(old)


def publish_bytes(final: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file so that it appears whole: a temporary name in the same directory, then a rename."""
    final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        partial.rename(final)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Remove a file or a tree, whatever its modes, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        for directory, _, _ in os.walk(path):  # unpacked packages may hold directories without write permission
            if not os.access(directory, os.W_OK | os.X_OK | os.R_OK):
                Path(directory).chmod(0o700)
        shutil.rmtree(path)
