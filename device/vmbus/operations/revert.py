"""Checkpoints of a running VM, and the way back to them in the running QEMU and device server.

QEMU keeps its part of a checkpoint (memory, CPUs, devices) as a snapshot in a qcow2 image that no guest device uses;
the device's part lies beside it (`vmbus.snapshot.checkpoints`).

Taking one: the vCPUs stop, barrier, the device comes to rest and saves its state, its providers' files are copied,
QEMU's snapshot-save, and all runs on.

Going back: first everything is checked that can be, and a refusal changes nothing: the record, the digests of the
device's state and of its files, whether the state fits a device of its description, whether the image has the very
snapshot. Then

1. the vCPUs stop, and the device comes to rest, so that nobody writes into guest memory while it is replaced. A
   provider that does not come to rest does not prevent it: its device is discarded at once (step 3 before step 2);
2. QEMU's snapshot-load: it resets the device, and then replaces memory and everything else. (QEMU keeps the error of a
   migration that failed or was called off until it begins another one, and any load meanwhile fails for it, at its end.
   So where there is such an error, a snapshot is saved first, and thrown away.);
3. the server takes the checkpoint's state for its own (`load`) and discards what the device was;
4. the PCI function is put back, the server rebuilds channels and packets (`restore-finish`), the vCPUs run.

If step 2 fails before QEMU has reset the device (the server has seen no reset), nothing has been changed and the VM
runs on. If it fails later, or step 3 or 4 does, memory and devices may be of different times: the VM is ended, and the
error names the way to get it back.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import msgspec

from vmbus.device import saved
from vmbus.device.description import DeviceDescription
from vmbus.errors import EnvironmentProblem, StateError, UsageError, VmbusError
from vmbus.operations.save import (
    NO_SABOTAGE,
    PAUSE_TIMEOUT,
    Capture,
    Captured,
    QemuMonitor,
    Sabotage,
    SaveFailed,
    barrier,
    refuse_unsafe_settings,
    uninterrupted,
)
from vmbus.qemu.jobs import run_job
from vmbus.qemu.probe import Control, check_same, require_complete, require_running
from vmbus.server.control import ControlError
from vmbus.snapshot.bundle import utc_now
from vmbus.snapshot.checkpoints import Checkpoint, ImageSnapshot, Store, check_tag
from vmbus.snapshot.manifest import FileRecord, Machine, Packets
from vmbus.util.interruptible import in_thread
from vmbus.vm.description import VmDescription
from vmbus.vm.moments import Hook, Moment, no_hook
from vmbus.vm.timing import Phases

_IMAGE_BYTES = 1 << 20  # of the (empty) disk in the image; what is kept lies beside it
_STATE_OFFSET = 512 << 20  # where QEMU puts a VM's state behind a disk of that size (one entry of the first table)
_BESIDE_MEMORY = 256 << 20  # bytes that it may have besides guest memory, by far
_IMAGE_TIMEOUT = 60.0
_FINISH_TIMEOUT = 120.0
# In front of a tag in the image: QEMU takes a name of digits for the number of a snapshot, and would load another one.
_PREFIX = "vmbus-"
THROWN_AWAY = ".thrown-away"
"""Name in the image, and of no checkpoint's, of a snapshot that is only there to have QEMU forget an error."""


class RevertFailed(EnvironmentProblem):
    """A VM could not be taken back. `source_alive` tells whether it runs on as before; else it has to be ended."""

    def __init__(self, message: str, *, source_alive: bool) -> None:
        super().__init__(message)
        self.source_alive = source_alive
        self.status = 13 if source_alive else 14


class CheckpointReport(msgspec.Struct, kw_only=True):
    """What taking a checkpoint did. Times in seconds, sizes in bytes."""

    tag: str
    directory: str
    phases: dict[str, float]
    downtime: float
    """From the stop of the vCPUs until they ran again."""
    packets: dict[str, int]
    """Outgoing packets saved: ``queued`` and ``sent``."""
    incoming_held: int
    state_bytes: int
    vm_state_bytes: int


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


@dataclass(frozen=True)
class Patient:
    """The VM, as far as it is dealt with here.

    `put_back` writes a configuration space back into the PCI function; `own_migration` gives a context in which QEMU
    may save and load; `forget` has the guest's agent's connection renewed, and fails what is asked of the agent.
    """

    name: str
    description: VmDescription
    machine: Machine
    """Without the function's configuration."""
    qemu_version: str
    monitor: QemuMonitor
    control: Control
    put_back: Callable[[bytes], Awaitable[int]]
    own_migration: Callable[[], AbstractContextManager[None]]
    forget: Callable[[str], Awaitable[None]]


class Checkpoints:
    """The checkpoints of one VM in one directory. `number` tells its image from those in other directories."""

    def __init__(self, patient: Patient, store: Store, number: int) -> None:
        self.store = store
        self._vm = patient
        self._monitor = patient.monitor
        self._control = patient.control
        self._node = f"checkpoints-{number}"
        self._opened = False
        self._job_timeout = 60.0 + patient.description.memory_mib / 20

    # ---- the image -------------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        """Gives the image to QEMU, made if it is not there."""
        if self._opened:
            return
        self.store.prepare()
        file = f"{self._node}-file"
        image = self.store.image
        fresh = not image.exists()
        if fresh:
            try:
                os.close(os.open(image, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            except OSError as error:
                raise EnvironmentProblem(f"cannot make {image}: {error.strerror}") from error
        added = []
        try:
            await self._monitor.execute(
                "blockdev-add",
                {
                    "driver": "file",
                    "node-name": file,
                    "filename": str(image.absolute()),
                    "discard": "unmap",
                },
            )
            added.append(file)
            if fresh:
                options = {"driver": "qcow2", "file": file, "size": _IMAGE_BYTES}
                await run_job(self._monitor, "blockdev-create", {"options": options}, _IMAGE_TIMEOUT, f"making {image}")
            # What a deleted checkpoint had is given back to the disk.
            options = {"driver": "qcow2", "node-name": self._node, "file": file, "discard": "unmap"}
            await self._monitor.execute("blockdev-add", options)
        except BaseException:
            for node in added:
                await uninterrupted(self._remove_node(node))
            if fresh:
                image.unlink(missing_ok=True)
            raise
        self._opened = True

    async def _remove_node(self, node: str) -> None:
        with contextlib.suppress(VmbusError):  # QEMU is gone, and the node with it
            await self._monitor.execute("blockdev-del", {"node-name": node})

    async def _in_image(self, tag: str) -> ImageSnapshot | None:
        """What the image has under a tag."""
        for one in await self._all_in_image():
            if one["name"] == _PREFIX + tag:
                return ImageSnapshot(
                    name=one["name"],
                    vm_state_bytes=int(one["vm-state-size"]),
                    seconds=int(one["date-sec"]),
                    nanoseconds=int(one["date-nsec"]),
                )
        return None

    async def _all_in_image(self) -> list[dict[str, Any]]:
        nodes = await self._monitor.execute("query-named-block-nodes", {"flat": True})
        node = next(one for one in nodes if one["node-name"] == self._node)
        return list(node["image"].get("snapshots", []))

    async def _reclaim(self) -> None:
        """Removes what takes and deletions that never came to their end have left."""
        tags = set(self.store.tags())
        for name in [str(one["name"]) for one in await self._all_in_image()]:
            if name.startswith(_PREFIX) and name.removeprefix(_PREFIX) not in tags:
                tag = name.removeprefix(_PREFIX)
                await self._job("snapshot-delete", tag, f"removing what was left of checkpoint {tag!r}")
        self.store.reclaim()

    async def _give_back(self) -> None:
        """Gives back to the disk the VM's state in the image that belongs to no snapshot: a take that failed wrote it,
        or a revert came from it.

        QEMU keeps that for the next one, behind the end of the image's (empty) disk. As a part of the disk it can be
        cut off: the disk is made so large that it covers it, and then as small as it was.
        """
        memory = (self._vm.description.memory_mib << 20) + _BESIDE_MEMORY
        for size in (_STATE_OFFSET + memory, _IMAGE_BYTES):
            await self._monitor.execute("block_resize", {"node-name": self._node, "size": size})

    async def _job(self, command: str, tag: str, what: str) -> None:
        arguments: dict[str, object] = {"tag": _PREFIX + tag, "devices": [self._node]}
        if command != "snapshot-delete":
            arguments["vmstate"] = self._node
        await run_job(self._monitor, command, arguments, self._job_timeout, what)

    # ---- taking, listing, deleting -----------------------------------------------------------------------------------

    async def take(self, tag: str, phases: Phases, at: Hook = no_hook) -> CheckpointReport:
        """Raises `UsageError` if the tag is taken or not usable, `SaveFailed` (see there) for everything else."""
        check_tag(tag)
        if tag in self.store.tags():
            raise UsageError(f"there is a checkpoint {tag!r} already: delete it first, or choose another name")
        await self._open()
        await self._reclaim()
        self.store.keep_reserve()
        capture = _Capture(self, tag, phases, at)
        try:
            with self._vm.own_migration():
                async with capture.taken() as taken:
                    with phases("seal"):
                        record = await self._seal(tag, taken)
                    with phases("resume"):
                        await capture.resume()
                    downtime = time.monotonic() - taken.stopped_at
        except BaseException:
            await uninterrupted(self._forget(tag))
            raise
        finally:
            self.store.give_up_reserve()
        return CheckpointReport(
            tag=tag,
            directory=str(self.store.directory),
            phases=phases.seconds,
            downtime=downtime,
            packets=taken.packets,
            incoming_held=taken.incoming_held,
            state_bytes=record.state.size,
            vm_state_bytes=record.image.vm_state_bytes,
        )

    async def _seal(self, tag: str, taken: Captured) -> Checkpoint:
        status = await self._control.call("status")
        image = await self._in_image(tag)
        if image is None:
            raise StateError(f"QEMU's snapshot-save succeeded, and the image has no snapshot of checkpoint {tag!r}")
        vm = self._vm
        record = Checkpoint(
            tag=tag,
            number=1 + max((one.number for one in self.store.list()), default=0),
            created=utc_now(),
            vm=msgspec.structs.replace(
                vm.description, device=msgspec.convert(status["description"], DeviceDescription)
            ),
            machine=msgspec.structs.replace(
                vm.machine, pci_config=taken.pci_config.hex(), device_in_stream=taken.driven
            ),
            qemu=vm.qemu_version,
            packets=Packets(**taken.packets),
            incoming_held=taken.incoming_held,
            state=FileRecord(taken.state_bytes, taken.state_sha256),
            image=image,
            files=(await in_thread(functools.partial(self.store.seal_files, tag, taken.files))) or msgspec.UNSET,
            paused=msgspec.UNSET if taken.was_running else True,
        )
        self.store.verify_state(record)
        await asyncio.to_thread(self.store.commit, record)
        return record

    async def _forget(self, tag: str) -> None:
        """Removes what a checkpoint that failed has left; what cannot be removed now, the next of its name removes."""
        self.store.give_up_reserve()  # what is given back has to be written down
        self.store.remove(tag)
        with contextlib.suppress(VmbusError):
            if await self._in_image(tag) is not None:
                await self._job("snapshot-delete", tag, f"removing what was left of checkpoint {tag!r}")
            await self._give_back()

    async def delete(self, tag: str) -> None:
        """Raises `UsageError` if there is no such checkpoint."""
        check_tag(tag)
        if tag not in self.store.tags():
            self.store.record(tag)  # says what there is
        await self._open()
        self.store.remove(tag)
        if await self._in_image(tag) is not None:
            await self._job("snapshot-delete", tag, f"deleting checkpoint {tag!r}")
        await self._give_back()  # if it was gone back to, the image's present still refers to it

    # ---- going back --------------------------------------------------------------------------------------------------

    async def revert(
        self, tag: str, phases: Phases, *, sabotage: Sabotage = NO_SABOTAGE, at: Hook = no_hook
    ) -> RevertReport:
        """Takes the VM back.

        Raises `UsageError` or `StateError` if the checkpoint is refused (nothing was changed then), and `RevertFailed`.
        """
        with phases("verify"):
            record = await self._verified(tag)
        was_running = await self._monitor.running()
        begun = time.monotonic()
        try:
            with phases("stop"):
                await self._monitor.execute("stop")
            with phases("device"):
                # A QEMU that migrates the device itself has stopped it, and will put it back.
                forced = not record.machine.device_in_stream and not await self._rest()
                status = await self._control.call("status")
                check_same(status, in_stream=record.machine.device_in_stream, what=f"checkpoint {tag!r}")
                resets = int(status["resets"])
        except BaseException as error:
            await self._run_on(tag, was_running, error)
            raise
        with self._vm.own_migration():
            try:
                with phases("forget"):
                    await self._forget_error()
            except BaseException as error:
                await self._run_on(tag, was_running, error)
                raise
            task = asyncio.create_task(self._go_back(record, phases, forced, resets, was_running, sabotage, at))
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

    async def _verified(self, tag: str) -> Checkpoint:
        record = self.store.record(tag)
        saved.decode(self.store.verify_state(record))
        await in_thread(functools.partial(self.store.verify_files, record))
        vm = self._vm
        there = msgspec.structs.replace(record.machine, pci_config="", device_in_stream=False)
        if vm.machine != there:
            hint = f"; start the VM with --like {self.store.directory}" if not self.store.own else ""
            raise StateError(f"checkpoint {tag!r} is of another machine: {there}; this one is {vm.machine}{hint}")
        if msgspec.structs.replace(record.vm, device=vm.description.device) != vm.description:
            raise StateError(f"checkpoint {tag!r} is of another VM: its memory, CPUs, slot or guest settings differ")
        await self._open()
        found = await self._in_image(tag)
        if found != record.image:
            raise StateError(
                f"{self.store.image} does not have QEMU's part of checkpoint {tag!r}: recorded is {record.image}, "
                f"there is {found or 'none'}"
            )
        await refuse_unsafe_settings(self._monitor)
        multifd = {"capability": "multifd", "state": False}
        await self._monitor.execute("migrate-set-capabilities", {"capabilities": [multifd]})
        try:
            await self._load(record, check=True)
        except ControlError as error:
            raise (StateError if error.kind == "state" else UsageError)(str(error)) from error
        return record

    async def _load(self, record: Checkpoint, *, check: bool) -> dict[str, Any]:
        files: dict[str, Any] = {"files": str(self.store.files(record.tag).absolute())} if record.files else {}
        return await self._control.call(
            "load",
            timeout=60.0,
            path=str(self.store.state(record.tag).absolute()),
            sha256=record.state.sha256,
            description=msgspec.to_builtins(record.vm.device),
            check=check,
            **files,
        )

    async def _forget_error(self) -> None:
        """Has QEMU forget the error of its last migration: see above, step 2."""
        removing = "removing a snapshot that nobody needs"
        if await self._in_image(THROWN_AWAY) is not None:  # of a revert that was killed
            await self._job("snapshot-delete", THROWN_AWAY, removing)
        if "error-desc" in await self._monitor.execute("query-migrate"):
            await self._job("snapshot-save", THROWN_AWAY, "having QEMU forget that a migration failed")
            await self._job("snapshot-delete", THROWN_AWAY, removing)

    async def _rest(self) -> bool:
        """Brings the device to rest, with the vCPUs stopped; False if its providers do not come to rest."""
        await barrier(self._monitor, self._control)
        try:
            await self._control.call("pause", timeout=PAUSE_TIMEOUT)
        except ControlError as error:
            if error.kind != "timeout":
                raise
            return False
        return True

    async def _run_on(self, tag: str, was_running: bool, error: BaseException) -> None:
        """Nothing was replaced: lets the VM run as before.

        Raises `RevertFailed`, unless `error` is a cancellation and the VM does run on.
        """
        try:
            await uninterrupted(self._undo(was_running))
        except VmbusError as second:
            raise RevertFailed(
                f"revert to {tag!r} failed: {error}; the VM is lost, since it could not be set running again: {second}"
                f"; {self._way_back()}",
                source_alive=False,
            ) from error
        if isinstance(error, Exception):
            fate = "the VM runs on" if was_running else "the VM stays paused as it was"
            raise RevertFailed(f"revert to {tag!r} failed: {error}; {fate}", source_alive=True) from error

    async def _undo(self, was_running: bool) -> None:
        if (await self._control.call("status"))["phase"] in ("pausing", "paused"):
            await self._control.call("resume")
        if was_running:
            await self._monitor.cont()

    async def _go_back(
        self,
        record: Checkpoint,
        phases: Phases,
        forced: bool,
        resets: int,
        was_running: bool,
        sabotage: Sabotage,
        at: Hook,
    ) -> RevertReport:
        """Steps 2 to 4, which nothing interrupts. `resets`: how often the device had been reset before."""
        tag = record.tag
        in_stream = record.machine.device_in_stream
        try:
            if forced:
                with phases("load"):
                    loaded = await self._load(record, check=False)
            try:
                with phases("ram"):
                    await at(Moment.LOADING)
                    await self._job("snapshot-load", tag, f"going back to checkpoint {tag!r}")
            except Exception as error:
                if not forced and (await self._control.call("status"))["resets"] == resets:
                    await self._run_on(tag, was_running, error)
                raise
            if in_stream:
                await require_complete(self._control)
            elif not forced:
                with phases("load"):
                    loaded = await self._load(record, check=False)
            writes = 0
            with phases("pci"):
                await at(Moment.PCI_REPLAY)
                if not sabotage.skip_pci_replay and not in_stream:
                    writes = await self._vm.put_back(bytes.fromhex(record.machine.pci_config))
            with phases("channels"):
                await at(Moment.PACKET_RESTORE)
                if not in_stream:
                    finished = await self._control.call("restore-finish", timeout=_FINISH_TIMEOUT)
            with phases("cont"):
                await at(Moment.BEFORE_CONT)
                await self._vm.forget(f"the VM was taken back to checkpoint {tag!r} meanwhile: ask again")
                await self._control.call("status")  # a server that is dead may be noticed only by who asks it
                if was_running and record.paused is msgspec.UNSET:
                    await self._monitor.cont()
                    if in_stream:
                        await require_running(self._control)
            if in_stream:
                state = saved.decode(self.store.verify_state(record))
                loaded = {"channels": sum(offer.open is not None for offer in state.bus.offers)}
                finished = {"packets": msgspec.structs.asdict(record.packets)}
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
            directory=str(self.store.directory),
            phases=phases.seconds,
            downtime=0.0,
            packets={key: int(finished["packets"][key]) for key in ("queued", "sent")},
            channels=int(loaded["channels"]),
            pci_writes=writes,
            forced=forced,
        )

    def _way_back(self) -> str:
        if self.store.own:
            return "its checkpoints ended with it; a snapshot, if there is one, is brought back with scripts/restore"
        return (
            f"its checkpoints are still in {self.store.directory}: start the same VM with scripts/run-vm and revert it "
            "to any of them (scripts/revert --directory), or bring a snapshot back with scripts/restore"
        )


class _Capture(Capture):
    """A stopped save whose memory goes into the image."""

    def __init__(self, checkpoints: Checkpoints, tag: str, phases: Phases, at: Hook) -> None:
        super().__init__(
            checkpoints._monitor,
            checkpoints._control,
            _BesideImage(checkpoints.store, tag),
            phases,
            live=False,
            at=at,
            operation=f"checkpoint {tag!r}",
        )
        self._checkpoints = checkpoints
        self._tag = tag

    async def _write_ram(self, channels: list[dict[str, object]]) -> None:
        await self._at(Moment.RAM_COPY)
        await self._checkpoints._job("snapshot-save", self._tag, f"taking checkpoint {self._tag!r}")


class _BesideImage:
    """The device's state and its providers' files, without memory: implements `vmbus.operations.save.Target`."""

    durable = True
    way = None

    def __init__(self, store: Store, tag: str) -> None:
        self.state = store.state(tag).absolute()
        self.files = store.files(tag).absolute()

    async def begin(self) -> list[dict[str, object]]:
        try:
            self.files.mkdir(mode=0o700)
        except OSError as error:
            raise EnvironmentProblem(f"cannot make {self.files}: {error.strerror}") from error
        return []

    async def saved(self, captured: Captured) -> None:
        if not captured.files:
            self.files.rmdir()

    def discard(self) -> None:
        self.state.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.files)


__all__ = [
    "CheckpointReport",
    "Checkpoints",
    "Patient",
    "RevertFailed",
    "RevertReport",
    "SaveFailed",
]
