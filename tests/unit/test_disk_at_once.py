"""Writes that are done on the event loop: which, when not, and what becomes of those that cannot be."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from vmbus.providers.disk import prompt
from vmbus.providers.disk.backend import FileBackend
from vmbus.providers.disk.disk import MOST_AT_ONCE, Disk
from vmbus.providers.disk.options import DiskOptions
from vmbus.providers.disk.prompt import FIRST_BACK_OFF, LONGEST_BACK_OFF, SLOW_SECONDS, Prompt, host_has_room
from vmbus.providers.disk.request import Flag, Op, Request, Status

PAGE = 4096


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.step = 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_whole_pages_of_a_bounded_length(clock: Clock) -> None:
    writes = Prompt(clock, lambda: True)
    assert writes.takes(0, PAGE) and writes.takes(7 * PAGE, prompt.LARGEST_AT_ONCE)
    for offset, length in ((512, PAGE), (0, 512), (0, prompt.LARGEST_AT_ONCE + PAGE)):
        assert not writes.takes(offset, length)


def test_not_while_the_host_has_many_dirty_pages(clock: Clock) -> None:
    asked: list[bool] = []
    room = True

    def look() -> bool:
        asked.append(room)
        return room

    writes = Prompt(clock, look)
    for _ in range(100):
        assert writes.takes(0, PAGE)
    assert asked == [True], "to ask costs more than a write"
    room = False
    clock.now += 1.0
    for _ in range(100):
        assert not writes.takes(0, PAGE)
    assert asked == [True, False]
    room = True
    clock.now += 1.0
    assert writes.takes(0, PAGE)
    many = len(asked)
    for _ in range(200):
        assert writes.takes(0, 1 << 20)
    assert len(asked) > many, "many bytes are a reason to look, too"


def test_after_a_slow_one_threads_do_them_for_a_while_and_each_time_for_longer(clock: Clock) -> None:
    writes = Prompt(clock, lambda: True)
    pauses = []
    for _ in range(12):
        assert writes.takes(0, PAGE)
        writes.took(2 * SLOW_SECONDS)
        began = clock.now
        while not writes.takes(0, PAGE):
            clock.now += 0.01
        pauses.append(round(clock.now - began, 2))
    assert pauses == sorted(pauses) and pauses[0] < 2 * FIRST_BACK_OFF
    assert LONGEST_BACK_OFF - 0.1 < pauses[-1] < LONGEST_BACK_OFF + 0.1
    clock.now += 1000
    writes.took(2 * SLOW_SECONDS)
    clock.now += 2 * FIRST_BACK_OFF
    assert writes.takes(0, PAGE), "after a calm the first while is short again"


def test_sabotage_without_the_clock_every_write_would_be_slow(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(writes: Prompt) -> int:
        """How many of the writes of ten seconds, each of which takes 0.1 s, are done on the loop."""
        count, end = 0, clock.now + 10
        while clock.now < end:
            if writes.takes(0, PAGE):
                count += 1
                clock.now += 0.1
                writes.took(0.1)
            else:
                clock.now += 0.001
        return count

    assert blocked(Prompt(clock, lambda: True)) <= 9
    monkeypatch.setattr(Prompt, "took", lambda self, seconds: None)
    assert blocked(Prompt(clock, lambda: True)) >= 100


def test_this_host_says_how_many_pages_are_dirty(monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"nr_free 1\nnr_dirty 5\nnr_writeback 4\nnr_dirty_threshold 20\nnr_dirty_background_threshold 10\n"
    monkeypatch.setattr(os, "pread", lambda fd, size, at: text)
    assert host_has_room()
    text = text.replace(b"nr_writeback 4", b"nr_writeback 5")
    assert not host_has_room()
    text = b"nr_free 1\n"
    assert not host_has_room()


def test_what_is_written_at_once_is_in_the_file(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "image"
    file.write_bytes(bytes(4 * PAGE))
    backend = FileBackend(os.open(file, os.O_RDWR))
    backend.writes = Prompt(clock, lambda: True)
    views = [memoryview(b"a" * PAGE), memoryview(b"b" * PAGE)]
    assert backend.write_now(PAGE, views, 2 * PAGE)
    assert file.read_bytes() == bytes(PAGE) + b"a" * PAGE + b"b" * PAGE + bytes(PAGE)
    clock.step = 1.5 * SLOW_SECONDS
    assert backend.write_now(PAGE, views, 2 * PAGE)
    clock.step = 0.0
    assert not backend.write_now(PAGE, views, 2 * PAGE), "the last one took long"
    backend.close()
    clock.now += 10
    assert not backend.write_now(PAGE, views, 2 * PAGE)


def test_what_cannot_be_written_is_left_to_the_long_way(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "image"
    file.write_bytes(bytes(4 * PAGE))
    backend = FileBackend(os.open(file, os.O_RDONLY))
    backend.writes = Prompt(clock, lambda: True)
    assert not backend.write_now(0, [memoryview(bytes(PAGE))], PAGE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        backend.write(0, [memoryview(bytes(PAGE))], durable=False)
    backend.close()


class Threads:
    """A host whose threads work when they are told."""

    def __init__(self) -> None:
        self.work: list[tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]]] = []

    def run_blocking(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> Threads:
        self.work.append((work, done))
        return self

    def cancel(self) -> bool:
        return False

    def step(self) -> None:
        work, done = self.work.pop(0)
        done(work(), None)

    def run(self) -> None:
        while self.work:
            self.step()


class Asked:
    def __init__(self, *views: memoryview) -> None:
        self.views: Sequence[memoryview] = views


@pytest.fixture
def threads() -> Threads:
    return Threads()


@pytest.fixture
def answers() -> list[Status]:
    return []


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: Threads, answers: list[Status]) -> Iterator[Disk]:
    monkeypatch.setenv("VMBUS_DISKS", str(tmp_path))
    options = DiskOptions(image="disk.img", size_mib=1, create=True)
    host: Any = threads
    disk = Disk(host, "disk", options, lambda token, status: answers.append(status), lambda image: image.backend)
    disk.activate()
    backend = disk.backend
    assert isinstance(backend, FileBackend)
    backend.writes = Prompt(Clock(), lambda: True)
    yield disk
    disk.close()


def write(disk: Disk, offset: int, data: bytes, flags: int = 0) -> None:
    disk.submit(Request(Op.WRITE, flags, offset, len(data)), Asked(memoryview(data)))


def test_a_write_needs_no_thread_and_is_flushed_by_the_next_flush(
    disk: Disk, threads: Threads, answers: list[Status]
) -> None:
    write(disk, 0, b"x" * PAGE)
    assert answers == [Status.OK] and not threads.work
    assert disk.core is not None and disk.core.unflushed, "a rest would leave it in the host's memory"
    disk.rest()
    assert len(threads.work) == 1
    threads.run()
    assert not disk.core.unflushed and disk.counters["flushes"] == 1


def test_with_fua_in_part_of_a_page_or_beside_a_flush_it_goes_to_a_thread(
    disk: Disk, threads: Threads, answers: list[Status]
) -> None:
    for offset, data, flags in ((0, b"x" * PAGE, Flag.FUA), (512, b"x" * 512, 0)):
        write(disk, offset, data, flags)
        assert threads.work
        threads.run()
    disk.submit(Request(Op.FLUSH, 0, 0, 0), Asked())
    write(disk, PAGE, b"y" * PAGE)
    assert len(threads.work) == 2
    threads.run()
    assert answers == [Status.OK] * 4
    assert disk.core is not None and disk.core.unflushed, "the flush may have passed what was written beside it"


def test_a_write_stays_behind_the_one_that_it_overlaps_with(
    disk: Disk, threads: Threads, answers: list[Status], tmp_path: Path
) -> None:
    write(disk, 0, b"a" * PAGE, Flag.FUA)
    write(disk, 0, b"b" * PAGE)  # waits for it
    write(disk, PAGE, b"c" * PAGE)  # for nothing
    assert answers == [Status.OK] and len(threads.work) == 1
    threads.run()
    assert answers == [Status.OK] * 3
    assert (tmp_path / "disk.img").read_bytes()[: 2 * PAGE] == b"b" * PAGE + b"c" * PAGE


def test_what_waited_in_a_crowd_is_not_all_done_in_one_turn(
    disk: Disk, threads: Threads, answers: list[Status]
) -> None:
    write(disk, 0, b"a" * PAGE, Flag.FUA)
    large = bytes(256 << 10)
    at_once = MOST_AT_ONCE // len(large)
    for _ in range(at_once + 3):
        write(disk, 0, large)  # each waits for the one before
    assert not answers and len(threads.work) == 1
    threads.step()
    assert len(answers) == 1 + at_once and len(threads.work) == 1, "others on the loop would wait meanwhile"
    threads.run()
    assert answers == [Status.OK] * (at_once + 4)
