"""Starts a program that cannot outlive the process that asked for it.

Run as ``python -I -S launcher.py PARENT_PID PROGRAM ARGUMENT...``: it asks the kernel to kill it when its parent
ends, makes sure that the parent is still there, and becomes PROGRAM. A program of its own, because the same done
between fork and exec inside a threaded Python process could deadlock. It uses the standard library only.

The kernel sends the signal when the *thread* that started the child ends: start children from a thread that lasts.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def tied(argv: Sequence[str]) -> list[str]:
    """The command line that runs `argv` as a child of this process which cannot outlive it."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *argv]


def main(arguments: list[str]) -> None:
    """Ties this process to its parent and becomes the program. Returns only by raising."""
    parent = int(arguments[0])
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended before we asked: no signal would ever come
        sys.exit(1)
    try:
        os.execvp(arguments[1], arguments[1:])
    except OSError as error:
        print(f"cannot start {arguments[1]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main(sys.argv[1:])
