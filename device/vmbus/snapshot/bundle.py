"""A snapshot's directory: written whole or not at all, and verified to the last byte before anything uses it.

Writing: a directory with a temporary name beside the target, every file flushed to disk, the manifest last, the
directory flushed, then one rename. Whatever goes wrong before it leaves nothing but an error. An existing target is
never touched.

Reading: `open_snapshot` looks at every file before it returns. File names come from this program and not from the
manifest, so a snapshot cannot point outside its directory; links and other special files are refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import fcntl
import functools
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path

from vmbus.errors import EnvironmentProblem, StateError, UsageError, os_error
from vmbus.snapshot.manifest import (
    INITRAMFS,
    KERNEL,
    MANIFEST,
    RAM,
    VENDOR_DEVICE,
    FileRecord,
    Manifest,
    contents_of,
    decode_manifest,
    encode_manifest,
    is_content,
    state_name,
)
from vmbus.util.copying import copy_file, sync_directory
from vmbus.util.interruptible import NEVER, Stop, in_thread, sha256
from vmbus.vm.command_line import Programs, runs_under, serves_machine
from vmbus.vm.description import VmDescription

_PARTIAL = re.compile(r"\..{1,100}\.partial-[0-9a-f]{8}")
_NEW = ".vmbus-new-"
_UNLOCKED_AGE = 60.0  # seconds after which a new directory that nobody holds locked is taken for abandoned
_MANIFEST_LIMIT = 4 << 20  # bytes; a real one has a few thousand


def utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class SnapshotWriter:
    """A snapshot that is being made. Create with `begin`; then either `commit` or `abort`."""

    def __init__(self, target: Path, directory: Path, lock: int) -> None:
        self.target = target
        self.directory = directory
        self._lock: int | None = lock  # tells others that the directory is in use; the kernel drops it if we die
        self._records: dict[str, FileRecord] = {}

    @classmethod
    def begin(cls, target: Path) -> SnapshotWriter:
        """Makes the temporary directory beside `target`.

        Raises `UsageError` if the target exists, `EnvironmentProblem` if its parent is missing or cannot be written.
        """
        target = Path(os.path.abspath(target))  # noqa: PTH100 - links in the parent stay as the user wrote them
        if os.path.lexists(target):
            raise UsageError(f"{target} exists already; a snapshot never overwrites anything: choose another name")
        _remove_abandoned(target.parent)
        token = secrets.token_hex(4)
        directory = target.with_name(f".{target.name[:100]}.partial-{token}")
        fresh = target.with_name(f"{_NEW}{token}")
        try:
            fresh.mkdir(mode=0o700)
            lock = os.open(fresh, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fresh.rename(directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                fresh.rmdir()
            raise EnvironmentProblem(f"cannot make a directory in {target.parent}: {error.strerror}") from error
        return cls(target, directory, lock)

    @property
    def ram(self) -> Path:
        """Where QEMU is to write its stream."""
        return self.directory / RAM

    def state(self, index: int) -> Path:
        """Where the device server of that number is to write its state."""
        return self.directory / state_name(index)

    async def add_boot_files(self, kernel: Path | None, initramfs: Path | None) -> None:
        """Puts what QEMU booted into the snapshot, and seals it; None: there was nothing of the kind."""
        for source, name in ((kernel, KERNEL), (initramfs, INITRAMFS)):
            if source is None:
                continue
            await in_thread(functools.partial(_copy, source, self.directory / name))
            await self.seal(name)

    async def seal(self, name: str) -> FileRecord:
        """Flushes a file that is complete to disk and notes its size and digest."""
        if not is_content(name):
            raise UsageError(f"{name!r} is not a file of a snapshot")
        record = await in_thread(functools.partial(_seal, self.directory / name))
        self._records[name] = record
        return record

    @property
    def records(self) -> dict[str, FileRecord]:
        return dict(self._records)

    async def commit(self, manifest: Manifest) -> None:
        """Writes the manifest and makes the snapshot appear under its name.

        Raises `UsageError` if files are missing from it or something else took the name meanwhile, and
        `EnvironmentProblem` if the disk refuses. The caller then aborts.
        """
        missing = set(contents_of(manifest.vm, foreign=manifest.machine.foreign)) - set(self._records)
        if missing or manifest.files != self._records:
            raise UsageError(f"the snapshot's manifest does not list what was sealed (missing: {sorted(missing)})")
        await asyncio.to_thread(self._commit, encode_manifest(manifest))
        self._unlock()

    def _commit(self, manifest: bytes) -> None:
        with os_error(f"cannot finish the snapshot {self.target}"):
            descriptor = os.open(self.directory / MANIFEST, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(manifest)
                file.flush()
                os.fsync(file.fileno())
            sync_directory(self.directory)
            if os.path.lexists(self.target):  # rename() would silently take the place of an empty directory
                raise FileExistsError(errno.EEXIST, "exists already")
            self.directory.rename(self.target)
            sync_directory(self.target.parent)

    def abort(self) -> None:
        """Removes everything. Does nothing after a commit."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class Snapshot:
    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self.ram = directory / RAM
        self.states = [directory / state_name(index) for index in range(len(manifest.vm.slots))]
        """Of all devices, the first one's first."""
        self.kernel = directory / KERNEL if KERNEL in manifest.files else None
        self.initramfs = directory / INITRAMFS if INITRAMFS in manifest.files else None
        self.configs = manifest.machine.configs


async def open_snapshot(
    directory: Path,
    programs: Programs | None = None,
    *,
    expected: VmDescription | None = None,
    progress: Callable[[str], None] | None = None,
) -> Snapshot:
    """Verifies a snapshot completely and returns it; nothing is started or changed.

    With `programs`, it must also fit this machine's QEMU; with `expected`, it must be of that VM. Raises `StateError`
    that names the snapshot and the reason: a missing, extra, special or changed file, a wrong version, another device,
    another machine.
    """
    manifest = await asyncio.to_thread(_read_manifest, directory)
    _check_device(directory, manifest, expected)
    if programs is not None:
        _check_programs(directory, manifest, programs)
    needed = contents_of(manifest.vm, foreign=manifest.machine.foreign)
    names = (*needed, *sorted(set(manifest.files) - set(needed)))
    for name in names:  # what costs nothing first: a digest of terabytes takes hours
        with _open_whole(directory / name, manifest.files[name]):
            pass
    for name in names:
        if progress is not None:
            progress(name)
        await in_thread(functools.partial(_verify, directory / name, manifest.files[name]))
    return Snapshot(directory, manifest)


def read_state(directory: Path, index: int = 0) -> tuple[Manifest, bytes]:
    """A snapshot's manifest and the bytes of a device's state, for looking at: guest memory is not read.

    Raises `StateError` as `open_snapshot` does, for what these two can have wrong.
    """
    manifest = _read_manifest(directory)
    _check_device(directory, manifest, None)
    path, record = directory / state_name(index), manifest.files[state_name(index)]
    _verify(path, record)
    with _open_regular(path) as file:
        data = file.read(record.size + 1)
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise StateError(f"{path} changed while it was read")
    return manifest, data


def _read_manifest(directory: Path) -> Manifest:
    try:
        present = set(os.listdir(directory))  # noqa: PTH208 - names only
    except FileNotFoundError:
        raise StateError(f"there is no snapshot {directory}") from None
    except OSError as error:
        raise StateError(f"cannot read the snapshot {directory}: {error.strerror}") from error
    if MANIFEST not in present:
        raise StateError(f"{directory} is not a snapshot: it has no {MANIFEST}")
    # A manifest of another version may well go with other files: its version is the better reason.
    with _open_regular(directory / MANIFEST) as file:
        data = file.read(_MANIFEST_LIMIT + 1)
    if len(data) > _MANIFEST_LIMIT:
        raise StateError(f"{directory / MANIFEST} has more than {_MANIFEST_LIMIT} bytes: not a snapshot's manifest")
    manifest = decode_manifest(data, str(directory / MANIFEST))
    allowed = {MANIFEST, *manifest.files}
    if missing := sorted(allowed - present):
        raise StateError(f"the snapshot {directory} lacks the file {missing[0]}")
    if extra := sorted(present - allowed):
        raise StateError(f"the snapshot {directory} contains {extra[0]!r}, which does not belong to it")
    return manifest


def _check_device(directory: Path, manifest: Manifest, expected: VmDescription | None) -> None:
    for config in manifest.machine.configs:
        if config[:4] != VENDOR_DEVICE:
            vendor, device = int.from_bytes(config[:2], "little"), int.from_bytes(config[2:4], "little")
            raise StateError(
                f"the snapshot {directory} is of another device: PCI {vendor:04x}:{device:04x}, not 5642:4d56"
            )
    if expected is None or expected == manifest.vm:
        return
    saved = manifest.vm
    for what, one, other in (
        ("device", saved.device.name, expected.device.name),
        (
            "providers",
            [(p.kind, p.name, p.instance) for p in saved.device.providers],
            [(p.kind, p.name, p.instance) for p in expected.device.providers],
        ),
        (
            "provider options",
            [p.options for p in saved.device.providers],
            [p.options for p in expected.device.providers],
        ),
        ("memory", saved.memory_mib, expected.memory_mib),
        ("CPUs", saved.cpus, expected.cpus),
        ("PCI slot", saved.slot, expected.slot),
        ("further devices", saved.further, expected.further),
        ("name", saved.name, expected.name),
    ):
        if one != other:
            raise StateError(f"the snapshot {directory} is of another VM: its {what} {one!r} should be {other!r}")
    raise StateError(f"the snapshot {directory} is of another VM: the guest's settings differ")


def _check_programs(directory: Path, manifest: Manifest, programs: Programs) -> None:
    if manifest.machine.foreign != programs.foreign:
        raise StateError(
            f"the snapshot {directory} is of a VM whose QEMU somebody else started: start it in the same way, with -S "
            "-incoming defer, and put the snapshot into it with scripts/attach --restore"
            if manifest.machine.foreign
            else f"the snapshot {directory} is of a VM of ours, and no other QEMU takes it: use scripts/restore"
        )
    if programs.foreign:  # it is there, and is compared with what is recorded
        return
    if not serves_machine(programs.qemu_version, manifest.machine.type):
        raise StateError(
            f"the snapshot {directory} is of machine {manifest.machine.type} (QEMU {manifest.versions.qemu}), which "
            f"the QEMU at hand ({programs.qemu_version}) does not have: use the one it was saved with, or a later one "
            "(VMBUS_QEMU)"
        )
    if not runs_under(manifest.machine.accelerator, programs):
        raise StateError(
            f"the snapshot {directory} was saved under {manifest.machine.accelerator} and cannot run under "
            f"{programs.accelerator}, which is what is used here: scripts/setup says why, and VMBUS_ACCELERATOR chooses"
        )


def _open_regular(path: Path) -> BufferedReader:
    """Opens a file that must be a plain file, without following a link and without hanging on a FIFO."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise StateError(f"cannot use {path}: {reason}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StateError(f"cannot use {path}: it is not a plain file")
    return os.fdopen(descriptor, "rb")


def _open_whole(path: Path, record: FileRecord) -> BufferedReader:
    """Opens a file that has the recorded size."""
    file = _open_regular(path)
    size = os.fstat(file.fileno()).st_size
    if size != record.size:
        file.close()
        raise StateError(f"{path} has {size} bytes; its snapshot was made with {record.size}")
    return file


def _verify(path: Path, record: FileRecord, stop: Stop = NEVER) -> None:
    with _open_whole(path, record) as file:
        if sha256(file, stop) != record.sha256:
            raise StateError(f"{path} was changed after the snapshot was made: its digest does not match")


def _seal(path: Path, stop: Stop) -> FileRecord:
    with os_error(f"cannot flush {path} to disk"), path.open("rb") as file:
        os.fsync(file.fileno())  # flushes what the other process wrote, too
        digest = sha256(file, stop)
        return FileRecord(os.fstat(file.fileno()).st_size, digest)


def _copy(source: Path, target: Path, stop: Stop) -> None:
    """A copy, which shares blocks where the file system can do that, and never the file: damage stays where it is."""
    with os_error(f"cannot put {source} into the snapshot"):
        copy_file(source, target, stop=stop)


def _remove_abandoned(parent: Path) -> None:
    """Removes what processes that died in the middle of a save left behind, of whatever snapshot.

    A directory is locked before it has such a name, so one that is not locked is abandoned.
    """
    with contextlib.suppress(OSError):
        for path in parent.iterdir():
            if _PARTIAL.fullmatch(path.name) is None and not _is_old_new(path):
                continue
            with contextlib.suppress(OSError):
                lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    inside = {entry.name for entry in path.iterdir()}
                    if all(name == MANIFEST or name[0] == "." or is_content(name) for name in inside):  # else: not ours
                        shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(lock)


def _is_old_new(path: Path) -> bool:
    """Whether somebody made a directory and died before it was locked."""
    return path.name.startswith(_NEW) and time.time() - path.lstat().st_mtime > _UNLOCKED_AGE
