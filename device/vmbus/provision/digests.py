"""Whether a folder of the cache is what it was when it was made: its files' digests, in a file beside them.

A damaged kernel may well boot. So what a VM is started with is compared each time, and what it is made of when it is.
Standard library only.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

RECORD = "digests.json"


def write_digests(folder: Path) -> None:
    """Notes the digests of all files in a folder that is complete. Raises OSError."""
    (folder / RECORD).write_text(json.dumps(_digests(folder), indent=1, sort_keys=True) + "\n")


def damaged(folder: Path) -> str:
    """The name of a file that differs from what was noted or is missing; empty if none does, or nothing was noted."""
    try:
        noted = json.loads((folder / RECORD).read_bytes())
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, RecursionError):
        return RECORD
    if not isinstance(noted, dict):
        return RECORD
    try:
        found = _digests(folder)
    except OSError as error:
        return Path(error.filename).name
    return next((name for name in sorted({*noted, *found}) if noted.get(name) != found.get(name)), "")


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.name != RECORD:
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
