"""Programs that the set-up starts end with it, even if it is killed without a chance to end them."""

from __future__ import annotations

import functools
import shutil
import subprocess


@functools.cache
def mortal() -> tuple[str, ...]:
    """Return the start of a command line whose program is killed by the kernel when its parent dies.

    That is util-linux's setpriv, which every Debian has; empty where it is missing or too old. (A `preexec_fn` would
    do the same, but running Python between fork and exec is unsafe beside the threads that draw the progress.)
    """
    program = shutil.which("setpriv")
    if program is None:
        return ()
    command = (program, "--pdeathsig", "KILL")
    try:
        result = subprocess.run([*command, "true"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return command if result.returncode == 0 else ()
