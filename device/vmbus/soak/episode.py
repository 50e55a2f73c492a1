"""One episode of a campaign: a VM is booted, its workloads start, the plan's operations are carried out one after the
other while they run, then the workloads are stopped and all books are compared.

The first thing that goes wrong ends the episode: what would come after it says nothing any more. What is left in its
folder then, for people: ``plan.json`` (written by whoever runs it), ``logs/NNN`` of each VM in the order of their
starts, ``audit`` with the records of both ends, ``snapshot`` (the last one), ``inspect.json`` and ``guest.json`` (what
the server and the guest said last), and ``traceback.txt`` for an error that nobody foresaw.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from vmbus.errors import VmbusError, WaitTimeout, code_of
from vmbus.observe.audit.guest import collect_audit
from vmbus.providers.disk.image import DIRECTORY_VARIABLE
from vmbus.provision import provision, provision_debian
from vmbus.snapshot.bundle import utc_now
from vmbus.soak.books import flight
from vmbus.soak.entries import code_from, environment
from vmbus.soak.figures import Figures
from vmbus.soak.operations import operation_of
from vmbus.soak.plan import EpisodePlan, OperationPlan
from vmbus.soak.records import EpisodeRecord, OperationRecord, Verdict, WorkloadRecord
from vmbus.soak.sink import Sink
from vmbus.soak.stage import Stage
from vmbus.soak.stock import StockStage
from vmbus.util.patience import patient
from vmbus.vm.command_line import Programs, programs_from
from vmbus.vm.run_directory import RunDirectory, private_base

SAMPLE_INTERVAL = 0.5
"""Seconds between two samples."""
MOST_SAMPLES = 2000
STOP_PATIENCE = 15.0
"""Seconds that an operation has to end when the episode is interrupted."""
_BOOT_SECONDS = 300.0
_KEEP_SECONDS = 30.0  # for each thing that is asked of a VM after a failure


def scratch_base() -> Path:
    """Where the large files of running episodes are. Raises EnvironmentProblem if it cannot be made."""
    return private_base("vmbus-soak", large=True)


async def run_episode(
    plan: EpisodePlan,
    folder: Path,
    sink: Sink,
    *,
    stop: asyncio.Event | None = None,
    programs: Programs | None = None,
) -> EpisodeRecord:
    """Carry out a plan. What is kept of a failure is in `folder`; nothing of the episode runs on when this returns.

    `stop`: once set, the episode ends early. Whatever goes wrong is in the record; raises only what prevents an episode
    from beginning (EnvironmentProblem, UsageError).
    """
    started = utc_now()
    if programs is None:
        programs = programs_from(await asyncio.to_thread(provision))
    if plan.vm.guest.root and programs.debian is None:
        programs = replace(programs, debian=(await asyncio.to_thread(provision_debian)).image)
    scratch = RunDirectory.create(f"e{plan.episode}", base=scratch_base())
    stage = (StockStage if plan.vm.guest.linux else Stage)(plan, folder, scratch.path, programs, sink)
    episode = _Episode(stage, stop or asyncio.Event())
    surroundings = contextlib.ExitStack()
    surroundings.enter_context(code_from(plan.path, [one.kind for one in plan.vm.device.providers]))
    if plan.vm.guest.linux:
        surroundings.enter_context(environment(**{DIRECTORY_VARIABLE: str(scratch.path / "disks")}))
    sampling = asyncio.create_task(stage.sample(SAMPLE_INTERVAL, MOST_SAMPLES), name="samples")
    try:
        await episode.run()
        if episode.failure:
            await episode.keep()
    finally:
        sampling.cancel()
        await asyncio.wait({sampling})
        await stage.end()
        await stage.close()
        surroundings.close()
        await asyncio.to_thread(scratch.remove)
    return EpisodeRecord(
        episode=plan.episode,
        seed=plan.seed,
        verdict=episode.verdict,
        started=started,
        seconds=stage.now,
        workloads=episode.workloads,
        operations=episode.operations,
        audit=episode.audit,
        samples=stage.samples,
        failure=episode.failure,
        code=episode.code,
    )


class _Episode:
    def __init__(self, stage: Stage, stop: asyncio.Event) -> None:
        self._stage = stage
        self._stop = stop
        self.failure = ""
        self.code = ""
        self.operations = 0
        self.workloads: list[WorkloadRecord] = []
        self.audit = ""

    @property
    def verdict(self) -> Verdict:
        if self.failure:
            return "failed"
        return "interrupted" if self._stop.is_set() else "passed"

    async def run(self) -> None:
        """All of it, up to the first failure."""
        stage = self._stage
        work = asyncio.create_task(self._all(), name="episode")
        stopping = asyncio.create_task(self._stop.wait(), name="interruption")
        try:
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                stage.event("the episode is interrupted")
                await asyncio.wait({work}, timeout=STOP_PATIENCE)
        finally:
            stopping.cancel()
            work.cancel()
            await asyncio.wait({work, stopping})
        if not work.cancelled() and (error := work.exception()) is not None:
            self._fail("", error)

    async def _all(self) -> None:
        stage, plan = self._stage, self._stage.plan
        stage.sink.phase("boot")
        async with asyncio.timeout(patient(_BOOT_SECONDS)):
            await stage.boot()
        drivers = "Linux's own drivers and " if plan.vm.guest.linux else ""
        stage.event(f"the VM is up, with {drivers}{', '.join(one.driver for one in stage.plan.workloads)}")
        for number, operation in enumerate(plan.operations):
            if self._stop.is_set() or self.failure:
                return
            await self._carry_out(number, operation)
        if self._stop.is_set() or self.failure:
            return
        stage.sink.phase("end of the workloads")
        await stage.until_loaded(stage.here, 1, plan.operation_seconds)
        self.workloads, self.audit, wrong = await stage.finish(stage.here)
        if wrong:
            self.failure = f"at the end: {'; '.join(wrong)}"
            stage.event(self.failure, serious=True)

    async def _carry_out(self, number: int, operation: OperationPlan) -> None:
        stage, plan = self._stage, self._stage.plan
        words = ", ".join(f"{key} {value}" for key, value in operation.parameters.items())
        text = f"operation {number}, {operation.kind}" + (f" ({words})" if words else "")
        stage.sink.phase(text)
        begin = entered = stage.now
        figures = Figures(outcome="failed")
        before = None
        bound = 0.9 * plan.operation_seconds  # of the waits for load, which can say what they wait for
        try:
            async with asyncio.timeout(plan.operation_seconds):
                status = await stage.until_loaded(stage.here, operation.after, bound)
                before = flight(status)
                begin = stage.now
                figures = await operation_of(plan, operation.kind)(stage, operation.parameters)
                seconds = stage.now - begin
                # What the operation broke is told of this one and not of the next: it shows when as many transactions
                # are completed as were under way.
                under_way = sum((figures.packets or before).values())
                await stage.until_loaded(stage.here, under_way, max(0.0, entered + bound - stage.now))
            self.operations += 1
        except Exception as error:
            seconds = stage.now - begin
            if isinstance(error, TimeoutError):
                error = WaitTimeout(f"{text} to end", plan.operation_seconds)
            figures = Figures(outcome="failed", message=str(error) or repr(error))
            self._fail(text, error)
        found = msgspec.structs.asdict(figures)
        for name in ("downtime", "save_seconds", "restore_seconds"):
            found[name] = None if found[name] is None else round(found[name], 4)
        found["packets"] = figures.packets or before or {}
        place: dict[str, Any] = {"episode": plan.episode, "number": number, "at": begin, "seconds": round(seconds, 3)}
        stage.sink.operation(OperationRecord(kind=operation.kind, parameters=operation.parameters, **place, **found))

    def _fail(self, where: str, error: BaseException) -> None:
        text = str(error) or repr(error)
        if isinstance(error, TimeoutError) and not isinstance(error, VmbusError):
            text = f"it took longer than it may: {error!r}"
        if not self.failure:
            self.failure, self.code = (f"{where}: {text}" if where else text), code_of(error)
        self._stage.event(self.failure, serious=True)
        if not isinstance(error, (VmbusError, OSError, TimeoutError)):
            with contextlib.suppress(OSError):
                _write(self._stage.folder / "traceback.txt", "".join(traceback.format_exception(error)).encode())

    async def keep(self) -> None:
        """What people will want to see of a failure, as far as it can be had."""
        stage = self._stage
        stage.sink.phase("keeping what is left of the failure")
        subject = stage.subject
        if subject is not None and not subject.vm.ended:
            vm = subject.vm
            with contextlib.suppress(VmbusError, OSError, TimeoutError):
                async with asyncio.timeout(_KEEP_SECONDS):
                    _write(stage.folder / "inspect.json", _json(await vm.call_server("inspect")))
            with contextlib.suppress(VmbusError, OSError, TimeoutError):
                async with asyncio.timeout(_KEEP_SECONDS):
                    _write(stage.folder / "guest.json", _json(await stage.words(subject)))
            with contextlib.suppress(VmbusError, OSError, TimeoutError):
                async with asyncio.timeout(_KEEP_SECONDS):
                    if stage.audit is not None and not self.audit:
                        await collect_audit(vm)
        if stage.snapshot is not None:
            with contextlib.suppress(OSError):
                await asyncio.to_thread(shutil.move, stage.snapshot.directory, stage.folder / "snapshot")


def _json(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
