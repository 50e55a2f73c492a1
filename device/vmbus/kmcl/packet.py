"""Outgoing packets.

A packet object owns what a send needs, so a send never fails for want of memory: when the ring is full the packet
waits on the channel, in order. It can be used again after its completion routine ran.
"""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from vmbus.kmcl.status import ChannelStateError, KmclError, Status
from vmbus.wire.gpa import GpaRange, range_for
from vmbus.wire.packet import TransferPages

if TYPE_CHECKING:
    from vmbus.kmcl.channel import Channel


class PacketState(Enum):
    """IDLE: the owner's. QUEUED: waits for room in the ring. SENT: in the ring or taken, completion awaited."""

    IDLE = "idle"
    QUEUED = "queued"
    SENT = "sent"
    FREED = "freed"


_IDLE = PacketState.IDLE  # a global is looked up faster than a member of an Enum

Described = Sequence[GpaRange] | TransferPages
"""Memory that a packet describes: the guest's own, or parts of what the guest has lent."""

CompletionRoutine = Callable[["Packet", int, bytes], None]


def _free_packet(packet: "Packet", status: int, buffer: bytes) -> None:
    packet.free()


def _no_routine(packet: "Packet", status: int, buffer: bytes) -> None:
    raise AssertionError("a packet without a completion routine was sent")


class Packet:
    """One outgoing packet (VMBPACKET). Made by `Channel.allocate_packet`.

    Attributes:
        pointer: the owner's context, never looked at.
        completion_routine: called with (packet, status, reply bytes) when the packet is done: on its completion by the
            other end, or with CANCELLED when the channel closes, or at once when no completion was asked for and the
            packet is in the ring. The default frees the packet.
        transaction: the id on the wire of the current or last send, 0 before the first.
        since: when that was (or when it came back with a restore), by the monotonic clock; to a turn of the channel.
    """

    __slots__ = (
        "body",
        "channel",
        "completion_routine",
        "flags",
        "kind",
        "offset8",
        "pointer",
        "since",
        "state",
        "transaction",
    )

    def __init__(self, channel: "Channel", *, owned_by_caller: bool = False) -> None:
        """`owned_by_caller` (VmbPacketInitialize): no default completion routine; one must be set before a send."""
        self.channel = channel
        self.pointer: Any = None
        self.completion_routine: CompletionRoutine = _no_routine if owned_by_caller else _free_packet
        self.state = PacketState.IDLE
        self.transaction = 0
        self.kind = 0
        self.flags = 0
        self.offset8 = 0
        self.body = b""
        self.since = 0.0

    def send(
        self,
        payload: bytes,
        *,
        external: Sequence[tuple[int, int]] | None = None,
        external_ranges: Sequence[GpaRange] | None = None,
        transfer_pages: TransferPages | None = None,
        wait_for_completion: bool = True,
        transaction: int | None = None,
    ) -> None:
        """Send `payload` (VmbPacketSend), on any thread; queued in order while the ring is full or the channel paused.

        Args:
            payload: at most the channel's maximum packet size, bytes.
            external: guest memory as (I/O address, length) pairs that the packet describes without carrying it
                (VmbPacketSendWithExternalMdl); client endpoint only, needs `wait_for_completion`.
            external_ranges: the same as ranges of pages (VmbPacketSendWithExternalPfns); one or the other.
            transfer_pages: parts of memory that the guest has lent (a GPADL), which this packet hands over, written
                by the sender before, and not again until the completion; server endpoint only, needs
                `wait_for_completion`.
            wait_for_completion: ask the other end for a completion packet (WAIT_FOR_COMPLETION).
            transaction: the id on the wire, for protocols whose answers are packets that repeat the request's id;
                client endpoint only (the server's: 0 alone, for what is no answer), without `wait_for_completion`.

        Raises ChannelStateError when the packet is in use or freed, or the channel is not open; KmclError
        (INVALID_PARAMETER) when the payload is too long.
        """
        if self.state is not _IDLE:
            raise self.in_use()
        if self.completion_routine is _no_routine:
            raise ChannelStateError(
                f"a caller-owned packet of channel {self.channel.name} has no completion routine; set one first",
                Status.INVALID_DEVICE_REQUEST,
            )
        described: Described | None = external_ranges if transfer_pages is None else transfer_pages
        if (external is not None) + (external_ranges is not None) + (transfer_pages is not None) > 1:
            raise KmclError(
                f"a packet of channel {self.channel.name} with several of external, external_ranges and "
                "transfer_pages; give one of them",
                Status.INVALID_PARAMETER,
            )
        if external is not None:
            described = [range_for(address, length) for address, length in external]
        self.channel.send_packet(self, payload, described, wait_for_completion, transaction)

    def in_use(self) -> ChannelStateError:
        """The owner's mistake: a send of a packet that is not idle."""
        return ChannelStateError(
            f"packet {self.transaction} of channel {self.channel.name} is {self.state.value}; "
            "send it again after its completion routine has run",
            Status.INVALID_DEVICE_REQUEST,
        )

    def free(self) -> None:
        """Give the packet up (VmbPacketFree). Raises ChannelStateError while it is queued or sent."""
        if self.state in (PacketState.QUEUED, PacketState.SENT):
            raise ChannelStateError(
                f"packet {self.transaction} of channel {self.channel.name} is {self.state.value}; "
                "it can be freed in or after its completion routine"
            )
        self.state = PacketState.FREED
