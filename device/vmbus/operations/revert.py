"""Takes a running VM back to a checkpoint, with its QEMU and its device server.

First everything is checked that can be, and a refusal changes nothing: the record, the digests of the device's state
and of its files, whether the state fits a device of its description, whether the image has the very snapshot. Then

1. the vCPUs stop, and the device comes to rest, so that nobody writes into guest memory while it is replaced. A
   provider that does not come to rest does not prevent it: its device is discarded at once (step 3 before step 2);
2. QEMU's snapshot-load: it resets the device, and then replaces memory and everything else;
3. each server takes its state of the checkpoint for its own (`load`) and discards what its device was;
4. the PCI functions are put back, the servers rebuild channels and packets (`restore-finish`), the vCPUs run.

If step 2 fails before QEMU has reset the device (the server has seen no reset), nothing has been changed and the VM
runs on. If it fails later, or step 3 or 4 does, memory and devices may be of different times: the VM is ended, and the
error names the way to get it back.
"""

from __future__ import annotations

import asyncio
import functools
import time
from pathlib import Path
from typing import Any

import msgspec

from vmbus.device import saved
from vmbus.errors import StateError, UsageError, VmbusError
from vmbus.operations.capture import PAUSE_TIMEOUT
from vmbus.operations.image import Image, image_in
from vmbus.operations.restore import FINISH_TIMEOUT, found_in
from vmbus.operations.stream import refuse_unsafe_settings
from vmbus.operations.vm import Vm, operation
from vmbus.qemu.device import DeviceInstance, ask_each, each, resume_if_paused
from vmbus.qemu.probe import check_same, require_complete, require_running
from vmbus.qemu.qmp import capabilities
from vmbus.server.control import ControlError
from vmbus.snapshot.checkpoints import Checkpoint
from vmbus.util.interruptible import in_thread, uninterrupted
from vmbus.vm.errors import RevertFailed
from vmbus.vm.moments import NO_SABOTAGE, Hook, Moment, Sabotage, no_hook
from vmbus.vm.timing import Phases, Progress


class RevertReport(msgspec.Struct, kw_only=True):
    """What going back did. Times in seconds."""

    tag: str
    directory: str
    phases: dict[str, float]
    downtime: float
    packets: dict[str, int]
    """Outgoing packets rebuilt: ``queued`` and ``sent``."""
    channels: int
    pci_writes: int
    forced: bool
    """Whether the device was discarded without having come to rest."""


@operation("take back")
async def revert(
    vm: Vm,
    tag: str,
    *,
    directory: Path | None = None,
    progress: Progress | None = None,
    sabotage: Sabotage = NO_SABOTAGE,
    at: Hook = no_hook,
) -> RevertReport:
    """Takes the VM back to a checkpoint, with its processes; what happened since then is undone, in the guest and in
    the device. Other checkpoints stay, later ones too.

    Raises `UsageError` or `StateError` if the checkpoint is refused; nothing has been changed then. Raises
    `RevertFailed`, whose `source_alive` tells whether the VM runs on as before; if it does not, all has been torn
    down.
    """
    return await _Revert(vm, image_in(vm, directory), tag, Phases(progress), sabotage, at).run()


class _Revert:
    def __init__(self, vm: Vm, image: Image, tag: str, phases: Phases, sabotage: Sabotage, at: Hook) -> None:
        self._vm = vm
        self._monitor = vm.monitor
        self._devices = vm.devices
        self._image = image
        self._store = image.store
        self._tag = tag
        self._phases = phases
        self._sabotage = sabotage
        self._at = at
        self._was_running = False
        self._forced = False
        self._resets: list[int] = []  # how often each device had been reset before

    async def run(self) -> RevertReport:
        with self._phases("verify"):
            record = await self._verified()
        self._was_running = await self._monitor.running()
        begun = time.monotonic()
        try:
            with self._phases("stop"):
                await self._monitor.execute("stop")
            with self._phases("device"):
                in_stream = record.machine.device_in_stream
                # A QEMU that migrates the device itself has stopped it, and will put it back.
                self._forced = not in_stream and not await self._rest()
                for status in await ask_each(self._devices, "status"):
                    check_same(status, in_stream=in_stream, what=f"checkpoint {self._tag!r}")
                    self._resets.append(int(status["resets"]))
            with self._phases("forget"), self._vm.own_migration():
                await self._image.forget_error()
        except BaseException as error:
            await self._run_on(error)
            raise
        with self._vm.own_migration():
            task = asyncio.create_task(self._go_back(record))
            try:
                report = await asyncio.shield(task)
            except asyncio.CancelledError:
                # Half of a way back would help nobody.
                await asyncio.wait({task})
                if (failed := task.exception()) is not None:
                    raise failed from None
                raise
        report.downtime = time.monotonic() - begun
        return report

    async def _verified(self) -> Checkpoint:
        vm, store, tag = self._vm, self._store, self._tag
        record = store.record(tag)
        for data in store.verify_states(record):
            saved.decode(data)
        await in_thread(functools.partial(store.verify_files, record))
        there = record.machine.bare
        if vm.machine != there:
            hint = f"; start the VM with --like {store.directory}" if not store.own else ""
            raise StateError(f"checkpoint {tag!r} is of another machine: {there}; this one is {vm.machine}{hint}")
        if (
            len(record.states) != len(vm.devices)
            or record.vm.with_devices(vm.description.all_devices) != vm.description
        ):
            raise StateError(f"checkpoint {tag!r} is of another VM: its memory, CPUs, slot or guest settings differ")
        await self._image.open()
        found = await self._image.find(tag)
        if found != record.image:
            raise StateError(
                f"{store.image} does not have QEMU's part of checkpoint {tag!r}: recorded is {record.image}, "
                f"there is {found or 'none'}"
            )
        disks = await self._image.find_disks(tag)
        if disks != (record.disks or []):
            raise StateError(
                f"the VM's disks do not have their part of checkpoint {tag!r}: recorded is {record.disks or 'none'}, "
                f"there is {disks or 'none'}"
            )
        await refuse_unsafe_settings(self._monitor)
        await self._monitor.execute("migrate-set-capabilities", capabilities(multifd=False))
        try:
            await self._load(record, check=True)
        except ControlError as error:
            raise (StateError if error.kind == "state" else UsageError)(str(error)) from error
        return record

    async def _load(self, record: Checkpoint, *, check: bool) -> list[dict[str, Any]]:
        files: dict[str, Any] = {"files": str(self._store.files(record.tag).absolute())} if record.files else {}

        async def load(device: DeviceInstance) -> dict[str, Any]:
            index = self._devices.index(device)
            path, sha256 = self._store.state(record.tag, index).absolute(), record.states[index].sha256
            return await device.load(path, sha256, record.vm.all_devices[index], 60.0, check=check, **files)

        return await each(self._devices, load)

    async def _rest(self) -> bool:
        """Brings the devices to rest, with the vCPUs stopped; False if providers of one do not come to rest."""
        await each(self._devices, DeviceInstance.barrier)
        return all(await each(self._devices, _rest))

    async def _run_on(self, error: BaseException) -> None:
        """Nothing was replaced: lets the VM run as before.

        Raises `RevertFailed`, unless `error` is a cancellation and the VM does run on.
        """
        failed = f"revert to {self._tag!r} failed: {error}"
        try:
            await uninterrupted(self._undo())
        except VmbusError as second:
            raise RevertFailed(
                f"{failed}; the VM is lost, since it could not be set running again: {second}; {self._way_back()}",
                source_alive=False,
            ) from error
        if isinstance(error, Exception):
            fate = "the VM runs on" if self._was_running else "the VM stays paused as it was"
            raise RevertFailed(f"{failed}; {fate}", source_alive=True) from error

    async def _undo(self) -> None:
        await each(self._devices, resume_if_paused)
        if self._was_running:
            await self._monitor.cont()

    async def _go_back(self, record: Checkpoint) -> RevertReport:
        """Steps 2 to 4, which nothing interrupts."""
        tag, phases = self._tag, self._phases
        in_stream = record.machine.device_in_stream
        try:
            if self._forced:
                with phases("load"):
                    loaded = await self._load(record, check=False)
            try:
                with phases("ram"):
                    await self._at(Moment.LOADING)
                    await self._image.load(tag)
            except Exception as error:
                if not self._forced and await self._resets_now() == self._resets:
                    await self._run_on(error)
                raise
            if in_stream:
                await require_complete(self._devices)
            elif not self._forced:
                with phases("load"):
                    loaded = await self._load(record, check=False)
            writes = 0
            with phases("pci"):
                await self._at(Moment.PCI_REPLAY)
                for device, config in zip(self._devices, record.machine.configs, strict=True):
                    if not self._sabotage.of(device.name).skip_pci_replay and not in_stream:
                        writes += await device.put_back(config)
            with phases("channels"):
                await self._at(Moment.PACKET_RESTORE)
                if not in_stream:
                    finished = await ask_each(self._devices, "restore-finish", FINISH_TIMEOUT)
            with phases("cont"):
                await self._at(Moment.BEFORE_CONT)
                await self._vm.renew_agent(f"the VM was taken back to checkpoint {tag!r} meanwhile: ask again")
                await ask_each(self._devices, "status")  # one that is dead may be noticed only by who asks it
                if self._was_running and record.paused is msgspec.UNSET:
                    await self._monitor.cont()
                    if in_stream:
                        await require_running(self._devices)
            if in_stream:
                states = map(saved.decode, self._store.verify_states(record))
                loaded = [{"channels": state.bus.open_channels} for state in states]
                finished = [{"packets": msgspec.structs.asdict(record.packets)}]
        except RevertFailed:
            raise
        except Exception as error:
            raise RevertFailed(
                f"revert to {tag!r} failed half way: {error}; the VM has been ended, since its memory and its devices "
                f"may be of different times; {self._way_back()}",
                source_alive=False,
            ) from error
        return RevertReport(
            tag=tag,
            directory=str(self._store.directory),
            phases=phases.seconds,
            downtime=0.0,
            packets=found_in(finished)["packets"],
            channels=found_in(loaded)["channels"],
            pci_writes=writes,
            forced=self._forced,
        )

    async def _resets_now(self) -> list[int]:
        return [int(status["resets"]) for status in await ask_each(self._devices, "status")]

    def _way_back(self) -> str:
        if self._store.own:
            return "its checkpoints ended with it; a snapshot, if there is one, is brought back with scripts/restore"
        return (
            f"its checkpoints are still in {self._store.directory}: start the same VM with scripts/run-vm and revert "
            "it to any of them (scripts/revert --directory), or bring a snapshot back with scripts/restore"
        )


async def _rest(device: DeviceInstance) -> bool:
    try:
        await device.control.call("pause", timeout=PAUSE_TIMEOUT)
    except ControlError as error:
        if error.kind != "timeout":
            raise
        return False
    return True
