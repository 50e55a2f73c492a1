"""Complaints that a guest causes: at a bounded rate, counted, and no place that is forgotten."""

from __future__ import annotations

import io
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vmbus
from support.device import BASE, Machine, connect
from vmbus.bus.synic import CONTROL_ENABLE, Register
from vmbus.util import complaints
from vmbus.util.complaints import (
    BURST,
    COMPLAINTS,
    EVERY,
    MAX_KINDS,
    MAX_TEXT,
    MAX_TRACEBACK,
    TOTAL_BURST,
    TOTAL_EVERY,
    Complaints,
)

SOURCES = Path(vmbus.__file__).parent


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Log:
    """A logger of its own, with a clock that we set."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.complaints = Complaints(self.clock)
        self.logger = logging.Logger("test", logging.INFO)
        self.logger.addFilter(self.complaints)
        self.stream = io.StringIO()
        self.logger.addHandler(logging.StreamHandler(self.stream))

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()

    def kind(self, number: int) -> Callable[[str], None]:
        """A complaint from a place in the code of its own."""
        scope: dict[str, Callable[[str], None]] = {}
        source = "\n" * number + "def say(text): logger.warning('kind %s', text)"
        exec(compile(source, "some_provider.py", "exec"), {"logger": self.logger}, scope)
        return scope["say"]


@pytest.fixture
def log() -> Log:
    return Log()


def left_out(lines: list[str]) -> int:
    return sum(int(number) for number in re.findall(r"\((\d+) more like this left out", "\n".join(lines)))


def test_a_burst_is_written_then_one_at_a_time(log: Log) -> None:
    say = log.kind(1)
    for number in range(1000):
        say(str(number))
    assert log.lines == [f"kind {number}" for number in range(BURST)]
    log.clock.now += EVERY - 0.1
    say("too early")
    log.clock.now += 0.1
    say("again")
    say("too much again")
    assert log.lines[BURST:] == [f"kind again ({1000 - BURST + 1} more like this left out in the last {EVERY:.1f} s)"]
    assert (log.complaints.written, log.complaints.left_out) == (BURST + 1, 1000 - BURST + 2)


def test_the_end_says_what_nobody_has_said(log: Log) -> None:
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    handler.addFilter(log.complaints)
    logger = logging.getLogger(complaints.__name__)
    logger.addHandler(handler)
    try:
        for number in range(50):
            log.kind(3)(str(number))
        log.clock.now += 2
        log.complaints.tell()
        log.complaints.tell()  # it is said by now
    finally:
        logger.removeHandler(handler)
    assert heard == [f"test: kind %s ({50 - BURST} more like this left out in the last 2.0 s)"]


def test_all_kinds_together_are_bounded_and_a_new_one_is_heard(log: Log) -> None:
    old = [log.kind(number) for number in range(50)]
    for _ in range(100):
        for say in old:
            say("old")
    spent = len(log.lines)
    assert TOTAL_BURST <= spent <= TOTAL_BURST + len(old)
    log.kind(99)("new")  # it cannot be hidden behind the others
    assert log.lines[-1] == "kind new"
    for _ in range(600):  # ten minutes, as fast as it goes
        log.clock.now += 1.0
        for say in old:
            say("old")
    assert len(log.lines) - spent <= 600 / TOTAL_EVERY + len(old) * 600 / (BURST * EVERY)
    assert left_out(log.lines) <= log.complaints.left_out


def test_the_number_of_kinds_is_bounded(log: Log) -> None:
    for number in range(MAX_KINDS + 200):
        log.kind(number)("x")
    assert len(log.complaints._kinds) == MAX_KINDS + 1
    assert log.complaints.summary()["left_out"] > 0 and len(log.complaints.summary()["most"]) <= 8


def test_texts_and_tracebacks_are_bounded(log: Log) -> None:
    def deep(left: int) -> None:
        if left:
            deep_names[left % 2](left - 1)
        else:
            raise RuntimeError("the reason" + "y" * 100)

    def deeper(left: int) -> None:
        deep(left)

    deep_names = [deep, deeper]
    log.logger.warning("%s", "z" * 100_000)
    assert len(log.stream.getvalue()) <= MAX_TEXT + 100 and "98000 characters left out" in log.stream.getvalue()
    log.stream.seek(0)
    log.stream.truncate(0)
    try:
        deep(200)
    except RuntimeError:
        log.logger.exception("it raised")
    text = log.stream.getvalue()
    assert 0.9 * MAX_TRACEBACK < len(text) < MAX_TRACEBACK + 200
    assert "Traceback" in text and "RuntimeError: the reason" in text


def test_a_record_that_cannot_be_formatted_is_left_to_the_handler(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    log.logger.warning("%d", "no number")
    assert log.complaints.written == 1 and not log.lines


def test_what_developers_ask_for_is_not_bounded(log: Log) -> None:
    log.logger.setLevel(logging.DEBUG)
    for _ in range(200):
        log.logger.debug("detail")
    assert len(log.lines) == 200 and log.complaints.written == 0


def test_a_handler_that_asks_again_counts_nothing_twice(log: Log) -> None:
    log.logger.handlers[0].addFilter(log.complaints)
    for _ in range(30):
        log.kind(1)("x")
    assert (len(log.lines), log.complaints.written, log.complaints.left_out) == (BURST, BURST, 30 - BURST)


def test_from_several_threads_none_is_lost(log: Log) -> None:
    say = log.kind(1)
    threads = [threading.Thread(target=lambda: [say("x") for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (log.complaints.written, log.complaints.left_out) == (BURST, 2000 - BURST)


# ---- what a guest does -----------------------------------------------------------------------------------------------


@pytest.fixture
def heard() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("vmbus")
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)


def bad_posts(machine: Machine) -> None:
    driver = connect(machine)
    for _ in range(5000):
        driver._post(4, b"\xff" * 240)


def posts_out_of_reach(machine: Machine) -> None:
    connect(machine)
    machine.device.bar_write(Register.POST_ADDRESS_HIGH, bytes(4))
    for _ in range(5000):
        machine.device.bar_write(Register.POST_MESSAGE, b"\1\0\0\0")


def bad_pages(machine: Machine) -> None:
    for _ in range(5000):
        machine.device.bar_write(Register.CONTROL, CONTROL_ENABLE.to_bytes(4, "little"))


def pages_taken_away(machine: Machine) -> None:
    view = memoryview(machine.ram)[:8192]
    device = machine.device
    device.memory.unmap(BASE, machine.region)
    for _ in range(5000):
        device.memory.map(BASE, view, True)
        for register, value in (
            (Register.MESSAGE_PAGE_LOW, 1),
            (Register.MESSAGE_PAGE_HIGH, 1),
            (Register.EVENT_PAGE_LOW, 4097),
            (Register.EVENT_PAGE_HIGH, 1),
            (Register.CONTROL, CONTROL_ENABLE),
        ):
            device.bar_write(register, value.to_bytes(4, "little"))
        assert device.synic.enabled
        device.memory.unmap(BASE, 8192)


@pytest.mark.parametrize("flood", [bad_posts, posts_out_of_reach, bad_pages, pages_taken_away])
def test_a_guest_cannot_fill_the_log(flood: Callable[[Machine], None], heard: io.StringIO) -> None:
    flood(Machine(["echo"]))
    lines = heard.getvalue().splitlines()
    assert 1 <= len(lines) <= 2 * BURST and len(heard.getvalue()) < 4000
    summary = COMPLAINTS.summary()
    assert summary["written"] == len(lines)
    assert left_out(lines) <= summary["left_out"]
    assert summary["written"] + summary["left_out"] == 5000
    assert sum(summary["most"].values()) == summary["left_out"]


def test_sabotage_without_the_filter_a_guest_fills_the_log(heard: io.StringIO) -> None:
    logger = logging.getLogger("vmbus.bus.server")
    logger.removeFilter(COMPLAINTS)
    try:
        bad_posts(Machine(["echo"]))
    finally:
        logger.addFilter(COMPLAINTS)
    assert len(heard.getvalue().splitlines()) == 5000


# ---- no place is forgotten ----------------------------------------------------------------------------------------

ON_PURPOSE = {"util/complaints.py", "cli/serve.py", "testkit/kit.py"}
"""Who handles loggers themselves."""


def test_every_module_of_the_device_has_a_bounded_logger() -> None:
    plain = {
        str(path.relative_to(SOURCES))
        for path in SOURCES.rglob("*.py")
        if re.search(r"\bgetLogger\(|\blogging\.(debug|info|warning|error|exception|critical)\(", path.read_text())
    }
    assert plain == ON_PURPOSE
