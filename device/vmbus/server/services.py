"""What providers ask of the server beside channels and timers: descriptors to be watched, and work that blocks.

Like the timers, both are kept by us, and not by the event loop: so that they also go on inside a blocking wait.
"""

from __future__ import annotations

import asyncio
import os
import select
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from vmbus.errors import UsageError, WaitTimeout
from vmbus.providers.base import MOST_WORK, Bound, WorkQueueFull
from vmbus.providers.faults import Faults, naming
from vmbus.server.turns import Turns
from vmbus.util.complaints import bounded_log
from vmbus.util.watches import Watches

log = bounded_log(__name__)

Done = Callable[[Any, BaseException | None], None]

THREADS = 8
"""Most pieces of one provider's work that are done at the same time."""


class Services:
    """Of one device: the one descriptor behind which everything below is ready. `close` ends it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, turns: Turns | None = None) -> None:
        self._loop = loop
        self.turns = turns or Turns()
        self._watches = Watches()
        self._lock = threading.Lock()
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closed = False
        self._finished: deque[_Job | _Carried] = deque()
        self._owners: list[ProviderServices] = []
        self._watching: list[ProviderServices] = []
        self._frozen = False
        self._idle: list[tuple[asyncio.Future[None], ProviderServices | None]] = []
        self._watches.add_reader(self._event, self._take_finished)
        loop.add_reader(self._watches.fileno(), self.run_ready)

    def fileno(self) -> int:
        """Readable while there is something to do for `run_ready`."""
        return self._watches.fileno()

    def run_ready(self) -> bool:
        """Make the calls for descriptors that are ready and for work that has ended. Returns whether there was any."""
        return not self._closed and self._watches.poll()

    @property
    def busy(self) -> dict[str, int]:
        """Pieces of work under way, by provider, those whose end was not told yet included."""
        return {owner.name: owner.jobs for owner in self._owners if owner.jobs}

    async def idle(self, seconds: float, owner: ProviderServices | None = None) -> None:
        """Return when no work is under way, of one owner or of all. Raises WaitTimeout naming whose it is."""
        if not (self.busy if owner is None else owner.jobs):
            return
        entry = (self._loop.create_future(), owner)
        self._idle.append(entry)
        try:
            await asyncio.wait_for(entry[0], max(seconds, 0.0))
        except TimeoutError:
            raise WaitTimeout(f"work that providers have done on other threads to end {self.busy}", seconds) from None
        finally:
            self._idle.remove(entry)

    def finish(self, seconds: float) -> bool:
        """Give up work that was not begun, and block until what was has ended. Returns whether it has, in time."""
        for owner in self._owners:
            owner.drop_waiting()
        deadline = time.monotonic() + seconds
        poller = select.poll()
        poller.register(self._event, select.POLLIN)
        while self.busy:
            left = deadline - time.monotonic()
            if left <= 0:
                log.error("work of providers has not ended after %g s: %s", seconds, self.busy)
                return False
            poller.poll(1000 * left + 1)
            self._take_finished()
        return True

    def close(self) -> None:
        """Watch nothing and call nothing any more. Threads that still work end when their work does."""
        if self._closed:
            return
        for owner in list(self._owners):
            owner.release()
        self._loop.remove_reader(self._watches.fileno())
        with self._lock:
            self._closed = True
            self._watches.close()
            os.close(self._event)

    def call_from_thread(self, call: Callable[[], None]) -> None:
        """Have a call made on the loop, soon; from any thread. Dropped once this is closed."""
        self.finished(_Carried(call))

    # ---- for ProviderServices ------------------------------------------------------------------------------------

    def join(self, owner: ProviderServices) -> None:
        self._owners.append(owner)

    def leave(self, owner: ProviderServices) -> None:
        if owner in self._owners:
            self._owners.remove(owner)
        self.look_idle()

    def watch(self, owner: ProviderServices, wanted: bool) -> None:
        if wanted:
            self._watching.append(owner)
        else:
            self._watching.remove(owner)
        if not self._frozen:
            self._look(owner, wanted)

    def _look(self, owner: ProviderServices, wanted: bool) -> None:
        if wanted:
            self._watches.add_reader(owner.watches.fileno(), owner.poll)
        else:
            self._watches.remove_reader(owner.watches.fileno())

    def freeze(self) -> None:
        """Look at no provider's descriptors until `thaw`. Repeating it does nothing."""
        if not self._frozen:
            for owner in self._watching:
                self._look(owner, False)
        self._frozen = True

    def thaw(self) -> None:
        """End `freeze`. Repeating it does nothing."""
        if self._frozen:
            for owner in self._watching:
                self._look(owner, True)
        self._frozen = False

    def finished(self, job: _Job | _Carried) -> None:
        """Called on the thread that did the work."""
        self._finished.append(job)
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._event, 1)

    def _take_finished(self) -> None:
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return
        for _ in range(len(self._finished)):
            if not self._finished:
                break  # a call waited inside, and took the rest
            job = self._finished.popleft()
            self.turns.run(job.what, job.tell)
        if self._finished:
            with self._lock:
                os.eventfd_write(self._event, 1)
        self.look_idle()

    def look_idle(self) -> None:
        """Tell those who wait for work to end, if it has."""
        for waiter, owner in self._idle:
            if not (self.busy if owner is None else owner.jobs) and not waiter.done():
                waiter.set_result(None)


class _Carried:
    """A call that another thread wants to be made on the loop."""

    __slots__ = ("tell",)
    what = "a call from another thread"

    def __init__(self, call: Callable[[], None]) -> None:
        self.tell = call


class _Job:
    """One piece of work: implements `vmbus.providers.base.Work`."""

    __slots__ = ("done", "error", "owner", "result", "work")

    def __init__(self, owner: ProviderServices, work: Callable[[], Any], done: Done) -> None:
        self.owner = owner
        self.work: Callable[[], Any] | None = work
        self.done = done
        self.result: Any = None
        self.error: BaseException | None = None

    @property
    def what(self) -> str:
        return f"end of work of {self.owner.name}"

    def cancel(self) -> bool:
        """Take it back, if it was not begun; whether that is so."""
        return self.owner.take_back(self)

    def run(self) -> None:
        """On a thread."""
        work, self.work = self.work, None
        assert work is not None
        try:
            self.result = work()
        except BaseException as error:  # whatever it is, its owner must hear of it
            self.error = error

    def tell(self) -> None:
        """On the loop."""
        owner = self.owner
        try:
            if not owner.released:
                self.done(self.result, self.error)
        except Exception as error:
            owner.faults.raised(naming("done of run_blocking", self.done), error)
        finally:
            owner.jobs -= 1


class ProviderServices:
    """One provider's share: implements this part of `vmbus.providers.Host`.

    Descriptors are looked at only while the provider is active (`active`), between `Provider.activate` and
    `Provider.deactivate`: input from outside that comes after a save would be lost with the process.
    """

    def __init__(self, services: Services, name: str) -> None:
        self._services = services
        self.name = name
        self.faults = Faults(name)
        self.watches = Watches(self.faults.raised)
        self.jobs = 0
        self.refused = 0
        self.released = False
        self._active = False
        self._threads = 0
        # Guarded by the condition, which the threads wait for.
        self._waiting: OrderedDict[_Job, None] = OrderedDict()
        self._work = threading.Condition()
        services.join(self)

    # ---- what providers call ---------------------------------------------------------------------------------------

    def add_reader(self, fd: int, call: Callable[[], None]) -> None:
        """Call from the event loop while `fd` is readable."""
        self.watches.add_reader(fd, call)

    def remove_reader(self, fd: int) -> bool:
        """Do not call any more; returns whether there was a call."""
        return not self.released and self.watches.remove_reader(fd)

    def add_writer(self, fd: int, call: Callable[[], None]) -> None:
        """Call from the event loop while `fd` can be written to."""
        self.watches.add_writer(fd, call)

    def remove_writer(self, fd: int) -> bool:
        """Do not call any more; returns whether there was a call."""
        return not self.released and self.watches.remove_writer(fd)

    def run_blocking(self, work: Callable[[], Any], done: Done) -> _Job:
        """Do `work` on another thread, then call `done(result, error)` from the event loop."""
        if self.released:
            raise UsageError(f"provider {self.name!r} is gone: it has no work done any more")
        job = _Job(self, work, done)
        with self._work:
            if len(self._waiting) >= MOST_WORK:
                self.refused += 1
                raise WorkQueueFull(f"provider {self.name!r}: {MOST_WORK} pieces of work wait for a thread already")
            self._waiting[job] = None
            self._work.notify()
        self.jobs += 1
        if self._threads < min(self.jobs, THREADS):
            self._threads += 1
            # Daemons: work that hangs in the kernel must not keep a server that ends from ending.
            threading.Thread(target=self._serve, name=f"{self.name}-work-{self._threads}", daemon=True).start()
        return job

    # ---- what the server calls -------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        return self._active

    @active.setter
    def active(self, active: bool) -> None:
        if active is not self._active and not self.released:
            self._active = active
            self._services.watch(self, active)

    def poll(self) -> None:
        """Make the calls for what is ready now."""
        if not self.released:
            self._services.turns.run(f"descriptors of {self.name}", self.watches.poll)

    @property
    def waiting(self) -> int:
        """Pieces of work that were not begun."""
        return len(self._waiting)

    def bounds(self) -> dict[str, Bound]:
        return {"work that waits": Bound(self.waiting, MOST_WORK, self.refused)}

    def take_back(self, job: _Job) -> bool:
        """Forget a piece of work that was not begun; nobody is told. Returns whether that was so."""
        with self._work:
            if job not in self._waiting:
                return False
            del self._waiting[job]
        self.jobs -= 1
        self._services.look_idle()
        return True

    def drop_waiting(self) -> None:
        """Forget all work that was not begun; nobody is told."""
        with self._work:
            self.jobs -= len(self._waiting)
            self._waiting.clear()

    def release(self) -> None:
        """The provider is stopped: watch nothing for it, and tell it nothing any more. Repeating it does nothing."""
        if self.released:
            return
        self.active = False
        self.released = True
        self.drop_waiting()
        with self._work:
            self._work.notify_all()
        self.watches.close()
        self._services.leave(self)

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            job.run()
            self._services.finished(job)
            del job  # or what the work holds would live until the next one

    def _next(self) -> _Job | None:
        with self._work:
            self._work.wait_for(lambda: self._waiting or self.released)
            return self._waiting.popitem(last=False)[0] if self._waiting else None
