"""A guest with a network card moves to another host and back, while both hosts talk to it over TCP and ping, and its
disk, which both hosts reach, is written to.

One network: a bridge in each host, the link between them a port of both. The guest's card becomes a port of the bridge
of the host it is on, so its frames take another way after each move, which the switches have to learn.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support import network_owner, pace, vm_owner
from support.pace import eventually
from support.places import Place
from support.streams import agree, good_ping
from vmbus.providers.disk.image import DIRECTORY_VARIABLE
from vmbus.testbed.hosts import Forbidden, TwoHosts
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription, load_description
from vmbus.vm.process import Child, log_tail

pytestmark = [pytest.mark.vm, pytest.mark.long, pytest.mark.timeout(300)]

CHECKOUT = Path(__file__).resolve().parents[2]
GUEST = "192.0.2.10"
MAC = "02:00:00:00:00:0a"
STREAMS = 2
DISK = {
    "kind": "scsi",
    "name": "storage",
    "instance": "3f6c2a10-7f7c-4f0e-9a53-6f1b0c5d2e07",
    "options": {"luns": [{"image": "disk.img", "size_mib": 64, "create": True}]},
}
WRITER = {"device": "/dev/sda", "count": 0, "slots": 400, "batch": 16, "verify_every": 10, "pace": 0.02}


def described() -> VmDescription:
    """The card of qemu_configs, as a port of a host's bridge."""
    plain = msgspec.to_builtins(load_description(CHECKOUT / "qemu_configs" / "network.toml"))
    card = plain["device"]["providers"][0]
    card["options"] = {"interface": "vmnet0", "bridge": network_owner.BRIDGE, "mac": MAC}
    plain["device"]["providers"].append(DISK)
    return msgspec.convert(plain, VmDescription)


class Program:
    """One of the guest's test drivers in a host."""

    def __init__(self, child: Child) -> None:
        self.child = child

    def _lines(self) -> list[dict[str, Any]]:
        whole = [line for line in self.child.log.read_text().split("\n")[:-1] if line.startswith("{")]
        return [json.loads(line) for line in whole]

    def progress(self) -> dict[str, Any]:
        found = [line for line in self._lines() if line["event"] == "progress"]
        return found[-1] if found else {}

    def stop(self) -> None:
        os.killpg(self.child.pid, signal.SIGTERM)

    async def result(self) -> dict[str, Any]:
        await asyncio.wait({self.child.exited}, timeout=pace.seconds(60))
        results = [line["result"] for line in self._lines() if line["event"] == "result"]
        assert results, log_tail(self.child.log, 20)
        return dict(results[0])


class Bridged(Place):
    """Its owner has a bridge, of which the guest's card is a port."""

    async def start(self, driver: str, **parameters: Any) -> Program:
        words = [sys.executable, "-m", "vmbus_guest.testdrivers", driver, "--parameters", json.dumps(parameters)]
        return Program(await self.host.spawn(driver, words))

    async def port_of_the_guest(self) -> str:
        """Which of the bridge's ports leads to the guest, as far as it knows."""
        return str((await self.ask("stations"))["stations"].get(MAC, ""))


@asynccontextmanager
async def places(programs: Programs, disks: Path) -> AsyncIterator[tuple[Bridged, Bridged]]:
    """Two hosts on one network, which reach the same disks. Raises Forbidden."""
    async with await TwoHosts.create(keep=[programs.kernel, programs.initramfs, disks]) as hosts:
        found = []
        for host in hosts.hosts:
            place = await Bridged.spawn(
                host, programs, "support.network_owner", host.address, **{DIRECTORY_VARIABLE: str(disks)}
            )

            async def said(owner: Child = place.owner) -> bool:
                text = owner.log.read_text()
                if network_owner.REFUSED in text:
                    raise Forbidden(f"{text.strip()}; it needs root's rights")
                return vm_owner.READY in text

            await eventually(said, "the owner to listen", 30)
            found.append(place)
        try:
            yield found[0], found[1]
        except BaseException:
            for place in found:
                print(f"--- {place.host.name}\n{log_tail(place.owner.log, 60)}")
            raise


async def move(source: Bridged, target: Bridged) -> None:
    arrival = await target.receive()
    try:
        report = await source.migrate(target)
        await arrival
    finally:
        arrival.cancel()
    print(f"{source.name} to {target.name}: downtime {report['downtime']:.3f} s")


def test_network_survives_live_migration_there_and_back(programs: Programs, tmp_path: Path) -> None:
    disks = tmp_path / "disks"
    disks.mkdir()

    async def story() -> None:
        async with places(programs, disks) as (a, b):
            await a.ask("launch", description=msgspec.to_builtins(described()))
            up = f"ip link set eth0 up && ip addr add {GUEST}/24 dev eth0"
            done = await a.agent("execute", argv=["/bin/sh", "-c", up])
            assert done["code"] == 0, done
            jobs = []
            for index, _ in enumerate((a, b)):
                started = await a.agent(
                    "start", driver="transfer", parameters={"streams": STREAMS, "port": 5001 + index}
                )
                jobs.append(int(started["job"]))
            pinging = await a.agent("start", driver="ping", parameters={"host": b.host.address, "count": 0})
            clients = [
                await place.start("transfer", mode="connect", host=GUEST, port=5001 + index, streams=STREAMS)
                for index, place in enumerate((a, b))
            ]
            pings = [await place.start("ping", host=GUEST, count=0) for place in (a, b)]

            async def moved(more: int = 1 << 19) -> None:
                for client in clients:
                    before = client.progress().get("slowest", 0)

                    async def enough(client: Program = client, before: int = before) -> bool:
                        now = client.progress()
                        return now.get("slowest", 0) >= before + more and now["streams"] == STREAMS

                    await eventually(enough, f"bytes on every stream: {client.progress()}", 60)

            async def written(place: Bridged, more: int = 48) -> None:
                """So many more writes that the disk has acknowledged."""
                seen: list[int] = []

                async def enough() -> bool:
                    report = await place.agent("poll", job=writer)
                    assert report["state"] == "running", report
                    seen.append(int((report["progress"] or {"acknowledged": 0})["acknowledged"]))
                    return seen[-1] >= seen[0] + more

                await eventually(enough, "writes to be acknowledged", 60)

            writer = int((await a.agent("start", driver="disk-writer", parameters=WRITER))["job"])
            await moved()
            await written(a)
            here, there = a, b
            for _ in range(2):
                assert await here.port_of_the_guest() == "vmnet0"
                assert await there.port_of_the_guest() == network_owner.LINK
                await move(here, there)
                here, there = there, here
                await moved()
                await written(here)
            assert here is a and await a.port_of_the_guest() == "vmnet0"
            state = (await a.ask("device"))["providers"]["card"]
            print(f"the card: {state}")
            assert state["announced"] >= 4 and state["refused"] == 0
            await a.agent("stop", job=writer)
            report = await a.agent("wait", timeout=70.0, job=writer)
            assert report["result"]["verdict"] == "passed", report
            print(f"the disk: {report['result']['acknowledged']} writes acknowledged, {report['result']['fsck']}")
            for program in (*clients, *pings):
                program.stop()
            await a.agent("stop", job=int(pinging["job"]))
            for place, client, job in zip((a, b), clients, jobs, strict=True):
                report = await a.agent("wait", timeout=70.0, job=job)
                assert report["state"] == "finished", report
                print(f"host {place.host.name}:", end=" ")
                agree(await client.result(), dict(report["result"]))
            for place, ping in zip((a, b), pings, strict=True):
                print(f"ping from host {place.host.name}: {good_ping(await ping.result())}")
            report = await a.agent("wait", timeout=70.0, job=int(pinging["job"]))
            print(f"ping from the guest: {good_ping(dict(report['result']))}")
            await a.ask("kill")

    async def bounded() -> None:
        async with asyncio.timeout(pace.seconds(280)):
            await story()

    try:
        asyncio.run(bounded())
    except Forbidden as error:
        pytest.skip(str(error))
