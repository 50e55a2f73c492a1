"""Where everything is that was downloaded or built: by what is in no package, and must be found by every part."""

import os
from collections.abc import Mapping
from pathlib import Path


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
