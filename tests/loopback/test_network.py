"""The network provider with real TAP interfaces, on a real device server, and the guest's service on the other side."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.namespace import CHECKOUT, TUN, Namespace, NotPermitted, namespace, remove_stale
from support.streams import agree
from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.kmcl.packet import Packet
from vmbus.loopback.harness import LoopbackServer, describe
from vmbus.providers.network.interface import NAMESPACES, Port, Settings, in_namespace, open_port, set_mtu
from vmbus.providers.network.veth import open_veth
from vmbus.tap import Tap
from vmbus.vfio_user.library import Library
from vmbus.wire.network import NETWORK_TYPE, Hello, Queues, Status, pack_frames, parse_nic, parse_status
from vmbus_guest.driver import VmbusDriver
from vmbus_guest.interface import Interface
from vmbus_guest.services.network import Network, NetworkService
from vmbus_guest.testdrivers import CATALOGUE
from vmbus_guest.testdrivers.context import Context

pytestmark = pytest.mark.loopback

HOST, GUEST = "192.0.2.1", "192.0.2.2"
MAC = bytes.fromhex("020000000001")
OPTIONS = {"mac": MAC.hex(":"), "interface": "host0", "address": f"{HOST}/24", "guest_address": f"{GUEST}/24"}


@pytest.fixture
def outside() -> Iterator[Namespace]:
    """The host's side."""
    try:
        with namespace() as found:
            yield found
    except NotPermitted as error:
        pytest.skip(str(error))


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[Namespace]:
    """The guest's side: its service makes its interface in here."""

    def make(self: NetworkService, name: str) -> Network:
        return in_namespace(found.name, lambda: Interface(name))

    monkeypatch.setattr(NetworkService, "make_interface", make)
    try:
        with namespace() as found:
            yield found
    except NotPermitted as error:
        pytest.skip(str(error))


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


class Service:
    """The guest's service on a thread."""

    def __init__(self, server: LoopbackServer, **parameters: Any) -> None:
        self.context = Context({"services": [{"service": "network", **parameters}]}, server.function)
        self.results: list[Any] = []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.results.append(CATALOGUE["services"].load()(self.context))
        except BaseException as error:
            self.results.append(error)

    def end(self) -> dict[str, Any]:
        self.context.stop_requested = True
        self.thread.join(20)
        if isinstance(self.results[0], BaseException):
            raise self.results[0]
        result: dict[str, Any] = self.results[0]
        assert result["verdict"] == "passed", result
        return dict(result["services"][0])


def status(server: LoopbackServer) -> dict[str, Any]:
    return dict(server.command("status")["providers"]["network"])


# ---- interfaces ------------------------------------------------------------------------------------------------------


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
        "from vmbus.tap import Tap\n"
        "if os.getuid() == 0: os.setgroups([]), os.setgid(65534), os.setuid(65534)\n"
        "try: Tap('host0')\n"
        "except EnvironmentProblem as error: print(error)\n"
    )
    path = os.pathsep.join(str(CHECKOUT / part) for part in ("device", "guest"))
    done = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=30
    )
    everybody = TUN.stat().st_mode & 0o006 == 0o006
    assert ("CAP_NET_ADMIN" if everybody else "readable and writable") in done.stdout, done


def test_a_port_of_a_bridge(outside: Namespace) -> None:
    def make(netlink: Any) -> None:
        netlink.link("add", ifname="br0", kind="bridge")
        netlink.link("set", index=netlink.link_lookup(ifname="br0")[0], state="up")

    def masters(netlink: Any) -> list[bool]:
        bridge = netlink.link_lookup(ifname="br0")[0]
        return [link.get_attr("IFLA_MASTER") == bridge for link in netlink.get_links()]

    outside.configure(make)
    port = open_port(Settings("host0", b"\xfe\0\0\0\0\1", 1500, outside.name, bridge="br0"))
    assert sum(outside.configure(masters)) == 1
    port.close()
    assert sum(outside.configure(masters)) == 0
    outside.configure(lambda netlink: netlink.link("del", ifname="br0"))


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
    path = os.pathsep.join(str(CHECKOUT / part) for part in ("device", "guest"))
    with subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE
    ) as process:
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


# ---- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["tap", "veth"])
def test_programs_use_the_network(libvfio_user: Library, outside: Namespace, inside: Namespace, end: str) -> None:
    options = {**OPTIONS, "namespace": outside.name, "queues": 3, "mtu": 9000, "end": end}
    with LoopbackServer(describe("network", network=options), libvfio_user) as server:
        service = Service(server, queues=2)
        pings = [
            outside.start("ping", host=GUEST, count=20, interval=0.01, size=8000),
            inside.start("ping", host=HOST, count=20, interval=0.01),
        ]
        for ping in pings:
            result = ping.result()
            assert result["verdict"] == "passed" and result["lost"] == 0, result
        serving = inside.start("transfer", streams=4)
        client = outside.start("transfer", mode="connect", host=GUEST, streams=4, bytes=4 << 20)
        ours, theirs = client.result(), serving.result()
        agree(ours, theirs)
        assert ours["sent"] == ours["received"] == 16 << 20
        state = status(server)
        assert state["guest"]["in_use"] == 2 and all(queue["frames"] for queue in state["queues"][:2])
        assert state["refused"] == 0
        counts = service.end()
        assert counts["mtu"] == 9000 and counts["to_host"] > 0 and counts["refused"] == 0
        # The streams' last acknowledgements may still be under way when the service ends.
        assert counts["lost"] <= 8
    assert outside.interfaces() == inside.interfaces() == []


@pytest.mark.parametrize("end", ["tap", "veth"])
@pytest.mark.parametrize("offload", [True, False])
def test_network_survives_pauses_in_mid_transfer(
    libvfio_user: Library, outside: Namespace, inside: Namespace, offload: bool, end: str
) -> None:
    """The interface is removed at each pause, and made anew when the device goes on."""
    options = {**OPTIONS, "namespace": outside.name, "offload": offload, "end": end}
    with LoopbackServer(describe("network", network=options), libvfio_user) as server:
        service = Service(server)
        serving = inside.start("transfer", streams=3)
        client = outside.start("transfer", mode="connect", host=GUEST, streams=3)
        moved = 0
        for _ in range(4):
            until(lambda: client.progress().get("slowest", 0) > moved + 100_000, "bytes to move")  # noqa: B023
            server.command("pause")
            assert outside.interfaces() == []
            server.command("resume")
            assert outside.interfaces() == ["host0"]
            moved = client.progress()["slowest"]
        until(lambda: client.progress()["slowest"] > moved + 100_000, "bytes to move")
        client.stop()
        ours, theirs = client.result(), serving.result()
        agree(ours, theirs)
        state = status(server)
        print(f"drained {state['drained']}, announced {state['announced']}")
        assert state["announced"] >= 4
        service.end()


def test_link_state_is_mirrored(libvfio_user: Library, outside: Namespace, inside: Namespace) -> None:
    def carrier(where: Namespace, name: str) -> Any:
        def look(netlink: Any) -> Any:
            found = netlink.link_lookup(ifname=name)
            return netlink.get_links(found[0])[0].get_attr("IFLA_CARRIER") if found else None

        return where.configure(look)

    options = {**OPTIONS, "namespace": outside.name}
    description = describe("network", "echo", network=options)
    with LoopbackServer(description, libvfio_user) as server:
        service = Service(server)
        until(lambda: carrier(inside, "vmnet0") == 1 and carrier(outside, "host0") == 1, "the link")
        server.command("provider", name="network", command="link", arguments={"state": "down"})
        until(lambda: carrier(inside, "vmnet0") == 0 and carrier(outside, "host0") == 0, "no link")
        server.command("provider", name="network", command="link", arguments={"state": "up"})
        until(lambda: carrier(inside, "vmnet0") == 1 and carrier(outside, "host0") == 1, "the link again")
        # The card goes, and comes back: the interface of the guest's stays.
        assert server.command("rescind", name="network")["released"]
        until(lambda: carrier(inside, "vmnet0") == 0, "no link without a card")
        assert outside.interfaces() == [] and inside.interfaces() == ["vmnet0"]
        plain = {"kind": "network", "name": "network", "instance": description.providers[0].instance}
        server.command("offer", provider={**plain, "options": options})
        until(lambda: carrier(inside, "vmnet0") == 1, "the link of the new card")
        result = inside.start("ping", host=HOST, count=3, interval=0.01).result()
        assert result["received"] == 3
        assert service.end()["reopened"] == 1


def test_an_interface_that_somebody_removes(libvfio_user: Library, outside: Namespace, inside: Namespace) -> None:
    options = {**OPTIONS, "namespace": outside.name}
    with LoopbackServer(describe("network", network=options), libvfio_user) as server:
        service = Service(server)
        assert outside.start("ping", host=GUEST, count=1).result()["received"] == 1
        outside.configure(lambda netlink: netlink.link("del", ifname="host0"))
        inside.start("transfer", mode="connect", host=HOST, appear_seconds=0.5)
        until(lambda: not status(server)["present"], "the provider to notice")
        server.command("pause")
        server.command("resume")
        assert outside.start("ping", host=GUEST, count=1).result()["received"] == 1
        service.end()


# ---- hostile guests --------------------------------------------------------------------------------------------------


def test_network_survives_a_hostile_guest(libvfio_user: Library, outside: Namespace) -> None:
    options = {**OPTIONS, "namespace": outside.name, "queues": 2, "window_kib": 64}
    with LoopbackServer(describe("network", network=options), libvfio_user) as server:
        with VmbusDriver(server.function()) as driver:
            held: list[Any] = []
            channel = driver.client_channel(NETWORK_TYPE, ring_pages_in=32, ring_pages_out=32)
            channel.set_process_packet_callbacks(lambda _, completion, payload: held.append(completion))
            driver.enable(channel)

            def ask(message: bytes) -> bytes:
                replies: list[bytes] = []
                packet: Packet = channel.allocate_packet()
                packet.completion_routine = lambda packet, _, reply: replies.append(reply)
                packet.send(message)
                driver.run_until(lambda: bool(replies), 10, "an answer")
                return replies[0]

            good = bytes(10) + b"\xff" * 6 + MAC + b"\x88\xb5" + bytes(46)
            assert parse_status(ask(pack_frames([good]))) == Status.NO_HELLO
            assert parse_nic(ask(Hello(queues=2).pack())) is not None
            assert parse_status(ask(pack_frames([good]))) == Status.OK
            segments = struct.pack("<BBHHHH", 1, 1, 54, 1400, 34, 16) + good[10:]
            for frame in (
                good[:20],
                bytes(10) + good[10:] + bytes(60000),
                struct.pack("<BBHHHH", 1, 1, 65535, 1, 65535, 65535) + good[10:],
                struct.pack("<BBHHHH", 255, 255, 0, 0, 0, 0) + good[10:],
            ):
                assert parse_status(ask(pack_frames([frame]))) == Status.INVALID, frame[:10]
            ask(pack_frames([segments + bytes(65000)]))  # well formed; there is no TCP in it, as the kernel will find
            for count in (0, 2, 3, 0xFFFF_FFFF):
                assert parse_status(ask(Queues(count).pack())) == Status.INVALID
            for message in (b"", b"\xff" * 60000, struct.pack("<II", 3, 256) + bytes(100)):
                assert parse_status(ask(message)) != Status.OK

            # A flood, while the guest completes nothing of what it gets.
            def flood(netlink: Any) -> None:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                    sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                    for number in range(500):
                        sender.sendto(number.to_bytes(4, "big") + bytes(1000), ("192.0.2.255", 9))

            outside.configure(flood)
            done: list[int] = []
            for _ in range(2000):
                packet = channel.allocate_packet()
                packet.completion_routine = lambda packet, status, _: done.append(status)
                packet.send(pack_frames([good] * 50))
            driver.run_until(lambda: len(done) == 2000, 60, "the flood to be taken")
            state = status(server)
            assert held and state["queues"][0]["outstanding"] < (64 << 10) + 70_000
            assert state["to_host"] >= 100_000
            # A pause needs nothing of this guest.
            server.command("pause")
            server.command("resume")
            for completion in held:
                completion.complete()
        with VmbusDriver(server.function()) as driver:
            channel = driver.client_channel(NETWORK_TYPE, ring_pages_in=32, ring_pages_out=32)
            channel.set_process_packet_callbacks(lambda _, completion, payload: completion.complete())
            driver.enable(channel)


def test_mtus_without_end_are_one_change_at_a_time(
    libvfio_user: Library, outside: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest says HELLO faster than an interface can be changed: a pause waits for no more than two changes."""
    asked: list[int] = []
    go = threading.Event()

    def slowly(settings: Settings, mtu: int) -> None:
        asked.append(mtu)
        assert go.wait(10)
        set_mtu(settings, mtu)

    monkeypatch.setattr("vmbus.providers.network.card.set_mtu", slowly)
    description = describe("network", network={**OPTIONS, "namespace": outside.name})
    with LoopbackServer(description, libvfio_user) as server, VmbusDriver(server.function()) as driver:
        channel = driver.client_channel(NETWORK_TYPE, ring_pages_in=32, ring_pages_out=32)
        channel.set_process_packet_callbacks(lambda _, completion, payload: completion.complete())
        driver.enable(channel)
        answers: list[bytes] = []
        for number in range(201):
            packet: Packet = channel.allocate_packet()
            packet.completion_routine = lambda packet, _, reply: answers.append(reply)
            packet.send(Hello(mtu=1000 + number).pack())
        driver.run_until(lambda: len(answers) == 201, 10, "answers")
        assert asked == [1000]
        go.set()
        server.command("pause", seconds=5.0)
        assert asked == [1000, 1200]
        server.command("resume")
        (mtu,) = outside.configure(
            lambda link: [one.get_attr("IFLA_MTU") for one in link.get_links(*link.link_lookup(ifname="host0"))]
        )
        assert mtu == 1200


def test_it_is_announced_where_it_runs_and_not_before(
    libvfio_user: Library, outside: Namespace, inside: Namespace
) -> None:
    """A destination that has everything, but still waits for the decision, draws no frames to itself."""
    description = describe("network", network={**OPTIONS, "namespace": outside.name})

    def announcements(listener: socket.socket) -> int:
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                count += listener.recv(2048)[6:14] == MAC + b"\x80\x35"
        return count

    # On all interfaces of the namespace, those to come included.
    listener = in_namespace(
        outside.name, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(3))
    )
    with listener, LoopbackServer(description, libvfio_user) as source:
        driver = VmbusDriver(source.function())
        channel = driver.client_channel(NETWORK_TYPE, ring_pages_in=32, ring_pages_out=32)
        driver.enable(channel)
        channel.allocate_packet().send(Hello().pack())
        until(lambda: (driver.step(0.001), status(source)["guest"])[1], "the card to have a guest")
        state = source.save()
        config = bytes.fromhex(source.command("pci")["config"])
        assert outside.interfaces() == []
        with LoopbackServer(description, libvfio_user, restore=state) as destination:
            driver.function.reconnect(destination.socket_path, config)
            destination.command("restore-finish", frozen=True)
            assert outside.interfaces() == ["host0"]
            time.sleep(0.05)  # nothing shall happen meanwhile
            assert announcements(listener) == 0 and status(destination)["announced"] == 0
            destination.command("resume")
            until(lambda: announcements(listener), "the announcement")
            driver.close(graceful=False)
