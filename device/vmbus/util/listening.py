"""Listening Unix sockets: made here, and then their owner's alone, or handed over by whoever started this process."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

from vmbus.errors import EnvironmentProblem, UsageError

LONGEST_PATH = 107
"""Bytes of a socket's path, without the NUL."""


class Listener:
    """A listening Unix socket that only its owner can connect to.

    A socket file that nobody listens on is replaced; what somebody else has put in its place is left alone at the end.

    Attributes:
        path: where it is; of a socket without a name, words for people.
        folder: the directory for what belongs to it, None if that is somebody else's.
        spent: the only client that could come was accepted.
    """

    folder: Path | None = None
    spent = False

    def __init__(self, path: Path, *, backlog: int = 4, make_directory: bool = False) -> None:
        """`make_directory`: with mode 0700, if it is missing. Raises EnvironmentProblem if the path is too long, taken
        by a live process or by something else, or not writable."""
        self.path = path
        self.folder = path.absolute().parent
        if len(os.fsencode(path)) > LONGEST_PATH:
            raise EnvironmentProblem(
                f"socket path {path} has more than {LONGEST_PATH} bytes, the system's limit; choose a shorter one"
            )
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if make_directory and not path.parent.exists():
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _remove_stale(path)
            # The mode is taken over by bind, so there is no moment at which others could connect.
            os.fchmod(self.socket.fileno(), 0o600)
            self.socket.bind(os.fspath(path))
            self._identity = _identity(path)
            self.socket.listen(backlog)
            self.socket.setblocking(False)
        except OSError as error:
            self.socket.close()
            raise EnvironmentProblem(f"cannot listen on {path}: {error.strerror or error}") from error
        except BaseException:
            self.socket.close()
            raise

    def accept(self) -> socket.socket | None:
        """The next waiting client, in blocking mode; None if there is none. Raises OSError when descriptors run out."""
        try:
            client, _ = self.socket.accept()
        except (BlockingIOError, ConnectionAbortedError, InterruptedError):
            return None
        client.setblocking(True)
        return client

    def close(self) -> None:
        """Stop listening and remove the socket file, unless it has been replaced by somebody else's."""
        self.socket.close()
        with contextlib.suppress(OSError):
            if _identity(self.path) == self._identity:
                self.path.unlink()


class Inherited(Listener):
    """A listening socket that was handed over as a descriptor: who may connect, and its file, is its maker's affair."""

    def __init__(self, given: socket.socket) -> None:
        self.path = _name(given, given.getsockname())
        self.socket = given
        self.socket.setblocking(False)

    def close(self) -> None:
        """Stop listening."""
        self.socket.close()


class Connected(Listener):
    """A connection that was handed over in the place of a listening socket: its other end is the only client."""

    def __init__(self, given: socket.socket) -> None:
        self.path = _name(given, given.getpeername())
        # Whoever waits for clients finds one there, once.
        self.socket, self._bell = socket.socketpair()
        self.socket.setblocking(False)
        self._bell.send(b"c")
        self._given = given

    def accept(self) -> socket.socket | None:
        try:
            self.socket.recv(1)
        except BlockingIOError:
            return None
        self.spent = True
        self._given.setblocking(True)
        return self._given

    def close(self) -> None:
        """Nobody is accepted any more; a client that was is its taker's."""
        for one in (self.socket, self._bell):
            one.close()


def listening(where: Path | Listener, *, make_directory: bool = False) -> Listener:
    """A socket made at a path, or the one that was handed over. Raises EnvironmentProblem."""
    return where if isinstance(where, Listener) else Listener(where, make_directory=make_directory)


def folder_of(where: Path | Listener) -> Path | None:
    """The directory for what belongs to such a socket; None: it is somebody else's."""
    return where.folder if isinstance(where, Listener) else where.absolute().parent


def inherited(descriptor: int) -> Listener:
    """The unix socket that was handed over as this descriptor: a listening one, or a connection.

    The descriptor is ours from here on, and goes to no child. Raises UsageError if it is no such socket.
    """
    try:
        given = socket.socket(fileno=descriptor)
    except OSError as error:
        raise UsageError(f"descriptor {descriptor} is not a socket that was handed over: {error.strerror}") from error
    given.set_inheritable(False)
    if given.family != socket.AF_UNIX or given.type != socket.SOCK_STREAM:
        given.detach()
        raise UsageError(f"descriptor {descriptor} is not a unix stream socket")
    if given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return Inherited(given)
    try:
        return Connected(given)
    except OSError as error:
        given.detach()
        raise UsageError(f"descriptor {descriptor} is a socket that neither listens nor is connected") from error


def _name(given: socket.socket, address: object) -> Path:
    name = address.decode(errors="replace") if isinstance(address, bytes) else str(address)
    return Path(name.replace("\0", "@") or f"descriptor {given.fileno()}")


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise EnvironmentProblem(f"cannot listen on {path}: it exists and is not a socket; remove it or choose another")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)  # left behind by a server that is gone
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass  # its queue is full: somebody listens
    raise EnvironmentProblem(f"cannot listen on {path}: another process does; stop it or choose another path")
