"""The host's ends of connections: unix sockets, by the convention of Firecracker and Cloud Hypervisor.

One socket is ours: a program of the host's connects to it, says `CONNECT <port>` and a newline, and gets `OK <port>`
and a newline when a program in the guest has taken the connection (the port is the one that the guest sees at the other
end). The other way round a program of the host's listens on a socket of its own, whose path is that of ours with `_`
and the port behind it.

All sockets are their owner's alone, and so is whom they talk to: a listener of another user's is not connected to.
"""

import errno
import os
import re
import select
import socket
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from struct import Struct

from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.wire.hvsock import MAX_PORT

SOCKET_PATH_LIMIT = 107
"""Bytes that a unix socket's path may have."""
LINE_LIMIT = 32
"""Bytes of the line that a program of the host's begins with."""
BACKLOG = 128
_VECTOR = 64  # buffers in one call
_KIND = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC

_CONNECT = re.compile(rb"CONNECT (\d{1,10})")
_UCRED = Struct("iii")


class Stream:
    """One connected unix socket, non-blocking. `fd`: to be watched. Nothing here raises for what the other end does."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected
        self.fd = connected.fileno()

    def read(self, size: int) -> bytes | None:
        """At most `size` bytes; none: the stream has ended. None: nothing is there now."""
        try:
            return self._socket.recv(size)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            return b""

    def write(self, pieces: Sequence[bytes]) -> int | None:
        """Send what goes without waiting; how many bytes. None: nobody is there who would read it."""
        try:
            return self._socket.sendmsg(pieces[:_VECTOR], (), socket.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return 0
            return None

    def end_writing(self) -> None:
        """The other end is told that nothing more comes."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    @property
    def hung_up(self) -> bool:
        """Whether the program at the other end has closed it, and not only ended its own sending."""
        poller = select.poll()
        poller.register(self.fd, 0)
        return any(events & (select.POLLHUP | select.POLLERR) for _, events in poller.poll(0))

    def close(self) -> None:
        """Let go of it."""
        self._socket.close()


def parse_line(line: bytes) -> int | None:
    """The port in a CONNECT line (without its end), None if it is none."""
    found = _CONNECT.fullmatch(line.removesuffix(b"\r"))
    port = int(found[1]) if found is not None else MAX_PORT + 1
    return port if port <= MAX_PORT else None


def check_path(path: Path) -> None:
    """Raises UsageError for a socket's path that has no room for a port behind it."""
    longest = len(os.fsencode(path)) + 1 + len(str(MAX_PORT))
    if longest > SOCKET_PATH_LIMIT:
        raise UsageError(
            f"the socket {path} and a port behind it would have {longest} bytes; a socket's path may have "
            f"{SOCKET_PATH_LIMIT}: choose a shorter `path`, or a shorter XDG_RUNTIME_DIR"
        )


def listener_path(path: Path, port: int) -> Path:
    """Where a program of the host's listens on `port`."""
    return path.with_name(f"{path.name}_{port}")


def connect(path: Path, port: int) -> Stream | None:
    """To the program of the host's that listens on `port`; None: there is none. Does not wait."""
    try:
        end = socket.socket(socket.AF_UNIX, _KIND)
    except OSError:  # no descriptor is left
        return None
    try:
        end.connect(os.fsencode(listener_path(path, port)))
        _, uid, _ = _UCRED.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid in (os.geteuid(), 0):
            return Stream(end)
    except OSError:
        pass
    end.close()
    return None


class Listener:
    """Our socket, for programs of the host's. `fd`: to be watched for them."""

    def __init__(self, path: Path) -> None:
        """Make it. A socket that is left of a process which is gone is replaced. Raises EnvironmentProblem."""
        self.path = path
        try:
            self._socket = socket.socket(socket.AF_UNIX, _KIND)
        except OSError as error:
            raise EnvironmentProblem(f"cannot make a socket: {error.strerror}") from error
        self.fd = self._socket.fileno()
        try:
            _remove_left_over(path)
            os.fchmod(self.fd, 0o600)  # before it has a name: so it is never anybody else's
            self._socket.bind(os.fsencode(path))
            self._file = _identity(path)
            self._socket.listen(BACKLOG)
        except OSError as error:
            self._socket.close()
            raise EnvironmentProblem(f"cannot make the socket {path}: {error.strerror}") from error

    def accept(self) -> Stream | None:
        """The next program, None if there is none now. Raises OSError when no descriptor is left."""
        try:
            end, _ = self._socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return None
        return Stream(end)

    def close(self) -> None:
        """Take it away; not what somebody else has put in its place."""
        self._socket.close()
        with suppress(OSError):
            if _identity(self.path) == self._file:
                self.path.unlink()


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino


def _remove_left_over(path: Path) -> None:
    """Raises OSError when the path is somebody's."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "something else has that name")
    with socket.socket(socket.AF_UNIX, _KIND) as probe:
        try:
            probe.connect(os.fsencode(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(errno.EADDRINUSE, "another process listens there")
