"""The host's end of a card: interfaces of the kernel's, made, configured, and gone with their owner."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import pace
from support.namespace import TUN, Namespace, remove_stale
from support.namespace import outside as outside
from support.pace import until
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.providers.network.interface import NAMESPACES, Port, Settings, in_namespace, open_port, prepare, remove
from vmbus.providers.network.tap import Tap
from vmbus.providers.network.veth import open_veth


@pytest.mark.parametrize("open_port", [open_port, open_veth])
def test_an_interface_is_made_configured_and_gone(outside: Namespace, open_port: Callable[[Settings], Port]) -> None:
    settings = Settings("host0", b"\xfe\0\0\0\0\1", 4000, outside.name, "192.0.2.1/24")
    port = open_port(settings)

    def look(netlink: Any) -> dict[str, Any]:
        (link,) = netlink.get_links(netlink.link_lookup(ifname="host0")[0])
        (address,) = netlink.get_addr(index=link["index"], family=socket.AF_INET)
        return {
            "mtu": link.get_attr("IFLA_MTU"),
            "mac": link.get_attr("IFLA_ADDRESS"),
            "up": bool(link["flags"] & 1),
            "carrier": link.get_attr("IFLA_CARRIER"),
            "address": (address.get_attr("IFA_ADDRESS"), address["prefixlen"]),
        }

    expected = {"mtu": 4000, "mac": "fe:00:00:00:00:01", "up": True, "carrier": 0, "address": ("192.0.2.1", 24)}
    assert outside.configure(look) == expected
    port.set_carrier(True)
    assert outside.configure(look)["carrier"] == 1
    with pytest.raises(EnvironmentProblem, match=r"'host0'.*(another process has it|of this name)"):
        open_port(settings)
    port.close()
    port.close()
    assert outside.interfaces() == []


def test_what_is_missing_is_named(outside: Namespace, tmp_path: Path) -> None:
    settings = Settings("host0", b"\xfe\0\0\0\0\1", 1500, outside.name)
    with pytest.raises(EnvironmentProblem, match=r"no network namespace 'nowhere'.*ip netns add nowhere"):
        open_port(settings._replace(namespace="nowhere"))
    with pytest.raises(EnvironmentProblem, match="no interface 'br7'"):
        open_port(settings._replace(bridge="br7"))
    with pytest.raises(EnvironmentProblem, match="something else"):
        open_port(settings._replace(name="lo"))
    with pytest.raises(EnvironmentProblem, match="load the module tun"):
        Tap("host0", device=str(tmp_path / "tun"))
    with pytest.raises(UsageError, match="1 to 15"):
        Tap("a" * 16)
    assert outside.interfaces() == []


def test_without_rights_the_error_says_which(outside: Namespace) -> None:
    # What is needed is imported while everything can still be read.
    script = (
        "import os\n"
        "from vmbus.errors import EnvironmentProblem\n"
        "from vmbus.providers.network.tap import Tap\n"
        "if os.getuid() == 0: os.setgroups([]), os.setgid(65534), os.setuid(65534)\n"
        "try: Tap('host0')\n"
        "except EnvironmentProblem as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=pace.seconds(30),
    )
    everybody = TUN.stat().st_mode & 0o006 == 0o006
    assert ("CAP_NET_ADMIN" if everybody else "readable and writable") in done.stdout, done


_TAKE = """
import sys
from vmbus.errors import EnvironmentProblem
from vmbus.providers.network import interface
settings = interface.Settings("host0", bytes.fromhex("fe0000000001"), 4000, None, "192.0.2.1/24", "br0", longest=61440)
try:
    port = interface.open_port(settings)
    print("taken", port.hosts)
    port.close()
except EnvironmentProblem as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("prepared", [True, False])
def test_own_guest_an_interface_made_ahead_wants_no_rights(outside: Namespace, prepared: bool) -> None:
    """A process with the rights of its user's alone takes the interface as it is; without it, it gets none."""
    settings = Settings("host0", b"\xfe\0\0\0\0\1", 4000, None, "192.0.2.1/24", "br0", longest=61440)

    def bridge(netlink: Any) -> None:
        netlink.link("add", ifname="br0", kind="bridge")
        netlink.link("set", index=netlink.link_lookup(ifname="br0")[0], state="up")

    outside.configure(bridge)
    if prepared:
        in_namespace(outside.name, lambda: prepare(settings, os.getuid()))
    enter = ["nsenter", f"--net={NAMESPACES / outside.name}", "setpriv", "--bounding-set", "-net_admin"]
    done = subprocess.run(
        [*enter, sys.executable, "-c", _TAKE], capture_output=True, text=True, timeout=pace.seconds(30)
    )
    assert done.stdout.startswith("taken" if prepared else "refused:"), done
    assert ("CAP_NET_ADMIN" in done.stdout) is not prepared
    assert outside.interfaces() == (["br0", "host0"] if prepared else ["br0"])
    if prepared:
        in_namespace(outside.name, lambda: remove(settings))
    outside.configure(lambda netlink: netlink.link("del", ifname="br0"))
    assert outside.interfaces() == []


def test_a_port_of_a_bridge(outside: Namespace) -> None:
    def make(netlink: Any) -> None:
        netlink.link("add", ifname="br0", kind="bridge")
        (index,) = netlink.link_lookup(ifname="br0")
        netlink.link("set", index=index, state="up", address="02:00:00:00:00:17")
        netlink.addr("add", index=index, address="192.0.2.1", prefixlen=24)

    def masters(netlink: Any) -> list[bool]:
        bridge = netlink.link_lookup(ifname="br0")[0]
        return [link.get_attr("IFLA_MASTER") == bridge for link in netlink.get_links()]

    outside.configure(make)
    port = open_port(Settings("host0", b"\xfe\0\0\0\0\1", 1500, outside.name, bridge="br0"))
    assert port.hosts == ((bytes([192, 0, 2, 1]), b"\2\0\0\0\0\x17"),)
    assert sum(outside.configure(masters)) == 1
    port.close()
    assert sum(outside.configure(masters)) == 0
    outside.configure(lambda netlink: netlink.link("del", ifname="br0"))


@pytest.mark.parametrize("open_port", [open_port, open_veth])
def test_fault_n23_an_address_in_a_network_of_the_hosts_is_refused(
    outside: Namespace, open_port: Callable[[Settings], Port]
) -> None:
    settings = Settings("host0", b"\xfe\0\0\0\0\1", 1500, outside.name)

    def use(link: Any) -> None:
        (index,) = link.link_lookup(ifname="lo")
        link.link("set", index=index, state="up")
        link.addr("add", index=index, address="192.0.2.77", prefixlen=24)
        link.route("add", dst="198.51.100.64/26", oif=index)

    outside.configure(use)
    for address, network in (("192.0.2.1/24", "192.0.2.0/24"), ("198.51.100.1/24", "198.51.100.64/26")):
        with pytest.raises(EnvironmentProblem, match=f"{network} is in use .* on interface 'lo'.*option 'address'"):
            open_port(settings._replace(address=address))
        assert outside.interfaces() == []
    for address in ("198.51.100.1/26", "203.0.113.1/24", "fe80::1/64", "fd00::1/64"):
        open_port(settings._replace(address=address)).close()


@pytest.mark.parametrize("function", ["interface.open_port", "veth.open_veth"])
def test_nothing_outlives_a_killed_owner(outside: Namespace, function: str) -> None:
    module, _, name = function.partition(".")
    script = (
        "import sys, time\n"
        "from vmbus.providers.network.interface import Settings\n"
        f"from vmbus.providers.network.{module} import {name}\n"
        f"port = {name}(Settings('host0', bytes([254,0,0,0,0,1]), 1500, {outside.name!r}, '192.0.2.1/24'))\n"
        "print('made', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"made\n"
        assert outside.interfaces() == ["host0"]
        process.send_signal(signal.SIGKILL)
        process.wait()
    until(lambda: outside.interfaces() == [], "the interface to be gone")


def test_namespaces_of_dead_owners_are_removed(outside: Namespace) -> None:
    from pyroute2 import netns  # type: ignore[import-untyped]

    stale = "vmbus-test-1-0-abcd"
    netns.create(stale)
    remove_stale()
    assert not (NAMESPACES / stale).exists() and (NAMESPACES / outside.name).exists()
