"""The host's end of a NIC without a TAP device: a pair of virtual interfaces, and a packet socket on the inner one.

The inner end is in a network namespace without a name, where nobody else answers to what comes. The namespace lives as
long as somebody holds a descriptor of it or a socket in it, and takes the pair along: so nothing is left of a process
that is killed. Frames have the same offload header as those of a TAP device.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import time
from pathlib import Path

from vmbus.errors import EnvironmentProblem
from vmbus.providers.network.interface import (
    Hosts,
    Port,
    Settings,
    configure,
    enter_new_namespace,
    explained,
    in_namespace,
    netlink,
    open_namespace,
)
from vmbus.providers.network.tap import FRAME_LIMIT
from vmbus.providers.network.watch import Watch

_INNER = "nic0"
_BUFFER = 4 << 20
_PATIENCE = 2.0  # seconds for the kernel to take a dead owner's pair apart

_ETH_P_ALL = 3
_SOL_PACKET = 263
_VNET_HEADER = 15
_IGNORE_OUTGOING = 23

_GET_FLAGS, _SET_FLAGS, _ETHTOOL = 0x8913, 0x8914, 0x8946
_UP = 0x1
_SET_CHECKSUMS, _SET_TCP_SEGMENTS, _SET_SEGMENTS = 0x17, 0x1F, 0x24
_LOST = frozenset({errno.EINVAL, errno.EMSGSIZE, errno.ENOBUFS, errno.ENOMEM, errno.ENETDOWN, errno.EAGAIN})


class VethPort:
    """Our end of a pair: see `tap.Tap`. `outer`: the other end's name; `control`: a socket in its namespace."""

    watch: Watch
    hosts: Hosts

    def __init__(self, outer: str, packets: socket.socket, control: socket.socket, namespace: int) -> None:
        self.name = outer
        self.fd = packets.fileno()
        self._packets = packets
        self._control = control
        self._namespace = namespace

    def read(self) -> bytes | None:
        """The next frame with its header; None when there is none now. Raises OSError."""
        while True:
            try:
                return self._packets.recv(FRAME_LIMIT)
            except (BlockingIOError, InterruptedError):
                return None
            except OSError as error:
                if error.errno != errno.ENETDOWN:  # told once, after our end was switched off
                    raise

    def write(self, frame: bytes | memoryview) -> bool:
        """Send a frame with its header. False: it was not taken. Raises OSError when the interface is gone."""
        try:
            self._packets.send(frame)
        except OSError as error:
            if error.errno not in _LOST:
                raise
            return False
        return True

    def set_offload(self, wanted: bool) -> None:
        """Whether frames may come that are longer than the MTU, or without checksums. Raises OSError."""
        order = (_SET_CHECKSUMS, _SET_SEGMENTS, _SET_TCP_SEGMENTS)
        for command in order if wanted else reversed(order):
            value = ctypes.create_string_buffer(struct.pack("II", command, wanted))
            request = struct.pack("16sQ16x", self.name.encode(), ctypes.addressof(value))
            fcntl.ioctl(self._control, _ETHTOOL, request)

    def set_carrier(self, up: bool) -> None:
        """Whether the other end has a link: it has while ours is on. Raises OSError."""
        request = struct.pack("16sH22x", _INNER.encode(), 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(self._packets, _GET_FLAGS, request), 16)
        flags = flags | _UP if up else flags & ~_UP
        fcntl.ioctl(self._packets, _SET_FLAGS, struct.pack("16sH22x", _INNER.encode(), flags))

    def close(self) -> None:
        """Remove the pair. Repeating it does nothing."""
        if self.fd < 0:
            return
        self.fd = -1
        with contextlib.suppress(AttributeError):  # it has never been there
            self.watch.close()

        def remove() -> None:
            with netlink() as link:
                link.link("del", ifname=_INNER)

        with contextlib.suppress(Exception):  # somebody else has removed it
            in_namespace(self._namespace, remove)
        self._packets.close()
        self._control.close()
        os.close(self._namespace)


def open_veth(settings: Settings) -> Port:
    """Make the pair, and switch the other end on. Raises EnvironmentProblem saying what is missing."""
    control = in_namespace(settings.namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    outside = in_namespace(settings.namespace, lambda: open_namespace(None))

    def make() -> VethPort:
        enter_new_namespace()
        with contextlib.suppress(OSError):  # a kernel without IPv6 has nothing to be kept quiet
            for name in ("all", "default"):
                (Path("/proc/sys/net/ipv6/conf") / name / "disable_ipv6").write_text("1")
        with netlink() as link, explained(settings):
            _add_pair(link, settings, outside)
            (index,) = link.link_lookup(ifname=_INNER)
            link.link("set", index=index, mtu=settings.mtu, state="up" if settings.carrier else "down")
        packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        packets.setsockopt(_SOL_PACKET, _VNET_HEADER, 1)
        packets.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            packets.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        packets.bind((_INNER, _ETH_P_ALL))
        return VethPort(settings.name, packets, control, open_namespace(None))

    try:
        port = in_namespace(None, make)
    except BaseException:
        control.close()
        raise
    finally:
        os.close(outside)
    try:
        port.hosts = in_namespace(settings.namespace, lambda: configure(settings))
        port.watch = in_namespace(settings.namespace, lambda: Watch(settings.name, bridged=settings.bridge is not None))
        port.set_offload(False)
    except OSError as error:
        port.close()
        raise EnvironmentProblem(f"cannot set the offloads of interface {settings.name!r}: {error}") from error
    except BaseException:
        port.close()
        raise
    return port


def _add_pair(link: object, settings: Settings, outside: int) -> None:
    """Both ends; waits for one of the same name that is just being taken apart."""
    from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]

    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            peer = {"ifname": settings.name, "net_ns_fd": outside}
            link.link("add", ifname=_INNER, kind="veth", peer=peer)  # type: ignore[attr-defined]
        except NetlinkError as error:
            if error.code != errno.EEXIST or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
