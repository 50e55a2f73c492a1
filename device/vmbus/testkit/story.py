"""The main job as one story: a guest and a device exchange packets, the VM is saved in mid-traffic, every process
dies, new ones restore it, the traffic runs to its end, and the books of both sides are compared.

`run_story` is what scripts/demo shows and what the VM tests assert on; `Figures` is what it found.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vmbus.errors import WaitTimeout
from vmbus.operations.machine import VirtualMachine
from vmbus.operations.save import SaveReport
from vmbus.util.patience import patient
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.timing import Progress

# Bytes of ring that one burst packet takes: 64 bytes of data, its header, descriptor and trailer.
BURST_SIZE = 64
_PACKET_BYTES = 112
_GUEST_HOLD = 64
_CONDITION_TIMEOUT = 60.0
_WORKLOAD_TIMEOUT = 300.0
_SAVES = 8
"""Saves, at most, until one finds enough in flight."""


class Story(msgspec.Struct, kw_only=True, frozen=True):
    """What is to happen. `packets`: at least so many outgoing packets in flight in each of the two states. With counts
    of 0 the workloads go on until they are stopped: see `finish`. `run_story` stops them once they have got so far."""

    packets: int = 256
    live: bool = True
    echo_count: int = 15_000
    burst_count: int = 30_000
    external: float = 0.25
    stall_seconds: float = 30.0

    @property
    def ring_pages(self) -> int:
        """Data pages of the ring to the guest: room for half as many packets again as must be in it."""
        return max(4, -(-self.packets * 3 * _PACKET_BYTES // (2 * 4096)))

    @property
    def window(self) -> int:
        """Transactions in flight: what the ring and the guest hold, and as many queued ones as must be, twice."""
        return self.ring_pages * 4096 // _PACKET_BYTES + _GUEST_HOLD + 2 * self.packets

    def workloads(self) -> dict[str, Any]:
        """Parameters of the guest's test driver `mixed`."""
        return {
            "workloads": [
                {
                    "driver": "echo",
                    "count": self.echo_count,
                    "window": 128,
                    "external": self.external,
                    "stall_seconds": self.stall_seconds,
                },
                {
                    "driver": "burst",
                    "count": self.burst_count and self.burst_count + 4 * self.window,
                    "size": BURST_SIZE,
                    "window": self.window,
                    "hold": _GUEST_HOLD,
                    "ring_pages_in": self.ring_pages,
                    "stall_seconds": self.stall_seconds,
                },
            ]
        }

    def expected(self) -> dict[str, int]:
        """Transactions that each workload must complete, by its name."""
        return {one["driver"]: int(one["count"]) for one in self.workloads()["workloads"]}

    def endless(self) -> Story:
        """The same with workloads that go on until they are stopped."""
        return msgspec.structs.replace(self, echo_count=0, burst_count=0)


class Figures(msgspec.Struct, kw_only=True):
    """What was found. Counts are of transactions of both sides together unless named otherwise; times in seconds."""

    verdict: str = "fail"
    reasons: list[str] = msgspec.field(default_factory=list)
    in_flight: dict[str, int] = msgspec.field(default_factory=dict)
    """At the save: outgoing packets ``queued`` on a full ring, ``sent`` (in the ring, or taken and not completed),
    and ``incoming_held`` by providers."""
    packets_saved: int = 0
    packets_restored: int = 0
    restored_by_state: dict[str, int] = msgspec.field(default_factory=dict)
    rebuilt_by_provider: int = 0
    transactions: int = 0
    completed: int = 0
    lost: int = 0
    duplicated: int = 0
    reordered: int = 0
    corrupted: int = 0
    completed_before_save: int = 0
    flushed_pages: int = 0
    bytes: dict[str, int] = msgspec.field(default_factory=dict)
    seconds: dict[str, float] = msgspec.field(default_factory=dict)
    processes: dict[str, list[int]] = msgspec.field(default_factory=dict)
    accelerator: str = ""
    qemu_version: str = ""
    libvfio_user: str = ""


def _pids(vm: VirtualMachine) -> list[int]:
    return [child.process.pid for child in vm.children]


async def until_in_flight(vm: VirtualMachine, job: int, story: Story) -> dict[str, Any]:
    """Wait until enough packets are in flight in every state; the server's status then."""
    bound = patient(_CONDITION_TIMEOUT)
    deadline = time.monotonic() + bound
    assert vm.control is not None
    while True:
        status = await vm.control.call("status")
        packets, tally = status["packets"], status["providers"]["burst"]["tally"]
        if (
            packets["queued"] >= story.packets
            and packets["sent"] >= story.packets
            and status["incoming_held"]
            and tally["completed"] >= story.packets
        ):
            return status
        report = await vm.call_agent("poll", job=job)
        if report["state"] != "running":
            raise WaitTimeout(
                f"{story.packets} packets in flight in both states; the guest's driver ended: {report}", 0
            )
        if time.monotonic() > deadline:
            raise WaitTimeout(
                f"{story.packets} packets in flight in both states (now {packets}, "
                f"{status['incoming_held']} requests held by providers)",
                bound,
            )
        await asyncio.sleep(0.02)


def missing(story: Story, packets: Mapping[str, int], held: int) -> list[str]:
    """What a save with these packets in flight lacks of what the story asks for, in words."""
    lacks = [
        f"only {packets[state]} packets were {state} at the save, {story.packets} were asked for"
        for state in ("queued", "sent")
        if packets[state] < story.packets
    ]
    return lacks if held else [*lacks, "no provider held an incoming packet at the save"]


async def save_in_flight(vm: VirtualMachine, job: int, story: Story, directory: Path) -> SaveReport:
    """Save the VM, which runs on, with enough packets in flight in every state.

    What was in flight when somebody looked need not be when the save happens, some steps later. So a save that finds
    too little is thrown away, and another one made; the last one stays in any case. The traffic must go on meanwhile.
    """
    for left in reversed(range(_SAVES)):
        await until_in_flight(vm, job, story)
        report = await vm.save(directory, live=story.live, keep=True)
        if not left or not missing(story, report.packets, report.incoming_held):
            break
        await asyncio.to_thread(shutil.rmtree, directory)
    return report


async def until_completed(vm: VirtualMachine, job: int, counts: Mapping[str, int]) -> None:
    """Wait until each provider has completed so many transactions, or the guest's driver has ended. Raises
    WaitTimeout."""
    deadline = time.monotonic() + _WORKLOAD_TIMEOUT
    assert vm.control is not None
    while time.monotonic() < deadline:
        providers = (await vm.control.call("status"))["providers"]
        if all(providers[name]["tally"]["completed"] >= count for name, count in counts.items()):
            return
        if (await vm.call_agent("poll", job=job))["state"] != "running":
            return
        await asyncio.sleep(0.05)
    raise WaitTimeout(f"{counts} transactions to complete", _WORKLOAD_TIMEOUT)


async def finish(vm: VirtualMachine, job: int, *, stop: bool = False) -> dict[str, Any]:
    """The guest's report once its workloads have ended; with `stop` they are told to begin nothing more. Raises
    WaitTimeout."""
    if stop:
        await vm.call_agent("stop", job=job)
    bound = patient(_WORKLOAD_TIMEOUT)
    deadline = time.monotonic() + bound
    while time.monotonic() < deadline:
        report = await vm.call_agent("wait", job=job, timeout=30.0)
        if report["state"] != "running":
            return report
    raise WaitTimeout(f"the guest's workloads to end: {report.get('progress')}", bound)


def begun(report: dict[str, Any], names: Sequence[str] = ("echo", "burst")) -> dict[str, int]:
    """Transactions that workloads which were stopped had begun, by the books of the end that began them: the host's of
    `burst`, the guest's of any other."""
    workloads = {one["name"]: one for one in (report.get("result") or {}).get("workloads", [])}

    def count(name: str) -> int:
        found = workloads.get(name, {})
        return int((found.get("host") or {}).get("started", 0) if name == "burst" else found.get("sent", 0))

    return {name: count(name) for name in names}


def audit(figures: Figures, report: dict[str, Any], status: dict[str, Any], expected: dict[str, int]) -> None:
    """Compare the guest's books with the host's; every difference becomes a reason."""
    wrong = figures.reasons.append
    result = report.get("result") or {}
    if report["state"] != "finished" or result.get("verdict") != "passed":
        wrong(f"the guest's driver {report['state']}: {report.get('error') or result}")
    guest = {workload["name"]: workload for workload in result.get("workloads", [])}
    for name, count in expected.items():
        mine, theirs = guest.get(name, {}), status["providers"][name]["tally"]
        done = min(int(mine.get("completed", 0)), int(theirs["completed"]))
        figures.transactions += count
        figures.completed += done
        figures.lost += count - done
        for kind in ("duplicated", "reordered", "corrupted"):
            seen = int(mine.get(kind, 0)) + int(theirs[kind])
            setattr(figures, kind, getattr(figures, kind) + seen)
        for side, tally in (("guest", mine), ("host", theirs)):
            if int(tally.get("completed", 0)) != count or int(tally.get("lost", 0)):
                wrong(f"{name}, as the {side} counts: {count} transactions were to complete, its books say {tally}")
        if theirs["started"] != count:
            wrong(f"{name}: the provider saw {theirs['started']} transactions begin, not {count}")
    for kind in ("lost", "duplicated", "reordered", "corrupted"):
        if getattr(figures, kind):
            wrong(f"{getattr(figures, kind)} transactions {kind}")
    left = status["packets"]
    if left["queued"] or left["sent"]:
        wrong(f"packets are still in flight at the end: {left}")


async def run_story(
    story: Story,
    description: VmDescription,
    programs: Programs,
    snapshot: Path,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Figures:
    """Run the story with `snapshot` as the (new) snapshot directory. Nothing of it runs on when this returns.

    Raises what launch, save and restore raise; a workload that goes wrong is a verdict, not an exception.
    """
    figures = Figures(accelerator=programs.accelerator, qemu_version=programs.qemu_version)
    step = progress or (lambda _: None)
    seconds = figures.seconds
    begin = time.monotonic()

    def lap(name: str, since: float) -> None:
        seconds[name] = round(time.monotonic() - since, 3)

    start = time.monotonic()
    step("boot")
    vm = await VirtualMachine.launch(description, programs)
    try:
        await vm.wait_ready()
        lap("boot", start)
        assert vm.control is not None
        figures.libvfio_user = str((await vm.control.call("status"))["libvfio_user"])
        figures.processes["saved"] = _pids(vm)
        start = time.monotonic()
        step("traffic")
        workloads = story.endless().workloads()
        job = int((await vm.call_agent("start", driver="mixed", parameters=workloads))["job"])
        status = await until_in_flight(vm, job, story)
        lap("traffic_before", start)
        start = time.monotonic()
        step("save")
        saved = await save_in_flight(vm, job, story, snapshot)
        lap("save", start)
    finally:
        await vm.kill()
    say(
        f"saved {'live' if story.live else 'stopped'} with {saved.packets['queued']} packets queued, "
        f"{saved.packets['sent']} sent and {saved.incoming_held} requests held; "
        f"processes {figures.processes['saved']} are gone"
    )
    figures.completed_before_save = sum(one["tally"]["completed"] for one in status["providers"].values())
    figures.in_flight = {**saved.packets, "incoming_held": saved.incoming_held}
    figures.packets_saved = sum(saved.packets.values())
    figures.flushed_pages = saved.flushed_pages
    figures.bytes = {"ram": saved.ram_bytes, "device_state": saved.state_bytes}
    start = time.monotonic()
    step("restore")
    vm = await VirtualMachine.restore(snapshot, programs)
    try:
        lap("restore", start)
        assert vm.restored is not None and vm.control is not None
        figures.processes["restored"] = _pids(vm)
        figures.restored_by_state = dict(vm.restored.packets)
        figures.packets_restored = sum(vm.restored.packets.values())
        seconds["downtime"] = round(vm.restored.running_at - saved.stopped_at, 3)
        start = time.monotonic()
        step("end")
        await until_completed(vm, job, story.expected())
        report = await finish(vm, job, stop=True)
        lap("traffic_after", start)
        status = await vm.control.call("status")
        audit(figures, report, status, begun(report))
        figures.rebuilt_by_provider = int(status["providers"]["burst"]["restored"])
    finally:
        await vm.kill()
    lap("total", begin)
    _judge(figures, story)
    return figures


def _judge(figures: Figures, story: Story) -> None:
    """The verdict, with what speaks against it."""
    wrong = figures.reasons.append
    figures.reasons += missing(story, figures.in_flight, figures.in_flight["incoming_held"])
    if figures.transactions < sum(story.expected().values()):
        wrong(f"only {figures.transactions} transactions began, {sum(story.expected().values())} were to")
    if {key: figures.in_flight[key] for key in figures.restored_by_state} != figures.restored_by_state:
        wrong(f"saved {figures.in_flight}, restored {figures.restored_by_state}")
    if figures.rebuilt_by_provider != figures.packets_saved:
        wrong(f"the provider rebuilt {figures.rebuilt_by_provider} of {figures.packets_saved} packets")
    if set(figures.processes["saved"]) & set(figures.processes["restored"]):
        wrong("a process survived the restore")
    figures.verdict = "fail" if figures.reasons else "pass"
