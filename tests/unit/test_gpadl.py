"""GPADLs: every legal shape, cut anywhere over messages; what is not legal is refused with one answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.bus import Joined, one_range
from vmbus.bus import gpadl as table
from vmbus.bus.gpadl import Gpadl, GpadlError, GpadlTable
from vmbus.bus.server import REFUSED
from vmbus.wire import messages as m
from vmbus.wire.gpa import GpaRange, pack_ranges, page_count

PAGE = 4096


@st.composite
def gpa_ranges(draw) -> GpaRange:
    count = draw(st.integers(1, 20 * PAGE))
    offset = draw(st.sampled_from([0, 0, 8, 4095]) | st.integers(0, 4095))
    first = draw(st.integers(0, 1 << 40))
    pages = page_count(count, offset)
    step = draw(st.sampled_from([1, 2, -1])) if first >= pages else 1
    return GpaRange(count, offset, tuple(first + step * page for page in range(pages)))


@pytest.fixture
def bus() -> Joined:
    joined = Joined()
    joined.connect()
    return joined


def cut(words: bytes, sizes: list[int]) -> list[bytes]:
    """`words` in pieces of at most sizes[i] 8-byte words, the last size repeated."""
    pieces = []
    while words:
        size = 8 * (sizes.pop(0) if len(sizes) > 1 else sizes[0])
        pieces.append(words[:size])
        words = words[size:]
    return pieces


@given(
    ranges=st.lists(gpa_ranges(), min_size=1, max_size=12),
    header=st.integers(0, m.GPADL_HEADER_WORDS),
    sizes=st.lists(st.integers(0, m.GPADL_BODY_WORDS), max_size=6),
    last=st.integers(1, m.GPADL_BODY_WORDS),
    padding=st.binary(max_size=64),
)
def test_any_shape_cut_anywhere(
    ranges: list[GpaRange], header: int, sizes: list[int], last: int, padding: bytes
) -> None:
    words = pack_ranges(ranges)
    first, rest = words[: 8 * header], words[8 * header :]
    bodies = cut(rest, [*sizes, last]) if rest else []
    messages = [m.encode(m.GpadlHeader(1, 7, len(words), len(ranges), first))]
    messages += [m.encode(m.GpadlBody(0, 7, body)) for body in bodies]
    # The last message may be padded with anything.
    messages[-1] += padding[: 240 - len(messages[-1])]
    bus = Joined()
    bus.connect()
    answers = [bus.say(message) for message in messages]
    assert answers == [[]] * (len(messages) - 1) + [[m.GpadlCreated(1, 7, 0)]]
    created = bus.bus.gpadls.complete[1, 7]
    assert list(created.ranges) == ranges
    assert created.size == sum(one.byte_count for one in ranges) == sum(length for _, length in created.extents())
    assert bus.say(m.GpadlBody(0, 7, bytes(8))) == [], "a surplus body changes nothing"
    assert bus.say(m.GpadlTeardown(1, 7)) == [m.GpadlTorndown(7)]
    assert bus.bus.gpadls._described == 0


@given(
    st.lists(st.integers(1, 120), min_size=2, max_size=6).flatmap(
        lambda sizes: st.tuples(st.just(sizes), st.permutations([n for n, size in enumerate(sizes) for _ in range(5)]))
    )
)
def test_several_in_progress_at_once(plan: tuple[list[int], list[int]]) -> None:
    sizes, order = plan
    bus = Joined()
    bus.connect()
    queues = [m.gpadl_messages(1 + n % 2, 100 + n, one_range(size, n << 20), 1) for n, size in enumerate(sizes)]
    for number in [*order, *(n for n in range(len(sizes)) for _ in range(6))]:
        if queues[number]:
            answers = bus.say(queues[number].pop(0))
            assert bool(answers) == (not queues[number])
    assert len(bus.bus.gpadls.complete) == len(sizes)
    for number, size in enumerate(sizes):
        created = bus.bus.gpadls.complete[1 + number % 2, 100 + number]
        assert created.extents() == [(number << 32, size * PAGE)]


HUGE = (0xFFFFFFFF).to_bytes(4, "little") + bytes(4) + bytes(8)
EMPTY = bytes(8) + bytes(8)
FAR = PAGE.to_bytes(4, "little") + bytes(4) + (1 << 52).to_bytes(8, "little")
OFFSET = (1).to_bytes(4, "little") + (4096).to_bytes(4, "little") + bytes(8)


@pytest.mark.parametrize(
    ("size", "count", "words"),
    [
        pytest.param(16, 0, one_range(1), id="no ranges"),
        pytest.param(16, 2, one_range(1), id="more ranges than words"),
        pytest.param(12, 1, one_range(1), id="not whole words"),
        pytest.param(0, 1, b"", id="no words"),
        pytest.param(8, 1, one_range(1), id="no PFN"),
        pytest.param(16, 1, EMPTY, id="empty range"),
        pytest.param(16, 1, OFFSET, id="offset beyond the page"),
        pytest.param(16, 1, FAR, id="impossible PFN"),
        pytest.param(16, 1, HUGE, id="more than the words can hold"),
        pytest.param(16, 1, one_range(2)[:16], id="a PFN short"),
        pytest.param(24, 1, one_range(1) + bytes(8), id="a word too many"),
        pytest.param(24, 2, one_range(1) + bytes(8), id="more ranges than fit"),
    ],
)
def test_a_bad_one_is_refused_once(bus: Joined, size: int, count: int, words: bytes) -> None:
    assert bus.say(m.GpadlHeader(1, 7, size, count, words)) == [m.GpadlCreated(1, 7, REFUSED)]
    assert bus.say(m.GpadlBody(0, 7, bytes(8))) == []
    assert bus.bus.rejected == 2 and not bus.bus.gpadls.complete and not bus.bus.gpadls.partial
    bus.gpadl(handle=7)  # the handle is free for a good one


def test_a_bad_one_that_shows_in_its_last_body_is_refused_once(bus: Joined) -> None:
    assert bus.say(m.GpadlHeader(2, 7, 24, 1, one_range(2)[:8])) == []
    assert bus.say(m.GpadlBody(0, 7, bytes(8))) == []
    assert bus.say(m.GpadlBody(0, 7, b"\xff" * 8)) == [m.GpadlCreated(2, 7, REFUSED)]
    assert not bus.bus.gpadls.partial
    bus.gpadl(relid=2, handle=7)


def test_a_second_one_of_the_same_name_is_refused_and_the_first_stays(bus: Joined) -> None:
    header, body = m.gpadl_messages(1, 7, one_range(40), 1)
    assert bus.say(header) == []
    assert bus.say(header) == [m.GpadlCreated(1, 7, REFUSED)]
    assert bus.say(m.GpadlHeader(2, 7, 24, 1, one_range(2))) == [m.GpadlCreated(2, 7, REFUSED)], "BODY has no relid"
    assert bus.say(body) == [m.GpadlCreated(1, 7, 0)]
    assert bus.say(header) == [m.GpadlCreated(1, 7, REFUSED)]
    bus.gpadl(relid=2, handle=7)


def test_teardown_of_one_in_progress_ends_it(bus: Joined) -> None:
    header, body = m.gpadl_messages(1, 7, one_range(40), 1)
    bus.say(header)
    assert bus.say(m.GpadlTeardown(1, 7)) == [m.GpadlCreated(1, 7, REFUSED), m.GpadlTorndown(7)]
    assert bus.say(body) == []


def test_releasing_a_channel_drops_what_belongs_to_it(bus: Joined) -> None:
    bus.gpadl(relid=1)
    bus.gpadl(relid=2)
    bus.say(m.GpadlHeader(1, 8, 800, 1, b""))
    bus.say(m.GpadlHeader(2, 9, 800, 1, b""))
    bus.say(m.RelidReleased(1))
    assert list(bus.bus.gpadls.complete) == [(2, 7)] and list(bus.bus.gpadls.partial) == [9]


# ---- bounds ----------------------------------------------------------------------------------------------------------


def test_there_is_a_limit_to_those_in_progress() -> None:
    gpadls = GpadlTable()
    for handle in range(table.MAX_IN_PROGRESS):
        assert gpadls.begin(1, handle, 800, 1, b"") is None
    with pytest.raises(GpadlError, match="in progress: no more"):
        gpadls.begin(1, 1000, 800, 1, b"")
    gpadls.abandon(0)
    gpadls.begin(1, 1000, 800, 1, b"")


def test_there_is_a_limit_to_their_number() -> None:
    gpadls = GpadlTable()
    for handle in range(table.MAX_GPADLS):
        gpadls.begin(1, handle, 16, 1, one_range(1))
    with pytest.raises(GpadlError, match="no more"):
        gpadls.begin(1, 1 << 20, 16, 1, one_range(1))
    gpadls.remove(1, 0)
    gpadls.begin(1, 1 << 20, 16, 1, one_range(1))


def test_there_is_a_limit_to_what_they_describe_together() -> None:
    gpadls = GpadlTable()
    one = one_range(8190)
    accepted = 0
    with pytest.raises(GpadlError, match="range lists"):
        for handle in range(200):
            assert gpadls.begin(1, handle, len(one), 1, one) is not None
            accepted += 1
    assert accepted == table.MAX_DESCRIPTION // len(one)
    gpadls.clear()
    assert gpadls._described == 0


# ---- rings -----------------------------------------------------------------------------------------------------------


def test_pages_of_a_ring() -> None:
    ring = Gpadl(1, 7, (GpaRange(4 * PAGE, 0, (5, 6, 9, 10)),))
    assert ring.page_extents(0) == [(5 * PAGE, 2 * PAGE), (9 * PAGE, 2 * PAGE)]
    assert ring.page_extents(1, 2) == [(6 * PAGE, PAGE), (9 * PAGE, PAGE)]
    for first, count in ((4, None), (4, 1), (3, 2), (0, 5), (1 << 31, 1)):
        with pytest.raises(GpadlError, match="pages"):
            ring.page_extents(first, count)


@pytest.mark.parametrize(
    "ranges",
    [
        (GpaRange(2 * PAGE, 0, (5, 6)), GpaRange(2 * PAGE, 0, (7, 8))),
        (GpaRange(4 * PAGE, 8, (5, 6, 7, 8, 9)),),
        (GpaRange(4 * PAGE - 8, 0, (5, 6, 7, 8)),),
    ],
)
def test_only_whole_pages_of_one_range_make_a_ring(ranges: tuple[GpaRange, ...]) -> None:
    with pytest.raises(GpadlError, match="whole pages"):
        Gpadl(1, 7, ranges).page_extents(0, 1)
