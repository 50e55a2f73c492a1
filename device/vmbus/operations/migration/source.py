"""The source of a live migration: gets the destination ready, captures the VM into it, hands it over, and ends.

Up to the decision every failure leads back to a VM that runs on (`vmbus.operations.capture.Capture` undoes what it
did). The decision is one moment: just before Go is sent. From there on the vCPUs stay stopped here until it is known
what became of the VM: it runs there, it is gone there (then it runs on here), or nobody can tell (then somebody has to
decide).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import time
from typing import Any

import msgspec

from vmbus.device.description import DeviceDescription
from vmbus.errors import EnvironmentProblem, StateError, UsageError, VmbusError
from vmbus.operations.capture import Capture
from vmbus.operations.migration.address import Address
from vmbus.operations.migration.asking import ASK_TIMEOUT, Asking
from vmbus.operations.migration.channel import connect
from vmbus.operations.migration.files import record_of, send_file
from vmbus.operations.migration.link import Link, PeerFailed
from vmbus.operations.migration.messages import (
    Go,
    Hello,
    Prepare,
    Prepared,
    Released,
    Restored,
    Running,
    Sent,
    Wanted,
)
from vmbus.operations.migration.ownership import SOURCE, Ownership, SourceStage
from vmbus.operations.migration.report import QEMU_SPANS, MigrationReport, spans_of
from vmbus.operations.migration.stream import PREPARE_TIMEOUT, StreamTarget, Through
from vmbus.operations.migration.tls import Tls
from vmbus.operations.own_disks import check_departure
from vmbus.operations.save import versions
from vmbus.operations.stream import StreamSettings
from vmbus.operations.target import Captured
from vmbus.operations.vm import Vm
from vmbus.qemu.device import ask_each
from vmbus.qemu.probe import driven
from vmbus.qemu.qmp import MigrationFailed
from vmbus.snapshot.manifest import Packets
from vmbus.util.interruptible import in_thread, uninterrupted
from vmbus.vm.errors import MigrateFailed, MigrationInDoubt, SaveFailed
from vmbus.vm.moments import NO_SABOTAGE, Hook, Moment, Sabotage, no_hook
from vmbus.vm.timing import Phases, Progress

RUNNING_TIMEOUT = 30.0
"""Seconds from Go to Running before the destination is asked over a new connection."""
CALL_OFF_TIMEOUT = 5.0
"""Seconds for a destination that is told to give up to end everything; the VM stands still meanwhile."""


class Source:
    """One migration, seen from where the VM leaves. Call `run` once; after `MigrationInDoubt`, `resolve`."""

    def __init__(
        self,
        vm: Vm,
        address: Address,
        secret: bytes,
        tls: Tls | None = None,
        *,
        stream: StreamSettings | None = None,
        progress: Progress | None = None,
        at: Hook = no_hook,
        silence: float | None = None,
        ask_timeout: float = ASK_TIMEOUT,
        sabotage: Sabotage = NO_SABOTAGE,
    ) -> None:
        self.vm = vm
        self._folder = vm.room("departure")  # for the device's state, while it is on its way
        self.address = address
        self.migration = secrets.token_hex(16)
        self.phases = Phases(progress)
        self.ownership = Ownership(SOURCE, SourceStage.PREPARING)
        self._secret = secret
        self._tls = tls
        self._asking = Asking(self.migration, address, secret, tls, silence=silence, timeout=ask_timeout)
        self._stream = stream or StreamSettings()
        self._at = at
        self._silence = silence
        self._sabotage = sabotage
        self._capture: Capture | None = None
        self._captured: Captured | None = None
        self._target: StreamTarget | None = None
        self._restored: Restored | None = None
        self._cont = 0.0
        self._times: dict[str, float] = {}
        self._decision: bool | None = None  # of somebody's, about a doubt: whether the VM is to run here

    @property
    def stage(self) -> SourceStage:
        """Where this migration is: see `vmbus.operations.migration.ownership`."""
        return self.ownership.stage

    @property
    def in_doubt(self) -> bool:
        """Whether the VM stands still until `resolve`."""
        return self.stage is SourceStage.IN_DOUBT

    async def run(self) -> MigrationReport:
        """Moves the VM. When this returns, it runs at the destination and has ended here.

        Raises `MigrateFailed`, whose `source_alive` tells whether the VM runs on here as before, and
        `MigrationInDoubt`. Cancelling this before the decision leads back to a running VM; after it, what became of
        the VM is found out first.
        """
        try:
            try:
                channel = await connect(self.address, self._secret, tls=self._tls)
            except ConnectionRefusedError as error:
                raise EnvironmentProblem(f"no destination waits at {self.address}: {error}") from error
            async with Link(channel, silence=self._silence) as link:
                await self._until_decision(link)
                return await uninterrupted(self._settle(link))
        except BaseException as error:
            if self.stage is SourceStage.DECIDED:  # an end that nobody foresaw, such as that of the event loop
                self.ownership.move(SourceStage.IN_DOUBT)
            elif not self.ownership.over and self.stage is not SourceStage.IN_DOUBT:
                alive = not isinstance(error, SaveFailed) or error.source_alive
                self.ownership.move(SourceStage.KEPT if alive else SourceStage.LOST)
            if isinstance(error, MigrateFailed | MigrationInDoubt) or not isinstance(error, VmbusError):
                raise
            if self.stage is SourceStage.MOVED:  # it runs there; what was left here could not be ended
                raise
            if isinstance(error, SaveFailed):
                raise MigrateFailed(str(error), source_alive=error.source_alive) from error
            raise MigrateFailed(f"migration failed: {error}; the VM runs on", source_alive=True) from error
        finally:
            if self._target is not None:
                self._target.discard()

    async def resolve(self, *, run: bool | None) -> None:
        """Decides for a migration that is in doubt: the VM runs on here, or is given up for the one at the destination.

        Whoever decides for `run` has to be sure that it does not run at the destination; None asks the destination once
        more. A decision is carried out to its end, also if this is cancelled meanwhile, and the same one may be made
        again. Raises `UsageError` if nothing is in doubt or it was decided otherwise, `MigrationInDoubt` if the
        destination cannot say, `MigrateFailed` if the VM cannot be set running again.
        """
        if self.stage is not SourceStage.IN_DOUBT:
            if run is not None and run is self._decision:
                return
            raise UsageError(f"nothing is to be decided: the migration is {self.stage.value}")
        if run is None:
            try:
                answer = await self._asking.once()
            except VmbusError as error:
                raise MigrationInDoubt(f"{error}: it stays in doubt") from error
            if answer.fate == "undecided":
                raise MigrationInDoubt(f"the destination cannot tell ({answer.reason}): it stays in doubt")
            run = answer.fate == "gone"
        await uninterrupted(self._carry_out(run))

    async def _carry_out(self, run: bool) -> None:
        self._decision = run
        if run:
            await self._run_on()
        else:
            self.ownership.move(SourceStage.MOVED)
            await self._leave()

    async def _leave(self) -> None:
        self.vm.moved_to = str(self.address)
        await self.vm.kill()

    # --- up to the decision ------------------------------------------------------------------------------------

    async def _until_decision(self, link: Link) -> None:
        try:
            async with link.watch():
                prepared = await self._prepare(link)
                self._target = StreamTarget(self._folder, link, prepared, self._through)
                self._capture = Capture(
                    self.vm,
                    self._target,
                    self.phases,
                    live=True,
                    stream=self._stream,
                    sabotage=self._sabotage,
                    at=self._at,
                    operation="migration",
                )
                self.ownership.move(SourceStage.CAPTURING)
                async with self._capture.taken() as captured:
                    self._captured = captured
                    self.ownership.move(SourceStage.HANDING_OVER)
                    try:
                        await self._until_restored(link, captured)
                        await self._at(Moment.BEFORE_GO)
                    except BaseException as error:
                        # Its providers may own their outside resources by now, and ours are about to take them back.
                        await uninterrupted(link.call_off(str(error) or "it was interrupted", CALL_OFF_TIMEOUT))
                        raise
                    # The decision. Nothing is awaited from here to Go, and nothing is undone any more.
                    self._capture.hand_over()
                    self.ownership.move(SourceStage.DECIDED)
        except BaseException as error:
            if isinstance(error, SaveFailed) and isinstance(error.__cause__, MigrationFailed):
                # QEMU's error is often only the trace of what the destination can name, or the way there.
                known = self._target.problem if self._target is not None else None
                if known is None:
                    await asyncio.wait({link.failure}, timeout=1.0)
                    if link.failure.done() and isinstance(theirs := link.failure.result(), PeerFailed):
                        known = theirs
                if known is not None:
                    error = MigrateFailed(f"{error} ({known})", source_alive=error.source_alive)
            await uninterrupted(link.tell_failure(str(error) or "it was interrupted"))
            raise error

    @property
    def _through(self) -> Through | None:
        if self._tls is None:
            return None
        return Through(self.address, self._tls, self.vm.tunnel_socket, 1 + self._stream.multifd, self._stream.bandwidth)

    async def _prepare(self, link: Link) -> Prepared:
        vm = self.vm
        check_departure(vm)
        with self.phases("prepare"):
            booted = {"kernel": vm.programs.kernel, "initramfs": vm.programs.initramfs}
            kernel, initramfs = [
                None if path is None else await in_thread(functools.partial(record_of, path))
                for path in booted.values()
            ]
            statuses = await ask_each(vm.devices, "status")
            configs = [bytes.fromhex(one["config"]) for one in await ask_each(vm.devices, "pci")]
            devices = [msgspec.convert(status["description"], DeviceDescription) for status in statuses]
            await link.send(Hello(migration=self.migration, purpose="migrate"))
            await link.send(
                Prepare(
                    vm=vm.description.with_devices(devices),
                    machine=vm.machine.with_configs(configs),
                    versions=versions(vm, statuses[0]),
                    kernel=kernel,
                    initramfs=initramfs,
                    disks=vm.disks,
                    driven=driven(statuses[0]),
                    multifd=self._stream.multifd,
                )
            )
            wanted = await link.expect(Wanted, timeout=PREPARE_TIMEOUT, what="which boot files it lacks")
            self._asking.destination = wanted.destination
            for name in wanted.files:
                if (path := booted[name]) is None:
                    raise StateError(f"{link.name} wants the {name} of a VM that has none")
                await send_file(link, path)
            return await link.expect(Prepared, timeout=PREPARE_TIMEOUT, what="a server and a QEMU that wait")

    async def _until_restored(self, link: Link, captured: Captured) -> None:
        with self.phases("restore"):
            await link.send(Sent())
            await self._at(Moment.LOADING)
            timeout = 240.0 + self.vm.description.memory_mib / 20
            restored = await link.expect(Restored, timeout=timeout, what="everything to be rebuilt")
            self._times["restored"] = time.monotonic()
            packets = Packets(**captured.packets)
            if restored.packets != packets:
                raise StateError(f"{link.name} rebuilt {restored.packets} of the {packets} that were saved")
            self._restored = restored

    # --- after the decision ------------------------------------------------------------------------------------

    async def _settle(self, link: Link) -> MigrationReport:
        asked = False
        decided = time.monotonic()
        with self.phases("go"):
            try:
                await link.send(Go())
                await self._at(Moment.AFTER_GO)
                running = await link.expect(Running, timeout=RUNNING_TIMEOUT, what="the vCPUs to run")
                self._ran(time.monotonic(), running.seconds)
                fate, reason = "running", ""
            except PeerFailed as error:  # said after everything there was discarded
                fate, reason = "gone", str(error)
            except Exception as error:  # whatever it is, only the destination knows now
                asked = True
                answer = await self._asking.ask(error)
                fate, reason = answer.fate, answer.reason
                if fate == "running":  # no sooner than Go was sent, whatever clock the destination may have
                    self._ran(max(decided, time.monotonic() - answer.running_for), answer.seconds)
        if fate == "gone":
            await self._run_on()
            raise MigrateFailed(
                f"migration failed after the decision: {reason}; the VM is gone there and runs on here",
                source_alive=True,
            )
        if fate == "undecided":
            self.ownership.move(SourceStage.IN_DOUBT)
            raise MigrationInDoubt(
                f"the link to {self.address} broke at the moment of the decision ({reason}), and for "
                f"{self._asking.timeout:g} s the destination could not be asked whether VM {self.vm.name!r} runs there"
                ". It stays stopped here. If a destination can be started there again, at the same address, ask it "
                "(scripts/migrate --resolve ask): what became of the VM is on its disk. Or look there: if it runs, or "
                "ran, end it here (resolve(run=False), or scripts/migrate --resolve end); if it certainly never did, "
                "let it run here (resolve(run=True), or scripts/migrate --resolve run)"
            )
        self.ownership.move(SourceStage.MOVED)
        try:
            return await self._report(asked)
        finally:
            await self._leave()
            with contextlib.suppress(VmbusError):  # if it cannot be told, it stops listening after a while
                await link.send(Released())

    def _ran(self, at: float, seconds: dict[str, float]) -> None:
        """The vCPUs run at the destination since then, and took so long for it."""
        self._times["running"] = at
        self._cont = seconds.get("cont", 0.0)

    async def _run_on(self) -> None:
        assert self._capture is not None
        try:
            await self._capture.resume()
        except VmbusError as error:
            self.ownership.move(SourceStage.LOST)
            raise MigrateFailed(
                f"migration failed, and the VM is lost, since it could not be set running again: {error}",
                source_alive=False,
            ) from error
        self.ownership.move(SourceStage.KEPT)

    async def _report(self, asked: bool) -> MigrationReport:
        captured, restored, target = self._captured, self._restored, self._target
        assert captured is not None and restored is not None and target is not None
        running_at = self._times["running"]
        spans = spans_of(
            captured,
            restored,
            sent_at=target.sent_at,
            restored_at=self._times["restored"],
            running_at=running_at,
            cont=self._cont,
        )
        downtime = running_at - captured.stopped_at
        qemu = sum(spans[name] for name in QEMU_SPANS)
        found: dict[str, Any] = {}
        with contextlib.suppress(VmbusError):  # QEMU may have ended meanwhile; the VM does not need it any more
            found = await self.vm.monitor.execute("query-migrate")
        return MigrationReport(
            migration=self.migration,
            address=str(self.address),
            phases=self.phases.seconds,
            downtime=downtime,
            downtime_qemu=qemu,
            downtime_device=downtime - qemu,
            spans=spans,
            packets=captured.packets,
            incoming_held=captured.incoming_held,
            channels=restored.channels,
            ram_bytes=int(found.get("ram", {}).get("transferred", 0)),
            state_bytes=captured.state_bytes,
            flushed_pages=captured.flushed_pages,
            flushed_bytes=captured.flushed_bytes,
            attempts=captured.attempts,
            multifd=self._stream.multifd,
            asked=asked,
        )
