"""The native core: rings and packets in C, in this folder; see docs/native-core.md.

`VMBUS_CORE` is `native`, `pure`, or not set: then it is the native one where it can be loaded. Which one runs in this
process is decided in `vmbus.native.choice`; here is what set-up needs, too.
"""

from __future__ import annotations

import os
from pathlib import Path

from vmbus.errors import EnvironmentProblem
from vmbus.native import build

SETTING = "VMBUS_CORE"


def wanted(setting: str | None = None) -> str:
    """`native`, `pure`, or `` (native if possible). Raises EnvironmentProblem for any other setting."""
    value = (os.environ.get(SETTING, "") if setting is None else setting).strip()
    if value not in ("", "native", "pure"):
        raise EnvironmentProblem(f"{SETTING} is {value!r}: set it to native or pure, or unset it for what there is")
    return value


def find(cache: Path | None) -> Path | None:
    """The file of the native core for these sources: beside this one (the wheel, the guest's image) or in the cache,
    where set-up puts it (`vmbus.provision.native`). None: it was not built."""
    places = [Path(__file__).parent, *([] if cache is None else [cache / "native" / build.key()])]
    return next((file for place in places if (file := place / build.FILE_NAME).exists()), None)
