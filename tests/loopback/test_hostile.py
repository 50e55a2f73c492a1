"""Guests that die, lie and take their memory back, over the real transport: the server serves on."""

import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.traffic import PAGE, Burst, Echo, Traffic
from vmbus.bus.server import REFUSED
from vmbus.ring import READ_INDEX, WRITE_INDEX
from vmbus.testkit.loopback.client import RemoteError
from vmbus.testkit.loopback.harness import LoopbackServer, describe
from vmbus.transport.library import Library
from vmbus.wire import messages as m
from vmbus.wire.gpa import GpaRange, pack_ranges, range_for
from vmbus.wire.synic import CONTROL_ENABLE, CONTROL_RESET, STATUS_FAULT, Register
from vmbus.wire.workload import ECHO_TYPE, echo_request
from vmbus_guest.driver import VmbusDriver

pytestmark = pytest.mark.loopback


@pytest.fixture
def server(libvfio_user: Library) -> Iterator[LoopbackServer]:
    with LoopbackServer(describe("echo", "burst", echo={"hold": 5, "hold_seconds": 0.01}), libvfio_user) as server:
        yield server


def inspect(server: LoopbackServer) -> dict[str, Any]:
    return server.command("inspect")


def works(driver: VmbusDriver, count: int = 200) -> None:
    """A fresh pair of channels on the driver does its work."""
    traffic = Traffic(driver)
    traffic.start(count, count)
    traffic.finish()


def say(driver: VmbusDriver, message: Any) -> None:
    driver._post(4, message if isinstance(message, bytes) else m.encode(message))


def settle(driver: VmbusDriver) -> None:
    """Let the server handle all that was said, and hear the answers."""
    driver.function.barrier()
    while driver.step(0.0):
        driver.function.barrier()  # the next message comes when the slot has been emptied


# ---- drivers that die ------------------------------------------------------------------------------------------------


def test_a_killed_driver_and_a_new_one(server: LoopbackServer) -> None:
    """What VFIO does when its process dies: the mappings go, without a goodbye; then somebody opens it again."""
    choose = random.Random(5)
    function = server.function()
    for number in range(8):
        driver = VmbusDriver(function)
        traffic = Traffic(driver, hold=choose.choice([0, 30]), ring_pages_in=1, ring_pages_out=1)
        traffic.start(3000, 3000, size=60)
        for _ in range(choose.randrange(1, 5)):
            traffic.some(choose)
        function.unmap_all()
        if number % 2:
            function.client.reset()  # closing the last descriptor resets the function; it is set up at the next open
            function._set_up(0xFE00_0000)
        assert function.read32(Register.CONTROL) == 0
        status = inspect(server)
        assert status["in_flight"].total == 0
        assert {channel.state for channel in status["channels"]} == {"closed"}
    with VmbusDriver(function) as driver:
        works(driver)


@pytest.mark.parametrize("posted", [True, False])
def test_a_driver_that_resets_in_mid_traffic(server: LoopbackServer, posted: bool) -> None:
    function = server.function(posted_writes=posted)
    for _ in range(5):
        driver = VmbusDriver(function)
        traffic = Traffic(driver, hold=10)
        traffic.start(1000, 1000)
        traffic.some(random.Random(3))
        function.write32(Register.CONTROL, CONTROL_RESET)
    with VmbusDriver(function) as driver:
        works(driver)


def test_contact_in_mid_traffic_is_a_new_start(server: LoopbackServer) -> None:
    driver = VmbusDriver(server.function())
    traffic = Traffic(driver, hold=10)
    traffic.start(1000, 1000)
    traffic.some(random.Random(3))
    driver._links.clear()
    driver.bus.initiate_contact(m.Version.V5_1)
    driver.run_until(lambda: driver.bus.version_response is not None, 10, "the answer")
    driver.bus.request_offers()
    driver.run_until(lambda: driver.bus.all_offers, 10, "the offers")
    works(driver)
    driver.close(graceful=False)


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
    settle(driver)
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


def test_the_synics_pages_taken_back(server: LoopbackServer) -> None:
    function = server.function()
    driver = VmbusDriver(function)
    traffic = Traffic(driver)
    traffic.start(100, 1000)
    traffic.some(random.Random(2))
    function.unmap_buffer(driver._pages)
    assert function.read32(Register.STATUS) == STATUS_FAULT
    function.write32(Register.CONTROL, CONTROL_ENABLE)
    assert function.read32(Register.STATUS) == STATUS_FAULT
    function.unmap_all()
    with VmbusDriver(function) as again:
        works(again)


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


@pytest.mark.parametrize("name", LIES)
def test_a_broken_ring_costs_its_channel_alone(two: tuple[VmbusDriver, Traffic], name: str) -> None:
    driver, traffic = two
    driver.step(0.001)
    break_ring(driver, traffic, LIES[name])
    driver.run_until(lambda: bool(driver.rescinded), 10, "the rescind of the broken channel")
    driver.run_until(lambda: traffic.burst.finished, 20, "the other channel's traffic")
    traffic.burst.check()
    assert driver.failures == []
    # It is offered anew, and works.
    again = Echo(driver)
    again.start(100)
    driver.run_until(lambda: again.finished, 10, "echoes on the channel that was offered anew")
    again.check()


def test_a_channel_can_be_broken_again_and_again(two: tuple[VmbusDriver, Traffic]) -> None:
    driver, traffic = two
    for number, lie in enumerate(list(LIES.values()) * 2):
        break_ring(driver, traffic, lie)
        driver.run_until(lambda number=number: len(driver.rescinded) > number, 10, "the rescind")
        traffic.echo = Echo(driver, ring_pages_in=2, ring_pages_out=2)
    driver.run_until(lambda: traffic.burst.finished, 20, "the other channel's traffic")
    traffic.burst.check()


def test_a_read_index_that_lies(two: tuple[VmbusDriver, Traffic], server: LoopbackServer) -> None:
    driver, traffic = two
    link = driver.link_of(traffic.echo.channel)
    down = link.rings.view[5 * PAGE :]
    traffic.echo.channel.quiescing = True
    for number in range(200):  # enough answers to fill the ring, so that the device looks at the index
        struct.pack_into("<I", down, READ_INDEX, 13)
        if driver.rescinded:
            break
        packet = traffic.echo.channel.allocate_packet()
        packet.send(echo_request(number, b"x" * 200, inline=True))
        driver.step(0.001)
        struct.pack_into("<I", down, READ_INDEX, 13)
    driver.run_until(lambda: bool(driver.rescinded), 10, "the rescind")
    driver.run_until(lambda: traffic.burst.finished, 20, "the other channel's traffic")
    traffic.burst.check()


@pytest.mark.parametrize("name", EXTERNAL)
def test_bad_external_data_is_answered_with_an_error(two: tuple[VmbusDriver, Traffic], name: str) -> None:
    driver, traffic = two
    body = EXTERNAL[name]
    payload = echo_request(0, b"data", inline=False)
    packet = descriptor(9, 2 + len(body) // 8, 2 + (len(body) + len(payload)) // 8, transaction=1 << 40)
    answers: list[bytes] = []
    waiting = traffic.echo.channel.allocate_packet()
    waiting.completion_routine = lambda packet, status, reply: answers.append(reply)
    traffic.echo.channel.flow.sent[1 << 40] = waiting
    break_ring(driver, traffic, put(packet + body + payload))
    driver.run_until(lambda: bool(answers), 10, "an answer")
    sequence, _, _, status, _ = struct.unpack_from("<QIIII", answers[0])
    assert (sequence, status) == (0, 2)
    driver.run_until(lambda: traffic.burst.finished, 20, "the other channel's traffic")
    traffic.burst.check()
    assert driver.rescinded == []


def test_rings_of_random_bytes(server: LoopbackServer) -> None:
    choose = random.Random(4)
    function = server.function()
    for _ in range(20):
        driver = VmbusDriver(function)
        traffic = Traffic(driver, ring_pages_in=1, ring_pages_out=1)
        traffic.start(50, 200)
        for channel in (traffic.echo.channel, traffic.burst.channel):
            link = driver.link_of(channel)
            for _ in range(choose.randrange(1, 30)):
                at = choose.randrange(0, link.rings.size, 4)
                link.rings.view[at : at + 4] = choose.randbytes(4)
            for word in (WRITE_INDEX, READ_INDEX, 2 * PAGE + WRITE_INDEX, 2 * PAGE + READ_INDEX):
                if choose.random() < 0.5:
                    struct.pack_into("<I", link.rings.view, word, choose.randrange(512) * 8)
            function.write32(Register.SIGNAL_EVENT, link.offer.connection_id)
        function.write32(Register.CONTROL, CONTROL_RESET)
    with VmbusDriver(function) as driver:
        works(driver)


# ---- messages --------------------------------------------------------------------------------------------------------


def test_malformed_messages_do_not_disturb_traffic(two: tuple[VmbusDriver, Traffic], server: LoopbackServer) -> None:
    driver, traffic = two
    choose = random.Random(8)
    traffic.echo.start(500)
    relid = driver.link_of(traffic.burst.channel).offer.relid
    for _ in range(300):
        kind = choose.choice([*range(30), 0xFFFFFFFF])
        if kind in (14, 16, 7, 11):  # these would end what is going on, as they should
            continue
        body = choose.randbytes(choose.randrange(0, 233))
        say(driver, struct.pack("<II", kind, 0) + body)
        driver.step(0.0)
    say(driver, m.OpenChannel(relid, 1, 0xFFFF, 0, 2, b""))
    traffic.finish()
    assert inspect(server)["bus"].rejected > 100
    assert driver.rescinded == []


def test_bad_posts_are_refused_in_the_register(server: LoopbackServer) -> None:
    driver = VmbusDriver(server.function())
    function = driver.function
    for block, expected in (
        (struct.pack("<IIII", 9, 0, 1, 8) + bytes(8), 18),
        (struct.pack("<IIII", 4, 0, 2, 8) + bytes(8), 5),
        (struct.pack("<IIII", 4, 0, 1, 241) + bytes(8), 5),
    ):
        driver._post_view[: len(block)] = block
        function.write32(Register.POST_MESSAGE, 1)
        assert function.read32(Register.POST_STATUS) == expected
    works(driver)
    driver.close(graceful=False)


def test_bad_gpadls_are_refused_and_good_ones_taken(server: LoopbackServer) -> None:
    driver = VmbusDriver(server.function())
    relid = driver.bus.find_offer(ECHO_TYPE).relid
    good = driver.allocate(6 * PAGE)
    for handle, (size, count, words) in enumerate(
        (
            (16, 0, bytes(16)),
            (16, 3, bytes(16)),
            (13, 1, bytes(16)),
            (16, 1, bytes(16)),
            (16, 1, struct.pack("<IIQ", PAGE, PAGE, 1)),
            (16, 1, struct.pack("<IIQ", 0xFFFFFFFF, 0, 1)),
        ),
        start=100,
    ):
        say(driver, m.GpadlHeader(relid, handle, size, count, words))
        settle(driver)
        assert driver.bus.created[handle] == REFUSED
    # One that is well made, of memory that is not there, is only noticed at the open.
    gone = driver.bus.create_gpadl(relid, [range_for(0x5000, 6 * PAGE)])
    driver.bus.open_channel(relid, gone, 3)
    settle(driver)
    assert driver.bus.created[gone] == 0 and driver.bus.open_results[relid] != 0
    ours = driver.bus.create_gpadl(relid, [range_for(good.iova, good.size)])
    driver.bus.open_channel(relid, ours, 3)
    settle(driver)
    assert driver.bus.open_results[relid] == 0
    # Taking the rings back without closing the channel costs the channel; the memory is given back.
    driver.bus.teardown_gpadl(relid, ours)
    settle(driver)
    assert ours in driver.bus.torndown and len(driver.rescinded) == 1
    works(driver)
    driver.close(graceful=False)


def test_gpadls_without_end_are_bounded(server: LoopbackServer) -> None:
    driver = VmbusDriver(server.function())
    relid = driver.bus.find_offer(ECHO_TYPE).relid
    for handle in range(100):
        say(driver, m.GpadlHeader(relid, handle, 65528, 1, b""))
        driver.step(0.0)
    settle(driver)
    assert len(driver.bus.created) == 100 - 64 and set(driver.bus.created.values()) == {REFUSED}
    for handle in range(64):
        driver.bus.teardown_gpadl(relid, handle)
        settle(driver)
    assert len(driver.bus.created) == 100 and driver.bus.torndown == set(range(64))
    works(driver)
    driver.close(graceful=False)


def test_a_guest_that_takes_no_messages_is_told_to_wait(server: LoopbackServer) -> None:
    driver = VmbusDriver(server.function())
    block = struct.pack("<IIII", 4, 0, 1, 16) + m.encode(m.ModifyChannel(1, 0))
    driver._post_view[: len(block)] = block
    statuses = set()
    for _ in range(4200):
        driver.function.write32(Register.POST_MESSAGE, 1)
    statuses.add(driver.function.read32(Register.POST_STATUS))
    assert statuses == {19}
    assert inspect(server)["synic"].messages_waiting == 4096
    settle(driver)
    works(driver)
    driver.close(graceful=False)


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
