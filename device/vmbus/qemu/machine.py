"""A running virtual machine: QEMU, its device server, and the connections to both.

`VirtualMachine.launch` starts one, `VirtualMachine.restore` brings one back from a snapshot; `save` makes a snapshot.
Both processes belong to us and end with us, and if one of them ends, the other is ended too: a VM without its
device, or a device without its VM, is of no use to anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

import vmbus
from vmbus.device import saved
from vmbus.device.description import DeviceDescription
from vmbus.errors import EnvironmentProblem, StateError, UsageError, VmbusError
from vmbus.observe.audit.guest import collect
from vmbus.operations.migration.address import parse_address
from vmbus.operations.migration.arrival import Arrival
from vmbus.operations.migration.channel import Listener
from vmbus.operations.migration.destination import GO_TIMEOUT, Destination
from vmbus.operations.migration.link import SILENCE
from vmbus.operations.migration.messages import Prepare
from vmbus.operations.migration.ownership import SourceStage
from vmbus.operations.migration.source import ASK_TIMEOUT, Departing, MigrationReport, Source
from vmbus.operations.revert import CheckpointReport, Checkpoints, Patient, RevertFailed, RevertReport
from vmbus.operations.save import (
    NO_SABOTAGE,
    Capture,
    Captured,
    FileTarget,
    Sabotage,
    SaveFailed,
    SaveReport,
    StreamSettings,
    barrier,
)
from vmbus.providers.disk.image import CLONE_VARIABLE
from vmbus.qemu.agent import AgentClient, GuestOutput, decode_line
from vmbus.qemu.ends import Ends, GuestPanicked
from vmbus.qemu.foreign import MigrationGuard
from vmbus.qemu.pci_replay import PciAddress, replay
from vmbus.qemu.probe import driven_by_client, require_complete, require_running, require_same
from vmbus.qemu.qmp import COMMAND_TIMEOUT, Monitor, file_channel
from vmbus.server.control import ControlClient
from vmbus.snapshot.bundle import Snapshot, SnapshotWriter, open_snapshot, utc_now
from vmbus.snapshot.checkpoints import Checkpoint, Store
from vmbus.snapshot.manifest import RAM, STATE, Machine, Manifest, Packets, Versions
from vmbus.transport.pci import replay_writes
from vmbus.util.patience import patient
from vmbus.vm.command_line import (
    Programs,
    Sockets,
    default_spare_cpus,
    machine_version,
    qemu_arguments,
    with_available_driver,
)
from vmbus.vm.description import VmDescription, with_options
from vmbus.vm.moments import Hook, Moment, no_hook
from vmbus.vm.process import Child, guard_all
from vmbus.vm.root import prepare_root
from vmbus.vm.run_directory import RunDirectory
from vmbus.vm.timing import Phases, Progress

T = TypeVar("T")

_IMPORT_ROOT = str(Path(vmbus.__file__).resolve().parent.parent)  # a server of this very code, wherever it is

CONTROL_TIMEOUT = 30.0
"""Seconds that the device server may take to answer a control command, unless the caller says otherwise."""

START_TIMEOUT = 60.0
"""Seconds that the server and QEMU have for coming up, each."""

_ANSWER_GRACE = 20.0  # seconds that the guest may need to say that its time is up

FINISH_TIMEOUT = 120.0
"""Seconds that the device server may take to rebuild its channels and packets."""


@dataclasses.dataclass(frozen=True)
class Made:
    """How a machine is made, as far as QEMU's streams depend on it: what a restored one has, whatever new ones have."""

    type: str
    """Versioned machine type."""
    spare_cpus: int
    generation_id: bool

    @classmethod
    def new(cls, description: VmDescription, programs: Programs) -> Made:
        """As new machines are made."""
        spare = default_spare_cpus(description.cpus, programs.accelerator)
        return cls(machine_version(programs.qemu_version), spare, generation_id=True)

    @classmethod
    def of(cls, machine: Machine) -> Made:
        """As a machine is that was made elsewhere."""
        return cls(machine.type, machine.spare_cpus, machine.generation_id)


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
    paused: bool = False
    """The vCPUs stand, as they did when it was saved."""

    @property
    def total(self) -> float:
        return sum(self.phases.values())


class VirtualMachine:
    """One VM. Use `launch`, `restore` or `receive`; end it with `shutdown` or `kill`, or use it as an async context
    manager.

    Attributes for tools and tests: `name`, `description`, `programs`, `paths`, `server` and `qemu` (the processes),
    `monitor`, `control`, `agent`, `phases` (of the launch or restore), `restored` (the report, after a restore).
    """

    def __init__(
        self,
        description: VmDescription,
        programs: Programs,
        run_directory: RunDirectory,
        *,
        audit: Path | None = None,
        capture: Path | None = None,
        made: Made | None = None,
    ) -> None:
        """`audit`: the directory for the server's audit record; test drivers in the guest keep one, too, then.
        `capture`: a new file for all packets from the server's start on (docs/capture.md). `made`: how the machine is
        made that comes from elsewhere (None: this is a new one)."""
        self.description = description
        self.audit = audit
        self.capture = capture
        self.external: int | None = None
        """Bytes that the capture copies of each packet's external data; None: its default."""
        self.programs = programs
        self.made = made or Made.new(description, programs)
        self.run_directory = run_directory
        self.paths = Sockets(run_directory.path)
        self.name = run_directory.name
        self.monitor = Monitor(f"QEMU of VM {self.name!r}")
        self.agent = AgentClient(self.paths.agent, on_event=self._agent_event)
        self.server: Child | None = None
        self.qemu: Child | None = None
        self.control: ControlClient | None = None
        self.clone = False
        """Whether disks whose content came with the snapshot are in the run directory, and end with it."""
        self.notice = ""
        """A sentence for people, if the VM is not quite what its description says."""
        self.restored: RestoreReport | None = None
        self.phases: dict[str, float] = {}
        self.on_agent_event: Callable[[dict[str, Any]], None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_notice: Callable[[str], None] | None = None
        """Told in a sentence what somebody else did to the VM, if its owner should know."""
        self.moved_to: str | None = None
        """Where the VM went, once a migration has succeeded: it has ended here then."""
        self._guard: MigrationGuard | None = None
        self._ends: Ends | None = None
        self._last_migration: Source | None = None
        self._checkpoints: dict[Path, Checkpoints] = {}
        self._idle = asyncio.Event()  # set while no operation is under way that stops or moves the VM
        self._idle.set()
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
        audit: Path | None = None,
        capture: Path | None = None,
        external: int | None = None,
        made: Made | None = None,
    ) -> VirtualMachine:
        """Starts a VM from power-on and returns when it runs (the guest is then still booting; see `wait_ready`).

        `external` is how much a `capture` copies of each packet's external data, in bytes. The VM owns `run_directory`
        (made if not given) from here on. `made` is for machines as they were made once: to revert them to checkpoints
        of that time. Raises `EnvironmentProblem` or `WaitTimeout`; nothing is left behind then.
        """
        directory = run_directory or RunDirectory.create(description.name)
        try:
            description, notice = with_available_driver(description, programs)
            await prepare_root(description, programs.debian)
        except BaseException:
            directory.remove()
            raise
        vm = cls(description, programs, directory, audit=audit, capture=capture, made=made)
        vm.external = external
        vm.notice = notice
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
        audit: Path | None = None,
        capture: Path | None = None,
        clone: bool = False,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        at: Hook = no_hook,
    ) -> VirtualMachine:
        """Brings a VM back from the snapshot in `directory`, running, or paused if it was paused when it was saved;
        `vm.restored` has the report.

        `clone`: one of several that run at the same time; its disks are in its run directory, and end with it.
        `options`: of providers, by their names, in the place of the snapshot's: such as another `namespace` for the
        card of a clone. Whether they fit the state, its providers decide.

        The snapshot is verified before anything is started. Raises `StateError` if it is refused, by us or by the
        device server, and `EnvironmentProblem` or `WaitTimeout`; nothing is left behind then.
        """
        phases = Phases(progress)
        try:
            with phases("verify"):
                snapshot = await open_snapshot(directory, programs, expected=expected)
            described = with_options(snapshot.manifest.vm, options or {})
            programs = dataclasses.replace(
                programs,
                kernel=snapshot.kernel,
                initramfs=snapshot.initramfs,
                accelerator=snapshot.manifest.machine.accelerator,
            )
            if run_directory is None:
                run_directory = RunDirectory.create(snapshot.manifest.vm.name)
        except BaseException:
            if run_directory is not None:
                run_directory.remove()
            raise
        made = Made.of(snapshot.manifest.machine)
        vm = cls(described, programs, run_directory, audit=audit, capture=capture, made=made)
        vm.clone = clone
        try:
            await vm._restore(snapshot, phases, sabotage, at)
        except BaseException:
            await vm.kill()
            raise
        vm.phases = phases.seconds
        return vm

    @classmethod
    async def receive(
        cls,
        listener: Listener,
        programs: Programs,
        run_directory: RunDirectory | None = None,
        *,
        timeout: float | None = None,
        progress: Progress | None = None,
        at: Hook = no_hook,
        silence: float = SILENCE,
        go_timeout: float = GO_TIMEOUT,
        ask_timeout: float = ASK_TIMEOUT,
        audit: Path | None = None,
        stream_port: int = 0,
    ) -> VirtualMachine:
        """Waits on `listener` for a VM that migrates here, at most `timeout` seconds (None: as long as it takes), and
        returns when it runs; `vm.restored` has the report.

        The kernel and the initramfs of the source are used: those of `programs` if they are the same, else they are
        sent. QEMU's stream comes to a TCP port of its own, `stream_port` (0: any that is free), unless the listener's
        address is a unix socket. Serves one migration; the listener belongs to it, and is closed when the source has
        ended its VM. Raises `WaitTimeout` if nobody comes, and `MigrateFailed`; nothing is left behind then.
        """
        machines: list[VirtualMachine] = []
        directories = [] if run_directory is None else [run_directory]

        def claim(description: VmDescription) -> Path:
            if not directories:
                directories.append(RunDirectory.create(description.name))
            return directories[0].room("arrival")

        def build(prepare: Prepare, kernel: Path, initramfs: Path, host: str | None) -> Arrival:
            accelerator = prepare.machine.accelerator
            own = dataclasses.replace(programs, kernel=kernel, initramfs=initramfs, accelerator=accelerator)
            machines.append(cls(prepare.vm, own, directories[0], audit=audit, made=Made.of(prepare.machine)))
            return Arrival(machines[0], host, stream_port)

        destination = Destination(
            listener, programs, claim, build, progress=progress, at=at, silence=silence, go_timeout=go_timeout,
            ask_timeout=ask_timeout,
        )  # fmt: skip
        try:
            await destination.run(timeout)
        except BaseException:
            for vm in machines:
                await vm.kill()
            for directory in directories:
                directory.remove()
            raise
        (vm,) = machines
        restored = destination.restored
        assert restored is not None
        vm.phases = destination.phases.seconds
        vm.restored = RestoreReport(
            directory=f"migration {destination.migration} from {destination.source}",
            phases=vm.phases,
            running_at=destination.running_at,
            packets=msgspec.structs.asdict(restored.packets),
            channels=restored.channels,
            pci_writes=restored.pci_writes,
            paused=destination.paused,
        )
        vm._spawn(destination.stay())
        return vm

    async def start_incoming(self, phases: Phases) -> None:
        """Starts a server that awaits its state and a QEMU that awaits its stream. May be repeated after
        `end_processes`."""
        with phases("server"):
            await self._start_server(awaiting=True)
        with phases("qemu"):
            await self._start_qemu(incoming=True)

    async def _start(
        self, phases: Phases, *, state: Path | None = None, files: Path | None = None, incoming: bool = False
    ) -> None:
        with phases("server"):
            await self._start_server(state, files)
        with phases("qemu"):
            await self._start_qemu(incoming)

    async def _start_server(
        self, state: Path | None = None, files: Path | None = None, *, awaiting: bool = False
    ) -> None:
        """From power-on, from a `state` (`files`: the directory with its providers' files), or `awaiting` one that the
        command `load` brings."""
        file = self.run_directory / "device.json"
        try:
            file.write_bytes(self.description.device.to_json())
        except OSError as error:
            raise EnvironmentProblem(f"cannot write {file}: {error.strerror}") from error
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
        if awaiting:
            arguments.append("--await-state")
        if self.audit is not None:
            arguments += ["--audit", str(self.audit.absolute())]
        if self.capture is not None:
            arguments += ["--capture", str(self.capture.absolute())]
            if self.external is not None:
                arguments += ["--external", str(self.external)]
        inherited = os.environ.get("PYTHONPATH")
        environment = {"PYTHONPATH": f"{_IMPORT_ROOT}:{inherited}" if inherited else _IMPORT_ROOT}
        if self.clone:
            environment[CLONE_VARIABLE] = str(self.run_directory.room("disks"))
        self.server = await Child.spawn(
            f"the device server of VM {self.name!r}",
            arguments,
            self.run_directory / "server.log",
            environment=environment,
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
            message = decode_line(line)
            if message is not None and message.get("event") == "listening":
                self._spawn(_drain(output, self.server.log))
                return
            with contextlib.suppress(OSError), self.server.log.open("ab") as log:  # a full disk loses the log, no more
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
            self.paths.console_log.unlink(missing_ok=True)  # of an earlier life: QEMU appends
            arguments = qemu_arguments(
                self.description,
                self.programs,
                self.run_directory.path,
                qmp=f"socket,id=qmp,fd={listener.fileno()},server=on,wait=off",
                incoming=incoming,
                audit=self.audit is not None,
                spare_cpus=self.made.spare_cpus,
                machine_type=self.made.type,
                generation_id=self.made.generation_id,
            )
            self.qemu = await Child.spawn(
                f"QEMU of VM {self.name!r}",
                arguments,
                self.run_directory / "qemu.log",
                pass_fds=[listener.fileno()],
            )
            self.qemu.witness = ("the guest's console", self.paths.console_log)
        finally:
            listener.close()
        await self.guard(self.monitor.connect(self.paths.qmp, START_TIMEOUT), "QEMU to start", START_TIMEOUT)
        # Before the guest can run, so that nothing it says is lost.
        await self.guard(self.agent.connect(START_TIMEOUT), "QEMU to open the agent's socket", START_TIMEOUT)
        assert self.control is not None
        self._guard = MigrationGuard(self.monitor, self._notice, functools.partial(driven_by_client, self.control))
        await self.guard(self._guard.start(), "QEMU to tell of migrations", START_TIMEOUT)
        self._spawn(self._guard.run())
        self._ends = Ends(self.monitor, self.paths.console_log)
        self._spawn(self._ends.run(self._rebooted))

    def _rebooted(self) -> None:
        self._notice("the guest boots again")
        self._spawn(self._ask_anew())

    async def _ask_anew(self) -> None:
        with contextlib.suppress(VmbusError):
            await self.agent.go_back("the guest booted again meanwhile")

    async def _restore(self, snapshot: Snapshot, phases: Phases, sabotage: Sabotage, at: Hook) -> None:
        state = snapshot.state
        paused = snapshot.manifest.paused is not msgspec.UNSET
        if sabotage.edit_state is not None:
            state = self.run_directory / STATE
            state.write_bytes(sabotage.edit_state(snapshot.state.read_bytes()))
        in_stream = snapshot.manifest.machine.device_in_stream
        if in_stream:
            await self.start_incoming(phases)
        else:
            await self._start(phases, state=state, files=snapshot.directory, incoming=True)
        assert self.control is not None
        await self.guard(
            require_same(self.control, in_stream=in_stream, what=f"the snapshot {snapshot.directory}"),
            "the device server's status",
            CONTROL_TIMEOUT,
        )
        await at(Moment.BEFORE_STREAM)
        with phases("ram"), self.own_migration():
            await self.guard(self._load(snapshot.ram, at), "QEMU to load the guest's memory", self._stream_timeout)
        if in_stream:
            await self._let_run_what_qemu_restored(snapshot, phases)
            return
        writes = 0
        with phases("pci"):
            await at(Moment.PCI_REPLAY)
            if not sabotage.skip_pci_replay:
                writes = await self.put_back(snapshot.pci_config)
        with phases("device"):
            await at(Moment.PACKET_RESTORE)
            work = self.control.call("restore-finish", timeout=FINISH_TIMEOUT + 1)
            finished = await self.guard(work, "the device server to rebuild its channels", FINISH_TIMEOUT)
        with phases("cont"):
            await at(Moment.BEFORE_CONT)
            await self.require_device()
            if not paused:
                await self.cont()
        packets = finished.get("packets", {})
        self.restored = RestoreReport(
            directory=str(snapshot.directory),
            phases=phases.seconds,
            running_at=time.monotonic(),
            packets={"queued": int(packets.get("queued", 0)), "sent": int(packets.get("sent", 0))},
            channels=int(finished.get("channels", 0)),
            pci_writes=writes,
            paused=paused,
        )

    async def _let_run_what_qemu_restored(self, snapshot: Snapshot, phases: Phases) -> None:
        """The device's state was in QEMU's stream, and QEMU puts it back when the vCPUs run."""
        assert self.control is not None
        await self.guard(require_complete(self.control), "the device server's status", CONTROL_TIMEOUT)
        paused = snapshot.manifest.paused is not msgspec.UNSET
        if not paused:
            with phases("cont"):
                await self.cont()
            await self.guard(require_running(self.control), "the device server's status", CONTROL_TIMEOUT)
        state = saved.decode(await asyncio.to_thread(snapshot.state.read_bytes))
        packets = snapshot.manifest.packets
        self.restored = RestoreReport(
            directory=str(snapshot.directory),
            phases=phases.seconds,
            running_at=time.monotonic(),
            packets={"queued": packets.queued, "sent": packets.sent},
            channels=sum(offer.open is not None for offer in state.bus.offers),
            pci_writes=0,
            paused=paused,
        )

    async def _load(self, ram: Path, at: Hook) -> None:
        await self.monitor.execute(
            "migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]}
        )
        # Without exit-on-error QEMU would be gone before it could tell the reason.
        await self.monitor.execute("migrate-incoming", {"channels": file_channel(ram), "exit-on-error": False})
        await at(Moment.LOADING)
        await self.monitor.wait_migration(
            {"completed"}, patient(self._stream_timeout), "QEMU to load the guest's memory"
        )
        if await self.monitor.running():
            raise StateError("QEMU runs the guest before its device was put back")

    async def put_back(self, config: bytes, only: Sequence[tuple[int, int, int]] | None = None) -> int:
        """Puts the PCI function back as `config` (256 bytes) says, and returns the number of writes. The VM is paused.
        `only`: the writes that are missing (offset, size, value), if it was put back but for them.

        Raises `EnvironmentProblem` or `StateError` if it does not take it.
        """
        writes = replay_writes(config) if only is None else only
        return await self.guard(self._put_back(config, writes), "the PCI function to be put back", 60.0)

    async def is_back(self, config: bytes) -> bool:
        """Whether the PCI function is as `config` says, and its BAR answers; the VM is paused.

        For a function that was put back before QEMU loaded its stream: that has nothing of the function in it. QEMU
        tells the server of each configuration write and of each reset, so what the server has is what QEMU has.

        Raises `StateError` if it is, and does not answer.
        """
        assert self.control is not None
        pci = await self.call_server("pci")
        if bytes.fromhex(pci["config"]) != config:
            return False
        await self.guard(barrier(self.monitor, self.control, pci["bar0"]), "the BAR to answer", START_TIMEOUT)
        return True

    async def _put_back(self, config: bytes, writes: Sequence[tuple[int, int, int]]) -> int:
        assert self.control is not None
        count = await replay(self.monitor.human, self.pci_address, writes)
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
    def machine(self) -> Machine:
        """What QEMU's streams fit; without the function's configuration, which is the guest's doing."""
        return Machine(
            type=self.made.type,
            accelerator="kvm" if self.programs.accelerator == "kvm" else "tcg",
            pci_address=str(self.pci_address),
            pci_config="",
            spare_cpus=self.made.spare_cpus,
            generation_id=self.made.generation_id,
        )

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
        """A request to the guest's agent that also ends when a process of the VM dies. See `AgentClient.call`.

        ``wait`` is answered after `timeout` seconds with what the job has come to by then.
        """
        if command == "wait":
            arguments = {"timeout": patient(timeout), **arguments}
            timeout += _ANSWER_GRACE
        return await self.guard(
            self.agent.request(command, arguments, timeout=timeout), f"the agent's answer to {command!r}", timeout + 1
        )

    async def run_in_guest(self, argv: Sequence[str], *, timeout: float = 60.0) -> GuestOutput:
        """Runs a program in the guest, and returns its exit status and output. See `AgentClient.execute`."""
        work = self.agent.execute(argv, timeout=timeout)
        return await self.guard(work, f"{argv[0]!r} in the guest to end", timeout + 30)

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """A command to QEMU's monitor that also ends when a process of the VM dies."""
        work = self.monitor.execute(command, arguments)
        return await self.guard(work, f"QEMU's answer to {command!r}", COMMAND_TIMEOUT + 1)

    def own_migration(self) -> contextlib.AbstractContextManager[None]:
        """A context in which QEMU migrates, saves or loads because we want it to: any other migration is cancelled."""
        return contextlib.nullcontext() if self._guard is None else self._guard.ours()

    async def call_server(self, command: str) -> dict[str, Any]:
        """A control command without arguments that also ends when a process of the VM dies."""
        assert self.control is not None
        work = self.control.call(command, timeout=CONTROL_TIMEOUT)
        return await self.guard(work, f"the device server's answer to {command!r}", CONTROL_TIMEOUT + 1)

    async def collect_audit(self, directory: Path | None = None) -> list[Path]:
        """Fetches the guest's audit records into the audit directory (or another); see `observe.audit.guest`."""
        if self.audit is None and directory is None:
            raise UsageError(f"VM {self.name!r} keeps no audit records: start it with an audit directory")
        return await collect(self, directory or cast(Path, self.audit))

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

    async def require_device(self) -> None:
        """Makes sure, right before the vCPUs run for the first time, that there is a device for them.

        QEMU would let them run without one, and the death of the server may be noticed a moment later only: by then
        somebody who could have run the VM instead has let go of it.
        """
        await self.call_server("status")

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
        at: Hook = no_hook,
    ) -> SaveReport:
        """Saves the VM into a new snapshot directory.

        With `live`, the guest runs on while its memory is copied. With `keep`, the VM runs on afterwards (a
        checkpoint); else it is left stopped, and the caller ends it with `kill`. Raises `UsageError` if a save is
        under way or the directory exists, and `SaveFailed`, whose `source_alive` tells whether the VM runs on as
        before; if it does not, everything has been torn down.
        """
        self._begin("save")
        writer: SnapshotWriter | None = None
        try:
            writer = SnapshotWriter.begin(directory)
            with self.own_migration():
                return await self._save(writer, Phases(progress), live=live, keep=keep, sabotage=sabotage, at=at)
        except BaseException as error:
            if isinstance(error, SaveFailed) and not error.source_alive:
                await self.kill()  # first: nobody writes into what is removed now
            if writer is not None:
                writer.abort()
            raise
        finally:
            self._idle.set()

    async def checkpoint(
        self, tag: str, *, directory: Path | None = None, progress: Progress | None = None, at: Hook = no_hook
    ) -> CheckpointReport:
        """Notes this moment under the name `tag`, so that `revert` can go back to it; the VM runs on.

        Checkpoints lie in the run directory and end with the VM, or in a `directory` of their own (made if need be),
        and then stay. Raises `UsageError` for a tag that is taken or not usable, and `SaveFailed` as `save` does.
        """
        self._begin("note")
        try:
            return await self._checkpoints_in(directory).take(tag, Phases(progress), at)
        except SaveFailed as error:
            if not error.source_alive:
                await self.kill()
            raise
        finally:
            self._idle.set()

    async def revert(
        self,
        tag: str,
        *,
        directory: Path | None = None,
        progress: Progress | None = None,
        sabotage: Sabotage = NO_SABOTAGE,
        at: Hook = no_hook,
    ) -> RevertReport:
        """Takes the VM back to a checkpoint, with its processes; what happened since then is undone, in the guest and
        in the device. Other checkpoints stay, later ones too.

        Raises `UsageError` or `StateError` if the checkpoint is refused; nothing has been changed then. Raises
        `RevertFailed`, whose `source_alive` tells whether the VM runs on as before; if it does not, everything has been
        torn down (see `vmbus.operations.revert`).
        """
        self._begin("take back")
        try:
            return await self._checkpoints_in(directory).revert(tag, Phases(progress), sabotage=sabotage, at=at)
        except RevertFailed as error:
            if not error.source_alive:
                await self.kill()
            raise
        finally:
            self._idle.set()

    def checkpoints(self, *, directory: Path | None = None) -> list[Checkpoint]:
        """The checkpoints, oldest first. Raises `StateError` if a record is damaged."""
        return self._checkpoints_in(directory).store.list()

    async def delete_checkpoint(self, tag: str, *, directory: Path | None = None) -> None:
        """Deletes a checkpoint. Raises `UsageError` if there is none of that name."""
        self._begin("delete")
        try:
            await self._checkpoints_in(directory).delete(tag)
        finally:
            self._idle.set()

    def _checkpoints_in(self, directory: Path | None) -> Checkpoints:
        path = self.run_directory.room("checkpoints") if directory is None else directory.absolute()
        if path not in self._checkpoints:
            assert self.control is not None
            patient = Patient(
                name=self.name,
                description=self.description,
                machine=self.machine,
                qemu_version=self.programs.qemu_version,
                monitor=_GuardedMonitor(self, self.monitor),
                control=_GuardedControl(self, self.control),
                put_back=self.put_back,
                own_migration=self.own_migration,
                forget=self._forget,
            )
            store = Store(path, own=directory is None)
            self._checkpoints[path] = Checkpoints(patient, store, len(self._checkpoints))
        return self._checkpoints[path]

    async def _forget(self, reason: str) -> None:
        await self.guard(self.agent.go_back(reason), "the agent's socket", START_TIMEOUT)

    def _begin(self, what: str) -> None:
        """Nothing else that stops or moves the VM may run from here until `_idle` is set. Raises `UsageError`."""
        if self._ended:
            raise UsageError(f"VM {self.name!r} has ended: there is nothing to {what}")
        if self.in_doubt:
            raise UsageError(f"VM {self.name!r} waits for a decision about its migration: resolve that first")
        if not self._idle.is_set():
            raise UsageError(f"VM {self.name!r} is being saved or migrated already")
        self._idle.clear()

    async def migrate(
        self,
        address: str,
        secret: bytes,
        *,
        multifd: int = 0,
        timeout: float | None = None,
        downtime_limit: int | None = None,
        bandwidth: int | None = None,
        progress: Progress | None = None,
        at: Hook = no_hook,
        silence: float = SILENCE,
        ask_timeout: float = ASK_TIMEOUT,
        sabotage: Sabotage = NO_SABOTAGE,
    ) -> MigrationReport:
        """Moves the running VM to the destination that waits at `address` (``tcp:HOST:PORT`` or ``unix:PATH``).

        `secret` is the 32 bytes that both sides know. `multifd` connections are used for memory besides the main one.
        `timeout` bounds the copy of memory in seconds, `downtime_limit` is what QEMU plans for its last pass in
        milliseconds, `bandwidth` the most that it sends in bytes per second. When this returns, the VM runs there and
        has ended here.

        Raises `UsageError` if another operation is under way; `MigrateFailed`, whose `source_alive` tells whether the
        VM runs on as before; and `MigrationInDoubt`: then it stays stopped until `resolve`.
        """
        target = parse_address(address)
        self._begin("migrate")
        try:
            assert self.control is not None
            source = Source(
                Departing(
                    name=self.name,
                    description=self.description,
                    programs=self.programs,
                    machine=self.machine,
                    monitor=_GuardedMonitor(self, self.monitor),
                    control=_GuardedControl(self, self.control),
                    folder=self.run_directory.room("departure"),
                    end=functools.partial(self._leave, address),
                ),
                target,
                secret,
                stream=StreamSettings(
                    multifd=multifd,
                    timeout=timeout or _copy_timeout(self.description.memory_mib, bandwidth),
                    downtime_limit=downtime_limit,
                    bandwidth=bandwidth,
                ),
                progress=progress,
                at=at,
                silence=silence,
                ask_timeout=ask_timeout,
                sabotage=sabotage,
            )
            self._last_migration = source
            with self.own_migration():
                return await source.run()
        except SaveFailed as error:
            if not error.source_alive:
                await self.kill()
            raise
        finally:
            self._idle.set()

    async def _leave(self, address: str) -> None:
        self.moved_to = address
        await self.kill()

    async def resolve(self, *, run: bool | None) -> None:
        """Decides about a migration in doubt: the VM runs on here, or it ends here since it runs at the destination;
        None asks the destination, and does what it says.

        Whoever lets it run has to be sure that it does not run there. Once made, a decision is carried out to its end;
        making it again changes nothing. Raises `UsageError` if nothing is in doubt, `MigrationInDoubt` if the
        destination cannot say, `MigrateFailed` if it cannot be set running again.
        """
        source = self._last_migration
        if source is None:
            raise UsageError(f"no migration of VM {self.name!r} is in doubt")
        if not self._idle.is_set():
            raise UsageError(f"VM {self.name!r}: something else is under way; try again when it is over")
        self._idle.clear()
        try:
            await source.resolve(run=run)
        except SaveFailed:
            await self.kill()
            raise
        finally:
            self._idle.set()

    @property
    def in_doubt(self) -> bool:
        """Whether the VM stands still until `resolve`."""
        return self._last_migration is not None and self._last_migration.stage is SourceStage.IN_DOUBT

    async def _save(
        self, writer: SnapshotWriter, phases: Phases, *, live: bool, keep: bool, sabotage: Sabotage, at: Hook
    ) -> SaveReport:
        assert self.control is not None
        with phases("boot files"):  # while the guest still runs
            try:
                await writer.add_boot_files(self.programs.kernel, self.programs.initramfs)
            except EnvironmentProblem as error:
                raise SaveFailed(f"save failed: {error}; the VM runs on", source_alive=True) from error
        control = _GuardedControl(self, self.control)
        target = _Bundle(writer, control)
        capture = Capture(
            _GuardedMonitor(self, self.monitor),
            control,
            target,
            phases,
            live=live,
            memory_mib=self.description.memory_mib,
            sabotage=sabotage,
            at=at,
        )
        downtime: float | None = None
        stuck: VmbusError | None = None
        async with capture.taken() as taken:
            if keep:
                with phases("resume"):
                    try:
                        await capture.resume()
                    except VmbusError as error:  # what was saved is whole all the same, and may be all that is left
                        stuck = error
                downtime = time.monotonic() - taken.stopped_at
            with phases("seal"):
                await at(Moment.SEALING)
                ram = await writer.seal(RAM)
                state = await writer.seal(STATE)
                for name in taken.files:
                    await writer.seal(name)
                if state.sha256 != taken.state_sha256:
                    raise StateError("the device's state on disk is not what the server wrote: its digest differs")
                await writer.commit(self._manifest(writer, taken, live=live, server=target.server))
            if stuck is not None:
                raise EnvironmentProblem(f"the snapshot {writer.target} is complete, but {stuck}")
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
            machine=msgspec.structs.replace(
                self.machine, pci_config=taken.pci_config.hex(), device_in_stream=taken.driven
            ),
            versions=Versions(
                project=vmbus.__version__,
                qemu=self.programs.qemu_version,
                libvfio_user=str(server.get("libvfio_user", "unknown")),
            ),
            packets=Packets(**taken.packets),
            incoming_held=taken.incoming_held,
            files=writer.records,
            paused=msgspec.UNSET if taken.was_running else True,
        )

    # --- the end -----------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether the VM has been torn down."""
        return self._ended

    async def wait_ended(self) -> str:
        """Waits (without a bound: it is what a supervisor does) until the VM ends.

        Returns how QEMU ended if that was no failure: the guest powered itself off, above all. Raises `GuestPanicked`
        if the guest's kernel gave up (else a guest that reboots boots again), and `ProcessDied` if a process ended in
        any other way. The caller then calls `kill`, which also ends the other process.

        A save or migration that is under way is waited for: it notices a death by itself where that matters, and where
        it does not (all is written, or sent), it can still be completed, and is then all that is left of the VM.
        """
        assert self.qemu is not None and self.server is not None
        ends = self._ends
        assert ends is not None
        watched: set[asyncio.Future[Any]] = {self.qemu.exited, self.server.exited, ends.panicked}
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        await self._idle.wait()
        if ends.panicked.done():
            raise GuestPanicked(f"the guest of VM {self.name!r} panicked: {ends.panicked.result()}")
        if self.qemu.running:  # a server that merely follows a QEMU which is just ending is no failure
            await asyncio.wait({self.qemu.exited}, timeout=2)
        if not self.qemu.running and self.qemu.exited.result() == 0:
            return await ends.how()
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
            await self._stop_processes()
        finally:
            self.run_directory.remove()

    async def _stop_processes(self) -> None:
        await self.agent.close()
        for child in reversed(self.children):
            await child.stop()
        await self.monitor.close()
        if self.control is not None:
            self.control.close()

    async def end_processes(self) -> None:
        """Ends both processes and keeps the VM: it can be started again, with nothing of its former life."""
        for task in list(self._tasks):
            task.cancel()
        await self._stop_processes()
        for path in self.run_directory.path.glob("*.sock"):
            path.unlink()
        self.server = self.qemu = self.control = None
        self.monitor = Monitor(f"QEMU of VM {self.name!r}")
        self.agent = AgentClient(self.paths.agent, on_event=self._agent_event)

    async def __aenter__(self) -> VirtualMachine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _notice(self, text: str) -> None:
        if self.on_notice is not None:
            self.on_notice(text)

    def _agent_event(self, event: dict[str, Any]) -> None:
        if self.on_agent_event is not None:
            self.on_agent_event(event)


def _copy_timeout(memory_mib: int, bandwidth: int | None) -> float:
    """Seconds for the copy of memory: 2 MiB/s, or three times what the bandwidth allows for, should that be longer."""
    allowed = 0.0 if bandwidth is None else 3 * (memory_mib << 20) / bandwidth
    return patient(60.0 + max(memory_mib / 2, allowed))


class _Bundle(FileTarget):
    """A snapshot that is being written. `server`: the device server's status at the moment that is saved: providers may
    have come and gone since the launch, and the snapshot is restored with those that are there."""

    def __init__(self, writer: SnapshotWriter, control: _GuardedControl) -> None:
        super().__init__(writer.ram, writer.state)
        self._control = control
        self.server: dict[str, Any] = {}

    async def saved(self, captured: Captured) -> None:
        # Now, for once QEMU has written its part nothing of the VM is needed any more.
        self.server = await self._control.call("status")


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
            with contextlib.suppress(OSError):  # a full disk loses the log, and nothing else
                file.write(data)
