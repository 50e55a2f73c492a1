"""One instance: QEMU, its device servers (mostly one), and the connections to them and to the guest's agent.

All these processes belong to us and end with us, and if one of them ends, the others are ended too: a VM without its
device, or a device without its VM, is of no use to anybody. What is done with a whole instance (save, restore, revert,
migrate) is in `vmbus.operations`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from vmbus.errors import VmbusError
from vmbus.qemu.agent import AgentClient, GuestOutput, agents_bound
from vmbus.qemu.device import DeviceInstance, ask_each
from vmbus.qemu.ends import Ends, GuestPanicked
from vmbus.qemu.foreign import MigrationGuard
from vmbus.qemu.launch import START_TIMEOUT, start_qemu, start_servers
from vmbus.qemu.pci_replay import PciAddress
from vmbus.qemu.probe import driven_by_client
from vmbus.qemu.qmp import Monitor
from vmbus.server.control import ControlClient
from vmbus.snapshot.manifest import Function, Machine
from vmbus.vm.command_line import Programs, default_spare_cpus, machine_of
from vmbus.vm.description import VmDescription
from vmbus.vm.own_disks import DiskState
from vmbus.vm.process import Child, guard_all
from vmbus.vm.run_directory import RunDirectory
from vmbus.vm.sockets import Sockets
from vmbus.vm.timing import Phases

T = TypeVar("T")

CONTROL_TIMEOUT = 30.0
"""Seconds that the device server may take to answer a control command, unless the caller says otherwise."""

_ANSWER_GRACE = 20.0  # seconds that the guest may need to say that its time is up


def machine_for(description: VmDescription, programs: Programs, like: Machine | None) -> Machine:
    """What QEMU's streams fit; without the functions' configuration, which is the guest's doing. `like`: the machine as
    it was made once, whatever new ones have."""
    first, *further = [str(PciAddress(0, slot)) for slot in description.slots]
    return Machine(
        type=like.type if like else machine_of(description, programs.qemu_version),
        accelerator="kvm" if programs.accelerator == "kvm" else "tcg",
        pci_address=first,
        pci_config="",
        spare_cpus=like.spare_cpus if like else default_spare_cpus(description.cpus, programs.accelerator),
        generation_id=like.generation_id if like else True,
        foreign=programs.foreign,
        further=[Function(address, "") for address in further],
    )


class Instance:
    """See the module. `start` starts it; `shutdown` or `kill` ends it, also as an async context manager.

    Attributes for tools and tests: `name`, `description`, `programs`, `machine`, `paths`, `devices`, `qemu` (the
    process), `monitor`, `agent`. An answer of the monitor or a server is waited for only while all processes live.
    """

    def __init__(
        self,
        description: VmDescription,
        programs: Programs,
        run_directory: RunDirectory,
        *,
        audit: Path | None = None,
        capture: Path | None = None,
        external: int | None = None,
        like: Machine | None = None,
        gdb: str | None = None,
    ) -> None:
        """`audit`: the directory for the server's audit record; test drivers in the guest keep one, too, then.
        `capture`: a new file for all packets from the server's start on (docs/capture.md), with at most `external`
        bytes of each packet's external data. `like`: how the machine is made that comes from elsewhere (None: this is a
        new one). `gdb`: where it reaches QEMU, see `vmbus.vm.own_guest`."""
        self.description = description
        self.programs = programs
        self.run_directory = run_directory
        self.audit = audit
        self.capture = capture
        self.external = external
        self.gdb = gdb
        self.disks: list[DiskState] = []
        """Of one's own, as they were found before anything was started."""
        self.machine = machine_for(description, programs, like)
        self.paths = Sockets(run_directory.path)
        self.name = run_directory.name
        self.qemu: Child | None = None
        self.clone = False
        """Whether disks whose content came with the snapshot are in the run directory, and end with it."""
        self.on_agent_event: Callable[[dict[str, Any]], None] | None = None
        self.on_notice: Callable[[str], None] | None = None
        """Told in a sentence what somebody else did to the VM, if its owner should know."""
        self.idle = asyncio.Event()
        """Set while no operation is under way that stops or moves the VM."""
        self.idle.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._foreign: MigrationGuard | None = None
        self._ends: Ends | None = None
        self._ended = False
        self._connections()

    def _connections(self) -> None:
        self.monitor = Monitor(f"QEMU of VM {self.name!r}", self.guard)
        self.devices = [
            DeviceInstance(
                described, PciAddress(0, slot), self.monitor, ControlClient(self.paths.control_of(index), self.guard)
            )
            for index, (described, slot) in enumerate(
                zip(self.description.all_devices, self.description.slots, strict=True)
            )
        ]
        self.agent = AgentClient(self.paths.agent, on_event=self._agent_event)

    # --- coming up ---------------------------------------------------------------------------------------------

    async def start(
        self,
        phases: Phases,
        *,
        states: Sequence[Path] | None = None,
        files: Path | None = None,
        incoming: bool = False,
    ) -> None:
        """Starts all processes: from power-on, or, `incoming`, a QEMU that awaits its stream and servers with their
        `states` (and a directory with their providers' `files`), or ones that await them, too. Whoever starts it ends
        it if that fails. May be repeated after `end_processes`."""
        with phases("server"):
            await start_servers(self, states, files, awaiting=incoming and states is None)
            await self.guard(ask_each(self.devices, "status"), "the device server to answer", START_TIMEOUT)
        with phases("qemu"):
            await start_qemu(self, incoming=incoming)
            # Before the guest can run, so that nothing it says is lost.
            await self.guard(self.agent.connect(START_TIMEOUT), "QEMU to open the agent's socket", START_TIMEOUT)
            await self._attend()

    async def _attend(self) -> None:
        """From here on it is noticed what QEMU says of itself."""
        driven = functools.partial(driven_by_client, self.devices)
        self._foreign = MigrationGuard(self.monitor, self._notice, driven)
        await self.guard(self._foreign.start(), "QEMU to tell of migrations", START_TIMEOUT)
        self.background(self._foreign.run())
        self._ends = Ends(self.monitor, self.paths.console_log)
        self.background(self._ends.run(self._rebooted))

    def _rebooted(self) -> None:
        self._notice("the guest boots again")
        self.background(self._ask_anew())

    async def _ask_anew(self) -> None:
        with contextlib.suppress(VmbusError):
            await self.agent.go_back("the guest booted again meanwhile")

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Does something until it is over, or the instance ends."""
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _notice(self, text: str) -> None:
        if self.on_notice is not None:
            self.on_notice(text)

    def _agent_event(self, event: dict[str, Any]) -> None:
        if self.on_agent_event is not None:
            self.on_agent_event(event)

    # --- while it runs -----------------------------------------------------------------------------------------

    @property
    def control(self) -> ControlClient:
        """The first device's."""
        control = self.devices[0].control
        assert isinstance(control, ControlClient)
        return control

    @property
    def server(self) -> Child | None:
        """The first device's."""
        return self.devices[0].server

    @property
    def children(self) -> list[Child]:
        """The processes that were started, the servers first."""
        return [child for child in (*(device.server for device in self.devices), self.qemu) if child is not None]

    @property
    def tunnel_socket(self) -> Path:
        """Where QEMU's stream goes in when the VM leaves by TLS."""
        return self.paths.tunnel

    def room(self, name: str) -> Path:
        """A directory of the VM's own, made if need be, for what may become large. Raises `EnvironmentProblem`."""
        return self.run_directory.room(name)

    async def guard(self, work: Awaitable[T], what: str, timeout: float) -> T:
        """Waits for `work` at most `timeout` seconds, and only while both processes live.

        Raises `ProcessDied` (with the end of the log) or `WaitTimeout` (naming `what`), and what the work raises.
        """
        return await guard_all(self.children, work, what, timeout)

    def own_migration(self) -> contextlib.AbstractContextManager[None]:
        """A context in which QEMU migrates, saves or loads because we want it to: any other migration is cancelled."""
        return contextlib.nullcontext() if self._foreign is None else self._foreign.ours()

    async def wait_ready(self, timeout: float = 120.0) -> None:
        """Waits until the guest's agent answers. Raises `WaitTimeout` or `ProcessDied`."""
        await self.guard(self.agent.wait_ready(timeout), "the guest's agent", timeout + 1)

    async def call_agent(self, command: str, /, *, timeout: float = 30.0, **arguments: Any) -> dict[str, Any]:
        """A request to the guest's agent that also ends when a process of the VM dies. See `AgentClient.call`.

        ``wait`` is answered after `timeout` seconds with what the job has come to by then.
        """
        if command == "wait":
            arguments = {"timeout": agents_bound(timeout), **arguments}
            timeout += _ANSWER_GRACE
        return await self.guard(
            self.agent.request(command, arguments, timeout=timeout), f"the agent's answer to {command!r}", timeout + 1
        )

    async def run_in_guest(self, argv: Sequence[str], *, timeout: float = 60.0) -> GuestOutput:
        """Runs a program in the guest, and returns its exit status and output. See `AgentClient.execute`."""
        work = self.agent.execute(argv, timeout=timeout)
        return await self.guard(work, f"{argv[0]!r} in the guest to end", timeout + 30)

    async def renew_agent(self, reason: str) -> None:
        """The guest is not the one any more that was asked: what it was asked for fails with `reason`."""
        await self.guard(self.agent.go_back(reason), "the agent's socket", START_TIMEOUT)

    async def call_server(self, command: str) -> dict[str, Any]:
        """A control command without arguments, to the first device's server."""
        return await self.control.call(command, timeout=CONTROL_TIMEOUT)

    async def call_servers(self, command: str) -> list[dict[str, Any]]:
        """The same to all of them."""
        return await ask_each(self.devices, command, CONTROL_TIMEOUT)

    async def command_provider(
        self, provider: str, command: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = 10.0
    ) -> dict[str, Any]:
        """A command of a provider's own (see its page in docs/), such as `kvp-get` of the integration services."""
        # A connection of its own: an answer may take its time, and a save must not wait for it.
        control = ControlClient(self.paths.control_of(await self._device_of(provider)), self.guard)
        more = {"name": provider, "command": command, "arguments": dict(arguments or {}), "seconds": timeout}
        try:
            return await control.call("provider", timeout + 5, **more)
        finally:
            control.close()

    async def _device_of(self, provider: str) -> int:
        """The number of the device that has the provider; of the first one if none has."""
        if len(self.devices) == 1:
            return 0
        for index, status in enumerate(await self.call_servers("status")):
            if provider in status["providers"]:
                return index
        return 0

    async def stop(self) -> None:
        await self.guard(self.monitor.execute("stop"), "the vCPUs to stop", START_TIMEOUT)

    async def cont(self) -> None:
        """Lets the vCPUs run."""
        await self.guard(self.monitor.cont(), "the vCPUs to run", START_TIMEOUT)

    # --- the end -----------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether the VM has been torn down."""
        return self._ended

    async def wait_ended(self) -> str:
        """Waits (without a bound: it is what a supervisor does) until the VM ends.

        Returns how QEMU ended if that was no failure: the guest powered itself off, above all. Raises `GuestPanicked`
        if the guest's kernel gave up (else a guest that reboots boots again), and `ProcessDied` if a process ended in
        any other way. The caller then calls `kill`, which also ends the other processes.

        A save or migration that is under way is waited for: it notices a death by itself where that matters, and where
        it does not (all is written, or sent), it can still be completed, and is then all that is left of the VM.
        """
        ends = self._ends
        assert self.qemu is not None and ends is not None
        watched: set[asyncio.Future[Any]] = {ends.panicked, *(child.exited for child in self.children)}
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        await self.idle.wait()
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
                    if self.description.foreign:  # there may be no agent
                        await self.guard(self.monitor.execute("system_powerdown"), "the power button", timeout / 2)
                    else:
                        await self.call_agent("poweroff", timeout=timeout / 2)
                await asyncio.wait({self.qemu.exited}, timeout=timeout / 2)
        finally:
            await self.kill()

    async def kill(self) -> None:
        """Ends all processes at once and removes the run directory. May be called more than once."""
        if self._ended:
            return
        self._ended = True
        try:
            await self._stop_processes()
        finally:
            self.run_directory.remove()

    async def leave(self) -> None:
        """Its owner ends. A VM of ours ends with it."""
        await self.kill()

    async def _stop_processes(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await self.agent.close()
        for child in reversed(self.children):
            await child.stop()
        await self.monitor.close()
        for device in self.devices:
            device.close()

    async def end_processes(self) -> None:
        """Ends all processes and keeps the VM: it can be started again, with nothing of what it was."""
        await self._stop_processes()
        for path in self.run_directory.path.glob("*.sock"):
            path.unlink()
        self.qemu = None
        self._connections()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()
