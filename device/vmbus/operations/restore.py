"""Brings a VM back from a snapshot.

The snapshot is verified; a server takes the state, a QEMU that stands loads its stream; the PCI function is put back,
the server rebuilds channels and packets, the vCPUs run.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vmbus.device import saved
from vmbus.errors import StateError
from vmbus.operations.own_disks import place_disks
from vmbus.operations.own_guest import require_trust
from vmbus.qemu.device import ask_each
from vmbus.qemu.probe import require_complete, require_running, require_same
from vmbus.qemu.qmp import file_channel
from vmbus.snapshot.bundle import Snapshot, open_snapshot
from vmbus.util.patience import patient
from vmbus.vm.command_line import Programs
from vmbus.vm.description import VmDescription, with_options
from vmbus.vm.moments import NO_SABOTAGE, Hook, Moment, Sabotage, no_hook
from vmbus.vm.run_directory import RunDirectory
from vmbus.vm.timing import Phases, Progress

if TYPE_CHECKING:
    from vmbus.operations.machine import VirtualMachine

FINISH_TIMEOUT = 120.0
"""Seconds that the device server may take to rebuild its channels and packets."""


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


async def restore(
    make: type[VirtualMachine],
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
    disks: Path | None = None,
    trust: bool = False,
    gdb: str | None = None,
    at: Hook = no_hook,
) -> VirtualMachine:
    """Brings a VM back from the snapshot in `directory`, running, or paused if it was paused when it was saved;
    `vm.restored` has the report.

    `clone`: one of several that run at the same time; its disks are in its run directory, and end with it.
    `options`: of providers, by their names, in the place of the snapshot's: such as another `namespace` for the card of
    a clone. Whether they fit the state, its providers decide. `disks`: where disks of one's own that are in the
    snapshot get their files, in the place of where they were. `trust`: the snapshot is no stranger's, and its arguments
    for QEMU and the files of this machine that it names are wanted. `gdb`: as in `vmbus.vm.own_guest.OwnGuest`.

    The snapshot is verified before anything is started. Raises `StateError` if it is refused, by us or by the device
    server, and `EnvironmentProblem` or `WaitTimeout`; nothing is left behind then.
    """
    phases = Phases(progress)
    try:
        with phases("verify"):
            snapshot = await open_snapshot(directory, programs, expected=expected)
            require_trust(snapshot.manifest.vm, f"the snapshot {directory}", trust=trust)
        machine = snapshot.manifest.machine
        programs = dataclasses.replace(
            programs, kernel=snapshot.kernel, initramfs=snapshot.initramfs, accelerator=machine.accelerator
        )
        if run_directory is None:
            run_directory = RunDirectory.create(snapshot.manifest.vm.name)
        with phases("disks"):
            placed = await place_disks(snapshot, run_directory, clone=clone, folder=disks, trust=trust)
        description = with_options(placed.description, options or {})
    except BaseException:
        if run_directory is not None:
            run_directory.remove()
        raise
    vm = make(description, programs, run_directory, audit=audit, capture=capture, like=machine, gdb=gdb)
    vm.clone = clone
    vm.disks = placed.disks
    try:
        await vm.come_up(phases, _fill(vm, snapshot, phases, sabotage, at))
    except BaseException:
        placed.undo()
        raise
    placed.keep()
    return vm


async def _fill(vm: VirtualMachine, snapshot: Snapshot, phases: Phases, sabotage: Sabotage, at: Hook) -> None:
    states = list(snapshot.states)
    for index, device in enumerate(vm.devices):
        if (edit := sabotage.of(device.name).edit_state) is not None:
            states[index] = vm.run_directory / snapshot.states[index].name
            states[index].write_bytes(edit(snapshot.states[index].read_bytes()))
    in_stream = snapshot.manifest.machine.device_in_stream
    if in_stream:
        await vm.start(phases, incoming=True)
    else:
        await vm.start(phases, states=states, files=snapshot.directory, incoming=True)
    await require_same(vm.devices, in_stream=in_stream, what=f"the snapshot {snapshot.directory}")
    await at(Moment.BEFORE_STREAM)
    timeout = 60.0 + vm.description.memory_mib / 20
    with phases("ram"), vm.own_migration():
        await vm.guard(_load(vm, snapshot.ram, timeout, at), "QEMU to load the guest's memory", timeout)
    if in_stream:
        found = await _let_run_what_qemu_restored(vm, snapshot, phases)
    else:
        found = await _rebuild(vm, snapshot, phases, sabotage, at)
    vm.restored = RestoreReport(
        directory=str(snapshot.directory),
        phases=phases.seconds,
        running_at=time.monotonic(),
        **found,
        paused=_paused(snapshot),
    )


def _paused(snapshot: Snapshot) -> bool:
    return snapshot.manifest.paused is not msgspec.UNSET


async def _load(vm: VirtualMachine, ram: Path, timeout: float, at: Hook) -> None:
    monitor = vm.monitor
    # Without exit-on-error QEMU would be gone before it could tell the reason.
    await monitor.execute("migrate-incoming", {"channels": file_channel(ram), "exit-on-error": False})
    await at(Moment.LOADING)
    await monitor.wait_migration({"completed"}, patient(timeout), "QEMU to load the guest's memory")
    if await monitor.running():
        raise StateError("QEMU runs the guest before its device was put back")


async def _rebuild(
    vm: VirtualMachine, snapshot: Snapshot, phases: Phases, sabotage: Sabotage, at: Hook
) -> dict[str, Any]:
    """The PCI function and the device are put back, and the vCPUs run; what came of it, as the server tells it."""
    writes = 0
    with phases("pci"):
        await at(Moment.PCI_REPLAY)
        for device, config in zip(vm.devices, snapshot.configs, strict=True):  # they share the bridge's ports
            if not sabotage.of(device.name).skip_pci_replay:
                writes += await device.put_back(config)
    with phases("device"):
        await at(Moment.PACKET_RESTORE)
        work = ask_each(vm.devices, "restore-finish", FINISH_TIMEOUT + 1)
        finished = await vm.guard(work, "the device server to rebuild its channels", FINISH_TIMEOUT)
    with phases("cont"):
        await at(Moment.BEFORE_CONT)
        # QEMU would let them run without a device, and the death of a server may be noticed a moment later only.
        await ask_each(vm.devices, "status")
        if not _paused(snapshot):
            await vm.cont()
    return {**found_in(finished), "pci_writes": writes}


def found_in(answers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The packets and channels of all devices together, by what their servers say of them."""
    packets, channels = {"queued": 0, "sent": 0}, 0
    for one in answers:
        channels += int(one.get("channels", 0))
        for key in packets:
            packets[key] += int(one.get("packets", {}).get(key, 0))
    return {"packets": packets, "channels": channels}


async def _let_run_what_qemu_restored(vm: VirtualMachine, snapshot: Snapshot, phases: Phases) -> dict[str, Any]:
    """The device's state was in QEMU's stream, and QEMU puts it back when the vCPUs run."""
    await require_complete(vm.devices)
    if not _paused(snapshot):
        with phases("cont"):
            await vm.cont()
        await require_running(vm.devices)
    states = [saved.decode(await asyncio.to_thread(state.read_bytes)) for state in snapshot.states]
    packets = msgspec.structs.asdict(snapshot.manifest.packets)
    return {"packets": packets, "channels": sum(one.bus.open_channels for one in states), "pci_writes": 0}
