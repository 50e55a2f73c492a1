"""A guest's function whose server is saved and restored, in another server, while the guest's driver waits.

The moments are turns of the guest: calls of `wait_interrupt`, also those inside of calls that wait. So a test driver
that runs on top of it meets a restore wherever it may meet one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vmbus.device import saved
from vmbus.device.description import DeviceDescription
from vmbus.errors import StateError, UsageError
from vmbus.testkit.driver_file import read_driver_file
from vmbus.testkit.loopback.function import LoopbackFunction
from vmbus.testkit.loopback.harness import LoopbackServer
from vmbus.transport.library import Library
from vmbus_guest.testdrivers import FileEntry
from vmbus_guest.testdrivers.context import Context


class Servers:
    """The servers of one test, one after the other; a context manager. `now`: the one that runs."""

    def __init__(
        self, description: DeviceDescription, library: Library, moments: Iterable[int] = (), audit: Path | None = None
    ) -> None:
        """`moments`: turns of the guest in which the device is saved and restored."""
        self._description = description
        self._library = library
        self._audit = audit
        self.moments = sorted(moments)
        self.now = LoopbackServer(description, library, audit=audit)
        self.restores = 0
        self.packets = 0
        """Saved in flight, all restores together."""
        self.put_off = 0
        """Moments in which the device could not be saved, because a channel was being closed: the next turn."""

    def function(self) -> RestoringFunction:
        """Connect a guest."""
        return RestoringFunction(self)

    def move(self, function: LoopbackFunction) -> None:
        """Save the device and restore it in another server."""
        try:
            state = self.now.save()
        except StateError:
            self.put_off += 1
            self.now.command("resume")
            self.moments.insert(0, 0)
            return
        counts = saved.count_packets(state)
        self.packets += counts.queued + counts.sent + counts.completions
        old, self.now = self.now, LoopbackServer(self._description, self._library, restore=state, audit=self._audit)
        function.reconnect(self.now.socket_path, state.config)
        self.now.command("restore-finish")
        old.stop()
        self.restores += 1

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self.now.stop()


class RestoringFunction(LoopbackFunction):
    """See the module's text."""

    def __init__(self, servers: Servers) -> None:
        super().__init__(servers.now.socket_path)
        self._servers = servers
        self.turns = 0

    def wait_interrupt(self, timeout: float) -> bool:
        self.turns += 1
        moments = self._servers.moments
        if moments and self.turns >= moments[0]:
            del moments[0]
            self._servers.move(self)
        return super().wait_interrupt(timeout)


def run_driver(
    file: Path, device: DeviceDescription, library: Library, *, saves: Iterable[int] = (), **parameters: Any
) -> dict[str, Any]:
    """Run a user's test driver against a device server, both in this process, to its end; returns its result.

    `saves`: turns of the driver in which the device is saved and restored in another server. Each has to be reached.
    Raises what the driver raises; UsageError for parameters that it does not take.
    """
    read_driver_file(file)
    with Servers(device, library, saves) as servers:
        wanted = len(servers.moments)
        result = FileEntry(str(file), "").load()(Context(parameters, servers.function))
        if servers.restores < wanted:
            raise UsageError(f"{file.name} has ended after {servers.restores} of {wanted} restores: give it more to do")
    return result
