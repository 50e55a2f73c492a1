"""What is done to the VM of an episode. Each operation is a function of the stage and its parameters.

It returns its figures if all went as it must, and raises `Fault` or what the VM raises if not. What is meant to fail (a
cancelled or sabotaged migration, a save onto a full disk) must fail, and leave the VM running with nothing lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

from vmbus.operations.save import SaveReport
from vmbus.snapshot.manifest import RAM
from vmbus.soak.books import Fault, flight
from vmbus.soak.entries import Call, function_of
from vmbus.soak.figures import Figures, figures_of, require_all, require_running, until_it_converges
from vmbus.soak.migrations import cancelled_migration, far_migration, migrate, sabotaged_migration
from vmbus.soak.plan import EpisodePlan, Parameters
from vmbus.soak.sequence import MOST_CHECKPOINTS
from vmbus.soak.stage import Kept, Stage, Subject
from vmbus.vm.errors import SaveFailed
from vmbus.vm.moments import Moment
from vmbus.vm.process import ProcessDied

T = TypeVar("T")

_SOON = 30.0
_INSTANCES = "0a5e0000-0000-4000-8000-{:012x}"


# ---- save and restore ------------------------------------------------------------------------------------------------


async def _save_and_end(stage: Stage, *, live: bool) -> tuple[SaveReport, Kept]:
    report, kept = await _save(stage, live=live, keep=False)
    await stage.end()
    return report, kept


async def _save(stage: Stage, *, live: bool, keep: bool) -> tuple[SaveReport, Kept]:
    """A snapshot, which is the last one then."""
    subject = stage.here
    kept = Kept(stage.path("snapshot"), subject.session)
    report = await until_it_converges(stage, lambda: subject.vm.save(kept.directory, live=live, keep=keep))
    await stage.keep(kept)
    return report, kept


async def _save_restore(stage: Stage, *, live: bool) -> Figures:
    report, kept = await _save_and_end(stage, live=live)
    stage.subject = await stage.restored(kept)
    return _came_back(stage.here, report)


def _came_back(subject: Subject, report: SaveReport) -> Figures:
    restored = subject.vm.restored
    assert restored is not None
    require_all(report.packets, subject.vm, "the restore")
    figures = figures_of(report)
    figures.downtime = restored.running_at - report.stopped_at
    figures.restore_seconds = restored.total
    return figures


async def save_restore(stage: Stage, parameters: Parameters) -> Figures:
    """Stopped, saved, every process ended, and restored in new ones."""
    return await _save_restore(stage, live=False)


async def save_restore_live(stage: Stage, parameters: Parameters) -> Figures:
    """The same, saved while the guest runs."""
    return await _save_restore(stage, live=True)


async def full_disk(stage: Stage, parameters: Parameters) -> Figures:
    """A save whose disk is full: it fails, and the VM runs on."""
    subject = stage.here
    directory = stage.path("full")

    full = _file_that_cannot_grow()

    async def fill(moment: Moment) -> None:
        if moment is Moment.BEFORE_STREAM:
            (partial,) = directory.parent.glob(f".{directory.name}.partial-*")
            (partial / RAM).symlink_to(f"/proc/{os.getpid()}/fd/{full}")

    try:
        await subject.vm.save(directory, live=bool(parameters["live"]), keep=True, at=fill)
    except SaveFailed as error:
        if not error.source_alive:
            raise
        await require_running(subject, "a save onto a full disk")
        if directory.exists():
            raise Fault(f"a snapshot is there that was not finished: {directory}") from error
        return Figures(outcome="refused", message=str(error))
    finally:
        os.close(full)
    raise Fault("a save onto a full disk succeeded")


def _file_that_cannot_grow() -> int:
    """A descriptor of an empty file that the kernel lets nobody write to: a full disk without a file system of its
    own, which only root may make."""
    descriptor = os.memfd_create("full", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    return descriptor


async def kill(stage: Stage, parameters: Parameters) -> Figures:
    """A process of the VM dies, and the VM is restored from its last snapshot."""
    subject = stage.here
    figures = Figures()
    if parameters["snapshot"] == "new":
        report, _ = await _save(stage, live=True, keep=True)
        figures = figures_of(report)
        await stage.until_loaded(subject, 50, stage.plan.operation_seconds)
    if stage.snapshot is None:
        raise Fault("there is no snapshot that the VM could be restored from")
    victim = subject.vm.server if parameters["victim"] == "server" else subject.vm.qemu
    assert victim is not None
    os.kill(victim.pid, signal.SIGKILL)
    try:
        async with asyncio.timeout(_SOON):
            await subject.vm.wait_ended()
    except ProcessDied:
        await subject.vm.kill()
    else:
        raise Fault(f"{victim.name} was killed, and nobody noticed")
    stage.subject = await stage.restored(stage.snapshot, back=True)
    restored = stage.here.vm.restored
    assert restored is not None
    if figures.packets is not None:
        require_all(figures.packets, stage.here.vm, "the restore")
    figures.restore_seconds = restored.total
    figures.downtime = None  # the guest ran between the save and the death; that time is undone
    return figures


async def clone(stage: Stage, parameters: Parameters) -> Figures:
    """Two VMs from one snapshot: both go on, one is brought to its end and checked, the other goes on for good."""
    report, kept = await _save_and_end(stage, live=bool(parameters["live"]))
    async with contextlib.AsyncExitStack() as stack:
        stage.subject, other = await _both(stage.restored(kept), stage.restored(kept, clone=True), stack)
        figures = _came_back(stage.subject, report)
        require_all(report.packets, other.vm, "the restore of the other clone")
        for subject in (other, stage.subject):
            await stage.until_loaded(subject, 100, stage.plan.operation_seconds)
        _, verdict, wrong = await stage.finish(other)
        if wrong:
            raise Fault(f"the other clone: {'; '.join(wrong)}")
        stage.event(f"the other clone came to its end, all books agree{f', audit {verdict}' if verdict else ''}")
    return figures


async def _both(
    one: Awaitable[Subject], two: Awaitable[Subject], stack: contextlib.AsyncExitStack
) -> tuple[Subject, Subject]:
    """Both subjects; the second one's VM ends with the stack. If one fails, so does all."""
    found = await asyncio.gather(one, two, return_exceptions=True)
    failures = [failure for failure in found if isinstance(failure, BaseException)]
    subjects = [subject for subject in found if isinstance(subject, Subject)]
    if failures:
        for subject in subjects:
            await subject.vm.kill()
        raise failures[0]
    stack.push_async_callback(subjects[1].vm.kill)
    return subjects[0], subjects[1]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


async def checkpoint(stage: Stage, parameters: Parameters) -> Figures:
    """A moment is noted; of more than the plan allows the oldest goes."""
    vm, tag = stage.here.vm, str(parameters["tag"])
    directory = stage.scratch / "checkpoints"
    while len(stage.checkpoints) >= MOST_CHECKPOINTS:
        oldest = next(iter(stage.checkpoints))
        await vm.delete_checkpoint(oldest, directory=directory)
        del stage.checkpoints[oldest]
    report = await vm.checkpoint(tag, directory=directory)
    stage.checkpoints[tag] = stage.here.session
    return Figures(
        downtime=report.downtime,
        save_seconds=sum(report.phases.values()),
        memory_bytes=report.vm_state_bytes,
        state_bytes=report.state_bytes,
        packets={**report.packets, "held": report.incoming_held},
    )


async def revert(stage: Stage, parameters: Parameters) -> Figures:
    """Back to a checkpoint, in the running processes."""
    tag = str(parameters["tag"])
    with stage.going_back():
        report = await stage.here.vm.revert(tag, directory=stage.scratch / "checkpoints")
    stage.here.session = stage.checkpoints[tag].moved(back=True)
    return Figures(downtime=report.downtime, restore_seconds=sum(report.phases.values()), packets=report.packets)


# ---- the device and the guest ----------------------------------------------------------------------------------------


async def pause(stage: Stage, parameters: Parameters) -> Figures:
    """The vCPUs stand still for a while."""
    seconds = float(parameters["seconds"])
    vm = stage.here.vm
    await vm.stop()
    await asyncio.sleep(seconds)
    await vm.cont()
    return Figures(downtime=seconds)


async def hot_add(stage: Stage, parameters: Parameters) -> Figures:
    """A provider comes to the running device."""
    vm, name = stage.here.vm, str(parameters["name"])
    number = int(name.rpartition("-")[2]) if name.rpartition("-")[2].isdigit() else 0
    provider = {"kind": "echo", "name": name, "instance": _INSTANCES.format(number), "options": {"hold": 2}}
    await stage.ask_server("offer", provider=provider)
    if name not in (await vm.call_server("status"))["providers"]:
        raise Fault(f"provider {name!r} was offered, and is not there")
    return Figures()


async def rescind(stage: Stage, parameters: Parameters) -> Figures:
    """A provider that was added goes; it has outlived whatever was done meanwhile."""
    vm, name = stage.here.vm, str(parameters["name"])
    if name not in (await vm.call_server("status"))["providers"]:
        raise Fault(f"provider {name!r} was added, and is not there any more")
    await stage.ask_server("rescind", name=name)
    if name in (await vm.call_server("status"))["providers"]:
        raise Fault(f"provider {name!r} was rescinded, and is still there")
    return Figures()


async def driver_kill(stage: Stage, parameters: Parameters) -> Figures:
    """The guest's driver is killed in mid-traffic; its successor begins anew."""
    subject = stage.here
    vm, session = subject.vm, subject.session
    for job in session.jobs.values():
        report = await vm.call_agent("kill", job=job)
        if report["state"] != "killed":
            raise Fault(f"the guest's driver was to be killed, and {report['state']}: {report.get('error')}")
    status = await vm.call_server("status")
    if any(flight(status).values()):
        raise Fault(f"packets of a driver that is dead are still in flight: {flight(status)}")
    done = stage.transactions(subject, status)
    await stage.start_workloads(before=done, killed=session.killed + 1)
    return Figures()


OPERATIONS: dict[str, Callable[[Stage, Parameters], Awaitable[Figures]]] = {
    "save_restore": save_restore,
    "save_restore_live": save_restore_live,
    "migrate": migrate,
    "cancelled_migration": cancelled_migration,
    "sabotaged_migration": sabotaged_migration,
    "full_disk": full_disk,
    "far_migration": far_migration,
    "checkpoint": checkpoint,
    "revert": revert,
    "clone": clone,
    "pause": pause,
    "hot_add": hot_add,
    "rescind": rescind,
    "kill": kill,
    "driver_kill": driver_kill,
}


def operation_of(plan: EpisodePlan, kind: str) -> Call:
    """What carries an operation out, ours or the plan's own. Raises UsageError for code that is not there."""
    if kind in OPERATIONS:
        return OPERATIONS[kind]
    entry = next(one for one in plan.own if one.name == kind)
    if entry.call:
        return function_of(entry.call, plan.path)

    async def command(stage: Stage, parameters: Parameters) -> Figures:
        if entry.guest:
            return Figures(message=(await stage.run_in_guest(entry.guest))[-500:])
        return Figures(message=str(await stage.command(entry.provider, entry.command, **entry.arguments))[:500])

    return command
