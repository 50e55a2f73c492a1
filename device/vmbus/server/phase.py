"""What a device server does at the moment, and what leads from there to where: for commands, and for a client that
migrates the device itself (`vmbus.server.driven`)."""

from __future__ import annotations

from enum import Enum

from vmbus.errors import UsageError


class Phase(Enum):
    """One at a time. Commands say which they need."""

    RUNNING = "running"
    PAUSING = "pausing"
    """Channels are held, and providers complete what they have."""
    PAUSED = "paused"
    """The device can be saved."""
    AWAITING = "awaiting"
    """Started without a state, which `load` or the client brings."""
    RESTORING = "restoring"
    """The state is there; QEMU loads the guest and puts the PCI function back."""
    DRIVEN = "driven"
    """Stopped by the client, which migrates the device through the protocol."""


class Step(Enum):
    PAUSE = "pause"
    REST = "the providers are at rest"
    RUN = "resume"
    LOAD = "load"
    RESTORE = "restore-finish"
    RESTORE_FROZEN = "restore-finish, frozen"
    DRIVE = "the client stops the device"
    KEEP = "the client has gone, and the device may live elsewhere, or cannot run on"
    AWAIT = "the client has gone, or failed, and there is no state yet"


NEXT: dict[Step, dict[Phase, Phase]] = {
    Step.PAUSE: {Phase.RUNNING: Phase.PAUSING},
    Step.REST: {Phase.PAUSING: Phase.PAUSED},
    # From `running`: what was begun there, and failed before it led anywhere else.
    Step.RUN: dict.fromkeys((Phase.PAUSING, Phase.PAUSED, Phase.DRIVEN, Phase.RUNNING), Phase.RUNNING),
    Step.LOAD: dict.fromkeys((Phase.AWAITING, Phase.PAUSED, Phase.RUNNING), Phase.RESTORING),
    Step.RESTORE: {Phase.RESTORING: Phase.RUNNING},
    Step.RESTORE_FROZEN: {Phase.RESTORING: Phase.PAUSED},
    Step.DRIVE: dict.fromkeys((Phase.RUNNING, Phase.AWAITING), Phase.DRIVEN),
    Step.KEEP: {Phase.DRIVEN: Phase.PAUSED},
    Step.AWAIT: {Phase.DRIVEN: Phase.AWAITING},
}
"""The phases in which a step may be, and where it leads."""

WORKING = frozenset({Phase.RUNNING, Phase.PAUSING})
"""In these, providers work: their timers run out, and their local channels move."""


def after(phase: Phase, step: Step) -> Phase:
    """Where a step leads. Raises KeyError for one that cannot be: a defect of ours."""
    return NEXT[step][phase]


def require(phase: Phase, wanted: tuple[Phase, ...], what: str) -> None:
    """Raises UsageError for a command in another phase than those that it needs."""
    if phase not in wanted:
        phases = " or ".join(one.value for one in wanted)
        raise UsageError(f"{what} needs a server that is {phases}; this one is {phase.value}")
