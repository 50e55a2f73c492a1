"""Fetching the guest's audit records, so that they can be checked against the server's (docs/audit.md).

The guest's records lie in its memory, as files of its agent's. They are fetched between two flushes of the server's own
record: what the server had taken before the first was put by then, what the guest has taken is in the second.
"""

from __future__ import annotations

import asyncio
import base64
import os
import secrets
import time
from pathlib import Path
from typing import Any, Protocol

import msgspec

from vmbus.errors import StateError, UsageError
from vmbus.observe.audit import format as f
from vmbus.observe.audit.files import SUFFIX, make_directory
from vmbus.qemu.agent import convert

FLUSH_SECONDS = 10.0
"""How long test drivers have to write what they have recorded; one that does not is fetched as it is."""
_RETRY = 0.05
_LARGEST = 1 << 30


class Collectable(Protocol):
    """What is needed of `vmbus.qemu.instance.Instance`. `audit`: the directory for its records, if it keeps any."""

    audit: Path | None

    @property
    def name(self) -> str: ...
    async def call_agent(self, command: str, /, *, timeout: float = ..., **arguments: Any) -> dict[str, Any]: ...
    async def call_servers(self, command: str) -> list[dict[str, Any]]: ...


async def collect_audit(vm: Collectable, directory: Path | None = None, *, timeout: float = 60.0) -> list[Path]:
    """Fetch all records that the guest has into the VM's directory for them (or another), and flush the servers';
    returns the fetched files, each record once for each device of the VM: which one it is of is in the record.

    A record that is fetched again replaces what was fetched from it under the same servers. The guest must be running.
    Raises UsageError when the VM's server does not record, StateError for a record that cannot be one, and what the
    agent's and the server's calls raise.
    """
    directory = directory or vm.audit
    if directory is None:
        raise UsageError(f"VM {vm.name!r} keeps no audit records: start it with an audit directory")
    before = await vm.call_servers("audit")
    if not all(one.get("on") for one in before):
        raise UsageError("this VM does not keep audit records: start it with an audit directory")
    make_directory(directory)
    records = await _flushed(vm, timeout)
    files = []
    for record in records:
        data = await _read(vm, record.name, timeout)
        files += [_write(directory, record.name, data, str(one["uid"]), int(one["position"])) for one in before]
    await vm.call_servers("audit")
    return files


class _Record(msgspec.Struct):
    name: str
    flushed: bool
    running: bool


class _Records(msgspec.Struct):
    records: list[_Record] = []


async def _flushed(vm: Collectable, timeout: float) -> list[_Record]:
    token = secrets.token_hex(8)
    deadline = time.monotonic() + FLUSH_SECONDS
    while True:
        answer = await vm.call_agent("audit", timeout=timeout, token=token)
        records = convert(answer, _Records, "audit").records
        if all(one.flushed or not one.running for one in records) or time.monotonic() > deadline:
            return records
        await asyncio.sleep(_RETRY)


async def _read(vm: Collectable, name: str, timeout: float) -> bytes:
    data = bytearray()
    while True:
        answer = await vm.call_agent("audit-read", timeout=timeout, name=name, offset=len(data))
        try:
            piece = base64.b64decode(answer["data"], validate=True)
        except (KeyError, ValueError, TypeError) as error:
            raise StateError(f"the guest's agent sent no piece of its audit record {name}: {error!r}") from error
        if not piece:
            return bytes(data)
        data += piece
        if len(data) > _LARGEST:
            raise StateError(f"the guest's audit record {name} has more than {_LARGEST} bytes")


def _write(directory: Path, name: str, data: bytes, uid: str, position: int) -> Path:
    safe = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name.removesuffix(SUFFIX))
    path = directory / f"{safe[:120]}@{uid[:8]}{SUFFIX}"
    mark = f.frame_json(f.COLLECTED, 0, {"uid": uid, "position": position})
    partial = path.with_suffix(".partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data[: f.HEAD.size] + mark + data[f.HEAD.size :])
    partial.replace(path)
    return path
