"""The native core: rings and packets in C, in this folder. Finding and loading it; see docs/native-core.md.

`VMBUS_CORE` is `native`, `pure`, or not set: then it is the native one where it can be loaded. Which one runs in this
process is decided in `vmbus.native.choice`; here is what set-up needs, too.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from vmbus.errors import EnvironmentProblem
from vmbus.native import build
from vmbus.util.directories import cache_directory

SETTING = "VMBUS_CORE"
_NAME = "vmbus.native._core"


def wanted(setting: str | None = None) -> str:
    """`native`, `pure`, or `` (native if possible). Raises EnvironmentProblem for any other setting."""
    value = (os.environ.get(SETTING, "") if setting is None else setting).strip()
    if value not in ("", "native", "pure"):
        raise EnvironmentProblem(f"{SETTING} is {value!r}: set it to native or pure, or unset it for what there is")
    return value


def find(cache: Path | None = None) -> Path | None:
    """The file of the native core for these sources: beside this one (the wheel, the guest's image) or in the cache,
    where set-up puts it (`vmbus.provision.native`). None: it was not built."""
    beside = Path(__file__).with_name(build.FILE_NAME)
    if beside.exists():
        return beside
    built = (cache or cache_directory()) / "native" / build.key() / build.FILE_NAME
    return built if built.exists() else None


def load(path: Path | None = None) -> ModuleType:
    """The native core, whatever the setting; a process has one, so `path` counts the first time. Raises ImportError."""
    known = sys.modules.get(_NAME)
    if known is not None:
        return known
    path = path or find()
    if path is None:
        raise ImportError("it was not built for these sources")
    loader = importlib.machinery.ExtensionFileLoader(_NAME, str(path))
    spec = importlib.util.spec_from_file_location(_NAME, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[_NAME] = module
    return module
