"""A host for one provider, whose time is the test's."""

import heapq
import select
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any

from vmbus.bus.loopback import LoopbackBus
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.server import ServerChannel
from vmbus.kmcl.states import ChannelState
from vmbus.watches import Watches


class VirtualTimer:
    """A scheduled call. `due` is in virtual seconds."""

    __slots__ = ("call", "due")

    def __init__(self, due: float, call: Callable[[], None]) -> None:
        self.due = due
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Do not call."""
        self.call = None


class Clock:
    """Virtual time in seconds; it outlives hosts, as real time outlives processes."""

    def __init__(self) -> None:
        self.now = 0.0


class FakeHost:
    """Implements `vmbus.providers.base.Host`. Nothing is called by itself: the kit asks for it."""

    def __init__(self, clock: Clock, bus: LoopbackBus) -> None:
        self.clock = clock
        self._bus = bus
        self._clients: list[ClientChannel] = []
        self._soon: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, VirtualTimer]] = []
        self._order = count()
        self._watches = Watches()
        self._jobs: deque[tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]]] = deque()
        self.active = False

    # ---- what providers call -----------------------------------------------------------------------------------

    def add_channel(self, channel: ServerChannel) -> None:
        """Tie a disabled channel to the device; `enable` then offers it."""
        self._bus.offer(channel)

    def add_client(self, channel: ClientChannel) -> None:
        """Tie a disabled client channel to the loopback offers; `enable` then opens the one that fits."""
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

    def run_blocking(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        """Do the work in a turn of its own, on this thread, and call `done`."""
        self._jobs.append((work, done))

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

    @property
    def watched(self) -> list[int]:
        """Descriptors that the provider watches."""
        return self._watches.descriptors

    def run_soon(self) -> None:
        """Make the calls that are due, those that they ask for excepted: of `call_soon`, then descriptors, then one
        piece of work."""
        for _ in range(len(self._soon)):
            if self._soon:
                self._soon.popleft()()
        if self.active and self._watches:
            self._watches.poll()
        if self._jobs:
            work, done = self._jobs.popleft()
            result, error = None, None
            try:
                result = work()
            except Exception as raised:
                error = raised
            done(result, error)

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
        call()

    def abandon(self) -> None:
        """The process has ended: nothing that was scheduled is called any more."""
        self.active = False
        self._soon.clear()
        self._timers.clear()
        self._jobs.clear()
        self._watches.close()
        self._watches = Watches()
        for client in self._clients:
            if client.state is not ChannelState.DISABLED:
                self._bus.drop(client)
        self._clients.clear()
