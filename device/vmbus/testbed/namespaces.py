"""System calls for namespaces that Python (3.11) lacks. Standard library only: `enter` runs without any other path.

Every function raises OSError that names the call and what it was for.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int, what: str) -> None:
    """New namespaces for this process (a process namespace: for its children)."""
    _check(_libc.unshare(ctypes.c_int(flags)), f"new {what}")


def enter(descriptor: int, what: str) -> None:
    """Joins the namespace that `descriptor` (an open /proc/PID/ns/...) stands for."""
    _check(_libc.setns(ctypes.c_int(descriptor), ctypes.c_int(0)), f"join {what}")


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    arguments = (source.encode(), target.encode(), kind.encode(), flags, data.encode())
    _check(_libc.mount(*arguments), f"mount {kind or source} on {target}")


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent ends. A change of credentials undoes it: ask again then."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def stay_visible() -> None:
    """Lets our user look at this process's namespaces and files after it entered a user namespace."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl(PR_SET_DUMPABLE)")


def fork_tied() -> int:
    """fork(2), with a child that dies with its parent; also across a process namespace, where it cannot see it."""
    watch = os.pidfd_open(os.getpid())
    try:
        child = os.fork()
        if child == 0:
            die_with_parent()
            if select.select([watch], [], [], 0)[0]:  # it ended before we asked: no signal would ever come
                os._exit(1)
        return child
    finally:
        os.close(watch)


def exit_as(status: int) -> None:
    """Ends this process the way a child ended whose wait status this is."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 1)
