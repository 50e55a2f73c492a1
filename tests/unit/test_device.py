"""The device: SynIC, bus, memory and channels together, with a whole guest's driver, and with guests that misbehave."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.device import BASE, PAGE, Machine, connect, open_echo
from vmbus.bus.offers import OfferState
from vmbus.bus.server import REFUSED
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.status import Status
from vmbus.ring import READ_INDEX, WRITE_INDEX
from vmbus.wire import messages as m
from vmbus.wire.gpa import GpaRange
from vmbus.wire.synic import CONTROL_RESET, STATUS_FAULT, Register
from vmbus.wire.workload import (
    BURST_TYPE,
    ECHO_TYPE,
    BurstStart,
    Sequence,
    Tally,
    echo_request,
    parse_echo_reply,
    transform,
)
from vmbus_guest.driver import VmbusDriver


@pytest.fixture
def machine() -> Machine:
    return Machine()


def say(driver: VmbusDriver, message) -> None:
    driver._post(4, message if isinstance(message, bytes) else m.encode(message))


def settle(driver: VmbusDriver) -> None:
    while driver.step(0.0):
        pass


def echo(driver: VmbusDriver, channel, count: int = 20) -> None:
    """A few transactions, checked."""
    answers: list[bytes] = []

    def done(packet, status: int, reply: bytes) -> None:
        assert status == Status.SUCCESS
        answers.append(reply)
        packet.free()

    for number in range(count):
        packet = channel.allocate_packet()
        packet.completion_routine = done
        packet.send(echo_request(number, b"%d" % number, inline=True))
    driver.run_until(lambda: len(answers) == count, 5, "echoes")
    for number, reply in enumerate(answers):
        parsed = parse_echo_reply(reply)
        assert parsed is not None and parsed.data == transform(b"%d" % number, number)


# ---- opening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [0, 1, 5, 6, 1 << 31, 0xFFFFFFFF])
def test_rings_without_a_data_page_are_refused(machine: Machine, split: int) -> None:
    driver = connect(machine)
    buffer = driver.allocate(6 * PAGE)
    relid = driver.bus.find_offer(ECHO_TYPE).relid
    first = buffer.iova // PAGE
    handle = driver.bus.create_gpadl(relid, [GpaRange(6 * PAGE, 0, tuple(range(first, first + 6)))])
    driver.bus.open_channel(relid, handle, split)
    settle(driver)
    assert driver.bus.open_results[relid] == Status.INVALID_PARAMETER
    driver.bus.open_channel(relid, handle, 3)
    settle(driver)
    assert driver.bus.open_results[relid] == 0


@pytest.mark.parametrize("index", [4, 4096, 0xFFFFFFF8, 1])
@pytest.mark.parametrize("ring", [0, 3])
@pytest.mark.parametrize("word", [WRITE_INDEX, READ_INDEX])
def test_rings_with_impossible_indices_are_refused(machine: Machine, index: int, ring: int, word: int) -> None:
    driver = connect(machine)
    buffer = driver.allocate(5 * PAGE)
    struct.pack_into("<I", buffer.view, ring * PAGE + word, index)
    relid = driver.bus.find_offer(ECHO_TYPE).relid
    first = buffer.iova // PAGE
    handle = driver.bus.create_gpadl(relid, [GpaRange(5 * PAGE, 0, tuple(range(first, first + 5)))])
    driver.bus.open_channel(relid, handle, 3)
    settle(driver)
    expected = 0 if ring == 0 and index == 4096 else Status.INVALID_PARAMETER  # two data pages there
    assert driver.bus.open_results[relid] == expected
    assert expected == 0 or not any(region.windows for region in list(machine.device.memory._regions)[1:])


@pytest.mark.parametrize(
    "ranges",
    [
        [GpaRange(6 * PAGE, 0, tuple(range(0x500, 0x506)))],
        [GpaRange(3 * PAGE, 0, (0x100000, 0x100001, 0x100002)), GpaRange(3 * PAGE, 0, (1, 2, 3))],
        [GpaRange(6 * PAGE - 8, 0, tuple(range(0x100000, 0x100006)))],
        [GpaRange(6 * PAGE, 0, tuple(range((1 << 52) - 6, 1 << 52)))],
        [GpaRange(6 * PAGE, 0, tuple(range(0x100000 + 4093, 0x100000 + 4099)))],
    ],
    ids=["unmapped", "two ranges", "not whole pages", "the last pages", "half outside"],
)
def test_rings_that_are_not_there_are_refused(machine: Machine, ranges: list[GpaRange]) -> None:
    driver = connect(machine)
    relid = driver.bus.find_offer(ECHO_TYPE).relid
    handle = driver.bus.create_gpadl(relid, ranges)
    driver.bus.open_channel(relid, handle, 3)
    settle(driver)
    assert driver.bus.open_results[relid] == Status.INVALID_PARAMETER
    echo(driver, open_echo(driver))


def test_rings_of_pages_in_any_order_and_across_regions() -> None:
    machine = Machine(region=2 * PAGE)
    with connect(machine) as driver:
        echo(driver, open_echo(driver, ring_pages_in=7, ring_pages_out=5), 300)


# ---- memory that goes away -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", [0, 30])
def test_unmapping_the_rings_costs_the_channel_alone(hold: int) -> None:
    machine = Machine(("echo", "burst"), region=PAGE, echo={"hold": hold})
    driver = connect(machine)
    channel = open_echo(driver, ring_pages_in=2, ring_pages_out=2)
    burst = driver.client_channel(BURST_TYPE, name="burst")
    burst.set_process_packet_callbacks(lambda channel, completion, payload: completion.complete(payload[8:16]))
    driver.enable(burst)
    for number in range(60):
        channel.allocate_packet().send(echo_request(number, b"x" * 100, inline=True))
    machine.serve()
    rings = driver.link_of(channel).rings
    for page in range(rings.size // PAGE):
        machine.device.memory.unmap(rings.iova + page * PAGE, PAGE)
    machine.serve()
    offer = next(iter(machine.device.bus.offers))
    assert offer.state is OfferState.RESCINDED and machine.channel("echo").state is ChannelState.CLOSED
    assert machine.channel("burst").state is ChannelState.ACTIVE
    machine.device.memory.unmap(BASE, len(machine.ram))
    machine.map_all()
    assert machine.device.resets == 2, "only taking the SynIC's pages resets the device (the first was the driver's)"


@pytest.mark.parametrize("hold", [0, 30])
@pytest.mark.parametrize("size", [1 << 20, 16 << 20])
def test_unmapping_everything_at_once_resets_the_device(hold: int, size: int) -> None:
    machine = Machine(region=size, echo={"hold": hold})
    driver = connect(machine)
    channel = open_echo(driver)
    for number in range(60):
        channel.allocate_packet().send(echo_request(number, b"x" * 100, inline=True))
    machine.serve()
    machine.device.memory.unmap(BASE, len(machine.ram))
    machine.serve()
    assert machine.channel("echo").state is ChannelState.CLOSED
    assert machine.read32(Register.STATUS) == STATUS_FAULT
    machine.map_all()
    machine.used[:] = bytes(len(machine.used))
    with connect(machine) as again:
        echo(again, open_echo(again))


# ---- corruption ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ring", "word", "value"),
    [
        ("up", WRITE_INDEX, 4),
        ("up", WRITE_INDEX, 1 << 20),
        ("down", READ_INDEX, 12),
        ("down", READ_INDEX, 0xFFFFFFF8),
    ],
)
def test_a_corrupt_index_costs_the_channel_and_it_comes_back(ring: str, word: int, value: int) -> None:
    machine = Machine(echo={"hold": 3})
    driver = connect(machine)
    channel = open_echo(driver)
    for number in range(10):
        channel.allocate_packet().send(echo_request(number, b"x", inline=True))
    rings = driver.link_of(channel).rings
    at = word + (0 if ring == "up" else (channel.ring_pages_out + 1) * PAGE)
    struct.pack_into("<I", rings.view, at, value)
    machine.write32(Register.SIGNAL_EVENT, driver.link_of(channel).offer.connection_id)
    machine.serve()
    machine.device.wake(machine.channel("echo"))
    if ring == "down":
        # Read indices are only looked at when the ring seems full.
        for number in range(2000):
            if machine.channel("echo").state is not ChannelState.ACTIVE:
                break
            channel.allocate_packet().send(echo_request(number + 10, b"x" * 500, inline=True))
            machine.write32(Register.SIGNAL_EVENT, driver.link_of(channel).offer.connection_id)
            machine.serve()
    machine.serve()
    assert machine.channel("echo").state is ChannelState.CLOSED
    driver.run_until(lambda: bool(driver.rescinded), 5, "the rescind")
    echo(driver, open_echo(driver))


INTERESTING = st.sampled_from([0, 1, 2, 6, 7, 8, 9, 11, 16, 24, 0xFFFF, 0xFFFFFFFF, 0xFFF8, 1 << 31]) | st.integers(
    0, 0xFFFFFFFF
)


@settings(max_examples=40, deadline=None)
@given(
    stains=st.lists(st.tuples(st.integers(0, 3 * 1024 - 1), INTERESTING), min_size=1, max_size=12),
    moves=st.lists(st.integers(0, 1023), min_size=1, max_size=4),
    down=st.booleans(),
)
def test_nothing_that_a_guest_writes_into_rings_harms_the_server(stains, moves: list[int], down: bool) -> None:
    machine = Machine(echo={"hold": 2})
    driver = connect(machine)
    channel = open_echo(driver, ring_pages_in=2, ring_pages_out=2)
    burst = driver.client_channel(BURST_TYPE, name="burst")
    seen = Sequence(Tally())
    burst.set_process_packet_callbacks(lambda channel, completion, payload: completion.complete())
    driver.enable(burst)
    rings = driver.link_of(channel).rings
    base = 3 * PAGE if down else 0
    for word, value in stains:
        struct.pack_into("<I", rings.view, base + 4 * word, value)
    for move in moves:
        struct.pack_into("<I", rings.view, WRITE_INDEX, move * 8)
        machine.write32(Register.SIGNAL_EVENT, driver.link_of(channel).offer.connection_id)
        machine.serve()
        machine.fire_timers()
        machine.serve()
    state = machine.channel("echo").state
    assert state in (ChannelState.ACTIVE, ChannelState.CLOSED)
    # The other channel does not notice.
    finished = []
    packet = burst.allocate_packet()
    packet.completion_routine = lambda packet, status, reply: finished.append((status, reply[:4]))
    packet.send(BurstStart(64, 100, 10).pack())
    driver._links.pop(driver.link_of(channel).offer.relid)
    driver.run_until(lambda: machine.providers[1].tally.completed == 100, 5, "the burst")
    assert finished == [(Status.SUCCESS, bytes(4))] and seen.next == 0
    # And the guest gets the channel back with a reset.
    machine.write32(Register.CONTROL, CONTROL_RESET)
    machine.used[:] = bytes(len(machine.used))
    again = connect(machine)
    echo(again, open_echo(again))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([*Register, 0x7FC, 0x100]), INTERESTING | st.sampled_from([1, 4097, 0x10001])),
        max_size=40,
    )
)
def test_nothing_that_a_guest_writes_into_registers_harms_the_server(writes: list[tuple[int, int]]) -> None:
    machine = Machine()
    driver = connect(machine)
    open_echo(driver)
    for offset, value in writes:
        machine.write32(offset, value)
        machine.serve()
        machine.read32(offset)
    machine.write32(Register.CONTROL, CONTROL_RESET)
    machine.used[:] = bytes(len(machine.used))
    again = connect(machine)
    echo(again, open_echo(again))


def test_messages_that_make_no_sense_do_not_disturb_traffic(machine: Machine) -> None:
    driver = connect(machine)
    channel = open_echo(driver)
    relid = driver.link_of(channel).offer.relid
    for message in (
        b"\xff" * 8,
        b"\0" * 240,
        m.OpenChannel(relid, 3, 1, 0, 2, b""),
        m.OpenChannel(77, 3, 1, 0, 2, b""),
        m.GpadlBody(0, 1, b""),
        m.RequestOffers(),
        m.RelidReleased(relid),
        m.CloseChannel(99),
        m.encode(m.GpadlHeader(relid, 5, 24, 1, b""))[:20],
    ):
        say(driver, message)
        settle(driver)
    assert driver.bus.open_results[77] == REFUSED
    assert machine.device.bus.rejected >= 7
    echo(driver, channel)
