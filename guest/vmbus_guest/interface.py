"""The guest's end of a NIC: a TAP interface of the kernel's, with the settings that the host has told.

Settings go through the ioctls of `netdevice(7)`: a guest's image has no netlink library, and needs none.
"""

# os instead of pathlib: imports are slow in an emulated guest.
# ruff: noqa: PTH110

from __future__ import annotations

import fcntl
import os
import socket
import struct

from vmbus.errors import EnvironmentProblem
from vmbus.tap import DEVICE, Tap

MODULE = "/lib/modules/tun.ko"

_ADD_ROUTE = 0x890B
_GET_FLAGS, _SET_FLAGS = 0x8913, 0x8914
_SET_ADDRESS = 0x8916
_SET_NETMASK = 0x891C
_SET_MTU = 0x8922
_SET_MAC = 0x8924
_UP = 0x1
_ROUTE_UP_GATEWAY = 0x1 | 0x2
_EXISTS = 17
_ETHERNET = 1


def load_module() -> None:
    """Insert the kernel's module for TAP interfaces, unless it is there. Raises EnvironmentProblem."""
    if os.path.exists(DEVICE):
        return
    pid = os.posix_spawn("/bin/busybox", ["busybox", "insmod", MODULE], dict(os.environ))
    _, status = os.waitpid(pid, 0)
    if status and not os.path.exists(DEVICE):
        raise EnvironmentProblem(f"the kernel's tun module could not be inserted from {MODULE}: status {status}")


class Settings:
    """The settings of an interface that is there. Raises EnvironmentProblem from every method."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def configure(self, mac: bytes, mtu: int) -> None:
        """Set address and MTU, and switch it on."""
        self._set("its Ethernet address", _SET_MAC, struct.pack("H14s", _ETHERNET, mac))
        self._set("its MTU", _SET_MTU, struct.pack("i", mtu))
        self.switch_on()

    def switch_on(self) -> None:
        """Have it used."""
        answer = self._set("its flags", _GET_FLAGS, bytes(16))
        (flags,) = struct.unpack_from("H", answer, 16)
        self._set("it on", _SET_FLAGS, struct.pack("H", flags | _UP))

    def set_address(self, address: bytes, prefix: int) -> None:
        """Give it an IPv4 address, with the prefix's length."""
        self._set("its address", _SET_ADDRESS, _internet(address))
        mask = ((1 << 32) - (1 << (32 - prefix))).to_bytes(4, "big")
        self._set("its netmask", _SET_NETMASK, _internet(mask))

    def set_gateway(self, gateway: bytes) -> None:
        """Send what is for no network of ours to this address."""
        zero = _internet(bytes(4))
        # struct rtentry, with its gaps as on x86-64.
        route = struct.pack("Q16s16s16sH46x", 0, zero, _internet(gateway), zero, _ROUTE_UP_GATEWAY)
        try:
            fcntl.ioctl(self._socket, _ADD_ROUTE, route.ljust(120, b"\0"))
        except OSError as error:
            if error.errno != _EXISTS:
                raise EnvironmentProblem(f"cannot set the gateway of {self.name}: {error.strerror}") from error

    def close(self) -> None:
        """Set nothing any more."""
        self._socket.close()

    def _set(self, what: str, request: int, value: bytes) -> bytes:
        try:
            return fcntl.ioctl(self._socket, request, struct.pack("16s24s", self.name.encode(), value))
        except OSError as error:
            raise EnvironmentProblem(f"cannot set {what} of interface {self.name}: {error.strerror}") from error


class Interface(Settings):
    """A TAP interface and its settings, until `close`."""

    def __init__(self, name: str) -> None:
        self.tap = Tap(name)
        super().__init__(name)

    def close(self) -> None:
        """Remove it."""
        self.tap.close()
        super().close()


def _internet(address: bytes) -> bytes:
    """struct sockaddr_in."""
    return struct.pack("HH4s8x", socket.AF_INET, 0, address)
