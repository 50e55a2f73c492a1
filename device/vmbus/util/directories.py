"""The directories of a user's: what was downloaded or built, and the large files of VMs and what outlives its process.

Standard library only: this is read before anything is set up.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from vmbus.errors import EnvironmentProblem


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the cache directory (an absolute path); it need not exist yet."""
    return user_directory("VMBUS_CACHE", "XDG_CACHE_HOME", "~/.cache", environment)


def user_directory(setting: str, base_setting: str, usual_base: str, environment: Mapping[str, str]) -> Path:
    """Where one of our directories is, by a setting of ours or of XDG's, or by custom (an absolute path)."""
    explicit = environment.get(setting)
    if explicit:
        return Path(explicit).expanduser().absolute()
    base = environment.get(base_setting)
    if base and Path(base).is_absolute():  # the XDG specification says that relative values are to be ignored
        return Path(base) / "vmbus-device"
    return Path(usual_base).expanduser().absolute() / "vmbus-device"


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
