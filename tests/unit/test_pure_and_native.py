"""The native core against its pure twin: whatever both ends, the guest and a migration do, both come to the same."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from struct import pack
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.twins import NATIVE, OVER_BOTH, PURE, Twin, core
from vmbus.errors import VmbusError
from vmbus.memory.guest import GuestMemory, MemoryRevoked, Window
from vmbus.ring import FEATURE_BITS, INTERRUPT_MASK, PENDING_SEND_SIZE, READ_INDEX, WRITE_INDEX

pytestmark = [
    pytest.mark.unit,
    pytest.mark.pure_and_native,
    pytest.mark.skipif(core is None, reason="no C compiler for the native core"),
]

PAGE = 4096
BASE = 0x10000
WORDS = (WRITE_INDEX, READ_INDEX, INTERRUPT_MASK, PENDING_SEND_SIZE, FEATURE_BITS)

# ---- one side of the comparison ------------------------------------------------------------------------------------


def cuts(layout: int, size: int) -> list[int]:
    """Where the window's pieces begin: one piece; a piece for each page; pieces of 8 bytes and more; of a word."""
    if layout == 0:
        return [0]
    if layout == 1:
        return list(range(0, size, PAGE))
    return sorted({0, *(random.Random(layout).randrange(8, size, 8) for _ in range(40))})


class Side:
    """A ring of `pages` data pages with both of its ends from one twin, in guest memory of its own.

    The pieces of the windows lie in the guest's address space in another order, with holes, as under an IOMMU.
    """

    def __init__(self, twin: Twin, pages: int, layout: int, ram: bytes) -> None:
        self.twin = twin
        self.ram = bytearray(ram)
        self.memory = GuestMemory()
        size = (pages + 1) * PAGE
        starts = cuts(layout, size)
        starts = sorted({*starts, PAGE} if layout else starts)
        ends = [*starts[1:], size]
        order = list(range(len(starts)))
        random.Random(layout).shuffle(order)
        self.extents: list[tuple[int, int]] = [(0, 0)] * len(starts)
        at = BASE
        for index in order:
            length = ends[index] - starts[index]
            self.memory.map(at, memoryview(self.ram)[starts[index] : ends[index]], True)
            self.extents[index] = (at, length)
            at += length + 8 * (index % 2)
        if layout:
            split = starts.index(PAGE)
            self.windows = self.extents[:split], self.extents[split:]
        else:
            self.windows = [(BASE, PAGE)], [(BASE + PAGE, size - PAGE)]
        self.words = memoryview(self.ram).cast("I")
        self.writer: Any = None
        self.reader: Any = None
        self.packets: list[Any] = []

    def attach(self, end: str, own: int | None) -> object:
        header, data = (self.memory.window(extents) for extents in self.windows)
        kind = self.twin.RingReader if end == "reader" else self.twin.RingWriter
        setattr(self, end, kind(header, data, own=own))
        return None

    def fetch(self, *limit: int) -> object:
        self.packets, error = self.reader.fetch(*limit)
        return self.packets, error, self.reader.batch

    def advance(self, choice: int) -> object:
        """Past some of the packets fetched last; with none, by what a caller may get wrong."""
        consumed = self.packets[choice % len(self.packets)].end if self.packets else choice * 8
        self.packets = []
        return self.reader.advance(consumed)

    def unmap(self, choice: int) -> object:
        extent = self.extents[choice % len(self.extents)]
        return self.memory.unmap(BASE, 1 << 30) if len(self.extents) == 1 else self.memory.unmap(*extent)

    def log(self, choice: int) -> object:
        if self.memory.log is None:
            return self.memory.start_log()
        return self.memory.stop_log() if choice % 4 == 0 else sorted(self.memory.log.pages)

    def poke(self, word: int, value: int) -> object:
        self.words[word // 4] = value
        return None

    def spoil(self, at: int, data: bytes) -> object:
        at = PAGE + at % (len(self.ram) - PAGE - len(data))
        self.ram[at : at + len(data)] = data
        return None

    def seen(self) -> object:
        """Everything that can be seen from outside."""
        ends = [
            (one.own_index, one.size, one.batches, one.signals) for one in (self.writer, self.reader) if one is not None
        ]
        staged = self.writer.staged if self.writer is not None else None
        log = self.memory.log
        return bytes(self.ram), ends, staged, log and (log.pages, log.broken)


def outcome(side: Side, step: tuple[Any, ...]) -> object:
    """What a step gives back, or the exception."""
    name, *arguments = step
    try:
        if hasattr(side, name):
            return getattr(side, name)(*arguments)
        end, method = name.split(".")
        found = getattr(getattr(side, end), method)
        return found(*arguments) if callable(found) else found
    except VmbusError as error:
        return type(error), str(error)


INDICES = st.one_of(st.integers(0, 1100).map(lambda n: 8 * n), st.sampled_from([1, 4, 0xFFFFFFF8, 0xFFFFFFFF, 1 << 31]))
DESCRIPTORS = st.builds(
    lambda kind, offset8, len8, flags, number: pack("<HHHHQ", kind, offset8, len8, flags, number),
    st.sampled_from([6, 6, 9, 11, 7, 0]),
    st.sampled_from([2, 2, 2, 3, 5, 0, 0xFFFF]),
    st.one_of(st.integers(0, 40), st.integers(0, 0xFFFF)),
    st.sampled_from([0, 1, 1, 2, 0x8001]),
    st.integers(0, (1 << 64) - 1),
)
PUT = st.tuples(
    st.just("writer.put"),
    st.sampled_from([6, 7, 9, 11]),
    st.integers(0, 1),
    st.integers(0, (1 << 64) - 1),
    st.one_of(st.binary(max_size=200), st.integers(0, 9000).map(bytes)),
    st.sampled_from([2, 3, 5]),
)
GOOD = st.one_of(
    PUT,
    PUT,
    st.tuples(st.just("writer.commit")),
    st.tuples(st.just("writer.commit")),
    st.tuples(st.just("fetch")),
    st.tuples(st.just("fetch"), st.sampled_from([0, 8, 16, 64, 500, 5000])),
    st.tuples(st.just("advance"), st.integers(0, 600)),
    st.tuples(st.just("advance"), st.integers(0, 600)),
    st.tuples(
        st.sampled_from(
            [
                *("writer.free", "writer.cancel_request", "writer.describe", "writer.empty", "writer.largest"),
                *("reader.available", "reader.mask", "reader.unmask", "reader.describe"),
            ]
        )
    ),
    st.tuples(st.just("writer.request_space"), st.integers(24, 9000)),
    st.tuples(st.just("log"), st.integers(0, 7)),
)
HOSTILE = st.one_of(
    GOOD,
    GOOD,
    GOOD,
    st.tuples(st.just("poke"), st.sampled_from(WORDS), INDICES),
    st.tuples(st.just("spoil"), st.integers(0, 9000), st.one_of(DESCRIPTORS, st.binary(max_size=64))),
    st.tuples(st.just("attach"), st.sampled_from(["reader", "writer"]), st.one_of(st.none(), INDICES)),
    st.tuples(st.sampled_from(["writer.close", "reader.close"])),
    st.tuples(st.just("unmap"), st.integers(0, 100)),
)


def compare(pages: int, layout: int, ram: bytes, steps: list[tuple[Any, ...]]) -> list[object]:
    sides = [Side(twin, pages, layout, ram) for twin in (PURE, NATIVE)]
    outcomes = []
    for step in [("attach", "writer", None), ("attach", "reader", None), *steps]:
        got = [outcome(side, step) for side in sides if (side.writer and side.reader) or step[0] == "attach"]
        if not got:
            break  # the ring was refused
        assert got[0] == got[1], step
        assert sides[0].seen() == sides[1].seen(), step
        outcomes.append(got[0])
    return outcomes


@given(pages=st.integers(1, 2), layout=st.integers(0, 4), steps=st.lists(GOOD, max_size=60))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_same_comes_of_any_steps(pages: int, layout: int, steps: list[tuple[Any, ...]]) -> None:
    compare(pages, layout, bytes((pages + 1) * PAGE), steps)


@given(pages=st.integers(1, 2), layout=st.integers(0, 4), steps=st.lists(HOSTILE, max_size=60))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_same_comes_of_a_hostile_guest(pages: int, layout: int, steps: list[tuple[Any, ...]]) -> None:
    compare(pages, layout, bytes((pages + 1) * PAGE), steps)


@given(
    write=INDICES,
    read=INDICES,
    data=st.lists(st.one_of(DESCRIPTORS, st.binary(max_size=40)), max_size=60).map(b"".join),
    layout=st.integers(0, 2),
    limit=st.sampled_from([24, 200, 16384]),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_same_is_found_in_any_ring(write: int, read: int, data: bytes, layout: int, limit: int) -> None:
    ring = (data * (PAGE // (len(data) or 1)) + bytes(PAGE))[:PAGE]
    compare(
        1, layout, pack("<II", write, read).ljust(PAGE, b"\0") + ring, [("fetch", limit), ("advance", 3), ("fetch",)]
    )


@given(st.lists(st.one_of(DESCRIPTORS, st.binary(max_size=40)), max_size=20).map(b"".join))
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_same_packets_are_found_in_any_bytes(data: bytes) -> None:
    pure, native = PURE.split_packets(data), NATIVE.split_packets(data)
    assert native == pure
    assert [type(one) for one in native[0]] == [type(one) for one in pure[0]]
    assert [type(field) for one in native[0] for field in one] == [type(field) for one in pure[0] for field in one]


def test_the_steps_of_the_comparison_are_worth_it() -> None:
    """Sabotage of the test itself: a step of each kind succeeds, and each kind of refusal is reached."""
    steps: list[tuple[Any, ...]] = [
        *(("writer.put", 6, 1, n, bytes(40), 2) for n in range(3)),
        *(("writer.commit",), ("fetch",), ("advance", 1), ("log", 1), ("writer.put", 6, 0, 4, bytes(900), 2)),
        *(("writer.commit",), ("log", 1), ("poke", WRITE_INDEX, 136), ("fetch",), ("poke", WRITE_INDEX, 4), ("fetch",)),
        *(("unmap", 0), ("fetch",), ("writer.commit",), ("writer.free",)),
    ]
    text = str(compare(1, 1, bytes(2 * PAGE), steps))
    for wanted in ("RawPacket", "went back", "is 0x4 in a ring", "MemoryRevoked"):
        assert wanted in text


# ---- revocation, in the middle of a call too ------------------------------------------------------------------------


def open_ring(twin: Twin, pages: int = 1) -> tuple[Any, Any, GuestMemory, bytearray]:
    ram = bytearray((pages + 1) * PAGE)
    memory = GuestMemory()
    for page in range(pages + 1):
        memory.map(BASE + page * PAGE, memoryview(ram)[page * PAGE : (page + 1) * PAGE], True)

    def windows() -> tuple[Window, Window]:
        return memory.window([(BASE, PAGE)]), memory.window([(BASE + PAGE, pages * PAGE)])

    return twin.RingWriter(*windows()), twin.RingReader(*windows()), memory, ram


USES: dict[str, Callable[[Any, Any], object]] = {
    "put": lambda writer, _: writer.put(6, 0, 1, bytes(5000)),
    "commit": lambda writer, _: writer.commit(),
    "free": lambda writer, _: writer.free(),
    "request_space": lambda writer, _: writer.request_space(100),
    "empty": lambda writer, _: writer.empty,
    "describe": lambda _, reader: reader.describe(),
    "fetch": lambda _, reader: reader.fetch(),
    "advance": lambda _, reader: reader.advance(24),
    "mask": lambda _, reader: reader.mask(),
    "unmask": lambda _, reader: reader.unmask(),
    "available": lambda _, reader: reader.available(),
}


@OVER_BOTH
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("how", ["unmap", "close"])
def test_after_revocation_every_access_raises_and_nothing_is_held(twin: Twin, use: str, how: str) -> None:
    writer, reader, memory, ram = open_ring(twin)
    writer.put(6, 0, 1, b"staged")
    if how == "unmap":
        memory.unmap(BASE, 2 * PAGE)
    else:
        writer.close()
        reader.close()
        memory.unmap(BASE, 2 * PAGE)
    before = bytes(ram)
    with pytest.raises(MemoryRevoked):
        USES[use](writer, reader)
    assert ram == before
    ram.extend(b"no view of it is left")  # BufferError while there is one


def test_memory_that_is_in_use_cannot_be_let_go() -> None:
    """Sabotage: what the test above relies on."""
    _, _, _, ram = open_ring(NATIVE)
    with pytest.raises(BufferError):
        ram.extend(b"a view is left")


@OVER_BOTH
@pytest.mark.parametrize("nth", range(4))
def test_memory_that_goes_in_the_middle_of_a_commit(twin: Twin, nth: int) -> None:
    """Marking a page in the log is Python, and what runs there may be anything."""
    writer, _, memory, ram = open_ring(twin, pages=2)
    for number in range(2):
        assert writer.put(6, 0, number, bytes(3000))
    marked = []

    class Log(GuestMemory):
        def mark(self, iova: int, length: int) -> None:
            marked.append((iova, length))
            if len(marked) > nth:
                self.unmap(BASE, 3 * PAGE)
                del ram[:]  # every view must be gone by now, or this raises

    memory.__class__ = Log
    memory.start_log()
    if nth < 3:  # two pieces of the packets, and the index
        with pytest.raises(MemoryRevoked):
            writer.commit()
    else:
        assert writer.commit()
    assert len(marked) == min(nth + 1, 3)


@OVER_BOTH
def test_a_log_that_starts_between_two_stores_has_the_second(twin: Twin) -> None:
    writer, _, memory, _ = open_ring(twin)
    writer.put(6, 0, 1, b"one")
    writer.commit()
    memory.start_log()
    assert memory.log is not None and not memory.log.pages
    writer.put(6, 0, 2, b"two")
    writer.commit()
    assert memory.log.pages == {BASE // PAGE, BASE // PAGE + 1}
    memory.stop_log()
    writer.put(6, 0, 3, b"three")
    writer.commit()


def test_a_window_and_its_ring_are_collected_together() -> None:
    """They refer to each other by way of the memory; taking views apart that are lent would kill the process."""
    gc.collect()
    for _ in range(3):
        writer, reader, memory, ram = open_ring(NATIVE)
        writer.put(6, 0, 1, bytes(2000))
        del writer, reader, memory
        gc.collect()
        ram.extend(b"no view of it is left")


# ---- windows that lend nothing --------------------------------------------------------------------------------------


class Foreign:
    """A window of another kind."""

    def __init__(self, window: Window) -> None:
        self.size = window.size
        for name in ("read", "write", "load32", "store32", "close"):
            setattr(self, name, getattr(window, name))


class Broken(Foreign):
    def read(self, offset: int, length: int) -> bytes:
        return b"short"


def test_a_window_that_lends_nothing_is_used_by_its_methods() -> None:
    memory = GuestMemory()
    ram = bytearray(2 * PAGE)
    memory.map(BASE, memoryview(ram), True)
    pair: list[Any] = [Foreign(memory.window([(BASE, PAGE)])), Foreign(memory.window([(BASE + PAGE, PAGE)]))]
    writer, reader = NATIVE.RingWriter(*pair), NATIVE.RingReader(*pair)
    for number in range(100):
        assert writer.put(6, 0, number, bytes([number]) * 104)
        assert writer.commit()
        (packet,), error = reader.fetch()
        assert (packet.transaction, packet.payload, error) == (number, bytes([number]) * 104, None)
        reader.advance(packet.end)
    assert reader.unmask()
    del pair[1].read
    pair[1].read = lambda offset, length: b"short"
    writer.put(6, 0, 1, b"")
    writer.commit()
    with pytest.raises(ValueError, match="5 bytes instead of 24"):
        reader.fetch()


def test_misaligned_memory_is_left_to_python() -> None:
    """The words of a ring are accessed as words; a mapping need not be aligned as its I/O address is."""
    memory = GuestMemory()
    ram = bytearray(2 * PAGE + 1)
    memory.map(BASE, memoryview(ram)[1:], True)
    windows = memory.window([(BASE, PAGE)]), memory.window([(BASE + PAGE, PAGE)])
    writer = NATIVE.RingWriter(*windows)
    writer.put(6, 0, 1, b"body")
    assert writer.commit()
    assert ram[PAGE + 1 + 16 :][:4] == b"body"
