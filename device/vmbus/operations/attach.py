"""A VM whose QEMU and device servers somebody else started: everything can be done with it that can be done with one of
ours, as long as it fits (`vmbus.qemu.survey`).

Nothing of it ends with its owner here. Only where the VM itself is over in this place (it was saved, it has migrated,
it is lost) its QEMU is told to quit: it must not run on beside what it has become.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vmbus.errors import EnvironmentProblem, StateError, UsageError, VmbusError, os_error
from vmbus.operations import checkpoint as noting
from vmbus.operations import migrate as moving
from vmbus.operations import restore as restoring
from vmbus.operations import revert as reverting
from vmbus.operations import save as saving
from vmbus.operations.checkpoint import CheckpointReport
from vmbus.operations.machine import VirtualMachine
from vmbus.operations.migration.files import record_of
from vmbus.operations.migration.listener import Listener
from vmbus.operations.revert import RevertReport
from vmbus.operations.save import SaveReport
from vmbus.operations.stream import refuse_unsafe_settings
from vmbus.qemu.device import DeviceInstance
from vmbus.qemu.facts import Facts, ask_facts
from vmbus.qemu.outsider import Outsider, until_end
from vmbus.qemu.survey import Survey, survey
from vmbus.snapshot.manifest import Function, Machine
from vmbus.util.explaining import NAME_PATTERN
from vmbus.util.interruptible import in_thread
from vmbus.util.patience import patient
from vmbus.vm.command_line import Programs
from vmbus.vm.description import FurtherDevice, GuestDescription, VmDescription
from vmbus.vm.run_directory import RunDirectory
from vmbus.vm.timing import Phases, Progress

CONNECT_TIMEOUT = 30.0
"""Seconds for each connection to what runs already."""
QUIT_TIMEOUT = 10.0
"""Seconds for QEMU to quit when its VM is over here."""
LEAVE_TIMEOUT = 120.0
"""Seconds for an operation that was interrupted to put the VM back as it was."""
_LOAD_TIMEOUT = 60.0


@dataclass(frozen=True)
class Attachment:
    """Where what somebody else started is reached: QEMU's monitor, the control socket of each device server, and the
    socket of the agent's port if there is an agent of ours in the guest."""

    qmp: Path
    controls: Sequence[Path]
    agent: Path | None = None


def described(found: Survey, name: str) -> VmDescription:
    """The VM that was found, as far as it is our affair. Raises UsageError for devices that do not go together."""
    first, *further = found.devices
    slots = [one.device for one in found.facts.functions]
    slots.sort()
    # Who drives the devices in the guest is not known; what is said here asks nothing of it.
    guest = GuestDescription(driver="both", huge_pages=1) if further else GuestDescription(driver="linux")
    try:
        return VmDescription(
            name=name,
            device=first,
            memory_mib=found.facts.memory_mib,
            cpus=found.facts.cpus,
            slot=slots[0],
            guest=guest,
            devices=[FurtherDevice(one.name, one.providers, slot) for one, slot in zip(further, slots[1:], strict=True)]
            or msgspec.UNSET,
        )
    except ValueError as error:
        raise UsageError(f"the devices of this VM do not go together: {error}") from error


def machine_of(facts: Facts) -> Machine:
    """What the streams of such a QEMU fit."""
    first, *further = sorted(facts.functions, key=lambda one: one.device)
    return Machine(
        type=facts.machine,
        accelerator="kvm" if facts.accelerator == "kvm" else "tcg",
        pci_address=str(first),
        pci_config="",
        spare_cpus=facts.room - facts.cpus,
        generation_id=facts.generation_id,
        foreign=True,
        further=[Function(str(one), "") for one in further],
    )


def programs_of(facts: Facts) -> Programs:
    """No programs: they run."""
    return Programs(
        qemu=(),
        qemu_version=facts.version,
        accelerator=facts.accelerator,
        kernel=None,
        initramfs=None,
        foreign=True,
    )


class AttachedMachine(VirtualMachine):
    """See the module. Use `attach`, `attach_restored` or `attach_received`; end it with `leave`, and its QEMU runs on.

    `facts`: what its QEMU has said of itself.
    """

    def __init__(
        self,
        description: VmDescription,
        programs: Programs,
        run_directory: RunDirectory,
        *,
        attachment: Attachment,
        **options: Any,
    ) -> None:
        """`attachment`: the control sockets in the order of the description's devices."""
        super().__init__(description, programs, run_directory, **options)
        self.facts: Facts | None = None
        self._attachment = attachment
        self._has_agent = attachment.agent is not None
        links = {self.paths.control_of(index): path for index, path in enumerate(attachment.controls)}
        links |= {self.paths.agent: attachment.agent} if attachment.agent is not None else {}
        with os_error(f"cannot write into {run_directory.path}"):
            for link, target in links.items():  # where tools look for them
                link.symlink_to(target.absolute())

    async def start(
        self,
        phases: Phases,
        *,
        states: Sequence[Path] | None = None,
        files: Path | None = None,
        incoming: bool = False,
    ) -> None:
        """Connects to what runs, and compares it with the description; `states` are given to the servers."""
        if self.qemu is not None or self.facts is not None:
            raise EnvironmentProblem(
                f"QEMU of VM {self.name!r} was started by somebody else, and so nobody here can start it again"
            )
        with phases("qemu"):
            await self.monitor.connect(self._attachment.qmp, CONNECT_TIMEOUT)
            self.qemu = qemu = Outsider(f"QEMU of VM {self.name!r}")
            self.background(self._watch(qemu))
            self.facts = await ask_facts(self.monitor)
            self._compare(self.facts)
            if incoming:  # one that was started without -S would run the guest as soon as its memory is there
                await self.monitor.execute("stop")
            await refuse_unsafe_settings(self.monitor)
        with phases("server"):
            for index, device in enumerate(self.devices):
                device.server = server = Outsider(f"the device server of VM {self.name!r}")
                path = self.paths.control_of(index)
                with os_error(f"there is no device server at {path}"):
                    reader, writer = await asyncio.open_unix_connection(str(path))
                self.background(until_end(reader, writer, server))
            more = {} if files is None else {"files": str(_whole(files))}
            for device, state in zip(self.devices, states or [], strict=bool(states)):
                await self._load(device, state, more)
        if self._has_agent:
            await self.guard(self.agent.connect(CONNECT_TIMEOUT), "the agent's socket", CONNECT_TIMEOUT)
        await self._attend()

    async def _load(self, device: DeviceInstance, state: Path, more: dict[str, Any]) -> None:
        record = await in_thread(functools.partial(record_of, state))
        await device.load(_whole(state), record.sha256, device.description, _LOAD_TIMEOUT, **more)

    async def _watch(self, qemu: Outsider) -> None:
        await self.monitor.lost()
        qemu.gone(told=self._ends is not None and self._ends.told)

    def _compare(self, facts: Facts) -> None:
        """Raises `StateError` unless QEMU is as the VM was made."""
        there = machine_of(facts)
        for what, wanted, found in (
            ("machine", self.machine, there),
            ("memory in MiB", self.description.memory_mib, facts.memory_mib),
            ("number of CPUs", self.description.cpus, facts.cpus),
        ):
            if wanted != found:
                raise StateError(
                    f"QEMU was started otherwise than VM {self.name!r} was: its {what}: {found}, not {wanted}"
                )

    # --- what is otherwise than with a VM of ours ---------------------------------------------------------------

    def _only_here(self, what: str) -> None:
        if self.facts is not None and self.facts.disks:
            raise UsageError(
                f"{what} would go back to the memory of that moment, and QEMU's disks ({', '.join(self.facts.disks)}) "
                "would not: they are no part of it; a save that ends the VM (without --keep), or a disk of the VMBus "
                "device's, works"
            )

    async def save(self, directory: Path, *, keep: bool = False, **more: Any) -> SaveReport:
        """As `vmbus.operations.save.save`; without `keep` QEMU is told to quit when all is saved."""
        if keep:
            self._only_here("a snapshot beside the VM that runs on")
        report = await saving.save(self, directory, keep=keep, **more)
        if not keep:
            await self.kill()
        return report

    async def checkpoint(self, tag: str, **more: Any) -> CheckpointReport:
        """As `vmbus.operations.checkpoint.checkpoint`."""
        self._only_here("a checkpoint")
        return await noting.checkpoint(self, tag, **more)

    async def revert(self, tag: str, **more: Any) -> RevertReport:
        """As `vmbus.operations.revert.revert`."""
        self._only_here("a revert")
        return await reverting.revert(self, tag, **more)

    async def call_agent(self, command: str, /, *, timeout: float = 30.0, **arguments: Any) -> dict[str, Any]:
        """As ever, if there is an agent. Raises UsageError."""
        if not self._has_agent:
            raise UsageError(f"VM {self.name!r} was attached to without an agent (--agent SOCKET)")
        return await super().call_agent(command, timeout=timeout, **arguments)

    async def kill(self) -> None:
        """The VM is over here: QEMU is told to quit, and let go."""
        if not self.ended and self.qemu is not None and self.qemu.running and self._ends is not None:
            with contextlib.suppress(VmbusError):
                await self.monitor.execute("quit", timeout=QUIT_TIMEOUT)
            await asyncio.wait({self.qemu.exited}, timeout=QUIT_TIMEOUT)
        await super().kill()

    async def leave(self) -> None:
        """Lets QEMU and the servers go; they run on, with nothing of ours in them. What is under way is waited for: it
        was interrupted, and is undoing what it did."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patient(LEAVE_TIMEOUT)):
                await self.idle.wait()
        if self.ended:
            return
        for image in self.images.values():
            with contextlib.suppress(VmbusError):
                await image.close()
        await super().kill()


def _whole(path: Path) -> Path:
    return path.absolute()


def name_for(wanted: str | None, found: Survey) -> tuple[str, bool]:
    """What the VM is called here, and whether it has to be called so."""
    if wanted is not None:
        return wanted, True
    theirs = found.facts.name.lower()
    return (theirs if re.search(NAME_PATTERN, theirs) else "attached"), False


async def attach(
    attachment: Attachment, name: str | None = None, *, resume: bool = False, progress: Progress | None = None
) -> AttachedMachine:
    """A VM that runs. `resume`: one that an operation which was killed has left standing is set running first.

    Raises `DoesNotFit` with all reasons, `EnvironmentProblem` or `WaitTimeout`; QEMU is as it was then.
    """
    phases = Phases(progress)
    with phases("verify"):
        found = await survey(attachment.qmp, attachment.controls, resume=resume)
    called, exact = name_for(name, found)
    directory = RunDirectory.create(called, exact=exact)
    try:
        vm: AttachedMachine = _make(found, attachment)(
            described(found, directory.name), programs_of(found.facts), directory, like=machine_of(found.facts)
        )
    except BaseException:
        directory.remove()
        raise
    try:
        await vm.start(phases)
    except BaseException:
        await vm.leave()
        raise
    vm.phases = phases.seconds
    return vm


async def attach_restored(
    attachment: Attachment, snapshot: Path, name: str | None = None, *, progress: Progress | None = None
) -> AttachedMachine:
    """The VM of a snapshot, in a QEMU that awaits a stream, whose servers await a state. Raises as `attach`, and what
    `vmbus.operations.restore.restore` raises: QEMU cannot be used again then."""
    found = await survey(attachment.qmp, attachment.controls, awaits=True)
    directory = None if name is None else RunDirectory.create(name, exact=True)
    vm = await restoring.restore(
        _make(found, attachment), snapshot, programs_of(found.facts), directory, progress=progress
    )
    assert isinstance(vm, AttachedMachine)
    return vm


async def attach_received(
    attachment: Attachment, listener: Listener, name: str | None = None, **options: Any
) -> AttachedMachine:
    """A VM that migrates into a QEMU that awaits a stream, whose servers await a state: `vmbus.operations.migrate`'s
    `receive`, with its options. Raises as `attach`, and as that."""
    found = await survey(attachment.qmp, attachment.controls, awaits=True)
    directory = None if name is None else RunDirectory.create(name, exact=True)
    vm = await moving.receive(_make(found, attachment), listener, programs_of(found.facts), directory, **options)
    assert isinstance(vm, AttachedMachine)
    return vm


def _make(found: Survey, attachment: Attachment) -> Any:
    ordered = Attachment(attachment.qmp, found.controls, attachment.agent)
    return functools.partial(AttachedMachine, attachment=ordered)
