"""Where things are that come with the project and are no modules, and how its commands are called: in a checkout, and
where the package was installed without one.

Standard library only.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parents[1]

IN_CHECKOUT = (_CHECKOUT / "scripts" / "_run").is_file() and _PACKAGE == _CHECKOUT / "device" / "vmbus"
"""Whether this is a checkout: then its scripts are there."""

CHECKOUT = _CHECKOUT if IN_CHECKOUT else None
"""The checkout's folder, if this is one."""

DESCRIPTIONS = _CHECKOUT / "qemu_configs" if IN_CHECKOUT else _PACKAGE / "descriptions"
"""The VM descriptions that come with the project."""

MEASUREMENTS = _CHECKOUT / "bench" if IN_CHECKOUT else _PACKAGE.parent
"""What holds the package of the benchmark's measurements."""

_SCRIPT = re.compile(r"(?<![\w/.-])scripts/(?:(_run -m )|([a-z][a-z-]*)(?![\w/-]|\.\w))")
_OUTSIDE = {"test": "pytest"}


def import_path() -> str:
    """`PYTHONPATH` for another process of this very code: what there is, behind the folder that has it."""
    return os.pathsep.join(filter(None, [str(_PACKAGE.parent), os.environ.get("PYTHONPATH")]))


def command(name: str) -> str:
    """How the command `name` is called here."""
    return spelled(f"scripts/{name}")


def spelled(text: str) -> str:
    """A text for people with its commands called as they are here: `scripts/save` in a checkout, else `vmbus save`."""
    if IN_CHECKOUT:
        return text
    return _SCRIPT.sub(lambda found: "python -m " if found[1] else _OUTSIDE.get(found[2], f"vmbus {found[2]}"), text)
