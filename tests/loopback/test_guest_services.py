"""Services on a real device server: watched descriptors, and channels that come and go."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.multi import MULTI_TYPE, MultiProvider
from vmbus import providers
from vmbus.kmcl.packet import Packet
from vmbus.loopback.harness import LoopbackServer, describe
from vmbus.vfio_user.library import Library
from vmbus_guest import services
from vmbus_guest.driver import VmbusDriver
from vmbus_guest.services.service import Service
from vmbus_guest.testdrivers import CATALOGUE
from vmbus_guest.testdrivers.context import Context, Parameters

pytestmark = pytest.mark.loopback

NEW = {"kind": "multi", "name": "multi", "instance": "00000000-0000-4000-8000-0000000000aa"}


class BridgeService(Service):
    """Sends what comes from a socket to the host, and the answers back."""

    name = "bridge"
    interface_type = MULTI_TYPE
    alive: list[BridgeService] = []  # noqa: RUF012 - for the tests

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self.inside, self.outside = socket.socketpair()
        self.inside.setblocking(False)
        self.opened = 0
        BridgeService.alive.append(self)

    def prepare(self) -> None:
        self.channel.set_state_change_callbacks(started=self._started, closed=self._closed)

    def _started(self, _: object) -> None:
        self.opened += 1
        self.driver.watch(self.inside.fileno(), self._readable)

    def _closed(self, _: object) -> None:
        self.driver.unwatch(self.inside.fileno())

    def _readable(self) -> None:
        packet = self.channel.allocate_packet()
        packet.completion_routine = self._answered
        packet.send(self.inside.recv(64))

    def _answered(self, packet: Packet, status: int, reply: bytes) -> None:
        self.inside.send(reply)
        packet.free()

    def close(self) -> None:
        self.driver.unwatch(self.inside.fileno())
        super().close()


@pytest.fixture(autouse=True)
def bridge(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(providers.PROVIDERS, "multi", MultiProvider)
    entry = services.Entry(__name__, "BridgeService", "a test's")
    monkeypatch.setattr(entry.__class__, "load", lambda self: BridgeService)
    monkeypatch.setitem(services.CATALOGUE, "bridge", entry)
    yield
    for one in BridgeService.alive:
        one.inside.close()
        one.outside.close()
    BridgeService.alive.clear()


def run_in_thread(context: Context, name: str = "services") -> Callable[[], dict[str, Any]]:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(CATALOGUE[name].load()(context))
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def end() -> dict[str, Any]:
        context.stop_requested = True
        thread.join(20)
        if isinstance(results[0], BaseException):
            raise results[0]
        result: dict[str, Any] = results[0]
        return result

    return end


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def the_service() -> BridgeService:
    until(lambda: BridgeService.alive, "the service to be made")
    return BridgeService.alive[-1]


def round_trip(service: BridgeService, text: bytes) -> None:
    service.outside.settimeout(20)
    service.outside.send(text)
    assert service.outside.recv(64).startswith(text)


def test_a_service_outlives_rescinds_and_ends_on_request(libvfio_user: Library) -> None:
    with LoopbackServer(describe("echo"), libvfio_user) as server:
        context = Context({"services": ["bridge"]}, server.function)
        end = run_in_thread(context)
        service = the_service()
        for number in range(3):  # it was there before its device was
            server.command("offer", provider=NEW)
            until(lambda number=number: service.opened == number + 1, "the channel to open")  # type: ignore[misc]
            round_trip(service, b"number %d" % number)
            assert server.command("rescind", name="multi")["released"]
            service.outside.send(b"waits")  # for the next channel
            until(lambda: not service.channel.active, "the channel to be gone")
            service.outside.settimeout(0.05)
            with pytest.raises(TimeoutError):
                service.outside.recv(64)
            server.command("offer", provider=NEW)
            until(lambda number=number: service.opened == number + 2, "the channel to open")  # type: ignore[misc]
            service.outside.settimeout(20)
            assert service.outside.recv(64).startswith(b"waits")
            service.opened -= 1
            assert server.command("rescind", name="multi")["released"]
        result = end()
        assert result["verdict"] == "passed" and result["services"][0]["reopened"] == 6


def test_services_beside_test_drivers_end_with_them(libvfio_user: Library) -> None:
    with LoopbackServer(describe("echo", "multi"), libvfio_user) as server:
        workloads = [{"driver": "bridge"}, {"driver": "echo", "count": 2000, "window": 64}]
        result = CATALOGUE["mixed"].load()(Context({"workloads": workloads}, server.function))
        assert result["verdict"] == "passed", result
        assert BridgeService.alive[0].opened == 1 and result["workloads"][1]["completed"] == 2000


def test_a_watched_descriptor_ends_a_step(libvfio_user: Library) -> None:
    with LoopbackServer(describe("echo"), libvfio_user) as server, VmbusDriver(server.function()) as driver:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        got: list[bytes] = []
        driver.watch(ours.fileno(), lambda: got.append(ours.recv(8)))
        started = time.monotonic()
        threading.Timer(0.05, lambda: theirs.send(b"hello")).start()
        driver.run_until(lambda: bool(got), 10, "the watched socket")
        assert time.monotonic() - started < 5
        assert got == [b"hello"] and not driver.step(0.0)
        room: list[int] = []
        driver.watch_writable(theirs.fileno(), lambda: room.append(1))
        assert driver.step(1.0) and room
        driver.unwatch_writable(theirs.fileno())
        driver.unwatch(ours.fileno())
        theirs.send(b"nobody")
        assert not driver.step(0.0) and got == [b"hello"]
        # An interrupt still ends a step.
        server.command("offer", provider=NEW)
        driver.run_until(lambda: driver.bus.find_offer(MULTI_TYPE, None, 0) is not None, 10, "the new offer")
        ours.close()
        theirs.close()


def test_wrong_names_are_refused(libvfio_user: Library) -> None:
    for parameters, message in (
        ({"services": ["nothing"]}, "no service 'nothing'; there are .*bridge"),
        ({"services": []}, "list of objects"),
        ({"services": [{"service": "bridge", "what": 1}]}, "unknown parameter 'what'"),
    ):
        with pytest.raises(Exception, match=message):
            CATALOGUE["services"].load()(Context(parameters, lambda: pytest.fail("the device was opened")))
