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
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from struct import Struct

from vmbus.errors import UsageError
from vmbus.util.listening import LONGEST_PATH
from vmbus.wire.hvsock import MAX_PORT

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
        self._socket.close()


def parse_line(line: bytes) -> int | None:
    """The port in a CONNECT line (without its end), None if it is none."""
    found = _CONNECT.fullmatch(line.removesuffix(b"\r"))
    port = int(found[1]) if found is not None else MAX_PORT + 1
    return port if port <= MAX_PORT else None


def check_path(path: Path) -> None:
    """Raises UsageError for a socket's path that has no room for a port behind it."""
    longest = len(os.fsencode(path)) + 1 + len(str(MAX_PORT))
    if longest > LONGEST_PATH:
        raise UsageError(
            f"the socket {path} and a port behind it would have {longest} bytes; a socket's path may have "
            f"{LONGEST_PATH}: choose a shorter `path`, or a shorter XDG_RUNTIME_DIR"
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
