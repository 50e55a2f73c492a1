"""Which requests to a disk wait for which, what that costs, and what becomes of them when a channel goes."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from support.disk import BLOCK, BLOCKS, GEOMETRY, request
from vmbus.providers.disk.core import Core, Geometry, Job
from vmbus.providers.disk.request import Op, Request


class Naive:
    """Which jobs run, by comparing each with all before it."""

    def __init__(self) -> None:
        self.jobs: list[tuple[int, int, int, bool]] = []

    def running(self) -> set[int]:
        free = set()
        for index, (token, start, end, changes) in enumerate(self.jobs):
            others = self.jobs[:index]
            if not any(start < e and s < end and (changes or c) for _, s, e, c in others):
                free.add(token)
        return free


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(min_value=1, max_value=120))
def test_requests_wait_for_exactly_those_that_they_overlap_with(choose: random.Random, steps: int) -> None:
    core, naive = Core(GEOMETRY), Naive()
    running: dict[int, Job] = {}
    number_of: dict[Job, int] = {}

    def note(jobs: list[Job]) -> None:
        for job in jobs:
            number_of[job] = job.tokens[0]
            running[job.tokens[0]] = job

    for token in range(steps):
        if choose.random() < 0.02:
            # Another channel: what could not be taken back stays in the way of what comes.
            kept = {one for one in running if choose.random() < 0.3}
            core.forget(lambda job, kept=kept: number_of[job] not in kept)  # type: ignore[misc]
            naive.jobs = [job for job in naive.jobs if job[0] in kept]
            running = {one: running[one] for one in kept}
        if choose.random() < 0.6 or not running:
            op = choose.choice([Op.READ, Op.WRITE, Op.DISCARD])
            first = choose.randrange(BLOCKS)
            count = choose.randint(1, min(4, BLOCKS - first))
            outcome = core.accept(request(op, first, count), token)
            naive.jobs.append((token, first, first + count, op != Op.READ))
        else:
            number = choose.choice(sorted(running))
            outcome = core.finished(running.pop(number))
            naive.jobs = [job for job in naive.jobs if job[0] != number]
        note(outcome.jobs)
        assert set(running) == naive.running()
        assert [number_of[job] for job in outcome.jobs] == sorted(number_of[job] for job in outcome.jobs)
    while running:
        note(core.finished(running.pop(min(running))).jobs)
    assert core.idle and len(core._conflicts) == 0


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(min_value=1, max_value=120))
def test_one_of_several_channels_goes(choose: random.Random, steps: int) -> None:
    """The requests of the others keep their order, and those that waited for dropped ones alone begin."""
    core, naive = Core(GEOMETRY), Naive()
    running: dict[int, Job] = {}
    number_of: dict[Job, int] = {}
    channel_of: dict[int, int] = {}
    answered: list[int] = []

    def take(jobs: list[Job]) -> None:
        for job in jobs:
            number_of[job] = job.tokens[0]
            running[job.tokens[0]] = job

    def end(number: int) -> None:
        outcome = core.finished(running.pop(number))
        naive.jobs = [job for job in naive.jobs if job[0] != number]
        answered.extend(token for token, _ in outcome.answers)
        take(outcome.jobs)

    gone: set[int] = set()
    for token in range(steps):
        if choose.random() < 0.05:
            channel = choose.randrange(3)
            mine = {one for one in channel_of if channel_of[one] == channel and one not in answered}
            begun = {one for one in mine & running.keys() if choose.random() < 0.5}
            take_back = lambda job, begun=begun: number_of[job] in mine - begun  # noqa: B023, E731
            started = core.forget(take_back, lambda one, mine=mine: one in mine)  # type: ignore[misc]
            gone |= mine
            # An orphan of an earlier time may be taken back, too.
            left = {number_of[job] for job in core._jobs if job in number_of}
            naive.jobs = [job for job in naive.jobs if job[0] in left or job[0] not in mine]
            for one in mine - begun:
                running.pop(one, None)
            take(started)
        elif choose.random() < 0.6 or not running:
            first = choose.randrange(BLOCKS)
            count = choose.randint(1, min(4, BLOCKS - first))
            op = choose.choice([Op.READ, Op.WRITE])
            channel_of[token] = choose.randrange(3)
            naive.jobs.append((token, first, first + count, op != Op.READ))
            take(core.accept(request(op, first, count), token).jobs)
        else:
            end(choose.choice(sorted(running)))
        assert set(running) == naive.running()
    while running:
        end(min(running))
    assert core.idle and len(core._conflicts) == 0
    assert sorted(answered) == sorted(set(channel_of) - gone), "each request of a channel that is there, exactly once"


def test_a_flush_that_others_wait_for_stays_when_one_channel_goes() -> None:
    core = Core(GEOMETRY)
    (first,) = core.accept(request(Op.FLUSH), ("a", 1)).jobs
    core.accept(request(Op.FLUSH), ("a", 2))
    core.accept(request(Op.FLUSH), ("b", 3))
    assert core.forget(lambda job: True, lambda token: token[0] == "a") == []
    outcome = core.finished(first)
    assert outcome.answers == [] and [job.tokens for job in outcome.jobs] == [[("b", 3)]]
    assert [token for token, _ in core.finished(outcome.jobs[0]).answers] == [("b", 3)]
    assert core.idle


def test_what_a_request_costs_does_not_grow_with_those_that_wait_elsewhere() -> None:
    """Steps are counted, not seconds: how many spans an accept or a report looks at."""
    geometry = Geometry(BLOCK * 100_000, BLOCK, 64 * BLOCK, 64 * BLOCK, False)

    def touched(waiting: int) -> int:
        core = Core(geometry)
        for number in range(waiting):
            core.accept(request(Op.WRITE, 8 * number), number)
        looked = 0
        conflicts, put = core._conflicts, core._conflicts._put

        def counted(first: int, last: int, spans: list[Any]) -> None:
            nonlocal looked
            looked += max(last - first, len(spans))
            put(first, last, spans)

        conflicts._put = counted  # type: ignore[method-assign]
        for number in range(100):
            (job,) = core.accept(request(Op.WRITE, 8 * number + 4), "new").jobs
            core.finished(job)
        return looked

    assert touched(2000) <= 2 * touched(200)


def test_spans_that_a_reader_was_cut_into_come_together_again() -> None:
    core = Core(Geometry(BLOCK << 20, BLOCK, BLOCK << 20, BLOCK << 20, False))
    core.accept(Request(Op.READ, 0, 0, BLOCK << 20), "a slow one")
    for number in range(1000):
        (job,) = core.accept(request(Op.READ, 7 * number), "quick").jobs
        core.finished(job)
    assert len(core._conflicts) == 1
