"""Outside files of providers that belong to a snapshot: copied into it at a save, shown to the provider at a restore.

In the snapshot a file is called `file.PROVIDER.NAME`, which names it without listing it anywhere else. The copy shares
its blocks with the original where the file system can do that, and keeps its holes where it cannot.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from vmbus.copying import copy_content
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.providers import Provider
from vmbus.snapshot.manifest import FILE_PREFIX as PREFIX

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
            try:
                sizes[name] = copy_file(source, target, made=done)
            except OSError as error:
                raise EnvironmentProblem(f"cannot copy {source} into the snapshot: {error.strerror}") from error
    except BaseException:
        for path in done:
            path.unlink(missing_ok=True)
        raise
    return sizes


def copy_file(source: Path, target: Path, *, made: list[Path] | None = None) -> int:
    """Copy a file (or a block device) to a new file of its owner alone, flushed to disk; returns its size in bytes.

    `made` gets the target once it exists. Raises OSError, also when the target is there already.
    """
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        if made is not None:
            made.append(target)
        try:
            size = copy_content(fd, out)
        finally:
            os.close(out)
    finally:
        os.close(fd)
    return size


def files_of(provider: Provider, directory: Path | None) -> dict[str, Path]:
    """A provider's files in a restored snapshot's directory, by the names that it gave them."""
    if directory is None:
        return {}
    prefix = f"{PREFIX}{provider.name}."
    found = {}
    try:
        for path in sorted(directory.iterdir()):
            # A provider may be called as another one is up to a dot: what follows has none.
            name = path.name.removeprefix(prefix)
            if name != path.name and FILE_NAME.fullmatch(name):
                found[name] = path
    except OSError as error:
        raise EnvironmentProblem(f"cannot read the snapshot's directory {directory}: {error.strerror}") from error
    return found
