"""What is done to the VM of an episode. Each operation is a function of the stage and its parameters.

It returns its figures if all went as it must, and raises `Fault` or what the VM raises if not. What is meant to fail (a
cancelled or sabotaged migration, a save onto a full disk) must fail, and leave the VM running with nothing lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vmbus.errors import Code, code_of
from vmbus.operations.machine import VirtualMachine
from vmbus.operations.migration.address import Address, TcpAddress, UnixAddress
from vmbus.operations.migration.channel import listen
from vmbus.operations.migration.link import PING_INTERVAL
from vmbus.operations.migration.report import MigrationReport
from vmbus.operations.save import SaveReport
from vmbus.snapshot.manifest import RAM
from vmbus.soak.books import Fault, flight
from vmbus.soak.entries import Call, function_of
from vmbus.soak.plan import EpisodePlan, Parameters
from vmbus.soak.records import Count, Outcome
from vmbus.soak.sequence import MOST_CHECKPOINTS
from vmbus.soak.stage import Kept, Stage, Subject
from vmbus.vm.errors import MigrateFailed, SaveFailed
from vmbus.vm.moments import Moment
from vmbus.vm.process import ProcessDied

T = TypeVar("T")

SILENCE = 4 * PING_INTERVAL
"""Seconds after which a cut link is noticed, where one is cut on purpose."""
LIVE_TRIES = 5
_SOON = 30.0
_INSTANCES = "0a5e0000-0000-4000-8000-{:012x}"


class Figures(msgspec.Struct, kw_only=True):
    """What an operation found: see the fields of `vmbus.soak.records.OperationRecord`."""

    outcome: Outcome = "done"
    downtime: float | None = None
    save_seconds: float | None = None
    restore_seconds: float | None = None
    memory_bytes: int | None = None
    state_bytes: int | None = None
    packets: Count | None = None
    """None: what was in flight right before the operation."""
    message: str = ""


def _saved(report: SaveReport) -> Figures:
    return Figures(
        downtime=report.downtime,
        save_seconds=report.total,
        memory_bytes=report.ram_bytes,
        state_bytes=report.state_bytes,
        packets={**report.packets, "held": report.incoming_held},
    )


def _require_all(saved: Count, vm: VirtualMachine, what: str) -> None:
    """Every outgoing packet that was in flight is back."""
    assert vm.restored is not None
    wanted = {state: saved[state] for state in ("queued", "sent")}
    if vm.restored.packets != wanted:
        raise Fault(f"{what}: in flight before {wanted}, after {vm.restored.packets}")


async def _require_running(subject: Subject, after: str) -> None:
    vm = subject.vm
    if vm.ended:
        raise Fault(f"the VM has ended with {after}, and was to run on")
    if not await vm.monitor.running():
        raise Fault(f"the vCPUs stand after {after}, and were to run on")
    if (phase := (await vm.call_server("status"))["phase"]) != "running":
        raise Fault(f"the device is {phase} after {after}, and was to run on")


async def _until_it_converges(stage: Stage, attempt: Callable[[], Awaitable[T]]) -> T:
    """A live copy gives up when the guest takes back, in each of its passes, memory that the device has just written:
    some workloads do that. The VM runs on then, and it is tried again, LIVE_TRIES times. Any other failure is one."""
    for left in reversed(range(LIVE_TRIES)):
        try:
            return await attempt()
        except SaveFailed as error:
            if not (left and error.source_alive and code_of(error) == Code.NOT_CONVERGING):
                raise
            await _require_running(stage.here, "a live copy that gave up")
            stage.event(f"tried again: {error}")
            await stage.until_loaded(stage.here, 10, stage.plan.operation_seconds)
    raise AssertionError("no try at all")


# ---- save and restore ------------------------------------------------------------------------------------------------


async def _save_and_end(stage: Stage, *, live: bool) -> tuple[SaveReport, Kept]:
    report, kept = await _save(stage, live=live, keep=False)
    await stage.end()
    return report, kept


async def _save(stage: Stage, *, live: bool, keep: bool) -> tuple[SaveReport, Kept]:
    """A snapshot, which is the last one then."""
    subject = stage.here
    kept = Kept(stage.path("snapshot"), subject.session)
    report = await _until_it_converges(stage, lambda: subject.vm.save(kept.directory, live=live, keep=keep))
    await stage.keep(kept)
    return report, kept


async def _save_restore(stage: Stage, *, live: bool) -> Figures:
    report, kept = await _save_and_end(stage, live=live)
    stage.subject = await stage.restored(kept)
    return _came_back(stage.here, report)


def _came_back(subject: Subject, report: SaveReport) -> Figures:
    restored = subject.vm.restored
    assert restored is not None
    _require_all(report.packets, subject.vm, "the restore")
    figures = _saved(report)
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
        await _require_running(subject, "a save onto a full disk")
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
        figures = _saved(report)
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
        _require_all(figures.packets, stage.here.vm, "the restore")
    figures.restore_seconds = restored.total
    figures.downtime = None  # the guest ran between the save and the death; that time is undone
    return figures


async def clone(stage: Stage, parameters: Parameters) -> Figures:
    """Two VMs from one snapshot: both go on, one is brought to its end and checked, the other goes on for good."""
    report, kept = await _save_and_end(stage, live=bool(parameters["live"]))
    async with contextlib.AsyncExitStack() as stack:
        stage.subject, other = await _both(stage.restored(kept), stage.restored(kept, clone=True), stack)
        figures = _came_back(stage.subject, report)
        _require_all(report.packets, other.vm, "the restore of the other clone")
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


# ---- migration -------------------------------------------------------------------------------------------------------


class _Wire:
    """What lies between source and destination: connections go on to an address, until it is cut."""

    def __init__(self, path: Path, to: UnixAddress) -> None:
        self.path = path
        self._to = to
        self._whole = asyncio.Event()
        self._whole.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> _Wire:
        self._server = await asyncio.start_unix_server(self._accept, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.path.unlink(missing_ok=True)

    def cut(self) -> None:
        """Nothing gets through any more, in either direction, and nobody is told."""
        self._whole.clear()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._whole.wait()
            there = await asyncio.open_unix_connection(self._to.path)
            await asyncio.gather(self._carry(reader, there[1]), self._carry(there[0], writer))
        except OSError:
            pass  # nobody listens there any more: as if refused
        finally:
            writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._whole.wait()
                writer.write(data)
                await writer.drain()
        await self._whole.wait()
        writer.close()


class _Journey:
    """A migration within this machine. `arriving`: the VM at the destination, as soon as it is being built."""

    def __init__(self, stage: Stage, address: Address) -> None:
        self._stage = stage
        self._address = address
        self._secret = secrets.token_bytes(32)
        self.arriving: list[VirtualMachine] = []
        self.refusal: BaseException | None = None
        """Why the destination gave up."""
        self.way = address
        """Where the source goes."""

    @contextlib.asynccontextmanager
    async def destination(self, **options: Any) -> AsyncIterator[asyncio.Task[VirtualMachine]]:
        """A destination that waits; it has ended when the block has, unless it has a VM."""
        arriving = self.arriving

        class Arriving(VirtualMachine):
            def __init__(self, *arguments: Any, **more: Any) -> None:
                super().__init__(*arguments, **more)
                arriving.append(self)

        stage = self._stage
        listener = await listen(self._address, self._secret)
        if self.way is self._address:
            self.way = listener.address
        work = Arriving.receive(
            listener, stage.programs, stage.run_directory(), timeout=_SOON, audit=stage.audit, **options
        )
        task = asyncio.create_task(work, name="destination")
        try:
            yield task
        finally:
            await asyncio.wait({task}, timeout=_SOON)
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
            if not task.cancelled():
                self.refusal = task.exception()

    async def leave(self, **options: Any) -> MigrationReport:
        """The source goes. Raises what a migration raises."""
        return await self._stage.here.vm.migrate(str(self.way), self._secret, **options)


def _address(stage: Stage, transport: str) -> Address:
    return TcpAddress("127.0.0.1", 0) if transport == "tcp" else UnixAddress(str(stage.path("m")))


async def migrate(stage: Stage, parameters: Parameters) -> Figures:
    """To another QEMU and another server on this machine, while the guest runs."""
    source = stage.here

    async def attempt() -> tuple[MigrationReport, VirtualMachine]:
        journey = _Journey(stage, _address(stage, str(parameters["transport"])))
        async with journey.destination() as destination:
            report = await journey.leave(multifd=int(parameters["multifd"]))
            return report, await destination

    report, vm = await _until_it_converges(stage, attempt)
    vm.programs = stage.programs
    stage.subject = Subject(vm, source.session.moved())
    if not source.vm.ended:
        raise Fault("the source runs on after its migration")
    _require_all(report.packets, vm, "the migration")
    return Figures(
        downtime=report.downtime,
        memory_bytes=report.ram_bytes,
        state_bytes=report.state_bytes,
        packets={**report.packets, "held": report.incoming_held},
    )


async def _must_fail(leaving: Awaitable[object], what: str) -> str:
    """Waits for a migration that is meant to fail. Why it did; the VM runs on, here only."""
    try:
        await leaving
    except MigrateFailed as error:
        if not error.source_alive:
            raise
        return str(error)
    except asyncio.CancelledError:
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise
        return "cancelled"
    raise Fault(f"a migration succeeded in spite of {what}")


async def _stayed(stage: Stage, journey: _Journey, what: str) -> None:
    await _require_running(stage.here, what)
    for vm in journey.arriving:
        if not vm.ended:
            await vm.kill()
            raise Fault(f"the destination has not ended its VM after {what}")


async def cancelled_migration(stage: Stage, parameters: Parameters) -> Figures:
    """Whoever asked for the migration takes that back; the VM runs on here."""
    wanted = Moment[str(parameters["moment"])]
    what = f"a migration that was cancelled {wanted.value}"
    journey = _Journey(stage, _address(stage, str(parameters["transport"])))

    async def at(moment: Moment) -> None:
        if moment is wanted:
            leaving.cancel()
            await asyncio.sleep(_SOON)  # where the cancellation arrives

    async with journey.destination():
        leaving = asyncio.create_task(journey.leave(multifd=int(parameters["multifd"]), at=at))
        message = await _must_fail(leaving, what)
    await _stayed(stage, journey, what)
    return Figures(outcome="refused", message=message)


async def sabotaged_migration(stage: Stage, parameters: Parameters) -> Figures:
    """Something breaks on the way; the VM runs on here."""
    blow, wanted = str(parameters["blow"]), Moment[str(parameters["moment"])]
    what = f"a migration whose {blow.replace('_', ' ')} broke {wanted.value}"
    address = UnixAddress(str(stage.path("m")))
    journey = _Journey(stage, address)
    options: dict[str, Any] = {}
    async with contextlib.AsyncExitStack() as stack:
        wire = None
        if blow == "link":
            wire = await stack.enter_async_context(_Wire(stage.path("w"), address))
            journey.way = UnixAddress(str(wire.path))
            options["silence"] = SILENCE

        async def source_at(moment: Moment) -> None:
            if moment is wanted and wire is not None:
                wire.cut()
                await asyncio.sleep(_SOON)  # until somebody notices that the link is dead

        async def destination_at(moment: Moment) -> None:
            if moment is wanted and wire is None:
                vm = journey.arriving[-1]
                child = vm.server if blow == "destination_server" else vm.qemu
                assert child is not None
                os.kill(child.pid, signal.SIGKILL)

        async with journey.destination(at=destination_at, **options):
            message = await _must_fail(journey.leave(at=source_at, **options), what)
    await _stayed(stage, journey, what)
    return Figures(outcome="refused", message=message)


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
