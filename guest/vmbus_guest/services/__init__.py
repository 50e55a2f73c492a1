"""The catalogue of services: the guest's ends of devices that people use.

A service is a workload (`vmbus_guest.testdrivers.workload`) that ends only on request, so that several of them, and
test drivers beside them, share the one process that a PCI function has. `vmbus_guest.services.run` runs them; the agent
starts those that the kernel's command line names (`vmbus.services=one,another`). This module stays light: the agent
imports it at boot; the services themselves are imported where they run.
"""

from __future__ import annotations

TYPE_CHECKING = False  # without `typing`, which costs a tenth of a second under TCG
if TYPE_CHECKING:
    from vmbus_guest.services.service import Service

CMDLINE_WORD = "vmbus.services="


class Entry:
    """One service of the catalogue."""

    __slots__ = ("kind", "module", "summary")

    def __init__(self, module: str, kind: str, summary: str) -> None:
        self.module = module
        self.kind = kind
        self.summary = summary

    def load(self) -> type[Service]:
        """Import the service's module and return its class."""
        found: type[Service] = getattr(__import__(self.module, fromlist=[self.kind]), self.kind)
        return found


CATALOGUE: dict[str, Entry] = {
    "integration": Entry(
        "vmbus_guest.services.integration",
        "IntegrationService",
        "answers heartbeats, sets the clock, powers off on request, exchanges keys and values",
    ),
}
"""By name."""


def wanted_services(command_line: str) -> list[str]:
    """The names that a kernel command line asks for, in order, each once; whether they exist is not looked at."""
    names: dict[str, None] = {}
    for word in command_line.split():
        if word.startswith(CMDLINE_WORD):
            names.update(dict.fromkeys(name for name in word[len(CMDLINE_WORD) :].split(",") if name))
    return list(names)
