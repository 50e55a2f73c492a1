"""The destination of a live migration: lets a source in, starts a server and a QEMU, rebuilds the VM, waits for Go.

One `Destination` serves one migration. Until Go has come it may end at any moment, and does so if anything fails, if
the link is lost, or if Go does not come: then nothing is left of it. After Go the VM is its own. The listening socket
stays open until the source has ended its VM, so that a source whose link broke can ask what became of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from vmbus.errors import EnvironmentProblem, StateError, VmbusError, WaitTimeout
from vmbus.operations.migration.accept import EVERYTHING, Accept
from vmbus.operations.migration.arrival import Arrival
from vmbus.operations.migration.asking import ASK_TIMEOUT
from vmbus.operations.migration.channel import Channel
from vmbus.operations.migration.files import receive_file
from vmbus.operations.migration.fitting import boot_files, check_driven, check_machine, check_states
from vmbus.operations.migration.link import Link, Silence
from vmbus.operations.migration.listener import Listener
from vmbus.operations.migration.messages import (
    Accepted,
    Again,
    Fate,
    Go,
    Hello,
    Prepare,
    Prepared,
    Released,
    Restored,
    Running,
    Sent,
    State,
    short,
)
from vmbus.operations.migration.ownership import DESTINATION, DestinationStage, Ownership
from vmbus.operations.migration.stream import STATE_FILE
from vmbus.operations.migration.tls import Peer
from vmbus.operations.migration.tunnel import Door
from vmbus.operations.migration.verdicts import Record, Stage, Verdicts
from vmbus.operations.own_disks import check_arrival
from vmbus.qemu.qmp import MigrationFailed
from vmbus.snapshot.manifest import Packets
from vmbus.util.interruptible import uninterrupted
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.errors import MigrateFailed
from vmbus.vm.moments import Hook, Moment, no_hook
from vmbus.vm.sockets import numbered
from vmbus.vm.timing import Phases, Progress

T = TypeVar("T")

HELLO_TIMEOUT = 10.0
GO_TIMEOUT = 30.0
"""Seconds for which a VM that is rebuilt waits for Go."""
ANSWER_TIMEOUT = 900.0
"""Seconds for which a VM that came here answers its source if that does not say that it has ended."""
_ON_ITS_WAY = 0.2  # seconds; a source whose stream broke waits a little longer for our reason
_SOURCE_TIMEOUT = 3600.0  # of steps that only the source can bound; a dead source is noticed much earlier
_END_TIMEOUT = 60.0


class Destination:
    """One migration, seen from where the VM arrives.

    `folder` is the new VM's directory, made by the caller when the first source comes; `build` makes the VM with the
    kernel and the initramfs that the source named.
    """

    def __init__(
        self,
        listener: Listener,
        programs: Programs,
        claim: Callable[[VmDescription], Path],
        build: Callable[[Prepare, Path | None, Path | None, str | None], Arrival],
        *,
        progress: Progress | None = None,
        at: Hook = no_hook,
        silence: float | None = None,
        go_timeout: float = GO_TIMEOUT,
        answer_timeout: float = ANSWER_TIMEOUT,
        ask_timeout: float = ASK_TIMEOUT,
        verdicts: Verdicts | None = None,
        accept: Accept = EVERYTHING,
    ) -> None:
        """Raises `EnvironmentProblem` if it cannot be kept on disk what becomes of the VM."""
        self._verdicts = verdicts or Verdicts()
        self._record: Record | None = None
        self._left = False  # something was started here and could not be ended
        self.phases = Phases(progress)
        self.ownership = Ownership(DESTINATION, DestinationStage.PREPARING)
        self.migration: str | None = None
        self.restored: Restored | None = None
        self.source = ""
        self._peer: Peer | None = None
        self.running_at = 0.0
        """CLOCK_MONOTONIC when the vCPUs ran."""
        self.paused = False
        """They stand, as they did at the source."""
        self._listener = listener
        self._programs = programs
        self._accept = accept
        self._claim = claim
        self._build = build
        self._at = at
        self._silence = silence
        self._go_timeout = go_timeout
        self._answer_timeout = answer_timeout
        self._ask_timeout = ask_timeout
        self._answered = asyncio.Event()  # the source, over a connection of its own, what became of its VM
        self._vm: Arrival | None = None
        self._session: asyncio.Task[None] | None = None
        self._came = asyncio.Event()
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._why_ended: VmbusError | None = None

    @property
    def stage(self) -> DestinationStage:
        """Where this migration is: see `vmbus.operations.migration.ownership`."""
        return self.ownership.stage

    async def run(self, timeout: float | None) -> None:
        """Waits for a source and serves it until the VM runs here.

        `stay` is then to be run beside the VM. Raises `WaitTimeout` if no source comes within `timeout` seconds, and
        `MigrateFailed` if it does not work out: then everything that was started here has ended.
        """
        self._listener.serve(self._on_channel)
        try:
            try:
                async with asyncio.timeout(timeout):
                    await self._came.wait()
            except TimeoutError:
                refused = self._listener.last_refusal
                raise WaitTimeout(
                    f"a source to come to {self._listener.address}"
                    + (f" (one was turned away: {refused})" if refused else ""),
                    timeout or 0.0,
                ) from None
            await asyncio.wait({self._done})  # each step of the session has its bound
            if self._go_may_be_lost:
                # Its source asks then, for as long, and nobody else can tell it that its VM may run on.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._answered.wait(), self._ask_timeout)
            self._done.result()
        except BaseException:
            await uninterrupted(self._end_session())
            self._listener.close()
            if self._record is not None:
                self._record.close()
            raise

    async def stay(self) -> None:
        """Answers the source until it has ended its VM, or a bound is over. To be cancelled when the VM ends."""
        try:
            if self._session is not None:
                await asyncio.wait({self._session}, timeout=self._answer_timeout)
        finally:
            self._listener.close()
            if self._session is not None:
                self._session.cancel()
            if self._record is not None:
                self._record.close()

    @property
    def _go_may_be_lost(self) -> bool:
        """The link is silent, and its source may have sent Go to a VM that has ended here. A source that has ended
        closes the link."""
        error = self._done.exception()
        return self.restored is not None and error is not None and isinstance(error.__cause__, Silence)

    @property
    def _cont_seconds(self) -> dict[str, float]:
        return {"cont": self.phases.seconds["cont"]}

    async def _end_session(self) -> None:
        if self._session is not None and not self._session.done():
            self._session.cancel()
            await asyncio.wait({self._session}, timeout=_END_TIMEOUT)

    # --- connections -------------------------------------------------------------------------------------------

    async def _on_channel(self, channel: Channel) -> None:
        with contextlib.suppress(VmbusError):
            async with Link(channel, silence=self._silence) as link:
                hello = await link.expect(Hello, timeout=HELLO_TIMEOUT, what="which migration it is about")
                if refusal := _objection(self._listener, link):
                    await link.tell_failure(refusal)
                elif hello.purpose == "ask":
                    await self._answer(link, hello.migration)
                elif self._session is not None:
                    await link.tell_failure("this destination serves another migration")
                else:
                    try:
                        self._record = self._verdicts.begin(hello.migration)
                    except EnvironmentProblem as error:
                        await link.tell_failure(error)
                        raise
                    self.migration = hello.migration
                    self.source, self._peer = link.name, link.channel.peer
                    self._session = asyncio.create_task(self._serve(link), name="migration's destination")
                    self._came.set()
                    await asyncio.wait({self._session})

    async def _answer(self, link: Link, migration: str) -> None:
        if migration != self.migration or link.channel.peer != self._peer:
            # Another destination was here before us, or another source asks; what is on disk is its word.
            await link.send(self._verdicts.find(migration))
        else:
            if self.ownership.row.fate == "gone":
                # A source asks because its link broke. Its Go cannot come any more, and now it never will.
                self._why_ended = self._why_ended or StateError("its source asks what became of it: Go was lost")
                await self._end_session()
            fate = self.ownership.row.fate
            running_for = time.monotonic() - self.running_at if fate == "running" else 0.0
            if fate == "gone" and (self._left or self.stage is not DestinationStage.DISCARDED):
                fate = "undecided"  # it takes longer than it should, or for ever; the source asks again
            assert fate is not None
            await link.send(
                Fate(
                    fate=fate,
                    destination=self._record.destination if self._record is not None else None,
                    reason=short(self._why_ended or ""),
                    running_for=running_for,
                    seconds=self._cont_seconds if fate == "running" else {},
                )
            )
            if fate == "gone":
                self._answered.set()
        with contextlib.suppress(VmbusError):  # the asking side hangs up when it has read the answer
            await link.expect(Released, timeout=HELLO_TIMEOUT, what="to hang up")

    # --- the migration -----------------------------------------------------------------------------------------

    async def _serve(self, link: Link) -> None:
        try:
            async with link.watch():
                state = await self._rebuild(link)
                with self.phases("go"):
                    await link.expect(Go, timeout=self._go_timeout, what="Go")
            self.ownership.move(DestinationStage.DECIDED)
            await self._at(Moment.BEFORE_CONT)
            assert self._vm is not None
            with self.phases("cont"):
                self._note("starting")
                await self._vm.release()
                if state.run:
                    await self._vm.run()
                self.paused = not state.run
            self.running_at = time.monotonic()
            self.ownership.move(DestinationStage.RUNNING)
        except BaseException as error:
            await uninterrupted(self._discard(link, error))
            if isinstance(error, asyncio.CancelledError):
                raise
            return
        # From here on nothing can be taken back: the VM runs, whoever may know it.
        self._done.set_result(None)
        with contextlib.suppress(VmbusError):
            self._note("running")
        with contextlib.suppress(VmbusError):
            await link.send(Running(seconds=self._cont_seconds))
            await self._flush_record()
            await link.expect(Released, timeout=_SOURCE_TIMEOUT, what="to end its VM")
            return
        await self._flush_record()
        # The source does not know. It asks over another connection; `stay` bounds how long we wait for that.
        await asyncio.sleep(self._answer_timeout)

    async def _discard(self, link: Link, error: BaseException) -> None:
        """Ends everything, and only then says so: a source that hears it may let its VM run."""
        problem = self._why_ended = self._why_ended or _as_ours(error)
        self._left = True
        try:
            if self._vm is not None:
                await self._vm.discard()
            self._left = False
            with contextlib.suppress(VmbusError):
                self._note("gone", str(problem))
            await self._flush_record()
        finally:
            self.ownership.move(DestinationStage.DISCARDED)
            if not self._left:
                await link.tell_failure(problem)
            if not self._done.done():
                if isinstance(error, Exception) and not isinstance(error, VmbusError):
                    self._done.set_exception(error)  # a defect of ours, not to be dressed up
                else:
                    failed = MigrateFailed(
                        f"the VM did not arrive: {problem}; nothing is left of it here", source_alive=False
                    )
                    failed.__cause__ = problem
                    self._done.set_exception(failed)
                self._done.exception()  # whoever runs us may have been cancelled: then nobody asks

    def _note(self, stage: Stage, reason: str = "") -> None:
        assert self._record is not None
        self._record.note(stage, reason)

    async def _flush_record(self) -> None:
        assert self._record is not None
        with contextlib.suppress(VmbusError):  # a lost line makes an answer less certain, and never another one
            await asyncio.to_thread(self._record.flush)

    async def _rebuild(self, link: Link) -> State:
        """Everything up to a VM that only needs its vCPUs to run."""
        with self.phases("prepare"):
            prepare = await link.expect(Prepare, timeout=HELLO_TIMEOUT, what="what is to move")
            behind = [layer.file for disk in prepare.disks for layer in disk.behind]
            self._accept.check(prepare.vm, link.name, behind)
            check_machine(prepare, self._programs, link.name)
            await asyncio.to_thread(check_arrival, prepare.vm, prepare.disks, link.name)
            folder = self._claim(prepare.vm)
            assert self._record is not None
            destination = self._record.destination
            kernel, initramfs = await boot_files(link, prepare, self._programs, folder, destination)
            vm = self._vm = self._build(prepare, kernel, initramfs, _host(self._listener, link))
        while True:
            await self._at(Moment.BEFORE_STREAM)
            stream = await vm.start(self.phases, prepare.multifd)
            check_driven(link.name, there=prepare.driven, here=await vm.driven())
            # While the VM still runs at the source. What the guest changes until it stops is written then.
            with self.phases("pci ahead"):
                await vm.replay_ahead(prepare.machine.configs)
            self.ownership.move(DestinationStage.LOADING)
            await link.send(_invitation(self._listener, link, stream, prepare.multifd))
            loading = asyncio.create_task(vm.loaded(), name="QEMU loads its stream")
            try:
                await self._at(Moment.RAM_COPY)
                state = await self._receive(link, vm, loading, prepare.vm)
                if state is not None:
                    break
            finally:
                if not loading.done():
                    loading.cancel()
                await asyncio.gather(loading, return_exceptions=True)  # its error is told, or is only a consequence
                self._listener.close_door()
            # The source gave the pass up and begins another; QEMU cannot load a second stream.
            self.ownership.move(DestinationStage.PREPARING)
            await vm.start_over()
        await self._put_back(link, vm, state)
        return state

    async def _receive(
        self, link: Link, vm: Arrival, loading: asyncio.Task[None], described: VmDescription
    ) -> State | None:
        """The state, given to the server, and memory, loaded. None if the source begins again."""
        with self.phases("ram"):
            first = await _unless_failed(
                loading, link.expect(State, Again, timeout=_SOURCE_TIMEOUT, what="the device's state")
            )
        if isinstance(first, Again):
            return None
        with self.phases("state"):
            check_states(first, described, link.name)
            await self._at(Moment.WRITING)
            packets = await _receive_states(link, vm, first, self._accept)
            if packets != first.packets:
                raise StateError(f"the server found {packets} in the state; {link.name} saved {first.packets}")
            await link.send(Accepted(packets=packets))
        with self.phases("load"):
            second = await _unless_failed(
                loading, link.expect(Sent, Again, timeout=_SOURCE_TIMEOUT, what="QEMU's last page")
            )
            if isinstance(second, Again):
                return None
            await self._at(Moment.LOADING)
            await loading
        return first

    async def _put_back(self, link: Link, vm: Arrival, state: State) -> None:
        await self._at(Moment.PCI_REPLAY)
        with self.phases("pci"):
            writes = await vm.replay([one.pci_config for one in state.states])
        await self._at(Moment.PACKET_RESTORE)
        with self.phases("device"):
            packets, channels = await vm.rebuild()
        self.ownership.move(DestinationStage.RESTORED)
        seconds = {name: self.phases.seconds[name] for name in ("pci", "device")}
        self.restored = Restored(packets=packets, channels=channels, pci_writes=writes, seconds=seconds)
        await link.send(self.restored)


async def _receive_states(link: Link, vm: Arrival, state: State, accept: Accept) -> Packets:
    """The states' bytes, given to the servers; the packets found in them."""
    files = {vm.folder / numbered(STATE_FILE, index): one for index, one in enumerate(state.states)}
    try:
        for path, one in files.items():
            await receive_file(link, one.file, path)
            await asyncio.to_thread(accept.check_saved, one.device, path, link.name)
        return await vm.load_states([(path, one.file.sha256, one.device) for path, one in files.items()])
    finally:
        for path in files:
            path.unlink(missing_ok=True)


def _as_ours(error: BaseException) -> VmbusError:
    if isinstance(error, VmbusError):
        return error
    return StateError(f"it was interrupted ({f'{type(error).__name__} {error}'.strip()})")


def _host(listener: Listener, link: Link) -> str | None:
    """Where QEMU's stream is to come to, if it is a TCP port of its own."""
    return None if listener.tls else link.channel.local_host


def _objection(listener: Listener, link: Link) -> str | None:
    """Why this source may not come, though its certificate is of the CA."""
    tls, peer = listener.tls, link.channel.peer
    return None if tls is None or peer is None else tls.objection(peer)


def _invitation(listener: Listener, link: Link, stream: int | str, multifd: int) -> Prepared:
    if listener.tls is None:
        return Prepared(stream=stream)
    door = listener.door = Door(Path(str(stream)), link.channel.peer, 1 + multifd)
    return Prepared(key=door.key)


async def _unless_failed(loading: asyncio.Task[None], message: Awaitable[T]) -> T:
    """The message, unless QEMU gives its load up before it comes. Whoever ends a stream says so first, on another
    connection: what is on its way is still heard."""
    task = asyncio.ensure_future(message)
    try:
        await asyncio.wait({task, loading}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and isinstance(loading.exception(), MigrationFailed):
            await asyncio.wait({task}, timeout=_ON_ITS_WAY)
        if not task.done():
            loading.result()  # raises if it failed
        return await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)  # whoever interrupts us knows why
