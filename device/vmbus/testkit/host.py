"""A host for one provider, whose time is the test's."""

import heapq
import select
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from vmbus.bus.connects import ConnectDesk, Wish
from vmbus.bus.local import LocalBus
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.server import ServerChannel
from vmbus.providers.base import MOST_WORK, WorkQueueFull
from vmbus.providers.faults import Faults, fail_held, naming
from vmbus.util.watches import Watches
from vmbus.wire.messages import ConnectResult


class VirtualTimer:
    """A scheduled call. `due` is in virtual seconds."""

    __slots__ = ("call", "due")

    def __init__(self, due: float, call: Callable[[], None]) -> None:
        self.due = due
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Do not call."""
        self.call = None


class FakeWork:
    """Work that was given to `run_blocking`."""

    __slots__ = ("_host", "done", "work")

    def __init__(
        self, host: "FakeHost", work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]
    ) -> None:
        self._host = host
        self.work = work
        self.done = done

    def cancel(self) -> bool:
        """Take it back, if its turn has not come."""
        return self._host.take_back(self)


class Clock:
    """Virtual time in seconds; it outlives hosts, as real time outlives processes."""

    def __init__(self) -> None:
        self.now = 0.0


class FakeHost:
    """Implements `vmbus.providers.base.Host`. Nothing is called by itself: the kit asks for it.

    `faults`: what the provider's callbacks have raised. `connects`: for the guest's requests for channels, `refusals`:
    what it was told of them.
    """

    def __init__(self, clock: Clock, bus: LocalBus, name: str = "", run_directory: Path | None = None) -> None:
        self.clock = clock
        self.run_directory = run_directory
        self.refusals: list[ConnectResult] = []
        self.connects = ConnectDesk(self.refusals.append)
        self.faults = Faults(name)
        self.faults.on_raised = lambda cause: fail_held((*self._bus.offers, *self._clients), cause)
        self._bus = bus
        self._clients: list[ClientChannel] = []
        self._soon: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, VirtualTimer]] = []
        self._order = count()
        self._watches = Watches(self.faults.raised)
        self._jobs: OrderedDict[FakeWork, None] = OrderedDict()
        self.active = False

    def _call(self, what: str, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            self.faults.raised(naming(what, call), error)

    # ---- what providers call -----------------------------------------------------------------------------------

    def add_channel(self, channel: ServerChannel) -> None:
        """Tie a disabled channel to the device; `enable` then offers it."""
        channel.on_owner_error = self.faults.seen
        self._bus.offer(channel)

    def remove_channel(self, channel: ServerChannel, gone: Callable[[], None] | None = None) -> None:
        """Take a channel back for good; the guests of this kit release it at once."""
        if channel.state is not ChannelState.DISABLED:
            self._bus.disabled(channel)
            channel.disable(0)
        if gone is not None:
            self.call_soon(gone)

    def serve_connects(self, asked: Callable[[Wish], bool]) -> None:
        """Be asked about the guest's requests for channels: `connects`."""
        self.connects.serve(asked)

    def add_client(self, channel: ClientChannel) -> None:
        """Tie a disabled client channel to the local offers; `enable` then opens the one that fits."""
        channel.on_owner_error = self.faults.seen
        self._bus.attach(channel)
        self._clients.append(channel)

    def call_soon(self, call: Callable[[], None]) -> None:
        """Call in the next turn."""
        self._soon.append(call)

    def call_later(self, seconds: float, call: Callable[[], None]) -> VirtualTimer:
        """Call when `seconds` of virtual time have passed."""
        timer = VirtualTimer(self.clock.now + max(0.0, seconds), call)
        heapq.heappush(self._timers, (timer.due, next(self._order), timer))
        return timer

    def add_reader(self, fd: int, call: Callable[[], None]) -> None:
        """Call in a turn in which `fd` is readable."""
        self._watches.add_reader(fd, call)

    def remove_reader(self, fd: int) -> bool:
        """End that; returns whether there was a call."""
        return self._watches.remove_reader(fd)

    def add_writer(self, fd: int, call: Callable[[], None]) -> None:
        """Call in a turn in which `fd` can be written to."""
        self._watches.add_writer(fd, call)

    def remove_writer(self, fd: int) -> bool:
        """End that; returns whether there was a call."""
        return self._watches.remove_writer(fd)

    def run_blocking(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> FakeWork:
        """Do the work in a turn of its own, on this thread, and call `done`."""
        if len(self._jobs) >= MOST_WORK:
            raise WorkQueueFull(f"provider {self.faults.name!r}: {MOST_WORK} pieces of work wait for a thread already")
        job = FakeWork(self, work, done)
        self._jobs[job] = None
        return job

    # ---- what the kit calls --------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a call is due in this turn."""
        return bool(self._soon or self._jobs) or self._ready

    @property
    def _ready(self) -> bool:
        if not self.active or not self._watches:
            return False
        poller = select.poll()
        poller.register(self._watches.fileno(), select.POLLIN)
        return bool(poller.poll(0))

    @property
    def jobs(self) -> int:
        """Pieces of work that were not done yet."""
        return len(self._jobs)

    def take_back(self, job: FakeWork) -> bool:
        """Forget a piece of work that was not done; whether there was one."""
        return job in self._jobs and self._jobs.pop(job) is None

    @property
    def watched(self) -> list[int]:
        """Descriptors that the provider watches."""
        return self._watches.descriptors

    def run_soon(self) -> None:
        """Make the calls that are due, those that they ask for excepted: of `call_soon`, then descriptors, then one
        piece of work."""
        for _ in range(len(self._soon)):
            if self._soon:
                self._call("a call of call_soon", self._soon.popleft())
        if self.active and self._watches:
            self._watches.poll()
        if self._jobs:
            job, _ = self._jobs.popitem(last=False)
            result, error = None, None
            try:
                result = job.work()
            except Exception as raised:
                error = raised
            self._call("done of run_blocking", job.done, result, error)

    def next_due(self) -> float | None:
        """When the next timer runs out, None without timers."""
        while self._timers and self._timers[0][2].call is None:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def fire_next(self) -> None:
        """Time goes on until the next timer runs out, and it is called."""
        due = self.next_due()
        assert due is not None
        _, _, timer = heapq.heappop(self._timers)
        self.clock.now = max(self.clock.now, due)
        call, timer.call = timer.call, None
        assert call is not None
        self._call("a scheduled call", call)

    def abandon(self) -> None:
        """The process has ended: nothing that was scheduled is called any more."""
        self.active = False
        self._soon.clear()
        self._timers.clear()
        self._jobs.clear()
        self._watches.close()
        self._watches = Watches(self.faults.raised)
        for client in self._clients:
            if client.state is not ChannelState.DISABLED:
                self._bus.drop(client)
        self._clients.clear()
