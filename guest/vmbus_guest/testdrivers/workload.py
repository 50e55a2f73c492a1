"""Running workloads: what all test drivers and services have in common.

A workload drives one channel, or several. Several workloads may share the device (a PCI function has one driver
process), so they have no loop of their own: `run_workloads` connects, opens their channels, pumps, and collects the
results. A test driver ends when its work is done; a service (`vmbus_guest.services`) ends only on request.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import UUID

from vmbus.errors import UsageError
from vmbus.kmcl.client import ClientChannel
from vmbus_guest.driver import VmbusDriver
from vmbus_guest.testdrivers.context import Context, Parameters

LONGEST_STEP = 0.25
"""Seconds after which the loop looks around even if nothing happens."""


class Workload(ABC):
    """A channel (or several) and what is done with it.

    Common parameters: `instance` (UUID of the channel's instance; default: the first of the type), `ring_pages_in`,
    `ring_pages_out` (data pages of 4096 bytes), `stall_seconds` (without any progress for so long the run is given
    up, and what is outstanding counts as lost).
    """

    name: str
    interface_type: UUID
    lasting = False
    """Whether it goes on until it is stopped."""

    def __init__(self, parameters: Parameters) -> None:
        instance = parameters.get("instance", "")
        try:
            self._instance = UUID(instance) if instance else None
        except ValueError:
            raise UsageError(f"parameter 'instance' is not a UUID: '{instance}'") from None
        self._pages_in = parameters.get("ring_pages_in", 16, minimum=1, maximum=1024)
        self._pages_out = parameters.get("ring_pages_out", 16, minimum=1, maximum=1024)
        self.stall_seconds = parameters.get("stall_seconds", 30.0, minimum=0.1)
        self.started_at = 0.0
        self.ended_at = 0.0
        self.moved_at = 0.0
        """When there last was progress; the workload keeps it."""
        self.trouble: list[str] = []
        """What went wrong, in words."""

    def open(self, driver: VmbusDriver) -> None:
        """Open the channel and take memory."""
        self.driver = driver
        self.channel: ClientChannel = driver.client_channel(
            self.interface_type,
            instance=self._instance,
            ring_pages_in=self._pages_in,
            ring_pages_out=self._pages_out,
            name=self.name,
        )
        self.prepare()
        driver.enable(self.channel)

    def prepare(self) -> None:  # noqa: B027 - most have nothing to prepare
        """Set the channel's callbacks, before it is enabled."""

    @abstractmethod
    def begin(self) -> None:
        """Start the work; the channel is active."""

    @abstractmethod
    def finished(self) -> bool:
        """Whether all the work is done."""

    @abstractmethod
    def stop(self) -> None:
        """End early: begin nothing new."""

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

    def trouble_now(self, now: float, driver: VmbusDriver) -> str | None:
        """Why the work cannot go on, None while it can."""
        if not self.channel.active:
            reasons = "; ".join(driver.failures) or "rescinded or closed by the host"
            return f"channel {self.name} is {self.channel.state.value}: {reasons}"
        if now - self.moved_at >= self.stall_seconds:
            return f"no progress on channel {self.name} for {self.stall_seconds:g} s"
        return None

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
        if self.trouble:
            summary["trouble"] = self.trouble
        summary["verdict"] = "passed" if self.good() and not self.trouble else "failed"
        return summary


def run_workload(context: Context, kind: type[Workload]) -> dict[str, Any]:
    """Run one workload with the context's parameters and return its result."""
    workload = kind(context.parameters)
    context.parameters.check()
    return run_workloads(context, [workload])[0]


def run_workloads(context: Context, workloads: Sequence[Workload]) -> list[dict[str, Any]]:
    """Run workloads side by side over one connection to the device; returns their results.

    Raises what opening the device and its channels raises; once the work runs, trouble goes into the results.
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
            workload.begin()
        running = list(workloads)
        passing = not all(workload.lasting for workload in workloads)
        stopping = False
        while running:
            # Services that came along with test drivers end with the last of these.
            alone = passing and all(workload.lasting for workload in running)
            if (context.stop_requested or alone) and not stopping:
                stopping = True
                for workload in running:
                    workload.stop()
            now = time.monotonic()
            until = min(workload.tick(now) for workload in running)
            driver.step(max(0.0, min(until - now, LONGEST_STEP)))
            now = time.monotonic()
            context.look_for_flush(now)
            for workload in list(running):
                if not workload.finished():
                    trouble = workload.trouble_now(now, driver)
                    if trouble is None:
                        continue
                    workload.trouble.append(trouble)
                running.remove(workload)
                workload.ended_at = now
            if context.progress_due:
                context.progress(**_progress(workloads))
        for workload in workloads:
            workload.close()
    return [workload.summary() for workload in workloads]


@contextlib.contextmanager
def _connected(context: Context, workloads: Sequence[Workload]) -> Iterator[VmbusDriver]:
    function = context.open_function()
    try:
        driver = VmbusDriver(function, recorder=context.recorder)
    except BaseException:
        function.close()
        raise
    try:
        yield driver
    except BaseException:
        driver.close(graceful=False)
        raise
    # With transactions outstanding the channels would not close: then only a reset gets the memory back.
    driver.close(graceful=not any(workload.trouble for workload in workloads))


def _progress(workloads: Sequence[Workload]) -> dict[str, Any]:
    if len(workloads) == 1:
        return workloads[0].counts()
    return {"workloads": [{"name": workload.name, **workload.counts()} for workload in workloads]}
