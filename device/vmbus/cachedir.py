"""Where everything is that was downloaded or built: by what is in no package, and must be found by every part."""

import os
from collections.abc import Mapping
from pathlib import Path


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the cache directory (an absolute path); it need not exist yet."""
    explicit = environment.get("VMBUS_CACHE")
    if explicit:
        return Path(explicit).expanduser().absolute()
    base = environment.get("XDG_CACHE_HOME")
    if base and Path(base).is_absolute():  # the XDG specification says that relative values are to be ignored
        return Path(base) / "vmbus-device"
    return Path("~/.cache/vmbus-device").expanduser().absolute()
