"""Saves a VM into a new snapshot directory: the steps of `vmbus.operations.capture`, and the bundle around them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec

import vmbus
from vmbus.errors import EnvironmentProblem, StateError, VmbusError
from vmbus.operations import own_disks
from vmbus.operations.capture import Capture
from vmbus.operations.target import Captured, FileTarget
from vmbus.operations.vm import Vm, operation
from vmbus.snapshot.bundle import SnapshotWriter, utc_now
from vmbus.snapshot.manifest import RAM, Manifest, Packets, Versions, state_name
from vmbus.vm.errors import SaveFailed
from vmbus.vm.moments import NO_SABOTAGE, Hook, Moment, Sabotage, no_hook
from vmbus.vm.own_disks import DiskState
from vmbus.vm.timing import Phases, Progress


class SaveReport(msgspec.Struct, kw_only=True):
    """What a save did. Times in seconds, sizes in bytes."""

    directory: str
    live: bool
    phases: dict[str, float]
    stopped_at: float
    """CLOCK_MONOTONIC when the vCPUs stopped; comparable within this boot of the host."""
    downtime: float | None = None
    """From there until they ran again; None if they do not (the VM ends with the save)."""
    packets: dict[str, int]
    """Outgoing packets saved: ``queued`` and ``sent``."""
    incoming_held: int
    ram_bytes: int = 0
    state_bytes: int = 0
    flushed_pages: int = 0
    flushed_bytes: int = 0
    attempts: int = 1
    notices: list[str] = []
    """What the snapshot refers to, or cannot vouch for."""

    @property
    def total(self) -> float:
        return sum(self.phases.values())


@operation("save")
async def save(
    vm: Vm,
    directory: Path,
    *,
    live: bool = False,
    keep: bool = False,
    progress: Progress | None = None,
    sabotage: Sabotage = NO_SABOTAGE,
    at: Hook = no_hook,
) -> SaveReport:
    """Saves the VM into a new snapshot directory.

    With `live`, the guest runs on while its memory is copied. With `keep`, the VM runs on afterwards; else it is left
    stopped, and the caller ends it with `kill`. Raises `UsageError` if an operation is under way or the directory
    exists, and `SaveFailed`, whose `source_alive` tells whether the VM runs on as before; if it does not, everything
    has been torn down.
    """
    own_disks.check_save(vm, keep=keep)
    writer = SnapshotWriter.begin(directory)
    try:
        with vm.own_migration():
            return await _save(vm, writer, Phases(progress), live=live, keep=keep, sabotage=sabotage, at=at)
    except BaseException as error:
        if isinstance(error, SaveFailed) and not error.source_alive:
            await vm.kill()  # first: nobody writes into what is removed now
        writer.abort()
        raise


async def _save(
    vm: Vm, writer: SnapshotWriter, phases: Phases, *, live: bool, keep: bool, sabotage: Sabotage, at: Hook
) -> SaveReport:
    with phases("boot files"):  # while the guest still runs
        try:
            await writer.add_boot_files(vm.programs.kernel, vm.programs.initramfs)
        except EnvironmentProblem as error:
            raise SaveFailed(f"save failed: {error}; the VM runs on", source_alive=True) from error
    target = _Bundle(vm, writer)
    capture = Capture(vm, target, phases, live=live, sabotage=sabotage, at=at)
    downtime: float | None = None
    stuck: VmbusError | None = None
    async with capture.taken() as taken:
        disks: list[DiskState] = []
        if vm.disks:
            with phases("disks"):
                disks = await own_disks.save_disks(vm, writer)
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
            for index, device in enumerate(taken.devices):
                if await writer.seal(state_name(index)) != device.state:
                    raise StateError("the device's state on disk is not what the server wrote: its digest differs")
            for name in taken.files:
                await writer.seal(name)
            assert target.versions is not None
            await writer.commit(_manifest(vm, writer, taken, disks, target.versions, live=live))
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
        state_bytes=taken.state_bytes,
        flushed_pages=taken.flushed_pages,
        flushed_bytes=taken.flushed_bytes,
        attempts=taken.attempts,
        notices=own_disks.notices(vm, disks),
    )


class _Bundle(FileTarget):
    def __init__(self, vm: Vm, writer: SnapshotWriter) -> None:
        super().__init__(writer.directory)
        self._vm = vm
        self.versions: Versions | None = None

    async def saved(self, captured: Captured) -> None:
        # Now, for once QEMU has written its part nothing of the VM is needed any more.
        self.versions = versions(self._vm, await self._vm.devices[0].control.call("status"))


def _manifest(
    vm: Vm, writer: SnapshotWriter, taken: Captured, disks: list[DiskState], versions: Versions, *, live: bool
) -> Manifest:
    return Manifest(
        created=utc_now(),
        live=live,
        # Providers may have come and gone since the launch: it is restored with those that are there now.
        vm=taken.described(vm.description),
        machine=vm.machine.with_configs(taken.configs, driven=taken.driven),
        versions=versions,
        packets=Packets(**taken.packets),
        incoming_held=taken.incoming_held,
        files=writer.records,
        paused=msgspec.UNSET if taken.was_running else True,
        disks=disks or msgspec.UNSET,
    )


def versions(vm: Vm, status: dict[str, Any]) -> Versions:
    """What saves or moves this VM, whose device server has this `status`."""
    return Versions(
        project=vmbus.__version__,
        qemu=vm.programs.qemu_version,
        libvfio_user=str(status.get("libvfio_user", "unknown")),
    )
