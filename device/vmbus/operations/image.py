"""QEMU's part of checkpoints: snapshots of memory, CPUs and devices in a qcow2 image that no guest device uses.

Disks of one's own go back with them: each has a snapshot of its own content inside, made and loaded by the same jobs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import Any

from vmbus.errors import VmbusError, os_error
from vmbus.operations.own_disks import disks_with_checkpoints
from vmbus.operations.vm import Vm
from vmbus.qemu.jobs import run_job
from vmbus.snapshot.checkpoints import ImageSnapshot, Store
from vmbus.util.interruptible import uninterrupted

_IMAGE_BYTES = 1 << 20  # of the (empty) disk in the image; what is kept lies beside it
_STATE_OFFSET = 512 << 20  # where QEMU puts a VM's state behind a disk of that size (one entry of the first table)
_BESIDE_MEMORY = 256 << 20  # bytes that it may have besides guest memory, by far
_IMAGE_TIMEOUT = 60.0
_OWN = "own-"  # in the names of checkpoints that end with their VM
# In front of a tag in the image: QEMU takes a name of digits for the number of a snapshot, and would load another one.
_PREFIX = "vmbus-"
THROWN_AWAY = ".thrown-away"
"""Name in the image, and of no checkpoint's, of a snapshot that is only there to have QEMU forget an error."""


class Image:
    """The image of a `Store`, as QEMU has it. Whatever it does raises what the monitor and its jobs raise."""

    def __init__(self, vm: Vm, store: Store) -> None:
        """Nothing is opened yet: see `open`."""
        self.store = store
        self._monitor = vm.monitor
        self._memory = vm.description.memory_mib << 20
        self._node = f"checkpoints-{len(vm.images)}"
        self._opened = False
        # Of these, who come and go with the jobs: a name there is to be nobody else's, of whatever VM and directory.
        self._disks = disks_with_checkpoints(vm)
        self._token = f"{_OWN if store.own else ''}{secrets.token_hex(4)}"
        self._job_timeout = 60.0 + vm.description.memory_mib / 20

    async def open(self) -> None:
        """Gives the image to QEMU, made if it is not there."""
        if self._opened:
            return
        self.store.prepare()
        file = f"{self._node}-file"
        image = self.store.image
        fresh = not image.exists()
        if fresh:
            with os_error(f"cannot make {image}"):
                os.close(os.open(image, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        added = []
        try:
            node: dict[str, object] = {"driver": "file", "node-name": file, "filename": str(image.absolute())}
            await self._monitor.execute("blockdev-add", node | {"discard": "unmap"})
            added.append(file)
            if fresh:
                options = {"driver": "qcow2", "file": file, "size": _IMAGE_BYTES}
                await run_job(self._monitor, "blockdev-create", {"options": options}, _IMAGE_TIMEOUT, f"making {image}")
            # What a deleted checkpoint had is given back to the disk.
            options = {"driver": "qcow2", "node-name": self._node, "file": file, "discard": "unmap"}
            await self._monitor.execute("blockdev-add", options)
        except BaseException:
            for name in added:
                await uninterrupted(self._remove_node(name))
            if fresh:
                image.unlink(missing_ok=True)
            raise
        self._opened = True
        if self.store.own:
            await self._clean_disks()

    async def _clean_disks(self) -> None:
        """Removes what VMs that have ended left in the disks of theirs: their checkpoints ended with them."""
        for disk in self._disks:
            for name in [str(one["name"]) for one in await self._listed(disk)]:
                if name.startswith(_PREFIX) and f"@{_OWN}" in name and not name.endswith(f"@{self._token}"):
                    what = f"removing a checkpoint of a VM that has ended, {name!r}, from {disk}"
                    arguments = {"tag": name, "devices": [disk]}
                    await run_job(self._monitor, "snapshot-delete", arguments, self._job_timeout, what)

    def _name(self, tag: str) -> str:
        if not self._disks or tag == THROWN_AWAY:
            return _PREFIX + tag
        return self.store.record(tag).image.name if tag in self.store.tags() else f"{_PREFIX}{tag}@{self._token}"

    async def close(self) -> None:
        """Takes the image from QEMU, as long as that is there."""
        if self._opened:
            self._opened = False
            for node in (self._node, f"{self._node}-file"):
                await uninterrupted(self._remove_node(node))

    async def _remove_node(self, node: str) -> None:
        with contextlib.suppress(VmbusError):  # QEMU is gone, and the node with it
            await self._monitor.execute("blockdev-del", {"node-name": node})

    async def find(self, tag: str) -> ImageSnapshot | None:
        """What the image has under a tag."""
        return await self._found(tag, self._node)

    async def find_disks(self, tag: str) -> list[ImageSnapshot | None]:
        """What each of the disks has under a tag."""
        return [await self._found(tag, disk) for disk in self._disks]

    async def _found(self, tag: str, node: str) -> ImageSnapshot | None:
        name = self._name(tag)
        for one in await self._listed(node):
            if one["name"] == name:
                return ImageSnapshot(
                    name=one["name"],
                    vm_state_bytes=int(one["vm-state-size"]),
                    seconds=int(one["date-sec"]),
                    nanoseconds=int(one["date-nsec"]),
                )
        return None

    async def _listed(self, node: str) -> list[dict[str, Any]]:
        nodes = await self._monitor.execute("query-named-block-nodes", {"flat": True})
        found = next(one for one in nodes if one["node-name"] == node)
        return list(found["image"].get("snapshots", []))

    async def save(self, tag: str) -> None:
        await self._job("snapshot-save", tag, f"taking checkpoint {tag!r}")

    async def load(self, tag: str) -> None:
        """Everything becomes as it was then."""
        await self._job("snapshot-load", tag, f"going back to checkpoint {tag!r}")

    async def delete(self, tag: str, what: str = "") -> None:
        """Does nothing if there is none."""
        if await self.find(tag) is not None:
            await self._job("snapshot-delete", tag, what or f"deleting checkpoint {tag!r}")

    async def reclaim(self) -> None:
        """Removes what takes and deletions that never came to their end have left."""
        tags = set(self.store.tags())
        for name in [str(one["name"]) for one in await self._listed(self._node)]:
            tag = name.removeprefix(_PREFIX).partition("@")[0]
            if name.startswith(_PREFIX) and tag not in tags:
                await self._job("snapshot-delete", tag, f"removing what was left of checkpoint {tag!r}", name)
        self.store.reclaim()

    async def give_back(self) -> None:
        """Gives back to the disk the VM's state in the image that belongs to no snapshot: a take that failed wrote it,
        or a revert came from it.

        QEMU keeps that for the next one, behind the end of the image's (empty) disk. As a part of the disk it can be
        cut off: the disk is made so large that it covers it, and then as small as it was.
        """
        for size in (_STATE_OFFSET + self._memory + _BESIDE_MEMORY, _IMAGE_BYTES):
            await self._monitor.execute("block_resize", {"node-name": self._node, "size": size})

    async def forget_error(self) -> None:
        """Has QEMU forget the error of its last migration, with the vCPUs stopped.

        QEMU keeps the error of a migration that failed or was called off until it begins another one, and any load
        meanwhile fails for it, at its end. So where there is such an error, a snapshot is saved, and thrown away.
        """
        removing = "removing a snapshot that nobody needs"
        await self.delete(THROWN_AWAY, removing)  # of a revert that was killed
        if "error-desc" in await self._monitor.execute("query-migrate"):
            await self._job("snapshot-save", THROWN_AWAY, "having QEMU forget that a migration failed")
            await self._job("snapshot-delete", THROWN_AWAY, removing)

    async def _job(self, command: str, tag: str, what: str, name: str = "") -> None:
        disks = [] if tag == THROWN_AWAY else self._disks
        arguments: dict[str, object] = {"tag": name or self._name(tag), "devices": [self._node, *disks]}
        if command != "snapshot-delete":
            arguments["vmstate"] = self._node
        await run_job(self._monitor, command, arguments, self._job_timeout, what)


def image_in(vm: Vm, directory: Path | None) -> Image:
    """The image of the VM's checkpoints in a directory; None for those that end with the VM."""
    path = vm.room("checkpoints") if directory is None else directory.absolute()
    if path not in vm.images:
        vm.images[path] = Image(vm, Store(path, own=directory is None))
    return vm.images[path]
