"""Asking the process that owns a VM: what a command for a running VM does. `vmbus.cli.supervisor` answers.

Kept light: these commands load no more than it takes to ask.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import msgspec

from vmbus.cli.results import Failure
from vmbus.errors import EnvironmentProblem, ReportedError, UsageError, WaitTimeout
from vmbus.vm.run_directory import running_vms, runtime_base
from vmbus.vm.sockets import Sockets

LINE_LIMIT = 8 << 20
NAME_FIRST = "give the NAME of one first"
"""How a VM is chosen where it has no option of its own."""


class Answer(msgspec.Struct):
    """A line of an answer: one of these."""

    progress: str | None = None
    result: dict[str, Any] | None = None
    error: Failure | None = None


class Status(msgspec.Struct, kw_only=True):
    """What is to be said of a running VM. Without an answer of its owner, `state` says why, and the rest is empty."""

    name: str
    state: str
    """``running``, ``paused``, ``in doubt`` (its migration's outcome has to be decided); ``starting``, ``silent``."""
    since: float | None = None
    """When its owner began to serve it, in seconds since 1970."""
    pid: int | None = None
    """Of the owner, where it runs."""
    device: str = ""
    """The kinds of its devices' providers."""
    providers: list[str] = []
    """Their names, by which `provider` knows them."""
    accelerator: str = ""
    qemu: str = ""
    """Its version."""
    detached: bool = False
    log: str | None = None
    """The log of a detached owner."""


def decode_answer(line: bytes) -> Answer:
    """What the owner of a VM says in a line. Raises `EnvironmentProblem`."""
    try:
        answer = msgspec.json.decode(line, type=Answer)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise EnvironmentProblem(f"what the VM's owner says cannot be understood: {error}") from error
    if answer.progress is None and answer.result is None and answer.error is None:
        raise EnvironmentProblem(f"what the VM's owner says cannot be understood: {line[:200]!r}")
    return answer


def find_vm(name: str | None, how: str = "choose one with --vm NAME") -> str:
    """The name of the running VM that is meant: `name`, or the only one there is.

    Raises `UsageError` that lists what runs, and says `how` one is chosen.
    """
    names = running_vms()
    if name is not None:
        if name not in names:
            raise UsageError(f"no VM {name!r} is running; running: {', '.join(names) or 'none'}")
        return name
    if len(names) != 1:
        if names:
            raise UsageError(f"several VMs are running ({', '.join(names)}): {how}")
        raise UsageError("no VM is running; scripts/run-vm starts one")
    return names[0]


async def ask(
    name: str,
    command: str,
    arguments: dict[str, Any] | None = None,
    *,
    timeout: float,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Asks the owner of VM `name` for something and returns the result.

    Raises `ReportedError` as the owner had it if it fails, `EnvironmentProblem` if the owner is gone, `WaitTimeout`.
    """
    path = Sockets(runtime_base() / name).supervisor
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_unix_connection(str(path), limit=LINE_LIMIT)
            try:
                writer.write(json.dumps({"command": command, "arguments": arguments or {}}).encode() + b"\n")
                while line := await reader.readline():
                    answer = decode_answer(line)
                    if (error := answer.error) is not None:
                        raise ReportedError(error.message, error.kind, error.code, error.status)
                    if answer.result is not None:
                        return answer.result
                    if progress is not None and answer.progress is not None:
                        progress(answer.progress)
            finally:
                writer.close()
    except TimeoutError:
        raise WaitTimeout(f"VM {name!r} to perform {command!r}", timeout) from None
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"cannot talk to the owner of VM {name!r}: {error}") from error
    raise EnvironmentProblem(f"the owner of VM {name!r} went away before it answered {command!r}")
