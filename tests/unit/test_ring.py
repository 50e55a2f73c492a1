"""The ring: a state machine against a simple model, the signalling rules, and hostile peers."""

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from support.twins import RingFences, Twin, both
from vmbus.device import device
from vmbus.errors import UsageError
from vmbus.memory.guest import GuestMemory
from vmbus.ring import (
    INTERRUPT_MASK,
    PENDING_SEND_SIZE,
    READ_INDEX,
    WRITE_INDEX,
    RingCorrupt,
    RingReader,
    RingWriter,
)
from vmbus.ring import pure as ring_pure

pytestmark = [pytest.mark.unit, *both()]

PAGE = 4096


def make(pages: int = 1, *, scattered: bool = False) -> tuple[RingWriter, RingReader, bytearray]:
    ram = bytearray((pages + 1) * PAGE)
    ends = []
    for _ in range(2):
        memory = GuestMemory()
        if scattered:
            for page in range(pages + 1):
                memory.map(0x1000 * (page + 1), memoryview(ram)[page * PAGE : (page + 1) * PAGE], True)
        else:
            memory.map(0x1000, memoryview(ram), True)
        ends.append((memory.window([(0x1000, PAGE)]), memory.window([(0x2000, pages * PAGE)])))
    return RingWriter(*ends[0]), RingReader(*ends[1]), ram


class RingMachine(RuleBasedStateMachine):
    """Writer and reader take any steps; nothing may be lost, doubled or reordered, and nobody may sleep for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.writer, self.reader, _ = make(2, scattered=True)
        self.model: deque[tuple[int, bytes]] = deque()
        self.staged: list[tuple[int, bytes]] = []
        self.number = 0
        self.reader_idle = False
        self.reader_signalled = True
        self.writer_waits_for = 0
        self.writer_signalled = False

    # Of st.binary hardly one in a thousand is longer than 40 bytes, and the ring never fills.
    @rule(body=st.builds(lambda size, byte: bytes([byte]) * size, st.integers(0, 700), st.integers(0, 255)))
    def put(self, body: bytes) -> None:
        if self.writer_waits_for:
            return
        padded = body + bytes(-len(body) % 8)
        if self.writer.put(6, 0, self.number, body):
            self.staged.append((self.number, padded))
            self.number += 1
        elif not self.staged:
            total = len(padded) + 24
            if not self.writer.request_space(total):
                self.writer_waits_for = total
                self.writer_signalled = False

    @rule()
    def commit(self) -> None:
        if self.writer.commit():
            self.reader_signalled = True
        self.model.extend(self.staged)
        self.staged.clear()

    @rule(limit=st.sampled_from([64, 800, 40000]), take=st.integers(1, 10))
    def read(self, limit: int, take: int) -> None:
        if self.reader_idle and not self.reader_signalled:
            return
        if self.reader_idle:
            self.reader.mask()
            self.reader_idle = False
        packets, error = self.reader.fetch(limit)
        assert error is None
        for packet in packets[:take]:
            assert (packet.transaction, packet.payload) == self.model.popleft()
        if packets and self.reader.advance(packets[:take][-1].end):
            self.writer_signalled = True

    @rule()
    def idle(self) -> None:
        if not self.reader_idle and not self.reader.available() and self.reader.unmask():
            self.reader_idle = True
            self.reader_signalled = False

    @precondition(lambda self: self.writer_signalled)
    @rule()
    def unblock(self) -> None:
        self.writer_signalled = False
        if self.writer_waits_for and not self.writer.request_space(self.writer_waits_for):
            return
        self.writer_waits_for = 0

    @rule()
    def replace_writer(self) -> None:
        if not self.staged:
            waits, self.writer = self.writer_waits_for, RingWriter(self.writer.header, self.writer.data)
            if waits:
                self.writer_signalled = True

    @rule()
    def replace_reader(self) -> None:
        self.reader = RingReader(self.reader.header, self.reader.data)

    @invariant()
    def no_lost_wake_up(self) -> None:
        if self.reader_idle and self.model:
            assert self.reader_signalled, "packets lie in the ring and the sleeping reader was not signalled"
        if self.writer_waits_for and not self.model and not self.staged:
            assert self.writer_signalled, "the ring is empty and the waiting writer was not signalled"


def test_any_steps_of_both_ends() -> None:
    run_state_machine_as_test(RingMachine, settings=settings(max_examples=150, stateful_step_count=60, deadline=None))


def test_the_twin_is_the_one_that_is_tested(twin: Twin) -> None:
    assert {type(end) for end in make()[:2]} == {twin.RingWriter, twin.RingReader}
    assert [device.RingReader, device.RingWriter] == [twin.RingReader, twin.RingWriter]


def test_a_packet_that_wraps_at_every_offset() -> None:
    for shift in range(0, PAGE - 48, 8):
        writer, reader, _ = make()
        if shift >= 24:
            assert writer.put(6, 0, 1, bytes(shift - 24))
            writer.commit()
            reader.advance(reader.fetch()[0][-1].end)
        for number in range(8):
            body = bytes([number + 1]) * (480 + 8 * number)
            assert writer.put(11, 0, number, body)
            writer.commit()
            packets, error = reader.fetch()
            assert error is None
            assert [(p.kind, p.transaction, p.payload) for p in packets] == [(11, number, body)]
            reader.advance(packets[-1].end)


def test_the_ring_is_never_filled_completely() -> None:
    writer, reader, _ = make()
    assert writer.free() == PAGE - 8
    assert not writer.put(6, 0, 1, bytes(PAGE - 24))
    assert writer.put(6, 0, 1, bytes(PAGE - 24 - 8))
    writer.commit()
    assert not writer.put(6, 0, 2, b"")
    assert reader.available() == PAGE - 8


def test_the_trailer_holds_the_start_offset() -> None:
    writer, _, ram = make()
    writer.put(6, 0, 1, bytes(8))
    writer.put(6, 1, 7, bytes([1, 2, 3, 4, 5]))
    writer.commit()
    expected = "0600020003000100" + "0700000000000000" + "0102030405000000" + "0000000020000000"
    assert ram[PAGE + 0x20 : PAGE + 0x40].hex() == expected


def test_signals_are_given_on_the_first_packet_only_and_not_when_masked() -> None:
    writer, reader, _ = make()
    writer.put(6, 0, 1, b"")
    assert writer.commit()
    writer.put(6, 0, 2, b"")
    assert not writer.commit()
    reader.mask()
    reader.advance(reader.fetch()[0][-1].end)
    writer.put(6, 0, 3, b"")
    assert not writer.commit()
    assert not reader.unmask(), "a packet came while it was masked: the reader must see it itself"


def test_a_waiting_writer_is_signalled_once_enough_is_free() -> None:
    writer, reader, _ = make()
    numbers = iter(range(1000))
    while writer.put(6, 0, next(numbers), bytes(40)):
        pass
    writer.commit()
    assert not writer.request_space(512)
    ends = [packet.end for packet in reader.fetch()[0]]
    signals = [reader.advance(64) for _ in ends]
    assert signals.count(True) == 1
    # 63 packets leave 56 bytes; a blocked writer asks for a quarter of the ring, 1016 bytes.
    assert signals.index(True) == 15 - 1


@pytest.mark.parametrize("value", [4, 4096, 0xFFFFFFF8, 4095])
@pytest.mark.parametrize("offset", [WRITE_INDEX, READ_INDEX])
def test_impossible_indices_are_corruption(offset: int, value: int) -> None:
    writer, reader, ram = make()
    memoryview(ram)[offset : offset + 4].cast("I")[0] = value
    with pytest.raises(RingCorrupt):
        if offset == WRITE_INDEX:
            reader.fetch()
        else:
            writer.free()


def test_a_reader_that_runs_ahead_and_a_writer_that_goes_back_are_corruption() -> None:
    writer, reader, ram = make()
    words = memoryview(ram).cast("I")
    writer.put(6, 0, 1, bytes(100))
    writer.commit()
    words[READ_INDEX // 4] = 1024
    with pytest.raises(RingCorrupt, match="past what was written"):
        writer.free()
    words[READ_INDEX // 4] = 0
    reader.fetch()
    words[WRITE_INDEX // 4] = 8
    with pytest.raises(RingCorrupt, match="went back"):
        reader.fetch()


def test_a_packet_longer_than_what_was_written_is_an_error_not_a_wait() -> None:
    writer, reader, ram = make()
    writer.put(6, 0, 1, bytes(8))
    writer.commit()
    ram[PAGE + 4] = 200
    packets, error = reader.fetch()
    assert not packets
    assert error is not None
    assert "claims" in error


def test_good_packets_before_a_bad_one_are_still_seen() -> None:
    writer, reader, ram = make()
    writer.put(6, 0, 1, bytes(8))
    writer.put(6, 0, 2, bytes(8))
    writer.commit()
    ram[PAGE + 32] = 99
    packets, error = reader.fetch()
    assert [packet.transaction for packet in packets] == [1]
    assert error is not None
    assert "type 99" in error


def test_what_a_peer_does_to_words_it_does_not_own_changes_nothing() -> None:
    writer, reader, ram = make()
    words = memoryview(ram).cast("I")
    writer.put(6, 0, 1, b"first")
    writer.commit()
    reader.advance(reader.fetch()[0][-1].end)
    words[READ_INDEX // 4] = words[WRITE_INDEX // 4]
    words[INTERRUPT_MASK // 4] = 0xFFFFFFFF
    words[PENDING_SEND_SIZE // 4] = 0xFFFFFFFF
    writer.put(6, 0, 2, b"second")
    writer.commit()
    assert reader.fetch()[0][0].payload.startswith(b"second")


def test_staged_is_what_a_commit_publishes() -> None:
    writer, reader, ram = make()
    assert writer.staged == b""
    writer.put(6, 0, 1, b"one")
    writer.put(6, 1, 2, b"and two")
    staged = writer.staged
    assert len(staged) == 64 and bytes(ram[PAGE:]) == bytes(PAGE) and not reader.available()
    writer.commit()
    assert writer.staged == b"" and ram[PAGE : PAGE + 64] == staged
    reader.fetch()
    assert reader.batch == staged


@pytest.mark.parametrize("end", ["reader", "writer"])
def test_an_own_index_that_was_overwritten_is_corruption(end: str) -> None:
    writer, reader, ram = make()
    writer.put(6, 0, 1, bytes(40))
    writer.commit()
    reader.advance(64)
    kind, old, word = (RingReader, reader, READ_INDEX) if end == "reader" else (RingWriter, writer, WRITE_INDEX)
    assert kind(old.header, old.data, own=64).own_index == 64
    memoryview(ram).cast("I")[word // 4] = 8
    with pytest.raises(RingCorrupt, match="is 0x8 in the ring and 0x40 in what was saved"):
        kind(old.header, old.data, own=64)
    assert kind(old.header, old.data).own_index == 8


@pytest.mark.parametrize("own", [-8, 4, 4096, 1 << 40])
def test_an_own_index_that_cannot_be_is_refused(own: int) -> None:
    _, reader, ram = make()
    if 0 <= own < 1 << 32:
        memoryview(ram).cast("I")[READ_INDEX // 4] = own
    with pytest.raises(RingCorrupt):
        RingReader(reader.header, reader.data, own=own)


@pytest.mark.parametrize("consumed", [-8, PAGE + 8])
def test_more_than_a_ring_cannot_be_consumed(consumed: int) -> None:
    _, reader, _ = make()
    with pytest.raises(UsageError, match="cannot be consumed"):
        reader.advance(consumed)


def test_fences_stand_between_the_store_and_the_look() -> None:
    """S1 to S4, one after the other: what the peer does at the fence is seen, and it sees what was stored."""
    writer, reader, ram = make()
    words = memoryview(ram).cast("I")
    seen: list[tuple[int, ...]] = []

    def at(index: int, value: int) -> RingFences:
        def peer() -> None:
            seen.append(tuple(words[:4]))
            words[index // 4] = value

        return RingFences(peer)

    writer.put(6, 0, 1, bytes(8))
    with at(INTERRUPT_MASK, 1):
        assert not writer.commit()
    assert seen.pop() == (32, 0, 0, 0)
    with at(READ_INDEX, 32):
        assert writer.request_space(PAGE - 16)
    assert seen.pop() == (32, 0, 1, PAGE - 16)
    words[READ_INDEX // 4] = 0
    assert reader.available() == 32
    with at(PENDING_SEND_SIZE, PAGE - 8):
        assert reader.advance(32)
    assert seen.pop() == (32, 32, 1, 0)
    with at(WRITE_INDEX, 64):
        assert not reader.unmask()
    assert seen.pop() == (32, 32, 0, PAGE - 8)
    assert words[INTERRUPT_MASK // 4] == 1


def test_a_ring_of_another_shape_is_refused() -> None:
    memory = GuestMemory()
    memory.map(0x1000, memoryview(bytearray(3 * PAGE)), True)
    page, odd = memory.window([(0x1000, PAGE)]), memory.window([(0x2000, PAGE + 8)])
    for kind in (RingReader, RingWriter):
        with pytest.raises(RingCorrupt, match="4096 header bytes and 4104 data bytes"):
            kind(page, odd)
        with pytest.raises(RingCorrupt, match="4104 header bytes"):
            kind(odd, page)


@pytest.mark.parametrize("wrapped", [False, True])
def test_fault_d12_a_packet_longer_than_a_batch_is_copied_once(wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are counted in the pure twin; both find the same packet."""
    copies: list[int] = []
    writer, reader, _ = make(32)
    pure = isinstance(reader, ring_pure.RingReader)
    if pure:
        copy = ring_pure.RingReader._copy

        def counted(self: ring_pure.RingReader, length: int) -> bytes:
            copies.append(length)
            return copy(self, length)

        monkeypatch.setattr(ring_pure.RingReader, "_copy", counted)
    if wrapped:
        for _ in range(2):
            assert writer.put(6, 0, 1, bytes(50_000))
            writer.commit()
            reader.fetch()
            reader.advance(len(reader.batch))
        copies.clear()
    for number in range(2):
        assert writer.put(6, 0, number, bytes([number + 1]) * 60_000)
    writer.commit()
    packets, error = reader.fetch()
    assert error is None and [len(one.payload) for one in packets] == [60_000]
    assert len(reader.batch) == 60_024 and copies == ([60_024] if pure else [])


def test_a_packet_that_grows_between_the_look_and_the_copy_is_believed_as_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writer, reader, ram = make(32)
    if not isinstance(reader, ring_pure.RingReader):
        return  # the twin's steps cannot be interrupted
    assert writer.put(6, 0, 7, bytes(60_000))
    writer.commit()
    size8 = ram[PAGE + 4 : PAGE + 6]
    ram[PAGE + 4 : PAGE + 6] = (3).to_bytes(2, "little")
    copies: list[int] = []
    copy = ring_pure.RingReader._copy

    def grown(self: ring_pure.RingReader, length: int) -> bytes:
        ram[PAGE + 4 : PAGE + 6] = size8
        copies.append(length)
        return copy(self, length)

    monkeypatch.setattr(ring_pure.RingReader, "_copy", grown)
    packets, error = reader.fetch()
    assert error is None and [len(one.payload) for one in packets] == [60_000] and copies == [16384, 60_024]
