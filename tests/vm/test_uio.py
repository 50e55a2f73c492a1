"""Test drivers over Linux's own VMBus and its UIO driver: Linux opens and closes the channels and carries the signals.

One VM is booted and saved twice in mid-traffic: rightly, and with the flush of dirty pages left out.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support import pace
from support.in_guest import require_no_complaints, shell, until_all_have_moved
from vmbus.observe.audit.checker import check_paths
from vmbus.observe.audit.guest import collect_audit
from vmbus.observe.audit.report import Report
from vmbus.operations.machine import VirtualMachine
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription, load_description
from vmbus.vm.moments import Sabotage

pytestmark = [pytest.mark.vm, pytest.mark.long]

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Note = Callable[[str], None]
CHECKOUT = Path(__file__).resolve().parents[2]

BROKEN = ("broken", "broken too", "broken again")
"""Saves that skip the flush."""
# Small, since an emulated guest is slow and they share it; none has an end of its own.
PARAMETERS: dict[str, dict[str, Any]] = {
    "echo": {"window": 64, "size": 600, "minimum_size": 1, "external": 0.3},
    "burst": {"window": 400, "size": 300, "hold": 20},
    "bulk": {"window": 3},
    "ring-full": {"window": 400, "size": 700, "pause_every": 100},
    "churn": {"requests": 4, "window": 8},
    "sync": {},
}


def described() -> VmDescription:
    """The machine with Linux's drivers, and providers for all of these; each device costs the guest up to 47 MiB."""
    plain = msgspec.to_builtins(load_description(CHECKOUT / "qemu_configs" / "linux.toml"))
    plain["memory_mib"] = 768
    kinds = {"echo": "echo", "echo-2": "echo", "burst": "burst", "lab": "lab"}
    plain["device"]["providers"] = [
        {
            "kind": kind,
            "name": name,
            "instance": f"6f1b4b0e-5d2c-4a53-9d0a-0f2f1f3c7e0{number}",
            "options": {"stations": 3, "pipes": 0} if kind == "lab" else {},
        }
        for number, (name, kind) in enumerate(kinds.items())
    ]
    return msgspec.convert(plain, VmDescription)


async def end(vm: VirtualMachine, job: int) -> dict[str, Any]:
    """Stop the drivers; their report, as far as they get."""
    await vm.call_agent("stop", job=job)
    report: dict[str, Any] = await vm.call_agent("wait", job=job, timeout=120.0)
    return report


async def checked(vm: VirtualMachine, audit: Path) -> Report:
    """The books of both ends, over all servers up to this one."""
    await collect_audit(vm)
    return check_paths([audit], leaf=(await vm.call_server("audit"))["uid"])


async def until_moved(vm: VirtualMachine, job: int) -> None:
    """Wait until a driver that runs alone has completed something."""

    async def moved() -> bool:
        report = await vm.call_agent("poll", job=job)
        assert report["state"] == "running", report
        return bool((report["progress"] or {}).get("completed"))

    await pace.eventually(moved, "progress", 90, every=0.1)


async def killed_and_withdrawn(vm: VirtualMachine) -> None:
    """A driver that is killed in mid-traffic, and a provider that goes meanwhile: the next one finds all in order."""
    echo = next(one for one in described().device.providers if one.name == "echo")
    forever = {"count": 0, "window": 16, "size": 5000, "external": 0.5, "instance": echo.instance}
    for what in ("killed", "withdrawn"):
        job = int((await vm.call_agent("start", driver="echo", parameters=forever))["job"])
        await until_moved(vm, job)
        if what == "killed":
            await vm.call_agent("kill", job=job)
        else:
            await vm.control.call("rescind", name="echo")
            report = await vm.call_agent("wait", job=job, timeout=60.0)
            assert "rescinded or closed by the host" in str(report["result"]["trouble"]), report
            await vm.control.call("offer", provider=msgspec.to_builtins(echo))
        once = {**forever, "count": 100}
        report = await vm.call_agent("run", driver="echo", parameters=once, timeout=60.0)
        assert report["state"] == "finished" and report["result"]["verdict"] == "passed", (what, report)


def test_uio_drivers_over_saves_in_mid_traffic(run: Run, programs: Programs, tmp_path: Path, note: Note) -> None:
    audit = tmp_path / "audit"
    workloads = [{"driver": name, "count": 0, "stall_seconds": 60.0, **values} for name, values in PARAMETERS.items()]

    async def story() -> list[Any]:
        vm = await VirtualMachine.launch(described(), programs, audit=audit)  # as booted: records are counted
        async with vm:
            await vm.wait_ready()
            job = int((await vm.call_agent("start", driver="mixed", parameters={"workloads": workloads}))["job"])
            before = await until_all_have_moved(vm, job, {})
            bound = await shell(vm, "ls /sys/bus/vmbus/drivers/uio_hv_generic; cat /sys/class/uio/*/name")
            assert bound.count("uio_hv_generic") == len(PARAMETERS), bound
            live = await vm.save(tmp_path / "live", live=True, keep=True)
            for broken_save in BROKEN:  # a save in which nothing was written meanwhile has nothing to lose
                await until_all_have_moved(vm, job, await until_all_have_moved(vm, job, {}))
                await vm.save(tmp_path / broken_save, live=True, keep=True, sabotage=Sabotage(skip_flush=True))
        async with await VirtualMachine.restore(tmp_path / "live", programs, audit=audit) as vm:
            await vm.wait_ready()
            before = await until_all_have_moved(vm, job, before)
            stopped = await vm.save(tmp_path / "stopped")
        async with await VirtualMachine.restore(tmp_path / "stopped", programs, audit=audit) as vm:
            await vm.wait_ready()
            await until_all_have_moved(vm, job, before)
            report = await end(vm, job)
            books = await checked(vm, audit)
            await killed_and_withdrawn(vm)
            await require_no_complaints(vm)
            left = await shell(vm, "ls /sys/class/uio")
        assert left == "", left
        return [report, books, live, stopped]

    report, books, live, stopped = run(story())
    assert report["state"] == "finished", report
    for part in report["result"]["workloads"]:
        note(f"over UIO {part['name']}: {part['completed']} completed in {part['seconds']} s, {part['verdict']}")
        assert part["verdict"] == "passed", part
    assert books.clean, str(books)
    for saved in (live, stopped):
        assert saved.packets["queued"] + saved.packets["sent"] > 0, saved
    note(
        f"over UIO, over a live save with {live.packets} and a stopped one with {stopped.packets}: {books.packets} "
        f"packets, {books.transactions} transactions exactly once"
    )

    async def broken(directory: str) -> tuple[bool, str]:
        async with await VirtualMachine.restore(tmp_path / directory, programs, audit=audit) as vm:
            await vm.wait_ready()
            report = await end(vm, report_job)
            return report["state"] == "finished" and report["result"]["verdict"] == "passed", str(report)

    report_job = int(report["job"])
    for directory in BROKEN:
        well, what = run(broken(directory))
        if not well:
            break
    assert not well, f"a save whose written pages were not flushed is noticed: {what}"
