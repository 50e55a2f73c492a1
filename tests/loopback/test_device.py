"""The whole device over the real transport: memory of odd shapes, and descriptors beside it."""

import random
import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from support import pace
from support.traffic import PAGE, Echo, Traffic
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.transport.library import Library
from vmbus.wire.workload import BURST_TYPE, echo_request, parse_echo_reply, transform
from vmbus_guest.driver import VmbusDriver


@pytest.fixture
def server(libvfio_user: Library) -> Iterator[LoopbackServer]:
    with LoopbackServer(describe("echo", "burst"), libvfio_user) as server:
        yield server


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
