"""Channel messages, packets and GPA ranges as bytes."""

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.twins import OVER_BOTH, Twin
from vmbus.wire import messages as m
from vmbus.wire.gpa import GpaRange, RangeError, extents_of, pack_ranges, page_count, parse_ranges, range_for
from vmbus.wire.packet import (
    PacketError,
    PacketType,
    TransferPages,
    gpa_direct_body,
    parse_gpa_direct,
    parse_transfer_pages,
    transfer_pages_body,
)

U32 = st.integers(0, 0xFFFFFFFF)
WORDS = st.binary(max_size=200).map(lambda data: data[: len(data) & ~7])

MESSAGES = st.one_of(
    st.builds(
        m.OfferChannel,
        st.uuids(),
        st.uuids(),
        st.integers(0, 0xFFFF),
        st.integers(0, 0xFFFF),
        st.binary(min_size=120, max_size=120),
        st.integers(0, 0xFFFF),
        st.integers(0, 0xFFFF),
        U32,
        st.integers(0, 255),
        st.integers(0, 255),
        st.integers(0, 0xFFFF),
        U32,
    ),
    st.builds(m.OpenChannel, U32, U32, U32, U32, U32, st.binary(min_size=120, max_size=120)),
    st.builds(m.GpadlHeader, U32, U32, st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), WORDS),
    st.builds(m.GpadlBody, U32, U32, WORDS),
    st.builds(m.InitiateContact, U32, U32, st.integers(0, 2**64 - 1), st.just(0), st.just(0)),
    st.builds(m.VersionResponse, st.integers(0, 1), st.integers(0, 255), U32),
    st.builds(m.OpenResult, U32, U32, U32),
    st.builds(m.GpadlTeardown, U32, U32),
    st.builds(m.RequestOffers),
    st.builds(m.Unload),
)


@given(MESSAGES)
def test_every_message_comes_back_as_it_was(message) -> None:
    data = m.encode(message)
    assert len(data) <= m.MAX_MESSAGE_SIZE
    number = int.from_bytes(data[:4], "little")
    back = m.decode(data, m.MESSAGES[number].direction)
    assert type(back) is type(message)
    assert back == message


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (m.OfferChannel, 196),
        (m.RescindOffer, 12),
        (m.OpenChannel, 148),
        (m.OpenResult, 20),
        (m.GpadlHeader, 20),
        (m.GpadlBody, 16),
        (m.GpadlCreated, 20),
        (m.GpadlTorndown, 12),
        (m.InitiateContact, 40),
        (m.VersionResponse, 16),
        (m.ModifyChannel, 16),
    ],
)
def test_fixed_parts_have_the_sizes_of_the_protocol(name, size: int) -> None:
    row = next(row for row in m.MESSAGES.values() if row.message is name)
    assert m.HEADER_SIZE + row.fields.size == size


def test_an_offer_has_its_fields_where_guests_look_for_them() -> None:
    kind, instance = UUID(int=1 << 96 | 2), UUID(int=3)
    data = m.encode(m.OfferChannel(kind, instance, 0x11, 0, b"u" * 120, 2, 0, 7, 0, 0, 1, 0x10007))
    assert data[8:24] == kind.bytes_le
    assert data[24:40] == instance.bytes_le
    assert data[56:58] == b"\x11\x00"
    assert data[60:180] == b"u" * 120
    assert data[180:182] == b"\x02\x00"
    assert data[184:188] == (7).to_bytes(4, "little")
    assert data[190:192] == b"\x01\x00"
    assert data[192:196] == (0x10007).to_bytes(4, "little")


def test_a_message_of_the_other_direction_is_refused() -> None:
    with pytest.raises(m.MessageError, match="not known from guest"):
        m.decode(m.encode(m.UnloadResponse()), m.Direction.GUEST)


# ---- ranges ----------------------------------------------------------------------------------------------------------

RANGES = st.builds(
    lambda offset, length, pages: GpaRange(length, offset, tuple(pages[: page_count(length, offset)])),
    st.integers(0, 4095),
    st.integers(1, 20000),
    st.lists(st.integers(0, 1 << 40), min_size=8, max_size=8),
)


@given(st.lists(RANGES, min_size=1, max_size=5))
def test_ranges_come_back_and_their_extents_cover_them(ranges) -> None:
    data = pack_ranges(ranges)
    back, end = parse_ranges(data, len(ranges), max_bytes=1 << 30)
    assert (back, end) == (ranges, len(data))
    assert sum(length for _, length in extents_of(back)) == sum(one.byte_count for one in ranges)


@given(st.integers(0, 1 << 30), st.integers(1, 100_000))
def test_a_contiguous_range_is_one_extent(address: int, length: int) -> None:
    assert range_for(address, length).extents() == [(address, length)]


def test_scattered_pages_are_as_many_extents() -> None:
    assert GpaRange(6 + 4096 + 100, 4090, (5, 9, 10)).extents() == [(5 * 4096 + 4090, 6), (9 * 4096, 4196)]


@pytest.mark.parametrize(
    ("data", "count", "limit"),
    [
        (b"", 1, 1 << 20),
        (pack_ranges([GpaRange(0, 0, ())]), 1, 1 << 20),
        (pack_ranges([GpaRange(10, 4096, (1, 2))]), 1, 1 << 20),
        (pack_ranges([GpaRange(8192, 0, (1,))]), 1, 1 << 20),
        (pack_ranges([GpaRange(8192, 0, (1, 2))]), 1, 8191),
        (pack_ranges([GpaRange(1, 0, (1 << 60,))]), 1, 1 << 20),
    ],
)
def test_bad_ranges_are_refused(data: bytes, count: int, limit: int) -> None:
    with pytest.raises(RangeError):
        parse_ranges(data, count, max_bytes=limit)


# ---- packets -------------------------------------------------------------------------------------------------------


@OVER_BOTH
def test_the_bytes_of_a_small_packet(twin: Twin) -> None:
    from struct import pack

    data = pack("<HHHHQ", 6, 2, 3, 0, 7) + bytes([1, 2, 3, 4, 5, 0, 0, 0]) + pack("<II", 0, 0x40)
    assert data.hex(" ").startswith("06 00 02 00 03 00 00 00 07")
    packets, error = twin.split_packets(data)
    assert error is None
    assert [(p.kind, p.flags, p.transaction, p.payload, p.end) for p in packets] == [
        (6, 0, 7, bytes([1, 2, 3, 4, 5, 0, 0, 0]), 32)
    ]


@OVER_BOTH
@given(data=st.binary(max_size=400))
def test_no_ring_data_does_worse_than_an_error(twin: Twin, data: bytes) -> None:
    packets, _ = twin.split_packets(data)
    assert all(packet.end <= len(data) for packet in packets)


def test_gpa_direct_bodies_are_parsed_and_bounded() -> None:
    body, offset8 = gpa_direct_body([range_for(0x5008, 100)], b"payload!")
    assert offset8 == 3 + 2
    header = body[: (offset8 - 2) * 8]
    assert parse_gpa_direct(header, max_bytes=100) == [range_for(0x5008, 100)]
    with pytest.raises(PacketError, match="limit"):
        parse_gpa_direct(header, max_bytes=99)
    with pytest.raises(PacketError, match="0 ranges"):
        parse_gpa_direct(bytes(8), max_bytes=100)
    assert PacketType.GPA_DIRECT == 9


@given(st.integers(0, 0xFFFF), st.lists(st.tuples(st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF)), min_size=1))
def test_transfer_pages_come_out_as_they_went_in(page_set: int, ranges: list[tuple[int, int]]) -> None:
    body, offset8 = transfer_pages_body(TransferPages(page_set, ranges), b"payload!")
    assert len(body) == offset8 * 8 - 16 + 8 and body.endswith(b"payload!")
    assert parse_transfer_pages(body[:-8]) == (page_set, ranges)


def test_the_bytes_of_transfer_pages() -> None:
    body, offset8 = transfer_pages_body(TransferPages(0xCAFE, [(0x1000, 60), (0x2000, 61)]), b"")
    assert body.hex(" ", 4) == "feca0000 02000000 3c000000 00100000 3d000000 00200000" and offset8 == 5


@given(st.binary(max_size=64))
def test_no_transfer_pages_do_worse_than_an_error(body: bytes) -> None:
    try:
        found = parse_transfer_pages(body)
    except PacketError:
        return
    assert 8 + 8 * len(found.ranges) <= len(body) and found.ranges
