"""Operations of a soak that migrate the VM, or try to: see `vmbus.soak.operations`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from vmbus.operations.machine import VirtualMachine
from vmbus.operations.migration.address import Address, TcpAddress, UnixAddress
from vmbus.operations.migration.link import PING_INTERVAL
from vmbus.operations.migration.listener import listen
from vmbus.operations.migration.report import MigrationReport
from vmbus.soak.books import Fault
from vmbus.soak.far import HERE, NEAR, Relay, far, free_port
from vmbus.soak.figures import Figures, require_all, require_running, until_it_converges
from vmbus.soak.plan import Parameters
from vmbus.soak.stage import Stage, Subject
from vmbus.testbed.hosts import Forbidden
from vmbus.vm.errors import MigrateFailed
from vmbus.vm.moments import Moment

T = TypeVar("T")

SILENCE = 4 * PING_INTERVAL
"""Seconds after which a cut link is noticed, where one is cut on purpose."""
_SOON = 30.0


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

    @property
    def port(self) -> int:
        """Where the destination listens, if that is a port."""
        assert isinstance(self.way, TcpAddress)
        return self.way.port

    async def leave(self, **options: Any) -> MigrationReport:
        """The source goes. Raises what a migration raises."""
        return await self._stage.here.vm.migrate(str(self.way), self._secret, **options)


def _address(stage: Stage, transport: str) -> Address:
    return TcpAddress("127.0.0.1", 0) if transport == "tcp" else UnixAddress(str(stage.path("m")))


async def migrate(stage: Stage, parameters: Parameters) -> Figures:
    """To another QEMU and another server on this machine, while the guest runs."""

    async def attempt() -> tuple[MigrationReport, VirtualMachine]:
        journey = _Journey(stage, _address(stage, str(parameters["transport"])))
        async with journey.destination() as destination:
            report = await journey.leave(multifd=int(parameters["multifd"]))
            return report, await destination

    return _moved(stage, *await until_it_converges(stage, attempt))


def _moved(stage: Stage, report: MigrationReport, vm: VirtualMachine) -> Figures:
    source = stage.here
    vm.programs = stage.programs
    stage.subject = Subject(vm, source.session.moved())
    if not source.vm.ended:
        raise Fault("the source runs on after its migration")
    require_all(report.packets, vm, "the migration")
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
    await require_running(stage.here, what)
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
            comes = socket.socket(socket.AF_UNIX)
            path = str(stage.path("w"))
            comes.bind(path)
            wire = await stack.enter_async_context(Relay(comes, lambda: asyncio.open_unix_connection(address.path)))
            journey.way = UnixAddress(path)
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


async def far_migration(stage: Stage, parameters: Parameters) -> Figures:
    """Live, over a slow link between two hosts; where that is cut on the way, the VM runs on here."""
    cut = str(parameters["cut"])
    shape = {name: float(parameters[name]) for name in ("rate", "latency", "loss")}
    shape["rate"] *= 1e6
    what = f"a migration between hosts whose link broke {Moment[cut].value if cut else 'never'}"
    silence = {"silence": SILENCE} if cut else {}

    async def attempt(journey: _Journey, leave: Callable[..., Awaitable[T]]) -> tuple[T, VirtualMachine | None]:
        stream = free_port()
        async with (
            journey.destination(stream_port=stream, **silence) as destination,
            far([journey.port, stream], stage.scratch, **shape) as hosts,
        ):
            journey.way = TcpAddress(NEAR, journey.port)

            async def at(moment: Moment) -> None:
                if moment.name == cut:
                    await hosts.cut()
                    await asyncio.sleep(_SOON)  # until somebody notices

            found = await leave(at=at, **silence)
            return found, None if cut else await destination

    def journey() -> _Journey:
        return _Journey(stage, TcpAddress(HERE, 0))

    try:
        if cut:
            one = journey()
            message, _ = await attempt(one, lambda **more: _must_fail(one.leave(**more), what))
            await _stayed(stage, one, what)
            return Figures(outcome="refused", message=message)

        async def go() -> tuple[MigrationReport, VirtualMachine | None]:
            one = journey()
            return await attempt(one, one.leave)

        report, vm = await until_it_converges(stage, go)
    except Forbidden as error:
        stage.event(f"migrated without hosts: {error}")
        return await migrate(stage, {"transport": "tcp", "multifd": 0})
    assert vm is not None
    return _moved(stage, report, vm)
