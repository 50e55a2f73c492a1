"""Traffic between a network namespace of the host's and a guest with a card: pings, and streams that are checked."""

from __future__ import annotations

from typing import Any

from support.namespace import Namespace, Program
from support.pace import eventually
from support.streams import agree, good_ping
from vmbus.operations.machine import VirtualMachine

HOST, GUEST = "192.0.2.1", "192.0.2.2"
STREAMS = 4


async def moved(program: Program, more: int) -> None:
    """Wait until each stream (in both directions together) has moved so many bytes more."""
    before = program.progress().get("slowest", 0)
    await eventually(
        lambda: program.progress().get("slowest", 0) >= before + more and program.progress()["streams"] == STREAMS,
        f"{more} bytes on every stream; {program.progress()}",
        60,
    )


class Traffic:
    """Ping and streams between the host's namespace and the guest."""

    def __init__(self, client: Program, ping: Program, server_job: int, ping_job: int) -> None:
        self.client = client
        self.ping = ping
        self.server_job = server_job
        self.ping_job = ping_job

    @classmethod
    async def start(cls, vm: VirtualMachine, outside: Namespace) -> Traffic:
        await vm.wait_ready()
        serving = await vm.call_agent("start", driver="transfer", parameters={"streams": STREAMS})
        pinging = await vm.call_agent("start", driver="ping", parameters={"host": HOST, "count": 0})
        client = outside.start("transfer", mode="connect", host=GUEST, streams=STREAMS)
        ping = outside.start("ping", host=GUEST, count=0)
        await eventually(lambda: ping.progress().get("received", 0) > 3, "pings to come back", 60)
        return cls(client, ping, int(serving["job"]), int(pinging["job"]))

    async def finish(self, vm: VirtualMachine) -> None:
        """End it, and check that everything was right."""
        self.client.stop()
        self.ping.stop()
        await vm.call_agent("stop", job=self.ping_job)
        theirs = await self._result(vm, self.server_job)
        ping = await self._result(vm, self.ping_job)
        ours = self.client.result()
        agree(ours, theirs)
        for name, one in (("host", self.ping.result()), ("guest", ping)):
            print(f"ping from the {name}: {good_ping(one)}")

    @staticmethod
    async def _result(vm: VirtualMachine, job: int) -> dict[str, Any]:
        report = await vm.call_agent("wait", job=job, timeout=60.0)
        assert report["state"] == "finished", report
        return dict(report["result"])
