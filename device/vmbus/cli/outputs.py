"""What a command writes is opened before its work begins: a place that cannot be written is no surprise at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from vmbus.cli.results import TO_STANDARD_OUTPUT
from vmbus.errors import os_error


@contextlib.contextmanager
def output(path: Path | None) -> Iterator[Callable[[bytes], None]]:
    """Gives out what writes the file `path` in the end, in place of what was in it. None, or standard output: nothing
    is written.

    Until then an existing file keeps its content; a new one is gone again if nothing was written. Raises
    EnvironmentProblem at once for a file that cannot be written.
    """
    if path is None or path == TO_STANDARD_OUTPUT:
        yield lambda _: None
        return
    existed = path.exists()
    with os_error(f"cannot write {path}"):
        file = path.open("ab")
    written = False

    def write(data: bytes) -> None:
        nonlocal written
        with os_error(f"cannot write {path}"):
            if path.is_file():
                file.truncate(0)
            file.write(data)
            file.flush()
        written = True

    try:
        yield write
    finally:
        with contextlib.suppress(OSError):
            file.close()
        if not written and not existed:
            path.unlink(missing_ok=True)
