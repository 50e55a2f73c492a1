"""Messages of the integration services: what goes in comes out, where Linux's structures have it, and nothing else."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbus.kmcl.pipe import frame
from vmbus.wire import ic

versions = st.builds(ic.Version, st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
lists = st.lists(versions, max_size=8)
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=120)


@given(
    st.builds(
        ic.Message,
        st.integers(0, 0xFFFF),
        st.binary(max_size=3000),
        versions,
        versions,
        st.integers(0, 0xFFFFFFFF),
        st.integers(0, 255),
        st.integers(0, 255),
    )
)
def test_a_message_round_trips(message: ic.Message) -> None:
    assert ic.parse(message.pack()) == message
    padded = message.pack() + bytes(-len(message.pack()) % 8)
    assert ic.parse(padded).body.startswith(message.body)


def test_where_the_fields_are() -> None:
    """Offsets from the pipe's header, as Linux counts them (include/linux/hyperv.h has the structures)."""
    message = ic.Message(1, b"BODY", ic.Version(3, 1), ic.Version(4, 2), 0x80004005, 77, 3)
    raw = frame(message.pack())
    assert raw[:8] == struct.pack("<II", 1, 24)
    assert struct.unpack_from("<HHHHHHIBBH", raw, 8) == (3, 1, 1, 4, 2, 4, 0x80004005, 77, 3, 0)
    assert raw[28:] == b"BODY"

    def whole(body: bytes) -> bytes:
        return frame(ic.Message(0, body).pack())

    offer = whole(ic.negotiation(ic.FRAMEWORK_VERSIONS, ic.SHUTDOWN.versions))
    assert struct.unpack_from("<HHI", offer, 28) == (2, 4, 0)
    assert struct.unpack_from("<12H", offer, 36) == (3, 0, 1, 0, 3, 2, 3, 1, 3, 0, 1, 0)
    assert struct.unpack_from("<Q", whole(ic.heartbeat(5)), 28) == (5,)
    assert len(whole(ic.heartbeat(5))) == 68
    down = whole(ic.shutdown(ic.Shutdown(flags=3, reason=7, timeout=9, text="bye")))
    assert struct.unpack_from("<III", down, 28) == (7, 9, 3) and len(down) == 2088
    assert down[40:48] == "bye\0".encode("utf-16-le")
    three = whole(ic.time_sync(ic.TimeSync(1.5, ic.TimeFlag.SYNC), ic.Version(3, 0)))
    assert struct.unpack_from("<QQQB", three, 28) == (116444736015000000, 0, 0, 1)
    four = whole(ic.time_sync(ic.TimeSync(0.0, ic.TimeFlag.SAMPLE, 99), ic.Version(4, 0)))
    assert struct.unpack_from("<QQBBB", four, 28) == (116444736000000000, 99, 2, 0, 0)
    put = whole(ic.kvp(ic.Kvp(ic.KvpOperation.SET, ic.Pool.GUEST, "ab", "xyz")))
    assert struct.unpack_from("<BB", put, 28) == (1, 1)
    assert struct.unpack_from("<III", put, 32) == (1, 6, 8)
    assert put[44:50] == "ab\0".encode("utf-16-le") and put[556:564] == "xyz\0".encode("utf-16-le")
    assert len(put) == 2604
    gone = whole(ic.kvp(ic.Kvp(ic.KvpOperation.DELETE, 0, "ab")))
    assert struct.unpack_from("<I", gone, 32) == (6,) and gone[36:42] == "ab\0".encode("utf-16-le")
    listed = whole(ic.kvp(ic.Kvp(ic.KvpOperation.ENUMERATE, 2, "ab", "7", ic.ValueType.U32, position=3)))
    assert struct.unpack_from("<IIII", listed, 32) == (3, 4, 6, 4)
    assert listed[48:54] == "ab\0".encode("utf-16-le") and listed[560:564] == b"\7\0\0\0"
    assert len(listed) == 2608


@given(lists, lists)
def test_offers_round_trip(frameworks: list[ic.Version], messages: list[ic.Version]) -> None:
    body = ic.negotiation(frameworks, messages)
    assert ic.parse_negotiation(body) == (frameworks, messages)
    assert ic.parse_negotiation(body + b"rest") == (frameworks, messages)
    if body[8:]:
        with pytest.raises(ic.IcError, match="versions in"):
            ic.parse_negotiation(body[:-1])


def test_the_guest_chooses_its_newest_that_is_offered() -> None:
    offer = ic.negotiation([(1, 0), (3, 0)], [(1, 0), (3, 0), (9, 9)])  # type: ignore[list-item]
    choice = ic.choose(offer, ic.FRAMEWORK_VERSIONS, ic.KVP.versions)
    assert choice == ((3, 0), (3, 0))
    request = ic.Message(ic.MessageType.NEGOTIATE, offer, transaction=5)
    # In the request's own buffer, so with its length: only the counts say how much of it counts.
    answer = ic.parse(request.reply(ic.answer_negotiation(choice)).pack())
    assert ic.parse_negotiation(answer.body) == ([(3, 0)], [(3, 0)])
    assert (answer.transaction, answer.flags, len(answer.body)) == (5, 5, len(offer))
    none = ic.choose(ic.negotiation([(7, 0)], [(1, 0)]), ic.FRAMEWORK_VERSIONS, ic.KVP.versions)  # type: ignore[list-item]
    assert none is None and ic.parse_negotiation(ic.answer_negotiation(none)) == ([], [])
    with pytest.raises(ic.IcError, match="at most 100"):
        ic.parse_negotiation(struct.pack("<HHI", 101, 0, 0) + bytes(404))


@given(st.integers(0, (1 << 64) - 1))
def test_heartbeats_round_trip(sequence: int) -> None:
    assert ic.parse_heartbeat(ic.heartbeat(sequence)) == sequence


@given(st.sampled_from(list(ic.VssOperation)), st.binary(max_size=20))
def test_requests_about_file_systems_round_trip(operation: ic.VssOperation, rest: bytes) -> None:
    body = ic.vss(operation)
    # Linux leaves a message of less than 40 bytes, with both headers, without an answer.
    assert len(body) == 12 and body[:8] == bytes([operation]) + bytes(7)
    assert ic.parse_vss(body + rest) == operation
    with pytest.raises(ic.IcError, match="it has 12"):
        ic.parse_vss(body[:-1])


@given(st.integers(0, 7), st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF), texts)
def test_shutdowns_round_trip(flags: int, reason: int, timeout: int, text: str) -> None:
    request = ic.Shutdown(flags, reason, timeout, text)
    assert ic.parse_shutdown(ic.shutdown(request)) == request


def test_a_text_that_is_too_long_is_cut() -> None:
    assert len(ic.parse_shutdown(ic.shutdown(ic.Shutdown(text="x" * 5000))).text) == 1023


@given(st.integers(0, 1 << 32), st.sampled_from(list(ic.TimeFlag)), st.sampled_from(ic.TIME.versions))
def test_times_round_trip(milliseconds: int, flag: int, version: ic.Version) -> None:
    seconds = milliseconds / 1000
    found = ic.parse_time_sync(ic.time_sync(ic.TimeSync(seconds, flag), version), version)
    assert abs(found.seconds - seconds) < 2 / ic.UNITS and found.flag == flag


@given(
    st.sampled_from(list(ic.KvpOperation)),
    st.integers(0, 4),
    texts.filter(bool),
    texts.filter(bool),
    st.integers(0, 1000),
)
def test_key_values_round_trip(operation: int, pool: int, key: str, value: str, index: int) -> None:
    if operation == ic.KvpOperation.DELETE:
        message = ic.Kvp(operation, pool, key)
    elif operation == ic.KvpOperation.ENUMERATE:
        message = ic.Kvp(operation, pool, key, value, position=index)
    else:
        message = ic.Kvp(operation, pool, key, value)
    assert ic.parse_kvp(ic.kvp(message)) == message


def test_numbers_and_requests_without_a_value() -> None:
    for kind, value in ((ic.ValueType.U32, "4294967295"), (ic.ValueType.U64, "18446744073709551615")):
        message = ic.Kvp(ic.KvpOperation.SET, 0, "n", value, kind)
        assert ic.parse_kvp(ic.kvp(message)) == message
    for message in (ic.Kvp(ic.KvpOperation.GET, 1, "key"), ic.Kvp(ic.KvpOperation.ENUMERATE, 1, position=5)):
        assert ic.parse_kvp(ic.kvp(message)) == message
    for wrong in (
        ic.Kvp(ic.KvpOperation.SET, 0, "x" * 256, "y"),
        ic.Kvp(ic.KvpOperation.SET, 0, "x", "y" * 1024),
        ic.Kvp(ic.KvpOperation.SET, 0, "a\0b", "y"),
        ic.Kvp(ic.KvpOperation.SET, 0, "x", "4294967296", ic.ValueType.U32),
        ic.Kvp(ic.KvpOperation.SET, 0, "x", "-1", ic.ValueType.U32),
        ic.Kvp(ic.KvpOperation.SET, 0, "x", "1", 77),
    ):
        with pytest.raises(ValueError):
            ic.kvp(wrong)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (4, 99, "a value of type 99"),
        (8, 513, "a key of 513 bytes"),
        (8, 5, "a key of 5 bytes"),
        (12, 2050, "a value of 2050 bytes"),
        (0, 200, "operation 200 is not known"),
    ],
)
def test_sizes_and_types_are_not_believed(offset: int, value: int, message: str) -> None:
    body = bytearray(ic.kvp(ic.Kvp(ic.KvpOperation.SET, 0, "key", "value")))
    struct.pack_into("<I" if offset else "<B", body, offset, value)
    with pytest.raises(ic.IcError, match=message):
        ic.parse_kvp(bytes(body))
