"""The workloads' formats and checks: every kind of damage is told apart."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbus.wire import workload as w


def counts(numbers: list[int]) -> tuple[int, int, int, int]:
    """(next, lost, reordered, duplicated) after numbers arrived."""
    tally = w.Tally()
    sequence = w.Sequence(tally)
    for number in numbers:
        sequence.arrived(number)
    return sequence.next, tally.lost, tally.reordered, tally.duplicated


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([], (0, 0, 0, 0)),
        ([0, 1, 2], (3, 0, 0, 0)),
        ([0, 2], (3, 1, 0, 0)),
        ([3], (4, 3, 0, 0)),
        ([0, 2, 1, 3], (4, 0, 1, 0)),
        ([2, 1, 0], (3, 0, 2, 0)),
        ([0, 0], (1, 0, 0, 1)),
        ([0, 1, 0, 1], (2, 0, 0, 2)),
    ],
)
def test_what_is_missing_late_or_twice_is_told_apart(numbers: list[int], expected: tuple[int, ...]) -> None:
    assert counts(numbers) == expected


@given(st.integers(0, 60), st.randoms())
def test_only_the_right_order_is_good(count: int, choose: random.Random) -> None:
    numbers = list(range(count))
    choose.shuffle(numbers)
    next_, lost, reordered, duplicated = counts(numbers)
    assert (next_, lost, duplicated) == (count, 0, 0)
    assert (reordered == 0) == (numbers == sorted(numbers))


@given(st.integers(1, 60), st.data())
def test_one_that_is_missing_or_doubled_is_never_good(count: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, count - 1))
    numbers = list(range(count))
    assert counts([*numbers[: index + 1], *numbers[index:]])[3] == 1
    if index < count - 1:  # the last one is missed by the totals, not by the order
        assert counts([*numbers[:index], *numbers[index + 1 :]])[1] == 1


def test_a_tally_survives_being_data() -> None:
    tally = w.Tally()
    assert tally.good
    for number, name in enumerate(("lost", "duplicated", "reordered", "corrupted", "started", "completed")):
        setattr(tally, name, number + 1)
    again = w.Tally()
    again.load(tally.as_dict())
    assert again.as_dict() == tally.as_dict() and not again.good
    with pytest.raises(KeyError):
        again.load({})


@pytest.mark.parametrize("name", ["lost", "duplicated", "reordered", "corrupted"])
def test_one_fault_of_any_kind_is_not_good(name: str) -> None:
    tally = w.Tally()
    setattr(tally, name, 1)
    assert not tally.good


@given(st.binary(max_size=300), st.integers(0, 1 << 40))
def test_the_transform_depends_on_every_byte_and_on_the_number(data: bytes, sequence: int) -> None:
    answer = w.transform(data, sequence)
    assert len(answer) == len(data)
    if data:
        assert answer != w.transform(data, sequence + 1)
        for index in {0, len(data) - 1}:
            changed = data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]
            assert w.transform(changed, sequence) != answer


def test_pattern_data_is_the_same_on_both_sides() -> None:
    assert w.Pattern(1).data(7, 65536) == w.Pattern(1).data(7, 65536)
    assert w.Pattern(1).data(7, 100) != w.Pattern(2).data(7, 100) != w.Pattern(2).data(8, 100)
    assert len(w.Pattern(1).data(10**12, 65536)) == 65536


@given(st.binary(max_size=100), st.integers(0, (1 << 64) - 1), st.integers(0, 7))
def test_echo_round_trip(data: bytes, sequence: int, padding: int) -> None:
    assert w.ECHO_REQUEST.unpack_from(w.echo_request(sequence, data, inline=True))[:2] == (sequence, len(data))
    reply = w.ECHO_REPLY.pack(sequence, len(data), 5, 0, 0) + data + bytes(padding)
    assert w.parse_echo_reply(reply) == w.EchoReply(sequence, len(data), 5, 0, data)
    assert w.parse_echo_reply(reply[: w.ECHO_REPLY.size - 1]) is None


@given(st.binary(max_size=100), st.integers(0, (1 << 64) - 1), st.data())
def test_a_changed_burst_packet_is_not_intact(data: bytes, sequence: int, draw: st.DataObject) -> None:
    packet = w.burst_data(sequence, data)
    assert w.parse_burst_packet(packet + bytes(-len(packet) % 8)) == w.BurstPacket(sequence, data, True)
    if data:
        index = draw.draw(st.integers(w.BURST_DATA.size, len(packet) - 1))
        changed = bytearray(packet)
        changed[index] ^= 0x10
        parsed = w.parse_burst_packet(bytes(changed))
        assert isinstance(parsed, w.BurstPacket) and not parsed.intact
        cut = w.parse_burst_packet(packet[:-1])
        assert isinstance(cut, w.BurstPacket) and not cut.intact


def test_burst_control_packets() -> None:
    start = w.BurstStart(60000, 1 << 40, 1 << 20)
    assert w.parse_burst_start(start.pack()) == start
    for bad in (w.BurstStart(60001, 1, 1), w.BurstStart(1, 1, 0), w.BurstStart(1, 1, (1 << 20) + 1)):
        assert w.parse_burst_start(bad.pack()) is None
    assert w.parse_burst_start(start.pack()[:-1]) is None
    assert w.is_burst_stop(w.burst_stop()) and w.parse_burst_start(w.burst_stop()) is None
    assert not w.is_burst_stop(start.pack()) and not w.is_burst_stop(w.burst_stop()[:-1])
    done = w.BurstDone(3, 2, 1)
    assert w.parse_burst_packet(done.pack()) == done
    assert w.parse_burst_packet(done.pack()[:-1]) is None
    assert w.parse_burst_packet(b"\x09" + bytes(40)) is None


def test_digests_depend_on_number_and_data() -> None:
    digests = {w.burst_digest(number, data) for number in (0, 1, 1 << 63) for data in (b"", b"a", b"b")}
    assert len(digests) == 9 and {len(one) for one in digests} == {16}
