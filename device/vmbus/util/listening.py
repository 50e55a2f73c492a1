"""Listening Unix sockets that are their owner's alone."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

from vmbus.errors import EnvironmentProblem

LONGEST_PATH = 107
"""Bytes of a socket's path, without the NUL."""


class Listener:
    """A listening Unix socket that only its owner can connect to.

    A socket file that nobody listens on is replaced; what somebody else has put in its place is left alone at the end.
    """

    def __init__(self, path: Path, *, backlog: int = 4, make_directory: bool = False) -> None:
        """`make_directory`: with mode 0700, if it is missing. Raises EnvironmentProblem if the path is too long, taken
        by a live process or by something else, or not writable."""
        self.path = path
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
