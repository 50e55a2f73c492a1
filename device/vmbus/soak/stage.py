"""What an episode works on: the VM that is there now, its workloads in the guest, and the books of both sides.

A `Subject` is one running VM with what is known of its guest's workloads. That knowledge (`Session`) belongs to a
moment of the VM: whoever goes back to a checkpoint or a snapshot takes the session of then.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vmbus.errors import VmbusError, WaitTimeout
from vmbus.observe.audit.checker import check_paths
from vmbus.observe.audit.guest import collect_audit
from vmbus.operations.machine import VirtualMachine
from vmbus.server.control import ControlClient
from vmbus.soak.books import (
    FAULTS,
    MIXED,
    Fault,
    Session,
    disagreements,
    flight,
    in_words,
    judge,
    number_at,
    report_in_words,
    result_in_words,
    tallies,
)
from vmbus.soak.logs import KeepingDirectory
from vmbus.soak.plan import EpisodePlan, WorkloadPlan
from vmbus.soak.records import Count, EventRecord, Sample, WorkloadRecord
from vmbus.soak.sink import Sink
from vmbus.soak.workloads import ALL_RECIPES
from vmbus.testkit.driver_file import DriverFile, install
from vmbus.vm.command_line import Programs

LOOK_INTERVAL = 0.05
"""Seconds between two looks at the server while something is waited for."""
LOAD_SECONDS = 20.0
"""For so long it is waited for enough packets in flight; then an operation begins with fewer, and an event says so."""

Options = Mapping[str, Mapping[str, Any]]

_BETWEEN = ("awaiting", "restoring")  # phases of a server whose books are not those of the VM yet
_COMMAND_SECONDS = 30.0
_ANY_SECONDS = 2.0  # the same, where any packet in flight will do
_JOB_INTERVAL = 1.0  # seconds between two looks whether the guest's driver still runs


@dataclass
class Subject:
    """See the module's text."""

    vm: VirtualMachine
    session: Session


@dataclass(frozen=True)
class Kept:
    """A snapshot that a VM can be restored from."""

    directory: Path
    session: Session


class Stage:
    """One episode's means. `subject` is there from `boot` on."""

    look_interval = LOOK_INTERVAL

    def __init__(self, plan: EpisodePlan, folder: Path, scratch: Path, programs: Programs, sink: Sink) -> None:
        """`folder`: what is kept of a failure lies here; `scratch`: for large files, gone at the end."""
        self.plan = plan
        self.folder = folder
        self.scratch = scratch
        self.programs = programs
        self.sink = sink
        self.audit = folder / "audit" if plan.audit else None
        self.subject: Subject | None = None
        self.snapshot: Kept | None = None
        self.checkpoints: dict[str, Session] = {}
        self.samples: list[Sample] = []
        self._each_run = {one.provider for one in plan.workloads if not one.own and ALL_RECIPES[one.driver].each_run}
        self._counts: Count = {}  # by workload, as the guest said last
        self._began = time.monotonic()
        self._lives = 0
        self._names = 0

    @property
    def now(self) -> float:
        """Seconds since the episode's beginning."""
        return round(time.monotonic() - self._began, 3)

    @property
    def here(self) -> Subject:
        if self.subject is None:
            raise Fault("no VM is there")
        return self.subject

    def event(self, text: str, *, serious: bool = False) -> None:
        """Tell readers."""
        self.sink.event(EventRecord(episode=self.plan.episode, at=self.now, text=text, serious=serious))

    def path(self, what: str) -> Path:
        """A path for a large file or directory that is not there yet."""
        self._names += 1
        return self.scratch / f"{what}-{self._names}"

    # ---- VMs that come and go ------------------------------------------------------------------------------------

    def run_directory(self) -> KeepingDirectory:
        directory = KeepingDirectory.create(self.plan.vm.name)
        assert isinstance(directory, KeepingDirectory)
        directory.keep = self.folder / "logs" / f"{self._lives:03d}"
        self._lives += 1
        return directory

    async def boot(self) -> None:
        """Start the VM and its workloads. Raises what a launch raises."""
        vm = await VirtualMachine.launch(self.plan.vm, self.programs, self.run_directory(), audit=self.audit)
        self.subject = Subject(vm, Session({}, {}))
        await vm.wait_ready()
        await self.start_workloads()

    async def restored(
        self, kept: Kept, *, clone: bool = False, back: bool = False, options: Options | None = None
    ) -> Subject:
        """Another VM from a snapshot. Raises what a restore raises.

        `clone`: beside one that goes on from it. `back`: the VM has gone on since. `options`: of providers.
        """
        vm = await VirtualMachine.restore(
            kept.directory, self.programs, self.run_directory(), audit=self.audit, clone=clone, options=options
        )
        vm.programs = self.programs  # the same files as those in the snapshot, which may go before the VM does
        return Subject(vm, kept.session.moved(back=back or clone))

    async def keep(self, kept: Kept | None) -> None:
        """The last snapshot, instead of the one before it."""
        old, self.snapshot = self.snapshot, kept
        if old is not None:
            await asyncio.to_thread(shutil.rmtree, old.directory, True)

    def going_back(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the VM that is there goes back to a checkpoint."""
        return contextlib.nullcontext()

    async def end(self) -> None:
        if self.subject is not None:
            await self.subject.vm.kill()

    async def close(self) -> None:
        """The episode is over: let go of what is not of a VM."""

    async def ask_server(self, command: str, /, **arguments: Any) -> dict[str, Any]:
        """A command to the device server of the VM that is there; its answer. Raises VmbusError."""
        vm = self.here.vm
        assert vm.control is not None
        work = vm.control.call(command, timeout=_COMMAND_SECONDS, **arguments)
        return await vm.guard(work, f"the device server's answer to {command!r}", _COMMAND_SECONDS + 1)

    async def command(self, provider: str, command: str, /, **arguments: Any) -> dict[str, Any]:
        """A command to a provider, by its name; its answer. Raises VmbusError."""
        return await self.ask_server("provider", name=provider, command=command, arguments=arguments)

    async def run_in_guest(self, argv: Sequence[str], vm: VirtualMachine | None = None) -> str:
        """Run a program in the guest (of another VM); its output. Raises Fault unless it ends with status 0."""
        done = await (vm or self.here.vm).run_in_guest(argv, timeout=self.plan.operation_seconds)
        if done.code:
            raise Fault(f"{' '.join(argv)} in the guest ended with {done.code}: {done.output[-500:]}")
        return str(done.output)

    # ---- workloads -----------------------------------------------------------------------------------------------

    async def start_workloads(self, *, before: int = 0, killed: int = 0) -> None:
        """Start the plan's workloads in the guest. Raises VmbusError."""
        await self._install()
        session = await self._open_books(before, killed)
        together = [one for one in self.plan.workloads if not one.alone]
        jobs = {}
        if together:
            parts = [{"driver": one.runs or one.driver, **one.parameters} for one in together]
            jobs[MIXED] = await self._start(MIXED, {"workloads": parts})
        for one in self.plan.workloads:
            if one.alone:
                jobs[one.driver] = await self._start(one.runs, one.parameters)
        self.here.session = replace(session, jobs=jobs)

    async def _install(self) -> None:
        files = {one.runs: one.source for one in self.plan.workloads if one.source}
        await install(self.here.vm, [DriverFile(name, source, True) for name, source in files.items()])

    async def _start(self, driver: str, parameters: dict[str, Any]) -> int:
        started = await self.here.vm.call_agent("start", driver=driver, parameters=parameters)
        return int(started["job"])

    async def _open_books(self, before: int, killed: int) -> Session:
        """A session without its jobs; made before they start, so that nothing of theirs is taken for older."""
        status = await self.here.vm.call_server("status")
        marks = {
            one.driver: {path: number_at(status, one, path) for path in one.verdict.values()}
            for one in self.plan.workloads
            if one.verdict
        }
        return Session({}, tallies(status), before, killed, marks)

    async def status(self, subject: Subject) -> dict[str, Any]:
        """What the server says, and what else the books need. Raises VmbusError."""
        status = await subject.vm.call_server("status")
        if not any(one.own for one in self.plan.workloads):
            return status
        return self._with_reports(status, await self._reports(subject))

    async def _reports(self, subject: Subject) -> dict[str, dict[str, Any]]:
        """What the guest's programs say."""
        return {name: await subject.vm.call_agent("poll", job=job) for name, job in subject.session.jobs.items()}

    def _with_reports(self, status: dict[str, Any], reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """With `counts` (transactions of each workload that the guest counts), and `reports`."""
        status = {**status, "reports": reports}
        self._counts = {
            one.driver: count for one in self.plan.workloads if (count := self._count(one, status)) is not None
        }
        return {**status, "counts": self._counts}

    def _count(self, one: WorkloadPlan, status: dict[str, Any]) -> int | None:
        """How far a workload is, as the guest counts; None for one whose transactions the host counts."""
        return int(self._said(one, status["reports"], "progress").get("completed", 0)) if one.own else None

    def _said(self, one: WorkloadPlan, reports: dict[str, dict[str, Any]], what: str) -> dict[str, Any]:
        """What the guest says of a workload: its part of the `progress`, or the `result`, of its program."""
        alone = one.driver in reports
        whole: dict[str, Any] = (reports.get(one.driver if alone else MIXED) or {}).get(what) or {}
        if alone:
            return whole
        together = [other for other in self.plan.workloads if not other.alone]
        parts = whole.get("workloads", [whole] if len(together) == 1 else [])
        at = together.index(one)
        return dict(parts[at]) if at < len(parts) else {}

    def transactions(self, subject: Subject, status: dict[str, Any]) -> int:
        """Completed since the episode's beginning: as the host counts, or the guest."""
        mine = {one.provider for one in self.plan.workloads if not one.own}
        counted = [self._counted(subject, name, tally) for name, tally in tallies(status).items() if name in mine]
        counts: Count = status.get("counts", self._counts)  # a sample does not ask the guest
        return subject.session.before + sum(tally["completed"] for tally in counted) + sum(counts.values())

    def _counted(self, subject: Subject, provider: str, tally: Count) -> Count:
        """What a provider has counted since the driver was started that runs now."""
        baseline = subject.session.baseline.get(provider, {})
        if provider in self._each_run and tally != baseline:
            return tally
        return {kind: count - baseline.get(kind, 0) for kind, count in tally.items()}

    async def until_loaded(self, subject: Subject, after: int, timeout: float) -> dict[str, Any]:
        """Wait until `after` further transactions are completed, each workload has moved on, and enough packets are in
        flight; returns the server's status then.

        Raises Fault if a workload ends or a book shows a fault, WaitTimeout, ProcessDied.
        """
        first: dict[str, Any] | None = None
        deadline = time.monotonic() + timeout
        enough = time.monotonic() + (LOAD_SECONDS if self.plan.packets else _ANY_SECONDS)
        look = time.monotonic() + _JOB_INTERVAL
        while True:
            status = await self.status(subject)
            self.check_books(subject, status)
            now = time.monotonic()
            if first is None or self.transactions(subject, status) < self.transactions(subject, first):
                first = status  # the first, or books that begin anew
            moved = self.transactions(subject, status) - self.transactions(subject, first)
            still = self._still(first, status)
            packets = flight(status)
            loaded = self._loaded(packets)
            if moved >= after and not still and (loaded or now > enough):
                if not loaded and self.plan.packets:
                    self.event(f"fewer packets in flight than wanted ({self.plan.packets} in each state): {packets}")
                return status
            if now > look:
                look = now + _JOB_INTERVAL
                await self._require_job(subject)
            if now > deadline:
                what = f"{after} transactions more ({moved} there)"
                if still:
                    what += f", nothing moved at {', '.join(still)}"
                raise WaitTimeout(f"the load to go on: {what}; in flight: {packets}", timeout)
            await asyncio.sleep(self.look_interval)

    def _loaded(self, packets: Count) -> bool:
        """Whether enough packets are in flight for an operation. Without a workload of ours that sees to it: any."""
        if not self.plan.packets:
            return any(packets.values())
        return min(packets["queued"], packets["sent"]) >= self.plan.packets

    def _still(self, first: dict[str, Any], status: dict[str, Any]) -> list[str]:
        """Workloads that have completed nothing in between."""
        was, now = tallies(first), tallies(status)
        return [
            one.driver
            for one in self.plan.workloads
            if not one.own and one.provider in now and now[one.provider]["completed"] == was[one.provider]["completed"]
        ] + [name for name, count in status.get("counts", {}).items() if count <= first["counts"].get(name, 0)]

    async def _require_job(self, subject: Subject) -> None:
        for name, report in (await self._reports(subject)).items():
            if report["state"] != "running":
                what = "workloads" if name == MIXED else f"workload {name}"
                raise Fault(f"the guest's {what} ended by themselves: {report_in_words(report)}")

    async def words(self, subject: Subject) -> dict[str, Any]:
        """What the guest has to say of a failure."""
        return {"reports": await self._reports(subject)}

    def check_books(self, subject: Subject, status: dict[str, Any]) -> None:
        """Raises Fault if the host's books show that something was lost, duplicated, reordered or corrupted."""
        for name, tally in tallies(status).items():
            counted = self._counted(subject, name, tally)
            wrong = {kind: counted[kind] for kind in FAULTS if counted.get(kind)}
            if wrong:
                raise Fault(f"the books of provider {name!r} say: {in_words(wrong)}")
        for name, provider in status["providers"].items():
            if count := provider.get("wrong"):
                raise Fault(f"the books of provider {name!r} are wrong on {count} channels: {provider}")
        for one in self.plan.workloads if "reports" in status else ():
            said = self._said(one, status["reports"], "progress")
            if one.own and (wrong := {kind: said[kind] for kind in FAULTS if said.get(kind)}):
                raise Fault(f"workload {one.driver}, as the guest counts: {in_words(wrong)}")

    async def finish(self, subject: Subject) -> tuple[list[WorkloadRecord], str, list[str]]:
        """Stop the workloads, and compare all books: the records, the auditor's verdict, and what is wrong.

        Raises VmbusError if the VM or its guest does not answer.
        """
        reports = await self._ends(subject)
        status = await subject.vm.call_server("status")
        records, wrong = self._compare(subject, reports, status)
        verdict, broken = await self._auditor(subject)
        return records, verdict, wrong + broken

    async def _ends(self, subject: Subject) -> dict[str, dict[str, Any]]:
        """The reports of the guest's programs, which are stopped."""
        for job in subject.session.jobs.values():
            await subject.vm.call_agent("stop", job=job)
        return {name: await self._job_end(subject, job) for name, job in subject.session.jobs.items()}

    async def _job_end(self, subject: Subject, job: int) -> dict[str, Any]:
        deadline = time.monotonic() + self.plan.finish_seconds
        while (left := deadline - time.monotonic()) > 0:
            part = min(10.0, left)
            report = await subject.vm.call_agent("wait", job=job, timeout=part + 10.0)
            if report["state"] != "running":
                return report
        raise WaitTimeout("the guest's workloads to end after they were stopped", self.plan.finish_seconds)

    def _compare(
        self, subject: Subject, reports: dict[str, dict[str, Any]], status: dict[str, Any]
    ) -> tuple[list[WorkloadRecord], list[str]]:
        wrong = []
        for name, report in reports.items():
            if report["state"] != "finished":
                what = "workloads" if name == MIXED else f"workload {name}"
                wrong.append(f"the guest's {what} {report['state']}: {report_in_words(report)}")
        theirs = tallies(status)
        records = []
        for one in self.plan.workloads:
            mine = self._said(one, reports, "result")
            record = WorkloadRecord(
                driver=one.driver,
                parameters=one.parameters,
                verdict=str(mine.get("verdict", "none")),
                transactions=int(mine.get("completed", 0)),
                **{kind: int(mine.get(kind, 0)) for kind in FAULTS},
                message="; ".join(map(str, mine.get("trouble", []))),
            )
            records.append(record)
            if not mine:
                continue
            if record.verdict != "passed":
                wrong.append(f"workload {one.driver}, as the guest counts: {result_in_words(mine)}")
            wrong += disagreements(subject.session, one, mine, status)
            host = theirs.get(one.provider)
            if host is None:
                continue
            counted = self._counted(subject, one.provider, host)
            faults = {kind: counted[kind] for kind in FAULTS if counted.get(kind)}
            if faults:
                wrong.append(f"workload {one.driver}, as the host counts: {in_words(faults)}")
            done = record.transactions
            if not counted.get("started", done) == counted.get("completed", done) == done:
                wrong.append(
                    f"workload {one.driver}: the guest completed {done} transactions; the host began "
                    f"{counted.get('started', '?')} and completed {counted.get('completed', '?')}"
                )
        left = flight(status)
        if any(left.values()):
            wrong.append(f"packets are still in flight at the end: {in_words(left)}")
        return records, wrong

    async def _auditor(self, subject: Subject) -> tuple[str, list[str]]:
        """The auditor's verdict, and what it has found wrong; nothing, where no records are kept."""
        if self.audit is None:
            return "", []
        await collect_audit(subject.vm)
        leaf = str((await subject.vm.call_server("audit"))["uid"])
        found = await asyncio.to_thread(check_paths, [self.audit], leaf=leaf)
        return found.verdict, judge(found, subject.session)

    # ---- samples -------------------------------------------------------------------------------------------------

    async def sample(self, interval: float, most: int) -> None:
        """Take a sample every `interval` seconds, at most `most` of them, until cancelled. Over a connection of its
        own: nobody waits for it."""
        while len(self.samples) < most:
            await asyncio.sleep(interval)
            subject = self.subject
            if subject is not None and not subject.vm.ended:
                with contextlib.suppress(VmbusError, OSError, KeyError, AssertionError):
                    control = ControlClient(subject.vm.paths.control)
                    try:
                        status = await control.call("status", timeout=5.0)
                    finally:
                        control.close()
                    if status["phase"] in _BETWEEN:
                        continue
                    sample = Sample(
                        at=self.now, transactions=self.transactions(subject, status), in_flight=flight(status)
                    )
                    self.samples.append(sample)
                    self.sink.sample(sample)
