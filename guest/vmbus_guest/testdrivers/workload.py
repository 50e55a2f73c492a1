"""Running workloads: what all test drivers have in common.

A workload drives one channel, or several. Several workloads may share the device (a PCI function has one driver
process), so they have no loop of their own: `run_workloads` connects, opens their channels, pumps, and collects the
results. Each ends when its work is done.
"""

from __future__ import annotations

import contextlib
import functools
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from uuid import UUID

from vmbus.errors import EnvironmentProblem, UsageError, VmbusError
from vmbus.kmcl.client import ClientChannel
from vmbus.wire.workload import Sequence, Tally
from vmbus_guest.channel_driver import LONGEST_TURN, ChannelDriver
from vmbus_guest.testdrivers.context import ACCESS, Context, Parameters

Result = TypeVar("Result")

LONGEST_STEP = 0.25
"""Seconds after which the loop looks around even if nothing happens."""


class Workload(ABC):
    """A channel (or several) and what is done with it.

    Parameters that all of them have: `vmbus_guest.testdrivers.describe.COMMON`. They are read in `__init__`, with
    `parameters.get`; wrong ones are refused there, before anything is opened.
    """

    name: str
    interface_type: UUID
    provider = ""
    """The kind of provider that it needs, for messages; `interface_type` decides."""
    default_pages = 16
    """Data pages of each ring."""

    def __init__(self, parameters: Parameters) -> None:
        default = self.default_pages
        instance = parameters.get("instance", "")
        try:
            self._instance = UUID(instance) if instance else None
        except ValueError:
            raise UsageError(f"parameter 'instance' is not a UUID: '{instance}'") from None
        self._pages_in = parameters.get("ring_pages_in", default, minimum=1, maximum=1024)
        self._pages_out = parameters.get("ring_pages_out", default, minimum=1, maximum=1024)
        self.stall_seconds = parameters.get("stall_seconds", 30.0, minimum=0.1)
        self.access = parameters.get("access", "auto")
        if self.access not in ACCESS:
            raise UsageError(f"parameter 'access' is one of {', '.join(ACCESS)}, not '{self.access}'")
        self.function = parameters.get("function", "")
        self.started_at = 0.0
        self.ended_at = 0.0
        self.moved_at = 0.0
        """When there last was progress; the workload keeps it."""
        self.trouble: list[str] = []
        """What went wrong, in words."""
        self._stopped = False
        self.broken = False
        """Whether one of its calls raised: it is not called any more."""

    def open(self, driver: ChannelDriver) -> None:
        """Open the channel and take memory."""
        self.driver = driver
        self._instance = self.claim(driver)
        self.channel: ClientChannel = self.new_channel()
        self.prepare()
        driver.enable(self.channel)

    def claim(self, driver: ChannelDriver) -> UUID:
        """Choose an instance that nobody uses. Raises EnvironmentProblem when there is none of this type."""
        found = driver.claim(self.interface_type, self._instance)
        if found is None:
            raise EnvironmentProblem(
                f"this device offers no channel of the type that test driver '{self.name}' needs"
                + (f": give it a provider of kind '{self.provider}'" if self.provider else "")
            )
        return found

    def new_channel(self, *, subchannel_index: int = 0, name: str = "") -> ClientChannel:
        """A disabled channel of the workload's instance, with rings as the parameters ask for."""
        return self.driver.client_channel(
            self.interface_type,
            instance=self._instance,
            ring_pages_in=self._pages_in,
            ring_pages_out=self._pages_out,
            name=name or self.name,
            subchannel_index=subchannel_index,
        )

    def moved(self) -> None:
        """There was progress."""
        self.moved_at = time.monotonic()

    def prepare(self) -> None:  # noqa: B027 - most have nothing to prepare
        """Set the channel's callbacks, before it is enabled."""

    @abstractmethod
    def begin(self) -> None:
        """Start the work; the channel is active."""

    @abstractmethod
    def finished(self) -> bool:
        """Whether all the work is done."""

    def stop(self) -> None:
        """End early: begin nothing new."""
        self._stopped = True

    @abstractmethod
    def counts(self) -> dict[str, Any]:
        """Where the work is: for progress reports."""

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """The final counts. Without `seconds` and `verdict`, which are added."""

    @abstractmethod
    def good(self) -> bool:
        """Whether the final counts are as they must be."""

    def tick(self, now: float) -> float:
        """Do what is due at `now` (monotonic seconds); returns when to be called again at the latest."""
        return now + LONGEST_STEP

    def trouble_now(self, now: float, driver: ChannelDriver) -> str | None:
        """Why the work cannot go on, None while it can."""
        if not self.channel.active:
            reasons = "; ".join(driver.failures) or "rescinded or closed by the host"
            return f"channel {self.name} is {self.channel.state.value}: {reasons}"
        if now - self.moved_at >= self.stall_seconds:
            reasons = "".join(f"; {failure}" for failure in driver.failures)
            return f"no progress on channel {self.name} for {self.stall_seconds:g} s{reasons}"
        return None

    def clock_jumped(self, seconds: float) -> None:
        """The clock has jumped by so much, in which nothing could happen."""
        self.moved_at += seconds
        self.started_at += seconds

    def rescinded(self, channel: ClientChannel) -> None:  # noqa: B027 - the end of a test driver, by default
        """The host has withdrawn a channel that was open; it is disabled. Not every one of them is this workload's."""

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """The run is over, the device is still there: give up descriptors and memory."""

    @property
    def seconds(self) -> float:
        """Of the work itself, without opening and closing."""
        return self.ended_at - self.started_at

    def summary(self) -> dict[str, Any]:
        """The whole result."""
        summary = self.result()
        summary["seconds"] = round(self.seconds, 4)
        if "completed" in summary and "per_second" not in summary and self.seconds > 0:
            summary["per_second"] = round(summary["completed"] / self.seconds, 1)
        if self.trouble:
            summary["trouble"] = self.trouble
        summary["verdict"] = "passed" if self.good() and not self.trouble else "failed"
        return summary


class CountedWorkload(Workload):
    """So many numbered transactions (`count`; 0: until stopped), each of which is answered once, and in order."""

    default_count = 1000

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._count = parameters.get("count", self.default_count, minimum=0)
        self.tally = Tally()
        self._sequence = Sequence(self.tally)
        self._issued = 0

    def _no_more(self) -> bool:
        return self._stopped or (self._count > 0 and self._issued >= self._count)

    def finished(self) -> bool:
        """All sent, all answered."""
        return self._no_more() and self.tally.completed >= self._issued

    def counts(self) -> dict[str, Any]:
        return {"sent": self._issued, **self.tally.as_dict()}

    def result(self) -> dict[str, Any]:
        """The final counts. What was never answered is lost."""
        self.tally.lost += self._issued - self._sequence.next
        return self.counts()

    def good(self) -> bool:
        """Everything that was sent came back, once, in order, with the right bytes."""
        return self.finished() and self.tally.good and self.tally.completed == self._issued == self._sequence.next


def run_workload(context: Context, kind: type[Workload]) -> dict[str, Any]:
    """Run one workload with the context's parameters and return its result."""
    workload = kind(context.parameters)
    context.parameters.check()
    return run_workloads(context, [workload])[0]


def run_workloads(context: Context, workloads: list[Workload]) -> list[dict[str, Any]]:
    """Run workloads side by side over one connection to the device; returns their results.

    Raises what opening the device and its channels raises; once the work runs, trouble goes into the results. When the
    clock jumps, as it does in a guest that is taken back to a checkpoint, that is no time in which something stalled.
    """
    with _connected(context, workloads) as driver:

        def rescinded(channel: ClientChannel) -> None:
            for workload in workloads:
                workload.rescinded(channel)

        driver.on_rescind = rescinded
        for workload in workloads:
            workload.open(driver)
        now = time.monotonic()
        for workload in workloads:
            workload.started_at = workload.moved_at = workload.ended_at = now
        for workload in workloads:
            _guarded(workload, workload.begin)
        running = list(workloads)
        stopping = False
        looked = time.monotonic()
        while running:
            if context.stop_requested and not stopping:
                stopping = True
                for workload in running:
                    _guarded(workload, workload.stop)
            now = time.monotonic()
            until = min(_guarded(workload, functools.partial(workload.tick, now)) or now for workload in running)
            driver.step(max(0.0, min(until - now, LONGEST_STEP)))
            now = time.monotonic()
            if now - looked > LONGEST_TURN:
                for workload in running:
                    workload.clock_jumped(now - looked - LONGEST_TURN)
            looked = now
            context.look_for_flush(now)
            for workload in list(running):
                if workload.broken or not workload.finished():
                    trouble = None if workload.broken else workload.trouble_now(now, driver)
                    if trouble is not None:
                        workload.trouble.append(trouble)
                    elif not workload.broken:
                        continue
                running.remove(workload)
                workload.ended_at = now
            if context.progress_due:
                context.progress(**_progress(workloads))
        for workload in workloads:
            workload.close()
    return [workload.summary() for workload in workloads]


def _guarded(workload: Workload, call: Callable[[], Result]) -> Result | None:
    """What goes wrong in one workload's own calls ends that one, and no other."""
    if workload.broken:
        return None
    try:
        return call()
    except Exception as error:
        if not isinstance(error, VmbusError):
            traceback.print_exc()
        workload.broken = True
        workload.trouble.append(f"{type(error).__name__}: {error}")
        return None


@contextlib.contextmanager
def _connected(context: Context, workloads: list[Workload]) -> Iterator[ChannelDriver]:
    ways = {(workload.access, workload.function) for workload in workloads}
    if len(ways) > 1:
        raise UsageError(f"workloads that run side by side reach one device in one way, not in {sorted(ways)}")
    ((access, function),) = ways
    driver = context.connect(access, function)
    try:
        yield driver
    except BaseException:
        driver.close(graceful=False)
        raise
    # With transactions outstanding the channels would not close: then only a reset gets the memory back.
    driver.close(graceful=not any(workload.trouble for workload in workloads))


def _progress(workloads: list[Workload]) -> dict[str, Any]:
    if len(workloads) == 1:
        return workloads[0].counts()
    return {"workloads": [{"name": workload.name, **workload.counts()} for workload in workloads]}
