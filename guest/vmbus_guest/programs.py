"""Programs that the host has the agent run in the guest: started, read to a bound, ended when their time is up."""

# Few imports, as in the agent. ruff: noqa: PTH123

from __future__ import annotations

import os
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MOST_OUTPUT = 64 << 10
"""Bytes of a program's output that the host gets: the first ones. The rest is read, and counted."""
MOST_PROGRAMS = 8
"""Programs at a time."""
MOST_ARGUMENTS = 256

_READ = 64 << 10
_READS = 16  # of one turn, so that a program that prints without end keeps nobody waiting


class Program:
    """One program and all that it starts (a process group), with its output, both streams in one."""

    def __init__(self, identity: int | str, argv: list[str], deadline: float) -> None:
        """Start it. `identity` is the request's. Raises OSError."""
        self.identity = identity
        self.argv = argv
        self.deadline = deadline
        self.expired = False
        self.output, end = os.pipe2(os.O_CLOEXEC)
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.pid = os.posix_spawnp(
                argv[0],
                argv,
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, null, 0),
                    (os.POSIX_SPAWN_DUP2, end, 1),
                    (os.POSIX_SPAWN_DUP2, end, 2),
                ],
                setpgroup=0,
            )
        except BaseException:
            os.close(self.output)
            raise
        finally:
            os.close(end)
            os.close(null)
        os.set_blocking(self.output, False)
        self.pidfd = os.pidfd_open(self.pid)
        self.ended = False  # its output: everybody who had it has closed it
        self._kept = bytearray()
        self._bytes = 0

    def read(self) -> None:
        """Take what it has printed."""
        for _ in range(_READS):
            try:
                data = os.read(self.output, _READ)
            except (BlockingIOError, InterruptedError):
                return
            if not data:
                self.ended = True
                return
            self._bytes += len(data)
            self._kept += data[: MOST_OUTPUT - len(self._kept)]

    def expire(self, now: float) -> None:
        """End it if its time is up."""
        if not self.expired and now >= self.deadline:
            self.expired = True
            self.kill()

    def kill(self) -> None:
        """End it, and what it has started."""
        try:  # noqa: SIM105 (an import less)
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def close(self) -> None:
        """Let go of its descriptors."""
        os.close(self.output)
        os.close(self.pidfd)

    def report(self, status: int) -> dict[str, Any]:
        """What the host is told of its end; `status` as of waitpid. A signal's number is negative in `code`."""
        return {
            "code": os.waitstatus_to_exitcode(status),
            "output": self._kept.decode(errors="replace"),
            "bytes": self._bytes,
            "expired": self.expired,
        }


def deadline(seconds: float) -> float:
    """When a program that may take so long is ended."""
    return time.monotonic() + seconds


def is_argv(value: object) -> bool:
    """Whether this is a program and its arguments."""
    return (
        isinstance(value, list)
        and 1 <= len(value) <= MOST_ARGUMENTS
        and all(isinstance(part, str) and "\0" not in part for part in value)
        and bool(value[0])
    )
