"""What one guest can make the server hold is bounded: a request counts until its completion is in the ring."""

from __future__ import annotations

from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from support.device import Machine, connect, open_echo
from support.pair import Pair
from vmbus.kmcl import allowance, incoming
from vmbus.kmcl.outgoing import Outgoing
from vmbus.wire.workload import ECHO_TYPE, echo_request


class Deaf:
    """A guest that asks and never reads its answers."""

    def __init__(self, machine: Machine, channel, size: int) -> None:
        self.machine = machine
        self.channel = channel
        self.payload = echo_request(0, b"x" * size, inline=True)
        channel.process = lambda: False

    def ask(self, rounds: int, each: int = 40) -> int:
        """Send as long as there is room in the ring to the host; how many."""
        sent = 0
        for _ in range(rounds):
            for _ in range(each):
                if self.channel.packets_queued:
                    break
                self.channel.allocate_packet().send(self.payload)
                sent += 1
            self.channel.outgoing.drain(float("inf"))
            self.channel.outgoing.publish()
            self.machine.serve()
        return sent


def held(machine: Machine) -> int:
    flow = machine.channel("echo").flow
    return flow.requests


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "MOST_REQUESTS", 200)


def test_backpressure_a_guest_that_reads_no_answers_is_no_longer_read(small: None) -> None:
    machine = Machine(["echo"])
    driver = connect(machine)
    guest = Deaf(machine, open_echo(driver, ring_pages_in=1, ring_pages_out=16), 16)
    guest.ask(300)
    assert held(machine) == 200
    assert guest.channel.packets_queued, "its own ring is full: it notices"
    server = machine.channel("echo")
    assert server.flow.blocked and server.describe()["blocked"] is True
    # It begins to read: everything it asked is answered, once each and in order.
    del guest.channel.process
    waiting = guest.channel.packets_sent + guest.channel.packets_queued
    server.link.signal()
    driver.run_until(lambda: guest.channel.counters["completed"] >= waiting, 20, "the answers")
    assert held(machine) == 0 and not server.flow.blocked and server.flow.held_bytes == 0


def test_backpressure_without_the_bound_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: no bound."""
    monkeypatch.setattr(incoming, "MOST_REQUESTS", 1 << 40)
    monkeypatch.setattr(incoming, "MOST_REQUEST_BYTES", 1 << 40)
    monkeypatch.setattr(allowance, "MOST_DEVICE_REQUESTS", 1 << 40)
    machine = Machine(["echo"])
    guest = Deaf(machine, open_echo(connect(machine), ring_pages_in=1, ring_pages_out=16), 16)
    guest.ask(100)
    assert held(machine) > 3000


def test_backpressure_bytes_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "MOST_REQUEST_BYTES", 100_000)
    machine = Machine(["echo"])
    guest = Deaf(machine, open_echo(connect(machine), ring_pages_in=1, ring_pages_out=16), 1500)
    guest.ask(100)
    flow = machine.channel("echo").flow
    assert 100_000 <= flow.held_bytes < 104_000 and flow.requests < 100


def test_backpressure_all_channels_share_the_devices_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten greedy channels get no more than the device's bound together, and each its share; the rest is kept waiting,
    and goes on as soon as one of them lets go."""
    monkeypatch.setattr(allowance, "MOST_DEVICE_REQUESTS", 500)
    machine = Machine(["echo"] * 10, echo={"hold": 65536})
    driver = connect(machine)
    channels = []
    for provider in machine.providers:
        channel = driver.client_channel(ECHO_TYPE, instance=provider.instance, ring_pages_out=4)
        driver.enable(channel)
        channels.append(channel)
    for channel in channels:
        for number in range(200):
            channel.allocate_packet().send(echo_request(number, b"x", inline=True))
    machine.serve()
    requests, _ = machine.device.allowance.held()
    # Within one batch of the bound, and a share for each of those that came later.
    assert 500 <= requests <= 500 + 16 * 10 + allowance.SHARE_REQUESTS * 10
    assert machine.device.allowance.refusals and machine.device.allowance.summary()["refused"]
    assert all(provider.channel.flow.requests >= allowance.SHARE_REQUESTS for provider in machine.providers)
    done = lambda: sum(channel.counters["completed"] for channel in channels)  # noqa: E731
    driver.run_until(lambda: done() == 2000, 60, "all answers")
    assert machine.device.allowance.held() == (0, 0)


def test_backpressure_a_client_reads_on_whatever_waits() -> None:
    """If both ends stopped to read, nothing would ever move: both rings full of requests, and answers behind them."""
    pair = Pair()
    pair.server.incoming.bind(allowance.SharedAllowance(lambda: [pair.server], lambda: None))
    with mock.patch.object(incoming, "MOST_REQUESTS", 10):
        pair.server.incoming.bind(pair.server.incoming.allowance)
    pair.server.set_process_packet_callbacks(lambda _, completion, payload: completion.complete(bytes(100)))
    pair.client.set_process_packet_callbacks(lambda _, completion, payload: completion.complete(bytes(100)))
    pair.open()
    for _ in range(500):
        pair.client.allocate_packet().send(bytes(50))
        pair.server.allocate_packet().send(bytes(50))
    pair.run()
    assert pair.client.counters["completed"] == pair.server.counters["completed"] == 500


@example([("ask", 5), ("turn", 1), ("answer", 5)])
@given(st.lists(st.tuples(st.sampled_from(["ask", "answer", "read", "turn"]), st.integers(1, 30)), max_size=60))
def test_backpressure_books_are_right_at_any_moment(steps: list[tuple[str, int]]) -> None:
    """`waiting` and `held_bytes` are kept beside what they count; they always agree with it."""
    pair = Pair()
    taken: list = []
    pair.server.set_process_packet_callbacks(lambda _, completion, payload: taken.append(completion))
    pair.server.set_transaction_quota(12)
    pair.open()
    for what, count in steps:
        if what == "ask":
            for _ in range(count):
                pair.client.allocate_packet().send(bytes(count * 8))
        elif what == "answer":
            for completion in taken[:count]:
                completion.complete(bytes(count * 20))
            del taken[:count]
        elif what == "read":
            pair.turn("client")
        else:
            pair.turn("server")
        flow, queue = pair.server.flow, pair.server.outgoing.queue
        assert flow.waiting == len(queue) and len(flow.outstanding) == len(taken)
        assert flow.held_bytes == sum(one.size for one in taken) + sum(len(entry.body) for entry in queue)
        assert flow.requests <= 12
        assert isinstance(pair.server.outgoing, Outgoing) and pair.server_link.writer.staged == b""
