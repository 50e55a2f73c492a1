"""A running virtual machine: QEMU, its device server, and the connections to both.

`VirtualMachine.launch` starts one, `VirtualMachine.restore` brings one back from a snapshot; `save` makes a snapshot.
Both processes belong to us and end with us, and if one of them ends, the other is ended too: a VM without its
device, or a device without its VM, is of no use to anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

import vmbus
from vmbus.description import DeviceDescription
from vmbus.errors import EnvironmentProblem, StateError, UsageError, VmbusError
from vmbus.qemu.agent import AgentClient
from vmbus.qemu.command_line import Programs, Sockets, machine_version, qemu_arguments
from vmbus.qemu.description import VmDescription
from vmbus.qemu.pci_replay import PciAddress, replay
from vmbus.qemu.process import Child, RunDirectory, guard_all
from vmbus.qemu.qmp import COMMAND_TIMEOUT, Monitor, file_channel
from vmbus.qemu.save import NO_SABOTAGE, Capture, Captured, Sabotage, SaveFailed, SaveReport, barrier
from vmbus.qemu.timing import Phases, Progress
from vmbus.server.control import ControlClient
from vmbus.snapshot.bundle import Snapshot, SnapshotWriter, open_snapshot, utc_now
from vmbus.snapshot.manifest import RAM, STATE, Machine, Manifest, Packets, Versions
from vmbus.vfio_user.pci import replay_writes

T = TypeVar("T")

_IMPORT_ROOT = str(Path(vmbus.__file__).resolve().parent.parent)  # a server of this very code, wherever it is

CONTROL_TIMEOUT = 30.0
"""Seconds that the device server may take to answer a control command, unless the caller says otherwise."""

START_TIMEOUT = 60.0
"""Seconds that the server and QEMU have for coming up, each."""


class RestoreReport(msgspec.Struct, kw_only=True):
    """What a restore did. Times in seconds."""

    directory: str
    phases: dict[str, float]
    running_at: float
    """CLOCK_MONOTONIC when the vCPUs ran again."""
    packets: dict[str, int]
    """Outgoing packets rebuilt: ``queued`` and ``sent``."""
    channels: int
    pci_writes: int

    @property
    def total(self) -> float:
        return sum(self.phases.values())


class VirtualMachine:
    """One VM. Use `launch` or `restore`; end it with `shutdown` or `kill`, or use it as an async context manager.

    Attributes for tools and tests: `name`, `description`, `programs`, `paths`, `server` and `qemu` (the processes),
    `monitor`, `control`, `agent`, `phases` (of the launch or restore), `restored` (the report, after a restore).
    """

    def __init__(self, description: VmDescription, programs: Programs, run_directory: RunDirectory) -> None:
        self.description = description
        self.programs = programs
        self.run_directory = run_directory
        self.paths = Sockets(run_directory.path)
        self.name = run_directory.name
        self.monitor = Monitor(f"QEMU of VM {self.name!r}")
        self.agent = AgentClient(self.paths.agent, on_event=self._agent_event)
        self.server: Child | None = None
        self.qemu: Child | None = None
        self.control: ControlClient | None = None
        self.restored: RestoreReport | None = None
        self.phases: dict[str, float] = {}
        self.on_agent_event: Callable[[dict[str, Any]], None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._saving = False
        self._ended = False

    # --- coming up ---------------------------------------------------------------------------------------------

    @classmethod
    async def launch(
        cls,
        description: VmDescription,
        programs: Programs,
        run_directory: RunDirectory | None = None,
        *,
        progress: Progress | None = None,
    ) -> VirtualMachine:
        """Starts a VM from power-on and returns when it runs (the guest is then still booting; see `wait_ready`).

        The VM owns `run_directory` (made if not given) from here on. Raises `EnvironmentProblem` or `WaitTimeout`;
        nothing is left behind then.
        """
        vm = cls(description, programs, run_directory or RunDirectory.create(description.name))
        phases = Phases(progress)
        try:
            await vm._start(phases)
        except BaseException:
            await vm.kill()
            raise
        vm.phases = phases.seconds
        return vm

    @classmethod
    async def restore(
        cls,
        directory: Path,
        programs: Programs,
        run_directory: RunDirectory | None = None,
        *,
        expected: VmDescription | None = None,
        progress: Progress | None = None,
        sabotage: Sabotage = NO_SABOTAGE,
    ) -> VirtualMachine:
        """Brings a VM back from the snapshot in `directory`, running; `vm.restored` has the report.

        The snapshot is verified before anything is started. Raises `StateError` if it is refused, by us or by the
        device server, and `EnvironmentProblem` or `WaitTimeout`; nothing is left behind then.
        """
        phases = Phases(progress)
        try:
            with phases("verify"):
                snapshot = await open_snapshot(directory, programs, expected=expected)
            programs = dataclasses.replace(programs, kernel=snapshot.kernel, initramfs=snapshot.initramfs)
            if run_directory is None:
                run_directory = RunDirectory.create(snapshot.manifest.vm.name)
        except BaseException:
            if run_directory is not None:
                run_directory.remove()
            raise
        vm = cls(snapshot.manifest.vm, programs, run_directory)
        try:
            await vm._restore(snapshot, phases, sabotage)
        except BaseException:
            await vm.kill()
            raise
        vm.phases = phases.seconds
        return vm

    async def _start(
        self, phases: Phases, *, state: Path | None = None, files: Path | None = None, incoming: bool = False
    ) -> None:
        with phases("server"):
            await self._start_server(state, files)
        with phases("qemu"):
            await self._start_qemu(incoming)

    async def _start_server(self, state: Path | None, files: Path | None = None) -> None:
        file = self.run_directory / "device.json"
        file.write_bytes(self.description.device.to_json())
        arguments = [sys.executable, "-m", "vmbus.server"]
        arguments += ["--description", str(file)]
        arguments += ["--socket", str(self.paths.vfio)]
        arguments += ["--control", str(self.paths.control)]
        if self.programs.libvfio_user is not None:
            arguments += ["--libvfio-user", str(self.programs.libvfio_user)]
        if state is not None:
            arguments += ["--restore", str(state)]
        if files is not None:
            arguments += ["--files", str(files)]
        inherited = os.environ.get("PYTHONPATH")
        self.server = await Child.spawn(
            f"the device server of VM {self.name!r}",
            arguments,
            self.run_directory / "server.log",
            environment={"PYTHONPATH": f"{_IMPORT_ROOT}:{inherited}" if inherited else _IMPORT_ROOT},
            capture_stdout=True,
        )
        await self.server.guard(self._listening(), "the device server to listen", START_TIMEOUT)
        self.control = ControlClient(self.paths.control)
        await self.guard(self.control.call("status"), "the device server to answer", START_TIMEOUT)

    async def _listening(self) -> None:
        """Reads the server's standard output up to its word that it listens; the rest goes to its log."""
        assert self.server is not None
        output = self.server.process.stdout
        assert output is not None
        while line := await output.readline():
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict) and message.get("event") == "listening":
                    self._spawn(_drain(output, self.server.log))
                    return
            with self.server.log.open("ab") as log:
                log.write(line)
        await self.server.exited  # it closed its output: the guard around us reports how it ended
        raise EnvironmentProblem("the device server ended before it listened")

    async def _start_qemu(self, incoming: bool) -> None:
        # The monitor's socket is made here and handed over, so that there is never a moment at which it is not there
        # yet: we connect at once, and if QEMU dies the connection breaks at once.
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.bind(str(self.paths.qmp))
            self.paths.qmp.chmod(0o600)
            listener.listen(1)
            arguments = qemu_arguments(
                self.description,
                self.programs,
                self.run_directory.path,
                qmp=f"socket,id=qmp,fd={listener.fileno()},server=on,wait=off",
                incoming=incoming,
            )
            self.qemu = await Child.spawn(
                f"QEMU of VM {self.name!r}",
                arguments,
                self.run_directory / "qemu.log",
                pass_fds=[listener.fileno()],
            )
        finally:
            listener.close()
        await self.guard(self.monitor.connect(self.paths.qmp, START_TIMEOUT), "QEMU to start", START_TIMEOUT)
        # Before the guest can run, so that nothing it says is lost.
        await self.guard(self.agent.connect(START_TIMEOUT), "QEMU to open the agent's socket", START_TIMEOUT)

    async def _restore(self, snapshot: Snapshot, phases: Phases, sabotage: Sabotage) -> None:
        state = snapshot.state
        if sabotage.edit_state is not None:
            state = self.run_directory / STATE
            state.write_bytes(sabotage.edit_state(snapshot.state.read_bytes()))
        await self._start(phases, state=state, files=snapshot.directory, incoming=True)
        assert self.control is not None
        with phases("ram"):
            await self.guard(self._load(snapshot.ram), "QEMU to load the guest's memory", self._stream_timeout)
        writes = 0
        with phases("pci"):
            if not sabotage.skip_pci_replay:
                writes = await self.guard(self._replay_pci(snapshot), "the PCI function to be put back", 60.0)
        with phases("device"):
            finished = await self.guard(
                self.control.call("restore-finish", timeout=120.0), "the device server to rebuild its channels", 120.0
            )
        with phases("cont"):
            await self.cont()
        packets = finished.get("packets", {})
        self.restored = RestoreReport(
            directory=str(snapshot.directory),
            phases=phases.seconds,
            running_at=time.monotonic(),
            packets={"queued": int(packets.get("queued", 0)), "sent": int(packets.get("sent", 0))},
            channels=int(finished.get("channels", 0)),
            pci_writes=writes,
        )

    async def _load(self, ram: Path) -> None:
        await self.monitor.execute(
            "migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]}
        )
        # Without exit-on-error QEMU would be gone before it could tell the reason.
        await self.monitor.execute("migrate-incoming", {"channels": file_channel(ram), "exit-on-error": False})
        await self.monitor.wait_migration({"completed"}, self._stream_timeout, "QEMU to load the guest's memory")
        if await self.monitor.running():
            raise StateError("QEMU runs the guest before its device was put back")

    async def _replay_pci(self, snapshot: Snapshot) -> int:
        assert self.control is not None
        config = snapshot.pci_config
        count = await replay(self.monitor.human, self.pci_address, replay_writes(config))
        known = bytes.fromhex((await self.control.call("pci"))["config"])
        if known != config:
            at = next(i for i in range(len(config)) if known[i : i + 1] != config[i : i + 1])
            raise StateError(
                f"the device's configuration differs from the saved one after the replay, first in byte {at:#04x}: "
                f"{known[at : at + 1].hex() or 'nothing'} instead of {config[at]:02x}"
            )
        await barrier(self.monitor, self.control)  # the BAR answers where the guest expects it
        return count

    # --- while it runs -----------------------------------------------------------------------------------------

    @property
    def pci_address(self) -> PciAddress:
        """Where the VMBus device sits."""
        return PciAddress(0, self.description.slot)

    @property
    def children(self) -> list[Child]:
        """The processes that were started, the server first."""
        return [child for child in (self.server, self.qemu) if child is not None]

    @property
    def _stream_timeout(self) -> float:
        return 60.0 + self.description.memory_mib / 20

    async def guard(self, work: Awaitable[T], what: str, timeout: float) -> T:
        """Waits for `work` at most `timeout` seconds, and only while both processes live.

        Raises `ProcessDied` (with the end of the log) or `WaitTimeout` (naming `what`), and what the work raises.
        """
        return await guard_all(self.children, work, what, timeout)

    async def wait_ready(self, timeout: float = 120.0) -> None:
        """Waits until the guest's agent answers. Raises `WaitTimeout` or `ProcessDied`."""
        await self.guard(self.agent.wait_ready(timeout), "the guest's agent", timeout + 1)

    async def call_agent(self, command: str, /, *, timeout: float = 30.0, **arguments: Any) -> dict[str, Any]:
        """A request to the guest's agent that also ends when a process of the VM dies. See `AgentClient.call`."""
        return await self.guard(
            self.agent.request(command, arguments, timeout=timeout), f"the agent's answer to {command!r}", timeout + 1
        )

    async def command_provider(
        self, provider: str, command: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = 10.0
    ) -> dict[str, Any]:
        """A command of a provider's own (see its page in docs/), such as `kvp-get` of the integration services."""
        # A connection of its own: an answer may take its time, and a save must not wait for it.
        control = ControlClient(self.paths.control)
        try:
            work = control.call(
                "provider",
                timeout + 5,
                name=provider,
                command=command,
                arguments=dict(arguments or {}),
                seconds=timeout,
            )
            return await self.guard(work, f"the answer of provider {provider!r} to {command!r}", timeout + 6)
        finally:
            control.close()

    async def stop(self) -> None:
        """Stops the vCPUs."""
        await self.guard(self.monitor.execute("stop"), "the vCPUs to stop", START_TIMEOUT)

    async def cont(self) -> None:
        """Lets the vCPUs run."""
        await self.guard(self.monitor.cont(), "the vCPUs to run", START_TIMEOUT)

    async def save(
        self,
        directory: Path,
        *,
        live: bool = False,
        keep: bool = False,
        progress: Progress | None = None,
        sabotage: Sabotage = NO_SABOTAGE,
    ) -> SaveReport:
        """Saves the VM into a new snapshot directory.

        With `live`, the guest runs on while its memory is copied. With `keep`, the VM runs on afterwards (a
        checkpoint); else it is left stopped, and the caller ends it with `kill`. Raises `UsageError` if a save is
        under way or the directory exists, and `SaveFailed`, whose `source_alive` tells whether the VM runs on as
        before; if it does not, everything has been torn down.
        """
        if self._ended:
            raise UsageError(f"VM {self.name!r} has ended: there is nothing to save")
        if self._saving:
            raise UsageError(f"VM {self.name!r} is being saved already")
        self._saving = True
        writer: SnapshotWriter | None = None
        try:
            writer = SnapshotWriter.begin(directory)
            return await self._save(writer, Phases(progress), live=live, keep=keep, sabotage=sabotage)
        except BaseException as error:
            if writer is not None:
                writer.abort()
            if isinstance(error, SaveFailed) and not error.source_alive:
                await self.kill()
            raise
        finally:
            self._saving = False

    async def _save(
        self, writer: SnapshotWriter, phases: Phases, *, live: bool, keep: bool, sabotage: Sabotage
    ) -> SaveReport:
        assert self.control is not None
        with phases("boot files"):  # while the guest still runs
            await writer.add_boot_files(self.programs.kernel, self.programs.initramfs)
            server = await self.control.call("status")
        capture = Capture(
            _GuardedMonitor(self, self.monitor),
            _GuardedControl(self, self.control),
            writer.ram,
            writer.state,
            phases,
            live=live,
            memory_mib=self.description.memory_mib,
            sabotage=sabotage,
        )
        downtime: float | None = None
        async with capture.taken() as taken:
            # Providers may have come and gone since the launch: the snapshot is restored with those that are there.
            device = await self.guard(self.control.call("status"), "the device server's description", START_TIMEOUT)
            if keep:
                with phases("resume"):
                    await capture.resume()
                downtime = time.monotonic() - taken.stopped_at
            with phases("seal"):
                ram = await writer.seal(RAM)
                state = await writer.seal(STATE)
                for name in taken.files:
                    await writer.seal(name)
                if state.sha256 != taken.state_sha256:
                    raise StateError("the device's state on disk is not what the server wrote: its digest differs")
                await writer.commit(self._manifest(writer, taken, live=live, server=server | device))
        return SaveReport(
            directory=str(writer.target),
            live=live,
            phases=phases.seconds,
            stopped_at=taken.stopped_at,
            downtime=downtime,
            packets=taken.packets,
            incoming_held=taken.incoming_held,
            ram_bytes=ram.size,
            state_bytes=state.size,
            flushed_pages=taken.flushed_pages,
            flushed_bytes=taken.flushed_bytes,
            attempts=taken.attempts,
        )

    def _manifest(self, writer: SnapshotWriter, taken: Captured, *, live: bool, server: dict[str, Any]) -> Manifest:
        return Manifest(
            created=utc_now(),
            live=live,
            vm=msgspec.structs.replace(
                self.description, device=msgspec.convert(server["description"], DeviceDescription)
            ),
            machine=Machine(
                type=machine_version(self.programs.qemu_version),
                accelerator="kvm" if self.programs.accelerator == "kvm" else "tcg",
                pci_address=str(self.pci_address),
                pci_config=taken.pci_config.hex(),
            ),
            versions=Versions(
                project=vmbus.__version__,
                qemu=self.programs.qemu_version,
                libvfio_user=str(server.get("libvfio_user", "unknown")),
            ),
            packets=Packets(**taken.packets),
            incoming_held=taken.incoming_held,
            files=writer.records,
        )

    # --- the end -----------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether the VM has been torn down."""
        return self._ended

    async def wait_ended(self) -> None:
        """Waits (without a bound: it is what a supervisor does) until the VM ends.

        Returns if the guest powered itself off. Raises `ProcessDied` if a process ended in any other way. The
        caller then calls `kill`, which also ends the other process.
        """
        assert self.qemu is not None and self.server is not None
        await asyncio.wait({self.qemu.exited, self.server.exited}, return_when=asyncio.FIRST_COMPLETED)
        if self.qemu.running:  # a server that merely follows a QEMU which is just ending is no failure
            await asyncio.wait({self.qemu.exited}, timeout=2)
        if not self.qemu.running and self.qemu.exited.result() == 0:
            return
        raise next(child for child in self.children if not child.running).death()

    async def shutdown(self, timeout: float = 20.0) -> None:
        """Asks the guest to power off, waits for that, and cleans up; a guest that does not is ended."""
        try:
            if self.qemu is not None and self.qemu.running:
                with contextlib.suppress(VmbusError):
                    await self.call_agent("poweroff", timeout=timeout / 2)
                await asyncio.wait({self.qemu.exited}, timeout=timeout / 2)
        finally:
            await self.kill()

    async def kill(self) -> None:
        """Ends both processes at once and removes the run directory. May be called more than once."""
        if self._ended:
            return
        self._ended = True
        for task in self._tasks:
            task.cancel()
        try:
            await self.agent.close()
            for child in reversed(self.children):
                await child.stop()
            await self.monitor.close()
            if self.control is not None:
                self.control.close()
        finally:
            self.run_directory.remove()

    async def __aenter__(self) -> VirtualMachine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _agent_event(self, event: dict[str, Any]) -> None:
        if self.on_agent_event is not None:
            self.on_agent_event(event)


class _GuardedMonitor:
    """A monitor whose answers are waited for only while the VM's processes live."""

    def __init__(self, vm: VirtualMachine, monitor: Monitor) -> None:
        self._vm = vm
        self._monitor = monitor
        self.listen = monitor.listen

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = COMMAND_TIMEOUT
    ) -> Any:
        work = self._monitor.execute(command, arguments, timeout=timeout)
        return await self._vm.guard(work, f"QEMU's answer to {command!r}", timeout + 1)

    async def human(self, line: str, *, timeout: float = COMMAND_TIMEOUT) -> str:
        return await self._vm.guard(self._monitor.human(line, timeout=timeout), f"the monitor's {line!r}", timeout + 1)

    async def running(self) -> bool:
        return await self._vm.guard(self._monitor.running(), "QEMU's run state", COMMAND_TIMEOUT + 1)

    async def cont(self) -> None:
        await self._vm.cont()

    async def migration_status(self) -> tuple[str, str]:
        return await self._vm.guard(self._monitor.migration_status(), "the migration's status", COMMAND_TIMEOUT + 1)

    async def wait_migration(self, wanted: Collection[str], timeout: float, what: str) -> str:
        return await self._vm.guard(self._monitor.wait_migration(wanted, timeout, what), what, timeout + 1)


class _GuardedControl:
    """A control connection whose answers are waited for only while the VM's processes live."""

    def __init__(self, vm: VirtualMachine, control: ControlClient) -> None:
        self._vm = vm
        self._control = control

    async def call(self, command: str, /, timeout: float = CONTROL_TIMEOUT, **arguments: Any) -> dict[str, Any]:
        work = self._control.call(command, timeout=timeout, **arguments)
        try:
            return await self._vm.guard(work, f"the device server's answer to {command!r}", timeout + 1)
        except asyncio.CancelledError:
            self._control.close()  # or the next command would get the answer to this one
            raise


async def _drain(stream: asyncio.StreamReader, log: Path) -> None:
    """Moves what a process still prints into its log."""
    with log.open("ab", buffering=0) as file:
        while data := await stream.read(65536):
            file.write(data)
