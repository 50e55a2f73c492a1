"""What every provider has, and what it may ask of its host."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol
from uuid import UUID

import msgspec

from vmbus.description import explain
from vmbus.errors import StateError, UsageError
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.server import ServerChannel


class Timer(Protocol):
    """A call that has been scheduled."""

    def cancel(self) -> None:
        """Do not call."""


class Host(Protocol):
    """What a provider may ask of the device server. Calls come back on the provider's own thread, the event loop."""

    def add_channel(self, channel: ServerChannel) -> None:
        """Tie a disabled channel to the device; `enable` then offers it."""

    def add_client(self, channel: ClientChannel) -> None:
        """Tie a disabled client channel to the loopback offers of this device's providers; `enable` then opens it."""

    def call_soon(self, call: Callable[[], None]) -> None:
        """Call from the event loop, soon."""

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Call from the event loop after `seconds`."""


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For providers without settings."""


class Provider(ABC):
    """One provider of a device.

    Class attributes:
        kind: how descriptions name it.
        Options: a msgspec.Struct with its settings; descriptions are checked against it.
    """

    kind: ClassVar[str]
    Options: ClassVar[type[msgspec.Struct]] = NoOptions

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        """Raises UsageError naming the option that is wrong."""
        self.host = host
        self.name = name
        self.instance = instance
        try:
            self.options: Any = msgspec.convert(dict(options), self.Options)
        except msgspec.ValidationError as error:
            raise UsageError(f"options of provider {name!r} ({self.kind}): {explain(error)}") from error

    @abstractmethod
    def start(self) -> None:
        """Allocate the channels, enable and start them. Called once, also before a restore."""

    def stop(self) -> None:  # noqa: B027 - optional to override
        """The server is ending: give up timers and files."""

    def save(self) -> bytes:
        """The provider's own state, beside that of its packets; all its channels are paused."""
        return b""

    def restore(self, state: bytes) -> None:
        """`save`'s bytes again, before any packet is restored. Raise StateError to refuse them."""
        if state:
            raise StateError(f"provider {self.name!r} ({self.kind}) has no state, but {len(state)} bytes were saved")

    def status(self) -> dict[str, Any]:
        """Counters and state for tools, as plain data."""
        return {}
