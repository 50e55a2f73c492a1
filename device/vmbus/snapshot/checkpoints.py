"""A directory of checkpoints: moments of one VM to which it can be taken back while its processes live on.

    vmstate.qcow2   QEMU's part of all of them: an image whose internal snapshots hold the VM's memory and devices
    TAG.state       the device server's part of one; of a VM with several devices also TAG.state-2 and so on
    TAG.files/      copies of its providers' files, if they have any (see `vmbus.server.files`)
    TAG.json        the record of one, written last: without it there is no such checkpoint

A record names the digests of its state and of its files, and the very snapshot in the image that goes with it. So the
parts of different moments are never put together.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import msgspec

from vmbus.device import saved
from vmbus.errors import EnvironmentProblem, StateError, UsageError, os_error
from vmbus.snapshot.manifest import FileRecord, Machine, Packets, check_functions
from vmbus.util.explaining import NAME_RULE, Name, explain
from vmbus.util.interruptible import NEVER, Stop, sha256
from vmbus.vm.description import MOST_DEVICES, VmDescription

IMAGE = "vmstate.qcow2"
VERSION = 1
"""Version of the record's layout. A reader refuses every other."""

RESERVE = 4 << 20
"""Bytes that are set aside while a checkpoint is taken: of the image's tables for a terabyte, less would do."""

_STATES = (".state", *(f".state-{number}" for number in range(2, MOST_DEVICES + 1)))
_TAG = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_RECORD_LIMIT = 1 << 20  # bytes
_Count = Annotated[int, msgspec.Meta(ge=0)]


class ImageSnapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A snapshot in the image, told apart from any other of the same name."""

    name: str
    vm_state_bytes: _Count
    seconds: _Count
    """When QEMU made it: seconds since 1970, and nanoseconds."""
    nanoseconds: _Count


class Checkpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    version: int = VERSION
    tag: Name
    number: _Count
    """In the order of making."""
    created: str
    """UTC, ISO 8601."""
    vm: VmDescription
    machine: Machine
    qemu: str
    """QEMU's version."""
    packets: Packets
    incoming_held: _Count
    state: FileRecord
    image: ImageSnapshot
    files: dict[str, FileRecord] | msgspec.UnsetType = msgspec.UNSET
    """Providers' files; absent if there are none."""
    paused: Literal[True] | msgspec.UnsetType = msgspec.UNSET
    """The vCPUs stood, and stand after a revert; absent if they ran."""
    disks: list[ImageSnapshot] | msgspec.UnsetType = msgspec.UNSET
    """What disks of one's own have inside for it; absent if there are none."""
    further: Annotated[list[FileRecord], msgspec.Meta(max_length=MOST_DEVICES - 1)] | msgspec.UnsetType = msgspec.UNSET
    """The states of further devices; absent if there are none."""

    @property
    def states(self) -> list[FileRecord]:
        """The states of all devices, the first one's first."""
        return [self.state, *([] if self.further is msgspec.UNSET else self.further)]


class _File(msgspec.Struct, forbid_unknown_fields=True):
    checkpoint: Checkpoint
    sha256: str


def check_tag(tag: str) -> None:
    """Raises `UsageError` if a checkpoint cannot be called that."""
    if _TAG.fullmatch(tag) is None:
        raise UsageError(f"{tag!r} is not a usable name of a checkpoint; allowed: {NAME_RULE}")


class Store:
    """The directory. `own`: it belongs to the VM and ends with it."""

    def __init__(self, directory: Path, *, own: bool) -> None:
        self.directory = directory
        self.own = own

    @property
    def image(self) -> Path:
        return self.directory / IMAGE

    def state(self, tag: str, index: int = 0) -> Path:
        """The part of the device server of that number."""
        return self.directory / f"{tag}{_STATES[index]}"

    def files(self, tag: str) -> Path:
        return self.directory / f"{tag}.files"

    def _record(self, tag: str) -> Path:
        return self.directory / f"{tag}.json"

    def prepare(self) -> None:
        """Makes the directory if need be. Raises `UsageError` if there is something else in it."""
        with os_error(f"cannot keep checkpoints in {self.directory}"):
            self.directory.mkdir(mode=0o700, exist_ok=True)
            inside = {path.name for path in self.directory.iterdir()}
        if inside and IMAGE not in inside:
            raise UsageError(
                f"{self.directory} has other things in it, and no checkpoints (no {IMAGE}): choose an empty directory"
            )

    def tags(self) -> list[str]:
        """The names of all checkpoints, in no order."""
        with os_error(f"cannot read {self.directory}"):
            return [path.stem for path in self.directory.glob("*.json") if _TAG.fullmatch(path.stem)]

    def list(self) -> list[Checkpoint]:
        """All checkpoints, oldest first. Raises `StateError` for a record that is damaged."""
        return sorted((self.record(tag) for tag in self.tags()), key=lambda one: one.number)

    def record(self, tag: str) -> Checkpoint:
        """Raises `UsageError` if there is no such checkpoint, `StateError` if its record is damaged."""
        check_tag(tag)
        path = self._record(tag)
        try:
            with _open_regular(path) as file:
                data = file.read(_RECORD_LIMIT + 1)
        except FileNotFoundError:
            known = ", ".join(sorted(self.tags())) or "none"
            raise UsageError(f"there is no checkpoint {tag!r} in {self.directory}; there: {known}") from None
        except OSError as error:
            raise EnvironmentProblem(f"cannot read {path}: {error.strerror}") from error
        try:
            found = msgspec.json.decode(data, type=_File)
        except msgspec.ValidationError as error:
            raise StateError(f"{path}: {explain(error)}") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise StateError(f"{path} is not the record of a checkpoint: {error}") from error
        one = found.checkpoint
        if _encode(one) != data:
            raise StateError(f"{path} was changed after it was written: its digest does not match")
        if one.version != VERSION:
            raise StateError(f"{path}: checkpoint version {one.version}; this program reads version {VERSION} only")
        if one.tag != tag:
            raise StateError(f"{path} is the record of the checkpoint {one.tag!r}, not of {tag!r}")
        check_functions(one.machine, one.vm, str(path))
        if len(one.states) != len(one.vm.slots):
            raise StateError(f"{path}: {len(one.states)} states for {len(one.vm.slots)} devices")
        return one

    def verify_states(self, one: Checkpoint) -> Sequence[bytes]:
        """The bytes of all devices' states. Raises `StateError` if they are not those of the record."""
        return [self.verify_state(one, index) for index in range(len(one.states))]

    def verify_state(self, one: Checkpoint, index: int = 0) -> bytes:
        """The same of one device."""
        path, record = self.state(one.tag, index), one.states[index]
        with os_error(f"cannot read {path}, the device's part of the checkpoint", StateError):
            data = saved.read_file(path)
        if len(data) != record.size or hashlib.sha256(data).hexdigest() != record.sha256:
            raise StateError(
                f"{path} is not the device's state of checkpoint {one.tag!r}: its digest is not the recorded one"
            )
        return data

    def seal_files(self, tag: str, names: Iterable[str], stop: Stop = NEVER) -> dict[str, FileRecord]:
        """The records of the files that were copied for a checkpoint. Raises `EnvironmentProblem`."""
        with os_error(f"cannot read back the files of checkpoint {tag!r}"):
            found = {name: _file_record(self.files(tag) / name, stop) for name in names}
            if found:
                _sync(self.files(tag))
        return found

    def verify_files(self, one: Checkpoint, stop: Stop = NEVER) -> Path | None:
        """The directory with the providers' files, None without any. Raises `StateError` if they are others."""
        if not one.files:
            return None
        directory = self.files(one.tag)
        for name, record in one.files.items():
            with os_error(f"cannot read {directory / name}, which belongs to the checkpoint", StateError):
                size = (directory / name).stat().st_size
                found = _file_record(directory / name, stop) if size == record.size else None
            if found != record:
                raise StateError(
                    f"{directory / name} is not the file of checkpoint {one.tag!r}: its digest is not the recorded one"
                )
        if strange := {path.name for path in directory.iterdir()} - set(one.files):
            raise StateError(f"{directory} has files that do not belong to the checkpoint: {sorted(strange)}")
        return directory

    def commit(self, one: Checkpoint) -> None:
        """Writes the record, after which the checkpoint is there. Raises `EnvironmentProblem`."""
        path = self._record(one.tag)
        temporary = path.with_name(f".{one.tag}.json")
        try:
            if not self.own:  # else nothing of it survives this host's boot anyway
                _sync(self.image)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(_encode(one))
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
            _sync(self.directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise EnvironmentProblem(f"cannot write {path}: {error.strerror}") from error

    def keep_reserve(self) -> None:
        """Sets space aside that a take which meets a full disk needs to give its own back. Raises
        `EnvironmentProblem` if there is none."""
        try:
            descriptor = os.open(self._reserve, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, RESERVE)
            finally:
                os.close(descriptor)
        except OSError as error:
            self.give_up_reserve()
            raise EnvironmentProblem(f"no checkpoint can be kept in {self.directory}: {error.strerror}") from error

    def give_up_reserve(self) -> None:
        with contextlib.suppress(OSError):
            self._reserve.unlink(missing_ok=True)

    @property
    def _reserve(self) -> Path:
        return self.directory / ".reserve"

    def reclaim(self) -> None:
        """Removes the parts of checkpoints that have no record: nobody finished them."""
        tags = set(self.tags())
        with contextlib.suppress(OSError):
            for path in self.directory.iterdir():
                if path.suffix not in (*_STATES, ".files") or _TAG.fullmatch(path.stem) is None or path.stem in tags:
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def remove(self, tag: str) -> None:
        """Forgets a checkpoint. Its snapshot in the image is the caller's to delete."""
        for path in (self._record(tag), *(self.state(tag, index) for index in range(MOST_DEVICES))):
            path.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.files(tag))


def _open_regular(path: Path) -> BinaryIO:
    """Opens a plain file, without waiting for the other end of a FIFO. Raises OSError."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a plain file")
    return file


def _file_record(path: Path, stop: Stop) -> FileRecord:
    with _open_regular(path) as file:
        digest = sha256(file, stop)
        return FileRecord(file.tell(), digest)


def _encode(one: Checkpoint) -> bytes:
    digest = hashlib.sha256(msgspec.json.encode(one)).hexdigest()
    return msgspec.json.format(msgspec.json.encode(_File(one, digest)), indent=2) + b"\n"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
