"""Sockets that systemd hands to a service which it starts: descriptors from 3 on, named in the environment."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from vmbus.errors import UsageError

FIRST = 3
_ENOUGH = 16  # a service of ours has two
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def handed_over(environment: MutableMapping[str, str] = os.environ) -> dict[str, int]:
    """The descriptors that this process was started with, by their names (`FileDescriptorName=` of a socket unit;
    ``unknown``, and numbers behind it, for those without). Empty if there are none, or they are for another process.

    The variables are removed: children have no use for them. Raises UsageError for variables that make no sense.
    """
    pid, count, names = (environment.pop(name, "") for name in _VARIABLES)
    if not pid or not count:
        return {}
    try:
        for_us, many = int(pid) == os.getpid(), int(count)
    except ValueError:
        raise UsageError(f"LISTEN_PID is {pid!r} and LISTEN_FDS {count!r}: both should be numbers") from None
    if not for_us:
        return {}
    if not 0 <= many <= _ENOUGH:
        raise UsageError(f"LISTEN_FDS is {many}: more than {_ENOUGH} sockets are none of this program's")
    found: dict[str, int] = {}
    given = names.split(":") if names else []
    for index in range(many):
        name = given[index] if index < len(given) and given[index] else "unknown"
        found[name if name not in found else f"{name}-{index}"] = FIRST + index
    return found
