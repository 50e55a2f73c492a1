"""The stage of an episode whose guest has Linux's own drivers: a file system on a disk, sockets, a card and heartbeats.

The workloads are programs of the guest's without a channel, so the server has no books of theirs. Theirs are what the
guest's programs say, what the other ends on this host say, and what the guest's kernel has written into its log.

What ends a connection: those of sockets end with every restore, since their other ends do not travel. Those over the
card live on, unless the VM goes back to a moment: their other ends do not, and forget them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from vmbus.errors import EnvironmentProblem
from vmbus.operations.machine import VirtualMachine
from vmbus.providers.disk.image import DIRECTORY_VARIABLE
from vmbus.soak.books import Fault, disagreements
from vmbus.soak.outside import GUEST, HOST, PREFIX_LENGTH, Outside, why_not
from vmbus.soak.peer import GUEST_PORT, PORT, Peer, Sockets
from vmbus.soak.plan import EpisodePlan, WorkloadPlan
from vmbus.soak.records import Count, WorkloadRecord
from vmbus.soak.settings import DISK_LOSES_A_BLOCK
from vmbus.soak.stage import Kept, Options, Stage, Subject
from vmbus.soak.workloads import IMAGE
from vmbus.vm.description import with_options

HUNG_SECONDS = 30
"""The guest's kernel tells of a task that waits for so long for what the host owes it."""
BAD_WORDS = re.compile(
    r"WARNING:|BUG:|Call Trace|soft lockup|general protection|blocked for more than|I/O error|EXT4-fs (error|warning)|"
    r"tag#\d+.*(status|srb)|Invalid pkt|Incorrect transaction ID|Unknown nvsp packet|error status|hv_sock:|"
    r"no rndis request found|unhandled rndis|Unexpected VMBUS completion|Ring buffer not empty"
)
"""Of which the guest's kernel log has none."""
_DRIVERS = {"disk": "disk-writer", "vsock": "frames", "card": "frames"}
_COUNTED = {"disk": "acknowledged", "vsock": "received", "card": "received"}
_SLOWEST = {"disk": "acknowledged", "vsock": "slowest", "card": "slowest"}  # so that each connection has to move on
_BLOCK, _MAGIC, _BATCH = 1024, b"written!", 32  # of a small ext4, and of the guest's disk-writer


class StockStage(Stage):
    """See the module's text."""

    look_interval = 0.25  # each look asks the guest, over a slow line

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._peers: dict[int, tuple[VirtualMachine, Peer]] = {}
        self._outside: Outside | None = None
        self._beside: dict[int, tuple[VirtualMachine, Outside]] = {}  # of clones
        self._wrong: list[str] = []

    # ---- VMs that come and go ------------------------------------------------------------------------------------

    async def boot(self) -> None:
        if self._plan_of("card") is not None:
            reason = why_not()
            if not reason:
                try:
                    self._outside = await Outside.make()
                except EnvironmentProblem as error:
                    reason = str(error)
            self.plan = with_card(self.plan, self._outside.name) if self._outside else without_card(self.plan)
            if reason:
                self.event(f"the workload card is left out: {reason}")
        await super().boot()

    async def restored(
        self, kept: Kept, *, clone: bool = False, back: bool = False, options: Options | None = None
    ) -> Subject:
        beside = None
        if self._outside is not None and clone:
            beside = await Outside.make()
            options = {self._card.provider: {"namespace": beside.name}}
        elif self._outside is not None and back:
            self._outside.cut()
        try:
            subject = await super().restored(kept, clone=clone, back=back, options=options)
        except BaseException:
            if beside is not None:
                await beside.remove()
            raise
        if beside is not None:
            self._beside[id(subject.vm)] = (subject.vm, beside)
            await self._begin(beside)
        if self.plan.sabotage == DISK_LOSES_A_BLOCK and not clone:
            await asyncio.to_thread(lose_a_block, Path(os.environ[DIRECTORY_VARIABLE]) / IMAGE)
        return subject

    @contextlib.contextmanager
    def going_back(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for vm, peer in self._peers.values():
                if vm is self.here.vm:
                    stack.enter_context(peer.excused())
            if self._outside is not None:
                stack.enter_context(self._outside.going_back())
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
        for key, (vm, outside) in list(self._beside.items()):
            if everyone or vm.ended:
                del self._beside[key]
                self._wrong += outside.peer.wrong if outside.peer is not None else []
                await outside.remove()

    # ---- workloads -----------------------------------------------------------------------------------------------

    async def start_workloads(self, *, before: int = 0, killed: int = 0) -> None:
        vm = self.here.vm
        if vm.notice:
            raise Fault(f"{vm.notice} (--set linux=0 leaves out the episodes that need them)")
        await self.run_in_guest(["/bin/sh", "-c", f"echo {HUNG_SECONDS} > /proc/sys/kernel/hung_task_timeout_secs"])
        await self._install()
        session = await self._open_books(before, killed)
        jobs: dict[str, int] = {}
        for one in self.plan.workloads:
            if one.own:
                jobs[one.driver] = await self._start(one.runs, one.parameters)
            if one.driver not in _DRIVERS:
                continue
            parameters = one.parameters
            if one.driver != "disk":
                parameters = {"port": PORT, "listen": GUEST_PORT, **parameters}
            if one.driver == "card":
                up = {"interface": "eth0", "address": f"{GUEST}/{PREFIX_LENGTH}"}
                report = await vm.call_agent("run", driver="interface", parameters=up, timeout=60.0)
                if report["state"] != "finished":
                    raise Fault(f"the card does not come up: {report.get('error')}")
                assert self._outside is not None
                await self._begin(self._outside)
                parameters = {"address": HOST, **parameters}
            jobs[one.driver] = await self._start(_DRIVERS[one.driver], parameters)
        self.here.session = replace(session, jobs=jobs)

    async def _begin(self, outside: Outside) -> None:
        parameters = self._card.parameters
        await outside.begin(parameters["seed"], parameters["size"], parameters["pairs"])

    @property
    def _card(self) -> WorkloadPlan:
        plan = self._plan_of("card")
        assert plan is not None
        return plan

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
            peer = Peer(Sockets(path), plan.parameters["seed"], plan.parameters["size"])
            await peer.start()
            self._peers[id(subject.vm)] = (subject.vm, peer)
        return self._peers[id(subject.vm)][1]

    async def status(self, subject: Subject) -> dict[str, Any]:
        """With `counts` and `reports` of all workloads."""
        status = await subject.vm.call_server("status")
        await self._peer(subject, status)
        return self._with_reports(status, await self._reports(subject))

    def _count(self, one: WorkloadPlan, status: dict[str, Any]) -> int | None:
        if one.driver == "heartbeat":
            return int(status["providers"][one.provider]["heartbeat"]["beats"])
        return int(self._said(one, status["reports"], "progress").get(_SLOWEST.get(one.driver, "completed"), 0))

    def transactions(self, subject: Subject, status: dict[str, Any]) -> int:
        counts: Count = status.get("counts", self._counts)
        return subject.session.before + sum(counts.values())

    def _loaded(self, packets: Count) -> bool:
        return True  # Linux decides how many it has in flight

    async def _require_job(self, subject: Subject) -> None:
        pass  # `check_books` has seen the reports

    async def words(self, subject: Subject) -> dict[str, Any]:
        return {**await super().words(subject), "log": (await self.run_in_guest(["dmesg"], subject.vm)).splitlines()}

    def check_books(self, subject: Subject, status: dict[str, Any]) -> None:
        super().check_books(subject, status)
        wrong = list(self._wrong)
        for name, report in status["reports"].items():
            progress = report["progress"] or {}
            if report["state"] != "running":
                wrong.append(f"workload {name} has {report['state']} by itself: {_say(report)}")
            elif progress.get("wrong"):
                wrong.append(f"workload {name}, as the guest counts: {progress}")
        wrong += self._compare_connections(subject, status["reports"], "progress")
        wrong += self._compare_providers(status)
        if wrong:
            raise Fault("; ".join(wrong))

    def _compare_connections(self, subject: Subject, reports: dict[str, Any], field: str) -> list[str]:
        wrong = []
        key, session = id(subject.vm), subject.session
        outside = self._beside[key][1] if key in self._beside else self._outside
        for name, peer, causes in (
            ("vsock", self._peers[key][1] if key in self._peers else None, session.moves),
            # One that is made while it goes back may end, too.
            ("card", outside.peer if outside is not None else None, 2 * session.backs),
        ):
            plan = self._plan_of(name)
            if plan is None:
                continue
            if peer is not None:
                wrong += [f"workload {name}, as the host reads: {text}" for text in peer.wrong]
                if peer.ends:
                    wrong.append(f"workload {name}: {peer.ends} connections ended, and their VM ran on")
            ends = int(((reports.get(name) or {}).get(field) or {}).get("ends", 0))
            most = 2 * int(plan.parameters.get("pairs", 1)) * causes
            if ends > most:
                wrong.append(f"workload {name}: {ends} connections ended in the guest, {most} at most might have")
        return wrong

    def _compare_providers(self, status: dict[str, Any]) -> list[str]:
        wrong = []
        for one in self.plan.workloads:
            if one.own:
                continue  # it may have none, and its verdict compares
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
        reports = await self._ends(subject)
        status = await vm.call_server("status")
        records, wrong = [], list(self._wrong)
        for one in self.plan.workloads:
            record, faults = self._record(one, reports.get(one.driver), status)
            records.append(record)
            wrong += [*faults, *disagreements(subject.session, one, self._said(one, reports, "result"), status)]
        wrong += self._compare_connections(subject, reports, "result")
        wrong += self._compare_providers(status)
        wrong += await self._complaints(vm)
        verdict, broken = await self._auditor(subject)
        return records, verdict, wrong + broken

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
            count = int(result.get(_COUNTED.get(plan.driver, "completed"), 0))
            if report["state"] != "finished" or verdict != "passed":
                message = _say(report)
                wrong.append(f"workload {plan.driver} {report['state']}: {message}")
        record = WorkloadRecord(
            driver=plan.driver, parameters=plan.parameters, verdict=verdict, transactions=count, message=message
        )
        return record, wrong

    async def _complaints(self, vm: VirtualMachine) -> list[str]:
        lines = (await self.run_in_guest(["dmesg"], vm)).splitlines()
        found = [line for line in lines if BAD_WORDS.search(line)]
        return [f"the guest's kernel: {found[0]} ({len(found)} such lines)"] if found else []


def with_card(plan: EpisodePlan, namespace: str) -> EpisodePlan:
    """The plan, with a card whose interface is in this namespace."""
    card = next(one for one in plan.workloads if one.driver == "card")
    options = {"namespace": namespace, "interface": "host0", "address": f"{HOST}/{PREFIX_LENGTH}"}
    return msgspec.structs.replace(plan, vm=with_options(plan.vm, {card.provider: options}))


def without_card(plan: EpisodePlan) -> EpisodePlan:
    """The plan, without that workload and its provider."""
    card = next(one for one in plan.workloads if one.driver == "card")
    others = [one for one in plan.vm.device.providers if one.name != card.provider]
    device = msgspec.structs.replace(plan.vm.device, providers=others)
    vm = msgspec.structs.replace(plan.vm, device=device)
    return msgspec.structs.replace(plan, vm=vm, workloads=[one for one in plan.workloads if one is not card])


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


def _say(report: dict[str, Any]) -> str:
    if report.get("error"):
        return str(report["error"].get("message", report["error"]))
    result = report.get("result") or {}
    return "; ".join(map(str, result.get("reasons", []))) or str(result or "it says nothing")
