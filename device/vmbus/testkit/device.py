"""One way to test a provider: what a test holds in its hand, whatever is behind it.

    ProviderTest    (kit.py)            the provider alone, in one thread, with virtual time: milliseconds
    LoopbackPair    (loopback/pair.py)  a device server, libvfio-user and a guest's driver in this process
    VmDevice        (vm.py)             a device server, QEMU and a Linux guest

A test that uses nothing but this moves from one to the others by its fixture's name only: docs/pytest.md.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from uuid import UUID, uuid5

from vmbus.device.description import DeviceDescription, ProviderDescription
from vmbus.errors import UsageError
from vmbus.providers import PROVIDERS, Provider
from vmbus.testkit.guest import TIMEOUT, Guest, HostPacket, Pages

RING_PAGES = 4
"""Data pages (4096 bytes) of each ring, unless a test says otherwise."""
_NAMES = UUID("0d5c1c0e-8f3f-4f0e-9a57-1f5f6a8f2b00")


@dataclass(frozen=True)
class InFlight:
    """The device's packets that were in flight at a moment: on their channels, and with the guest."""

    queued: int
    sent: int

    @property
    def any(self) -> bool:
        """Whether there was one."""
        return bool(self.queued or self.sent)


class DeviceUnderTest(ABC):
    """A device with one provider (or several), and the guest's ends of its channels. A context manager.

    Calls that wait let both ends work; what happens between calls is the device's affair. Each wait has a bound, in
    seconds: of virtual time in the kit, of a machine of usual speed else.

    Attributes:
        saves: how often it was saved and restored, or migrated.
    """

    saves: int

    def __enter__(self) -> Self:
        return self

    # ---- the guest -------------------------------------------------------------------------------------------------

    @abstractmethod
    def guest(
        self,
        channel: UUID | None = None,
        *,
        instance: UUID | None = None,
        subchannel: int = 0,
        ring_pages: int = RING_PAGES,
    ) -> Guest:
        """The guest's end of a channel that the device offers, not open yet.

        Args:
            channel: its interface type; None for the only one.
            ring_pages: data pages (4096 bytes) of each ring. Small rings make packets queue.

        Raises UsageError when None is not enough.
        """

    def open(
        self,
        channel: UUID | None = None,
        *,
        instance: UUID | None = None,
        subchannel: int = 0,
        ring_pages: int = RING_PAGES,
        answer: Callable[[HostPacket], bytes | None] | None = None,
    ) -> Guest:
        """Open a channel as a guest does. Arguments as for `guest`; `answer` as in `Guest`.

        Raises WaitTimeout if it is not offered, PeerError if it is refused (in the kit, what the provider raised).
        """
        guest = self.guest(channel, instance=instance, subchannel=subchannel, ring_pages=ring_pages)
        if answer is not None:
            guest.answer = answer
        guest.open()
        return guest

    # ---- time ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def wait_until(self, condition: Callable[[], bool], timeout: float = TIMEOUT, what: str = "a condition") -> None:
        """Let both ends work until `condition()` holds. Raises WaitTimeout naming `what`."""

    @abstractmethod
    def advance(self, seconds: float) -> None:
        """Let so much time pass, while both ends work."""

    # ---- the host --------------------------------------------------------------------------------------------------

    @abstractmethod
    def command(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        """A tool's command to the provider, and its answer. Raises what the provider raises."""

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """The provider's own status."""

    @abstractmethod
    def in_flight(self) -> InFlight:
        """The device's packets in flight now."""

    @abstractmethod
    def save_restore(self) -> InFlight:
        """Save the device and restore it in a fresh process (in the kit, a fresh object), as when a VM is saved and
        restored. Guest memory and everything in flight stay. Returns what was in flight."""

    @abstractmethod
    def migrate(self) -> InFlight:
        """Move the device to another host's process, as in a live migration: its providers' files stay where they are.
        Returns what was in flight. Raises when a provider has files that only a snapshot could carry."""

    # ---- for guests ------------------------------------------------------------------------------------------------

    @abstractmethod
    def allocate(self, size: int) -> Pages:
        """Guest memory; tests use `Guest.memory`."""

    def step(self, what: str) -> None:  # noqa: B027 - most do not count them
        """A step of the test is done."""

    def waiting_for(self) -> str:
        """What may still happen, as the end of a message."""
        return ""


def describe_provider(
    provider: type[Provider] | str, options: Mapping[str, Any] | None = None, *, kind: str = ""
) -> DeviceDescription:
    """A device with one provider, named as its kind is. `kind`: what a server finds it by, if not that."""
    own = provider if isinstance(provider, str) else provider.kind
    name = own.rpartition(":")[2].lower().replace("_", "-")
    instance = str(uuid5(_NAMES, name))
    return DeviceDescription("vmbus0", [ProviderDescription(kind or own, name, instance, dict(options or {}))])


def sole_provider(description: DeviceDescription) -> str:
    """The name of a device's provider. Raises UsageError when it has several."""
    names = [one.name for one in description.providers]
    if len(names) > 1:
        raise UsageError(f"this device has several providers, {', '.join(names)}: which is meant?")
    return names[0]


def importable(provider: type[Provider]) -> tuple[str, Path | None]:
    """By what another process finds a class: a kind of ours, or `module:Class` and the directory of that module.

    Raises UsageError for one that it could not import.
    """
    if PROVIDERS.get(provider.kind) is provider:
        return provider.kind, None
    file = getattr(sys.modules[provider.__module__], "__file__", None)
    if file is None or "." in provider.__qualname__:
        raise UsageError(
            f"provider {provider.__qualname__} is not at the top of a module: a VM's server cannot import it"
        )
    root = Path(file).resolve().parents[provider.__module__.count(".")]
    return f"{provider.__module__}:{provider.__qualname__}", root
