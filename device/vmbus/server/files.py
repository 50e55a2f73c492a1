"""Outside files of providers that belong to a snapshot: copied into it at a save, shown to the provider at a restore.

In the snapshot a file is called `file.PROVIDER.NAME`, which names it without listing it anywhere else. The copy shares
its blocks with the original where the file system can do that, and keeps its holes where it cannot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from vmbus.errors import UsageError, os_error
from vmbus.providers import Provider
from vmbus.util.copying import copy_file

PREFIX = "file."
"""What names of such files in a snapshot begin with."""
FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
"""What a provider may call its file."""


def wanted_files(providers: Sequence[Provider], *, moving: bool = False) -> dict[str, Path]:
    """What is to be copied: name in the snapshot, and where it is now. `moving`: what a live migration would have to
    copy. Raises UsageError for a bad name."""
    wanted: dict[str, Path] = {}
    for provider in providers:
        shared = provider.shared_files() if moving else ()
        for name, path in provider.files().items():
            if name in shared:
                continue
            if FILE_NAME.fullmatch(name) is None:
                raise UsageError(f"provider {provider.name!r} calls a file {name!r}; allowed: {FILE_NAME.pattern}")
            wanted[f"{PREFIX}{provider.name}.{name}"] = path
    return wanted


def copy_files(wanted: Mapping[str, Path], directory: Path) -> dict[str, int]:
    """Copy files into a directory, each under its name and flushed to disk; returns their sizes in bytes.

    Raises EnvironmentProblem; the copies made so far are then removed.
    """
    sizes: dict[str, int] = {}
    done: list[Path] = []
    try:
        for name, source in wanted.items():
            target = directory / name
            with os_error(f"cannot copy {source} into the snapshot"):
                sizes[name] = copy_file(source, target, made=done)
    except BaseException:
        for path in done:
            path.unlink(missing_ok=True)
        raise
    return sizes


def files_of(provider: Provider, directory: Path | None) -> dict[str, Path]:
    """A provider's files in a restored snapshot's directory, by the names that it gave them."""
    if directory is None:
        return {}
    prefix = f"{PREFIX}{provider.name}."
    found = {}
    with os_error(f"cannot read the snapshot's directory {directory}"):
        for path in sorted(directory.iterdir()):
            # A provider may be called as another one is up to a dot: what follows has none.
            name = path.name.removeprefix(prefix)
            if name != path.name and FILE_NAME.fullmatch(name):
                found[name] = path
    return found
