"""Checkpoints of a running VM: moments to which `vmbus.operations.revert` takes it back.

The vCPUs stop, barrier, the device comes to rest and saves its state, its providers' files are copied, QEMU's
snapshot-save, and all runs on. QEMU's part lies in an image (`vmbus.operations.image`), the device's beside it
(`vmbus.snapshot.checkpoints`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
import time
from pathlib import Path

import msgspec

from vmbus.errors import StateError, UsageError, VmbusError, os_error
from vmbus.operations.capture import Capture
from vmbus.operations.image import Image, image_in
from vmbus.operations.own_disks import check_checkpoint
from vmbus.operations.target import Captured
from vmbus.operations.vm import Vm, operation
from vmbus.snapshot.bundle import utc_now
from vmbus.snapshot.checkpoints import Checkpoint, Store, check_tag
from vmbus.snapshot.manifest import Packets
from vmbus.util.interruptible import in_thread, uninterrupted
from vmbus.vm.description import MOST_DEVICES
from vmbus.vm.moments import Hook, Moment, no_hook
from vmbus.vm.timing import Phases, Progress


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


def checkpoints(vm: Vm, *, directory: Path | None = None) -> list[Checkpoint]:
    """The checkpoints, oldest first. Raises `StateError` if a record is damaged."""
    return image_in(vm, directory).store.list()


@operation("note")
async def checkpoint(
    vm: Vm, tag: str, *, directory: Path | None = None, progress: Progress | None = None, at: Hook = no_hook
) -> CheckpointReport:
    """Notes this moment under the name `tag`, so that `revert` can go back to it; the VM runs on.

    Checkpoints lie in the run directory and end with the VM, or in a `directory` of their own (made if need be), and
    then stay. Raises `UsageError` for a tag that is taken or not usable, and `SaveFailed` as `save` does.
    """
    check_checkpoint(vm)
    image = image_in(vm, directory)
    store = image.store
    check_tag(tag)
    if tag in store.tags():
        raise UsageError(f"there is a checkpoint {tag!r} already: delete it first, or choose another name")
    await image.open()
    await image.reclaim()
    store.keep_reserve()
    phases = Phases(progress)
    capture = _Capture(vm, image, tag, phases, at)
    try:
        with vm.own_migration():
            async with capture.taken() as taken:
                with phases("seal"):
                    record = await _seal(vm, image, tag, taken)
                with phases("resume"):
                    await capture.resume()
                downtime = time.monotonic() - taken.stopped_at
    except BaseException:
        await uninterrupted(_forget(image, tag))
        raise
    finally:
        store.give_up_reserve()
    return CheckpointReport(
        tag=tag,
        directory=str(store.directory),
        phases=phases.seconds,
        downtime=downtime,
        packets=taken.packets,
        incoming_held=taken.incoming_held,
        state_bytes=taken.state_bytes,
        vm_state_bytes=record.image.vm_state_bytes,
    )


async def _seal(vm: Vm, image: Image, tag: str, taken: Captured) -> Checkpoint:
    found = await image.find(tag)
    if found is None:
        raise StateError(f"QEMU's snapshot-save succeeded, and the image has no snapshot of checkpoint {tag!r}")
    store = image.store
    first, *further = [device.state for device in taken.devices]
    record = Checkpoint(
        tag=tag,
        number=1 + max((one.number for one in store.list()), default=0),
        created=utc_now(),
        vm=taken.described(vm.description),
        machine=vm.machine.with_configs(taken.configs, driven=taken.driven),
        qemu=vm.programs.qemu_version,
        packets=Packets(**taken.packets),
        incoming_held=taken.incoming_held,
        state=first,
        further=further or msgspec.UNSET,
        image=found,
        files=(await in_thread(functools.partial(store.seal_files, tag, taken.files))) or msgspec.UNSET,
        paused=msgspec.UNSET if taken.was_running else True,
        disks=[one for one in await image.find_disks(tag) if one is not None] or msgspec.UNSET,
    )
    store.verify_states(record)
    await asyncio.to_thread(store.commit, record)
    return record


async def _forget(image: Image, tag: str) -> None:
    """Removes what a checkpoint that failed has left; what cannot be removed now, the next one removes."""
    image.store.give_up_reserve()  # what is given back has to be written down
    image.store.remove(tag)
    with contextlib.suppress(VmbusError):
        await image.delete(tag, f"removing what was left of checkpoint {tag!r}")
        await image.give_back()


@operation("delete")
async def delete_checkpoint(vm: Vm, tag: str, *, directory: Path | None = None) -> None:
    """Deletes a checkpoint. Raises `UsageError` if there is none of that name."""
    image = image_in(vm, directory)
    check_tag(tag)
    if tag not in image.store.tags():
        image.store.record(tag)  # says what there is
    await image.open()
    image.store.remove(tag)
    await image.delete(tag)
    await image.give_back()  # if it was gone back to, the image's present still refers to it


class _Capture(Capture):
    """A stopped save whose memory goes into the image."""

    def __init__(self, vm: Vm, image: Image, tag: str, phases: Phases, at: Hook) -> None:
        target = _BesideImage(image.store, tag)
        super().__init__(vm, target, phases, live=False, at=at, operation=f"checkpoint {tag!r}")
        self._image = image
        self._tag = tag

    async def _write_ram(self, channels: list[dict[str, object]]) -> None:
        await self._at(Moment.RAM_COPY)
        await self._image.save(self._tag)


class _BesideImage:
    """The devices' states and their providers' files, without memory: implements `vmbus.operations.target.Target`."""

    durable = True
    way = None

    def __init__(self, store: Store, tag: str) -> None:
        self._store = store
        self._tag = tag
        self.files = store.files(tag).absolute()

    def state(self, index: int) -> Path:
        return self._store.state(self._tag, index).absolute()

    async def begin(self) -> list[dict[str, object]]:
        with os_error(f"cannot make {self.files}"):
            self.files.mkdir(mode=0o700)
        return []

    async def again(self) -> None:
        pass

    async def saved(self, captured: Captured) -> None:
        if not captured.files:
            self.files.rmdir()

    def discard(self) -> None:
        for index in range(MOST_DEVICES):
            self.state(index).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.files)
