"""The auditor over a whole VM: records of both ends, of two servers and of the guest's memory, checked at the end.

One VM is booted and saved twice in mid-traffic: rightly, and with the flush of dirty pages left out.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from vmbus.observe.audit.checker import check_paths
from vmbus.observe.audit.guest import collect_audit
from vmbus.observe.audit.report import Report
from vmbus.operations.machine import VirtualMachine
from vmbus.testkit.story import Story, finish, until_in_flight
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.moments import Sabotage

pytestmark = pytest.mark.vm

Run = Callable[[Coroutine[Any, Any, Any]], Any]

STORY = Story(packets=256, echo_count=8_000, burst_count=14_000, stall_seconds=3.0)


class Taken:
    def __init__(self, good: Path, broken: Path, audit: Path, job: int, report: Report) -> None:
        self.good, self.broken, self.audit, self.job, self.report = good, broken, audit, job, report


async def boot_and_save(description: VmDescription, programs: Programs, directory: Path) -> Taken:
    audit = directory / "audit"
    async with await VirtualMachine.launch(description, programs, audit=audit) as vm:  # as booted: records are counted
        await vm.wait_ready()
        job = int((await vm.call_agent("start", driver="mixed", parameters=STORY.workloads()))["job"])
        await until_in_flight(vm, job, STORY)
        await collect_audit(vm)
        report = check_paths([audit])
        for path in audit.glob("guest-*"):
            path.unlink()
        await vm.save(directory / "good", live=True, keep=True)
        await vm.save(directory / "broken", live=True, sabotage=Sabotage(skip_flush=True))
    return Taken(directory / "good", directory / "broken", audit, job, report)


@pytest.fixture(scope="module")
def taken(demo_description: VmDescription, programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Taken:
    import asyncio

    return asyncio.run(boot_and_save(demo_description, programs, tmp_path_factory.mktemp("audit")))


async def to_the_end(taken: Taken, snapshot: Path, programs: Programs) -> Report:
    async with await VirtualMachine.restore(snapshot, programs, audit=taken.audit) as vm:
        await finish(vm, taken.job)
        await collect_audit(vm)
        leaf = (await vm.call_server("audit"))["uid"]
    return check_paths([taken.audit], leaf=leaf)


def test_audit_in_mid_traffic_is_clean_and_names_what_is_in_flight(taken: Taken) -> None:
    report = taken.report
    print(report)
    assert report.clean, str(report)
    assert report.in_flight >= 2 * STORY.packets
    assert {channel.channel for channel in report.channels} == {"echo", "burst"}


def test_audit_over_a_save_and_a_restore_is_clean(run: Run, taken: Taken, programs: Programs) -> None:
    report = run(to_the_end(taken, taken.good, programs))
    print(report)
    print(f"{report.packets} packets, {report.transactions} completed transactions over {len(report.timeline)} servers")
    assert report.clean, str(report)
    assert len(report.timeline) == 2 and report.abandoned, "after the checkpoint the source ran on"
    # Besides the counted ones: the guest's request to begin, and the host's word that it is done.
    assert report.transactions == sum(STORY.expected().values()) + 1
    assert report.packets == report.transactions + 1 and report.in_flight == 0


def test_sabotage_audit_catches_a_skipped_flush(run: Run, taken: Taken, programs: Programs) -> None:
    report = run(to_the_end(taken, taken.broken, programs))
    print(report)
    assert report.verdict == "broken"
    first = report.problems[0]
    # A channel's own indices are saved: rings that were not copied are noticed before any packet in them is believed.
    assert first.first is not None or "what was saved: it was overwritten" in str(first), "nothing is named"
