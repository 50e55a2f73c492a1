"""Calls from other threads than the channel's own: `send` and `complete` are carried to it, all others refused by name.

A channel's own thread is the one that bound it to its bus (before that: that made it). Calls keep the order in which
each thread makes them. What can be checked at once is checked at once and raised there; what only the channel's thread
can tell (the channel was closed meanwhile) comes through the packet's completion routine. A channel does not come to
rest, for a save or a pause, before the calls that were made are carried out.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from vmbus.kmcl.packet import PacketState
from vmbus.kmcl.status import ChannelStateError, KmclError, Status

if TYPE_CHECKING:
    from vmbus.kmcl.channel import Channel
    from vmbus.kmcl.completion import Completion
    from vmbus.kmcl.endpoint import Endpoint
    from vmbus.kmcl.packet import Described, Packet

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound="Endpoint")

Carrier = Callable[[Callable[[], None]], None]
"""Has a call made on the channel's own thread, soon; callable from any thread."""

_ident = threading.get_ident


def own_thread(method: Callable[Concatenate[C, P], R]) -> Callable[Concatenate[C, P], R]:
    """A method of a channel that only the channel's own thread may call."""
    name = method.__name__

    @functools.wraps(method)
    def checked(self: C, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if _ident() != self.flow.thread:
            self.threads.require_own(name)  # says so
        return method(self, *args, **kwargs)

    return checked


class Threads:
    """Of one channel: what other threads than its own have asked for."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._carried: deque[Callable[[], None]] = deque()
        self._claim = threading.Lock()

    @property
    def under_way(self) -> bool:
        """Whether calls of other threads wait for the channel's own."""
        return bool(self._carried)

    def require_own(self, call: str) -> None:
        """Raises ChannelStateError on another thread."""
        if _ident() != self._channel.thread:
            raise ChannelStateError(
                f"channel {self._channel.name}: {call} was called on thread {threading.current_thread().name}; on "
                "other threads than the channel's own only a packet's send and complete are possible",
                Status.INVALID_DEVICE_REQUEST,
            )

    def run_carried(self) -> None:
        """On the channel's thread: what others asked for up to now."""
        carried = self._carried
        for _ in range(len(carried)):
            if not carried:
                return  # a call waited inside, and made the rest
            carried.popleft()()

    def _carry(self, call: Callable[[], None], what: str) -> None:
        carrier = self._channel.carrier
        if carrier is None:
            raise ChannelStateError(
                f"channel {self._channel.name}: {what} on thread {threading.current_thread().name}, and nothing was "
                "given to carry it to the channel's own (`carrier`)",
                Status.INVALID_DEVICE_REQUEST,
            )
        self._carried.append(call)
        carrier(self.run_carried)

    def send(
        self,
        packet: Packet,
        payload: bytes,
        external: Described | None,
        wait_for_completion: bool,
        transaction: int | None,
    ) -> None:
        """`Packet.send` on another thread; the packet is in use from here on."""
        channel = self._channel
        channel.check_payload(payload)
        with self._claim:
            if packet.state is not PacketState.IDLE:
                raise packet.in_use()
            packet.state = PacketState.QUEUED

        def now() -> None:
            packet.state = PacketState.IDLE
            try:
                channel.outgoing.send(packet, payload, external, wait_for_completion, transaction)
            except KmclError as error:
                try:
                    packet.completion_routine(packet, error.status, b"")
                except Exception as raised:
                    channel.owner_failed("the completion routine", raised, f"packet {packet.transaction}")

        try:
            self._carry(now, "a send")
        except KmclError:
            packet.state = PacketState.IDLE
            raise

    def complete(self, completion: Completion, reply: bytes) -> None:
        """`Completion.complete` on another thread."""
        with self._claim:
            if completion.done:
                raise completion.completed_twice()
            completion.done = True
        try:
            self._carry(lambda: completion.finish(reply), "a completion")
        except KmclError:
            completion.done = False
            raise
