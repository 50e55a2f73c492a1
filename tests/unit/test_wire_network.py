"""NVSP and RNDIS messages, what is left to do with frames, and the arena of the receive buffer."""

from __future__ import annotations

import contextlib
import random
import struct
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.nic import frame, udp
from vmbus.providers.network import oids
from vmbus.providers.network.lent import Arena
from vmbus.providers.network.offload import ones_sum, to_guest, to_host
from vmbus.wire import nvsp, rndis
from vmbus.wire.ethernet import NO_OFFLOAD, OFFLOAD, check_frame

WORD = st.integers(0, 0xFFFFFFFF)

# ---- NVSP ------------------------------------------------------------------------------------------------------------

MESSAGES = st.one_of(
    st.builds(nvsp.Init, WORD, WORD),
    st.builds(nvsp.NdisVersion, WORD, WORD),
    st.builds(nvsp.NdisConfig, WORD, st.integers(0, (1 << 64) - 1)),
    st.builds(nvsp.ReceiveBuffer, WORD, st.integers(0, 0xFFFF)),
    st.builds(nvsp.SendBuffer, WORD, st.integers(0, 0xFFFF)),
    st.builds(nvsp.RevokeReceiveBuffer, st.integers(0, 0xFFFF)),
    st.builds(nvsp.RevokeSendBuffer, st.integers(0, 0xFFFF)),
    st.builds(nvsp.Rndis, WORD, WORD, WORD),
    st.builds(nvsp.SubChannels, WORD, WORD),
    st.builds(nvsp.PdApi, WORD),
    st.builds(nvsp.Other, st.sampled_from(sorted(nvsp._OTHERS))),
)


@given(MESSAGES)
def test_messages_come_out_as_they_went_in(message: nvsp.Message) -> None:
    packed = nvsp.pack_message(message)
    assert len(packed) == 40 and nvsp.parse(packed) == message and nvsp.parse(packed + bytes(24)) == message


def test_the_bytes_of_nvsp() -> None:
    assert nvsp.init_complete(0x60001, 1).hex(" ", 4).startswith("02000000 01000600 22000000 01000000")
    told = nvsp.receive_buffer_complete(1, 1806, 9289)
    assert struct.unpack_from("<7I", told) == (102, 1, 1, 0, 1806, 9289, 1806 * 9289)
    assert struct.unpack_from("<7I", nvsp.receive_buffer_complete(2)) == (102, 2, 0, 0, 0, 0, 0)
    assert struct.unpack_from("<3I", nvsp.send_buffer_complete(1, 6144)) == (105, 1, 6144)
    assert struct.unpack_from("<3I", nvsp.sub_channels_complete(1, 3)) == (133, 1, 3)
    assert struct.unpack_from("<2I", nvsp.rndis_complete(1)) == (108, 1)
    assert struct.unpack_from("<4I", nvsp.rndis(1)) == (107, 1, 0xFFFFFFFF, 0)
    assert struct.unpack("<19I", nvsp.indirection_table(range(16))) == (134, 16, 12, *range(16))
    assert all(len(one) == 64 for one in (told, nvsp.init_complete(2, 1), nvsp.send_buffer_complete(1)))
    assert nvsp.parse_answer(nvsp.rndis_complete(5))[:2] == (108, (5, 0, 0))


# ---- RNDIS -----------------------------------------------------------------------------------------------------------


def parse_all(data: bytes) -> list[rndis.Message]:
    return [rndis.parse(one) for one in rndis.messages(data)]


@given(
    st.lists(st.tuples(st.binary(max_size=100), st.lists(st.tuples(st.integers(0, 20), WORD), max_size=3)), max_size=8)
)
def test_frames_come_out_as_they_went_in(frames: list[tuple[bytes, list[tuple[int, int]]]]) -> None:
    data = b""
    for content, information in frames:
        data += rndis.packet_header(len(content), b"".join(rndis.ppi(*one) for one in information)) + content
    found = parse_all(data)
    assert [bytes(one.frame) for one in found if isinstance(one, rndis.Packet)] == [one[0] for one in frames]
    for one, (_, information) in zip(found, frames, strict=True):
        assert isinstance(one, rndis.Packet)
        assert one.information == dict(reversed(information))


@given(WORD, WORD, st.binary(max_size=200))
def test_requests_come_out_as_they_went_in(request: int, oid: int, data: bytes) -> None:
    assert parse_all(rndis.query(request, oid, data)) == [rndis.Query(request, oid, data)]
    assert parse_all(rndis.set_oid(request, oid, data)) == [rndis.Set(request, oid, data)]
    assert parse_all(rndis.initialize(request)) == [rndis.Initialize(request, 1, 0, rndis.TRANSFER_SIZE)]
    assert parse_all(rndis.halt(request)) == [rndis.Halt(request)]
    assert parse_all(rndis.keepalive(request)) == [rndis.Keepalive(request)]


@given(
    st.binary(min_size=44, max_size=160),
    st.integers(0, 120),
    st.integers(0, 160),
    st.integers(0, 160),
    st.integers(0, 160),
)
def test_no_packet_message_does_worse_either(data: bytes, offset: int, length: int, at: int, total: int) -> None:
    message = bytearray(data)
    struct.pack_into("<9I", message, 0, 1, len(data), offset, length, 0, 0, 0, at, total)
    try:
        (found,) = parse_all(bytes(message))
    except rndis.RndisError:
        return
    assert isinstance(found, rndis.Packet) and bytes(found.frame) == bytes(message)[8 + offset :][:length]
    with contextlib.suppress(rndis.RndisError):
        check_frame(to_host(found, True), 9000, True)


def test_the_bytes_of_rndis() -> None:
    header = rndis.packet_header(60, rndis.ppi(rndis.Ppi.CHECKSUM, 8))
    assert struct.unpack("<15I", header) == (1, 120, 52, 60, 0, 0, 0, 36, 16, 0, 0, 16, 0, 12, 8)
    assert struct.unpack("<11I", rndis.packet_header(60)) == (1, 104, 36, 60, 0, 0, 0, 0, 0, 0, 0)
    assert struct.unpack_from("<13I", rndis.initialize_complete(7))[:11] == (
        *(0x80000002, 52, 7, 0, 1, 0, 1, 0),
        *(8, 0x4000, 3),
    )
    assert struct.unpack("<7I", rndis.query_complete(7, 0, b"abcd")) == (0x80000004, 28, 7, 0, 4, 16, 0x64636261)
    assert struct.unpack("<4I", rndis.set_complete(7, 5)) == (0x80000005, 16, 7, 5)
    assert struct.unpack("<5I", rndis.indicate(0x4001000B)) == (7, 20, 0x4001000B, 0, 0)


# ---- OIDs ------------------------------------------------------------------------------------------------------------


def test_what_linux_looks_for_in_the_capabilities() -> None:
    whole = oids.ndis_offload(True, True)
    assert len(whole) == 156 and whole[:4] == b"\xa7\x03\x9c\0"
    word = lambda at: struct.unpack_from("<I", whole, at)[0]  # noqa: E731
    assert word(8) & 0x14 == 0x14 and word(8) & 0x40 and word(24) & 0x15 == 0x15 and word(24) & 0x40
    assert word(80) & 2 and word(92) & 2 and word(104) & 5 == 5 and word(84) == word(96) == 0xF53C
    assert whole[144] and whole[145]
    assert not any(oids.ndis_offload(False, False)[4:])
    assert oids.ndis_offload(True, False)[144:146] == b"\0\0"


def parameters(four: int, six: int, size: int = 28) -> bytes:
    data = bytearray(struct.pack("<BBH", 0x80, 3, size) + bytes(size - 4))
    if size >= 24:
        data[22], data[23] = four, six
    return bytes(data)


def test_whether_long_frames_are_wanted() -> None:
    assert oids.coalescing_wanted(parameters(2, 2)) is True
    assert oids.coalescing_wanted(parameters(2, 1)) is False and oids.coalescing_wanted(parameters(1, 1)) is False
    assert oids.coalescing_wanted(parameters(0, 0)) is None, "no change"
    assert oids.coalescing_wanted(parameters(0, 0, 22)) is False
    for bad in (b"", b"\x80", parameters(2, 2)[:20], b"\x81" + parameters(2, 2)[1:]):
        assert oids.coalescing_wanted(bad) is None and not oids.offload_parameters(bad)


@given(st.binary(max_size=80))
def test_no_parameters_do_worse_than_none(data: bytes) -> None:
    for one in (data, b"\x80" + data):
        oids.coalescing_wanted(one)
        oids.offload_parameters(one)


# ---- what is left to do with a frame ---------------------------------------------------------------------------------


def tcp(size: int, *, six: bool = False, flags: int = 0x10) -> bytes:
    """A TCP segment's frame as Linux hands it to an adapter that cuts it: no lengths, no checksums."""
    segment = struct.pack("!HHIIBBHHH", 1, 2, 3, 4, 0x50, flags, 1000, 0, 0) + random.Random(size).randbytes(size)
    if six:
        return bytes(12) + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, 0, 6, 64) + bytes(range(32)) + segment
    head = struct.pack("!BBHHHBBH", 0x45, 0, 0, 1, 0, 64, 6, 0) + b"\xc0\0\2\1\xc0\0\2\2"
    return bytes(12) + b"\x08\0" + head + segment


def plain_sum(data: bytes) -> int:
    """The checksum as it is taught."""
    total = sum(struct.unpack(f"!{len(data + bytes(len(data) % 2)) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@given(st.binary(max_size=300))
def test_the_sum(data: bytes) -> None:
    assert ones_sum(data) == plain_sum(data) % 0xFFFF


@pytest.mark.parametrize("six", [False, True])
@pytest.mark.parametrize("size", [1, 1401, 30001, 60000])
def test_segmentation_gets_what_the_kernel_wants(six: bool, size: int) -> None:
    whole = tcp(size, six=six, flags=0x90)
    start = 54 if six else 34
    value = 1 << 30 | 1400 | start << 20 | six << 31
    found = to_host(rndis.Packet(memoryview(whole), {rndis.Ppi.LSO: value}), True)
    flags, kind, headers, segment, sum_from, at = OFFLOAD.unpack_from(found)
    assert (flags, kind, headers, segment, sum_from, at) == (1, 0x80 | (4 if six else 1), start + 20, 1400, start, 16)
    assert check_frame(found, 1500, True) == ""
    content = found[10:]
    length = struct.pack("!I", size + 20)
    if six:
        assert struct.unpack_from("!H", content, 18)[0] == size + 20
        pseudo = content[22:54] + length + struct.pack("!I", 6)
    else:
        assert struct.unpack_from("!H", content, 16)[0] == size + 40
        assert plain_sum(content[14:34]) == 0xFFFF, "the IP header's checksum"
        pseudo = content[26:34] + struct.pack("!H", 6) + length
    assert struct.unpack_from("!H", content, start + 16)[0] == plain_sum(pseudo)


def test_a_checksum_to_be_filled_in() -> None:
    whole = udp(1, 1)[10:]
    wish = rndis.Checksum.IPV4 | rndis.Checksum.UDP | 34 << 16
    found = to_host(rndis.Packet(memoryview(whole), {rndis.Ppi.CHECKSUM: wish}), True)
    assert OFFLOAD.unpack_from(found) == (1, 0, 0, 0, 34, 6) and found[10:] == whole
    tagged = to_host(rndis.Packet(memoryview(whole), {rndis.Ppi.CHECKSUM: wish, rndis.Ppi.VLAN: 5 << 4}), True)
    assert OFFLOAD.unpack_from(tagged) == (1, 0, 0, 0, 38, 6) and tagged[22:26] == b"\x81\0\0\5"
    broken = bytearray(whole)
    broken[24:26] = b"\0\0"
    header = to_host(rndis.Packet(memoryview(broken), {rndis.Ppi.CHECKSUM: 1 | 16}), True)
    assert header[:10] == NO_OFFLOAD and plain_sum(header[24:44]) == 0xFFFF
    with pytest.raises(rndis.RndisError, match="not offered"):
        to_host(rndis.Packet(memoryview(whole), {rndis.Ppi.CHECKSUM: wish}), False)


@given(st.binary(min_size=0, max_size=120), st.dictionaries(st.sampled_from([0, 2, 6]), WORD), st.booleans())
def test_no_wish_of_a_guest_does_worse_than_an_error(data: bytes, information: dict[int, int], ip: bool) -> None:
    whole = data[:12] + b"\x08\0\x45" + data[15:] if ip else data
    try:
        found = to_host(rndis.Packet(memoryview(whole), information), True)
    except rndis.RndisError:
        return
    check_frame(found, 1500, True)


def test_the_guest_gets_sums_that_are_right() -> None:
    for size in (0, 1, 2, 31, 1000):
        whole = bytearray(udp(5, 7, size=size)[10:])
        length = len(whole) - 34
        pseudo = bytes(whole[26:34]) + struct.pack("!HH", 17, length)
        whole[40:42] = struct.pack("!H", plain_sum(pseudo))
        message = to_guest(OFFLOAD.pack(1, 0, 0, 0, 34, 6) + whole)
        found = rndis.parse(memoryview(message))
        assert isinstance(found, rndis.Packet) and found.information == {0: rndis.RECEIVED_UDP_GOOD}
        assert plain_sum(pseudo + bytes(found.frame[34:])) == 0xFFFF
    untouched = rndis.parse(memoryview(to_guest(frame(b"abc"))))
    assert isinstance(untouched, rndis.Packet) and not untouched.information
    long = OFFLOAD.pack(1, 1, 54, 1448, 34, 16) + bytes(60000)
    assert len(to_guest(long)) == 44 + 16 + 60000


# ---- the arena -------------------------------------------------------------------------------------------------------


@given(st.integers(2, 40), st.lists(st.tuples(st.integers(0, 3), st.integers(1, 200)), max_size=200))
def test_no_two_packets_have_the_same_bytes(pages: int, steps: list[tuple[int, int]]) -> None:
    """Against a model that marks each byte; also over a restore at any time."""
    size = 32 * pages
    arena = Arena(1000, size)
    owner: dict[int, int] = {}
    packets: deque[tuple[int, int, list[int]]] = deque()
    waiting: list[int] = []
    number = 0
    for what, length in steps:
        if what < 2:
            could = arena.fits(length)
            place = arena.take(length)
            assert (place is not None) is could
            if place is not None:
                assert 1000 <= place <= 1000 + size - length
                for byte in range(place, place + length):
                    assert byte not in owner, "somebody else has it"
                    owner[byte] = number
                    waiting.append(byte)
        elif what == 2 and waiting:
            packets.append((*arena.finish(), waiting))
            waiting, number = [], number + 1
        elif what == 3 and packets:
            packet = packets[length % len(packets)]  # in any order
            packets.remove(packet)
            arena.give_back(packet[1])
            for byte in packet[2]:
                del owner[byte]
        if length % 7 == 0 and not waiting:
            again = Arena(1000, size)
            assert all(again.restore(begin, end) for begin, end, _ in packets)
            arena = again
    if not waiting:
        for _, end, _ in packets:
            arena.give_back(end)
        assert arena.used == 0 and arena.fits(size)


def test_what_cannot_be_restored() -> None:
    arena = Arena(0, 100)
    assert arena.restore(50, 60) and arena.restore(60, 80)
    for begin, end in ((70, 90), (80, 79), (80, 200), (0, 10)):
        assert not arena.restore(begin, end)
    assert arena.restore(80, 150) and not arena.fits(8)
