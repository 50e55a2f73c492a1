"""The guest's test driver `disk-writer`, as tests of disks use it: it knows what it wrote, what was acknowledged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import pace
from support.boot import boot
from vmbus.errors import WaitTimeout
from vmbus.operations.machine import VirtualMachine
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription

ENDLESS = {"count": 0, "slots": 400, "batch": 16, "verify_every": 10}


async def writing(
    description: VmDescription, programs: Programs, *, audit: Path | None = None, **parameters: Any
) -> tuple[VirtualMachine, int]:
    """A VM whose writer has begun."""
    vm = await boot(description, programs, records=audit)
    try:
        await vm.wait_ready()
        job = int((await vm.call_agent("start", driver="disk-writer", parameters=ENDLESS | parameters))["job"])
        await until_acknowledged(vm, job, 100)
    except BaseException:
        await vm.kill()
        raise
    return vm, job


async def until_acknowledged(vm: VirtualMachine, job: int, count: int, seconds: float = 60.0) -> int:
    """Wait until so many writes were acknowledged; returns how many."""
    seconds = pace.seconds(seconds)
    deadline = time.monotonic() + seconds
    while True:
        report = await vm.call_agent("poll", job=job)
        progress = report["progress"] or {"acknowledged": 0, "wrong": 0}
        if report["state"] != "running" or progress["wrong"]:
            raise AssertionError(f"the writer: {report}")
        if progress["acknowledged"] >= count:
            return int(progress["acknowledged"])
        if time.monotonic() > deadline:
            raise WaitTimeout(f"{count} acknowledged writes; {report}", seconds)
        await asyncio.sleep(0.02)


async def more(vm: VirtualMachine, job: int, count: int = 100) -> int:
    """So many more acknowledged writes."""
    return await until_acknowledged(vm, job, await until_acknowledged(vm, job, 0) + count)


async def finish(vm: VirtualMachine, job: int) -> dict[str, Any]:
    """Stop the writer: it reads everything again, unmounts, and has the file system checked."""
    await vm.call_agent("stop", job=job)
    report = await vm.call_agent("wait", job=job, timeout=90.0)
    assert report["state"] == "finished", report
    return dict(report["result"])


def clean(
    result: dict[str, Any],
    at_least: int = 0,
    known: Sequence[str] = ("fua", "discard_max_bytes", "write_zeroes_max_bytes"),
) -> None:
    """Nothing was lost, and the guest's kernel knows all of `known` that the disk can do."""
    print(f"the writer: {result}")
    assert result["verdict"] == "passed" and result["wrong"] == 0, result
    assert result["acknowledged"] >= at_least
    assert "files" in result["fsck"] and "blocks" in result["fsck"]
    assert all(result["queue"][name] for name in known), "the kernel does not know all that the disk can do"
