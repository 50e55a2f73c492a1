"""The provider `network` with real TAP interfaces, on a real device server; a guest of ours speaks as Linux does."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support import pace
from support.namespace import Namespace
from support.namespace import outside as outside
from support.network_guest import Ends, NetworkGuest
from vmbus.providers.network.card import WHOLE_FRAME
from vmbus.providers.network.interface import Settings, in_namespace, set_mtu
from vmbus.providers.network.offload import ones_sum
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.testkit.loopback.pair import DriverSide
from vmbus.transport.library import Library
from vmbus.wire import nvsp, rndis
from vmbus_guest.driver import VmbusDriver

HOST, GUEST = "192.0.2.1", "192.0.2.2"
MAC = bytes.fromhex("020000000001")
OPTIONS = {"mac": MAC.hex(":"), "interface": "host0", "address": f"{HOST}/24"}
ECHO = 7777


def until(driver: VmbusDriver, condition: Callable[[], Any], what: str) -> None:
    driver.run_until(lambda: bool(condition()), 20, what)


def longest(netlink: Any) -> Any:
    (link,) = netlink.get_links(netlink.link_lookup(ifname="host0")[0])
    return link.get_attr("IFLA_GSO_MAX_SIZE")


def status(server: LoopbackServer) -> dict[str, Any]:
    return dict(server.command("status")["providers"]["network"])


class EchoGuest(NetworkGuest):
    """It answers ARP, and sends UDP datagrams back to where they came from, with their sums left to the card."""

    SUCCESS = nvsp.Status.SUCCESS
    echoed = 0

    def answer(self) -> None:
        """Everything that has come since."""
        frames, self.frames = self.frames, []
        for one in frames:
            whole = one[10:]
            kind = whole[12:14]
            if kind == b"\x08\x06" and whole[20:22] == b"\0\1" and whole[38:42] == socket.inet_aton(GUEST):
                reply = whole[6:12] + MAC + whole[12:20] + b"\0\2" + MAC + whole[38:42] + whole[22:32]
                assert self.send(reply.ljust(60, b"\0")) == self.SUCCESS
            elif kind == b"\x08\0" and whole[23] == 17 and whole[36:38] == struct.pack("!H", ECHO):
                self._echo(whole)

    def _echo(self, whole: bytes) -> None:
        length = struct.unpack_from("!H", whole, 38)[0]
        segment = whole[34 : 34 + length]
        pseudo = whole[26:34] + struct.pack("!HH", 17, length)
        assert segment[6:8] == b"\0\0" or (ones_sum(segment) + ones_sum(pseudo)) % 0xFFFF == 0, "the sum is right"
        back = bytearray(whole[6:12] + MAC + whole[12:26] + whole[30:34] + whole[26:30] + whole[36:38] + whole[34:36])
        back += whole[38:40] + struct.pack("!H", ones_sum(pseudo)) + whole[42 : 34 + length]
        wish = rndis.ppi(rndis.Ppi.CHECKSUM, rndis.Checksum.IPV4 | rndis.Checksum.UDP | 34 << 16)
        shape = 1 + self.echoed % 3
        if shape == 1 and len(back) > 4000:
            shape = 2
        assert self.send(bytes(back), shape=shape, information=wish) == self.SUCCESS
        self.echoed += 1


class Caller:
    """A program on the host that sends datagrams with numbers, and takes what comes back."""

    def __init__(self, outside: Namespace) -> None:
        self.socket = in_namespace(outside.name, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self.sent = 0
        self.back: list[int] = []

    def send(self, count: int, size: int = 200) -> None:
        for _ in range(count):
            self.socket.sendto(struct.pack("!I", self.sent) + bytes(size), (GUEST, ECHO))
            self.sent += 1

    def receive(self) -> int:
        """How many have come back so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.back.append(struct.unpack_from("!I", self.socket.recv(65536))[0])
        return len(self.back)

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def caller(outside: Namespace) -> Iterator[Caller]:
    found = Caller(outside)
    yield found
    found.close()


def exchange(driver: VmbusDriver, guest: EchoGuest, caller: Caller, count: int, size: int = 200) -> None:
    """So many datagrams there and back, each once and in order."""
    already = len(caller.back)
    caller.send(count, size)

    def back() -> bool:
        guest.answer()
        return caller.receive() >= already + count

    until(driver, back, f"{count} datagrams of {size} bytes to come back")
    assert caller.back[already:] == list(range(caller.sent - count, caller.sent))


def reach(driver: VmbusDriver, guest: EchoGuest, caller: Caller) -> None:
    """One datagram there and back, by whatever number of tries: a bridge throws away what comes before the kernel has
    noticed that one of its ports is up, which may take it a second. None is under way any more when this returns."""
    tried = 0.0
    already = len(caller.back)

    def back() -> bool:
        nonlocal tried
        guest.answer()
        if caller.receive() > already and caller.back[-1] == caller.sent - 1:
            return True
        if time.monotonic() > tried + 0.1:
            caller.send(1)
            tried = time.monotonic()
        return False

    until(driver, back, "a datagram to come back, after the link has")


@pytest.mark.parametrize("end", ["tap", "veth"])
@pytest.mark.parametrize("offload", [True, False])
def test_datagrams_go_there_and_back(
    libvfio_user: Library, outside: Namespace, caller: Caller, end: str, offload: bool
) -> None:
    options = {**OPTIONS, "namespace": outside.name, "mtu": 9000, "end": end, "offload": offload}
    with LoopbackServer(describe("network", network=options), libvfio_user) as server:
        with VmbusDriver(server.function()) as driver:
            guest = _guest(driver, offload, mtu=9000)
            exchange(driver, guest, caller, 100)
            exchange(driver, guest, caller, 50, 8900)
            if end == "tap":
                assert outside.configure(longest) == WHOLE_FRAME
            state = status(server)
            assert state["refused"] == state["queues"][0]["lost"] == 0 and state["guest"]["mtu"] == 9000
            guest.shut_down()
        assert status(server)["guest"]["receive_buffer"] == 0
    assert outside.interfaces() == []


class PlainEcho(EchoGuest):
    """The same for a card without offloads."""

    def _echo(self, whole: bytes) -> None:
        back = whole[6:12] + MAC + whole[12:26] + whole[30:34] + whole[26:30] + whole[36:38] + whole[34:36]
        # The addresses and ports are swapped, which leaves the sum as it is.
        assert self.send(back + whole[38:], shape=2) == self.SUCCESS


def _guest(driver: VmbusDriver, offload: bool = True, **arguments: Any) -> EchoGuest:
    return (EchoGuest if offload else PlainEcho)(Ends(DriverSide(driver)), **arguments)


def test_network_survives_saves_into_fresh_servers(libvfio_user: Library, outside: Namespace, caller: Caller) -> None:
    """Into fresh servers, with datagrams on their way in every direction; none is lost, none comes twice."""
    description = describe("network", network={**OPTIONS, "namespace": outside.name})
    server = LoopbackServer(description, libvfio_user)
    with contextlib.ExitStack() as stack:
        stack.enter_context(server)
        function = server.function()
        driver = VmbusDriver(function)
        guest = _guest(driver)
        sent = drained = 0
        for _ in range(4):
            exchange(driver, guest, caller, 5)  # the interface is a new one, which asks for the guest's address
            before = len(caller.back)
            guest.holding = True
            caller.send(30)
            until(driver, lambda: len(guest.frames) >= 20, "frames that the guest holds")
            caller.send(30)  # these are in the interface, the ring, or the guest's hands at the save
            state = server.save()
            sent += int(status(server)["queues"][0]["in_flight"])
            server = LoopbackServer(description, libvfio_user, restore=state)
            stack.enter_context(server)
            function.reconnect(server.socket_path, state.config)
            server.command("restore-finish")
            guest.release()

            def back() -> bool:
                guest.answer()
                return caller.receive() >= before + 60  # noqa: B023

            until(driver, back, "all datagrams to come back")
            drained += int(status(server)["drained"])
        assert caller.back == list(range(caller.sent)) and sent > 0
        assert status(server)["announced"] >= 1
        driver.close(graceful=False)


def test_several_queues_come_and_go(libvfio_user: Library, outside: Namespace, caller: Caller) -> None:
    """Sub-channels are offered when the guest asks for them, over a save, and for the next guest again."""
    description = describe("network", network={**OPTIONS, "namespace": outside.name, "queues": 3})
    others = [Caller(outside) for _ in range(12)]
    with contextlib.ExitStack() as stack:
        for one in others:
            stack.callback(one.close)
        server = stack.enter_context(LoopbackServer(description, libvfio_user))
        function = server.function()
        driver = VmbusDriver(function)
        guest = _guest(driver, receive=4 << 20)
        assert guest.open_queues(8) == 3
        for one in (caller, *others):
            exchange(driver, guest, one, 5)
        assert len(guest.by_channel) == 3, "flows are spread"
        state = server.save()
        server = stack.enter_context(LoopbackServer(description, libvfio_user, restore=state))
        function.reconnect(server.socket_path, state.config)
        server.command("restore-finish")
        guest.by_channel.clear()
        for one in (caller, *others):
            exchange(driver, guest, one, 5)
        assert len(guest.by_channel) == 3
        guest.shut_down()
        until(driver, lambda: (driver.step(0.01), len(status(server)["queues"]) == 1)[1], "the others to be withdrawn")
        again = _guest(driver, receive=4 << 20)
        assert again.open_queues(2) == 2
        for one in (caller, *others):
            exchange(driver, again, one, 2)
        assert len(again.by_channel) == 2
        driver.close(graceful=False)


def test_a_switchover_copies_what_was_written_and_not_the_whole_buffer(
    libvfio_user: Library, outside: Namespace, caller: Caller
) -> None:
    description = describe("network", network={**OPTIONS, "namespace": outside.name})
    with LoopbackServer(description, libvfio_user) as server, VmbusDriver(server.function()) as driver:
        guest = _guest(driver, receive=16 << 20, send=1 << 20)
        exchange(driver, guest, caller, 5)
        server.command("log-start")
        exchange(driver, guest, caller, 300, 1000)
        pages = server.on_loop(lambda: sum(size for _, size in server.server.device.memory.dirty_runs()) >> 12)
        server.command("log-stop")
        assert 0 < pages < 400, f"{pages} of the {17 << 8} pages of its buffers"


@pytest.mark.parametrize("end", ["tap", "veth"])
def test_fault_d11_network_survives_an_interface_that_goes_down_or_away(
    libvfio_user: Library, outside: Namespace, caller: Caller, end: str
) -> None:
    """Others switch it off, remove it, or remove its bridge: the guest has no link until it is back."""

    def bridge(link: Any) -> None:
        link.link("add", ifname="br0", kind="bridge")
        (index,) = link.link_lookup(ifname="br0")
        link.addr("add", index=index, address=HOST, prefixlen=24)
        link.link("set", index=index, state="up")

    def switch(state: str) -> None:
        outside.configure(lambda link: link.link("set", index=link.link_lookup(ifname="host0")[0], state=state))

    outside.configure(bridge)
    options = {"mac": OPTIONS["mac"], "interface": "host0", "bridge": "br0", "namespace": outside.name, "end": end}
    description = describe("network", network=options)
    with LoopbackServer(description, libvfio_user) as server, VmbusDriver(server.function()) as driver:
        guest = _guest(driver)
        exchange(driver, guest, caller, 10)

        def trouble(wanted: str | None) -> None:
            linked = rndis.Status.MEDIA_DISCONNECT if wanted else rndis.Status.MEDIA_CONNECT
            until(driver, lambda: status(server)["trouble"] == wanted, f"trouble {wanted!r}")
            until(driver, lambda: guest.link and guest.link[-1] == linked, "the guest to be told")
            if not wanted:
                reach(driver, guest, caller)

        switch("down")
        trouble("it is switched off")
        assert guest.send(bytes(60)) == nvsp.Status.SUCCESS, "a frame that is lost is no failure"
        switch("up")
        trouble(None)
        exchange(driver, guest, caller, 10)
        outside.configure(lambda link: link.link("del", ifname="br0"))
        trouble("it is no port of its bridge any more")
        outside.configure(bridge)
        trouble(None)
        exchange(driver, guest, caller, 10)
        outside.configure(lambda link: link.link("del", ifname="host0"))
        trouble("it was removed")
        assert not status(server)["present"] and guest.query(0x00010114) == b"\1\0\0\0"
        assert guest.send(bytes(60)) == nvsp.Status.SUCCESS
        trouble(None)
        exchange(driver, guest, caller, 10)
        assert status(server)["announced"] >= 2
        # While there is none, and another one is just being made, the device pauses, goes on, and ends.
        outside.configure(lambda link: link.link("del", ifname="host0"))
        trouble("it was removed")
        server.command("pause")
        assert outside.interfaces() == ["br0"]
        server.command("resume")
        trouble(None)
        exchange(driver, guest, caller, 10)
        # Without its bridge it cannot be made when the device goes on; the guest goes on all the same.
        outside.configure(lambda link: link.link("del", ifname="br0"))
        server.command("pause")
        server.command("resume")
        trouble("it was removed")
        outside.configure(bridge)
        trouble(None)
        exchange(driver, guest, caller, 10)
        outside.configure(lambda link: link.link("del", ifname="br0"))
    assert outside.interfaces() == []


def test_mtus_without_end_are_one_change_at_a_time(
    libvfio_user: Library, outside: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest asks faster than an interface can be changed: a pause waits for no more than two changes. What is agreed
    upon is set anew at each open."""
    asked: list[int] = []
    go = threading.Event()

    def slowly(settings: Settings, mtu: int) -> None:
        asked.append(mtu)
        assert go.wait(pace.seconds(10))
        set_mtu(settings, mtu)

    def mtu(link: Any) -> Any:
        (found,) = link.get_links(*link.link_lookup(ifname="host0"))
        return found.get_attr("IFLA_MTU")

    monkeypatch.setattr("vmbus.providers.network.card.set_mtu", slowly)
    description = describe("network", network={**OPTIONS, "namespace": outside.name, "mtu": 9000})
    with LoopbackServer(description, libvfio_user) as server, VmbusDriver(server.function()) as driver:
        guest = _guest(driver, upto="init")
        for number in range(201):
            guest.ends.tell(nvsp.pack_message(nvsp.NdisConfig(1014 + number, 0)))
        guest.step_receive()
        assert asked == [1000]
        go.set()
        server.command("pause", seconds=5.0)
        assert asked == [1000, 1200]
        server.command("resume")
        assert outside.configure(mtu) == 1200
        guest.shut_down()
        # The oldest protocol says nothing of an MTU.
        again = _guest(driver, upto="init", version=nvsp.VERSIONS[0])
        for step in ("receive", "send", "initialize"):
            getattr(again, f"step_{step}")()
        until(driver, lambda: outside.configure(mtu) == 1500, "the MTU of a guest that says nothing")
        assert status(server)["guest"]["mtu"] == 1500


def test_it_is_announced_where_it_runs_and_not_before(libvfio_user: Library, outside: Namespace) -> None:
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
        _guest(driver)
        state = source.save()
        assert outside.interfaces() == []
        with LoopbackServer(description, libvfio_user, restore=state) as destination:
            driver.function.reconnect(destination.socket_path, state.config)
            destination.command("restore-finish", frozen=True)
            assert outside.interfaces() == ["host0"]
            for _ in range(20):  # rounds of its loop: nothing shall happen meanwhile
                driver.function.barrier()
            assert announcements(listener) == 0 and status(destination)["announced"] == 0
            destination.command("resume")
            until(driver, lambda: announcements(listener), "the announcement")
            driver.close(graceful=False)
