"""Guests that die, lie and take their memory back, over the real transport: the server serves on."""

import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.traffic import PAGE, Burst, Echo, Traffic
from vmbus.ring import WRITE_INDEX
from vmbus.testkit.loopback.client import RemoteError
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.transport.library import Library
from vmbus.wire.gpa import GpaRange, pack_ranges
from vmbus.wire.synic import CONTROL_RESET, Register
from vmbus.wire.workload import echo_request
from vmbus_guest.driver import VmbusDriver


@pytest.fixture
def server(libvfio_user: Library) -> Iterator[LoopbackServer]:
    with LoopbackServer(describe("echo", "burst", echo={"hold": 5, "hold_seconds": 0.01}), libvfio_user) as server:
        yield server


def works(driver: VmbusDriver, count: int = 200) -> None:
    """A fresh pair of channels on the driver does its work."""
    traffic = Traffic(driver)
    traffic.start(count, count)
    traffic.finish()


# ---- memory that goes away -------------------------------------------------------------------------------------------


class Separate:
    """A function that gives every buffer mappings of its own."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def allocate(self, size: int) -> Any:
        return self.function.allocate_permuted(range(size // PAGE))


@pytest.mark.parametrize("taken", ["rings", "external"])
def test_memory_taken_back_under_use_costs_one_channel_at_most(server: LoopbackServer, taken: str) -> None:
    function = Separate(server.function())
    driver = VmbusDriver(function)
    traffic = Traffic(driver, hold=0, ring_pages_in=6, ring_pages_out=6)
    traffic.start(2000, 4000, size=60)
    traffic.some(random.Random(9))
    buffer = driver.link_of(traffic.echo.channel).rings if taken == "rings" else traffic.echo.memory
    function.unmap_buffer(buffer)
    driver.run_until(lambda: traffic.burst.finished, 20, "the other channel's traffic")
    traffic.burst.check()
    driver.function.barrier()
    while driver.step(0.0):
        driver.function.barrier()
    if taken == "rings":
        assert len(driver.rescinded) == 1
        again = Echo(driver)
        again.start(100)
        driver.run_until(lambda: again.finished, 10, "echoes on the channel that was offered anew")
        again.check()
    else:
        assert driver.rescinded == []
        driver.run_until(lambda: traffic.echo.finished, 20, "all requests to be answered, if only with an error")
        assert traffic.echo.tally.corrupted > 0 and traffic.echo.tally.lost == 0
    driver.close(graceful=False)


def test_memory_taken_back_and_forth_at_random(server: LoopbackServer) -> None:
    choose = random.Random(11)
    function = server.function()
    for _ in range(12):
        driver = VmbusDriver(function)
        traffic = Traffic(driver, ring_pages_in=2, ring_pages_out=2)
        traffic.start(500, 500)
        for _ in range(choose.randrange(4)):
            driver.step(0.0)
        for iova, size in choose.sample(sorted(function.maps.items()), len(function.maps)):
            if choose.random() < 0.6:
                function.unmap(iova, size)
        function.write32(Register.CONTROL, CONTROL_RESET)
    with VmbusDriver(function) as driver:
        works(driver)


# ---- rings full of lies ----------------------------------------------------------------------------------------------


def descriptor(kind: int, offset8: int, len8: int, flags: int = 1, transaction: int = 1) -> bytes:
    return struct.pack("<HHHHQ", kind, offset8, len8, flags, transaction)


def put(words: bytes) -> Callable[[memoryview, int], None]:
    """A raw packet at the guest's write index, published whatever it is."""

    def write(ring: memoryview, size: int) -> None:
        (index,) = struct.unpack_from("<I", ring, WRITE_INDEX)
        data = words + bytes(-len(words) % 8) + bytes(8)
        for number, value in enumerate(data):
            ring[PAGE + (index + number) % size] = value
        struct.pack_into("<I", ring, WRITE_INDEX, (index + len(data)) % size)

    return write


def index(value: int) -> Callable[[memoryview, int], None]:
    return lambda ring, size: struct.pack_into("<I", ring, WRITE_INDEX, value)


LIES = {
    "odd index": index(12),
    "index beyond the ring": index(1 << 20),
    "largest index": index(0xFFFFFFF8),
    "unknown type": put(descriptor(5, 2, 4) + bytes(16)),
    "type 0": put(bytes(32)),
    "offset before the payload": put(descriptor(6, 1, 4) + bytes(16)),
    "offset behind the end": put(descriptor(6, 5, 4) + bytes(16)),
    "length 0": put(descriptor(6, 2, 0) + bytes(16)),
    "length behind what was written": put(descriptor(6, 2, 60) + bytes(16)),
    "largest length": put(descriptor(6, 2, 0xFFFF) + bytes(16)),
    "unknown flags": put(descriptor(6, 2, 4, flags=2) + bytes(16)),
    "a completion for nothing": put(descriptor(11, 2, 4, flags=0, transaction=77) + bytes(16)),
    "half a descriptor": put(bytes(8)),
    "external data without ranges": put(descriptor(9, 2, 4) + bytes(16)),
}

# Bad external data: the channel stays, the request is answered with an error.
EXTERNAL = {
    "no ranges": struct.pack("<II", 0, 0),
    "a million ranges": struct.pack("<II", 0, 1 << 20),
    "a range that is cut": struct.pack("<II", 0, 1) + struct.pack("<II", PAGE * 3, 0) + bytes(8),
    "an empty range": struct.pack("<II", 0, 1) + struct.pack("<IIQ", 0, 0, 0),
    "an offset beyond the page": struct.pack("<II", 0, 1) + struct.pack("<IIQ", 8, PAGE, 0),
    "4 GiB": struct.pack("<II", 0, 1) + struct.pack("<IIQ", 0xFFFFFFFF, 0, 0),
    "a page that is not there": struct.pack("<II", 0, 1) + pack_ranges([GpaRange(8, 0, (5,))]),
    "an impossible page": struct.pack("<II", 0, 1) + struct.pack("<IIQ", 8, 0, (1 << 64) - 1),
}


@pytest.fixture
def two(server: LoopbackServer) -> Iterator[tuple[VmbusDriver, Traffic]]:
    """Traffic on both channels, of which one will be broken while the other must run on."""
    driver = VmbusDriver(server.function())
    traffic = Traffic(driver, hold=0, ring_pages_in=4, ring_pages_out=4)
    traffic.start(0, 3000, size=60)
    yield driver, traffic
    driver.close(graceful=False)


def break_ring(driver: VmbusDriver, traffic: Traffic, lie: Callable[[memoryview, int], None]) -> None:
    link = driver.link_of(traffic.echo.channel)
    size = traffic.echo.channel.ring_pages_out * PAGE
    lie(link.rings.view[: PAGE + size], size)
    driver.function.write32(Register.SIGNAL_EVENT, link.offer.connection_id)


def test_a_broken_ring_costs_its_channel_alone(two: tuple[VmbusDriver, Traffic]) -> None:
    """In each way, one after another; each time it is offered anew, and works."""
    driver, traffic = two
    for number, (name, lie) in enumerate(LIES.items(), 1):
        break_ring(driver, traffic, lie)
        driver.run_until(lambda number=number: len(driver.rescinded) == number, 10, f"the rescind after: {name}")
        assert driver.failures == [], name
        echo = traffic.echo = Echo(driver, ring_pages_in=4, ring_pages_out=4)
        echo.start(20)
        driver.run_until(lambda echo=echo: echo.finished, 10, f"echoes on the channel that was offered anew: {name}")
        echo.check()
    driver.run_until(lambda: traffic.burst.finished, 20, "the other channel's traffic")
    traffic.burst.check()


def test_bad_external_data_is_answered_with_an_error(two: tuple[VmbusDriver, Traffic]) -> None:
    driver, traffic = two
    payload = echo_request(0, b"data", inline=False)
    for transaction, (name, body) in enumerate(EXTERNAL.items(), 1 << 40):
        head = descriptor(9, 2 + len(body) // 8, 2 + (len(body) + len(payload)) // 8, transaction=transaction)
        answers: list[bytes] = []
        waiting = traffic.echo.channel.allocate_packet()
        waiting.completion_routine = lambda packet, status, reply, answers=answers: answers.append(reply)
        traffic.echo.channel.flow.sent[transaction] = waiting
        break_ring(driver, traffic, put(head + body + payload))
        driver.run_until(lambda answers=answers: bool(answers), 10, f"an answer to {name}")
        sequence, _, _, status, _ = struct.unpack_from("<QIIII", answers[0])
        assert (sequence, status) == (0, 2), name
    driver.run_until(lambda: traffic.burst.finished, 20, "the other channel's traffic")
    traffic.burst.check()
    assert driver.rescinded == []


# ---- registers -------------------------------------------------------------------------------------------------------


def test_registers_of_the_wrong_size_and_place(server: LoopbackServer) -> None:
    driver = VmbusDriver(server.function())
    choose = random.Random(6)
    for _ in range(500):
        offset = choose.randrange(4096)
        size = choose.choice([1, 2, 4, 8])
        if offset <= Register.CONTROL < offset + size or offset + size > 4096:
            continue
        data = choose.randbytes(size)
        try:
            driver.function.client.region_write(0, offset, data, posted=choose.random() < 0.5)
            driver.function.client.region_read(0, offset, size)
        except RemoteError:
            pass  # a refusal is an answer, too
    with VmbusDriver(driver.function) as again:
        works(again)


def test_two_channels_one_burst(server: LoopbackServer) -> None:
    """A second start while a run is going on is refused by the provider, in the protocol's own words."""
    driver = VmbusDriver(server.function())
    burst = Burst(driver, hold=0)
    burst.start(2000)
    answers: list[bytes] = []
    packet = burst.channel.allocate_packet()
    packet.completion_routine = lambda packet, status, reply: answers.append(reply)
    packet.send(struct.pack("<IIQII", 1, 10, 10, 10, 0))
    driver.run_until(lambda: bool(answers), 10, "the refusal")
    assert int.from_bytes(answers[0][:4], "little") == 2
    driver.run_until(lambda: burst.finished, 20, "the run")
    burst.check()
    driver.close()
