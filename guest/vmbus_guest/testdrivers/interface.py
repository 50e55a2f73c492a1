"""Test driver `interface`: switches on an interface of another driver's and gives it an address. No channels.

Parameters:

    modules     kernel modules to insert first, in their order, separated by commas: "failover,net_failover,virtio_net"
    interface   its name
    address     IPv4, with the prefix's length: "192.0.2.2/24"
    appear_seconds  how long the interface may take
"""

# os instead of pathlib: this is a guest with little time.
# ruff: noqa: PTH110

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from typing import Any

from vmbus.errors import EnvironmentProblem, UsageError, WaitTimeout
from vmbus_guest.testdrivers.context import Context
from vmbus_guest.testdrivers.disk_writer import insert_module

# netdevice(7): a guest's image has no netlink library, and needs none.
_GET_FLAGS, _SET_FLAGS = 0x8913, 0x8914
_SET_ADDRESS = 0x8916
_SET_NETMASK = 0x891C
_UP = 0x1


def run(context: Context) -> dict[str, Any]:
    """See the module's text."""
    get = context.parameters.get
    modules = get("modules", "")
    name = get("interface", "eth0")
    text = get("address", "")
    appear = get("appear_seconds", 30.0, minimum=0)
    context.parameters.check()
    address, prefix = parse_address(text)
    for module in filter(None, modules.split(",")):
        insert_module(module)
    deadline = time.monotonic() + appear
    while not os.path.exists(f"/sys/class/net/{name}"):
        if time.monotonic() > deadline:
            raise WaitTimeout(f"interface {name} to appear", appear)
        time.sleep(0.05)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            _switch_on(control, name)
            _set(control, name, _SET_ADDRESS, _internet(address))
            mask = ((1 << 32) - (1 << (32 - prefix))).to_bytes(4, "big")
            _set(control, name, _SET_NETMASK, _internet(mask))
    except OSError as error:
        raise EnvironmentProblem(f"interface {name} cannot be set up: {error.strerror}") from error
    return {"interface": name, "verdict": "passed"}


def parse_address(text: str) -> tuple[bytes, int]:
    """("192.0.2.2/24"), as the address' bytes and the prefix's length. Raises UsageError."""
    address, _, prefix = text.partition("/")
    try:
        length = int(prefix)
        if not 0 <= length <= 32:
            raise ValueError
        return socket.inet_aton(address), length
    except (OSError, ValueError):
        raise UsageError(f"parameter 'address' is like 192.0.2.2/24, not '{text}'") from None


def _switch_on(control: socket.socket, name: str) -> None:
    (flags,) = struct.unpack_from("H", _set(control, name, _GET_FLAGS, bytes(16)), 16)
    _set(control, name, _SET_FLAGS, struct.pack("H", flags | _UP))


def _set(control: socket.socket, name: str, request: int, value: bytes) -> bytes:
    return fcntl.ioctl(control, request, struct.pack("16s24s", name.encode(), value))


def _internet(address: bytes) -> bytes:
    """struct sockaddr_in."""
    return struct.pack("HH4s8x", socket.AF_INET, 0, address)
