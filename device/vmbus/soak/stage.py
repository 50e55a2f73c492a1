"""What an episode works on: the VM that is there now, its workloads in the guest, and the books of both sides.

A `Subject` is one running VM with what is known of its guest's workloads. That knowledge (`Life`) belongs to a moment
of the VM: whoever goes back to a checkpoint or a snapshot takes the life of then.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vmbus.errors import VmbusError, WaitTimeout
from vmbus.observe.audit.checker import check_paths
from vmbus.observe.audit.guest import collect_audit
from vmbus.observe.audit.report import Report
from vmbus.operations.machine import VirtualMachine
from vmbus.server.control import ControlClient
from vmbus.soak.records import Count, EventRecord, Sample, WorkloadRecord
from vmbus.soak.schedule import EpisodePlan
from vmbus.soak.sink import Sink
from vmbus.soak.workloads import ALL_RECIPES
from vmbus.vm.command_line import Programs
from vmbus.vm.run_directory import RunDirectory

LOOK_INTERVAL = 0.05
"""Seconds between two looks at the server while something is waited for."""
LOAD_SECONDS = 20.0
"""For so long it is waited for enough packets in flight; then an operation begins with fewer, and an event says so."""
LOG_BYTES = 512 << 10
"""Of the end of each log that is kept."""
LOGS = ("server.log", "qemu.log", "console.log")
MIXED = "mixed"
WRONGS = ("lost", "duplicated", "reordered", "corrupted")

Options = Mapping[str, Mapping[str, Any]]

_BETWEEN = ("awaiting", "restoring")  # phases of a server whose books are not those of the VM yet
_JOB_INTERVAL = 1.0  # seconds between two looks whether the guest's driver still runs
# What a killed driver explains: its record stops short, or has nothing of its last channels.
_DEAD = ("guest-stops-short", "guest-missing")


class Wrong(VmbusError):
    """Something is not as it must be: the soak has found what it looks for."""


class KeepingDirectory(RunDirectory):
    """A run directory whose logs are kept when it is removed, whoever ends the VM."""

    keep: Path | None = None

    def remove(self) -> None:
        """Keep the logs' ends, then remove all."""
        if self.keep is not None:
            keep, self.keep = self.keep, None
            with contextlib.suppress(OSError):  # a full disk loses the logs, and nothing else
                keep.mkdir(mode=0o700, parents=True, exist_ok=True)
                for name in LOGS:
                    _keep_end(self / name, keep / name)
        super().remove()


def _keep_end(source: Path, target: Path) -> None:
    if not source.exists():
        return
    with source.open("rb") as file:
        file.seek(max(0, source.stat().st_size - LOG_BYTES))
        data = file.read()
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as kept:
        kept.write(data)


@dataclass(frozen=True)
class Life:
    """What is known of a VM's workloads at one moment of it.

    `job`: the guest's number of the driver that runs. `baseline`: the hosts' tallies when it was started. `before`:
    transactions completed by earlier drivers. `killed`: drivers that were killed up to then. `jobs`: with Linux's own
    drivers, the number of each workload's program. `moves`: how often the guest found itself restored, up to then;
    `backs`: how often with another end of its network than the one that it had spoken with, which has not gone back.
    """

    job: int
    baseline: dict[str, Count]
    before: int = 0
    killed: int = 0
    jobs: dict[str, int] = field(default_factory=dict)
    moves: int = 0
    backs: int = 0

    def moved(self, *, back: bool = False) -> Life:
        """This one, restored, migrated, or (`back`) taken back to."""
        return replace(self, moves=self.moves + 1, backs=self.backs + back)


@dataclass
class Subject:
    """See the module's text."""

    vm: VirtualMachine
    life: Life


@dataclass(frozen=True)
class Kept:
    """A snapshot that a VM can be restored from."""

    directory: Path
    life: Life


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
        self.checkpoints: dict[str, Life] = {}
        self.samples: list[Sample] = []
        self._each_run = {one.provider for one in plan.workloads if ALL_RECIPES[one.driver].each_run}
        self._began = time.monotonic()
        self._lives = 0
        self._names = 0

    @property
    def now(self) -> float:
        """Seconds since the episode's beginning."""
        return round(time.monotonic() - self._began, 3)

    @property
    def here(self) -> Subject:
        """The VM that is there."""
        if self.subject is None:
            raise Wrong("no VM is there")
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
        """For the next VM."""
        directory = KeepingDirectory.create(self.plan.vm.name)
        assert isinstance(directory, KeepingDirectory)
        directory.keep = self.folder / "logs" / f"{self._lives:03d}"
        self._lives += 1
        return directory

    async def boot(self) -> None:
        """Start the VM and its workloads. Raises what a launch raises."""
        vm = await VirtualMachine.launch(self.plan.vm, self.programs, self.run_directory(), audit=self.audit)
        self.subject = Subject(vm, Life(0, {}))
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
        return Subject(vm, kept.life.moved(back=back or clone))

    async def keep(self, kept: Kept | None) -> None:
        """The last snapshot, instead of the one before it."""
        old, self.snapshot = self.snapshot, kept
        if old is not None:
            await asyncio.to_thread(shutil.rmtree, old.directory, True)

    def going_back(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the VM that is there goes back to a checkpoint."""
        return contextlib.nullcontext()

    async def end(self) -> None:
        """End the VM that is there, if there is one."""
        if self.subject is not None:
            await self.subject.vm.kill()

    async def close(self) -> None:
        """The episode is over: let go of what is not of a VM."""

    # ---- workloads -----------------------------------------------------------------------------------------------

    async def start_workloads(self, *, before: int = 0, killed: int = 0) -> None:
        """Start the plan's workloads in the guest. Raises VmbusError."""
        vm = self.here.vm
        status = await vm.call_server("status")
        parameters = {"workloads": [{"driver": one.driver, **one.parameters} for one in self.plan.workloads]}
        started = await vm.call_agent("start", driver=MIXED, parameters=parameters)
        self.here.life = Life(int(started["job"]), tallies(status), before, killed)

    async def status(self, subject: Subject) -> dict[str, Any]:
        """What the server says, and what else the books need. Raises VmbusError."""
        return await subject.vm.call_server("status")

    def transactions(self, subject: Subject, status: dict[str, Any]) -> int:
        """Completed since the episode's beginning, as the host counts."""
        mine = {one.provider for one in self.plan.workloads}
        counted = [self._counted(subject, name, tally) for name, tally in tallies(status).items() if name in mine]
        return subject.life.before + sum(tally["completed"] for tally in counted)

    def _counted(self, subject: Subject, provider: str, tally: Count) -> Count:
        """What a provider has counted since the driver was started that runs now."""
        baseline = subject.life.baseline.get(provider, {})
        if provider in self._each_run and tally != baseline:
            return tally
        return {kind: count - baseline.get(kind, 0) for kind, count in tally.items()}

    async def until_loaded(self, subject: Subject, after: int, timeout: float) -> dict[str, Any]:
        """Wait until `after` further transactions are completed, each workload has moved on, and enough packets are in
        flight; returns the server's status then.

        Raises Wrong if a workload ends or a book shows a fault, WaitTimeout, ProcessDied.
        """
        first: dict[str, Any] | None = None
        deadline = time.monotonic() + timeout
        enough = time.monotonic() + LOAD_SECONDS
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
                if not loaded:
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
        """Whether enough packets are in flight for an operation."""
        return min(packets["queued"], packets["sent"]) >= self.plan.packets

    def _still(self, first: dict[str, Any], status: dict[str, Any]) -> list[str]:
        """Workloads that have completed nothing in between."""
        was, now = tallies(first), tallies(status)
        return [
            one.driver
            for one in self.plan.workloads
            if one.provider in now and now[one.provider]["completed"] == was[one.provider]["completed"]
        ]

    async def _require_job(self, subject: Subject) -> None:
        report = await subject.vm.call_agent("poll", job=subject.life.job)
        if report["state"] != "running":
            raise Wrong(f"the guest's workloads ended by themselves: {_say(report)}")

    async def words(self, subject: Subject) -> dict[str, Any]:
        """What the guest has to say of a failure."""
        return await subject.vm.call_agent("poll", job=subject.life.job)

    def check_books(self, subject: Subject, status: dict[str, Any]) -> None:
        """Raises Wrong if the host's books show that something was lost, duplicated, reordered or corrupted."""
        for name, tally in tallies(status).items():
            counted = self._counted(subject, name, tally)
            wrong = {kind: counted[kind] for kind in WRONGS if counted.get(kind)}
            if wrong:
                raise Wrong(f"the books of provider {name!r} say: {_counts(wrong)}")
        for name, provider in status["providers"].items():
            if count := provider.get("wrong"):
                raise Wrong(f"the books of provider {name!r} are wrong on {count} channels: {provider}")

    async def finish(self, subject: Subject) -> tuple[list[WorkloadRecord], str, list[str]]:
        """Stop the workloads, and compare all books: the records, the auditor's verdict, and what is wrong.

        Raises VmbusError if the VM or its guest does not answer.
        """
        vm, life = subject.vm, subject.life
        await vm.call_agent("stop", job=life.job)
        report = await self._job_end(subject, life.job)
        status = await vm.call_server("status")
        records, wrong = self._compare(subject, report, status)
        verdict, broken = await self._auditor(subject)
        return records, verdict, wrong + broken

    async def _job_end(self, subject: Subject, job: int) -> dict[str, Any]:
        deadline = time.monotonic() + self.plan.finish_seconds
        while (left := deadline - time.monotonic()) > 0:
            part = min(10.0, left)
            report = await subject.vm.call_agent("wait", job=job, timeout=part + 10.0)
            if report["state"] != "running":
                return report
        raise WaitTimeout("the guest's workloads to end after they were stopped", self.plan.finish_seconds)

    def _compare(
        self, subject: Subject, report: dict[str, Any], status: dict[str, Any]
    ) -> tuple[list[WorkloadRecord], list[str]]:
        wrong: list[str] = []
        result = report.get("result") or {}
        if report["state"] != "finished":
            wrong.append(f"the guest's workloads {report['state']}: {_say(report)}")
        theirs = tallies(status)
        found: list[dict[str, Any]] = list(result.get("workloads", []))
        records = []
        for number, plan in enumerate(self.plan.workloads):
            mine = found[number] if number < len(found) else {}
            record = WorkloadRecord(
                driver=plan.driver,
                parameters=plan.parameters,
                verdict=str(mine.get("verdict", "none")),
                transactions=int(mine.get("completed", 0)),
                **{kind: int(mine.get(kind, 0)) for kind in WRONGS},
                message="; ".join(map(str, mine.get("trouble", []))),
            )
            records.append(record)
            if mine and record.verdict != "passed":
                wrong.append(f"workload {plan.driver}, as the guest counts: {_say_result(mine)}")
            host = theirs.get(plan.provider)
            if host is None or not mine:
                continue
            counted = self._counted(subject, plan.provider, host)
            faults = {kind: counted[kind] for kind in WRONGS if counted.get(kind)}
            if faults:
                wrong.append(f"workload {plan.driver}, as the host counts: {_counts(faults)}")
            if not counted["started"] == counted["completed"] == record.transactions:
                wrong.append(
                    f"workload {plan.driver}: the guest completed {record.transactions} transactions; the host began "
                    f"{counted['started']} and completed {counted['completed']}"
                )
        left = flight(status)
        if any(left.values()):
            wrong.append(f"packets are still in flight at the end: {_counts(left)}")
        return records, wrong

    async def _auditor(self, subject: Subject) -> tuple[str, list[str]]:
        """The auditor's verdict, and what it has found wrong; nothing, where no records are kept."""
        if self.audit is None:
            return "", []
        await collect_audit(subject.vm)
        leaf = str((await subject.vm.call_server("audit"))["uid"])
        found = await asyncio.to_thread(check_paths, [self.audit], leaf=leaf)
        return found.verdict, self._judge(found, subject.life)

    def _judge(self, report: Report, life: Life) -> list[str]:
        """What speaks against a record. A driver that was killed leaves one that stops short."""
        if report.verdict == "broken":
            return [f"the auditor: {report.problems[0]}"]
        if report.verdict == "clean":
            return []
        unproven = [gap for gap in report.missing if not (life.killed and gap.code in _DEAD)]
        return [f"the auditor could not prove all: {unproven[0]}"] if unproven else []

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


def tallies(status: dict[str, Any]) -> dict[str, Count]:
    """The books of a server's providers that keep any, by name."""
    found = {}
    for name, provider in status["providers"].items():
        if isinstance(tally := provider.get("tally"), dict):
            found[name] = {str(kind): int(count) for kind, count in tally.items()}
    return found


def flight(status: dict[str, Any]) -> Count:
    """Packets in flight by state: the host's ``queued`` and ``sent`` ones, and the guest's ``held`` by providers."""
    packets = status["packets"]
    return {"queued": int(packets["queued"]), "sent": int(packets["sent"]), "held": int(status["incoming_held"])}


def _counts(counts: Count) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _say_result(result: dict[str, Any]) -> str:
    counts = ", ".join(f"{key} {result[key]}" for key in ("completed", *WRONGS) if key in result)
    return "; ".join([counts, *map(str, result.get("trouble", []))])


def _say(report: dict[str, Any]) -> str:
    error = report.get("error")
    if error:
        return str(error.get("message", error))
    results = (report.get("result") or {}).get("workloads", [])
    return " | ".join(f"{one.get('name')}: {_say_result(one)}" for one in results) or "it says nothing"
