"""A VM moves by TLS in mid-traffic, with somebody on the wire who looks for what the guest has in its memory."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from support import certificates, pace
from support.boot import books, boot, clean
from support.wire import Wire
from vmbus.observe.audit.checker import check_paths
from vmbus.observe.audit.guest import collect_audit
from vmbus.operations.machine import VirtualMachine
from vmbus.operations.migration.accept import Accept
from vmbus.operations.migration.address import TcpAddress
from vmbus.operations.migration.channel import NO_SECRET
from vmbus.operations.migration.listener import listen
from vmbus.operations.migration.report import MigrationReport
from vmbus.testkit.story import Story, until_in_flight
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.errors import MigrateFailed

pytestmark = [pytest.mark.vm, pytest.mark.long]

STORY = Story(packets=256, stall_seconds=20.0).endless()
BANDWIDTH = 24 << 20


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


async def move(
    vm: VirtualMachine, wire: Wire, records: Path, *, tls: bool, accept: tuple[str, ...] = (), **options: Any
) -> tuple[VirtualMachine, MigrationReport]:
    """Through the wire to a destination at 127.0.0.1, by TLS from host a to host b, or with a secret alone."""
    secret, stream_port = NO_SECRET, 0
    peers: tuple[str, ...] = ("a",)
    if not tls:
        secret, stream_port = secrets.token_bytes(32), free_port()
    listener = await listen(
        TcpAddress("127.0.0.1", free_port()), secret, certificates.destination(peers=peers) if tls else None
    )
    assert isinstance(listener.address, TcpAddress)
    receiving = asyncio.create_task(
        VirtualMachine.receive(
            listener,
            vm.programs,
            timeout=pace.seconds(60),
            audit=records,
            stream_port=stream_port,
            accept=Accept(accept),
        )
    )
    try:
        async with wire.on(listener.address.port, *([stream_port] if stream_port else [])) as outside:
            report = await vm.migrate(
                str(outside), secret, tls=certificates.source(name="b") if tls else None, **options
            )
            return await receiving, report
    finally:
        if not receiving.done():
            await asyncio.wait({receiving}, timeout=pace.seconds(30))
            receiving.cancel()
            await asyncio.wait({receiving})
        if not receiving.cancelled() and receiving.exception() is not None:
            print(f"destination: {receiving.exception()}")


def tell(report: MigrationReport, wire: Wire) -> None:
    print(
        f"{report.address}, multifd {report.multifd}: downtime {report.downtime * 1000:.0f} ms, packets "
        f"{report.packets}, {report.ram_bytes >> 20} MiB of QEMU's in {report.phases['ram']:.2f} s; on the wire "
        f"{wire.bytes >> 20} MiB in {wire.connections} connections, the marker {wire.seen} times"
    )


async def test_live_migration_by_tls_shows_nothing_of_the_guest_on_the_wire(
    demo_description: VmDescription, programs: Programs, tmp_path: Path
) -> None:
    certificates.folder = tmp_path / "pki"
    records, marker = tmp_path / "audit", secrets.token_hex(16)
    async with contextlib.AsyncExitStack() as stack:
        vm = await stack.enter_async_context(await boot(demo_description, programs, records=records))
        await vm.wait_ready()
        # 1 MiB of it, in files of the guest's, which are in its memory.
        done = await vm.run_in_guest(["python3", "-c", f"open('/tmp/marker', 'w').write('{marker}' * 32768)"])
        assert done.code == 0, done
        job = int((await vm.call_agent("start", driver="mixed", parameters=STORY.workloads()))["job"])

        wire = Wire(marker.encode())
        await until_in_flight(vm, job, STORY)
        with pytest.raises(MigrateFailed, match="VM 'demo', which is not accepted here") as refused:
            await move(vm, wire, records, tls=True, accept=("other",))
        assert refused.value.source_alive and wire.connections == 1

        in_flight = 0
        for options in ({}, {"multifd": 4}, {"multifd": 4, "bandwidth": BANDWIDTH}):
            if "bandwidth" not in options:
                await until_in_flight(vm, job, STORY)
            wire = Wire(marker.encode())
            begun = time.monotonic()
            arrived, report = await move(vm, wire, records, tls=True, accept=("demo",), **options)
            vm = await stack.enter_async_context(arrived)
            tell(report, wire)
            in_flight += sum(report.packets.values())
            # All of it is on the wire, and nobody can read it: one connection for the channel, the others QEMU's.
            assert wire.bytes > 0.9 * report.ram_bytes > 10 << 20 and wire.seen == 0
            assert wire.connections == 1 + report.attempts * (1 + options.get("multifd", 0))
            if "bandwidth" in options:  # what goes at the switchover is not held back
                took = time.monotonic() - begun
                rate = wire.bytes / report.phases["ram"]  # of all passes
                print(f"{rate / 2**20:.1f} MiB/s of {BANDWIDTH >> 20} allowed")
                assert rate < 1.3 * BANDWIDTH and took < pace.seconds(60)

        assert in_flight > 0
        clean(await books(vm, job, None), 2000)
        await collect_audit(vm)
        leaf = (await vm.call_server("audit"))["uid"]

        # The same without TLS: so somebody who could read it would have.
        wire = Wire(marker.encode())
        arrived, report = await move(vm, wire, records, tls=False)
        await stack.enter_async_context(arrived)
        tell(report, wire)
        assert wire.seen > 1000
    found = check_paths([records], leaf=leaf)
    print(f"{found.transactions} completed transactions over {len(found.timeline)} servers: {found.verdict}")
    assert found.clean, str(found)
