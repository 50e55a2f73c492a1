"""KMCL channels: sending, completing, states, save and restore, over rings in a bytearray."""

import struct

import pytest

from support.endpoints import Recorder
from support.pair import BASE, INSTANCE, TYPE, Pair
from vmbus.errors import StateError
from vmbus.kmcl import ChannelState, ChannelStateError, KmclError, Status
from vmbus.kmcl.saved import LibBuf, decode_chunk, decode_lib, encode
from vmbus.kmcl.server import ServerChannel
from vmbus.wire.packet import PacketType, TransferPages, transfer_pages_body


class Guest:
    """A VSC that takes packets and completes them when told."""

    def __init__(self, pair: Pair) -> None:
        self.channel = pair.client
        self.held: list = []
        self.seen: list[int] = []
        self.answers: list[tuple[int, int, bytes]] = []
        self.channel.set_process_packet_callbacks(self.process)

    def process(self, channel, completion, payload: bytes) -> None:
        self.held.append((completion, payload))
        self.seen.append(struct.unpack_from("<Q", payload)[0])

    def complete(self, count: int | None = None) -> None:
        count = len(self.held) if count is None else count
        with self.channel.batch():
            for completion, payload in self.held[:count]:
                completion.complete(payload[:8] + b"answered")
        del self.held[:count]


@pytest.fixture
def pair() -> Pair:
    return Pair()


@pytest.fixture
def vsp(pair: Pair) -> Recorder:
    return Recorder(pair.server)


@pytest.fixture
def guest(pair: Pair) -> Guest:
    return Guest(pair)


def answered(number: int) -> tuple[int, int, bytes]:
    return (number, Status.SUCCESS, struct.pack("<Q", number) + b"answered")


def test_the_guest_may_repeat_a_transaction_id(pair, vsp, guest) -> None:
    pair.open()
    for number in (77, 77, 0, (1 << 64) - 1):
        pair.client.allocate_packet().send(b"answer..", wait_for_completion=False, transaction=number)
    pair.client.allocate_packet().send(b"its own.", wait_for_completion=False)
    pair.run()
    taken = [completion.transaction for completion, _ in vsp.incoming]
    assert taken == [77, 77, 0, (1 << 64) - 1, 1], "ids of its own go on as if there had been no others"
    for end, arguments in (
        (pair.client, {"wait_for_completion": True, "transaction": 7}),
        (pair.client, {"wait_for_completion": False, "transaction": 1 << 64}),
        (pair.server, {"wait_for_completion": False, "transaction": 7}),
    ):
        with pytest.raises(KmclError, match="only the guest's end may choose it"):
            end.allocate_packet().send(b"wrong...", **arguments)
    for completion, _ in vsp.incoming:
        completion.complete()


def test_the_host_sends_packets_that_belong_to_no_request(pair, vsp, guest) -> None:
    """Under number 0, any number of them; they do not count, and go over a save while they wait for room."""
    pair.open()
    vsp.send()
    for _ in range(2):
        packet = pair.server.allocate_packet()
        packet.send(b"unasked.", wait_for_completion=False, transaction=0)
    vsp.send()
    pair.run()
    assert [completion.transaction for completion, _ in guest.held] == [1, 0, 0, 2]
    with pytest.raises(KmclError, match="only where no completion is waited for"):
        pair.server.allocate_packet().send(b"wrong...", transaction=0)
    chunk = encode(LibBuf(1, 0, True, 6, 2, 1, b"unasked."))
    with pytest.raises(StateError, match="has no transaction id to find it by"):
        decode_lib(chunk)
    assert decode_lib(encode(LibBuf(1, 0, True, 6, 2, 0, b"unasked."))).transaction == 0
    guest.complete()


def test_closing_gives_every_packet_back_as_cancelled_in_order(pair, vsp, guest) -> None:
    pair.open()
    for _ in range(200):
        vsp.send()
    pair.run()
    pair.server.close(lambda: None)
    assert vsp.answers == [(number, Status.CANCELLED, b"") for number in range(200)]
    with pytest.raises(ChannelStateError, match="closed"):
        vsp.send()


# ---- save and restore ------------------------------------------------------------------------------------------------


def fill(pair: Pair, vsp: Recorder, guest: Guest, count: int = 400) -> None:
    """Packets in every state: completed, taken and held by the guest, in the ring, queued."""
    pair.open()
    for _ in range(count):
        vsp.send()
    pair.turn("client")
    guest.complete(5)
    pair.turn("server")
    pair.server.quiesce()


def restored(pair: Pair, vsp: Recorder, chunks: list[bytes]) -> Recorder:
    fresh: list[Recorder] = []

    def make() -> ServerChannel:
        channel = ServerChannel(TYPE, INSTANCE, name="server")
        fresh.append(Recorder(channel))
        return channel

    pair.replace_server(make, chunks)
    fresh[0].answers = vsp.answers
    fresh[0].next = vsp.next
    return fresh[0]


def pages(number: int) -> TransferPages:
    return TransferPages(0xCAFE, [(64 * number, 60), (64 * number + 4096, 1 + number % 60)])


def test_transfer_pages_reach_the_guest(pair, vsp, guest) -> None:
    pair.open()
    vsp.send(transfer_pages=pages(3))
    vsp.send()
    pair.run()
    (first, _), (second, _) = guest.held
    assert first.kind == PacketType.TRANSFER_PAGES and first.wanted and not first.has_external_data
    assert first.transfer_pages() == pages(3)
    with pytest.raises(KmclError) as refused:
        second.transfer_pages()
    assert refused.value.status == Status.INVALID_DEVICE_REQUEST
    with pytest.raises(KmclError, match="no external data"):
        first.external_data()
    guest.complete()
    pair.run()
    assert vsp.answers == [answered(0), answered(1)]


@pytest.mark.parametrize("size", [0, 7, 8, 16])
def test_transfer_pages_that_make_no_sense_are_an_error_of_that_packet_alone(pair, vsp, guest, size: int) -> None:
    pair.open()
    body = struct.pack("<HBBI", 0xCAFE, 0, 0, 4)[:size].ljust(size + 8 & ~7, b"\0") + bytes(8)
    assert pair.server_link.writer.put(7, 0, 1, body, 3 + (len(body) - 16) // 8)
    pair.server_link.writer.commit()
    pair.ready.add("client")
    pair.run()
    with pytest.raises(KmclError) as refused:
        guest.held[0][0].transfer_pages()
    assert refused.value.status == Status.DATA_ERROR
    guest.complete()
    assert pair.client.state is ChannelState.ACTIVE


def test_transfer_pages_that_cannot_be_are_refused_before_anything_is_sent(pair, vsp, guest) -> None:
    pair.open()
    for wrong, arguments in (
        (TransferPages(0xCAFE, []), {}),
        (TransferPages(0xCAFE, [(0, 1)] * 1025), {}),
        (TransferPages(0xCAFE, [(0, 0)]), {}),
        (TransferPages(0x10000, [(0, 1)]), {}),
        (TransferPages(1, [(1 << 32, 1)]), {}),
        (pages(1), {"wait_for_completion": False}),
        (pages(1), {"external": [(BASE, 1)]}),
    ):
        with pytest.raises(KmclError) as refused:
            vsp.send(transfer_pages=wrong, **arguments)
        assert refused.value.status == Status.INVALID_PARAMETER, wrong
    with pytest.raises(KmclError) as refused:
        pair.client.allocate_packet().send(b"", transfer_pages=pages(1))
    assert refused.value.status == Status.INVALID_DEVICE_REQUEST
    assert pair.server.packets_in_use == pair.client.packets_in_use == []


def test_a_guest_cannot_send_transfer_pages(pair, vsp, guest) -> None:
    pair.open()
    body, offset8 = transfer_pages_body(pages(1), b"payload!")
    assert pair.client_link.writer.put(7, 1, 1, body, offset8)
    pair.client_link.writer.commit()
    pair.ready.add("server")
    pair.run()
    assert pair.server_link.failures == ["packet 1 is over transfer pages, and none were lent"] and not vsp.incoming


def test_sabotage_a_packet_taken_out_of_the_state_is_noticed(pair, vsp, guest) -> None:
    fill(pair, vsp, guest)
    chunks = pair.server.save()
    with pytest.raises(StateError, match="cut"):
        restored(pair, vsp, chunks[:5] + chunks[6:])
    # Even with a head that fits, the answer of the lost packet has nobody waiting for it: the channel fails.
    head = decode_chunk(chunks[0])
    del chunks[5]
    chunks[0] = encode(type(head)(head.version, head.started, head.next_transaction, head.entries - 1))
    again = restored(pair, vsp, chunks)
    for _ in range(50):
        pair.run()
        guest.complete()
    assert "not waiting for one" in pair.server_link.failures[0]
    assert len({number for number, status, _ in again.answers if status == Status.SUCCESS}) < 400


def test_sabotage_without_the_providers_state_the_packet_is_useless(pair, vsp, guest) -> None:
    fill(pair, vsp, guest)
    chunks = pair.server.save()
    chunk = decode_chunk(chunks[1])
    chunks[1] = encode(type(chunk)(lib=chunk.lib, save=b""))
    with pytest.raises(KmclError, match="the restore callback of channel server, for packet 6"):
        restored(pair, vsp, chunks)
