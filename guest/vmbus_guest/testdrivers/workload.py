"""Running workloads: what all test drivers with channels have in common.

A workload drives one channel. Several may share the device (a PCI function has one driver process), so they have no
loop of their own: `run_workloads` connects, opens a channel for each, pumps, and collects the results.
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
    """One channel and what is done with it.

    Common parameters: `instance` (UUID of the channel's instance; default: the first of the type), `ring_pages_in`,
    `ring_pages_out` (data pages of 4096 bytes), `stall_seconds` (without any progress for so long the run is given
    up, and what is outstanding counts as lost).
    """

    name: str
    interface_type: UUID

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
        for workload in workloads:
            workload.open(driver)
        now = time.monotonic()
        for workload in workloads:
            workload.started_at = workload.moved_at = workload.ended_at = now
        for workload in workloads:
            workload.begin()
        running = list(workloads)
        stopping = False
        while running:
            if context.stop_requested and not stopping:
                stopping = True
                for workload in running:
                    workload.stop()
            now = time.monotonic()
            until = min(workload.tick(now) for workload in running)
            driver.step(max(0.0, min(until - now, LONGEST_STEP)))
            now = time.monotonic()
            context.look_for_flush(now)
            for workload in list(running):
                if workload.finished():
                    running.remove(workload)
                elif workload.channel.active and now - workload.moved_at < workload.stall_seconds:
                    continue
                else:
                    running.remove(workload)
                    workload.trouble.append(_trouble(workload, driver))
                workload.ended_at = now
            if context.progress_due:
                context.progress(**_progress(workloads))
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


def _trouble(workload: Workload, driver: VmbusDriver) -> str:
    if not workload.channel.active:
        reasons = "; ".join(driver.failures) or "rescinded or closed by the host"
        return f"channel {workload.name} is {workload.channel.state.value}: {reasons}"
    return f"no progress on channel {workload.name} for {workload.stall_seconds:g} s"


def _progress(workloads: Sequence[Workload]) -> dict[str, Any]:
    if len(workloads) == 1:
        return workloads[0].counts()
    return {"workloads": [{"name": workload.name, **workload.counts()} for workload in workloads]}
