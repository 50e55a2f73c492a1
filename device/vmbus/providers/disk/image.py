"""The image of a disk: finding it, making it, and being the only one who uses it.

Descriptions, and with them snapshots, which may come from anybody, name an image in the *disk directory*, never a path:
the directory is the owner's choice (the environment variable VMBUS_DISKS). A block device, or an image somewhere else,
is reached by a symbolic link that the owner puts there.

Whoever uses an image holds a lock over all of it: an exclusive one, or for a read-only disk a shared one. It belongs to
the open file, so it ends with the process at the latest, and other programs that lock images (QEMU's among them) see
it too.
"""

import errno
import fcntl
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from struct import Struct

from vmbus.errors import EnvironmentProblem, os_error
from vmbus.providers.disk.backend import FileBackend, make_durable, size_of
from vmbus.util.copying import copy_content, copy_data, sync_directory

DIRECTORY_VARIABLE = "VMBUS_DISKS"
CLONE_VARIABLE = "VMBUS_CLONE_DISKS"
REPLACE_VARIABLE = "VMBUS_REPLACE_DISKS"
_IDENTITY = "user.vmbus.disk"  # an extended attribute: 32 hexadecimal digits that an image keeps for life
IDENTITY = re.compile(r"[0-9a-f]{32}")
_FLOCK = Struct("@hhqqi4x")  # struct flock: type, whence, start, length (0: to the end), pid (0 for these locks)
_TRIES = 20
MEBIBYTE = 1 << 20


def disk_directory() -> Path:
    named = os.environ.get(DIRECTORY_VARIABLE)
    if named:
        return Path(named)
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "vmbus-device" / "disks"


def clone_directory() -> Path | None:
    """Where a clone has its own images of those disks whose content came with the snapshot; None: no clone."""
    named = os.environ.get(CLONE_VARIABLE)
    return Path(named) if named else None


def image_path(name: str, directory: Path | None = None) -> Path:
    return (directory or disk_directory()) / name


class Image:
    """An image that is open and locked. `close` gives both up.

    Attributes: `path`, `size` (bytes), `regular` (a file, not a block device), `backend`, which owns the descriptor;
    `fresh`: it was empty, and so nobody's.
    """

    def __init__(self, path: Path, fd: int, *, fresh: bool = False) -> None:
        self.path = path
        self.fresh = fresh
        self.size = size_of(fd)
        self.regular = stat.S_ISREG(os.fstat(fd).st_mode)
        self.fd = fd
        self.backend = FileBackend(fd)

    @property
    def stamp(self) -> int:
        """Changes with every write to a file: the time of the last one, in ns. 0 for a block device."""
        return os.fstat(self.fd).st_mtime_ns if self.regular else 0

    def settle(self) -> int:
        """The stamp, which it then keeps, also over a crash of the host. Raises OSError."""
        if self.regular:
            make_durable(self.fd, os.fsync)  # a flush does not bring the time of the last change to stable storage
        return self.stamp

    @property
    def identity(self) -> str | None:
        """What tells it from all others, wherever it is; empty if it has none, None where none can be kept: on a block
        device, and on some file systems."""
        try:
            found = os.getxattr(self.fd, _IDENTITY)
        except OSError as error:
            return "" if error.errno == errno.ENODATA else None
        return found.decode("ascii", "replace") if IDENTITY.fullmatch(found.decode("ascii", "replace")) else ""

    def mark(self, identity: str) -> None:
        with suppress(OSError):
            os.setxattr(self.fd, _IDENTITY, identity.encode())

    @property
    def still_there(self) -> bool:
        """Whether its path still names the file that is open. A block device is whatever has its name."""
        return not self.regular or _still_there(self.fd, self.path)

    @property
    def opened_path(self) -> Path:
        """Where this process finds the very file that is open, also when its name is another one's or nobody's."""
        return Path(f"/proc/self/fd/{self.fd}")

    def lock(self, *, read_only: bool) -> None:
        """Take the lock again, after `unlock`, and look how long it is now. Raises EnvironmentProblem."""
        with os_error(f"cannot lock the disk image {self.path}"):
            _lock(self.fd, self.path, read_only)
        self.size = size_of(self.fd)

    def unlock(self) -> None:
        """Give the lock up, and keep the file open."""
        fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))

    def grow(self, size: int | None) -> int:
        """Make a file `size` bytes long, for good, if it is shorter; returns how long it is. Raises OSError."""
        with self.backend.open() as fd:
            if size is not None and self.regular and size_of(fd) < size:
                os.ftruncate(fd, size)
                make_durable(fd, os.fsync)
            self.size = size_of(fd)
        return self.size

    def close(self) -> None:
        """Close it, which ends the lock once no operation on it is under way. Repeating it does nothing."""
        self.backend.close()


def open_image(name: str, *, read_only: bool, create: int | None, directory: Path | None = None) -> Image:
    """Open and lock an image. `create`: make it, with so many bytes, all zero, if it is not there. `directory`: where
    it is, if not among the others.

    Raises EnvironmentProblem that says what is wrong: it is not there, in use, or no image at all.
    """
    path = image_path(name, directory)
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    if create is not None and not read_only:
        flags |= os.O_CREAT
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentProblem(
                f"cannot make the directory {path.parent} for the disk image {path.name}: {error.strerror}; "
                f"{DIRECTORY_VARIABLE} names another one"
            ) from error
    for _ in range(_TRIES):
        try:
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            hint = "; 'create = true' and 'size_mib' make one" if error.errno == errno.ENOENT and create is None else ""
            if error.errno in (errno.EROFS, errno.EACCES) and not read_only:
                hint = f"; {DIRECTORY_VARIABLE} names another directory, that can be written to"
            raise EnvironmentProblem(f"cannot open the disk image {path}: {error.strerror}{hint}") from error
        try:
            kind = os.fstat(fd).st_mode
            if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
                raise EnvironmentProblem(f"{path} is neither a file nor a block device: no disk image")
            os.set_blocking(fd, True)
            _lock(fd, path, read_only)
            if not _still_there(fd, path):
                os.close(fd)
                continue  # replaced between the open and the lock
            if not read_only:
                _new_name(path).unlink(missing_ok=True)  # a restore that was killed may have left it
            fresh = stat.S_ISREG(kind) and os.fstat(fd).st_size == 0
            if create is not None and not read_only and fresh:
                os.ftruncate(fd, create)
                # A flush of the guest's would be worth nothing if the name could get lost.
                os.fsync(fd)
                sync_directory(path.parent)
            return Image(path, fd, fresh=fresh)
        except OSError as error:
            os.close(fd)
            raise EnvironmentProblem(f"cannot use the disk image {path}: {error.strerror}") from error
        except BaseException:
            os.close(fd)
            raise
    raise EnvironmentProblem(f"the disk image {path} is replaced again and again: who does that?")


def _lock(fd: int, path: Path, shared: bool) -> None:
    kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise EnvironmentProblem(
            f"the disk image {path} is in use: another virtual machine, or a tool, has it locked; end that first, or "
            "give this disk an image of its own"
        ) from error


def _still_there(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def require_own(image: Image, identity: str) -> None:
    """Before a snapshot's content replaces an image's: it is the disk with that `identity`, or nobody's, or the owner
    of this machine allows it. A snapshot says which image it wants, and it may come from anybody.

    Raises EnvironmentProblem.
    """
    if image.fresh or os.environ.get(REPLACE_VARIABLE):
        return
    found = image.identity
    if (found is None and image.regular) or (identity and found == identity):
        return
    raise EnvironmentProblem(
        f"{image.path} is not the disk that the snapshot was taken of, and a restore would replace what it holds; move "
        f"it away, or allow that: {REPLACE_VARIABLE}=1"
    )


def replace_content(image: Image, source: Path, identity: str = "") -> Image:
    """Give a locked image the content of the file `source`, and that `identity`.

    Returns the image, which may be another file now.

    A file is replaced as a whole, in one step: after a crash it has the old content or the new. A block device is
    written over. Raises EnvironmentProblem; the image is then closed.
    """
    try:
        source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if image.regular:
                return _replace_file(image, source_fd, identity)
            if size_of(source_fd) != image.size:
                raise OSError(errno.EFBIG, f"{size_of(source_fd)} bytes do not fit a device of {image.size}")
            _overwrite(source_fd, image.fd)
            return image
        finally:
            os.close(source_fd)
    except OSError as error:
        image.close()
        raise EnvironmentProblem(f"cannot put {source} into the disk image {image.path}: {error.strerror}") from error


def _new_name(path: Path) -> Path:
    """Where an image's new content is made. One name only, and only whoever has the image's lock uses it."""
    path = path.resolve()
    return path.with_name(f".{path.name}.new")


def _replace_file(image: Image, source_fd: int, identity: str) -> Image:
    path = image.path.resolve()
    new = _new_name(path)
    fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        _lock(fd, new, False)
        os.fchmod(fd, stat.S_IMODE(os.fstat(image.fd).st_mode))
        if identity:
            with suppress(OSError):
                os.setxattr(fd, _IDENTITY, identity.encode())
        copy_content(source_fd, fd)
        new.rename(path)
        sync_directory(path.parent)
    except BaseException:
        os.close(fd)
        with suppress(OSError):
            new.unlink()
        raise
    image.close()
    return Image(image.path, fd)


def _overwrite(source: int, target: int) -> None:
    """Make a block device equal to a file of its size."""
    backend = FileBackend(os.dup(target))
    try:
        backend.write_zeroes(0, size_of(source), may_unmap=True, durable=False)
    finally:
        backend.close()
    copy_data(source, target, size_of(source))
    os.fsync(target)
