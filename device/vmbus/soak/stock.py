"""The stage of an episode whose guest has Linux's own drivers: a file system on a disk, sockets, a card and heartbeats.

The workloads are programs of the guest's without a channel, so the server has no books of theirs. Theirs are what the
guest's programs say, what the other ends on this host say, and what the guest's kernel has written into its log.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from vmbus.errors import EnvironmentProblem
from vmbus.providers.disk.image import DIRECTORY_VARIABLE
from vmbus.qemu.machine import VirtualMachine
from vmbus.soak.outside import GUEST, HOST, PREFIX_LENGTH, Outside, why_not
from vmbus.soak.peer import GUEST_PORT, PORT, Peer
from vmbus.soak.records import Count, WorkloadRecord
from vmbus.soak.schedule import EpisodePlan, WorkloadPlan
from vmbus.soak.settings import DISK_LOSES_A_BLOCK
from vmbus.soak.stage import Kept, Life, Stage, Subject, Wrong
from vmbus.soak.workloads import IMAGE

CONNECTIONS = 2
"""Of the workload `vsock`: a restore ends them, and nothing else does."""
HUNG_SECONDS = 30
"""The guest's kernel tells of a task that waits for so long for what the host owes it."""
BAD_WORDS = re.compile(
    r"WARNING:|BUG:|Call Trace|soft lockup|general protection|blocked for more than|I/O error|EXT4-fs (error|warning)|"
    r"tag#\d+.*(status|srb)|Invalid pkt|Incorrect transaction ID|Unknown nvsp packet|error status|hv_sock:|"
    r"no rndis request found|unhandled rndis|Unexpected VMBUS completion|Ring buffer not empty"
)
"""Of which the guest's kernel log has none."""
_DRIVERS = {"disk": "disk-writer", "vsock": "vsock", "card": "transfer"}
_COUNTED = {"disk": "acknowledged", "vsock": "received"}
_CARD_BYTES = 16384  # of a stream in both directions together count as a transaction
_BLOCK, _MAGIC, _BATCH = 1024, b"written!", 32  # of a small ext4, and of the guest's disk-writer


@contextlib.contextmanager
def disks_in(directory: Path) -> Iterator[None]:
    """A context in which disks' images are in this directory."""
    before = os.environ.get(DIRECTORY_VARIABLE)
    os.environ[DIRECTORY_VARIABLE] = str(directory)
    try:
        yield
    finally:
        if before is None:
            del os.environ[DIRECTORY_VARIABLE]
        else:
            os.environ[DIRECTORY_VARIABLE] = before


class StockStage(Stage):
    """See the module's text."""

    look_interval = 0.25  # each look asks the guest, over a slow line

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._peers: dict[int, tuple[VirtualMachine, Peer]] = {}
        self._outside: Outside | None = None
        self._counts: dict[str, int] = {}
        self._wrong: list[str] = []

    # ---- VMs that come and go ------------------------------------------------------------------------------------

    async def boot(self) -> None:
        if any(one.driver == "card" for one in self.plan.workloads):
            reason = why_not()
            if not reason:
                try:
                    self._outside = await Outside.make(self.folder / "card.log")
                except EnvironmentProblem as error:
                    reason = str(error)
            self.plan = with_card(self.plan, self._outside.name) if self._outside else without_card(self.plan)
            if reason:
                self.event(f"the workload card is left out: {reason}")
        await super().boot()

    async def restored(self, kept: Kept, *, clone: bool = False) -> Subject:
        subject = await super().restored(kept, clone=clone)
        if self.plan.sabotage == DISK_LOSES_A_BLOCK and not clone:
            await asyncio.to_thread(lose_a_block, Path(os.environ[DIRECTORY_VARIABLE]) / IMAGE)
        return subject

    @contextlib.contextmanager
    def going_back(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for vm, peer in self._peers.values():
                if vm is self.here.vm:
                    stack.enter_context(peer.excused())
            yield

    async def end(self) -> None:
        """As any stage does. The card's other end goes with the stage: see `close`."""
        await super().end()
        await self._forget_peers()

    async def close(self) -> None:
        await self._forget_peers(everyone=True)
        if self._outside is not None:
            await self._outside.remove()
            self._outside = None

    async def _forget_peers(self, *, everyone: bool = False) -> None:
        for key, (vm, peer) in list(self._peers.items()):
            if everyone or vm.ended:
                del self._peers[key]
                self._wrong += peer.wrong
                await peer.close()

    # ---- workloads -----------------------------------------------------------------------------------------------

    async def start_workloads(self, *, before: int = 0, killed: int = 0) -> None:
        vm = self.here.vm
        if vm.notice:
            raise Wrong(f"{vm.notice} (--set linux=0 leaves out the episodes that need them)")
        await _shell(vm, f"echo {HUNG_SECONDS} > /proc/sys/kernel/hung_task_timeout_secs")
        jobs: dict[str, int] = {}
        for one in self.plan.workloads:
            if one.driver not in _DRIVERS:
                continue
            parameters = one.parameters
            if one.driver == "vsock":
                parameters = {"port": PORT, "listen": GUEST_PORT, **parameters}
            if one.driver == "card":
                up = {"interface": "eth0", "address": f"{GUEST}/{PREFIX_LENGTH}"}
                report = await vm.call_agent("run", driver="interface", parameters=up, timeout=60.0)
                if report["state"] != "finished":
                    raise Wrong(f"the card does not come up: {report.get('error')}")
            started = await vm.call_agent("start", driver=_DRIVERS[one.driver], parameters=parameters)
            jobs[one.driver] = int(started["job"])
            if one.driver == "card":
                assert self._outside is not None
                await self._outside.begin(parameters["streams"], parameters["stall_seconds"])
        self.here.life = Life(next(iter(jobs.values()), 0), {}, before, killed, jobs)

    def _plan_of(self, driver: str) -> WorkloadPlan | None:
        return next((one for one in self.plan.workloads if one.driver == driver), None)

    async def _peer(self, subject: Subject, status: dict[str, Any]) -> Peer | None:
        """The other end of the workload `vsock`; it begins when it is first asked for."""
        plan = self._plan_of("vsock")
        if plan is None:
            return None
        if id(subject.vm) not in self._peers:
            await self._forget_peers()
            path = status["providers"][plan.provider]["socket"]
            peer = Peer(path, plan.parameters["seed"], plan.parameters["size"])
            await peer.start()
            self._peers[id(subject.vm)] = (subject.vm, peer)
        return self._peers[id(subject.vm)][1]

    async def status(self, subject: Subject) -> dict[str, Any]:
        """With `counts` (what each workload has done), and `reports` (what the guest's programs say)."""
        status = await super().status(subject)
        await self._peer(subject, status)
        reports = {}
        for name, job in subject.life.jobs.items():
            reports[name] = await subject.vm.call_agent("poll", job=job)
        self._counts = self._count(status, reports)
        return {**status, "counts": self._counts, "reports": reports}

    def _count(self, status: dict[str, Any], reports: dict[str, Any]) -> Count:
        counts = {}
        for one in self.plan.workloads:
            if one.driver == "heartbeat":
                counts[one.driver] = int(status["providers"][one.provider]["heartbeat"]["beats"])
                continue
            progress = reports[one.driver]["progress"] or {}
            if one.driver == "card":
                counts[one.driver] = int(progress.get("slowest", 0)) // _CARD_BYTES
            else:
                counts[one.driver] = int(progress.get(_COUNTED[one.driver], 0))
        return counts

    def transactions(self, subject: Subject, status: dict[str, Any]) -> int:
        counts: Count = status.get("counts", self._counts)  # a sample does not ask the guest
        return subject.life.before + sum(counts.values())

    def _loaded(self, packets: Count) -> bool:
        return True  # Linux decides how many it has in flight

    def _still(self, first: dict[str, Any], status: dict[str, Any]) -> list[str]:
        return [name for name, count in status["counts"].items() if count <= first["counts"][name]]

    async def _require_job(self, subject: Subject) -> None:
        pass  # `check_books` has seen the reports

    async def words(self, subject: Subject) -> dict[str, Any]:
        reports = {name: await subject.vm.call_agent("poll", job=job) for name, job in subject.life.jobs.items()}
        return {"reports": reports, "log": (await _shell(subject.vm, "dmesg")).splitlines()}

    def check_books(self, subject: Subject, status: dict[str, Any]) -> None:
        super().check_books(subject, status)
        wrong = list(self._wrong)
        for name, report in status["reports"].items():
            progress = report["progress"] or {}
            if report["state"] != "running":
                wrong.append(f"workload {name} has {report['state']} by itself: {_say(report)}")
            elif progress.get("wrong") or progress.get("dropped"):
                wrong.append(f"workload {name}, as the guest counts: {progress}")
        wrong += self._compare_vsock(subject, (status["reports"].get("vsock") or {}).get("progress") or {})
        wrong += self._compare_providers(status)
        if self._plan_of("card") and self._outside is not None and not self._outside.running:
            wrong.append("workload card: the other end has ended by itself")
        if wrong:
            raise Wrong("; ".join(wrong))

    def _compare_vsock(self, subject: Subject, progress: dict[str, Any]) -> list[str]:
        wrong = []
        if id(subject.vm) in self._peers:
            peer = self._peers[id(subject.vm)][1]
            wrong += [f"workload vsock, as the host reads: {text}" for text in peer.wrong]
            if peer.ends:
                wrong.append(f"workload vsock: {peer.ends} connections ended, and their VM ran on")
        ends, most = int(progress.get("ends", 0)), CONNECTIONS * subject.life.moves
        if ends > most:
            wrong.append(f"workload vsock: {ends} connections ended in the guest, {most} at most with its restores")
        return wrong

    def _compare_providers(self, status: dict[str, Any]) -> list[str]:
        wrong = []
        for one in self.plan.workloads:
            provider = status["providers"][one.provider]
            if one.driver == "heartbeat" and provider["heartbeat"]["wrong"]:
                wrong.append(f"{provider['heartbeat']['wrong']} heartbeats were answered wrongly")
            if one.driver == "disk" and any(unit["errors"] for unit in provider["luns"]):
                wrong.append(f"the disk had errors: {provider['luns']}")
            if one.driver == "card" and (provider["refused"] or any(queue["lost"] for queue in provider["queues"])):
                wrong.append(f"the card refused {provider['refused']} messages: {provider['queues']}")
        return wrong

    async def finish(self, subject: Subject) -> tuple[list[WorkloadRecord], str, list[str]]:
        vm = subject.vm
        status = await self.status(subject)
        self.check_books(subject, status)
        theirs = None
        for name, job in subject.life.jobs.items():
            if name != "card":
                await vm.call_agent("stop", job=job)
        if "card" in subject.life.jobs and self._outside is not None:
            theirs = await self._outside.finish(self.plan.finish_seconds)
        reports = {name: await self._job_end(subject, job) for name, job in subject.life.jobs.items()}
        status = await super().status(subject)
        records, wrong = [], list(self._wrong)
        for one in self.plan.workloads:
            record, faults = self._record(one, reports.get(one.driver), status)
            records.append(record)
            wrong += faults
        wrong += self._compare_vsock(subject, (reports.get("vsock") or {}).get("result") or {})
        wrong += self._compare_providers(status)
        if theirs is not None:
            wrong += compare_streams(theirs, reports["card"].get("result") or {})
        wrong += await self._complaints(vm)
        return records, "", wrong

    def _record(
        self, plan: WorkloadPlan, report: dict[str, Any] | None, status: dict[str, Any]
    ) -> tuple[WorkloadRecord, list[str]]:
        wrong = []
        verdict, count, message = "passed", 0, ""
        if report is None:
            count = int(status["providers"][plan.provider]["heartbeat"]["beats"])
        else:
            result = report.get("result") or {}
            verdict = str(result.get("verdict", "none"))
            if plan.driver == "card":
                count = int(result.get("slowest", 0)) // _CARD_BYTES
            else:
                count = int(result.get(_COUNTED[plan.driver], 0))
            if report["state"] != "finished" or verdict != "passed":
                message = _say(report)
                wrong.append(f"workload {plan.driver} {report['state']}: {message}")
        record = WorkloadRecord(
            driver=plan.driver, parameters=plan.parameters, verdict=verdict, transactions=count, message=message
        )
        return record, wrong

    async def _complaints(self, vm: VirtualMachine) -> list[str]:
        lines = (await _shell(vm, "dmesg")).splitlines()
        found = [line for line in lines if BAD_WORDS.search(line)]
        return [f"the guest's kernel: {found[0]} ({len(found)} such lines)"] if found else []


def compare_streams(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What speaks against the results of both ends of TCP streams."""
    wrong = []
    for name, one in (("host", ours), ("guest", theirs)):
        if one.get("verdict") != "passed" or one.get("dropped") or one.get("wrong"):
            wrong.append(f"workload card, at the {name}: {one}")
    for one, other in zip(ours.get("results", []), theirs.get("results", []), strict=False):
        for way, back in (("sent", "received"), ("received", "sent")):
            if (one[way], one[f"{way}_crc"]) != (other[back], other[f"{back}_crc"]):
                wrong.append(f"workload card, stream {one['stream']}: {way} {one[way]} bytes, {back} {other[back]}")
    return wrong


def with_card(plan: EpisodePlan, namespace: str) -> EpisodePlan:
    """The plan, with a card whose interface is in this namespace."""
    card = next(one for one in plan.workloads if one.driver == "card")
    more = {"namespace": namespace, "interface": "host0", "address": f"{HOST}/{PREFIX_LENGTH}"}
    providers = [
        msgspec.structs.replace(one, options={**one.options, **more}) if one.name == card.provider else one
        for one in plan.vm.device.providers
    ]
    return _with_providers(plan, providers)


def without_card(plan: EpisodePlan) -> EpisodePlan:
    """The plan, without that workload and its provider."""
    card = next(one for one in plan.workloads if one.driver == "card")
    plan = msgspec.structs.replace(plan, workloads=[one for one in plan.workloads if one is not card])
    return _with_providers(plan, [one for one in plan.vm.device.providers if one.name != card.provider])


def _with_providers(plan: EpisodePlan, providers: list[Any]) -> EpisodePlan:
    device = msgspec.structs.replace(plan.vm.device, providers=providers)
    return msgspec.structs.replace(plan, vm=msgspec.structs.replace(plan.vm, device=device))


def lose_a_block(image: Path) -> None:
    """The sabotage: of the writes to a disk, one that was acknowledged is not there any more."""
    with image.open("r+b", buffering=0) as file:
        found: dict[int, int] = {}
        for at in range(0, image.stat().st_size, _BLOCK):
            data = os.pread(file.fileno(), 16, at)
            if data[:8] == _MAGIC:
                found[int.from_bytes(data[8:16], "little")] = at
        newest = max(found, default=0)
        victims = [number for number in found if number <= newest - _BATCH]  # what may not be acknowledged is newer
        if victims:
            os.pwrite(file.fileno(), bytes(_BLOCK), found[max(victims)])


async def _shell(vm: VirtualMachine, command: str) -> str:
    done = await vm.run_in_guest(["/bin/sh", "-c", command])
    if done.code:
        raise Wrong(f"{command!r} in the guest ended with {done.code}: {done.output[-500:]}")
    return str(done.output)


def _say(report: dict[str, Any]) -> str:
    if report.get("error"):
        return str(report["error"].get("message", report["error"]))
    result = report.get("result") or {}
    return "; ".join(map(str, result.get("reasons", []))) or str(result or "it says nothing")
