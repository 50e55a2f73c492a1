"""Work on a disk that threads do: one job on the back-end, and who waits for it to let go of guest memory."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vmbus.providers.disk.backend import Backend
from vmbus.providers.disk.core import Job
from vmbus.providers.disk.request import Op


class UnderWay:
    """Jobs that touch guest memory at this moment, on whatever threads."""

    def __init__(self) -> None:
        self._jobs: set[Job] = set()
        self._given_up: set[Job] = set()
        self._condition = threading.Condition()

    def __len__(self) -> int:
        return len(self._jobs)

    @contextmanager
    def __call__(self, job: Job) -> Iterator[None]:
        """One more for as long as the block runs."""
        with self._condition:
            self._jobs.add(job)
        try:
            yield
        finally:
            with self._condition:
                self._jobs.discard(job)
                self._given_up.discard(job)
                if not self._orphans:
                    self._condition.notify_all()

    @property
    def _orphans(self) -> bool:
        """Whether there is one that nobody waits for any more, and that was not given up."""
        return any(job.orphaned and job not in self._given_up for job in self._jobs)

    def wait(self, seconds: float) -> bool:
        """Block until there are no orphans; returns whether that is so within `seconds`.

        Each is waited for once: a guest that resets the function again and again while a disk hangs must not make the
        server stand still all the time.
        """
        with self._condition:
            if not self._condition.wait_for(lambda: not self._orphans, seconds):
                self._given_up = {job for job in self._jobs if job.orphaned}
            return not any(job.orphaned for job in self._jobs)


def perform(under_way: UnderWay, backend: Backend, job: Job, views: Sequence[memoryview]) -> None:
    """Do a job, on a thread. Touches nothing but the back-end, the job's own fields, and the guest's memory in `views`.

    Raises OSError.
    """
    if job.op == Op.FLUSH:
        backend.flush()
    elif job.orphaned:
        return  # its thread had just taken it
    elif job.op == Op.DISCARD:
        backend.discard(job.offset, job.length)
    elif job.op == Op.WRITE_ZEROES:
        backend.write_zeroes(job.offset, job.length, may_unmap=job.may_unmap, durable=job.durable)
    else:
        with under_way(job):
            # Looked at inside: whoever makes orphans waits for all that did not see it.
            if job.orphaned:
                return
            if job.op == Op.READ:
                backend.read(job.offset, views)
            else:
                backend.write(job.offset, views, durable=job.durable)
