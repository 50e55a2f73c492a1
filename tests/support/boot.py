"""Guests for tests, booted and at work: by default every one is saved and restored once, right after its boot.

So whatever a VM test is about, it is about a VM that has been through a save and a restore, in other processes than
those that booted it. A guest that has nothing outside of itself is booted once in a run, and comes from that snapshot
from then on. A test that must not have this calls `VirtualMachine.launch` itself, and says why in a comment of the form
`as booted: REASON` on the same line (tests/unit/test_vm_boot.py looks for it).
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import msgspec

from vmbus.operations.machine import VirtualMachine
from vmbus.testkit.story import Figures, Story, audit, begun, finish, until_in_flight
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription

seconds: list[float] = []
"""What each save and restore has taken, for the summary of a test run."""
_ALONE = {"echo", "burst"}
"""Kinds of providers that have nothing of the host's."""
_booted: dict[bytes, Path] = {}
"""Snapshots of guests that have just booted. They go with the run's directory for temporary files."""


class Taken:
    """A snapshot of a VM in mid-traffic, and the guest's job that goes on in it."""

    STORY = Story(packets=256, echo_count=8_000, burst_count=14_000, stall_seconds=8.0)

    def __init__(self, directory: Path, job: int) -> None:
        self.directory = directory
        self.job = job


async def boot(description: VmDescription, programs: Programs, *, records: Path | None = None) -> VirtualMachine:
    """A VM whose guest's agent answers, saved live and restored since. Raises what these raise."""
    key = msgspec.json.encode((description, programs), enc_hook=str)
    start = time.monotonic()
    snapshot = _booted.get(key) if records is None else None
    if snapshot is None:
        snapshot = Path(tempfile.mkdtemp(prefix="vmbus-boot-")) / "booted"
        async with await VirtualMachine.launch(description, programs, audit=records) as vm:
            await vm.wait_ready()
            start = time.monotonic()
            await vm.save(snapshot, live=True)
    vm = await VirtualMachine.restore(snapshot, programs, audit=records)
    try:
        await vm.wait_ready()
    except BaseException:
        await vm.kill()
        raise
    vm.programs = programs  # the same files as those in the snapshot, which may go
    if records is None and {one.kind for one in description.device.providers} <= _ALONE:
        _booted[key] = snapshot
    else:
        shutil.rmtree(snapshot.parent)
    seconds.append(time.monotonic() - start)
    return vm


async def in_traffic(description: VmDescription, programs: Programs, story: Story) -> tuple[VirtualMachine, int]:
    """One whose guest's job is the story's workloads, with packets in flight in every state; and the job's number."""
    vm = await boot(description, programs)
    try:
        job = int((await vm.call_agent("start", driver="mixed", parameters=story.workloads()))["job"])
        await until_in_flight(vm, job, story)
    except BaseException:
        await vm.kill()
        raise
    return vm, job


async def books(vm: VirtualMachine, job: int, expected: dict[str, int] | None) -> Figures:
    """Let the workloads run to their end, or, where nothing is `expected`, end them, and compare the books."""
    figures = Figures()
    report = await finish(vm, job, stop=expected is None)
    audit(figures, report, await vm.control.call("status"), begun(report) if expected is None else expected)
    return figures


def clean(figures: Figures, more_than: int = 20_000) -> None:
    """Every transaction was completed exactly once, and there were as many."""
    print(
        f"{figures.transactions} transactions, {figures.completed} completed, {figures.lost} lost, "
        f"{figures.duplicated} duplicated, {figures.reordered} reordered, {figures.corrupted} corrupted"
    )
    assert not figures.reasons, figures.reasons
    assert figures.completed == figures.transactions > more_than
