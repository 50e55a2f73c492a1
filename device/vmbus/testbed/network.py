"""A host's end of the link, over netlink: the one module that uses pyroute2 (which has no types of its own).

`plug` makes the link, `Interface` is one end of it. Everything works on the network namespace of the calling process.

How a link is shaped: rate by the kernel's token bucket. Latency and loss by a delay line of ours, since the kernel's
emulator (netem) is left out of many kernels: a filter diverts what leaves the interface into a tap device, the line
reads it there and sends it out past the queues when its time has come.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute  # type: ignore[import-untyped]
from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]

from vmbus.errors import EnvironmentProblem

INTERFACE = "eth0"
"""The interface's name, in each host."""

_TAP = "line0"
_TUN = "/dev/net/tun"
_ROOT = 0xFFFFFFFF
_EGRESS = 0xFFFFFFF3  # of a clsact qdisc
_ALL_PROTOCOLS = 3
_MATCH_ALL = ["0x0/0x0+0"]

_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_TAP_FLAGS = 0x0002 | 0x1000 | 0x4000  # tap, no packet information, with a virtio-net header
_TAP_OFFLOADS = 0x1 | 0x2 | 0x4  # frames come as they are: unsummed, and as long as TCP made them

_SOL_PACKET = 263
_PACKET_VNET_HDR = 15
_PACKET_QDISC_BYPASS = 20

_LINE = Path(__file__).with_name("line.py")


class NoTap(EnvironmentProblem):
    """We may not make the tap device that latency and loss need."""


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Every failure as an EnvironmentProblem that says what was tried."""
    try:
        yield
    except NetlinkError as error:
        raise EnvironmentProblem(f"cannot {what}: {os.strerror(error.code)}") from error
    except OSError as error:
        raise EnvironmentProblem(f"cannot {what}: {error.strerror}") from error


class Network:
    """This network namespace. Raises `EnvironmentProblem` from every method."""

    def __init__(self) -> None:
        with _explained("open a netlink socket"):
            self._netlink: Any = IPRoute()
        with contextlib.suppress(OSError):  # a kernel without it has nothing to be kept quiet
            for name in ("all", "default"):
                Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
        self._up("lo")

    def plug(self, peer_namespace: int) -> None:
        """Makes the link: our end here, the other one in the network namespace of that descriptor."""
        peer = {"ifname": INTERFACE, "net_ns_fd": peer_namespace}
        with _explained("make a veth pair"):
            self._netlink.link("add", ifname=INTERFACE, kind="veth", peer=peer)

    def configure(self, address: str, prefix: int) -> None:
        """Gives our end its IPv4 address and switches it on."""
        with _explained(f"give {INTERFACE} the address {address}"):
            self._netlink.addr("add", index=self._index(INTERFACE), address=address, prefixlen=prefix)
        self._up(INTERFACE)

    def interface(self) -> Interface:
        """Our end of the link."""
        return Interface(self._netlink, self._index(INTERFACE))

    def _up(self, name: str) -> None:
        with _explained(f"switch {name} on"):
            self._netlink.link("set", index=self._index(name), state="up")

    def _index(self, name: str) -> int:
        found = self._netlink.link_lookup(ifname=name)
        if not found:
            raise EnvironmentProblem(f"there is no interface {name!r}")
        return int(found[0])


class Interface:
    """One end of the link. What is set holds for the direction away from this host."""

    def __init__(self, netlink: Any, index: int) -> None:
        self._netlink = netlink
        self._index = index
        self._line: int | None = None  # a descriptor of the delay line's process

    def shape(self, *, rate: float = 0.0, latency: float = 0.0, loss: float = 0.0, cut: bool = False) -> None:
        """From now on: `rate` bytes a second (0: no limit), `latency` seconds more, `loss` (0 to 1) of packets lost.

        With `cut`, nothing gets out at all, without a word to the sender. What was queued is lost at each change.
        """
        # First nothing gets out, so that no packet sees half of a change.
        with _explained("set the link's queue"):
            self._netlink.tc("replace", "blackhole", self._index, parent=_ROOT)
        self._remove_line()
        if cut:
            return
        shaped = self._index
        if latency or loss:
            shaped = self._insert_line(latency, loss)
        with _explained("set the link's rate"):
            if rate:
                burst = max(16384, int(rate / 50))
                self._netlink.tc(
                    "replace", "tbf", shaped, parent=_ROOT, rate=int(rate), burst=burst, limit=max(1 << 18, burst * 8)
                )
            if not rate or shaped != self._index:
                self._netlink.tc("del", index=self._index, parent=_ROOT)

    def counters(self) -> dict[str, int]:
        """What passed this end since it was made, in bytes: ``received`` and ``sent``."""
        with _explained("read the link's counters"):
            (link,) = self._netlink.get_links(self._index)
        found = link.get_attr("IFLA_STATS64")
        return {"received": int(found["rx_bytes"]), "sent": int(found["tx_bytes"])}

    def check(self) -> None:
        """Raises `EnvironmentProblem` if the delay line has ended by itself."""
        if self._line is not None and select.select([self._line], [], [], 0)[0]:
            raise EnvironmentProblem("the link's delay line has ended; its last words are in the host's log")

    def _insert_line(self, latency: float, loss: float) -> int:
        """Diverts what leaves into a delay line. The index of the tap device, whose queue comes before the line."""
        with contextlib.ExitStack() as stack, _explained("make a delay line"):
            try:
                tap = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                raise NoTap(
                    f"a link with latency or loss needs {_TUN}, and opening it fails: {error.strerror}; "
                    "load the module tun, or have root make it readable and writable"
                ) from error
            stack.callback(os.close, tap)
            fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", _TAP.encode(), _TAP_FLAGS))
            fcntl.ioctl(tap, _TUNSETOFFLOAD, _TAP_OFFLOADS)
            index = int(self._netlink.link_lookup(ifname=_TAP)[0])
            self._netlink.link("set", index=index, state="up")
            out = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
            out.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
            out.setsockopt(_SOL_PACKET, _PACKET_QDISC_BYPASS, 1)  # past the filter too, or it would come round again
            out.bind((INTERFACE, 0))
            arguments = ["0", "1", repr(latency), repr(loss)]
            pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", str(_LINE), *arguments],
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, tap, 0), (os.POSIX_SPAWN_DUP2, out.fileno(), 1)],
            )
            self._line = os.pidfd_open(pid)
            self._netlink.tc("add", "clsact", self._index)
            redirect = {"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": index}
            self._netlink.tc(
                *("add-filter", "u32", self._index),
                parent=_EGRESS,
                prio=10,
                protocol=_ALL_PROTOCOLS,
                target=0x10000,
                keys=_MATCH_ALL,
                action=[redirect],
            )
        return index

    def _remove_line(self) -> None:
        if self._line is None:
            return
        with _explained("remove the delay line"):
            self._netlink.tc("del", "clsact", self._index)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._line, signal.SIGKILL)
            if not select.select([self._line], [], [], 10)[0]:
                raise EnvironmentProblem("the link's delay line does not end after SIGKILL")
            os.close(self._line)
            self._line = None
