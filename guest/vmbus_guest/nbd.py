"""The kernel's nbd driver: how it is told of a disk, and what it says over its socket.

The kernel is the client of a network block device server: it sends requests over a socket and waits for replies. Here
the other end of that socket is in this process. All numbers are those of Linux' `include/uapi/linux/nbd.h`; on the
socket they are big-endian.
"""

# os instead of pathlib: imports are slow in an emulated guest.
# ruff: noqa: PTH112, PTH116, PTH123

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import threading

from vmbus.errors import EnvironmentProblem, WaitTimeout

_NBD = 0xAB << 8
_SET_SOCK = _NBD + 0
_SET_BLKSIZE = _NBD + 1
_DO_IT = _NBD + 3
_CLEAR_SOCK = _NBD + 4
_SET_SIZE_BLOCKS = _NBD + 7
_DISCONNECT = _NBD + 8
_SET_FLAGS = _NBD + 10

FLAG_HAS_FLAGS = 1 << 0
FLAG_READ_ONLY = 1 << 1
FLAG_SEND_FLUSH = 1 << 2
FLAG_SEND_FUA = 1 << 3
FLAG_SEND_TRIM = 1 << 5
FLAG_SEND_WRITE_ZEROES = 1 << 6

READ = 0
WRITE = 1
DISCONNECT = 2
FLUSH = 3
TRIM = 4
WRITE_ZEROES = 6

COMMAND_FLAG_FUA = 1 << 16
COMMAND_FLAG_NO_HOLE = 1 << 17

REQUEST = struct.Struct(">IIQQI")  # magic, type and flags, handle, offset, length
REPLY = struct.Struct(">IIQ")  # magic, error, handle
REQUEST_MAGIC = 0x25609513
REPLY_MAGIC = 0x67446698

MODULE = "/lib/modules/nbd.ko"
_SOCKET_BUFFER = 4 << 20


def load_module(devices: int = 4) -> None:
    """Insert the kernel's module, unless it is there. Raises EnvironmentProblem."""
    if os.path.isdir("/sys/block/nbd0"):
        return
    # busybox, since this is in a guest's image that has nothing else.
    arguments = ["busybox", "insmod", MODULE, f"nbds_max={devices}", "max_part=0"]
    pid = os.posix_spawn("/bin/busybox", arguments, dict(os.environ))
    _, status = os.waitpid(pid, 0)
    if status and not os.path.isdir("/sys/block/nbd0"):
        raise EnvironmentProblem(f"the kernel's nbd module could not be inserted from {MODULE}: status {status}")


class NbdDevice:
    """One of the kernel's nbd devices, attached to a socket of ours until `close`.

    Attributes: `path` ("/dev/nbd0"); `socket`, our end; `ended`, whether the kernel has let go of the device.
    """

    def __init__(self, number: int, size: int, block_size: int, flags: int) -> None:
        """Attach. `size` and `block_size` in bytes; `flags` as FLAG_. Raises EnvironmentProblem."""
        self.name = f"nbd{number}"
        self.path = f"/dev/{self.name}"
        self.size = size
        try:
            if not stat.S_ISBLK(os.stat(self.path).st_mode):
                raise EnvironmentProblem(f"{self.path} is no block device")
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise EnvironmentProblem(f"cannot open {self.path}: {error.strerror}; is the nbd module there?") from error
        self.socket, theirs = socket.socketpair()
        self._thread: threading.Thread | None = None
        self.error: OSError | None = None
        try:
            for end in (self.socket, theirs):
                for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                    end.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
            fcntl.ioctl(self._fd, _SET_BLKSIZE, block_size)
            fcntl.ioctl(self._fd, _SET_SIZE_BLOCKS, size // block_size)
            fcntl.ioctl(self._fd, _SET_FLAGS, flags | FLAG_HAS_FLAGS)
            fcntl.ioctl(self._fd, _SET_SOCK, theirs.fileno())
        except OSError as error:
            self.socket.close()
            os.close(self._fd)
            hint = "; another process serves it" if error.errno == errno.EBUSY else ""
            raise EnvironmentProblem(f"the kernel does not take {self.path}: {error.strerror}{hint}") from error
        finally:
            theirs.close()  # the kernel has its own reference
        self._thread = threading.Thread(target=self._serve, name=self.name, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        """The kernel serves the device for as long as this call lasts."""
        try:
            fcntl.ioctl(self._fd, _DO_IT)
        except OSError as error:
            self.error = error

    @property
    def ready(self) -> bool:
        """Whether the device has its size: it can be used from then on."""
        try:
            with open(f"/sys/block/{self.name}/size", encoding="ascii") as file:
                return int(file.read()) * 512 == self.size
        except (OSError, ValueError):
            return False

    @property
    def ended(self) -> bool:
        """Whether the kernel has let go of the device."""
        return self._thread is None or not self._thread.is_alive()

    def set_queue(self, name: str, value: int) -> None:
        """Set one of the queue's attributes in sysfs, if the kernel lets us."""
        try:
            with open(f"/sys/block/{self.name}/queue/{name}", "w", encoding="ascii") as file:
                file.write(str(value))
        except OSError:
            return

    def close(self, timeout: float = 10.0) -> None:
        """Detach: what is still asked of the device fails. Repeating it does nothing.

        Raises WaitTimeout when the kernel holds on to it.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        fcntl.ioctl(self._fd, _DISCONNECT)
        self.socket.close()
        thread.join(timeout)
        if thread.is_alive():
            raise WaitTimeout(f"the kernel to let go of {self.path}", timeout)
        fcntl.ioctl(self._fd, _CLEAR_SOCK)
        os.close(self._fd)
