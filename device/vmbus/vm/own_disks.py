"""Disks of one's own, which QEMU serves: what a file is before anything is started with it, and whether it still is.

A guest writes what it likes into its disk, also the header of a qcow2 image that names a file of this machine. So what
an image is says its description, or its name, and never what is in it alone; and QEMU is told each file behind a qcow2
image, as it was found by us.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from struct import Struct
from typing import Annotated, NamedTuple
from uuid import uuid4

import msgspec

from vmbus.errors import EnvironmentProblem, StateError, UsageError, VmbusError, os_error
from vmbus.providers.disk.image import Image
from vmbus.vm.own_guest import Format, OwnDisk

LONGEST_CHAIN = 16
"""Images behind an image."""

_MAGIC = b"QFI\xfb"
_HEADER = Struct(">4sIQI")  # magic, version, where the backing file's name is, its length
_FEATURES = Struct(">Q")  # those that a reader has to know; at 72, from version 3 on
_EXTENSION = Struct(">II")  # type, length
_BACKING_FORMAT = 0xE2792ACA
_DATA_ELSEWHERE = 1 << 2
_HEADER_BYTES = 65536
_LONGEST_NAME = 1023
_FLOCK = Struct("@hhqqi4x")  # struct flock

_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Qcow2(NamedTuple):
    """What the header of a qcow2 image says of other files."""

    backing: str
    """The file behind it, as it is written there; empty: none."""
    backing_format: str
    data_elsewhere: bool


def decode_qcow2(data: bytes, source: str) -> Qcow2:
    """Decodes the beginning of a qcow2 image. Raises StateError that names the `source`."""
    if len(data) < 104 or data[:4] != _MAGIC:
        raise StateError(f"{source} is no qcow2 image")
    _, version, offset, length = _HEADER.unpack_from(data)
    if version not in (2, 3):
        raise StateError(f"{source} is a qcow2 image of version {version}; QEMU has 2 and 3")
    features, at = 0, 72
    if version == 3:
        (features,) = _FEATURES.unpack_from(data, 72)
        at = int.from_bytes(data[100:104], "big")
    if not offset:
        return Qcow2("", "", bool(features & _DATA_ELSEWHERE))
    name = data[offset : offset + length]
    if not 0 < length <= _LONGEST_NAME or len(name) != length or b"\0" in name:
        raise StateError(f"{source} is a qcow2 image whose backing file has no name that could be one")
    found = ""
    while at + _EXTENSION.size <= len(data):
        kind, size = _EXTENSION.unpack_from(data, at)
        if kind == 0:
            break
        at += _EXTENSION.size
        if kind == _BACKING_FORMAT:
            found = data[at : at + min(size, 64)].decode("ascii", "replace")
        at += (size + 7) & ~7
    return Qcow2(os.fsdecode(name), found, bool(features & _DATA_ELSEWHERE))


class Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a disk, as it was looked at. `size` in bytes; `stamp`: its last change, in ns, 0 for a block device;
    `identity`: what it alone has, wherever it is, empty if it has nothing of the kind."""

    file: str
    format: Format
    size: _Count
    stamp: _Count
    identity: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{32})?\Z")]

    def differs(self) -> str:
        """How the file is another one by now, in words; empty: it is the same."""
        try:
            found = layer_of(Path(self.file), self.format)
        except VmbusError as error:
            return str(error)
        if found.identity != self.identity:
            return f"{self.file} is another file by now"
        if found.size != self.size:
            return f"{self.file} has {found.size} bytes now, and had {self.size}"
        return "" if found.stamp == self.stamp else f"{self.file} was written to since then"


class DiskState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A disk: its file, and those behind it, the nearest first, which nobody writes to."""

    top: Layer
    behind: Annotated[list[Layer], msgspec.Meta(max_length=LONGEST_CHAIN)]

    @property
    def known(self) -> bool:
        """Whether each of its files can be told from all others, so that nobody can have us take another one."""
        return all(layer.identity for layer in (self.top, *self.behind))


def look(disk: OwnDisk, *, unused: bool = True) -> DiskState:
    """The disk as it is now. `unused`: nobody else may write to it, or use it if it is to be written to.

    Raises EnvironmentProblem and UsageError that say what cannot be used, and what to do.
    """
    path = Path(disk.file)
    _check_access(path, write=not disk.read_only)
    if not disk.read_only and unused:
        _check_unused(path)
    if disk.contained and path.is_block_device():
        raise UsageError(
            f"{path} is a block device, which no snapshot contains: say that snapshots refer to it, "
            f"--disk {path},snapshot=shared"
        )
    backing = _behind(path, disk.driver, disk.format is msgspec.UNSET)
    behind: list[Layer] = []
    while backing is not None:
        file, kind = backing
        if len(behind) == LONGEST_CHAIN:
            raise UsageError(
                f"there are more than {LONGEST_CHAIN} images behind {path}: flatten it with qemu-img rebase"
            )
        _check_access(file, write=False)
        backing = _behind(file, kind, False)
        behind.append(layer_of(file, kind))
    return DiskState(layer_of(path, disk.driver), behind)


def mark(record: DiskState) -> None:
    """Gives each of its files what tells it from others, where it has nothing of the kind and can have it."""
    for layer in (record.top, *record.behind):
        if not layer.identity:
            with _opened(Path(layer.file)) as image:
                if image.regular and image.identity == "":
                    image.mark(uuid4().hex)


def mark_as(path: Path, identity: str) -> None:
    """Has a file go on as the disk with that identity. Raises EnvironmentProblem."""
    with _opened(path) as image:
        image.mark(identity)


def _behind(path: Path, kind: Format, by_name: bool) -> tuple[Path, Format] | None:
    """The file behind an image that is to be of that kind, and its kind. Raises UsageError if it is of another."""
    with os_error(f"cannot read the disk {path}"), path.open("rb") as file:
        data = file.read(_HEADER_BYTES)
    there = data[:4] == _MAGIC
    if kind == "raw":
        if there and by_name:
            raise UsageError(
                f"{path} has a qcow2 header, and its name does not end in .qcow2: say what it is, --disk "
                f"{path},format=qcow2 or format=raw (a guest can write such a header into a raw disk)"
            )
        return None
    if not there:
        raise UsageError(f"{path} is no qcow2 image: say format=raw if it is a raw one")
    header = decode_qcow2(data, str(path))
    if header.data_elsewhere:
        raise UsageError(f"{path} keeps its data in another file: make it one, with qemu-img convert -O qcow2")
    if not header.backing:
        return None
    if header.backing_format not in ("raw", "qcow2"):
        raise UsageError(
            f"{path} does not say what {header.backing!r} behind it is, or nothing that is known here "
            f"({header.backing_format or 'no format'}): qemu-img rebase -u -F FORMAT -b FILE {path}"
        )
    found = Path(os.path.normpath(path.resolve().parent / header.backing.removeprefix("file:")))
    return found, "raw" if header.backing_format == "raw" else "qcow2"


def _check_access(path: Path, *, write: bool) -> None:
    try:
        kind = path.stat().st_mode
    except OSError as error:
        raise EnvironmentProblem(f"cannot use the disk {path}: {error.strerror}") from error
    if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
        raise EnvironmentProblem(f"{path} is neither a file nor a block device: no disk")
    if not os.access(path, os.R_OK | (os.W_OK if write else 0)):
        hint = "; --disk FILE,read_only takes one that is only read" if write and os.access(path, os.R_OK) else ""
        raise EnvironmentProblem(f"cannot use the disk {path}: {os.strerror(errno.EACCES)}{hint}")


def _check_unused(path: Path) -> None:
    """QEMU would say the same, when everything has been started. Raises EnvironmentProblem."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    finally:
        os.close(fd)
    if _FLOCK.unpack(found)[0] != fcntl.F_UNLCK:
        raise EnvironmentProblem(f"the disk {path} is in use: another virtual machine, or a tool, has it locked")


@contextmanager
def _opened(path: Path) -> Iterator[Image]:
    with os_error(f"cannot use the disk {path}"):
        image = Image(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        try:
            yield image
        finally:
            image.close()


def layer_of(path: Path, kind: Format) -> Layer:
    """A file as it is now. Raises EnvironmentProblem."""
    with _opened(path) as image:
        return Layer(str(path), kind, image.size, max(0, image.stamp), image.identity or "")


def settled(disk: OwnDisk, known: DiskState) -> DiskState:
    """The disk as it is now, on stable storage, with the files behind it that are known. Raises EnvironmentProblem."""
    path = Path(disk.file)
    with _opened(path) as image:
        image.settle()
    return DiskState(layer_of(path, disk.driver), known.behind)


def changed(record: DiskState) -> str:
    """What of the disk is not as it was, in words; empty: all is."""
    return next((found for layer in (record.top, *record.behind) if (found := layer.differs())), "")


def check_disks(disks: Sequence[OwnDisk]) -> None:
    """Raises what `look` raises of any of them."""
    for disk in disks:
        look(disk)
