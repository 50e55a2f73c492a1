"""Who looks on: the one protocol through which a channel tells what happens to its packets.

An `Observer` is asked at each open whether it wants to look at that life of the channel; what it returns is told of the
packets in it. Nobody looking costs nothing. Audit records and captures are observers.

For each direction there are two calls: before packets are handed over (or published), when the memory that they
describe is still as the sender left it, and after that, with their ring bytes, which exist anyway. Nothing of an
observer may raise, and none may touch the channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from vmbus.wire.packet import RawPacket

if TYPE_CHECKING:
    from vmbus.kmcl.channel import Channel, Link

How = Literal["opened", "resumed", "joined"]
"""How a look begins: the other end opened the channel just now; a restore put it back on its rings; it was open when
the observer came."""


Lent = Callable[[RawPacket, int], "tuple[int, bytes] | None"]
"""What a packet refers to in memory that the guest has lent beforehand (a GPADL): how many bytes that is, and the first
of them, not more than asked for; None: nothing. Raises PeerError where it cannot be read. An owner of a channel may set
one, for observers alone."""


class LifeObserver(Protocol):
    """Looks at one life of a channel, from an open (or from when it joined) to the close."""

    def about_to_take(self, packets: Sequence[RawPacket], offset: int) -> None:
        """These are about to be handed over, as far as the owner takes them. Their `end` counts from `offset` bytes
        before the ring bytes that `taken` gets next."""

    def taken(self, data: bytes) -> None:
        """The ring bytes of those that were handed over (a completion to its sender, a packet to its receiver): whole
        packets, or nothing. May come after `closed`, when the close happened while they were handed over."""

    def about_to_put(self, data: bytes) -> None:
        """The ring bytes of packets that are about to be published: whole packets, at least one."""

    def put(self, data: bytes) -> None:
        """The same bytes again: they are published."""

    def withdrawn(self, transaction: int) -> None:
        """The owner took a queued packet back before it was put."""

    def failed(self, reason: str, breach: bool) -> None:
        """The channel is failed; `closed` follows. Without `breach` no rule was broken: the other end is gone."""

    def closed(self) -> None:
        """The channel lets go of its rings; what is in flight is still there to be looked at."""


class Observer(Protocol):
    """Looks at channels. Comparable by identity."""

    def opened(self, channel: Channel, link: Link, how: How) -> LifeObserver | None:
        """A channel is open on these rings. None: this life is not looked at."""
