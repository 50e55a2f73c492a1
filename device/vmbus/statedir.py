"""Where large files of running VMs are, and what has to outlive its process: by what is in no package."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from vmbus.cachedir import user_directory
from vmbus.errors import EnvironmentProblem


def state_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """The state directory (an absolute path); it need not exist yet."""
    return user_directory("VMBUS_STATE", "XDG_STATE_HOME", "~/.local/state", environment)


def state_folder(name: str) -> Path:
    """A folder of the state directory: made if need be, 0700, ours. Raises `EnvironmentProblem`."""
    path = state_directory() / name
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot keep anything in {path}: {error.strerror}; VMBUS_STATE names another place"
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise EnvironmentProblem(
            f"{path} must be a directory of user {os.getuid()} that nobody else may enter (mode 0700); "
            "move it away, or let VMBUS_STATE name another place"
        )
    return path
