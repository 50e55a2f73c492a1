"""Records of a server whose guest keeps none: what one end can prove, and each way of breaking it."""

from __future__ import annotations

import random
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.history import COMPLETION, INBAND, End, Header, Link, ring_bytes
from vmbus.observe.audit.checker import check_records
from vmbus.observe.audit.records import Record
from vmbus.observe.audit.report import Report
from vmbus.wire.hvsock import service_of
from vmbus.wire.nvsp import NVSP_TYPE
from vmbus.wire.storvsp import STORVSP_TYPE

ECHO = UUID("5a2f2c7e-3d0e-4c43-9b58-6f0d2f1e0001")
IDS = range(1, 9)
"""A driver of Linux's has few ids, and takes one again as soon as its request is completed."""


class Server(End):
    """A server's end, and a guest that sends requests with ids of its own. `wrong`: what is done to completion number
    `at`."""

    def __init__(
        self, seed: int = 0, *, type_: UUID = STORVSP_TYPE, wrong: str = "", at: int = 0, limit: int = 1 << 30
    ):
        super().__init__("host", 16, limit)
        self.interface_type = type_
        self.choose = random.Random(seed)
        self.wrong, self.at = wrong, at
        self.completions = 0
        self.free = list(IDS)
        self.trace = self.recorder.opened(self, Link(Header(), Header()), "opened")  # type: ignore[arg-type]

    def request(self) -> None:
        """One of the guest's, or one that wants no completion and has no id, as a driver's notices and a socket's."""
        assert self.trace is not None
        if self.choose.random() < 0.2 or not self.free:
            self.trace.taken(ring_bytes(INBAND, False, 0, b"no answer"))
            return
        number = self.free.pop(self.choose.randrange(len(self.free)))
        self.held.append((number, True))
        self.trace.taken(ring_bytes(INBAND, True, number, b"request"))

    def answer(self) -> None:
        if not self.held:
            return
        assert self.trace is not None
        number, _ = self.held.pop(self.choose.randrange(len(self.held)))
        self.completions += 1
        times = 1
        if self.completions == self.at:
            times = {"never": 0, "twice": 2}.get(self.wrong, 1)
            number = 4711 if self.wrong == "another" else number
        for _ in range(times):
            self.trace.put(ring_bytes(COMPLETION, False, number, b"answer"))
        if number in IDS:
            self.free.append(number)

    def own(self) -> None:
        """A packet of the server's, that the guest completes now or later, or one that wants nothing."""
        assert self.trace is not None
        wanted = self.choose.random() < 0.8
        number = self.next if wanted else 0
        self.trace.put(ring_bytes(INBAND, wanted, number, b"frames"))
        if wanted:
            self.next += 1
            self.sent.append(number)
        while self.sent and self.choose.random() < 0.6:
            self.trace.taken(ring_bytes(COMPLETION, False, self.sent.pop(0), b""))

    def some(self, steps: int = 400) -> None:
        for _ in range(steps):
            self.choose.choice((self.request, self.answer, self.own))()
            if self.choose.random() < 0.02:
                self.recorder.flush("looked")

    def next_server(self) -> None:
        """Saved, and restored in another process."""
        lives = self.recorder.saved([self])  # type: ignore[list-item]
        uid, position = self.recorder.uid, self.recorder.position
        self.start()
        self.recorder.resume(uid, position, lives)
        self.trace = self.recorder.opened(self, Link(Header(), Header()), "resumed")  # type: ignore[arg-type]
        self.recorder.restored([self])  # type: ignore[list-item]

    def close_channel(self) -> None:
        assert self.trace is not None
        self.trace.closed()

    def check(self) -> Report:
        self.recorder.flush("now")
        return check_records([Record(bytes(store.data), "host") for _, store in self.records])


@given(st.integers(0, 1 << 30), st.integers(0, 3), st.booleans())
def test_ids_that_come_again_and_packets_without_one_are_clean(seed: int, saves: int, closed: bool) -> None:
    server = Server(seed)
    for _ in range(saves):
        server.some(60)
        server.next_server()
    server.some(60)
    if closed:
        server.close_channel()
    report = server.check()
    assert report.clean, str(report)
    (channel,) = report.channels
    assert channel.driver == "hv_storvsc" and channel.generations == saves + 1
    assert report.half_transactions == channel.completed and report.packets == report.transactions == 0
    if not closed:
        assert sum(map(len, channel.in_flight.values())) == len(server.held) + len(server.sent)
    text = str(report)
    assert "host's half: hv_storvsc keeps no record" in text and "exactly once" not in text
    assert text.splitlines()[-1] == "clean: as far as the host's half can prove it"


@pytest.mark.parametrize(
    ("wrong", "kind", "said"),
    [
        ("twice", "doubled", "more completions than requests"),
        ("never", "lost", "never put"),
        ("another", "invented", "no request wanted it"),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_sabotage_a_completion_that_is_not_sent_once_is_named(wrong: str, kind: str, said: str, seed: int) -> None:
    server = Server(seed, wrong=wrong, at=50)
    server.some()
    assert server.completions > 60
    report = server.check()
    assert report.verdict == "broken"
    (problem,) = report.problems
    assert (problem.kind, problem.of, problem.direction) in {
        (kind, "completion", "to the guest"),
        ("lost", "completion", "to the guest"),  # `another` is one id too many, and one too few
    }
    assert wrong == "another" or said in problem.message
    assert "in the host's half" in problem.message and problem.first in {*IDS, 4711}


def test_sabotage_a_completion_after_the_close_is_named() -> None:
    server = Server()
    server.some(100)
    server.close_channel()
    assert server.check().clean
    assert server.trace is not None
    server.trace.put(ring_bytes(COMPLETION, False, 3, b"late"))
    report = server.check()
    assert report.problems[0].kind == "invented" and "after the close" in str(report), str(report)


def test_sabotage_a_packet_of_the_servers_that_is_lost_on_its_way_back_is_named() -> None:
    server = Server(type_=NVSP_TYPE)
    server.some(100)
    while not server.sent:
        server.own()
    lost = server.sent.pop(0)
    report = server.check()
    assert (report.problems[0].kind, report.problems[0].first) == ("lost", lost), str(report)


def test_a_channel_of_another_driver_is_not_proven_by_half() -> None:
    server = Server(type_=ECHO)
    server.some(50)
    report = server.check()
    assert report.verdict == "incomplete" and "the guest's record" in report.missing[0].text


def test_a_record_that_stops_short_is_said() -> None:
    server = Server()
    server.some(50)
    server.recorder.flush("now")
    server.some(50)
    for trace in list(server.recorder._open.values()):
        server.recorder.digest_all(trace)
    server.recorder._write()
    report = check_records([Record(bytes(server.records[0][1].data), "host")])
    assert report.verdict == "incomplete" and "stops short" in report.missing[0].text, str(report)


def test_a_record_that_got_brief_proves_less_and_says_so() -> None:
    server = Server(limit=2000)
    server.some(2000)
    report = server.check()
    assert report.verdict == "incomplete" and "got brief" in str(report), str(report)


def test_many_connections_are_one_line() -> None:
    first = Server(type_=service_of(5000))
    for number in range(1, 20):
        first.some(20)
        first.close_channel()
        first.interface_type = service_of(5000 + number)
        first.held, first.sent, first.next, first.free = [], [], 1, list(IDS)
        first.trace = first.recorder.opened(first, Link(Header(), Header()), "opened")  # type: ignore[arg-type]
    first.some(20)
    first.close_channel()
    report = first.check()
    assert report.clean, str(report)
    assert "20 channels of hv_sock" in str(report) and len(str(report).splitlines()) == 4, str(report)
