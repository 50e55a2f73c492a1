"""The host's end of a NIC: a TAP interface, made and configured over netlink, in a network namespace if asked.

All of it is done on a thread of its own for the moment: joining a namespace concerns a thread, and pyroute2 brings an
event loop with it, which does not get on with one that runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from vmbus.errors import EnvironmentProblem, os_error
from vmbus.providers.network.tap import Tap
from vmbus.providers.network.watch import Watch

NAMESPACES = Path("/var/run/netns")
"""Where named network namespaces are, as `ip netns` has them."""

_MOST_HOSTS = 16
_UP = 1  # flag
_REACHABLE = 0x02  # until it has to be confirmed
_CLONE_NEWNET = 0x40000000
_MAIN_TABLE = 254
_libc = ctypes.CDLL(None, use_errno=True)

Result = TypeVar("Result")


Hosts = tuple[tuple[bytes, bytes], ...]


class Port(Protocol):
    """The host's end of a NIC: see `tap.Tap`. Frames have an offload header in front. `watch` tells what others have
    done to the interface. `hosts`: the bridge's own IPv4 addresses, each with the Ethernet address that it has here."""

    fd: int
    watch: Watch
    hosts: Hosts

    def read(self) -> bytes | None: ...

    def write(self, frame: bytes | memoryview) -> bool: ...

    def set_offload(self, wanted: bool) -> None: ...

    def set_carrier(self, up: bool) -> None: ...

    def close(self) -> None: ...


class Settings(NamedTuple):
    """What the interface is to be. `address` as "192.0.2.1/24" or None; `bridge` is an interface that is there.

    `carrier`: whether it has a link from the beginning. It takes the kernel a while to follow a change.
    `longest`: bytes of the longest packet that the kernel hands out uncut, where it can be told.
    `neighbour`: an IP address and an Ethernet address that are known to belong together, from before a move: while
    the kernel would ask for it, it would lose most of what is sent.
    """

    name: str
    mac: bytes
    mtu: int
    namespace: str | None = None
    address: str | None = None
    bridge: str | None = None
    carrier: bool = False
    neighbour: tuple[str, bytes] | None = None
    longest: int | None = None


def open_port(settings: Settings) -> Port:
    """Make the interface, and switch it on. Raises EnvironmentProblem saying what is missing."""

    def make() -> Port:
        tap = TapPort(settings.name)
        try:
            tap.set_carrier(settings.carrier)
            tap.hosts = configure(settings)
            tap.watch = Watch(settings.name, settings.bridge is not None)
        except BaseException:
            tap.close()
            raise
        return tap

    return in_namespace(settings.namespace, make)


class TapPort(Tap):
    """A TAP device as the host's end."""

    watch: Watch
    hosts: Hosts

    def close(self) -> None:
        """Remove it. Repeating it does nothing."""
        super().close()
        with contextlib.suppress(AttributeError):  # it has never been there
            self.watch.close()


def rejoin(settings: Settings) -> None:
    """Make the interface a port of its bridge again. Blocks for a moment. Raises EnvironmentProblem."""

    def work() -> None:
        with netlink() as link, explained(settings):
            link.link("set", index=_index(link, settings.name), master=_index(link, str(settings.bridge)))

    in_namespace(settings.namespace, work)


def prepare(settings: Settings, owner: int) -> None:
    """Make the interface ahead, for a user who may then take it as it is, without any rights. Raises
    EnvironmentProblem."""
    tap = Tap(settings.name)
    try:
        with os_error(f"cannot leave interface {settings.name!r} to user {owner}"):
            tap.leave_to(owner)
        try:
            configure(settings)
        except BaseException:
            tap.leave_to(None)
            raise
    finally:
        tap.close()


def remove(settings: Settings) -> None:
    """Take away what `prepare` has made. Raises EnvironmentProblem."""
    tap = Tap(settings.name)
    try:
        with os_error(f"cannot remove interface {settings.name!r}"):
            tap.leave_to(None)
    finally:
        tap.close()


def configure(settings: Settings) -> Hosts:
    """Give the interface, which is there, its settings, and switch it on; `Port.hosts`. What it has already is not set:
    that wants no rights. Raises EnvironmentProblem."""
    from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]

    with netlink() as link, explained(settings):
        index = _index(link, settings.name)
        (now,) = link.get_links(index)

        def bring(**wanted: Any) -> None:
            new = {key: value for key, value in wanted.items() if now.get_attr(f"IFLA_{key.upper()}") != value}
            if new:
                link.link("set", index=index, **new)

        bring(mtu=settings.mtu, address=settings.mac.hex(":"))
        if settings.longest is not None:
            with contextlib.suppress(NetlinkError):  # some kernels cannot be told; it is a matter of speed
                bring(gso_max_size=settings.longest)
        if settings.bridge is not None:
            bring(master=_index(link, settings.bridge))
        if settings.address is not None:
            _require_free(link, index, settings.address)
            _bring_address(link, index, settings.address)
        if not now["flags"] & _UP:
            link.link("set", index=index, state="up")
        if settings.neighbour is not None:
            address, mac = settings.neighbour
            with contextlib.suppress(NetlinkError):  # who has no rights waits until the kernel has asked
                link.neigh("replace", ifindex=index, dst=address, lladdr=mac.hex(":"), state=_REACHABLE)
        return () if settings.bridge is None else _hosts(link, _index(link, settings.bridge))


def _bring_address(link: Any, index: int, wanted: str) -> None:
    here = [(one.get_attr("IFA_ADDRESS"), one["prefixlen"]) for one in link.get_addr(index=index)]
    interface = ip_interface(wanted)
    address, prefix = str(interface.ip), interface.network.prefixlen
    if (address, prefix) not in here:
        link.addr("replace", index=index, address=address, prefixlen=prefix)


def _hosts(link: Any, index: int) -> Hosts:
    mac = bytes.fromhex(link.get_links(index)[0].get_attr("IFLA_ADDRESS").replace(":", ""))
    found = [one.get_attr("IFA_LOCAL") for one in link.get_addr(family=socket.AF_INET, index=index)]
    return tuple((socket.inet_aton(address), mac) for address in found[:_MOST_HOSTS])


def _require_free(link: Any, index: int, address: str) -> None:
    """Refuse an address in a network that this host has already: its way there would lead to the guest from now on."""
    wanted = ip_interface(address).network
    if wanted.is_link_local:
        return
    family = socket.AF_INET if wanted.version == 4 else socket.AF_INET6
    taken = [
        (one["index"], ip_network(f"{one.get_attr('IFA_ADDRESS')}/{one['prefixlen']}", strict=False))
        for one in link.get_addr(family=family)
    ]
    for route in link.get_routes(family=family, table=_MAIN_TABLE):
        if (to := route.get_attr("RTA_DST")) is not None:
            taken.append((route.get_attr("RTA_OIF"), ip_network(f"{to}/{route['dst_len']}")))
    for other, network in taken:
        if other != index and network.overlaps(wanted):
            where = f" on interface {socket.if_indextoname(other)!r}" if other else ""
            raise EnvironmentProblem(
                f"address {address} cannot be used: {network} is in use on this host{where}; choose another one by the "
                "provider's option 'address'"
            )


def set_mtu(settings: Settings, mtu: int) -> None:
    """Change the MTU of the interface. Blocks for a moment. Raises EnvironmentProblem."""

    def work() -> None:
        with netlink() as link, explained(settings):
            link.link("set", index=_index(link, settings.name), mtu=mtu)

    in_namespace(settings.namespace, work)


def in_namespace(name: str | int | None, work: Callable[[], Result]) -> Result:
    """Do `work` on a thread in that network namespace (None: ours; or an open descriptor of one), and return what it
    returns, or raise what it raises. Raises EnvironmentProblem when the namespace cannot be joined."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            if isinstance(name, int):
                _enter(name, "of the interface's other end")
            elif name is not None:
                descriptor = open_namespace(name)
                try:
                    _enter(descriptor, repr(name))
                finally:
                    os.close(descriptor)
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="network")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def open_namespace(name: str | None) -> int:
    """A descriptor of a network namespace: the calling thread's, or one with a name. Raises EnvironmentProblem."""
    path = Path("/proc/thread-self/ns/net") if name is None else NAMESPACES / name
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise EnvironmentProblem(
            f"there is no network namespace {name!r} ({path}: {error.strerror}); make it: ip netns add {name}"
        ) from error


def enter_new_namespace() -> None:
    """A network namespace of its own for the calling thread. Raises EnvironmentProblem."""
    if _libc.unshare(_CLONE_NEWNET) != 0:
        raise _not_entered("of its own")


def _enter(descriptor: int, what: str) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise _not_entered(what)


def _not_entered(what: str) -> EnvironmentProblem:
    number = ctypes.get_errno()
    needed = "; it needs the capability CAP_SYS_ADMIN, as root has it" if number == errno.EPERM else ""
    return EnvironmentProblem(f"cannot enter the network namespace {what}: {os.strerror(number)}{needed}")


@contextlib.contextmanager
def netlink() -> Iterator[Any]:
    try:
        from pyroute2 import IPRoute  # type: ignore[import-untyped]
    except ImportError as error:
        raise EnvironmentProblem("the network provider needs the Python package pyroute2; run scripts/setup") from error
    with IPRoute() as opened:
        yield opened


@contextlib.contextmanager
def explained(settings: Settings) -> Iterator[None]:
    from pyroute2.netlink.exceptions import NetlinkError

    where = f"interface {settings.name!r}" + (f" in namespace {settings.namespace!r}" if settings.namespace else "")
    try:
        yield
    except (NetlinkError, OSError) as error:
        number = error.code if isinstance(error, NetlinkError) else error.errno or 0
        reason = os.strerror(number)
        if number == errno.EPERM:
            reason += "; it needs the capability CAP_NET_ADMIN in this network namespace"
        elif number == errno.EEXIST:
            reason = "there is another one of this name"
        raise EnvironmentProblem(f"cannot make or configure {where}: {reason}") from error


def _index(link: Any, name: str) -> int:
    found = link.link_lookup(ifname=name)
    if not found:
        raise EnvironmentProblem(f"there is no interface {name!r} in this network namespace")
    return int(found[0])
