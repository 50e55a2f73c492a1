"""Files that go over a link in chunks: announced with size and digest, checked at the end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from io import BufferedWriter
from pathlib import Path

from vmbus.errors import StateError, os_error
from vmbus.operations.migration.link import Link
from vmbus.operations.migration.messages import CHUNK, Chunk
from vmbus.snapshot.manifest import FileRecord
from vmbus.util.interruptible import NEVER, Stop, sha256

CHUNK_TIMEOUT = 60.0
"""Seconds that one chunk may take."""


def record_of(path: Path, stop: Stop = NEVER) -> FileRecord:
    """Size and digest of a file. Raises `EnvironmentProblem` if it cannot be read."""
    with os_error(f"cannot read {path}"), path.open("rb") as file:
        digest = sha256(file, stop)
        return FileRecord(file.tell(), digest)


async def send_file(link: Link, path: Path) -> None:
    """Sends a file's bytes. Raises `LinkLost`, and `EnvironmentProblem` if the file cannot be read."""
    with os_error(f"cannot read {path}"), path.open("rb") as file:
        while data := await asyncio.to_thread(file.read, CHUNK):
            await link.send(Chunk(data=data))


async def receive_file(link: Link, record: FileRecord, path: Path) -> None:
    """Receives the announced file into `path` (new, 0600).

    Raises `StateError` if it is not the announced one, `EnvironmentProblem` if it cannot be written, and what
    `Link.expect` raises; nothing is left at `path` then.
    """
    with os_error(f"cannot write {path}"):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with contextlib.ExitStack() as undo, os.fdopen(descriptor, "wb") as file:
            undo.callback(path.unlink, missing_ok=True)
            await _receive(link, record, path.name, file)
            undo.pop_all()


async def _receive(link: Link, record: FileRecord, name: str, file: BufferedWriter) -> None:
    digest = hashlib.sha256()
    left = record.size
    while left:
        chunk = await link.expect(Chunk, timeout=CHUNK_TIMEOUT, what=f"the next bytes of {name}")
        if not 0 < len(chunk.data) <= left:
            raise StateError(f"{link.name} sends {len(chunk.data)} bytes of {name}; {left} are to come")
        left -= len(chunk.data)
        digest.update(chunk.data)
        await asyncio.to_thread(file.write, chunk.data)
    await asyncio.to_thread(file.flush)
    if digest.hexdigest() != record.sha256:
        raise StateError(f"{name} from {link.name} is not the announced file: its digest differs")
