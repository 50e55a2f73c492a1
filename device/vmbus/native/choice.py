"""Which core runs in this process: the native one, or its pure twin (`vmbus.ring_pure`, `vmbus.wire.packet`)."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from vmbus.errors import EnvironmentProblem
from vmbus.native import SETTING, find, wanted

_NAME = "vmbus.native._core"


def load(file: Path | None = None) -> ModuleType:
    """The native core, whatever the setting; a process has one, so `file` counts the first time. Raises ImportError."""
    known = sys.modules.get(_NAME)
    if known is not None:
        return known
    file = file or find(_cache())
    if file is None:
        raise ImportError("it was not built for these sources")
    loader = importlib.machinery.ExtensionFileLoader(_NAME, str(file))
    spec = importlib.util.spec_from_file_location(_NAME, file, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[_NAME] = module
    return module


def _cache() -> Path | None:
    try:
        from vmbus.provision.cache import cache_directory
    except ImportError:  # the guest has no set-up
        return None
    return cache_directory()


def _choose() -> tuple[ModuleType | None, str]:
    setting = wanted()
    if setting == "pure":
        return None, f"{SETTING} is pure"
    try:
        return load(), ""
    except ImportError as error:
        if setting == "native":
            raise EnvironmentProblem(
                f"{SETTING} is native and the native core cannot be loaded: {error}; run scripts/setup, or unset it"
            ) from None
        return None, str(error)


core, _why_pure = _choose()
"""The native core, or None: the pure twin runs."""

CORE = "native" if core is not None else f"pure ({_why_pure})"
"""For people: which one it is, and why it is the pure one."""
