"""Starts a program inside a host: ``python -I -S enter.py INIT_PID PROGRAM ARGUMENT...``.

INIT_PID is the host's first process as seen from outside. This process joins the host's namespaces, starts PROGRAM in a
child (a process namespace is only entered by children) and ends the way the child ends; the child dies with it, and
it dies with its own parent. Standard library only.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import namespaces  # type: ignore[import-not-found]


def main(arguments: list[str]) -> None:
    """Becomes what the module says. Returns only by raising."""
    parent = os.getppid()
    of = Path("/proc") / arguments[0] / "ns"
    directory = str(Path.cwd())
    names = ["user"] if (of / "user").stat().st_ino != Path("/proc/self/ns/user").stat().st_ino else []
    # All are opened before one is joined: afterwards /proc is another one.
    descriptors = {name: os.open(of / name, os.O_RDONLY | os.O_CLOEXEC) for name in [*names, "net", "mnt", "pid"]}
    for name, descriptor in descriptors.items():
        namespaces.enter(descriptor, f"the host's {name} namespace")
    namespaces.die_with_parent()
    if os.getppid() != parent:
        sys.exit(1)
    try:
        os.chdir(directory)
    except OSError:
        os.chdir("/tmp")
    child = namespaces.fork_tied()
    if child == 0:
        try:
            os.execvp(arguments[1], arguments[1:])
        except OSError as error:
            print(f"cannot start {arguments[1]}: {error.strerror}", file=sys.stderr, flush=True)
            os._exit(127)
    # The whole process group gets a signal; we stay until the program has made up its mind.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _, status = os.waitpid(child, 0)
    namespaces.exit_as(status)


if __name__ == "__main__":
    main(sys.argv[1:])
