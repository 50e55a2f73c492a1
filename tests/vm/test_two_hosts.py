"""Live migration over TCP between two hosts that share nothing but a link, with traffic of three kinds at full speed.

Each host has an owner process of its own (`support.vm_owner`), started in the host's namespaces; the test talks to it
through the host's file system. The guest is booted once and saved, idle; every test restores that in host A and starts
its own traffic. The books of guest and providers are compared after each run of the traffic, and at the end the auditor
reads the records of the guest and of all servers, on both hosts.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support import pace, vm_owner
from support.commands import COMMAND
from support.pace import eventually
from support.places import PORT, SECRET, Place, Refused
from vmbus.device.description import ProviderDescription
from vmbus.errors import WaitTimeout
from vmbus.observe.audit.checker import check_paths
from vmbus.operations.machine import VirtualMachine
from vmbus.operations.migration.certificates import make_authority, make_host
from vmbus.server.control import ControlClient
from vmbus.testbed.hosts import RUNTIME, TEMPORARY, Forbidden, Host, TwoHosts
from vmbus.testkit.story import Figures, audit, begun
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.process import Child, log_tail

pytestmark = [pytest.mark.vm, pytest.mark.long, pytest.mark.timeout(600)]

Run = Callable[..., Any]
Story = Callable[["Pair"], Coroutine[Any, Any, None]]

VM = "guest"
BULK_INSTANCE = "6f1b4b0e-5d2c-4a53-9d0a-0f2f1f3c7a03"
SILENCE = 3.0
"""Seconds without a sign of life after which a link counts as lost: short, since tests wait for it."""

IN_FLIGHT = 256


@dataclass(frozen=True)
class Idle:
    """A snapshot of a guest that has booted and does nothing yet, and the audit records that it goes on from."""

    snapshot: Path
    records: Path


class Audited(Place):
    """One that keeps audit records."""

    @property
    def records(self) -> Path:
        """The audit records of the servers that ran here."""
        return self.host.path(vm_owner.AUDIT)

    async def collect(self) -> tuple[Path, str]:
        """The audit records of the guest, which is here, and the uid of the record of its server."""
        uid = (await self.ask("audit"))["uid"]
        return self.host.path(vm_owner.COLLECTED), uid


class Pair:
    """Two hosts with their owners, and the traffic of the VM that is in one of them."""

    def __init__(self, hosts: TwoHosts, a: Audited, b: Audited, ancestors: Path) -> None:
        self.hosts = hosts
        self.ancestors = ancestors  # the audit records of the server that the guest booted with
        self.a = a
        self.b = b
        self.figures = Figures()
        self.runs = 0
        self.job: int | None = None
        self.before: dict[str, dict[str, int]] = {}

    def other(self, place: Audited) -> Audited:
        return self.b if place is self.a else self.a

    # ---- traffic -----------------------------------------------------------------------------------------------------

    async def traffic(self, at: Audited) -> None:
        """Has the traffic go on, with packets in flight in every state."""
        if self.job is None:
            # Providers of echo count on from run to run.
            tallies = {name: one["tally"] for name, one in (await at.ask("device"))["providers"].items()}
            self.before = {name: tallies[name] for name in ("echo", "bulk")}
            started = await at.agent("start", driver="mixed", parameters={"workloads": WORKLOADS})
            self.job = int(started["job"])
        deadline = time.monotonic() + pace.seconds(60)
        while True:
            status = await self._status(at)
            packets, done = status["packets"], _completed(status)
            if min(packets.values()) >= IN_FLIGHT and status["incoming_held"] and min(done.values()) > 0:
                return
            if time.monotonic() > deadline:
                raise WaitTimeout(f"traffic of each kind (packets {packets}, completed {done})", 60)
            await asyncio.sleep(0.02)

    async def _status(self, at: Audited) -> dict[str, Any]:
        """The device's status, with tallies of this run alone."""
        status = await at.ask("device")
        for name, before in self.before.items():
            tally = status["providers"][name]["tally"]
            status["providers"][name]["tally"] = {kind: count - before[kind] for kind, count in tally.items()}
        return status

    async def finish(self, at: Audited) -> None:
        """Ends the traffic, and compares the books."""
        assert self.job is not None
        await at.agent("stop", job=self.job)
        deadline = time.monotonic() + pace.seconds(120)
        while (report := await at.agent("wait", job=self.job, timeout=60.0))["state"] == "running":
            if time.monotonic() > deadline:
                raise WaitTimeout("the guest's workloads to end", 120)
        # Two of the workloads are of one kind; they come in the order in which they were started.
        for workload, name in zip((report.get("result") or {}).get("workloads", []), NAMES, strict=False):
            workload["name"] = name
        audit(self.figures, report, await self._status(at), begun(report, NAMES))
        self.job = None
        self.runs += 1
        assert not self.figures.reasons, self.figures.reasons

    async def clean(self, at: Audited) -> None:
        """All that was counted, by the books and by the auditor: everything exactly once. The VM is at `at`."""
        found = self.figures
        print(
            f"{self.runs} runs of traffic, {found.transactions} transactions, {found.completed} completed, "
            f"lost {found.lost}, doubled {found.duplicated}, reordered {found.reordered}, corrupted {found.corrupted}"
        )
        assert self.job is None and self.runs
        assert found.completed == found.transactions > self.runs * 1000
        collected, leaf = await at.collect()
        servers = [place.records for place in (self.a, self.b) if place.records.is_dir()]
        places = [self.ancestors, *servers, collected]
        report = await asyncio.to_thread(check_paths, places, leaf=leaf)
        print(report)
        assert report.clean, str(report)

    # ---- migration ---------------------------------------------------------------------------------------------------

    async def move(self, source: Audited, **more: Any) -> dict[str, Any]:
        """Migrates from `source` to the other host; the report. The VM runs there, and there only."""
        target = self.other(source)
        arrival = await target.receive(silence=more.get("silence", 10.0))
        try:
            report = await source.migrate(target, **more)
            await arrival
        finally:
            arrival.cancel()
        assert await source.ask("state") == {"vm": False, "running": False}
        assert await target.ask("state") == {"vm": True, "running": True}
        show(f"{source.name} to {target.name}", report)
        return report


def _completed(status: dict[str, Any]) -> dict[str, int]:
    return {name: status["providers"][name]["tally"]["completed"] for name in NAMES}


def show(title: str, report: dict[str, Any]) -> None:
    spans = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in report["spans"].items())
    packets = report["packets"]
    print(
        f"{title}: {packets['queued']} packets queued, {packets['sent']} sent, {report['incoming_held']} held; "
        f"{report['ram_bytes'] / 2**20:.0f} MiB in {sum(report['phases'].values()):.2f} s, "
        f"{report['flushed_pages']} pages flushed, {report['attempts']} pass(es); "
        f"downtime {1e3 * report['downtime']:.0f} ms: QEMU's {1e3 * report['downtime_qemu']:.0f}, "
        f"the device's {1e3 * report['downtime_device']:.0f} ({spans})"
    )


RING_PAGES = 24
WINDOW = RING_PAGES * 4096 // 112 + 64 + 2 * IN_FLIGHT
WORKLOADS: list[dict[str, Any]] = [
    {"driver": "echo", "count": 0, "window": 128, "external": 0.25, "stall_seconds": 60.0},
    {
        "driver": "burst",
        "count": 0,
        "size": 64,
        "window": WINDOW,
        "hold": 64,
        "ring_pages_in": RING_PAGES,
        "stall_seconds": 60.0,
    },
    # Bulk: nothing but external data, transformed in place in the guest's memory.
    {
        "driver": "echo",
        "instance": BULK_INSTANCE,
        "count": 0,
        "window": 16,
        "size": 60_000,
        "minimum_size": 20_000,
        "external": 1.0,
        "seed": 7,
        "stall_seconds": 60.0,
    },
]
NAMES = ("echo", "burst", "bulk")
"""Of the providers that they are for."""


@pytest.fixture(scope="session")
def idle(demo_description: VmDescription, programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Idle:
    device = demo_description.device
    bulk = ProviderDescription(kind="echo", name="bulk", instance=BULK_INSTANCE)
    description = msgspec.structs.replace(
        demo_description,
        name=VM,
        device=msgspec.structs.replace(device, providers=[*device.providers, bulk]),
    )
    directory = tmp_path_factory.mktemp("idle")
    found = Idle(directory / "snapshot", directory / "audit")

    async def take() -> None:
        records = found.records
        async with await VirtualMachine.launch(description, programs, audit=records) as vm:  # as booted: saved here
            await vm.wait_ready()
            await vm.save(found.snapshot)

    asyncio.run(take())
    return found


@asynccontextmanager
async def pair(idle: Idle, programs: Programs) -> AsyncIterator[Pair]:
    """Two hosts, with the idle guest restored in A."""
    keep = [idle.snapshot, programs.kernel, programs.initramfs]
    async with await TwoHosts.create(keep=keep) as hosts:
        places = []
        for host in hosts.hosts:
            places.append(await Audited.spawn(host, programs, "support.vm_owner"))
            await places[-1].ready()
        try:
            found = Pair(hosts, *places, idle.records)
            await found.a.ask("restore", directory=str(idle.snapshot))
            yield found
        except BaseException:
            for place in places:
                print(f"--- {place.name}\n{log_tail(place.owner.log, 60)}")
            raise


@pytest.fixture
def tell(idle: Idle, programs: Programs) -> Callable[[Story], None]:
    """Run a story on a fresh pair; skip, with the reason, where there cannot be two hosts."""

    def tell(story: Story) -> None:
        async def body() -> None:
            async with asyncio.timeout(pace.seconds(500)), pair(idle, programs) as found:
                await story(found)

        try:
            asyncio.run(body())
        except Forbidden as error:
            pytest.skip(str(error))

    return tell


# ---- there and back --------------------------------------------------------------------------------------------------


def test_live_migration_two_round_trips_under_echo_burst_and_bulk(tell: Callable[[Story], None]) -> None:
    """The first way through a slow link."""

    async def story(pair: Pair) -> None:
        # What `traffic` saw in flight need not be at the switchover: all together move every kind.
        at, downtimes, moved = pair.a, [], Counter[str]()
        await pair.hosts.shape(rate=40e6, latency=0.005)
        before = (await pair.b.host.counters())["received"]
        for _ in range(4):
            await pair.traffic(at)
            report = await pair.move(at)
            assert sum(report["packets"].values()) > 0
            moved.update(report["packets"], held=report["incoming_held"])
            if not downtimes:
                came = (await pair.b.host.counters())["received"] - before
                print(f"{came / 1e6:.0f} MB came over the slow link")
                assert came > report["ram_bytes"] * 0.9
                await pair.hosts.shape()
            downtimes.append(report["downtime"])
            at = pair.other(at)
        assert at is pair.a and min(moved[kind] for kind in ("queued", "sent", "held")) > 0
        await pair.finish(at)
        await pair.clean(at)
        took = [round(1e3 * one) for one in downtimes]
        print(f"{len(took)} migrations, {dict(moved)} packets moved in flight, downtimes {took} ms")

    tell(story)


def test_live_migration_then_a_snapshot_restored_on_either_host(tell: Callable[[Story], None]) -> None:
    """Saved at B, where it came by migration: restored at B, and, copied there, at A."""

    async def story(pair: Pair) -> None:
        await pair.traffic(pair.a)
        await pair.move(pair.a, multifd=2)
        await pair.traffic(pair.b)
        snapshot = TEMPORARY / "snapshot"
        saved = await pair.b.ask("save", directory=str(snapshot), live=True)
        assert sum(saved["packets"].values()) > 0
        await pair.b.ask("kill")
        job = pair.job
        for place in (pair.b, pair.a):
            if place is pair.a:
                source, target = pair.b.host.path(snapshot), pair.a.host.path(snapshot)
                await asyncio.to_thread(shutil.copytree, source, target)
            await place.ask("restore", directory=str(snapshot))
            pair.job = job
            await pair.finish(place)
            await pair.clean(place)
            await place.ask("kill")

    tell(story)


class Supervised(Audited):
    """A host in which a command of the project owns the VM: its supervisor is asked."""

    async def _ask(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        folder = self.host.path(RUNTIME / "vmbus" / VM)
        if command == "device":
            control = ControlClient(folder / "control.sock")
            try:
                return await control.call("status")
            finally:
                control.close()
        if command == "agent":
            arguments = {**arguments, "command": arguments["name"]}
            del arguments["name"]
        reader, writer = await asyncio.open_unix_connection(str(folder / "supervisor.sock"), limit=vm_owner.LINE_LIMIT)
        try:
            writer.write(json.dumps({"command": command, "arguments": arguments}).encode() + b"\n")
            answer = json.loads(await reader.readline())
        finally:
            writer.close()
        if "error" in answer:
            raise Refused(answer["error"], "", None)
        return dict(answer["result"])

    async def collect(self) -> tuple[Path, str]:
        found = await self.ask("audit")
        return self.host.path(found["directory"]), found["uids"]

    async def supervises(self) -> bool:
        try:
            return bool((await self.ask("status"))["state"] == "running")
        except OSError:
            return False


async def command(host: Host, *words: str) -> Child:
    """One of scripts/ in a host."""
    return await host.spawn(words[0], [*COMMAND, *words])


def test_live_migration_with_the_commands_and_back_by_tls(idle: Idle, programs: Programs, tmp_path: Path) -> None:
    """scripts/restore in A, scripts/run-vm --receive in B, scripts/migrate in A: each what a user would type there."""
    pki = tmp_path / "pki"
    secret, records = TEMPORARY / "secret", str(vm_owner.AUDIT)

    async def story(hosts: TwoHosts) -> None:
        for host in hosts.hosts:
            await host.run(["/bin/sh", "-c", f"umask 077; echo {SECRET} > {secret}"])
        source = await command(hosts.a, "restore", str(idle.snapshot), "--name", VM, "--audit", records)
        address = f"tcp:{hosts.b.address}:{PORT}"
        words = ["run-vm", "--receive", address, "--secret-file", str(secret), "--name", VM, "--audit", records]
        target = await command(hosts.b, *words)
        pair = Pair(hosts, Supervised(hosts.a, source), Supervised(hosts.b, target), idle.records)
        await source.guard(eventually(pair.a.supervises, "the VM to run in A", 60), "the VM to run in A", 61)
        await pair.traffic(pair.a)
        await target.guard(eventually(pair.b.listens, "B to listen", 60), "B to listen", 61)
        moving = await command(hosts.a, "migrate", VM, address, "--secret-file", str(secret))
        assert await asyncio.wait_for(asyncio.shield(moving.exited), pace.seconds(120)) == 0, log_tail(moving.log, 40)
        print(moving.log.read_text())
        # The command that owned it in A says where it is, and ends.
        assert await asyncio.wait_for(asyncio.shield(source.exited), pace.seconds(30)) == 0, log_tail(source.log, 40)
        assert f"migrated to {address}" in source.log.read_text()
        await target.guard(eventually(pair.b.supervises, "the VM to run in B", 60), "the VM to run in B", 61)
        last = await back_by_tls(hosts, pair, target)
        await pair.finish(pair.a)
        await pair.clean(pair.a)
        await pair.a.ask("stop")
        assert await asyncio.wait_for(asyncio.shield(last.exited), pace.seconds(30)) == 0, log_tail(last.log, 40)

    async def back_by_tls(hosts: TwoHosts, pair: Pair, source: Child) -> Child:
        """To A again, as one does across a network that one does not trust; the command that owns it there."""
        make_authority(pki)
        for name, host in (("a", hosts.a), ("b", hosts.b)):
            shutil.copytree(make_host(pki, name, [host.address]), host.path(TEMPORARY / "pki"))
        address, tls = f"tcp:{hosts.a.address}:{PORT}", ["--tls", str(TEMPORARY / "pki")]
        rules = ["--peer", "b", "--accept", VM]
        words = ["run-vm", "--receive", address, *tls, *rules, "--name", VM, "--audit", records]
        target = await command(hosts.a, *words)
        pair.a = Supervised(hosts.a, target)
        await pair.traffic(pair.b)
        await target.guard(eventually(pair.a.listens, "A to listen", 60), "A to listen", 61)
        moving = await command(hosts.b, "migrate", VM, address, *tls, "--multifd", "2")
        assert await asyncio.wait_for(asyncio.shield(moving.exited), pace.seconds(120)) == 0, log_tail(moving.log, 40)
        print(moving.log.read_text())
        assert await asyncio.wait_for(asyncio.shield(source.exited), pace.seconds(30)) == 0, log_tail(source.log, 40)
        await target.guard(eventually(pair.a.supervises, "the VM to run in A", 60), "the VM to run in A", 61)
        return target

    async def body() -> None:
        keep = [idle.snapshot, programs.kernel, programs.initramfs]
        async with asyncio.timeout(pace.seconds(300)), await TwoHosts.create(keep=keep) as hosts:
            await story(hosts)

    try:
        asyncio.run(body())
    except Forbidden as error:
        pytest.skip(str(error))


# ---- bad links -------------------------------------------------------------------------------------------------------


def test_live_migration_through_a_link_that_is_too_slow_is_told(tell: Callable[[Story], None]) -> None:
    async def story(pair: Pair) -> None:
        await pair.hosts.shape(rate=2e6)
        await pair.traffic(pair.a)
        with pytest.raises(Refused) as caught:
            await pair.move(pair.a, timeout=8.0)
        print(f"told: {caught.value}")
        assert caught.value.kind == "MigrateFailed" and caught.value.source_alive
        assert re.search(r"waited [0-9.]+ s in vain", str(caught.value))
        await still_at(pair, pair.a)
        # The same VM moves once the link is good.
        await pair.hosts.shape()
        await pair.traffic(pair.a)
        await pair.move(pair.a)
        await pair.finish(pair.b)
        await pair.clean(pair.b)

    tell(story)


async def still_at(pair: Pair, place: Audited) -> None:
    """The VM runs at `place`, and nothing of it is left at the other host."""
    assert await place.ask("state") == {"vm": True, "running": True}
    await gone(pair.other(place))


async def gone(place: Audited) -> None:
    """Waits until nothing of a VM is left in a host: no QEMU, no device server, no run directory."""
    deadline = time.monotonic() + pace.seconds(60)
    while left := await place.host.run([sys.executable, "-I", "-S", "-c", _LEFT]):
        if time.monotonic() > deadline:
            raise WaitTimeout(f"{place.name} to give everything up; left: {left}", 60)
        await asyncio.sleep(0.1)


_LEFT = """
import pathlib
for entry in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
        words = entry.read_bytes().split(b"\\0")
    except OSError:
        continue
    if b"vmbus.cli.serve" in words or b"guest=guest" in words:
        print(entry)
for entry in pathlib.Path("/tmp/run/vmbus").glob("*"):
    print(entry)
"""


@pytest.mark.parametrize("lost", ["Go", "Running"])
def test_live_migration_cut_at_the_decision_is_resolved_when_the_link_is_mended(
    tell: Callable[[Story], None], lost: str
) -> None:
    """The source has decided and hears nothing. It asks until it is told: gone (then it runs on), or running."""

    async def story(pair: Pair) -> None:
        await pair.traffic(pair.a)
        halting, moment = (pair.a, "BEFORE_GO") if lost == "Go" else (pair.b, "BEFORE_CONT")
        arrival, leaving = await part_at(pair, halting, moment)
        await asyncio.sleep(SILENCE + 2)  # long enough for both to see that the link is dead
        assert not leaving.done()
        if lost == "Go":
            assert await pair.a.ask("state") == {"vm": True, "running": False}
            await gone(pair.b)
            await pair.hosts.mend()
            with pytest.raises(Refused) as caught:
                await leaving
            print(f"told: {caught.value}")
            assert caught.value.kind == "MigrateFailed" and caught.value.source_alive
            with pytest.raises(Refused):
                await arrival
            await still_at(pair, pair.a)
            await pair.finish(pair.a)
        else:
            await arrival
            assert await pair.a.ask("state") == {"vm": True, "running": False}
            assert await pair.b.ask("state") == {"vm": True, "running": True}
            await pair.hosts.mend()
            report = await leaving
            assert report["asked"] and report["downtime"] < SILENCE < report["phases"]["go"]  # it ran meanwhile
            show("A to B", report)
            await gone(pair.a)
            await pair.finish(pair.b)
        await pair.clean(pair.a if lost == "Go" else pair.b)

    tell(story)


async def part_at(
    pair: Pair, halting: Audited, moment: str
) -> tuple[asyncio.Task[dict[str, Any]], asyncio.Task[dict[str, Any]]]:
    """Migrates from A to B and cuts the link when `halting` is at `moment`: the arrival and the departure."""
    at = {place: {"halt_at": moment} if place is halting else {} for place in (pair.a, pair.b)}
    # The link's silence is noticed before it can be said that Go is missing.
    arrival = await pair.b.receive(silence=SILENCE, go_timeout=2 * SILENCE, **at[pair.b])
    leaving = asyncio.create_task(pair.a.migrate(pair.b, silence=SILENCE, ask_timeout=60.0, **at[pair.a]))
    await halting.ask("until-halted", patience=60)
    await pair.hosts.cut()
    await halting.ask("go-on")
    return arrival, leaving
