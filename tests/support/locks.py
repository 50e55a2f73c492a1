"""Who holds locks of files, as the kernel has it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from struct import Struct

_GET = 36  # F_OFD_GETLK
_FLOCK = Struct("@hhqqi4x")  # type, whence, start, length (0: to the end), process


def in_use(path: Path) -> bool:
    """Whether anybody, this process included, has locked any part of a file."""
    with path.open("rb") as file:
        answer = fcntl.fcntl(file, _GET, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
