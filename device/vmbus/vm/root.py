"""The disk with a guest's root file system: a copy of the Debian that the set-up makes, the VM's own from then on."""

from __future__ import annotations

import fcntl
import functools
import os
import re
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from vmbus.errors import EnvironmentProblem, os_error
from vmbus.providers.disk.image import image_path
from vmbus.util.copying import copy_content, sync_directory
from vmbus.util.interruptible import NEVER, Stop, in_thread
from vmbus.util.lockfile import held
from vmbus.vm.description import VmDescription

_COPY = re.compile(r"[a-z0-9_]{8}")  # what mkstemp() makes of a name
_ABANDONED_AGE = 60.0  # seconds after which a copy that nobody holds locked is taken for abandoned


def missing_root(description: VmDescription) -> Path | None:
    """Where the image with the guest's root file system has to be made; None: it is there, or none is wanted."""
    if not description.guest.root:
        return None
    path = image_path(description.guest.root)
    return None if path.exists() else path


async def prepare_root(description: VmDescription, template: Path | None) -> None:
    """Make the image with the guest's root file system if it is wanted and not there, by copying `template`.

    Raises EnvironmentProblem.
    """
    path = missing_root(description)
    if path is None:
        return
    if template is None:
        raise EnvironmentProblem(
            f"there is no disk image {path} with the guest's root file system, and no Debian to copy: "
            "run scripts/setup --debian"
        )
    with os_error(f"cannot make the disk image {path}"):
        await in_thread(functools.partial(copy_image, template, path))


def copy_image(template: Path, path: Path, stop: Stop = NEVER) -> None:
    """Copy an image, which appears whole, and only if nobody else has put one there by then; what killed copies have
    left is removed. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*"):
        with suppress(OSError):
            ours = _COPY.fullmatch(left.name.removeprefix(f".{path.name}."))
            if ours and time.time() - left.lstat().st_mtime > _ABANDONED_AGE and not held(left):
                left.unlink()
    source = os.open(template, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # its owner's alone
        try:
            fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
            copy_content(source, target, stop)
            with suppress(FileExistsError):
                Path(path).hardlink_to(name)
        finally:
            os.close(target)
            Path(name).unlink()
    finally:
        os.close(source)
    sync_directory(path.parent)
