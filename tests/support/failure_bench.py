"""How a cell of the failure matrix is run: the real `VirtualMachine`, real processes, real signals.

A `Bench` has a directory of its own, in which everything lies that a cell may leave behind, and one VM that is the
source of one cell after another as long as it runs on. All is asynchronous, on the loop of one thread that lasts: a
child ends with the thread that started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support import pace
from support.failure_matrix import Cell, Failure, Operation, Outcome
from support.matrix_owner import TAG, Errand
from support.pace import eventually
from support.processes import alive
from vmbus.cli.supervisor import Supervisor
from vmbus.device.description import DeviceDescription, ProviderDescription
from vmbus.errors import VmbusError
from vmbus.operations import capture, restore, revert
from vmbus.operations.machine import VirtualMachine
from vmbus.operations.migration import arrival, asking, link
from vmbus.operations.migration.address import UnixAddress
from vmbus.operations.migration.listener import listen
from vmbus.provision.libvfio_user import find_library
from vmbus.server.control import ControlClient
from vmbus.snapshot.bundle import SnapshotWriter, open_snapshot
from vmbus.util.patience import patient
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription
from vmbus.vm.moments import Moment
from vmbus.vm.run_directory import clean_stale, runtime_base

TESTS = Path(__file__).resolve().parents[1]
SECRET = secrets.token_bytes(32)
SOON = 30.0
LATE = 1.5
"""Seconds, of a machine of usual speed, for which a callback that returns too late holds up the server."""
_PREFIX = "vmbus-fm-"  # directories of benches; short, since sockets lie in them
SOURCE_SIDE = (
    Moment.BEFORE_STREAM,
    Moment.RAM_COPY,
    Moment.PRE_SWITCHOVER,
    Moment.SAVING,
    Moment.WRITING,
    Moment.STOPPED,
    Moment.BEFORE_GO,
)
"""Moments of a migration at which the source strikes; at the others the destination does."""

_libc = ctypes.CDLL(None, use_errno=True)


# --- processes and files that belong to a bench


def processes(base: Path) -> dict[int, str]:
    """Living processes whose arguments name a directory: process id to ``server``, ``qemu``, ``owner`` or the rest."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes()
            if str(base).encode() not in words or (entry / "stat").read_text().rpartition(") ")[2][0] == "Z":
                continue
            text = words.replace(b"\0", b" ").decode(errors="replace")
            kinds = {"vmbus.cli.serve": "server", "-chardev": "qemu", "matrix_owner": "owner"}
            found[int(entry.name)] = next((kind for word, kind in kinds.items() if word in text), text)
    return found


def kill(pid: int) -> None:
    """The process is dead when this returns: else the operation might end before, and nothing would have failed."""
    os.kill(pid, signal.SIGKILL)
    pace.until(lambda: not alive(pid), "a killed process to be dead", SOON, every=0.0005)


async def forever() -> None:
    """Stays until it is interrupted, as it will be."""
    async with asyncio.timeout(pace.seconds(SOON)):
        await asyncio.Event().wait()


class Disk:
    """A small file system of its own, that can be full. Raises PermissionError where there may not be any."""

    SIZE = 96 << 20

    def __init__(self, path: Path, size: int = SIZE) -> None:
        self.path = path
        path.mkdir(mode=0o700)
        if _libc.mount(b"tmpfs", bytes(path), b"tmpfs", 0, b"mode=700,size=%d" % size) != 0:
            code = ctypes.get_errno()
            raise PermissionError(code, f"cannot mount a file system: {os.strerror(code)}")

    def fill(self) -> None:
        with contextlib.suppress(OSError), (self.path / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(1 << 20)):
                pass
        with contextlib.suppress(OSError), (self.path / "filler").open("ab", buffering=0) as file:
            while file.write(bytes(512)):
                pass

    def empty(self) -> None:
        (self.path / "filler").unlink(missing_ok=True)

    def remove(self) -> None:
        _libc.umount2(bytes(self.path), 2)  # MNT_DETACH
        self.path.rmdir()


def _clean_stale() -> None:
    """Removes what a test run that was killed has left: the file system, above all."""
    for path in Path("/tmp").glob(f"{_PREFIX}*"):
        process = path.name.removeprefix(_PREFIX).partition("-")[0]
        if not alive(int(process)):
            _libc.umount2(bytes(path / "b"), 2)
            shutil.rmtree(path, ignore_errors=True)


class Wire:
    """What lies between source and destination: connections to `path` go on to the address `to`, until it is cut."""

    def __init__(self, path: Path, to: UnixAddress) -> None:
        self.path = path
        self._to = to
        self._cut = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_unix_server(self._accept, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.path.unlink(missing_ok=True)

    def cut(self) -> None:
        """Nothing gets through any more, in either direction, and nobody is told."""
        self._cut = True

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self._cut:
                await asyncio.Event().wait()
            there = await asyncio.open_unix_connection(self._to.path)
            both = [self._carry(reader, there[1]), self._carry(there[0], writer)]
            await asyncio.gather(*both)
        except OSError:
            pass  # nobody listens there any more: as if refused
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                if self._cut:
                    await asyncio.Event().wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            if not self._cut:
                writer.close()


class OwnerProcess:
    """A `support.matrix_owner`."""

    def __init__(self, errand: Errand, base: Path) -> None:
        self._errand = errand
        self._base = base
        self.lines: list[str] = []

    async def __aenter__(self) -> OwnerProcess:
        # The directory is named so that it is found among `processes`.
        words = [sys.executable, "-m", "support.matrix_owner", msgspec.json.encode(self._errand, enc_hook=str).decode()]
        self.process = await asyncio.create_subprocess_exec(
            *words,
            str(self._base),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=(self._base.parent / "owner.log").open("ab"),
        )
        self._reading = asyncio.create_task(self._read())
        return self

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.lines.append(line.decode().strip())

    async def says(self, word: str) -> None:
        await eventually(
            lambda: word in self.lines or self._reading.done(),
            f"the owner to say {word}; it said {self.lines}",
            SOON,
        )
        assert word in self.lines, f"the owner ended: {self.lines}"

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")

    def kill(self) -> None:
        self.process.kill()

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        await self._reading


# --- the bench


@dataclass
class Found:
    """What came of a cell. `problem`: the error of the side that reports."""

    problem: BaseException | None = None
    refusal: BaseException | None = None
    """The destination's."""
    arrived: VirtualMachine | None = None
    texts: list[str] = field(default_factory=list)

    def text(self) -> str:
        errors = [str(error) for error in (self.problem, self.refusal) if error is not None]
        return "\n".join(errors + self.texts)


class Bench:
    """See the module. `programs` may name the real QEMU, or one that stands in for it."""

    def __init__(self, programs: Callable[[Path], Programs], patch: pytest.MonkeyPatch) -> None:
        _clean_stale()
        self.root = Path("/tmp") / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(2)}"
        self.root.mkdir(mode=0o700)
        self.base = self.root / "b"
        self.disk = Disk(self.base)
        self.switch = self.root / "switch"
        self.log = self.root / "log"
        self.socket = self.root / "d"  # where destinations wait
        self.log.touch()
        self.programs = programs(self.root)
        patch.setenv("XDG_RUNTIME_DIR", str(self.base))
        patch.setenv("VMBUS_STATE", str(self.base / "state"))
        patch.setenv("FAKE_QEMU_LOG", str(self.log))
        patch.setenv("VMBUS_PROVIDER_PATH", str(TESTS))
        patch.setenv("VMBUS_PROVIDERS", "support.faults:Faulty")
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS, TESTS.parent / "device", TESTS.parent / "guest"))))
        self.patch = patch
        self.vm: VirtualMachine | None = None
        self.supervisor: asyncio.Task[str] | None = None
        self.lives = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="owner of the matrix's VMs")
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any], timeout: float = 90.0) -> Any:
        """Runs a coroutine on the bench's loop."""

        async def bounded() -> Any:
            return await asyncio.wait_for(work, timeout)

        return asyncio.run_coroutine_threadsafe(bounded(), self._loop).result(timeout + 10)

    def close(self) -> None:
        try:
            self.run(self.end_source())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(pace.seconds(10))
            self._loop.close()
            left = processes(self.root)
            self.disk.remove()
            shutil.rmtree(self.root)
            assert not left, f"processes outlive the bench: {left}"

    def description(self) -> VmDescription:
        hold = {"hold": 8, "hold_seconds": 0.01}
        echo = ProviderDescription("echo", "echo", "00000000-0000-4000-8000-0000000000e1", hold)
        burst = ProviderDescription("burst", "burst", "00000000-0000-4000-8000-0000000000e2")
        faulty = ProviderDescription(
            "support.faults:Faulty", "faulty", "00000000-0000-4000-8000-0000000000e3", {"switch": str(self.switch)}
        )
        return VmDescription("demo", DeviceDescription("vmbus0", [echo, burst, faulty]))

    # --- the source

    async def launch(self) -> VirtualMachine:
        return await VirtualMachine.launch(self.description(), self.programs)

    async def in_flight(self, vm: VirtualMachine) -> None:
        """Waits until packets of the host are in flight, and requests come and go."""
        deadline = time.monotonic() + pace.seconds(SOON)
        while (counts := await vm.call_agent("counts"))["held"] < 100 or counts["completed"] < 50:
            assert time.monotonic() < deadline, counts
            await asyncio.sleep(0.01)

    async def source(self) -> VirtualMachine:
        """A VM that runs, with packets in flight; the one of the cell before if it does."""
        if self.vm is None:
            self.vm = await self.launch()
            self.supervisor = asyncio.create_task(Supervisor(self.vm).run())
            await eventually(self.vm.paths.supervisor.exists, "the supervisor's socket", SOON)
            await self.in_flight(self.vm)
            self.lives += 1
        return self.vm

    async def goes_on(self, vm: VirtualMachine) -> None:
        """Checks that a VM runs, that its guest and its device do their work, and that nothing was lost up to now."""
        assert not vm.ended and await vm.monitor.running(), "the vCPUs stand"
        status = await vm.call_server("status")
        assert status["phase"] == "running", status["phase"]
        deadline = time.monotonic() + pace.seconds(SOON)
        before = (await vm.call_agent("counts"))["completed"]
        while (counts := await vm.call_agent("counts"))["completed"] < before + 20:
            assert time.monotonic() < deadline, f"the workload does not go on: {counts}"
            await asyncio.sleep(0.005)
        assert counts["good"] and not counts["failed"], counts

    async def arrived_runs(self, vm: VirtualMachine) -> None:
        """Checks that a VM runs that was moved, with all its packets."""
        status = await vm.call_server("status")
        assert await vm.monitor.running() and status["phase"] == "running"
        assert vm.restored is not None and sum(vm.restored.packets.values()) > 100

    async def books(self, vm: VirtualMachine) -> None:
        """Ends the workload: every transaction exactly once."""
        books = await vm.call_agent("finish")
        assert books["good"] and not books["failed"], books

    async def end_source(self) -> None:
        """Ends the source, with its books if it runs."""
        if self.vm is None:
            return
        vm, self.vm = self.vm, None
        assert self.supervisor is not None
        try:
            if not vm.ended:
                await self.books(vm)
        finally:
            await vm.kill()
            with contextlib.suppress(VmbusError):
                await self.supervisor

    async def forget_source(self) -> None:
        """The source is lost, or stands still for ever: the next cell has a new one."""
        vm, self.vm = self.vm, None
        assert vm is not None and self.supervisor is not None
        await vm.kill()
        with contextlib.suppress(VmbusError):
            await self.supervisor

    # --- the blow

    def strike(self, cell: Cell, known: set[int], wire: Wire | None = None) -> None:
        """Makes happen what the cell is about, all but the death of an owner or an asker. `known`: the source's."""
        children = {kind: pid for pid, kind in processes(self.base).items() if pid not in known}
        match cell.failure:
            case Failure.SOURCE_SERVER | Failure.SOURCE_QEMU:
                assert self.vm is not None
                child = self.vm.server if cell.failure is Failure.SOURCE_SERVER else self.vm.qemu
                assert child is not None
                kill(child.pid)
            case Failure.DESTINATION_SERVER:
                kill(children["server"])
            case Failure.DESTINATION_QEMU:
                kill(children["qemu"])
            case Failure.LINK_CUT:
                assert wire is not None
                wire.cut()
            case Failure.SOURCE_DISK | Failure.DESTINATION_DISK:
                self.disk.fill()
            case Failure.SAVE_LATE:
                # In seconds of this moment: the server may be older, and the machine have been faster then.
                self.switch.write_text(f"save returns after {patient(LATE)}")
            case _:
                self.switch.write_text(_WORDS[cell.failure])

    @contextlib.contextmanager
    def shorter(self, cell: Cell) -> Iterator[None]:
        """Bounds that a test can wait for, where the cell runs into them."""
        with self.patch.context() as patch:
            hangs = cell.failure in (Failure.SAVE_LATE, Failure.SAVE_STUCK)
            if cell.failure is Failure.SAVE_HANGS or hangs:
                # Above what all others take together, on a busy machine; beyond the save's own (`patient`) bound.
                patch.setattr(capture, "PROVIDERS_TIMEOUT", patient(1.0) if hangs else 0.3)
            if hangs:
                patch.setattr(capture, "SAVE_TIMEOUT", 0.6)
                longer = 10.0 if cell.failure is Failure.SAVE_LATE else 1.0
                patch.setattr(ControlClient.call, "__defaults__", (longer,))
            if cell.failure is Failure.RESTORE_HANGS:
                patch.setattr(arrival, "LOAD_TIMEOUT", 1.0)
                patch.setattr(restore, "FINISH_TIMEOUT", 1.0)
                patch.setattr(revert, "FINISH_TIMEOUT", 1.0)
            if cell.failure is Failure.LINK_CUT:
                patch.setattr(link, "PING_INTERVAL", 0.1)
                patch.setattr(asking, "_ASK_ONCE", 0.3)
            yield

    # --- one cell

    async def cell(self, cell: Cell) -> Found:
        """Runs a cell and checks all that it promises."""
        with self.shorter(cell):
            try:
                match cell.operation:
                    case Operation.MIGRATE:
                        found = await self.migration(cell)
                    case Operation.RESTORE:
                        found = await self.restore(cell)
                    case Operation.REVERT:
                        found = await self.going_back(cell)
                    case _:
                        found = await self.taking(cell)
            except BaseException:
                if self.vm is not None:  # nobody knows what it is good for now
                    await self.forget_source()
                raise
            finally:
                self.disk.empty()
                self.switch.unlink(missing_ok=True)
        print(f"{cell.name}: {cell.outcome.value}: {found.text()}")
        assert re.search(cell.says, found.text()), f"the error does not say {cell.says!r}: {found.text()}"
        self.never_both()
        await self.nothing_left()
        return found

    def never_both(self) -> None:
        """No vCPUs started while those of another process ran."""
        both = [line for line in self.log.read_text().splitlines() if " both " in line]
        assert not both, f"the VM ran twice: {both}"

    async def nothing_left(self) -> None:
        """Whatever is there now belongs to the source, if there is one."""
        mine: set[int] = set() if self.vm is None else {child.pid for child in self.vm.children}
        await eventually(
            lambda: set(processes(self.root)) <= mine, f"processes to end: {processes(self.root)}, {mine}", SOON
        )
        clean_stale(runtime_base())  # what a dead owner leaves is removed by the next start
        directories = {path.name for path in runtime_base().iterdir()}
        assert directories == ({self.vm.name} if self.vm is not None else set()), directories
        if self.vm is not None:
            sockets = {"vfio", "control", "qmp", "qmp-tools", "agent", "supervisor"}
            expected = {f"{name}.sock" for name in sockets} | {"owner.json", "device.json", "server.log", "qemu.log"}
            expected |= {"console.sock", "console.log", "viewers.sock"}
            there = {path.name for path in self.vm.run_directory.path.iterdir()}
            assert there <= expected | {"checkpoints", "departure", "arrival"}, there - expected
        own = {"b", "log", "owner.log", "boot", "snapshot", "checkpoints", "whole"}
        left = {path.name for path in self.root.iterdir()} - own
        assert not left, f"left behind: {left}"

    # --- save and checkpoint

    @staticmethod
    def absent(folder: Path) -> None:
        assert not folder.exists(), "a snapshot is there that was not finished"

    def partial(self, folder: Path) -> list[Path]:
        return list(folder.parent.glob(f".{folder.name}.partial-*"))

    async def taking(self, cell: Cell) -> Found:
        full = cell.failure is Failure.SOURCE_DISK
        checkpoint = cell.operation is Operation.CHECKPOINT
        folder = self.root / "taken"
        if full:  # where the disk is the small one
            folder = self.base / "taken"
        elif checkpoint:
            folder = self.root / "checkpoints"
        try:
            if cell.failure is Failure.SOURCE_OWNER:
                return await self._taking_without_owner(cell, folder)
            return await self._taking(cell, folder, None if checkpoint and full else folder)
        finally:
            if not checkpoint:
                shutil.rmtree(folder, ignore_errors=True)

    async def _taking(self, cell: Cell, folder: Path, where: Path | None) -> Found:
        vm = await self.source()
        found = Found()
        asker: list[asyncio.StreamWriter] = []

        async def at(moment: Moment) -> None:
            if moment is not cell.phase:
                return
            if cell.failure is Failure.ASKER:
                asker[0].close()
                await forever()
            self.strike(cell, {child.pid for child in vm.children})

        checkpoint = cell.operation is Operation.CHECKPOINT
        live = cell.operation is Operation.LIVE_SAVE
        if cell.failure is Failure.SOURCE_DISK and cell.phase is Moment.BEFORE_STREAM:
            self.disk.fill()  # its first files are written before there is any moment
        if cell.failure is Failure.ASKER:
            arguments: dict[str, Any] = {"tag": TAG} if checkpoint else {"live": live, "keep": live}
            name = "checkpoint" if checkpoint else "save"
            await self._ask(vm, name, arguments | {"directory": str(folder)}, at, asker)
        else:
            try:
                if checkpoint:
                    await vm.checkpoint(TAG, directory=where, at=at)
                else:
                    await vm.save(folder, live=live, keep=live, at=at)
            except VmbusError as error:
                found.problem = error
        assert not self.partial(folder)
        if cell.outcome is Outcome.SOURCE:
            await self.goes_on(vm)
        else:
            assert self.supervisor is not None
            if not vm.ended:
                with pytest.raises(VmbusError) as caught:
                    await vm.wait_ended()
                found.texts.append(str(caught.value))
            await self.forget_source()
        if checkpoint:
            if where is not None and not vm.ended:
                assert vm.checkpoints(directory=where) == []
        elif cell.outcome is Outcome.SNAPSHOT:
            await open_snapshot(folder, self.programs)
            self.keep(folder)
        else:
            self.absent(folder)
        return found

    def keep(self, folder: Path) -> None:
        """A whole snapshot of a source that is lost, before it is removed."""

    async def _ask(
        self, vm: VirtualMachine, name: str, arguments: dict[str, Any], at: Any, asker: list[asyncio.StreamWriter]
    ) -> None:
        """As a command does it, whose end closes its connection; returns when the owner has done with it."""
        perform = getattr(vm, name)
        over = asyncio.Event()

        async def hooked(*arguments: Any, **options: Any) -> Any:
            try:
                return await perform(*arguments, **options, at=at)
            finally:
                over.set()

        setattr(vm, name, hooked)
        try:
            _, writer = await asyncio.open_unix_connection(str(vm.paths.supervisor))
            asker.append(writer)
            writer.write(msgspec.json.encode({"command": name, "arguments": arguments}) + b"\n")
            async with asyncio.timeout(pace.seconds(SOON)):
                await over.wait()
        finally:
            delattr(vm, name)

    async def _taking_without_owner(self, cell: Cell, folder: Path) -> Found:
        errand = Errand(cell.operation, self.programs, self.description(), str(folder), halt=cell.phase)
        if cell.operation is Operation.CHECKPOINT:
            errand.folder = str(self.root / "orphaned")
        await self.end_source()
        async with OwnerProcess(errand, self.base) as owner:
            await owner.says("ready")
            owner.go()
            await owner.says(cell.phase.name)
            owner.kill()
        if cell.operation is Operation.CHECKPOINT:
            assert not list((self.root / "orphaned").glob("*.json"))
            shutil.rmtree(self.root / "orphaned")
            return Found()
        self.absent(folder)
        for path in self.partial(folder):  # the kernel has let go of the dead owner's lock, so the next save removes it
            os.utime(path, (0, 0))
        SnapshotWriter.begin(folder).abort()
        assert not self.partial(folder)
        return Found()

    # --- restore

    async def snapshot(self) -> Path:
        folder = self.root / "snapshot"
        if not folder.exists():
            await (await self.source()).save(folder, live=True, keep=True)
        return folder

    async def restore(self, cell: Cell) -> Found:
        folder = await self.snapshot()
        await self.end_source()
        found = Found()
        if cell.failure is Failure.DESTINATION_OWNER:
            errand = Errand(cell.operation, self.programs, self.description(), str(folder), halt=cell.phase)
            async with OwnerProcess(errand, self.base) as owner:
                await owner.says(cell.phase.name)
                owner.kill()
        else:

            async def at(moment: Moment) -> None:
                if moment is cell.phase:
                    self.strike(cell, set())

            if cell.failure is Failure.DESTINATION_DISK:
                self.disk.fill()  # all that a restore writes it writes in the beginning
            with pytest.raises(VmbusError) as caught:
                await VirtualMachine.restore(folder, self.programs, at=at)
            found.problem = caught.value
        self.disk.empty()
        await open_snapshot(folder, self.programs)  # as it was, to the last byte
        return found

    # --- revert

    async def going_back(self, cell: Cell) -> Found:
        folder = self.root / "back"
        await self.end_source()
        try:
            if cell.failure is Failure.SOURCE_OWNER:
                errand = Errand(cell.operation, self.programs, self.description(), str(folder), halt=cell.phase)
                async with OwnerProcess(errand, self.base) as owner:
                    await owner.says("ready")
                    owner.go()
                    await owner.says(cell.phase.name)
                    owner.kill()
                found = Found()
            else:
                found = await self._going_back(cell, folder)
            assert (folder / f"{TAG}.json").exists(), "the checkpoint is gone"
            return found
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _going_back(self, cell: Cell, folder: Path) -> Found:
        vm = await self.source()
        await vm.call_agent("freeze")  # the driver's own memory cannot go back here
        await vm.checkpoint(TAG, directory=folder)
        before = (await vm.call_server("status"))["packets"]
        found = Found()
        asker: list[asyncio.StreamWriter] = []

        async def at(moment: Moment) -> None:
            if moment is not cell.phase:
                return
            if cell.failure is Failure.ASKER:
                asker[0].close()
                await asyncio.sleep(0.05)  # the cancellation is on its way, and must not change anything
            else:
                self.strike(cell, set())

        if cell.failure is Failure.ASKER:
            await self._ask(vm, "revert", {"tag": TAG, "directory": str(folder)}, at, asker)
        else:
            with pytest.raises(VmbusError) as caught:
                await vm.revert(TAG, directory=folder, at=at)
            found.problem = caught.value
            assert vm.ended
        if cell.outcome is Outcome.SOURCE:
            status = await vm.call_server("status")
            assert await vm.monitor.running() and (status["phase"], status["packets"]) == ("running", before)
        await self.forget_source()
        return found

    # --- live migration

    async def migration(self, cell: Cell) -> Found:
        here = cell.failure is not Failure.SOURCE_OWNER
        if here:
            await self.source()
        else:
            await self.end_source()
        address = UnixAddress(str(self.socket))
        if cell.failure is Failure.LINK_CUT:
            async with Wire(self.root / "w", address) as wire:
                found = await self._migration(cell, address, wire)
        else:
            found = await (self._migration(cell, address) if here else self._orphaned(cell, address))
        self.socket.unlink(missing_ok=True)  # a dead owner's; who listens there next takes its place
        return found

    @contextlib.asynccontextmanager
    async def _receiving(self, address: UnixAddress, **options: Any) -> AsyncIterator[asyncio.Task[VirtualMachine]]:
        listener = await listen(address, SECRET)
        task = asyncio.create_task(
            VirtualMachine.receive(listener, self.programs, timeout=pace.seconds(SOON), **options)
        )
        try:
            yield task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def _landed(self, task: Awaitable[VirtualMachine], found: Found) -> None:
        try:
            async with asyncio.timeout(pace.seconds(SOON)):
                found.arrived = await task
        except VmbusError as error:
            found.refusal = error

    async def _migration(self, cell: Cell, address: UnixAddress, wire: Wire | None = None) -> Found:
        way = address if wire is None else UnixAddress(str(wire.path))
        vm = self.vm
        assert vm is not None
        known = {child.pid for child in vm.children}
        found = Found()
        asker: list[asyncio.StreamWriter] = []
        owner: OwnerProcess | None = None

        async def strike() -> None:
            if cell.failure is Failure.ASKER:
                asker[0].close()
            elif cell.failure is Failure.DESTINATION_OWNER:
                assert owner is not None
                owner.kill()
            else:
                self.strike(cell, known, wire)
            waits = cell.failure in (Failure.ASKER, Failure.LINK_CUT, Failure.DESTINATION_OWNER)
            if waits and cell.phase is not Moment.BEFORE_CONT:
                await forever()

        def hook(mine: bool) -> Any:
            async def at(moment: Moment) -> None:
                if mine and moment is cell.phase:
                    await strike()

            return at

        by_source = cell.phase in SOURCE_SIDE
        early = cell.failure is Failure.DESTINATION_DISK and cell.phase is Moment.BEFORE_STREAM
        if early or cell.failure is Failure.DESTINATION_DISK:
            by_source = False
        silence = 1.0 if cell.failure is Failure.LINK_CUT else pace.seconds(10.0)
        options: dict[str, Any] = {"silence": silence, "ask_timeout": 10.0}
        if cell.outcome is Outcome.DOUBT:
            options["ask_timeout"] = 1.0

        async def depart() -> None:
            secret_file = self.root / "secret"
            try:
                if cell.failure is Failure.ASKER:
                    secret_file.touch(mode=0o600)
                    secret_file.write_bytes(SECRET)
                    arguments = {"address": str(way), "secret_file": str(secret_file)}
                    await self._ask(vm, "migrate", arguments, hook(by_source), asker)
                else:
                    await vm.migrate(str(way), SECRET, at=hook(by_source), **options)
            except VmbusError as error:
                found.problem = error
            finally:
                secret_file.unlink(missing_ok=True)

        if cell.failure is Failure.DESTINATION_OWNER:
            errand = Errand(cell.operation, self.programs, self.description(), "", str(address), SECRET.hex(), True)
            errand.halt = None if by_source else cell.phase
            async with OwnerProcess(errand, self.base) as owner:
                await owner.says("ready")
                leaving = asyncio.create_task(depart())
                if not by_source:
                    await owner.says(cell.phase.name)
                    owner.kill()
                await leaving
        else:
            async with self._receiving(address, at=hook(not by_source), silence=silence, ask_timeout=2.0) as receiving:
                await depart()
                await self._landed(receiving, found)
        if cell.outcome is Outcome.DOUBT and cell.failure is Failure.DESTINATION_OWNER:
            # Another destination there knows from the disk that it never ran.
            assert vm.in_doubt and not vm.ended and not await vm.monitor.running()
            async with self._receiving(address):
                await vm.resolve(run=None)
            await self.goes_on(vm)
        else:
            await self._moved(cell, vm, found)
        return found

    async def _moved(self, cell: Cell, vm: VirtualMachine, found: Found) -> None:
        """Checks who runs the VM now."""
        arrived = found.arrived
        assert (arrived is not None) == (cell.outcome in (Outcome.DESTINATION, Outcome.DOUBT)), found.text()
        if arrived is not None:
            await self.arrived_runs(arrived)
        if cell.outcome is Outcome.SOURCE:
            await self.goes_on(vm)
            return
        if cell.outcome is Outcome.DOUBT:
            assert vm.in_doubt and not vm.ended and not await vm.monitor.running()
            await vm.resolve(run=False)
        assert vm.ended
        if arrived is not None:
            await arrived.kill()
        await self.forget_source()

    async def _orphaned(self, cell: Cell, address: UnixAddress) -> Found:
        """The source belongs to another process, which is killed."""
        found = Found()
        by_source = cell.phase in SOURCE_SIDE
        errand = Errand(
            cell.operation, self.programs, self.description(), "", str(address), SECRET.hex(),
            halt=cell.phase if by_source else None,
        )  # fmt: skip
        async with OwnerProcess(errand, self.base) as owner:

            async def at(moment: Moment) -> None:
                if not by_source and moment is cell.phase:
                    owner.kill()
                    if cell.outcome is Outcome.NOBODY:
                        await forever()

            await owner.says("ready")
            async with self._receiving(address, at=at) as receiving:
                owner.go()
                if by_source:
                    await owner.says(cell.phase.name)
                    owner.kill()
                await self._landed(receiving, found)
                assert (found.arrived is not None) == (cell.outcome is Outcome.DESTINATION), found.text()
                if found.arrived is not None:
                    status = await found.arrived.call_server("status")
                    assert await found.arrived.monitor.running() and status["phase"] == "running"
                    await found.arrived.kill()
        return found


_WORDS = {
    Failure.SAVE_RAISES: "save raises",
    Failure.SAVE_HANGS: "save hangs",
    Failure.SAVE_STUCK: "save hangs beyond reach",
    Failure.RESTORE_RAISES: "restore raises",
    Failure.RESTORE_HANGS: "restore hangs",
}


def stand_in(library: Path) -> Callable[[Path], Programs]:
    """Programs with `support.fake_qemu` for QEMU, and boot files in ``boot``."""

    def programs(root: Path) -> Programs:
        boot = root / "boot"
        boot.mkdir(mode=0o700)
        for name in ("kernel", "initramfs"):
            (boot / name).write_bytes(name.encode() * 10_000)
        qemu = (sys.executable, str(TESTS / "support" / "fake_qemu.py"))
        return Programs(qemu, "11.1.3", "tcg", boot / "kernel", boot / "initramfs", library)

    return programs


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        try:
            bench = Bench(stand_in(Path(find_library())), patch)
        except PermissionError as error:
            pytest.skip(str(error))
        yield bench
        bench.close()
