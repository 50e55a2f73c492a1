"""TAP devices: network interfaces of the kernel's whose other end is a descriptor of ours.

What is read and written is one Ethernet frame each time, with an offload header (`vmbus.wire.ethernet`) in front: the
kernel may hand out TCP data longer than the MTU, to be cut, and checksums that are still to be filled in. Where the
other end was told nothing of offloads (`set_offload(False)`) the header is all zeros.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from vmbus.errors import EnvironmentProblem, UsageError

DEVICE = "/dev/net/tun"
NAME_LIMIT = 15
"""Characters of an interface's name."""

_SET_INTERFACE = 0x400454CA  # TUNSETIFF
_SET_PERSISTENT = 0x400454CB  # TUNSETPERSIST
_SET_OWNER = 0x400454CC  # TUNSETOWNER
_SET_OFFLOAD = 0x400454D0  # TUNSETOFFLOAD
_SET_CARRIER = 0x400454E2  # TUNSETCARRIER
_FLAGS = 0x0002 | 0x1000 | 0x4000  # tap, no packet information, offload header
_OFFLOADS = 0x1 | 0x2 | 0x4 | 0x8  # checksums, TCP over IPv4 and IPv6, the same with ECN
_REQUEST = struct.Struct("16sH22x")

FRAME_LIMIT = 10 + 22 + 65536
"""Bytes of the longest frame with its header: the longest packet that a kernel makes, with two VLAN tags."""

_LOST = frozenset({errno.EIO, errno.EINVAL, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EMSGSIZE, errno.EFAULT})


class Tap:
    """One TAP device. The interface is there until `close`, or as long as the process lives.

    Attributes: `name`, the interface's; `fd`, non-blocking: watch it, and read until None.
    """

    def __init__(self, name: str, *, device: str = DEVICE) -> None:
        """Make it (or take one that root has prepared for us), in the network namespace of the calling thread.

        Raises EnvironmentProblem saying what is missing, or who has it.
        """
        if not 0 < len(name) <= NAME_LIMIT:
            raise UsageError(f"an interface's name has 1 to {NAME_LIMIT} characters, unlike {name!r}")
        self.name = name
        try:
            self.fd = os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise EnvironmentProblem(
                f"a network interface needs {device}, and opening it fails: {error.strerror}; load the module tun, or "
                "have root make it readable and writable"
            ) from error
        try:
            fcntl.ioctl(self.fd, _SET_INTERFACE, _REQUEST.pack(name.encode(), _FLAGS))
            self.set_offload(False)
        except OSError as error:
            os.close(self.fd)
            raise EnvironmentProblem(f"cannot make the TAP interface {name!r}: {_reason(error)}") from error

    def set_offload(self, wanted: bool) -> None:
        """Whether frames may come that are longer than the MTU, or without checksums. Raises OSError."""
        fcntl.ioctl(self.fd, _SET_OFFLOAD, _OFFLOADS if wanted else 0)

    def set_carrier(self, up: bool) -> None:
        """Whether the interface has a link. Raises OSError."""
        fcntl.ioctl(self.fd, _SET_CARRIER, struct.pack("i", up))

    def leave_to(self, owner: int | None) -> None:
        """Whether the interface stays when it is closed here, for that user, who needs no rights for it then; None: it
        goes. Raises OSError."""
        if owner is not None:
            fcntl.ioctl(self.fd, _SET_OWNER, owner)
        fcntl.ioctl(self.fd, _SET_PERSISTENT, int(owner is not None))

    def read(self) -> bytes | None:
        """The next frame with its header, from the kernel; None when there is none now. Raises OSError."""
        try:
            return os.read(self.fd, FRAME_LIMIT)
        except (BlockingIOError, InterruptedError):
            return None

    def write(self, frame: bytes | memoryview) -> bool:
        """Give the kernel a frame with its header. False: it did not take it (the interface is down, the frame makes no
        sense). Raises OSError when the device is gone."""
        try:
            os.write(self.fd, frame)
        except OSError as error:
            if error.errno not in _LOST:
                raise
            return False
        return True

    def close(self) -> None:
        """Remove the interface. Repeating it does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _reason(error: OSError) -> str:
    if error.errno == errno.EBUSY:
        return "another process has it"
    if error.errno == errno.EPERM:
        return (
            "not permitted; it needs the capability CAP_NET_ADMIN in this network namespace (as root has), or an "
            "interface that root has prepared: sudo scripts/network DESCRIPTION"
        )
    if error.errno == errno.EINVAL:
        return "there is an interface of this name that is something else"
    return error.strerror or str(error)
