"""Captures: records, blocks, the thread that writes, and what a hostile file gets."""

from __future__ import annotations

import os
import select
import struct
import threading
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.captures import ECHO, file_of
from support.pair import BASE, Pair
from vmbus.cli.capture import parse_size
from vmbus.errors import EnvironmentProblem, StateError, UsageError
from vmbus.observe.capture import pcapng, record
from vmbus.observe.capture.capture import Capture, CaptureOptions
from vmbus.observe.capture.pcapng import Captured, CaptureReader, Interface
from vmbus.observe.capture.record import Record, parse
from vmbus.observe.capture.sink import Sink, open_output
from vmbus.testkit.replay_report import parse_ranges
from vmbus.wire.gpa import range_for
from vmbus.wire.packet import PacketType, gpa_direct_body

WORDS = st.integers(0, 40).map(lambda count: count * 8)

packets = st.builds(
    lambda direction, bits, kind, flags, transaction, body, payload, external, more: Record(
        record.PACKET,
        direction,
        bits,
        kind,
        flags,
        transaction,
        body * 8 if kind in (PacketType.TRANSFER_PAGES, PacketType.GPA_DIRECT) else b"",
        payload * 8,
        len(external) + more,
        external,
    ),
    st.integers(0, 1),
    st.integers(0, 7),
    st.sampled_from(list(map(int, PacketType))),
    st.integers(0, 1),
    st.integers(0, (1 << 64) - 1),
    st.binary(min_size=1, max_size=8),
    st.binary(max_size=20),
    st.binary(max_size=50),
    st.integers(0, 1 << 30),
)


def read(path: Path, data: bytes | None = None) -> tuple[list[Captured], CaptureReader]:
    if data is not None:
        path.write_bytes(data)
    with CaptureReader(path) as reader:
        return list(reader), reader


PACKET = Record(record.PACKET, 0, 0, int(PacketType.INBAND), 1, 7, b"", b"hello123", 0, b"")
EXTERNAL = Record(record.PACKET, 0, 0, int(PacketType.GPA_DIRECT), 1, 8, bytes(32), b"x" * 16, 5000, b"y" * 100)


@given(packets)
def test_a_record_comes_back(one: Record) -> None:
    data = one.pack()
    original = len(data) - len(one.external) + one.external_size
    assert parse(data, original) == one
    # Cut anywhere behind the header, it is the beginning of the same.
    for end in range(record.HEADER.size, len(data), 7):
        cut = parse(data[:end], original)
        assert (cut.body, cut.payload) == (one.body[: len(cut.body)], one.payload[: len(cut.payload)])
        assert cut.whole == (end >= len(data) - len(one.external))
        assert cut.missing == max(0, len(data) - len(one.external) - end)


@given(packets, st.data())
def test_a_damaged_record_is_refused_or_read_and_nothing_else(one: Record, data: st.DataObject) -> None:
    packed = bytearray(one.pack())
    at = data.draw(st.integers(0, len(packed) - 1))
    packed[at] ^= data.draw(st.integers(1, 255))
    try:
        parse(bytes(packed), len(packed))
    except StateError as error:
        assert str(error)


@given(st.data())
def test_a_damaged_file_is_refused_or_read_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    good = bytearray(file_of(PACKET, EXTERNAL, PACKET))
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(good)))
    path = tmp_path_factory.getbasetemp() / "damaged.pcapng"
    try:
        read(path, bytes(good[:end] if data.draw(st.booleans()) else good))
    except StateError as error:
        assert str(path) in str(error)


def test_a_file_comes_back(tmp_path: Path) -> None:
    found, reader = read(tmp_path / "a", file_of(PACKET, EXTERNAL))
    assert [one.record for one in found] == [PACKET, EXTERNAL]
    assert [(one.number, one.at) for one in found] == [(1, 10**18), (2, 10**18 + 1)]
    assert (reader.interfaces, reader.lost, reader.torn) == ([ECHO], {}, "")


def test_files_one_behind_the_other_and_blocks_of_other_tools_are_read(tmp_path: Path) -> None:
    other = struct.pack("<II", 0xBAD, 16) + b"abcd" + struct.pack("<I", 16)
    second = Interface("two", UUID(int=3), UUID(int=4), 5)
    data = file_of(PACKET) + other + file_of(EXTERNAL, interface=second)
    found, reader = read(tmp_path / "a", data)
    assert [(one.interface, one.record) for one in found] == [(0, PACKET), (1, EXTERNAL)]
    assert reader.interfaces == [ECHO, second]


@pytest.mark.parametrize("missing", [1, 3, 4, 7, 20])
def test_a_file_that_ends_inside_a_block_is_read_up_to_there(tmp_path: Path, missing: int) -> None:
    found, reader = read(tmp_path / "a", file_of(PACKET, PACKET)[:-missing])
    assert [one.record for one in found] == [PACKET]
    assert "the file ends inside this block" in reader.torn


def _with(at: int, data: bytes) -> bytes:
    good = bytearray(file_of(PACKET))
    good[at : at + len(data)] = data
    return bytes(good)


_SECTION = len(pcapng.section_block("test", "comment"))
_PACKET = len(pcapng.section_block("test", "comment") + pcapng.interface_block(ECHO, 1 << 20))
_RECORD = _PACKET + 28


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"abc", "no pcapng file: it is shorter than a block"),
        (b"\xd4\xc3\xb2\xa1" + bytes(20), "no pcapng file: it begins with d4c3b2a1"),
        (_with(8, bytes.fromhex("1a2b3c4d")), "a big-endian section"),
        (_with(8, bytes(4)), "the byte order magic is 00000000"),
        (_with(12, b"\x02"), "pcapng version 2.0"),
        (_with(4, b"\xff\xff\xff\xff"), "a block of 4294967295 bytes"),
        (_with(_SECTION + 8, b"\x01"), "link type 1; captures of channels have 147"),
        (_with(_SECTION + 36, b"type=nonsense"), "names no channel: this is no capture of channels"),
        (_with(_PACKET + 8, b"\x07"), "interface 7, and there are 1 so far"),
        (_with(_PACKET + 20, b"\xff\xff"), "with 65535 captured"),
        (_with(_PACKET + 4, b"\x50"), "bytes at its beginning and"),
        (_with(_RECORD, b"\x02"), "a record of version 2; version 1 can be read"),
        (_with(_RECORD + 1, b"\x09"), "a record of kind 9"),
        (_with(_RECORD + 8, b"\x08"), "a packet of type 8"),
        (_with(_RECORD + 10, b"\x03"), "whose descriptor says 3 and"),
        (_with(_RECORD + 28, b"\x10"), "that claims 0 of headers, 16 of payload"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.pcapng"
    with pytest.raises(StateError, match=message) as caught:
        read(path, data)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="No such file"):
        CaptureReader(tmp_path / "none")


# ---- the thread that writes ------------------------------------------------------------------------------------------


def test_what_is_put_is_written_and_the_last_word_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    sink = Sink(open_output(path), "a", limit=1000)
    assert sink.put(lambda: b"one", 3) and sink.put(lambda: b"two", 3) and sink.wait_written(10)
    sink.close(lambda: b"end")
    assert (path.read_bytes(), sink.ended, path.stat().st_mode & 0o777) == (b"onetwoend", "", 0o600)
    assert not sink.put(lambda: b"late", 4)


def test_a_full_disk_ends_the_capture_and_nothing_else() -> None:
    sink = Sink(os.open("/dev/full", os.O_WRONLY), "full", limit=1000)
    sink.put(lambda: b"data", 4)
    assert sink.wait_written(10)
    assert "No space left" in sink.ended and not sink.full
    assert not sink.put(lambda: b"more", 4)
    sink.close()


def test_the_limit_ends_it_with_whole_blocks(tmp_path: Path) -> None:
    sink = Sink(open_output(tmp_path / "a"), "a", limit=10)
    sink.put(lambda: b"12345678", 8)
    sink.put(lambda: b"90ab", 4)
    assert sink.wait_written(10)
    assert sink.full and "limit of 10 bytes" in sink.ended
    sink.close()
    assert (tmp_path / "a").read_bytes() == b"12345678"


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path, 0o600)
    return path


def test_a_reader_that_goes_away_ends_it(fifo: Path) -> None:
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    sink = Sink(open_output(fifo), "fifo", limit=1 << 30)
    os.close(reader)
    sink.put(lambda: b"data", 4)
    assert sink.wait_written(10)
    assert sink.ended == "its reader is gone"
    sink.close()


def test_a_reader_that_does_not_read_costs_packets_and_never_the_loop(fifo: Path) -> None:
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        sink = Sink(open_output(fifo), "fifo", limit=1 << 30, queue_bytes=1 << 20)
        block = bytes(100_000)
        taken = [sink.put(lambda: block, len(block)) for _ in range(40)]
        assert any(taken) and not taken[-1]
        # What has room is urgent only.
        assert sink.put(lambda: b"", 0, urgent=True)
        assert select.select([reader], [], [], 10)[0]
        sink.close(seconds=0.1)  # bounded, although nobody reads
        assert "does not read" in sink.ended
    finally:
        os.close(reader)


def test_where_a_capture_cannot_go(tmp_path: Path, fifo: Path) -> None:
    (tmp_path / "there").write_text("mine")
    with pytest.raises(UsageError, match="exists; a capture goes into a new file"):
        open_output(tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"
    with pytest.raises(EnvironmentProblem, match="nobody reads from it"):
        open_output(fifo)
    with pytest.raises(EnvironmentProblem, match="No such file"):
        open_output(tmp_path / "none" / "a")
    with pytest.raises(UsageError, match="absolute path"):
        open_output(Path("a"))
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EnvironmentProblem):
        open_output(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


# ---- on a channel ----------------------------------------------------------------------------------------------------


def traffic(pair: Pair, count: int) -> None:
    done: list[int] = []
    for _ in range(count):
        packet = pair.client.allocate_packet()
        packet.completion_routine = lambda packet, status, reply: done.append(status)
        packet.send(b"question")
    for _ in range(100):
        pair.turn("server")
        pair.turn("client")
    assert len(done) == count


@pytest.fixture
def pair() -> Pair:
    pair = Pair(up_pages=2, down_pages=2)
    pair.server.set_process_packet_callbacks(lambda channel, completion, payload: completion.complete(b"answer"))
    pair.open()
    return pair


def test_without_a_capture_nothing_is_called(pair: Pair, tmp_path: Path) -> None:
    assert pair.server.observing == []
    capture = Capture(tmp_path / "a", CaptureOptions())
    pair.server.observe("joined", [capture])
    assert len(pair.server.observing) == 1
    traffic(pair, 3)
    capture.stop()
    assert pair.server.observing == []
    traffic(pair, 3)
    found, reader = read(tmp_path / "a")
    kinds = [(one.record.direction, one.record.kind) for one in found if one.record.record == record.PACKET]
    assert kinds == [(0, 6)] * 3 + [(1, 11)] * 3
    assert [one.record.payload[:6] for one in found[1:]] == [b"questi"] * 3 + [b"answer"] * 3
    assert reader.lost == {}


def test_packets_that_found_no_room_are_counted(pair: Pair, tmp_path: Path) -> None:
    """A disk that hangs for a while: everything goes on, and the file says how much is missing, and where."""
    capture = Capture(tmp_path / "a", CaptureOptions(), queue_bytes=20_000)
    pair.server.observe("joined", [capture])
    hang, hanging = threading.Event(), threading.Event()

    def slow() -> bytes:
        hanging.set()
        hang.wait(30)
        return b""

    capture._sink.put(slow, 0)
    assert hanging.wait(10)
    sent = 0
    while not capture.status()["dropped"]:
        traffic(pair, 5)
        sent += 5
    hang.set()
    assert capture._sink.wait_written(10)
    traffic(pair, 1)
    status = capture.status()
    capture.stop()
    found, reader = read(tmp_path / "a")
    packets = [one for one in found if one.record.record == record.PACKET]
    assert len(packets) == status["packets"] and status["packets"] + status["dropped"] == 2 * (sent + 1)
    assert reader.lost == {0: status["dropped"]} == {0: sum(one.lost for one in packets)}


def test_external_data_that_nobody_gives_back_is_not_remembered(pair: Pair, tmp_path: Path) -> None:
    """A guest may describe memory and want no completion, as often as it likes."""
    capture = Capture(tmp_path / "a", CaptureOptions())
    pair.server.observe("opened", [capture])
    body, offset8 = gpa_direct_body([range_for(BASE, 16)], b"question")
    for transaction in range(20):
        assert pair.client_link.writer.put(int(PacketType.GPA_DIRECT), transaction % 2, transaction, body, offset8)
    pair.client_link.writer.commit()
    while pair.server.process():  # a turn ends early on a busy machine
        pass
    (traffic,) = capture._open.values()
    assert traffic._given == {}
    capture.stop()
    sizes = [one.record.external_size for one in read(tmp_path / "a")[0] if one.record.record == record.PACKET]
    assert sizes == [16] * 30


def test_a_channel_that_is_not_wanted_is_left_alone(pair: Pair, tmp_path: Path) -> None:
    capture = Capture(tmp_path / "a", CaptureOptions(channels=("another",)))
    pair.server.observe("opened", [capture])
    assert pair.server.observing == []
    capture.stop()
    assert read(tmp_path / "a")[0] == []


def test_a_capture_that_has_ended_costs_nothing_any_more(pair: Pair, tmp_path: Path) -> None:
    capture = Capture(tmp_path / "a", CaptureOptions(limit=4096))
    pair.server.observe("opened", [capture])
    while not capture.status()["ended"]:
        traffic(pair, 10)
    traffic(pair, 1)
    assert pair.server.observing == []
    assert capture.status()["full"] and not capture.status()["running"]
    assert (tmp_path / "a").stat().st_size <= 4096
    assert read(tmp_path / "a")[1].torn == ""


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("echo", True),
        ("echo/0", True),
        ("echo/1", False),
        (str(UUID(int=1)), True),
        (str(UUID(int=2)).upper(), True),
        (f"{UUID(int=2)}/0", True),
        ("ech", False),
        ("", False),
    ],
)
def test_patterns(pattern: str, wanted: bool) -> None:
    assert ECHO.selected([pattern]) is wanted
    assert ECHO.selected(["another", pattern]) is wanted and ECHO.selected([])


def test_a_sub_channel_has_its_channels_name() -> None:
    first = Interface("echo/1", UUID(int=1), UUID(int=2), 1)
    assert first.selected(["echo/1"]) and first.selected(["echo"]) and not first.selected(["echo/0"])


@pytest.mark.parametrize(
    "options",
    [
        {"snaplen": 100},
        {"snaplen": 1 << 40},
        {"external": -1},
        {"external": 1 << 30},
        {"limit": 10},
        {"limit": 1 << 50},
    ],
)
def test_figures_that_make_no_sense(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"possible|can be kept"):
        Capture(tmp_path / "a", CaptureOptions(**options))
    assert not (tmp_path / "a").exists()


def test_words_of_the_command_line() -> None:
    assert [parse_size(text) for text in ("7", "4K", "2m", "1G")] == [7, 4096, 2 << 20, 1 << 30]
    for text in ("", "K", "4T", "-1", "1.5K"):
        with pytest.raises(UsageError, match="is no size"):
            parse_size(text)
    assert parse_ranges(["0:4", "8:16"]) == ((0, 4), (8, 16))
    for text in ("", "4", "4:4", "8:4", "a:b"):
        with pytest.raises(UsageError, match="is no range"):
            parse_ranges([text])
