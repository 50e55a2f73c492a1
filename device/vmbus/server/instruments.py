"""What looks at a server's device without the server knowing it: audit records, captures, inspections.

They are plugged in by the process's entry (`vmbus.cli.serve`): see `vmbus.observe.instruments`.
"""

from __future__ import annotations

from collections.abc import Mapping

from vmbus.device.observing import DeviceObserver
from vmbus.server.commands import Command


class Instrument:
    """One of them, for one server. Called on the event loop."""

    commands: Mapping[str, Command]
    """What tools may ask of it."""

    def observer(self, name: str) -> DeviceObserver | None:
        """For the device of a session that begins, called `name`. None: it looks at none yet."""
        return None

    def close(self) -> None:
        """The server has ended."""
