"""Records as files: their names, and who makes them. Light, since the guest does so at every start of a driver."""

# ruff: noqa: PTH103, PTH118 - pathlib costs boot time in an emulated guest

from __future__ import annotations

import os

from vmbus.errors import EnvironmentProblem
from vmbus.observe.audit.recorder import Recorder
from vmbus.observe.audit.store import GUEST_LIMIT, GUEST_TOTAL, HOST_LIMIT, FileStore

SUFFIX = ".audit"


def make_directory(directory: str | os.PathLike[str]) -> None:
    """A directory for records, its owner's alone if it is new. Raises EnvironmentProblem."""
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"cannot make the directory for audit records {directory}: {error}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise EnvironmentProblem(f"cannot write audit records into {directory}: it is not writable")


def recorder_in(
    directory: str | os.PathLike[str], side: str, name: str, *, limit: int = HOST_LIMIT, grain: int | None = None
) -> Recorder:
    """A recorder with a new file `SIDE-NAME-UID.audit` in `directory`; `side` is "host" or "guest"."""
    uid = os.urandom(16).hex()
    path = os.path.join(os.fspath(directory), f"{side}-{name}-{uid}{SUFFIX}")
    return Recorder(FileStore(path, limit=limit), side=side, name=name, uid=uid, path=path, grain=grain)


def guest_recorder(directory: str, name: str) -> Recorder:
    """A recorder for a process of the guest's. All records of the guest together are bounded: when there is no room
    left for detail, this one is brief from its beginning."""
    make_directory(directory)
    used = sum(entry.stat().st_size for entry in os.scandir(directory))
    recorder = recorder_in(directory, "guest", name, limit=max(0, min(GUEST_LIMIT, GUEST_TOTAL - used)))
    recorder.flush("begun")  # so that there is a record to be asked for
    return recorder
