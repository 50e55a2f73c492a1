"""Nothing that a channel was given is lost, doubled or handed over too late, by whatever legal calls: KMCL alone."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest

from support.device import Machine, connect, open_echo
from support.pair import INSTANCE, TYPE, Pair
from vmbus.kmcl import ChannelState, Status
from vmbus.kmcl.outgoing import ROUTINES_PER_TURN, Outgoing
from vmbus.kmcl.server import ServerChannel
from vmbus.wire.workload import BURST_TYPE, BurstStart


def sink(pair: Pair) -> list[bytes]:
    """A guest that completes at once what it takes."""
    got: list[bytes] = []

    def taken(_, completion, payload: bytes) -> None:
        got.append(payload)
        completion.complete()

    pair.client.set_process_packet_callbacks(taken)
    return got


def requests(pair: Pair, count: int, **arguments: bool) -> None:
    for number in range(count):
        pair.client.allocate_packet().send(b"request%d" % number, **arguments)


# ---- no turn ends with packets staged and unpublished ----


def restorable(pair: Pair, held: list) -> Callable[[], ServerChannel]:
    def restore(channel: ServerChannel, lib: bytes, _: bytes) -> None:
        channel.restore_packet(channel.allocate_packet(), lib)

    def make() -> ServerChannel:
        server = ServerChannel(TYPE, INSTANCE, name="server")
        server.set_process_packet_callbacks(lambda _, completion, payload: held.append(completion))
        server.set_save_restore_packet_callbacks(lambda *_: 0, restore)
        return server

    pair.server = make()
    return make


def pause_in_mid_drain() -> tuple[Pair, Callable[[], ServerChannel], list, list[bytes]]:
    """The ring was full; among the packets that a turn then moves, one's routine pauses the channel."""
    pair = Pair()
    held: list = []
    make = restorable(pair, held)
    got = sink(pair)
    pair.open()
    pair.run()
    pair.server.set_incoming_processing_at_passive(True)
    pair.server.set_transaction_quota(1)
    requests(pair, 2, wait_for_completion=False)
    pair.turn("server")
    for _ in range(32):
        pair.server.allocate_packet().send(bytes(100))
    pausing = pair.server.allocate_packet()
    pausing.completion_routine = lambda *_: pair.server.begin_pause()
    pausing.send(bytes(8), wait_for_completion=False)
    for _ in range(5):
        pair.server.allocate_packet().send(bytes(100))
    while "client" in pair.ready:
        pair.turn("client")
    pair.turn("server")
    held[0].complete()
    return pair, make, held, got


def test_a_save_leaves_nothing_staged_behind() -> None:
    pair, make, _, got = pause_in_mid_drain()
    pair.server.quiesce()
    assert pair.server.quiescent and pair.server_link.writer.staged == b""
    pair.replace_server(make, pair.server.save())
    pair.server.start()
    pair.run()
    assert len(got) == 38 and pair.server.packets_sent == 0


def test_without_the_publishing_a_channel_is_not_quiescent() -> None:
    """Sabotage: nothing publishes at the end of a cork. Then the save refuses, instead of losing what is staged."""
    pair = Pair()
    restorable(pair, [])
    sink(pair)
    pair.open()
    pair.run()
    with mock.patch.object(Outgoing, "publish", lambda self: None):
        pair.server.allocate_packet().send(b"staged, and not published")
        pair.server.quiesce()
        assert not pair.server.quiescent
        with pytest.raises(Exception, match="cannot be saved"):
            pair.server.save()


# ---- nothing is handed over after the suspend callback ----


@pytest.mark.parametrize("passive", [False, True])
def test_nothing_is_handed_over_after_suspend(passive: bool) -> None:
    """A completion routine that runs in the middle of a turn pauses the channel."""
    pair = Pair()
    events: list[str] = []
    pair.server.set_process_packet_callbacks(
        lambda _, completion, payload: (events.append("PROCESS"), completion.complete())
    )
    pair.server.set_state_change_callbacks(suspend=lambda _: events.append("SUSPEND"))
    sink(pair)
    pair.open()
    pair.server.set_incoming_processing_at_passive(passive)
    pair.run()
    for _ in range(40):
        pair.server.allocate_packet().send(bytes(100), wait_for_completion=False)
    pausing = pair.server.allocate_packet()
    pausing.completion_routine = lambda *_: pair.server.begin_pause()
    pausing.send(bytes(8), wait_for_completion=False)
    assert pair.server.packets_queued
    pair.turn("client")
    requests(pair, 1)
    pair.run()
    assert events == ["SUSPEND"] and pair.server.state is ChannelState.OPENED
    pair.server.start()
    pair.run()
    assert events == ["SUSPEND", "PROCESS"]


@pytest.mark.parametrize("how", ["pause", "fail", "close"])
def test_nothing_is_handed_over_behind_a_packet_whose_owner_stops_the_channel(how: str) -> None:
    """In the middle of a batch."""
    pair = Pair()
    taken: list[bytes] = []

    def process(_, completion, payload: bytes) -> None:
        taken.append(payload)
        completion.complete()
        if len(taken) == 3:
            {
                "pause": pair.server.begin_pause,
                "fail": lambda: pair.server.fail("enough", breach=False),
                "close": lambda: pair.server.close(lambda: None, force=True),
            }[how]()

    pair.server.set_process_packet_callbacks(process)
    pair.open()
    with pair.client.batch():
        requests(pair, 10)
    pair.run()
    assert taken == [b"request%d" % number for number in range(3)]
    if how == "pause":
        pair.server.start()
        pair.run()
        assert taken == [b"request%d" % number for number in range(10)]


# ---- routines that send the next packet ----


def test_a_routine_may_send_the_next_packet_a_hundred_thousand_times() -> None:
    """Without recursion, whoever gets the packet into the ring: a send, or a turn that moves the queue."""
    pair = Pair(up_pages=1, down_pages=16)
    count = 0
    taken = 0

    def take(_, completion, payload: bytes) -> None:
        nonlocal taken
        taken += 1
        completion.complete()

    pair.client.set_process_packet_callbacks(take)
    pair.open()
    total = 100_000

    def again(packet, status: int, reply: bytes) -> None:
        nonlocal count
        assert status == Status.SUCCESS
        count += 1
        if count < total:
            packet.send(b"the next", wait_for_completion=False)

    first = pair.server.allocate_packet()
    first.completion_routine = again
    first.send(b"the next", wait_for_completion=False)
    assert count == ROUTINES_PER_TURN, "others have their turn in between"
    pair.run(limit=10 * total)
    assert (count, taken) == (total, total) and not pair.server_link.failures


# ---- taking packets one by one costs what it costs in batches ----


@pytest.mark.parametrize("how", ["passive", "quota"])
def test_one_by_one_parses_nothing_twice(how: str) -> None:
    """With 600 packets waiting, each is copied out of the ring and parsed once."""
    pair = Pair(up_pages=16, down_pages=16)
    held: list = []
    pair.server.set_process_packet_callbacks(lambda _, completion, payload: held.append(completion))
    pair.open()
    pair.run()
    if how == "passive":
        pair.server.set_incoming_processing_at_passive(True)
    pair.server.set_transaction_quota(1)
    with pair.client.batch():
        requests(pair, 600)
    parsed = 0
    fetch = type(pair.server_link.reader).fetch

    def counting(reader):
        nonlocal parsed
        packets, error = fetch(reader)
        if reader is pair.server_link.reader:
            parsed += len(packets)
        return packets, error

    done = 0
    with mock.patch.object(pair.server_link.reader.__class__, "fetch", counting):
        while done < 600:
            pair.turn("server")
            while held:
                held.pop().complete()
                done += 1
    assert parsed == 600


# ---- closing and unloading cannot be stopped half-way ----


def with_a_broken_ring() -> tuple[Machine, object, object]:
    """The echo provider holds requests; the guest has put nonsense into its own word of the ring to it."""
    machine = Machine(["echo", "burst"], echo={"hold": 100})
    driver = connect(machine)
    channel = open_echo(driver, ring_pages_in=1, ring_pages_out=16)
    burst = driver.client_channel(BURST_TYPE, name="burst")
    driver.enable(burst)
    machine.serve()
    from vmbus.wire.workload import echo_request

    for number in range(60):
        channel.allocate_packet().send(echo_request(number, b"x" * 200, inline=True))
    machine.serve()
    assert len(machine.channel("echo").outstanding) == 60
    machine.channel("echo").link.writer.header.store32(4, 0xFFFFFFFF)
    return machine, driver, channel


def test_teardown_an_unload_is_answered_whatever_the_ring_says() -> None:
    machine, driver, _ = with_a_broken_ring()
    driver.bus.unload()
    driver.run_until(lambda: driver.bus.unloaded, 5, "the UNLOAD_RESPONSE")
    assert [channel.state for channel in machine.device.channels] == [ChannelState.CLOSED] * 2
    assert machine.device.internal_errors == 0


@pytest.mark.parametrize("callback", ["suspend", "closed", "routine"])
@pytest.mark.parametrize("how", ["close", "unload", "reset"])
def test_teardown_goes_on_when_an_owner_raises(callback: str, how: str) -> None:
    machine = Machine(["echo", "burst"])
    driver = connect(machine)
    channel = open_echo(driver)
    burst = driver.client_channel(BURST_TYPE, name="burst", ring_pages_in=1)
    burst.set_process_packet_callbacks(lambda *_: None)
    driver.enable(burst)
    burst.allocate_packet().send(BurstStart(100, 200, 100).pack())
    machine.serve()
    seen: list[str] = []

    def boom(*_: object) -> None:
        raise ZeroDivisionError("on purpose")

    for one in machine.device.channels:
        one.on_owner_error = lambda where, error: seen.append(f"{where}: {error}")
        if callback == "suspend":
            one._suspend = boom
        elif callback == "closed":
            one._closed = boom
    if callback == "routine":
        for packet in machine.channel("burst").packets_in_use:
            packet.completion_routine = boom
    if how == "close":
        driver.close_channel(burst)
        driver.close_channel(channel)
    elif how == "unload":
        driver.bus.unload()
        driver.run_until(lambda: driver.bus.unloaded, 5, "the UNLOAD_RESPONSE")
    else:
        machine.device.reset()
    assert [one.state for one in machine.device.channels] == [ChannelState.CLOSED] * 2
    assert seen and all("on purpose" in one for one in seen)
    assert machine.device.internal_errors == 0


def test_teardown_from_inside_a_routine_gives_all_packets_back_before_it_is_closed() -> None:
    """A routine raises, which ends the channel: the others' routines come before the closed callback, not after it."""
    pair = Pair()
    events: list[str] = []
    sink(pair)
    pair.server.set_state_change_callbacks(closed=lambda _: events.append("closed"))
    pair.open()

    def boom(*_: object) -> None:
        events.append("boom")
        raise ZeroDivisionError("on purpose")

    for number in range(60):
        packet = pair.server.allocate_packet()
        packet.completion_routine = boom if number == 0 else lambda packet, status, reply: events.append(f"{status:#x}")
        packet.send(bytes(100))
    pair.run()
    assert events == ["boom", *[f"{Status.CANCELLED:#x}"] * 59, "closed"]


def test_teardown_of_a_channel_that_is_busy_with_a_slow_owner_waits_and_then_ends() -> None:
    """Close, then the memory goes too: the packets that the owner still holds are given up, and the close ends."""
    pair = Pair()
    held: list = []
    pair.server.set_process_packet_callbacks(lambda _, completion, payload: held.append(completion))
    pair.open()
    requests(pair, 3)
    pair.run()
    done: list[str] = []
    pair.server.close(lambda: done.append("closed"))
    assert pair.server.state is ChannelState.CLOSING and not done
    pair.server.fail("the guest unmapped its rings", breach=False)
    assert done == ["closed"] and pair.server.state is ChannelState.CLOSED and not pair.server_link.failures
    for completion in held:
        completion.complete(b"too late")


def test_no_exception_leaves_a_register_write(caplog: pytest.LogCaptureFixture) -> None:
    """Should there be a defect of ours all the same: it is logged and counted, and everything else goes on."""
    machine = Machine(["echo"])
    driver = connect(machine)
    with mock.patch.object(machine.device.bus, "receive", side_effect=RuntimeError("a defect")):
        driver._post(4, b"\x00" * 16)
    assert machine.device.internal_errors == 1
    assert "was not carried out" in caplog.text
    open_echo(driver)
