"""What every provider has, and what it may ask of its host."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar
from uuid import UUID

import msgspec

from vmbus.bus.connects import Wish
from vmbus.errors import StateError, UsageError
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.server import ServerChannel
from vmbus.util.explaining import explain
from vmbus.util.records import decode

Result = TypeVar("Result")

MOST_WORK = 1024
"""Pieces of work of one provider that may wait for a thread."""


class WorkQueueFull(UsageError):
    """Too much work of one provider waits for its threads: answer the request with an error, or ask for less."""


class Timer(Protocol):
    """A call that has been scheduled."""

    def cancel(self) -> None:
        """Do not call."""


class Work(Protocol):
    """Work that was given to other threads."""

    def cancel(self) -> bool:
        """Take it back if it was not begun: then it is not done, and `done` is not called. Returns whether that is so;
        else it is under way or has ended, and `done` is called as always."""


class Bound(NamedTuple):
    """Something that is bounded: how much of it there is, at most may be (None: a budget that counts how often it was
    used up), and how often the bound was reached."""

    now: int
    most: int | None
    reached: int


class Host(Protocol):
    """What a provider may ask of the device server. Calls come back on the provider's own thread, the event loop.

    Attributes:
        run_directory: its owner's alone; sockets that tools shall find belong there. It goes away with the VM. None:
            there is none.
    """

    @property
    def run_directory(self) -> Path | None:
        """See the class."""

    def add_channel(self, channel: ServerChannel) -> None:
        """Tie a disabled channel to the device; `enable` then offers it."""

    def remove_channel(self, channel: ServerChannel, gone: Callable[[], None] | None = None) -> None:
        """Take a channel back for good, closed by force if it is open; not in a callback of the channel itself.

        `gone` is called once the guest has released it, or has lost its connection: then nothing of it is left. A
        channel that comes and goes while the device runs has `SERVER_FLAG_FORCE_NEW_CHANNEL`: a restored device has no
        such channel, and rescinds it.
        """

    def serve_connects(self, asked: Callable[[Wish], bool]) -> None:
        """Call `asked` when the guest asks for a channel (TL_CONNECT_REQUEST) that nobody before has taken.

        True: the provider sees to it. It offers a channel with the wish's `service` and `endpoint` as its ids, and
        calls `end` of the wish when the guest has opened that or was told that it is gone; or it refuses the wish.
        False: another one is asked. How many may be under way is bounded, see docs/limits.md.
        """

    def add_client(self, channel: ClientChannel) -> None:
        """Tie a disabled client channel to the local offers of this device's providers; `enable` then opens it."""

    def call_soon(self, call: Callable[[], None]) -> None:
        """Call from the event loop, soon."""

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Call from the event loop after `seconds`."""

    def add_reader(self, fd: int, call: Callable[[], None]) -> None:
        """Call from the event loop whenever `fd` is readable, or hung up, as long as the provider is active.

        Level-triggered: again and again until everything was read. `fd` is non-blocking, and removed before it is
        closed. A call that raises is logged and removed. Raises UsageError for a descriptor that cannot be watched.
        """

    def remove_reader(self, fd: int) -> bool:
        """End that. Returns whether there was a call."""

    def add_writer(self, fd: int, call: Callable[[], None]) -> None:
        """As `add_reader`, whenever `fd` can be written to."""

    def remove_writer(self, fd: int) -> bool:
        """End that. Returns whether there was a call."""

    def run_blocking(
        self, work: Callable[[], Result], done: Callable[[Result | None, BaseException | None], None]
    ) -> Work:
        """Do `work` on another thread, a few at a time, then call `done(result, error)` from the event loop.

        Calls of `done` may come in another order than that of the work. `work` touches nothing but what it was given:
        views of granted memory among it, which stay harmless when the guest takes the memory back. A pause waits until
        all work has ended. Work that was not begun when the provider is stopped is dropped; take back yourself, with
        `cancel`, what nobody wants any more since its channel has closed.

        Raises WorkQueueFull while as much as `MOST_WORK` waits for a thread.
        """


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
            raise UsageError(f"options of provider {name!r} ({self.kind}): {explain(error, self.Options)}") from error

    @abstractmethod
    def start(self) -> None:
        """Allocate the channels, enable and start them. Called once, also before a restore.

        Takes nothing that another host may still own: see `activate`.
        """

    def activate(self) -> None:  # noqa: B027 - optional to override
        """The device begins to run: take what only one host may own at a time (files, locks, interfaces).

        Called at power-on, when the device goes on after a pause, and in a restore once the packets are back; always
        before a `started` callback. May block for a moment: the guest stands still. Raising fails what is going on, and
        leaves nothing taken: it is tried again. What an earlier `deactivate` that failed has not given up is kept.
        """

    def deactivate(self) -> None:  # noqa: B027 - optional to override
        """The device has come to rest, and may go on somewhere else: give up what `activate` took.

        No incoming packet is held and no work is under way. Flush what others shall find. May block for a moment.
        """

    def stop(self) -> None:  # noqa: B027 - optional to override
        """The server is ending: give up timers, files and all that `activate` took."""

    def depart(self) -> "Future[None] | None":
        """It is about to be withdrawn while the device runs, and its channels are still open: let the guest prepare for
        it, and complete what the guest waits for. Returns None, or a future; it is not waited for without bound."""
        return None

    def stay(self) -> None:  # noqa: B027 - optional to override
        """After `depart`: it is not withdrawn after all."""

    def save(self) -> bytes:
        """The provider's own state, beside that of its packets; all its channels are paused.

        Raising fails the save; the device runs on.
        """
        return b""

    def check(self, state: bytes) -> None:  # noqa: B027 - optional to override
        """Whether `restore` will take these bytes: decode them, look at every range. Raise StateError to refuse them.

        Without effects: it is asked before anything changes, and at a save, of bytes that `save` has just returned.
        """

    def decoded(self, decoder: "msgspec.msgpack.Decoder[Result]", state: bytes) -> Result:
        """For `check` and `restore`: the record in `state`. Raises StateError that names the provider, nothing else."""
        return decode(decoder, state, f"the saved state of provider {self.name!r} ({self.kind})")

    def restore(self, state: bytes) -> None:
        """`save`'s bytes again, before any packet is restored. Raise StateError to refuse them, better in `check`."""
        if state:
            raise StateError(f"provider {self.name!r} ({self.kind}) has no state, but {len(state)} bytes were saved")

    def files(self) -> dict[str, Path]:
        """Files outside of the state that a snapshot has to contain, by a name of your own (a-z, 0-9, `_`, `-`).

        Asked for while the provider is inactive. They are copied into the snapshot's directory. A live migration
        copies no files, and is refused while there are some, but for those of `shared_files`.
        """
        return {}

    def shared_files(self) -> "Collection[str]":
        """The names of those `files` with which a live migration needs no copy: where the device goes to, the provider
        finds the same file by itself, or refuses to be activated."""
        return ()

    def restore_files(self, files: Mapping[str, Path]) -> None:  # noqa: B027 - optional to override
        """Where the copies of `files` are, by their names; called before `restore`. Raise StateError to refuse them.

        Without a snapshot's directory (a live migration) there are none. They belong to the snapshot: copy them, in
        `activate`, and write to the copy.
        """

    def command(self, name: str, arguments: Mapping[str, Any]) -> "dict[str, Any] | Future[dict[str, Any]]":
        """A command from a tool, while the device runs. Returns the answer (plain data), or a future that gets it.

        Raises UsageError for what it does not know.
        """
        raise UsageError(f"provider {self.name!r} ({self.kind}) has no commands")

    def status(self) -> dict[str, Any]:
        """Counters and state for tools, as plain data."""
        return {}

    def bounds(self) -> dict[str, Bound]:
        """What is bounded of the things that a guest can make this provider hold or do, by name. Tools show it."""
        return {}

    def name_packet(self, packet: Packet) -> str:
        """What a packet of this provider's that the guest has carries, in the protocol's words, for people who look
        into a running device. Its bytes are in the guest's memory, so this is of what the provider remembers of it."""
        return ""

    @classmethod
    def describe_packet(cls, saved: bytes) -> dict[str, Any]:
        """What the save callback's bytes of one packet say, as plain data for people who look into a snapshot.

        No device exists then. An empty dictionary: nothing but the bytes is shown. May raise anything for bytes that
        are not its own.
        """
        return {}
