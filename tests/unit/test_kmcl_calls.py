"""Every call of KMCL's Pythonic face, in and out of season, over rings in a bytearray."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from functools import partial

import pytest

from support.endpoints import Bench, Recorder
from support.pair import BASE, INSTANCE, PAGE, TYPE
from vmbus.errors import StateError, WaitTimeout
from vmbus.kmcl import (
    Channel,
    ChannelState,
    ChannelStateError,
    Completion,
    KmclError,
    Packet,
    PacketState,
    Status,
)
from vmbus.kmcl.pipe import MAX_DATA, Pipe, PipeMode, frame
from vmbus.kmcl.saved import decode_chunk, encode
from vmbus.kmcl.saving import SaveStep, split_frames
from vmbus.kmcl.server import ServerChannel
from vmbus.wire.gpa import GpaRange


@pytest.fixture
def bench() -> Bench:
    return Bench()


def status_of(call: Callable[[], object]) -> Status:
    with pytest.raises(KmclError) as caught:
        call()
    assert "channel" in str(caught.value)
    return caught.value.status


# ---- set-up ----------------------------------------------------------------------------------------------------------


def test_an_enable_that_its_bus_refuses_changes_nothing(bench: Bench) -> None:
    for channel in (bench.server, bench.client):
        refuse = [lambda _: 1 / 0] + [print] * (channel is bench.server)
        channel.bind(*refuse)
        with pytest.raises(ZeroDivisionError):
            channel.enable()
        assert channel.state is ChannelState.DISABLED
    bench.client.bind(lambda _: None)
    bench.open()
    assert bench.server.active and bench.client.active


# ---- life ------------------------------------------------------------------------------------------------------------


def test_a_pause_that_runs_out_names_what_is_missing(bench: Bench) -> None:
    bench.open()
    for _ in range(3):
        bench.send()
    bench.run()
    bench.taken["server"][1][0].complete()
    with pytest.raises(WaitTimeout, match=r"channel server to complete incoming packets \[1, 3\]"):
        bench.server.pause(5)
    assert bench.server.state is ChannelState.OPENED and not bench.server.started
    bench.server.waiter = None
    with pytest.raises(ChannelStateError, match="waiter"):
        bench.server.pause()
    bench.server.start()
    assert bench.server.active


def test_disable_waits_for_held_packets_and_keeps_the_wish(bench: Bench) -> None:
    bench.open()
    bench.send()
    bench.run()
    with pytest.raises(WaitTimeout, match=r"\[1\]"):
        bench.server.disable(1)
    assert bench.server.state is ChannelState.OPENED
    bench.server.start()
    bench.answer()
    bench.server.disable()
    assert bench.server.state is ChannelState.DISABLED and bench.client.state is ChannelState.CLOSED
    assert bench.outcomes == [(Status.CANCELLED, b"")]
    # and again: it was started before
    bench.open(start=False)
    assert bench.server.active


def test_cleanup_is_the_end(bench: Bench) -> None:
    bench.open()
    assert status_of(bench.server.cleanup) is status_of(bench.client.cleanup) is Status.INVALID_DEVICE_STATE
    bench.server.disable()
    bench.client.disable()
    for channel in (bench.server, bench.client):
        channel.cleanup()
        with pytest.raises(ChannelStateError, match="cleaned up"):
            channel.enable()
        with pytest.raises(ChannelStateError, match="cleaned up"):
            channel.set_maximum_packet_size(1)


def test_a_raising_end_of_a_batch_fails_its_channel_only(bench: Bench) -> None:
    counts: list[int] = []

    def complete(channel: Channel, count: int) -> None:
        counts.append(count)
        if len(counts) == 2:
            raise ValueError("boom")

    bench.server.set_process_packet_callbacks(bench.take, complete)
    bench.open()
    for _ in range(3):
        bench.send()
    bench.run()
    assert counts == [3]
    bench.send()
    bench.run()
    assert counts == [3, 1]
    assert bench.server.state is ChannelState.CLOSED and "boom" in bench.server_link.failures[0]


# ---- quota -----------------------------------------------------------------------------------------------------------


def test_a_lowered_quota_takes_nothing_until_enough_are_complete(bench: Bench) -> None:
    bench.server.set_transaction_quota(5)
    bench.open()
    for _ in range(9):
        bench.send()
    bench.run()
    assert len(bench.taken["server"]) == 5
    bench.server.set_transaction_quota(2)
    for number, taken in enumerate((5, 5, 5, 6)):
        bench.taken["server"][number][0].complete()
        bench.run()
        assert len(bench.taken["server"]) == taken
    assert len(bench.server.outstanding) == 2


# ---- passive, and putting off ----------------------------------------------------------------------------------------


def asks_inside(bench: Bench, asked: list[bytes | Exception]) -> Callable[[Channel, Completion, bytes], None]:
    """A client's packet callback that makes a synchronous request before it completes."""

    def process(channel: Channel, completion: Completion, payload: bytes) -> None:
        try:
            asked.append(channel.send_synchronous_request(b"ask " + payload[:4], timeout=1))
        except KmclError as error:
            asked.append(error)
        completion.complete(payload)

    return process


def answering(channel: Channel, completion: Completion, payload: bytes) -> None:
    completion.complete(b"re: " + payload[:4])


@pytest.mark.parametrize("count", [1, 3, 40])
def test_a_synchronous_request_from_inside_a_packet_works_at_passive(bench: Bench, count: int) -> None:
    asked: list[bytes | Exception] = []
    bench.client.set_process_packet_callbacks(asks_inside(bench, asked))
    bench.client.set_incoming_processing_at_passive(True)
    bench.server.set_process_packet_callbacks(answering)
    bench.open()
    for number in range(count):
        bench.send("server", b"packet%02d" % number)
    bench.run()
    # Others lie between the request's packet and its completion; they come afterwards, in their order.
    assert asked == [b"re: ask "] * count
    assert bench.outcomes == [(Status.SUCCESS, b"packet%02d" % number) for number in range(count)]


def test_inline_it_is_a_clear_error(bench: Bench) -> None:
    asked: list[bytes | Exception] = []
    bench.client.set_process_packet_callbacks(asks_inside(bench, asked))
    bench.open()
    bench.send("server")
    bench.run()
    assert isinstance(asked[0], ChannelStateError) and "defer_to_passive" in str(asked[0])
    assert bench.client.packets_in_use == [] and not bench.taken["server"]


def test_only_the_packet_at_hand_can_be_put_off(bench: Bench) -> None:
    bench.open()
    bench.send()
    bench.run()
    assert status_of(bench.taken["server"][0][0].defer_to_passive) is Status.INVALID_DEVICE_REQUEST

    def process(channel: Channel, completion: Completion, payload: bytes) -> None:
        completion.complete()
        completion.defer_to_passive()

    other = Bench()
    other.server.set_process_packet_callbacks(process)
    other.open()
    other.send()
    other.run()
    assert "process_packet raised" in other.server_link.failures[0]


@pytest.mark.parametrize("how", ["quiesce", "begin_pause"])
@pytest.mark.parametrize("where", ["outside", "inside", "inside a later one"])
def test_packets_put_off_are_seen_before_a_suspended_channel_is_quiet(bench: Bench, how: str, where: str) -> None:
    events: list[str] = []

    def process(channel: Channel, completion: Completion, payload: bytes) -> None:
        events.append(("again " if completion.deferred else "") + payload.decode())
        if completion.deferred:
            completion.complete()
            return
        completion.defer_to_passive()
        if where == "inside" or (where == "inside a later one" and payload == b"packet 2"):
            getattr(channel, how)()

    bench.server.set_process_packet_callbacks(process)
    bench.server.set_state_change_callbacks(suspend=lambda _: events.append("suspend"))
    bench.open()
    for number in (1, 2):
        bench.send(payload=b"packet %d" % number)
    bench.turn("server")
    if where == "outside":
        getattr(bench.server, how)()
    assert bench.server.quiescent
    # Unless it is paused by that very packet, its owner sees it again before Suspend.
    if where == "outside":
        assert events == ["packet 1", "packet 2", "again packet 1", "again packet 2", "suspend"]
    bench.server.unquiesce()
    bench.server.start()
    bench.run()
    assert sorted(event for event in events if event != "suspend") == sorted(
        ["packet 1", "packet 2", "again packet 1", "again packet 2"]
    )
    assert len(bench.outcomes) == 2


def test_a_packet_put_off_does_not_outlive_its_channel(bench: Bench) -> None:
    def process(channel: Channel, completion: Completion, payload: bytes) -> None:
        completion.defer_to_passive()
        channel.close(lambda: None, force=True)

    bench.server.set_process_packet_callbacks(process)
    bench.open()
    bench.send()
    bench.turn("server")
    bench.client.close(lambda: None)
    bench.open()
    bench.server.process()
    assert bench.server.active and bench.server.outstanding == []


# ---- synchronous requests --------------------------------------------------------------------------------------------


def test_a_synchronous_request_returns_the_reply(bench: Bench) -> None:
    bench.server.set_process_packet_callbacks(lambda channel, completion, payload: completion.complete(payload * 2))
    bench.open()
    assert bench.client.send_synchronous_request(b"12345678") == b"12345678" * 2
    assert bench.client.send_synchronous_request(b"12345678", completion_size=8) == b"12345678"
    assert bench.client.send_synchronous_request(b"12345678", completion_size=0) == b""
    with bench.client.batch():
        assert bench.client.send_synchronous_request(b"87654321", timeout=2) == b"87654321" * 2
    assert bench.client.send_synchronous_request(b"12345678", wait_for_completion=False) == b""
    assert bench.waits[-1][0] == 2
    assert bench.client.packets_in_use == []


@pytest.mark.parametrize("size", [-8, 1, 12])
def test_a_completion_size_is_a_multiple_of_eight(bench: Bench, size: int) -> None:
    bench.open()
    call = lambda: bench.client.send_synchronous_request(b"", completion_size=size)  # noqa: E731
    assert status_of(call) is Status.INVALID_PARAMETER


def fill(bench: Bench, side: str = "client") -> int:
    """Packets until one has to wait; how many there are."""
    for number in itertools.count(1):
        if bench.send(side, bytes(40), wait_for_completion=False).state is PacketState.QUEUED:
            return number
    raise AssertionError


def test_no_room_is_buffer_overflow_and_nothing_is_queued(bench: Bench) -> None:
    bench.open()
    while bench.client.packets_queued == 0:
        bench.send()
    bench.client.outgoing.queue.pop()  # only the ring is full now
    before = bench.client.flow.next_transaction, bench.client.packets_sent, dict(bench.client.counters)
    assert status_of(lambda: bench.client.send_synchronous_request(bytes(4000), timeout=0)) is Status.BUFFER_OVERFLOW
    assert before == (bench.client.flow.next_transaction, bench.client.packets_sent, bench.client.counters)


def test_a_synchronous_request_that_times_out_is_cancelled(bench: Bench) -> None:
    bench.open()
    assert status_of(lambda: bench.client.send_synchronous_request(b"", timeout=3)) is Status.CANCELLED
    assert status_of(lambda: bench.client.send_synchronous_request(b"", timeout=0)) is Status.CANCELLED
    bench.run()
    bench.answer()
    bench.run()  # the late completions hurt nobody
    assert bench.client.active and bench.client.packets_in_use == []
    # One that was still queued is withdrawn.
    bench.server.quiesce()
    fill(bench)
    queued = bench.client.packets_queued
    assert status_of(lambda: bench.client.send_synchronous_request(b"", timeout=3)) is Status.CANCELLED
    assert bench.client.packets_queued == queued


@pytest.mark.parametrize("force", [False, True])
def test_a_synchronous_request_on_a_channel_that_goes_away(bench: Bench, force: bool) -> None:
    bench.open()
    bench.send("server")
    bench.run()  # the client holds a packet, so that a close takes its time

    def closes(condition: Callable[[], bool], timeout: float, what: str) -> None:
        bench.client.close(lambda: None, force=force)
        assert condition()

    bench.client.waiter = closes
    assert status_of(lambda: bench.client.send_synchronous_request(b"")) is Status.DEVICE_REMOVED
    assert status_of(lambda: bench.client.send_synchronous_request(b"")) is Status.DEVICE_REMOVED


def test_a_synchronous_request_needs_an_active_channel_and_a_waiter(bench: Bench) -> None:
    request = bench.client.send_synchronous_request
    assert status_of(lambda: request(b"")) is Status.DEVICE_REMOVED
    bench.open()
    bench.client.quiesce()
    assert status_of(lambda: request(b"")) is Status.DEVICE_REMOVED
    bench.client.unquiesce()
    bench.client.waiter = None
    assert status_of(lambda: request(b"")) is Status.INVALID_DEVICE_STATE
    assert bench.client.flow.next_transaction == 1 and bench.client.packets_in_use == []
    assert request(b"", wait_for_completion=False) == b""


def test_a_server_may_not_wait(bench: Bench) -> None:
    bench.open()
    request = bench.server.send_synchronous_request
    assert status_of(lambda: request(b"")) is Status.INVALID_PARAMETER
    assert status_of(lambda: request(b"", timeout=0)) is Status.INVALID_PARAMETER
    assert status_of(lambda: request(b"", wait_for_completion=False)) is Status.INVALID_PARAMETER
    assert request(b"at once", wait_for_completion=False, timeout=0) == b""
    bench.run()
    assert bench.taken["client"][0][1].startswith(b"at once")


def test_synchronous_requests_are_fine_in_post_started(bench: Bench) -> None:
    replies: list[bytes] = []
    bench.server.set_process_packet_callbacks(answering)
    bench.client.set_state_change_callbacks(
        post_started=lambda channel: replies.append(channel.send_synchronous_request(b"now?"))
    )
    bench.open()
    assert replies == [b"re: now?"]


# ---- packets ---------------------------------------------------------------------------------------------------------


def test_the_default_routine_frees_the_packet(bench: Bench) -> None:
    bench.open()
    packet = bench.client.allocate_packet()
    packet.send(b"", wait_for_completion=False)
    assert packet.state is PacketState.FREED


BAD_SENDS: dict[str, tuple[Callable[[Bench, Packet], object], Status]] = {
    "too long": (lambda b, p: p.send(bytes(201)), Status.INVALID_PARAMETER),
    "data without completion": (
        lambda b, p: p.send(b"", external=[(BASE, 8)], wait_for_completion=False),
        Status.INVALID_PARAMETER,
    ),
    "no data": (lambda b, p: p.send(b"", external=[]), Status.INVALID_PARAMETER),
    "an empty piece": (lambda b, p: p.send(b"", external=[(BASE, 8), (BASE, 0)]), Status.INVALID_PARAMETER),
    "too much data": (lambda b, p: p.send(b"", external=[(BASE, 0x4001)]), Status.INVALID_PARAMETER),
    "too long a chain": (lambda b, p: p.send(b"", external=[(BASE, 8)] * 4), Status.INVALID_PARAMETER),
    "both kinds of data": (
        lambda b, p: p.send(b"", external=[(BASE, 8)], external_ranges=[GpaRange(8, 0, (16,))]),
        Status.INVALID_PARAMETER,
    ),
}


@pytest.mark.parametrize("name", BAD_SENDS)
@pytest.mark.parametrize("queued", [False, True])
def test_a_refused_send_leaves_everything_as_it_was(bench: Bench, name: str, queued: bool) -> None:
    bench.client.set_maximum_packet_size(200)
    bench.client.set_maximum_external_data(0x4000, 3)
    bench.open()
    if queued:
        fill(bench)
    packet = bench.send()
    again = bench.client.allocate_packet()

    def picture() -> object:
        channel = bench.client
        return (
            channel.state,
            list(channel.outgoing.queue),
            dict(channel.flow.sent),
            channel.flow.next_transaction,
            dict(channel.counters),
            (again.state, again.transaction, again.body),
            packet.state,
            bytes(bench.ram),
        )

    before = picture()
    call, status = BAD_SENDS[name]
    assert status_of(lambda: call(bench, again)) is status
    assert status_of(lambda: packet.send(b"in use")) is Status.INVALID_DEVICE_REQUEST
    assert picture() == before
    again.completion_routine = lambda *_: None
    again.send(b"fine")
    assert again.transaction == packet.transaction + 1


def test_sends_out_of_season(bench: Bench) -> None:
    for channel in (bench.server, bench.client):
        packet = channel.allocate_packet()
        assert status_of(partial(packet.send, b"")) is Status.INVALID_DEVICE_STATE
        assert packet.state is PacketState.IDLE and packet.transaction == 0
    bench.open()
    assert status_of(lambda: bench.send("server", external=[(BASE, 8)])) is Status.INVALID_DEVICE_REQUEST
    assert status_of(lambda: bench.send(payload=bytes(4096))) is Status.INVALID_PARAMETER
    bench.close()
    assert status_of(lambda: bench.send()) is Status.INVALID_DEVICE_STATE


def test_a_reply_that_can_never_fit_is_refused_and_the_packet_lives(bench: Bench) -> None:
    bench.open()
    bench.send()
    bench.run()
    completion = bench.taken["server"][0][0]
    assert status_of(lambda: completion.complete(bytes(4096))) is Status.INVALID_PARAMETER
    completion.complete(b"shorter.")
    bench.run()
    assert bench.outcomes == [(Status.SUCCESS, b"shorter.")]


# ---- completions -----------------------------------------------------------------------------------------------------


def test_failing_a_packet_of_a_former_open_does_not_hurt_the_next(bench: Bench) -> None:
    bench.open()
    bench.send()
    bench.run()
    old = bench.taken["server"][0][0]
    bench.server.close(lambda: None, force=True)
    bench.client.close(lambda: None)
    bench.open()
    old.fail("late")
    assert bench.server.active


def test_failing_the_last_held_packet_finishes_a_close(bench: Bench) -> None:
    bench.open()
    bench.send()
    bench.run()
    closed: list[bool] = []
    bench.server.close(lambda: closed.append(True))
    bench.taken["server"][0][0].fail("nonsense")
    assert closed and bench.server.state is ChannelState.CLOSED


# ---- external data ---------------------------------------------------------------------------------------------------


def test_external_ranges_are_the_same_as_extents(bench: Bench) -> None:
    bench.open()
    last = BASE + len(bench.ram) - PAGE
    bench.ram[-PAGE:] = bytes(index % 251 for index in range(PAGE))
    bench.send(external_ranges=[GpaRange(100, 4000, ((last >> 12) - 1, last >> 12))])
    bench.send(external=[(last - 96, 100)])
    bench.run()
    pieces = [b"".join(bytes(v) for v in c.external_data(read_only=True).views) for c, _ in bench.taken["server"]]
    assert pieces[0] == pieces[1] and len(pieces[0]) == 100 and pieces[0][-4:] == bytes([0, 1, 2, 3])
    assert all(view.readonly for c, _ in bench.taken["server"] for view in c.external_data().views)
    bench.answer()
    bench.run()
    assert len(bench.outcomes) == 2


def test_external_data_is_bounded_by_the_receiver_too(bench: Bench) -> None:
    bench.server.set_maximum_external_data(64, 2)
    bench.open()
    last = BASE + len(bench.ram) - PAGE
    bench.send(external=[(last, 32), (last + 100, 32)])
    bench.send(external=[(last, 65)])
    bench.send(external=[(last, 8)] * 3)
    bench.send()
    bench.run()
    fine, *rest = [completion for completion, _ in bench.taken["server"]]
    assert sum(len(view) for view in fine.external_data().views) == 64
    assert [status_of(one.external_data) for one in rest] == [
        Status.DATA_ERROR,
        Status.DATA_ERROR,
        Status.INVALID_DEVICE_REQUEST,
    ]
    assert [one.has_external_data for one in rest] == [True, True, False]


def test_external_data_dies_with_its_packet(bench: Bench) -> None:
    bench.open()
    for _ in range(2):
        bench.send(external=[(BASE + len(bench.ram) - PAGE, 8)])
    bench.run()
    (first, _), (second, _) = bench.taken["server"]
    assert first.external_data() is first.external_data()
    first.complete()
    assert status_of(first.external_data) is Status.INVALID_DEVICE_REQUEST
    bench.server.close(lambda: None, force=True)
    assert status_of(second.external_data) is Status.CANCELLED


# ---- GPADLs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [False, True])
def test_gpadls_can_be_given_back_in_the_closed_callback(bench: Bench, force: bool) -> None:
    def closed(channel: Channel) -> None:
        assert isinstance(channel, ServerChannel)
        channel.unmap_gpadl(handle)
        assert status_of(lambda: channel.map_gpadl(handle)) is Status.INVALID_DEVICE_STATE

    bench.server.set_state_change_callbacks(closed=closed)
    bench.open()
    handle = bench.client.create_gpadl([(BASE, 8)])
    bench.server.map_gpadl(handle)
    bench.server.close(lambda: None, force=force)
    assert not bench.mapped
    assert status_of(lambda: bench.server.unmap_gpadl(handle)) is Status.INVALID_DEVICE_STATE


# ---- pipes -----------------------------------------------------------------------------------------------------------


def pipes(bench: Bench, mode: PipeMode) -> tuple[Pipe, list[bytes]]:
    got: list[bytes] = []
    Pipe(bench.server, mode, got.append)
    return Pipe(bench.client, mode, lambda _: None), got


def test_messages_keep_their_exact_lengths(bench: Bench) -> None:
    pipe, got = pipes(bench, PipeMode.MESSAGE)
    bench.open()
    messages = [bytes([size % 256]) * size for size in (0, 1, 7, 8, 9, 1000)]
    for message in messages:
        pipe.write(message)
    bench.run()
    assert got == messages
    assert status_of(lambda: pipe.write(bytes(MAX_DATA + 1))) is Status.INVALID_PARAMETER
    assert bench.client.packets_in_use == []


@pytest.mark.parametrize("pages", [1, 8])
def test_bytes_are_a_stream(pages: int) -> None:
    bench = Bench(up_pages=pages)
    pipe, got = pipes(bench, PipeMode.BYTE)
    bench.open()
    data = random.Random(1).randbytes(100_000)
    pipe.write(data)
    pipe.write(b"")
    pipe.write(b"end")
    bench.run()
    assert b"".join(got) == data + b"end"
    assert max(len(piece) for piece in got) <= MAX_DATA


@pytest.mark.parametrize(
    "payload",
    [b"", b"\x02\0\0\0\x01\0\0\0x", b"\x01\0\0\0\xff\xff\0\0abcdefgh", frame(bytes(3000))[:100]],
    ids=["empty", "another type", "beyond its packet", "cut"],
)
def test_a_malformed_pipe_packet_fails_its_channel(bench: Bench, payload: bytes) -> None:
    _, got = pipes(bench, PipeMode.MESSAGE)
    bench.open()
    bench.send(payload=payload, wait_for_completion=False)
    bench.run()
    assert bench.server.state is ChannelState.CLOSED and "pipe packet" in bench.server_link.failures[0]
    assert not got


def test_a_pipe_has_neither_data_nor_completions(bench: Bench) -> None:
    pipes(bench, PipeMode.MESSAGE)
    bench.open()
    assert bench.client.is_pipe
    assert status_of(lambda: bench.send()) is Status.INVALID_PARAMETER
    assert status_of(lambda: bench.client.send_synchronous_request(b"")) is Status.INVALID_PARAMETER
    assert status_of(lambda: bench.send(external=[(BASE, 8)])) is Status.INVALID_PARAMETER


# ---- chunked save and restore ----------------------------------------------------------------------------------------


COUNT = 80


@pytest.fixture
def vsp(bench: Bench) -> Recorder:
    """80 packets: some sent and held by the guest, some in the ring, some queued; quiesced for a save."""
    made = Recorder(bench.server)
    bench.open()
    for number in range(COUNT):
        made.send(b"%08d" % number + bytes(60))
    bench.turn("client")
    bench.server.quiesce()
    assert bench.server.packets_sent and bench.server.packets_queued and bench.taken["client"]
    return made


def finish(bench: Bench, vsp: Recorder) -> None:
    """Let everything through and see that it came once and in order."""
    for _ in range(COUNT):
        bench.run()
        bench.answer("client")
    assert [answer[:2] for answer in vsp.answers] == [(number, Status.SUCCESS) for number in range(COUNT)]
    assert bench.server.packets_in_use == [] and not bench.server.outgoing.queue


def drain(channel: ServerChannel, size: int) -> list[bytes]:
    """All of a save through a buffer of `size` bytes, grown where one chunk asks for more."""
    parts = []
    while True:
        step = channel.save_continue(size)
        assert len(step.data) <= size
        if step.data:
            parts.append(step.data)
        elif step.more:
            assert step.required > size
            step = channel.save_continue(step.required)
            assert step.data
            parts.append(step.data)
        if not step.more:
            assert step.required == 0
            return parts


def test_every_buffer_size_gives_the_same_bytes(bench: Bench, vsp: Recorder) -> None:
    chunks = bench.server.save()
    longest = max(map(len, chunks)) + 4
    for size in [*range(longest + 3), 1000, 1 << 20]:
        bench.server.save_begin()
        parts = drain(bench.server, size)
        assert bench.server.save_continue(size) == SaveStep(b"", False, 0)
        bench.server.save_end()
        assert split_frames(b"".join(parts)) == chunks, size
        assert all(split_frames(part) for part in parts)
    bench.server.unquiesce()
    finish(bench, vsp)


def test_an_abandoned_save_leaves_the_channel_as_it_was(bench: Bench, vsp: Recorder) -> None:
    before = bench.server.packets_in_use, bench.server.flow.next_transaction, bytes(bench.ram)
    for steps in range(4):
        bench.server.save_begin()
        for _ in range(steps):
            bench.server.save_continue(500)
        bench.server.save_end()
        bench.server.save_end()
    assert before == (bench.server.packets_in_use, bench.server.flow.next_transaction, bytes(bench.ram))
    bench.server.unquiesce()
    finish(bench, vsp)


def test_save_calls_out_of_season(bench: Bench, vsp: Recorder) -> None:
    assert status_of(lambda: bench.server.save_continue(100)) is Status.INVALID_DEVICE_STATE
    bench.server.save_begin()
    assert status_of(bench.server.save_begin) is Status.INVALID_DEVICE_STATE
    bench.server.save_end()
    bench.server.unquiesce()
    assert status_of(bench.server.save_begin) is Status.INVALID_DEVICE_STATE
    bench.send()
    bench.run()
    bench.server.quiesce()
    assert vsp.incoming
    assert status_of(bench.server.save_begin) is Status.INVALID_DEVICE_STATE


def made(bench: Bench, vsp: Recorder) -> ServerChannel:
    channel = ServerChannel(TYPE, INSTANCE, name="server")
    Recorder(channel).answers = vsp.answers
    channel.waiter = bench.wait
    return channel


def replace(bench: Bench, vsp: Recorder) -> ServerChannel:
    """A fresh server end on the old rings, with nothing restored yet."""
    bench.ready.discard("server")
    bench.server = made(bench, vsp)
    bench.server.bind(lambda _: None, bench.withdraw)
    bench.server.enable()
    bench.server_link = bench.link("server")
    bench.server.reopen(bench.server_link)
    return bench.server


def test_pieces_that_are_no_whole_chunks_are_refused_and_forgotten(bench: Bench, vsp: Recorder) -> None:
    bench.server.save_begin()
    data = bench.server.save_continue(1 << 20).data
    bench.server.save_end()
    fresh = replace(bench, vsp)
    cuts = [cut for cut in range(1, len(data), 7) if not whole(data[:cut])]
    for cut in cuts:
        with pytest.raises(StateError):
            fresh.restore_from_buffer(data[:cut])
        assert fresh.packets_in_use == []
    assert fresh.restore_from_buffer(data)
    assert len(fresh.packets_in_use) == COUNT


def whole(data: bytes) -> bool:
    try:
        split_frames(data)
    except StateError:
        return False
    return True


@pytest.mark.parametrize("which", ["sent", "queued"])
def test_a_packet_restored_twice_is_refused(bench: Bench, vsp: Recorder, which: str) -> None:
    head, *packets = bench.server.save()
    twice = packets[0] if which == "sent" else packets[-1]
    more = encode(decode_chunk(head).__class__(1, True, decode_chunk(head).next_transaction, len(packets) + 1))
    fresh = replace(bench, vsp)
    with pytest.raises(StateError, match="there twice"):
        fresh.restore([more, *packets, twice])
    assert fresh.packets_in_use == []
    fresh.restore([head, *packets])
    with pytest.raises(ChannelStateError, match="in use already"):
        fresh.restore([head, *packets])
    assert len(fresh.packets_in_use) == COUNT


def test_restore_needs_an_enabled_and_fresh_channel(bench: Bench, vsp: Recorder) -> None:
    chunks = bench.server.save()
    assert status_of(lambda: made(bench, vsp).restore_from_buffer(b"")) is Status.INVALID_DEVICE_STATE
    fresh = replace(bench, vsp)
    fresh.allocate_packet().send(b"too early")
    assert status_of(lambda: fresh.restore(chunks)) is Status.INVALID_DEVICE_STATE
