"""What becomes of disks of one's own in a save, a restore and a migration: see docs/own-guest.md.

QEMU writes to them, and its stream does not have them. So a snapshot contains such a disk as it is when QEMU has let go
of it, with the vCPUs stopped and its stream complete; or it refers to the file, which a restore takes only as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec

from vmbus.errors import EnvironmentProblem, StateError, UsageError, os_error
from vmbus.operations.vm import Vm
from vmbus.providers.disk.image import REPLACE_VARIABLE
from vmbus.snapshot.bundle import Snapshot, SnapshotWriter
from vmbus.snapshot.manifest import disk_file
from vmbus.util.copying import copy_file, sync_directory
from vmbus.util.interruptible import Stop, in_thread
from vmbus.vm.command_line import disk_node
from vmbus.vm.description import VmDescription
from vmbus.vm.own_disks import DiskState, changed, layer_of, look, mark, mark_as, settled
from vmbus.vm.own_guest import OwnDisk
from vmbus.vm.run_directory import RunDirectory


async def found(description: VmDescription) -> list[DiskState]:
    """The disks of a VM that is to start, each marked so that it will be known again. Raises what `look` raises."""

    def every(_: Stop) -> list[DiskState]:
        for disk in description.mine.disks:
            mark(look(disk))
        return [look(disk) for disk in description.mine.disks]

    return await in_thread(every)


def check_save(vm: Vm, *, keep: bool) -> None:
    """Raises UsageError if a snapshot would not fit its disks at once."""
    for disk in vm.description.mine.disks:
        if keep and disk.snapshot == "shared" and not disk.read_only:
            raise UsageError(
                f"the snapshot would only refer to the disk {disk.file} (snapshot=shared), which the VM writes to as "
                "soon as it runs on: save without --keep, or start the VM with --disk FILE,snapshot=copy"
            )


def check_checkpoint(vm: Vm) -> None:
    """Raises UsageError if a disk could not be taken back with the rest."""
    for disk in vm.description.mine.disks:
        if disk.driver == "raw" and not disk.read_only:
            raise UsageError(
                f"the disk {disk.file} is raw, and cannot go back to a checkpoint: qemu-img convert -O qcow2 makes one "
                "that can, or save into a directory (scripts/save --keep)"
            )


def disks_with_checkpoints(vm: Vm) -> list[str]:
    """The block nodes of the disks that go back with a checkpoint."""
    disks = vm.description.mine.disks
    return [disk_node(number) for number, disk in enumerate(disks) if disk.driver == "qcow2" and not disk.read_only]


def check_departure(vm: Vm) -> None:
    """Raises UsageError if nobody at a migration's destination could go on with its disks."""
    for disk in vm.description.mine.disks:
        if Path(disk.file).is_relative_to(vm.room("disks")):
            raise UsageError(f"the disk {disk.file} ends with this clone: save it, and restore it with --disks DIR")


def check_arrival(description: VmDescription, disks: list[DiskState], source: str) -> None:
    """Raises StateError unless the disks of a VM that is to arrive are here, the very ones. It writes to them still."""
    own = description.mine
    if [(one.file, one.driver) for one in own.disks] != [(one.top.file, one.top.format) for one in disks]:
        raise StateError(f"{source} sends a VM whose disks are not those that it speaks of")
    for disk, record in zip(own.disks, disks, strict=True):
        both = "both hosts have to reach the same file under the same name"
        try:
            present = look(disk, unused=False)
        except (EnvironmentProblem, UsageError) as error:
            raise StateError(f"the VM cannot come here: {error}; {both}") from error
        found = present.top
        difference = next((text for layer in record.behind if (text := layer.differs())), "")
        if [layer.file for layer in present.behind] != [layer.file for layer in record.behind]:
            difference = f"other images are behind {disk.file} than {source} says"
        if found.identity != record.top.identity or (not found.identity and found.size != record.top.size):
            difference = f"{disk.file} is another disk than the one at {source}"
        if difference:
            raise StateError(f"the VM cannot come here: {difference}; {both}")


async def hold_still(vm: Vm) -> None:
    """QEMU writes all that it has of the disks, and lets go of them until the VM runs. The vCPUs stand."""
    for number, disk in enumerate(vm.description.mine.disks):
        if not disk.read_only:
            await vm.monitor.execute("blockdev-set-active", {"node-name": disk_node(number), "active": False})


async def take_again(vm: Vm) -> None:
    """The way back from `hold_still`, and from the end of any migration, for a VM that is not set running. QEMU lets go
    of all images then, those of checkpoints and whatever else somebody who started it gave it."""
    await vm.monitor.execute("blockdev-set-active", {"active": True})


async def save_disks(vm: Vm, writer: SnapshotWriter) -> list[DiskState]:
    """Puts the disks that a snapshot contains into it; what it says of all of them. Raises EnvironmentProblem."""
    await hold_still(vm)
    records = []
    for number, (disk, known) in enumerate(zip(vm.description.mine.disks, vm.disks, strict=True)):
        record = await asyncio.to_thread(settled, disk, known)
        if disk.contained:
            source, target = Path(disk.file), writer.directory / disk_file(number)
            with os_error(f"cannot put {source} into the snapshot"):
                await in_thread(functools.partial(_copied, source, target))
            await writer.seal(disk_file(number))
        if difference := changed(record):
            raise EnvironmentProblem(f"a disk was changed by somebody else while it was saved: {difference}")
        records.append(record)
    return records


def _copied(source: Path, target: Path, stop: Stop) -> None:
    copy_file(source, target, stop=stop)


def notices(vm: Vm, records: list[DiskState]) -> list[str]:
    """What a snapshot, or its restore, cannot vouch for, for people."""
    own = vm.description.mine
    said = [
        f"the snapshot refers to the disk {disk.file}: it is restored only while that file is as it is now"
        for disk in own.disks
        if not disk.contained
    ]
    said += [
        f"the snapshot refers to {layer.file}, which is behind a disk: leave it as it is"
        for record in records
        for layer in record.behind
    ]
    if own.qemu_args:
        said.append(
            "the snapshot has your arguments for QEMU, and not the files that they name; a restore wants --trust"
        )
    if own.cpu and own.cpu.split(",")[0] in ("host", "max"):
        said.append(f"-cpu {own.cpu} means another processor on another host, or with another QEMU: restore it on this")
    return said


class Placed:
    """The disks of a VM that is brought back, in their places: then `keep` or `undo`."""

    def __init__(self, description: VmDescription) -> None:
        self.description = description
        """With the files that they have now."""
        self.disks: list[DiskState] = []
        self._undo: list[Callable[[], None]] = []
        self._keep: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Everything is as it was before."""
        for step in reversed(self._undo):
            with contextlib.suppress(OSError):
                step()
        self._undo, self._keep = [], []

    def keep(self) -> None:
        """They are the VM's; what they replaced is gone."""
        for step in self._keep:
            with contextlib.suppress(OSError):
                step()
        self._undo, self._keep = [], []

    def put(self, number: int, path: Path) -> None:
        own = self.description.mine
        disks = [
            msgspec.structs.replace(one, file=str(path)) if index == number else one
            for index, one in enumerate(own.disks)
        ]
        self.description = msgspec.structs.replace(self.description, own=msgspec.structs.replace(own, disks=disks))

    def made(self, path: Path) -> None:
        self._undo.append(path.unlink)

    def replaced(self, path: Path, before: Path) -> None:
        def back() -> None:
            before.replace(path)

        self._undo.append(back)
        self._keep.append(before.unlink)


async def place_disks(
    snapshot: Snapshot, run_directory: RunDirectory, *, clone: bool, folder: Path | None, trust: bool
) -> Placed:
    """Puts the disks of a snapshot where the VM will have them: where they were, in a `folder`, or in a clone's own
    directory. `trust`: the snapshot is no stranger's.

    Raises StateError that says why a disk is refused; everything is as before then.
    """
    placed = Placed(snapshot.manifest.vm)
    try:
        for number, record in enumerate(snapshot.manifest.disks or []):
            disk = snapshot.manifest.vm.mine.disks[number]
            place = run_directory.room("disks") if clone and disk.contained else folder
            one = _Place(placed, snapshot, number, disk, record, clone=clone, trust=trust)
            await in_thread(functools.partial(one.into, place))
            placed.disks.append(await asyncio.to_thread(settled, placed.description.mine.disks[number], record))
    except BaseException:
        placed.undo()
        raise
    return placed


class _Place:
    """One disk's."""

    def __init__(
        self,
        placed: Placed,
        snapshot: Snapshot,
        number: int,
        disk: OwnDisk,
        record: DiskState,
        *,
        clone: bool,
        trust: bool,
    ) -> None:
        self._placed = placed
        self._snapshot = snapshot
        self._number = number
        self._disk = disk
        self._record = record
        self._clone = clone
        self._trust = trust
        self._path = Path(disk.file)
        if record.top.file != disk.file or record.top.format != disk.driver:
            raise self._refused(f"its record says that disk {number} is {record.top.file}")
        named = record.behind if disk.contained else [record.top, *record.behind]
        if not trust and not all(layer.identity for layer in named):
            raise self._refused(
                f"it names {', '.join(layer.file for layer in named)}, and a stranger's could name any file: --trust "
                "says that it is none"
            )
        for layer in record.behind:
            if difference := layer.differs():
                raise self._refused(f"behind the disk {self._path}: {difference}")

    def _refused(self, why: str) -> StateError:
        return StateError(f"the snapshot {self._snapshot.directory} is refused: {why}")

    def into(self, folder: Path | None, stop: Stop) -> None:
        disk, record, path = self._disk, self._record, self._path
        if not disk.contained:
            if self._clone and not disk.read_only:
                raise self._refused(
                    f"it refers to the disk {path}, which clones cannot share: save the VM with snapshot=copy"
                )
            if difference := changed(record):
                raise self._refused(f"{difference}; it only refers to that disk, as it was at the save")
            look(disk)
        elif folder is not None:
            self._copy_into(folder, stop)
        elif not changed(record) and (record.top.identity or self._trust):
            look(disk)  # as it was left
        else:
            self._replace(stop)

    @property
    def _content(self) -> Path:
        return self._snapshot.directory / disk_file(self._number)

    def _copy_into(self, folder: Path, stop: Stop) -> None:
        target = folder / (f"disk{self._number}{self._path.suffix}" if self._clone else self._path.name)
        with os_error(f"cannot put a disk into {folder}"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            copy_file(self._content, target, stop=stop)
        self._placed.made(target)
        self._placed.put(self._number, target.absolute())
        mark(DiskState(layer_of(target, self._disk.driver), []))

    def _replace(self, stop: Stop) -> None:
        """A file that is the very disk gets the content that it had, and keeps the present one until all is well."""
        path, identity = self._path, self._record.top.identity
        elsewhere = "--disks DIR puts the snapshot's disks there, and leaves this one alone"
        try:
            present = look(self._disk).top
        except EnvironmentProblem as error:
            raise self._refused(f"{error}; {elsewhere}") from error
        allowed = bool(os.environ.get(REPLACE_VARIABLE))
        if not allowed and (not identity or present.identity != identity):
            raise self._refused(f"{path} is not the disk that it was taken of; {elsewhere}")
        path = path.resolve()
        before, new = path.with_name(f".{path.name}.before-restore"), path.with_name(f".{path.name}.new")
        with os_error(f"cannot put the snapshot's content into the disk {path}"):
            try:
                before.hardlink_to(path)
            except FileExistsError:
                raise EnvironmentProblem(
                    f"{before} is there: a restore that was killed has left it, with what the disk held before; move "
                    "it away, or back"
                ) from None
            try:
                new.unlink(missing_ok=True)
                copy_file(self._content, new, stop=stop)
                new.chmod(stat.S_IMODE(path.stat().st_mode))
                if identity:
                    mark_as(new, identity)
                new.replace(path)
            except BaseException:
                new.unlink(missing_ok=True)
                before.unlink()
                raise
            self._placed.replaced(path, before)
            sync_directory(path.parent)
