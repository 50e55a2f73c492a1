"""What a device server does at the moment; see `vmbus.server.app` for what leads from one phase to the next."""

from enum import Enum


class Phase(Enum):
    """One at a time. Commands say which they need."""

    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    AWAITING = "awaiting"
    RESTORING = "restoring"
    DRIVEN = "driven"
    """Stopped by the client, which migrates the device through the protocol: see `vmbus.server.driven`."""
