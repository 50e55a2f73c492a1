"""The whole device over the real transport: both workloads in every shape of memory."""

import random
import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from support import pace
from support.traffic import PAGE, Burst, Echo, Traffic
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.transport.library import Library
from vmbus.wire.workload import BURST_TYPE, echo_request, parse_echo_reply, transform
from vmbus_guest.driver import VmbusDriver

pytestmark = pytest.mark.loopback


@pytest.fixture
def server(libvfio_user: Library) -> Iterator[LoopbackServer]:
    with LoopbackServer(describe("echo", "burst"), libvfio_user) as server:
        yield server


def wait(driver: VmbusDriver, *parts: Echo | Burst) -> None:
    driver.run_until(lambda: all(part.finished for part in parts), 20, "the workload")
    for part in parts:
        part.check()


@pytest.mark.parametrize(("external", "size"), [(0, 8), (1, 3000), (2, 3000)])
def test_echo(server: LoopbackServer, external: int, size: int) -> None:
    with VmbusDriver(server.function()) as driver:
        echo = Echo(driver, window=50, size=size, external=external)
        echo.start(1000)
        wait(driver, echo)
    status = server.command("status")
    assert status["providers"]["echo"]["tally"]["completed"] == 1000
    assert status["incoming_held"] == 0


@pytest.mark.parametrize("pages", [1, 2, 64])
def test_burst_with_a_full_ring(server: LoopbackServer, pages: int) -> None:
    with VmbusDriver(server.function()) as driver:
        burst = Burst(driver, hold=10, ring_pages_in=pages, ring_pages_out=1)
        burst.start(2000, size=250, window=500)
        most = 0
        while not burst.finished:
            driver.step(1.0)
            most = max(most, server.on_loop(lambda: server.server.providers[1].channel.packets_queued))
            if not driver._ready:
                while burst.held:
                    burst.complete_one()
        burst.check()
        assert pages == 64 or most > 100, "the ring was full"


def test_both_at_once_and_again_on_reopened_channels(server: LoopbackServer) -> None:
    with VmbusDriver(server.function()) as driver:
        traffic = Traffic(driver, ring_pages_in=2, ring_pages_out=2)
        traffic.start(1500, 1500)
        traffic.finish()
        driver.close_channel(traffic.echo.channel)
        driver.close_channel(traffic.burst.channel)
        traffic = Traffic(driver, ring_pages_in=1, ring_pages_out=1)
        traffic.start(300, 300)
        traffic.finish()


def test_external_data_of_scattered_pages(server: LoopbackServer) -> None:
    choose = random.Random(1)
    function = server.function()
    with VmbusDriver(function) as driver:
        echo = Echo(driver, window=1)
        for number in range(20):
            order = list(range(7))
            choose.shuffle(order)
            buffer = function.allocate_permuted(order)
            offset = choose.randrange(PAGE)
            length = choose.randrange(1, 6 * PAGE)
            data = choose.randbytes(length)
            buffer.view[offset : offset + length] = data
            before = bytes(buffer.view)
            # Cut into pieces of any size, in one packet.
            cuts = sorted({0, length, *(choose.randrange(length) for _ in range(4))})
            pieces = [(buffer.iova + offset + a, b - a) for a, b in pairwise(cuts)]
            replies: list[bytes] = []
            packet = echo.channel.allocate_packet()
            packet.completion_routine = lambda packet, status, reply, replies=replies: replies.append(reply)
            packet.send(echo_request(number, data, inline=False), external=pieces)
            driver.run_until(lambda replies=replies: bool(replies), 10, "the answer")
            parsed = parse_echo_reply(replies[0])
            assert parsed is not None and parsed.status == 0
            expected = before[:offset] + transform(data, number) + before[offset + length :]
            assert bytes(buffer.view) == expected
            function.unmap_buffer(buffer)
            function.free(buffer)


def test_rings_across_regions(libvfio_user: Library) -> None:
    with LoopbackServer(describe("echo", "burst"), libvfio_user) as server:
        # 16 regions at most with the older library.
        function = server.function(ram_size=16 * 16 * PAGE, map_size=16 * PAGE)
        with VmbusDriver(function) as driver:
            traffic = Traffic(driver, ring_pages_in=20, ring_pages_out=21)
            assert traffic.echo.channel.ring_pages_in == 20
            traffic.start(1000, 1000, size=1000, window=200)
            traffic.finish()
            assert len(function.maps) > 5


def test_clients_come_and_go(server: LoopbackServer) -> None:
    for number in range(4):
        function = server.function()
        driver = VmbusDriver(function)
        traffic = Traffic(driver)
        traffic.start(200, 200)
        if number % 2:
            function.abandon()  # in mid-traffic, without a word
        else:
            traffic.finish()
            driver.close()

    def nothing_is_left() -> bool:
        status = server.command("inspect")
        return bool(status["in_flight"].held == 0 and status["memory"].regions == 0)

    pace.until(nothing_is_left, "the server to notice that the last client is gone")


def test_a_watched_descriptor_ends_a_step(libvfio_user: Library) -> None:
    with LoopbackServer(describe("echo"), libvfio_user) as server, VmbusDriver(server.function()) as driver:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        got: list[bytes] = []
        driver.watch(ours.fileno(), lambda: got.append(ours.recv(8)))
        started = time.monotonic()
        threading.Timer(0.05, lambda: theirs.send(b"hello")).start()
        driver.run_until(lambda: bool(got), 10, "the watched socket")
        assert time.monotonic() - started < pace.seconds(5)
        assert got == [b"hello"] and not driver.step(0.0)
        driver.unwatch(ours.fileno())
        theirs.send(b"nobody")
        assert not driver.step(0.0) and got == [b"hello"]
        # An interrupt still ends a step.
        burst = {"kind": "burst", "name": "burst", "instance": "00000000-0000-4000-8000-0000000000aa"}
        server.command("offer", provider=burst)
        driver.run_until(lambda: driver.bus.find_offer(BURST_TYPE, None, 0) is not None, 10, "the new offer")
        ours.close()
        theirs.close()
