"""The table: every function and callback, what stands for it in Python, and how a row becomes a function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, Generic, NamedTuple, ParamSpec, TypeVar, cast

from vmbus.errors import StateError, WaitTimeout
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.status import ChannelStateError, KmclError, Status
from vmbus.util.complaints import bounded_log

if TYPE_CHECKING:
    # The server endpoint saves, for which it needs msgspec; a guest need not have that.
    from vmbus.kmcl.server import ServerChannel

log = bounded_log("vmbus.kmcl.ddi")

P = ParamSpec("P")
R = TypeVar("R")
Given = TypeVar("Given")
Owner = TypeVar("Owner")


class Entry(NamedTuple):
    """One function or callback. `endpoint`: S server only, C client only, B both."""

    name: str
    endpoint: str
    counterpart: str
    deviation: str


FUNCTIONS: dict[str, Entry] = {}

_STATE_CHANGES = [f"EvtVmbChannel{change}" for change in ("Opened", "Closed", "Suspend", "Started", "PostStarted")]

CALLBACKS: dict[str, Entry] = {
    name: Entry(name, endpoint, counterpart, deviation)
    for name, endpoint, counterpart, deviation in (
        *((name, "B", "Channel.set_state_change_callbacks", "") for name in _STATE_CHANGES),
        ("EvtVmbChannelPnpFailure", "C", "ClientChannel.set_target_pnp", ""),
        (
            "EvtVmbChannelProcessPacket",
            "B",
            "Channel.set_process_packet_callbacks",
            "Called on the channel's one thread, at no IRQL; an exception fails the channel.",
        ),
        ("EvtVmbChannelProcessingComplete", "B", "Channel.set_process_packet_callbacks", ""),
        (
            "EvtVmbChannelSavePacket",
            "S",
            "ServerChannel.set_save_restore_packet_callbacks",
            "Returns (status, bytes needed). The second buffer has exactly the size asked for and is saved whole; a "
            "first call that fails and needs 0 bytes fails the save.",
        ),
        ("EvtVmbChannelRestorePacket", "S", "ServerChannel.set_save_restore_packet_callbacks", ""),
        ("EvtVmbPacketCompletionRoutine", "B", "Packet.completion_routine", ""),
    )
}


def listed(endpoint: str, counterpart: str, deviation: str = "") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function of the table whose failures are misuse, and raise."""

    def enter(function: Callable[P, R]) -> Callable[P, R]:
        FUNCTIONS[function.__name__] = Entry(function.__name__, endpoint, counterpart, deviation)
        return function

    return enter


def returns_status(
    endpoint: str, counterpart: str, deviation: str = "", *, failed: tuple[Any, ...] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function of the table whose failures become its status; `failed` are its out-parameters then."""
    enter: Callable[[Callable[P, R]], Callable[P, R]] = listed(endpoint, counterpart, deviation)
    return lambda function: enter(_caught(function, failed))


def _caught(function: Callable[P, R], failed: tuple[Any, ...]) -> Callable[P, R]:
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (KmclError, StateError, WaitTimeout) as error:
            log.info("%s: %s", call.__name__, error)
            if isinstance(error, KmclError):
                status = error.status
            else:
                status = Status.DATA_ERROR if isinstance(error, StateError) else Status.CANCELLED
            return cast(R, (status, *failed) if failed else status)

    return call


# ---- handles ---------------------------------------------------------------------------------------------------------


def the_server(channel: Channel) -> ServerChannel:
    """The server's end; INVALID_PARAMETER_1 for the client's."""
    if isinstance(channel, ClientChannel):
        raise ChannelStateError(
            f"channel {channel.name} is a client's: this call is the server's", Status.INVALID_PARAMETER_1
        )
    return cast("ServerChannel", channel)


def the_client(channel: Channel) -> ClientChannel:
    """The client's end; INVALID_PARAMETER_1 for the server's."""
    if not isinstance(channel, ClientChannel):
        raise ChannelStateError(
            f"channel {channel.name} is a server's: this call is the client's", Status.INVALID_PARAMETER_1
        )
    return channel


class Rows(Generic[Given, Owner]):
    """Rows for one sort of handle: functions that only forward to a method or an attribute.

    `find` gives the object whose method or attribute it is, or raises. Parameters and their types are those of the
    method; only its name is used at run time, so that it may be overridden, or not be there before it is needed.
    A row gets its own name from the variable that it is bound to: `enter` does that for a whole module.
    """

    _unnamed: ClassVar[list[tuple[Callable[..., Any], Entry]]] = []

    def __init__(self, kind: str, endpoint: str, find: Callable[[Given], Owner]) -> None:
        self._kind = kind
        self._endpoint = endpoint
        self._find = find

    def _add(self, call: Callable[P, R], member: str, doc: str, deviation: str) -> Callable[P, R]:
        entry = Entry("", self._endpoint, f"{self._kind}.{member}", deviation)
        call.__doc__ = f"{doc}\n\nParameters: those of `{entry.counterpart}`."
        Rows._unnamed.append((call, entry))
        return call

    def does(
        self, method: Callable[Concatenate[Owner, P], None], doc: str, deviation: str = ""
    ) -> Callable[Concatenate[Given, P], Status]:
        """Calls a method, and returns the status."""

        def call(handle: Given, /, *args: P.args, **kwargs: P.kwargs) -> Status:
            getattr(self._find(handle), method.__name__)(*args, **kwargs)
            return Status.SUCCESS

        return self._add(_caught(call, ()), method.__name__, doc, deviation)

    def plainly(
        self, method: Callable[Concatenate[Owner, P], R], doc: str, deviation: str = ""
    ) -> Callable[Concatenate[Given, P], R]:
        """Calls a method whose failures are misuse, and raise."""

        def call(handle: Given, /, *args: P.args, **kwargs: P.kwargs) -> R:
            return cast(R, getattr(self._find(handle), method.__name__)(*args, **kwargs))

        return self._add(call, method.__name__, doc, deviation)

    def sets(self, attribute: str, doc: str) -> Callable[[Given, object], None]:
        """Sets an attribute."""
        return self._add(lambda handle, value: setattr(self._find(handle), attribute, value), attribute, doc, "")

    def reads(self, attribute: str, doc: str) -> Callable[[Given], Any]:
        """Reads an attribute."""
        return self._add(lambda handle: getattr(self._find(handle), attribute), attribute, doc, "")


def enter(module: dict[str, Any]) -> None:
    """Name the rows of a module after its variables, and enter them into the table."""
    names = {id(value): name for name, value in module.items()}
    for call, entry in Rows._unnamed:
        name = names[id(call)]
        call.__name__ = call.__qualname__ = name
        FUNCTIONS[name] = entry._replace(name=name)
    Rows._unnamed.clear()


def _itself(handle: Owner) -> Owner:
    return handle


CHANNEL: Rows[Channel, Channel] = Rows("Channel", "B", _itself)
SERVER: Rows[Channel, ServerChannel] = Rows("ServerChannel", "S", the_server)
CLIENT: Rows[Channel, ClientChannel] = Rows("ClientChannel", "C", the_client)
PACKET: Rows[Packet, Packet] = Rows("Packet", "B", _itself)
COMPLETION: Rows[Completion, Completion] = Rows("Completion", "B", _itself)
