"""`send` and `complete` from any thread; every other call is refused by name."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import pytest

from support.pair import Pair
from vmbus.kmcl import Channel, ChannelStateError, Completion, Status


class Carrying:
    """A pair whose server's channel has a carrier: `turn` makes what other threads have asked for."""

    def __init__(self) -> None:
        self.pair = Pair(up_pages=16, down_pages=16)
        self.calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.pair.server.carrier = self.calls.put
        self.taken: list[Completion] = []
        self.pair.server.set_process_packet_callbacks(lambda _, completion, payload: self.taken.append(completion))

    def turn(self) -> None:
        while not self.calls.empty():
            self.calls.get()()
        self.pair.run()


def on_thread(call: Callable[[], object]) -> BaseException | None:
    """Make a call on another thread; what it raised."""
    outcome: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="another")
    thread.start()
    thread.join(20)
    assert outcome, "the thread has not ended"
    return outcome[0]


def test_from_any_thread_sends_come_out_in_the_order_of_each_thread() -> None:
    one = Carrying()
    got: list[bytes] = []

    def taken(_: Channel, completion: Completion, payload: bytes) -> None:
        got.append(payload[:8])
        completion.complete()

    one.pair.client.set_process_packet_callbacks(taken)
    one.pair.open()
    done: list[int] = []

    def work(name: int) -> None:
        for number in range(500):
            packet = one.pair.server.allocate_packet()
            packet.completion_routine = lambda packet, status, reply: done.append(status)
            packet.send(bytes([name]) + number.to_bytes(7, "big"))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        one.turn()
    for thread in threads:
        thread.join()
    one.turn()
    assert done == [Status.SUCCESS] * 2000
    for name in range(4):
        assert [int.from_bytes(data[1:], "big") for data in got if data[0] == name] == list(range(500))


def test_from_any_thread_completions_once_each() -> None:
    one = Carrying()
    one.pair.open()
    replies: list[bytes] = []
    for number in range(300):
        packet = one.pair.client.allocate_packet()
        packet.completion_routine = lambda packet, status, reply: replies.append(reply)
        packet.send(b"%07d" % number)
    one.turn()
    todo: queue.SimpleQueue[Completion] = queue.SimpleQueue()
    for completion in one.taken:
        todo.put(completion)

    def work() -> None:
        while True:
            try:
                completion = todo.get_nowait()
            except queue.Empty:
                return
            completion.complete(completion.transaction.to_bytes(8, "little"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert one.pair.server.threads.under_way and len(one.pair.server.outstanding) == 300
    one.turn()
    assert sorted(int.from_bytes(reply, "little") for reply in replies) == list(range(1, 301))
    assert one.pair.server.outstanding == []


def test_from_any_thread_a_packet_is_completed_once_by_whoever_is_first() -> None:
    one = Carrying()
    one.pair.open()
    one.pair.client.allocate_packet().send(b"request!")
    one.turn()
    (completion,) = one.taken
    assert on_thread(lambda: completion.complete(b"first...")) is None
    error = on_thread(lambda: completion.complete(b"second.."))
    assert isinstance(error, ChannelStateError) and "completed already" in str(error)
    with pytest.raises(ChannelStateError, match="completed already"):
        completion.complete()


def test_from_any_thread_a_pause_and_a_save_wait_for_what_was_asked() -> None:
    """A completion that is under way is outstanding; a packet that is under way is not at rest, and is saved."""
    one = Carrying()
    server = one.pair.server
    server.set_save_restore_packet_callbacks(lambda *_: 0, lambda channel, lib, save: None)
    one.pair.open()
    one.pair.client.allocate_packet().send(b"request!")
    one.turn()
    quiet: list[bool] = []
    assert on_thread(lambda: one.taken[0].complete(b"carried!")) is None
    assert server.outstanding == [1]
    server.quiesce()
    server.when_quiet(lambda: quiet.append(True))
    assert quiet and server.quiescent, "quiescing makes what others asked for"
    assert on_thread(lambda: server.allocate_packet().send(b"late")) is None
    assert not server.quiescent
    one.turn()
    assert server.quiescent and server.packets_queued == 1
    assert len(server.save()) == 2


def test_from_any_thread_a_send_to_a_channel_that_closes_meanwhile_is_cancelled() -> None:
    one = Carrying()
    one.pair.open()
    outcome: list[int] = []
    packet = one.pair.server.allocate_packet()
    packet.completion_routine = lambda packet, status, reply: outcome.append(status)
    assert on_thread(lambda: packet.send(b"too late")) is None
    assert isinstance(on_thread(lambda: packet.send(b"again")), ChannelStateError), "it is in use"
    one.pair.server.fail("an end", breach=False)
    one.turn()
    assert len(outcome) == 1 and outcome[0] in (Status.CANCELLED, Status.INVALID_DEVICE_STATE)


def test_from_any_thread_errors_that_can_be_told_at_once_are() -> None:
    one = Carrying()
    one.pair.open()
    error = on_thread(lambda: one.pair.server.allocate_packet().send(bytes(1 << 20)))
    assert "whose maximum is" in str(error)


def test_from_any_thread_without_a_carrier_it_is_refused() -> None:
    one = Carrying()
    one.pair.server.carrier = None
    one.pair.open()
    packet = one.pair.server.allocate_packet()
    assert "nothing was given to carry it" in str(on_thread(lambda: packet.send(b"x")))
    packet.send(b"possible again on the channel's own thread")


REFUSED: dict[str, Callable[[Carrying], object]] = {
    "start": lambda one: one.pair.server.start(),
    "pause": lambda one: one.pair.server.pause(),
    "begin_pause": lambda one: one.pair.server.begin_pause(),
    "quiesce": lambda one: one.pair.server.quiesce(),
    "unquiesce": lambda one: one.pair.server.unquiesce(),
    "enable": lambda one: one.pair.server.enable(),
    "disable": lambda one: one.pair.server.disable(),
    "cleanup": lambda one: one.pair.server.cleanup(),
    "close": lambda one: one.pair.server.close(lambda: None),
    "batch": lambda one: one.pair.server.batch(),
    "save": lambda one: one.pair.server.save(),
    "save_begin": lambda one: one.pair.server.save_begin(),
    "restore": lambda one: one.pair.server.restore([]),
    "set_transaction_quota": lambda one: one.pair.server.set_transaction_quota(1),
    "set_incoming_processing_at_passive": lambda one: one.pair.server.set_incoming_processing_at_passive(True),
    "set_flags": lambda one: one.pair.server.set_flags(0),
    "set_server_flags": lambda one: one.pair.server.set_server_flags(0),
    "send_synchronous_request": lambda one: one.pair.server.send_synchronous_request(b"", timeout=0),
    "map_gpadl": lambda one: one.pair.server.map_gpadl(1),
    "create_gpadl": lambda one: one.pair.client.create_gpadl([(0, 8)]),
    "external_data": lambda one: one.taken[0].external_data(),
    "the fail of a packet": lambda one: one.taken[0].fail("x"),
    "defer_to_passive": lambda one: one.taken[0].defer_to_passive(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_from_any_thread_fault_t4_every_other_call_is_refused_by_name(name: str) -> None:
    one = Carrying()
    one.pair.open()
    one.pair.client.allocate_packet().send(b"request!", external=[(0x10000, 8)])
    one.turn()
    before = one.pair.server.state, one.pair.server.started
    error = on_thread(lambda: REFUSED[name](one))
    assert isinstance(error, ChannelStateError) and error.status is Status.INVALID_DEVICE_REQUEST, error
    assert f"{name} was called on thread another" in str(error)
    assert (one.pair.server.state, one.pair.server.started) == before
