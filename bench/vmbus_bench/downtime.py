"""Downtime of a live migration: a VM with our device, against the same VM without it, both by turns in one run.

The baseline is what stock QEMU does when left alone: the same guest, the same settings, no VMBus device; source and
destination are joined by a unix socket, and the destination runs as soon as it has loaded everything. Its downtime goes
from QEMU's event STOP at the source to RESUME at the destination. In both, QEMU is told to plan for little downtime:
with its default of 300 ms it stops the guest with any part of that left to send, and nothing else would be measured.

With the device the VM moves in the project's way, with 0, 100 or 1,000 packets of the host in flight and the traffic at
full speed. That downtime goes from STOP to the news, at the source, that the VM runs at the destination.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

import msgspec

from vmbus.errors import VmbusError, WaitTimeout
from vmbus.operations.machine import VirtualMachine
from vmbus.operations.migration.address import UnixAddress, stream_channel
from vmbus.operations.migration.listener import listen
from vmbus.operations.migration.report import MigrationReport
from vmbus.operations.stream import MAX_BANDWIDTH
from vmbus.qemu.agent import AgentClient
from vmbus.qemu.qmp import Monitor
from vmbus.testkit.loopback.harness import describe
from vmbus.vm.command_line import Programs, qemu_arguments
from vmbus.vm.description import VmDescription
from vmbus.vm.process import Child
from vmbus.vm.run_directory import RunDirectory
from vmbus.vm.sockets import Sockets
from vmbus_bench.figures import Part, Row, Sample, Target, ratio

IN_FLIGHT = (0, 100, 1000)
SIZE = 64
MOST_ADDED = 20.0
"""Milliseconds that the device may add without packets in flight, on a quiet machine."""
MOST_TIMES = 1.3
"""How many times that it may add with the most packets."""
DOWNTIME_LIMIT = 20
"""Milliseconds that QEMU may plan for its last pass."""
_TIMEOUT = 60.0
_LEAST = 0.1  # milliseconds
_BUSY = "the target is for a quiet machine; the details say where the time went"
_MORE = (
    "the state of the packets is saved, sent and rebuilt while the guest stands still, some 6 us of CPU time a packet "
    "where nothing else runs; the details say where the time went"
)
_ENDLESS = 1 << 40  # packets of a run that is stopped when it has been measured


# ---- the baseline ----------------------------------------------------------------------------------------------------


class _Plain:
    """A QEMU without the VMBus device."""

    def __init__(self, directory: RunDirectory, child: Child) -> None:
        self.directory = directory
        self.child = child
        self.monitor = Monitor("QEMU without the device")
        self.agent = AgentClient(Sockets(directory.path).agent)

    @classmethod
    async def start(cls, description: VmDescription, programs: Programs, *, incoming: bool) -> _Plain:
        """Runs, or waits for a stream. Raises `EnvironmentProblem` or `WaitTimeout`; nothing is left behind then."""
        directory = RunDirectory.create("bench-plain")
        try:
            monitor = directory / "qmp.sock"
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(monitor))
                listener.listen(1)
                chardev = f"socket,id=qmp,fd={listener.fileno()},server=on,wait=off"
                arguments = qemu_arguments(
                    description, programs, directory.path, qmp=chardev, incoming=incoming, with_device=False
                )
                # A destination that runs by itself as soon as it can: nobody adds a turn of his own.
                arguments = [one for one in arguments if one != "-S"]
                child = await Child.spawn(
                    "QEMU without the device", arguments, directory / "qemu.log", pass_fds=[listener.fileno()]
                )
        except BaseException:
            directory.remove()
            raise
        plain = cls(directory, child)
        try:
            await child.guard(plain.monitor.connect(monitor, _TIMEOUT), "QEMU to start", _TIMEOUT)
            await child.guard(plain.agent.connect(_TIMEOUT), "QEMU to open the agent's socket", _TIMEOUT)
        except BaseException:
            await plain.end()
            raise
        return plain

    async def move(self, description: VmDescription, programs: Programs) -> tuple[_Plain, float]:
        """Migrates to a new QEMU and ends this one; the new one, and the downtime in seconds."""
        there = await _Plain.start(description, programs, incoming=True)
        try:
            downtime = await self._move(there)
        except BaseException:
            await there.end()
            raise
        await self.end()
        return there, downtime

    async def _move(self, there: _Plain) -> float:
        capabilities = {"capabilities": [{"capability": "events", "state": True}]}
        channels = {"channels": stream_channel(UnixAddress(str(there.directory / "stream.sock")))}
        for monitor in (self.monitor, there.monitor):
            await monitor.execute("migrate-set-capabilities", capabilities)
        parameters = {"max-bandwidth": MAX_BANDWIDTH, "downtime-limit": DOWNTIME_LIMIT}
        await self.monitor.execute("migrate-set-parameters", parameters)
        await there.monitor.execute("migrate-incoming", channels)
        with self.monitor.listen("STOP") as stops, there.monitor.listen("RESUME") as resumes:
            await self.monitor.execute("migrate", channels)
            await self.monitor.wait_migration({"completed"}, _TIMEOUT, "the migration without the device")
            await there.child.guard(resumes.get(), "the destination to run", _TIMEOUT)
            await there.child.guard(there.agent.wait_ready(_TIMEOUT), "the guest's agent", _TIMEOUT + 1)
            return _stamp(resumes.history[0]) - _stamp(stops.history[0])

    async def end(self) -> None:
        await self.agent.close()
        await self.child.stop()
        await self.monitor.close()
        self.directory.remove()


def _stamp(event: Any) -> float:
    return float(event["timestamp"]["seconds"]) + float(event["timestamp"]["microseconds"]) / 1e6


# ---- with the device -------------------------------------------------------------------------------------------------


async def _traffic(vm: VirtualMachine, packets: int) -> int:
    """Starts a run that keeps `packets` in flight, and waits until it does; the guest's job."""
    assert vm.control is not None
    parameters = {
        "count": _ENDLESS,
        "size": SIZE,
        "window": packets,
        "hold": packets // 4,
        "ring_pages_in": max(4, packets * 112 // 2 // 4096),  # room for half of them: the others are queued
        "stall_seconds": _TIMEOUT,
    }
    job = int((await vm.call_agent("start", driver="burst", parameters=parameters))["job"])
    deadline = time.monotonic() + _TIMEOUT
    while True:
        burst = (await vm.control.call("status"))["providers"]["burst"]
        if sum(burst["packets"].values()) >= packets and burst["tally"]["completed"] >= packets:
            return job
        if time.monotonic() > deadline:
            raise WaitTimeout(f"{packets} packets in flight (now {burst['packets']})", _TIMEOUT)
        await asyncio.sleep(0.02)


async def _no_traffic(vm: VirtualMachine, job: int) -> None:
    """Ends the run and looks at its verdict."""
    await vm.call_agent("stop", job=job)
    report = await vm.call_agent("wait", job=job, timeout=_TIMEOUT)
    if (report.get("result") or {}).get("verdict") != "passed":
        raise VmbusError(f"the guest's traffic did not survive the migration: {report}")


async def _move(vm: VirtualMachine, programs: Programs) -> tuple[VirtualMachine, MigrationReport]:
    """Migrates on this host; the VM at its new place, and the report."""
    secret = secrets.token_bytes(32)
    address = UnixAddress(str(vm.run_directory / "bench.sock"))
    listener = await listen(address, secret)
    arrival = asyncio.create_task(VirtualMachine.receive(listener, programs, timeout=_TIMEOUT))
    try:
        report = await vm.migrate(str(address), secret, downtime_limit=DOWNTIME_LIMIT)
        return await arrival, report
    except BaseException:
        arrival.cancel()
        with contextlib.suppress(VmbusError, asyncio.CancelledError):
            await (await arrival).kill()
        raise


async def _with_device(vm: VirtualMachine, programs: Programs, packets: int) -> tuple[VirtualMachine, MigrationReport]:
    job = await _traffic(vm, packets) if packets else None
    vm, report = await _move(vm, programs)
    if job is not None:
        if sum(report.packets.values()) < packets:
            raise VmbusError(f"{packets} packets were to be in flight, and {report.packets} moved")
        await _no_traffic(vm, job)
    return vm, report


# ---- the part --------------------------------------------------------------------------------------------------------


async def measure(description: VmDescription, programs: Programs, *, quick: bool, step: Callable[[str], None]) -> Part:
    """Run this part, in two VMs by turns. `step` is told what is being done."""
    repeats = 3 if quick else 7
    description = msgspec.structs.replace(description, name="bench", device=describe("burst"))
    plain_times: list[float] = []
    reports: dict[int, list[MigrationReport]] = {packets: [] for packets in IN_FLIGHT}
    step("two VMs boot")
    async with contextlib.AsyncExitStack() as stack:
        plain = await _Plain.start(description, programs, incoming=False)
        stack.push_async_callback(lambda: plain.end())
        vm = await VirtualMachine.launch(description, programs)
        stack.push_async_callback(lambda: vm.kill())
        await vm.wait_ready()
        await plain.child.guard(plain.agent.wait_ready(_TIMEOUT), "the guest's agent", _TIMEOUT + 1)
        for repeat in range(repeats):
            turn = f"round {repeat + 1} of {repeats}"
            step(f"migration without the device, {turn}")
            plain, downtime = await plain.move(description, programs)
            plain_times.append(downtime)
            for packets in IN_FLIGHT:
                step(f"migration with {packets} packets in flight, {turn}")
                vm, report = await _with_device(vm, programs, packets)
                reports[packets].append(report)
    return summary(plain_times, reports, description, programs)


def summary(
    plain_times: list[float],
    reports: dict[int, list[MigrationReport]],
    description: VmDescription,
    programs: Programs,
) -> Part:
    """The part, from downtimes in seconds and reports, taken in pairs."""
    plain = [1e3 * one for one in plain_times]
    base = Sample.of(plain, "ms")
    rows, targets = [], []
    gained: dict[int, Sample] = {}
    for packets, taken in reports.items():
        times = [1e3 * one.downtime for one in taken]
        added = Sample.of([mine - theirs for mine, theirs in zip(times, plain, strict=True)], "ms")
        details = {
            "added": added,
            "QEMU's share": Sample.of([1e3 * one.downtime_qemu for one in taken], "ms"),
            "the device's": Sample.of([1e3 * one.downtime_device for one in taken], "ms"),
        }
        for span in taken[0].spans:
            details[span] = Sample.of([1e3 * one.spans[span] for one in taken], "ms")
        last = taken[-1]
        rows.append(
            Row(
                f"{packets} packets in flight",
                Sample.of(times, "ms"),
                base,
                ratio(times, plain),
                f"{last.flushed_pages} pages flushed, {last.state_bytes} bytes of state",
                details,
            )
        )
        gained[packets] = added
    least, most = min(gained), max(gained)
    name = f"what the device adds, {least} packets in flight"
    targets.append(Target.judge(name, gained[least], "at most", MOST_ADDED, _BUSY))
    if most > least:
        # Of the medians: what was added is a difference, and a single one may be next to nothing.
        more = Sample.of([gained[most].median / max(gained[least].median, _LEAST)], "x")
        name = f"what it adds with {most} packets in flight, against {least}"
        targets.append(Target.judge(name, more, "at most", MOST_TIMES, _MORE))
    return Part(
        name="downtime",
        title=f"downtime of a live migration ({programs.accelerator})",
        parameters={
            "size": SIZE,
            "packets": list(reports),
            "repeats": len(plain),
            "transport": "unix",
            "downtime_limit_ms": DOWNTIME_LIMIT,
            "accelerator": programs.accelerator,
            "qemu_version": programs.qemu_version,
            "cpus": description.cpus,
            "memory_mib": description.memory_mib,
        },
        baseline="the same VM without the VMBus device, idle, migrated by QEMU alone",
        rows=rows,
        targets=targets,
    )
