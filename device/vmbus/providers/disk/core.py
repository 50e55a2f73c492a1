"""What a disk decides: which requests are sound, which may run at the same time, and what each is answered.

No I/O, no threads, no time. The owner hands in requests (`accept`), carries out the jobs that come back, in any order
and as many at a time as it likes, and reports each (`finished`), which answers requests and may yield further jobs.

Order and durability:

* Requests that touch the same blocks, one of them changing them, take effect in the order in which they came. All
  others are free, as a disk's are: whoever wants an order waits for the first to complete.
* A flush begins after it was asked for, so it covers every request that had completed by then. One flush runs at a
  time; those that come meanwhile share the next one, never the one that runs: that may have passed their data already.
* A flush that failed leaves unknown what of all that was completed is on stable storage, and asking the host's kernel
  again would only say that there is nothing left to do. So every later flush, and every write that asks for it, fails
  as well, until the image is opened anew.
* When a channel is gone, its requests that have not begun are dropped; what is under way cannot be taken back and
  becomes an orphan. Requests that come over the next channel wait for orphans where they overlap, so that old data
  never replaces new.

A request costs what the requests cost that overlap with it, however many others wait (see conflicts.py).
"""

import errno
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, NamedTuple

from vmbus.providers.disk.conflicts import Conflicts
from vmbus.providers.disk.request import Flag, Op, Request, Status

_U64 = 1 << 64
_MOVES_DATA = frozenset({Op.READ, Op.WRITE})
_CHANGES = frozenset({Op.WRITE, Op.DISCARD, Op.WRITE_ZEROES})
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Geometry(NamedTuple):
    """What the disk is. Sizes in bytes; `size` is a multiple of `block_size`."""

    size: int
    block_size: int
    maximum_data: int
    maximum_range: int
    read_only: bool


class JobState(Enum):
    """WAITING: for an overlapping one. RUNNING: handed out. ORPHANED: handed out, and nobody waits for it any more."""

    WAITING = "waiting"
    RUNNING = "running"
    ORPHANED = "orphaned"
    DONE = "done"


class Job:
    """A piece of work for the back-end: `op` on `length` bytes at `offset`, on behalf of `tokens`.

    `tokens` are the owner's handles of the requests: one, or for a flush one or more. `durable`: on stable storage
    before it is done. `may_unmap`: zeroes may give storage back. `waits_for`: how many jobs have to end before it
    begins; `followers`: the jobs that wait for this one, in the order of their arrival.
    """

    __slots__ = (
        "changes",
        "durable",
        "end",
        "followers",
        "length",
        "may_unmap",
        "offset",
        "op",
        "state",
        "tokens",
        "waits_for",
    )

    def __init__(self, op: int, offset: int, length: int, flags: int, tokens: list[Any]) -> None:
        self.op = op
        self.offset = offset
        self.length = length
        self.end = offset + length
        self.durable = bool(flags & Flag.FUA)
        self.may_unmap = bool(flags & Flag.MAY_UNMAP)
        self.changes = op in _CHANGES
        self.tokens = tokens
        self.state = JobState.WAITING
        self.waits_for = 0
        self.followers: list[Job] = []

    @property
    def orphaned(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.state is JobState.ORPHANED

    def __repr__(self) -> str:
        name = Op(self.op).name
        return name if self.op == Op.FLUSH else f"{name} of {self.length} bytes at {self.offset:#x}"


class Outcome(NamedTuple):
    """What follows from a report: `answers`, (token, status) in order, and `jobs` to begin."""

    answers: list[tuple[Any, Status]]
    jobs: list[Job]


class Core:
    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.flush_failed = 0
        """The errno of the flush that failed; 0 if none did."""
        self.unflushed = False
        """Whether something was changed since the last flush began."""
        self._jobs: dict[Job, None] = {}  # all that have not ended, but flushes; in the order of their arrival
        self._conflicts: Conflicts[Job] = Conflicts()
        self._flushing: Job | None = None
        self._next_flush: Job | None = None

    # ---- requests ----------------------------------------------------------------------------------------------

    def check(self, request: Request) -> Status:
        """Whether a request makes sense here, before its memory is looked at."""
        op, _, offset, length = request
        if op == Op.FLUSH:
            return Status.OK if offset == 0 and length == 0 else Status.INVALID
        geometry = self.geometry
        # Numbers here have no upper bound, so the sum cannot wrap; the limits below are what counts.
        if offset % geometry.block_size or length % geometry.block_size or not 0 <= offset < _U64:
            return Status.INVALID
        most = geometry.maximum_data if op in _MOVES_DATA else geometry.maximum_range
        if not 0 < length <= most or offset + length > geometry.size:
            return Status.INVALID
        if op in _CHANGES and geometry.read_only:
            return Status.READ_ONLY
        return Status.OK

    def accept(self, request: Request, token: Any) -> Outcome:
        """Take a request that `check` found OK."""
        if self.flush_failed and (request.op == Op.FLUSH or request.flags & Flag.FUA):
            return Outcome([(token, Status.IO_ERROR)], [])
        if request.op == Op.FLUSH:
            return Outcome([], self._want_flush([token]))
        job = Job(request.op, request.offset, request.length, request.flags, [token])
        self._jobs[job] = None
        return Outcome([], [] if self._must_wait(job) else [self._begin(job)])

    def _must_wait(self, job: Job) -> bool:
        """Whether a job that comes after all others has to wait for some of them."""
        earlier = self._conflicts.add(job)
        for other in earlier:
            other.followers.append(job)
        job.waits_for = len(earlier)
        return bool(earlier)

    @property
    def undisturbed(self) -> bool:
        """Whether a request may be done here and now, without `accept`: nothing runs or waits but flushes. Whoever
        writes so says it by `unflushed`."""
        return not self._conflicts

    @property
    def flushing(self) -> bool:
        return self._flushing is not None

    def flush(self) -> list[Job]:
        """Flush on nobody's behalf, if anything that ended needs it. Returns the job, unless it has to wait."""
        return self._want_flush([]) if self.unflushed and not self.flush_failed else []

    def _want_flush(self, tokens: list[Any]) -> list[Job]:
        if self._flushing is not None:
            if self._next_flush is None:
                self._next_flush = Job(Op.FLUSH, 0, 0, 0, [])
            self._next_flush.tokens += tokens
            return []
        self._flushing = Job(Op.FLUSH, 0, 0, 0, list(tokens))
        return [self._begin(self._flushing)]

    def _begin(self, job: Job) -> Job:
        job.state = JobState.RUNNING
        if job.op == Op.FLUSH:
            self.unflushed = False
        return job

    # ---- reports -----------------------------------------------------------------------------------------------

    def finished(self, job: Job, error: int = 0) -> Outcome:
        """A job has ended; `error` is the errno if it failed."""
        orphaned = job.state is JobState.ORPHANED
        job.state = JobState.DONE
        status = Status.OK if not error else Status.NO_SPACE if error in _NO_SPACE else Status.IO_ERROR
        # A lack of space is found before anything is lost, unless it takes until the flush.
        if (job.op == Op.FLUSH and error) or (job.durable and status is Status.IO_ERROR):
            self.flush_failed = self.flush_failed or error
            status = Status.IO_ERROR
        answers = [] if orphaned else [(token, status) for token in job.tokens]
        if job is self._flushing:
            answers_too, jobs = self._flush_ended()
            return Outcome(answers + answers_too, jobs)
        if job.op in _CHANGES:
            self.unflushed = True
        del self._jobs[job]
        self._conflicts.remove(job)
        return Outcome(answers, self._startable(job))

    def _flush_ended(self) -> Outcome:
        self._flushing, self._next_flush = self._next_flush, None
        if self._flushing is None:
            return Outcome([], [])
        if self.flush_failed:
            failed, self._flushing = self._flushing, None
            return Outcome([(token, Status.IO_ERROR) for token in failed.tokens], [])
        return Outcome([], [self._begin(self._flushing)])

    def _startable(self, ended: Job) -> list[Job]:
        """The jobs that waited for `ended`, and for nothing else."""
        found = []
        for job in ended.followers:
            job.waits_for -= 1
            if not job.waits_for and job.state is JobState.WAITING:
                found.append(self._begin(job))
        ended.followers = []
        return found

    # ---- the channel goes ----------------------------------------------------------------------------------------

    def forget(
        self, take_back: Callable[[Job], bool] = lambda job: False, gone: Callable[[Any], bool] = lambda token: True
    ) -> list[Job]:
        """Nobody waits for the requests whose tokens are `gone` any more: those that did not begin are dropped, the
        others become orphans. Returns the jobs that have waited for dropped ones alone.

        `take_back(job)`: whether a job that was handed out is not begun, and will not be.
        """
        left: list[Job] = []
        for job in self._jobs:
            if not job.orphaned and not gone(job.tokens[0]):
                left.append(job)
            elif job.state is JobState.WAITING or take_back(job):
                job.state = JobState.DONE
            else:
                job.state = JobState.ORPHANED
                job.tokens = []
                left.append(job)
            job.waits_for, job.followers = 0, []
        self._jobs = dict.fromkeys(left)
        self._conflicts = Conflicts()
        startable: list[Job] = []
        for job in left:
            # What is under way waits for nothing: all that it could wait for has ended.
            if not self._must_wait(job) and job.state is JobState.WAITING:
                startable.append(self._begin(job))
        self._forget_flushes(take_back, gone)
        return startable

    def _forget_flushes(self, take_back: Callable[[Job], bool], gone: Callable[[Any], bool]) -> None:
        flush, later = self._flushing, self._next_flush
        if later is not None:
            later.tokens = [token for token in later.tokens if not gone(token)]
            if not later.tokens:
                self._next_flush = None
        if flush is None:
            return
        flush.tokens = [token for token in flush.tokens if not gone(token)]
        if flush.tokens or self._next_flush is not None:
            return
        if take_back(flush):
            flush.state = JobState.DONE
            self._flushing = None
            self.unflushed = True
        else:
            flush.state = JobState.ORPHANED

    # ---- inspection ----------------------------------------------------------------------------------------------

    @property
    def only_flushes(self) -> bool:
        """Nothing runs or waits but flushes."""
        return not self._jobs

    @property
    def under_way(self) -> int:
        """Requests that run or wait, but flushes."""
        return len(self._jobs)

    @property
    def idle(self) -> bool:
        return not self._jobs and self._flushing is None

    def count(self, states: Iterable[JobState]) -> int:
        """Jobs in one of these states."""
        wanted = frozenset(states)
        return sum(job.state in wanted for job in (*self._jobs, *filter(None, (self._flushing, self._next_flush))))

    @property
    def running(self) -> list[str]:
        return [
            repr(job)
            for job in (*self._jobs, *filter(None, (self._flushing,)))
            if job.state in (JobState.RUNNING, JobState.ORPHANED)
        ]
