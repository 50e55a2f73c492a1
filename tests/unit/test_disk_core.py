"""The disk's core against a model: order, flushes under power cuts, errors. No I/O: jobs take effect when we say so."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.disk import BLOCK, BLOCKS, GEOMETRY, CachedDisk, request
from vmbus.providers.disk.core import Core, Job, Outcome
from vmbus.providers.disk.request import Flag, Op, Request, Status

# ---- the model -------------------------------------------------------------------------------------------------------


class Script:
    """Drives a core with random requests; jobs take effect at a random moment between begin and end.

    `history[block]`: the values written to it in order of arrival, each with whether it was answered, and with the
    number of the step at which.
    """

    def __init__(self, seed: int, core: Core | None = None) -> None:
        self.choose = random.Random(seed)
        self.core = core or Core(GEOMETRY)
        self.disk = CachedDisk(BLOCKS)
        self.begun: list[Job] = []
        self.effective: list[Job] = []
        self.step = 0
        self.writes: list[dict] = []  # in order of arrival
        self.of: dict[int, dict] = {}  # by token
        self.answers: dict[int, Status] = {}
        self.flush_asked: dict[int, int] = {}  # token of a flush: step at which it was asked for
        self.read_values: dict[int, list[object]] = {}
        self.tokens = 0
        self.violations: list[str] = []

    def submit(self) -> None:
        op = self.choose.choices([Op.READ, Op.WRITE, Op.FLUSH, Op.WRITE_ZEROES], [3, 6, 2, 1])[0]
        first = self.choose.randrange(BLOCKS)
        count = self.choose.randint(1, min(4, BLOCKS - first))
        flags = Flag.FUA if op in (Op.WRITE, Op.WRITE_ZEROES) and self.choose.random() < 0.2 else 0
        one = request(op, first, count, flags)
        assert self.core.check(one) is Status.OK
        self.tokens += 1
        token = self.tokens
        if op in (Op.WRITE, Op.WRITE_ZEROES):
            value = token if op == Op.WRITE else f"zero{token}"
            record = {"token": token, "first": first, "count": count, "value": value, "fua": bool(flags), "done": None}
            self.writes.append(record)
            self.of[token] = record
        elif op == Op.FLUSH:
            self.flush_asked[token] = self.step
        self.take(self.core.accept(one, token))

    def take(self, outcome: Outcome) -> None:
        self.begun += outcome.jobs
        for token, status in outcome.answers:
            assert token not in self.answers, "answered twice"
            assert status is Status.OK
            self.answers[token] = status
            if token in self.of:
                self.of[token]["done"] = self.step

    def effect(self, job: Job) -> None:
        self.begun.remove(job)
        self.effective.append(job)
        first = job.offset // BLOCK
        if job.op == Op.READ:
            self.read_values[job.tokens[0]] = self.disk.now[first : first + job.length // BLOCK]
        elif job.op == Op.FLUSH:
            self.disk.flush()
        else:
            value = self.of[job.tokens[0]]["value"]
            self.disk.change(first, [value] * (job.length // BLOCK), durable=job.durable)

    def one_step(self) -> None:
        self.step += 1
        moves: list[Callable[[], None]] = []
        if len(self.begun) + len(self.effective) < 12:
            moves.append(self.submit)
        if self.begun:
            moves.append(lambda: self.effect(self.choose.choice(self.begun)))
        if self.effective:
            moves.append(self.end_one)
        self.choose.choice(moves)()

    def end_one(self) -> None:
        job = self.choose.choice(self.effective)
        self.effective.remove(job)
        self.take(self.core.finished(job))

    def run_out(self) -> None:
        while self.begun or self.effective:
            self.step += 1
            if self.begun:
                self.effect(self.choose.choice(self.begun))
            else:
                self.end_one()

    def allowed_after_a_cut(self, block: int) -> set[object]:
        """What the block may hold after a power cut: the newest write that was promised to stay, or a later one."""
        here = [one for one in self.writes if one["first"] <= block < one["first"] + one["count"]]
        asked = [step for token, step in self.flush_asked.items() if token in self.answers]
        covered_until = max(asked, default=-1)
        base = -1
        for index, one in enumerate(here):
            promised = one["done"] is not None and (one["fua"] or one["done"] <= covered_until)
            if promised:
                base = index
        later = {one["value"] for one in here[base + 1 :]}
        return later | ({here[base]["value"]} if base >= 0 else {0})

    def check_power_cut(self) -> list[str]:
        allowed = [self.allowed_after_a_cut(block) for block in range(BLOCKS)]
        self.disk.power_cut(self.choose)
        return [
            f"block {block} holds {self.disk.now[block]!r}, allowed: {allowed[block]}"
            for block in range(BLOCKS)
            if self.disk.now[block] not in allowed[block]
        ]


@settings(max_examples=200, deadline=None)
@given(st.integers(min_value=0), st.integers(min_value=1, max_value=150))
def test_scsi_survives_a_power_cut_with_all_that_was_flushed(seed: int, steps: int) -> None:
    script = Script(seed)
    for _ in range(steps):
        script.one_step()
    assert script.check_power_cut() == []


def last_written(script: Script) -> list[object]:
    """What each block holds if writes take effect in the order of their arrival."""
    last: dict[int, object] = dict.fromkeys(range(BLOCKS), 0)
    for one in script.writes:
        last |= dict.fromkeys(range(one["first"], one["first"] + one["count"]), one["value"])
    return [last[block] for block in range(BLOCKS)]


@settings(max_examples=200, deadline=None)
@given(st.integers(min_value=0), st.integers(min_value=1, max_value=150))
def test_everything_is_answered_once_and_reads_and_writes_are_as_if_in_the_order_of_arrival(
    seed: int, steps: int
) -> None:
    script = Script(seed)
    expected: dict[int, list[object]] = {}
    accept = script.core.accept

    def note(one: Request, token: int) -> Outcome:
        if one.op == Op.READ:
            first = one.offset // BLOCK
            expected[token] = last_written(script)[first : first + one.length // BLOCK]
        return accept(one, token)

    script.core.accept = note  # type: ignore[method-assign]
    for _ in range(steps):
        script.one_step()
    script.run_out()
    assert set(script.answers) == set(range(1, script.tokens + 1))
    assert script.core.idle and script.read_values == expected
    assert script.disk.now == last_written(script)


def broken_by(change: Callable[[Core], None], check: Callable[[Script], list[str]]) -> bool:
    """Whether a core with this defect is found out within some runs."""
    for seed in range(300):
        core = Core(GEOMETRY)
        change(core)
        script = Script(seed, core)
        try:
            for _ in range(120):
                script.one_step()
        except AssertionError:
            return True
        if check(script):
            return True
    return False


def test_a_flush_that_joins_the_one_that_runs_is_found_out() -> None:
    def join(core: Core) -> None:
        original = core._want_flush

        def want(tokens: list[object]) -> list[Job]:
            if core._flushing is None:
                return original(tokens)
            core._flushing.tokens += tokens
            return []

        core._want_flush = want  # type: ignore[method-assign]

    assert broken_by(join, Script.check_power_cut)


def test_a_flush_that_does_nothing_is_found_out() -> None:
    for seed in range(100):
        script = Script(seed)
        script.disk.flush = lambda: None  # type: ignore[method-assign]
        for _ in range(120):
            script.one_step()
        if script.check_power_cut():
            return
    raise AssertionError("nobody noticed")


def test_overlapping_writes_without_an_order_are_found_out() -> None:
    def check(script: Script) -> list[str]:
        script.run_out()
        return [] if script.disk.now == last_written(script) else ["another order"]

    def free(core: Core) -> None:
        core._must_wait = lambda job: False  # type: ignore[method-assign]

    assert broken_by(free, check)


# ---- single rules ----------------------------------------------------------------------------------------------------


def started(outcome: Outcome) -> Job:
    assert outcome.answers == []
    (job,) = outcome.jobs
    return job


@pytest.mark.parametrize(
    "wrong",
    [
        Request(Op.READ, 0, BLOCKS * BLOCK, BLOCK),
        Request(Op.READ, 0, (BLOCKS - 1) * BLOCK, 2 * BLOCK),
        Request(Op.WRITE, 0, (1 << 64) - BLOCK, BLOCK),
        Request(Op.WRITE, 0, (1 << 64) - BLOCK, 2 * BLOCK),
        Request(Op.WRITE, 0, BLOCK, (1 << 64) - BLOCK),
        Request(Op.READ, 0, 1, BLOCK),
        Request(Op.READ, 0, 0, BLOCK - 1),
        Request(Op.READ, 0, 0, 0),
        Request(Op.WRITE, 0, 0, 5 * BLOCK),
        Request(Op.DISCARD, 0, 0, 5 * BLOCK),
        Request(Op.FLUSH, 0, BLOCK, 0),
        Request(Op.FLUSH, 0, 0, BLOCK),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: Request) -> None:
    assert Core(GEOMETRY).check(wrong) is Status.INVALID


def test_a_read_only_disk_changes_nothing() -> None:
    core = Core(GEOMETRY._replace(read_only=True))
    for op in (Op.WRITE, Op.DISCARD, Op.WRITE_ZEROES):
        assert core.check(request(op)) is Status.READ_ONLY
    assert core.check(request(Op.READ)) is core.check(request(Op.FLUSH)) is Status.OK


def test_reads_never_wait_for_reads() -> None:
    core = Core(GEOMETRY)
    jobs = [started(core.accept(request(Op.READ, 0, 2), number)) for number in range(5)]
    for job in reversed(jobs):
        assert core.finished(job).jobs == []


def test_flushes_that_come_while_one_runs_share_the_next() -> None:
    core = Core(GEOMETRY)
    first = started(core.accept(request(Op.FLUSH), "a"))
    assert core.accept(request(Op.FLUSH), "b") == core.accept(request(Op.FLUSH), "c") == Outcome([], [])
    outcome = core.finished(first)
    assert outcome.answers == [("a", Status.OK)]
    assert [job.tokens for job in outcome.jobs] == [["b", "c"]]
    assert core.finished(outcome.jobs[0]).answers == [("b", Status.OK), ("c", Status.OK)]


def test_errors_go_to_whom_they_belong() -> None:
    core = Core(GEOMETRY)
    for number, status in ((errno.EIO, Status.IO_ERROR), (errno.ENOSPC, Status.NO_SPACE), (errno.EROFS, 1)):
        job = started(core.accept(request(Op.WRITE), "a"))
        other = started(core.accept(request(Op.WRITE, 3), "b"))
        assert core.finished(job, number).answers == [("a", status)]
        assert core.finished(other).answers == [("b", Status.OK)]
    assert core.flush_failed == 0
    assert core.finished(started(core.accept(request(Op.FLUSH), "f"))).answers == [("f", Status.OK)]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_after_a_failed_flush_none_succeeds(number: int) -> None:
    """The kernel reports a lost page once; a second fdatasync would say that all is well."""
    core = Core(GEOMETRY)
    flush = started(core.accept(request(Op.FLUSH), "a"))
    assert core.accept(request(Op.FLUSH), "b").jobs == []
    assert core.finished(flush, number) == Outcome([("a", Status.IO_ERROR), ("b", Status.IO_ERROR)], [])
    assert core.accept(request(Op.FLUSH), "c") == Outcome([("c", Status.IO_ERROR)], [])
    assert core.accept(request(Op.WRITE, flags=Flag.FUA), "d") == Outcome([("d", Status.IO_ERROR)], [])
    write = started(core.accept(request(Op.WRITE), "e"))
    assert core.finished(write).answers == [("e", Status.OK)]
    assert core.flush() == []
    assert core.flush_failed == number


def test_fault_d4_a_durable_write_that_fails_counts_as_a_failed_flush_unless_space_was_short() -> None:
    core = Core(GEOMETRY)
    job = started(core.accept(request(Op.WRITE, flags=Flag.FUA), "a"))
    assert core.finished(job, errno.ENOSPC).answers == [("a", Status.NO_SPACE)]
    assert core.flush_failed == 0
    job = started(core.accept(request(Op.WRITE, flags=Flag.FUA), "b"))
    assert core.finished(job, errno.EIO).answers == [("b", Status.IO_ERROR)]
    assert core.flush_failed == errno.EIO


def test_fault_d3_what_waits_at_a_reset_is_dropped_however_often() -> None:
    """A slow disk, and a guest that sends 64 requests and resets, again and again."""
    core = Core(GEOMETRY)
    slow = started(core.accept(request(Op.WRITE, 0, 2), "slow"))
    for number in range(400):
        for one in range(64):
            op = (Op.WRITE, Op.DISCARD, Op.WRITE_ZEROES)[one % 3]
            assert core.accept(request(op, 1), (number, one)).jobs == []
        core.forget()
    outcome = core.finished(slow)
    assert (outcome.answers, outcome.jobs) == ([], []) and core.idle


def test_orphans_run_on_unanswered_and_hold_back_what_comes_after() -> None:
    core = Core(GEOMETRY)
    old = started(core.accept(request(Op.WRITE, 0, 2), "old"))
    assert core.accept(request(Op.WRITE, 1), "waiting").jobs == []
    flush = started(core.accept(request(Op.FLUSH), "flush"))
    core.accept(request(Op.FLUSH), "next flush")
    core.forget()
    assert core.accept(request(Op.WRITE, 1), "new").jobs == []  # after the old one, never before
    assert core.accept(request(Op.FLUSH), "new flush").jobs == []
    outcome = core.finished(old, errno.EIO)
    assert outcome.answers == []
    (job,) = outcome.jobs
    assert job.tokens == ["new"]
    assert core.finished(job).answers == [("new", Status.OK)]
    outcome = core.finished(flush)
    assert outcome.answers == [] and [job.tokens for job in outcome.jobs] == [["new flush"]]
    core.finished(outcome.jobs[0])
    assert core.idle
