"""What an operation has found, and what has to hold after any of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from vmbus.errors import Code, code_of
from vmbus.operations.machine import VirtualMachine
from vmbus.operations.save import SaveReport
from vmbus.soak.books import Fault
from vmbus.soak.records import Count, Outcome
from vmbus.soak.stage import Stage, Subject
from vmbus.vm.errors import SaveFailed

T = TypeVar("T")

LIVE_TRIES = 5


class Figures(msgspec.Struct, kw_only=True):
    """What an operation found: see the fields of `vmbus.soak.records.OperationRecord`."""

    outcome: Outcome = "done"
    downtime: float | None = None
    save_seconds: float | None = None
    restore_seconds: float | None = None
    memory_bytes: int | None = None
    state_bytes: int | None = None
    packets: Count | None = None
    """None: what was in flight right before the operation."""
    message: str = ""


def figures_of(report: SaveReport) -> Figures:
    """Those of a save."""
    return Figures(
        downtime=report.downtime,
        save_seconds=report.total,
        memory_bytes=report.ram_bytes,
        state_bytes=report.state_bytes,
        packets={**report.packets, "held": report.incoming_held},
    )


def require_all(saved: Count, vm: VirtualMachine, what: str) -> None:
    """Raises Fault unless every outgoing packet that was in flight is back."""
    assert vm.restored is not None
    wanted = {state: saved[state] for state in ("queued", "sent")}
    if vm.restored.packets != wanted:
        raise Fault(f"{what}: in flight before {wanted}, after {vm.restored.packets}")


async def require_running(subject: Subject, after: str) -> None:
    """Raises Fault unless the VM runs."""
    vm = subject.vm
    if vm.ended:
        raise Fault(f"the VM has ended with {after}, and was to run on")
    if not await vm.monitor.running():
        raise Fault(f"the vCPUs stand after {after}, and were to run on")
    if (phase := (await vm.call_server("status"))["phase"]) != "running":
        raise Fault(f"the device is {phase} after {after}, and was to run on")


async def until_it_converges(stage: Stage, attempt: Callable[[], Awaitable[T]]) -> T:
    """A live copy gives up when the guest takes back, in each of its passes, memory that the device has just written:
    some workloads do that. The VM runs on then, and it is tried again, LIVE_TRIES times. Any other failure is one."""
    for left in reversed(range(LIVE_TRIES)):
        try:
            return await attempt()
        except SaveFailed as error:
            if not (left and error.source_alive and code_of(error) == Code.NOT_CONVERGING):
                raise
            await require_running(stage.here, "a live copy that gave up")
            stage.event(f"tried again: {error}")
            await stage.until_loaded(stage.here, 10, stage.plan.operation_seconds)
    raise AssertionError("no try at all")
