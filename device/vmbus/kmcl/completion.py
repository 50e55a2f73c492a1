"""Incoming packets: the handle that their receiver must complete exactly once."""

from typing import TYPE_CHECKING, Any

from vmbus.kmcl.status import ChannelStateError, KmclError, Status
from vmbus.memory import Grant, MemoryFault
from vmbus.wire.packet import PacketError, parse_gpa_direct

if TYPE_CHECKING:
    from vmbus.kmcl.channel import Channel


class Completion:
    """An incoming packet that has not been completed yet (VMBPACKETCOMPLETION).

    Attributes:
        transaction: the sender's id.
        wanted: whether the sender waits for a completion packet.
        context: scratch space of the receiver.
    """

    __slots__ = ("_body", "_generation", "_grant", "channel", "context", "done", "transaction", "wanted")

    def __init__(self, channel: "Channel", transaction: int, wanted: bool, body: bytes, generation: int) -> None:
        self.channel = channel
        self.transaction = transaction
        self.wanted = wanted
        self.context: Any = None
        self.done = False
        self._body = body
        self._generation = generation
        self._grant: Grant | None = None

    @property
    def has_external_data(self) -> bool:
        """Whether the packet describes guest memory (the EXTERNAL_DATA flag of EvtChannelProcessPacket)."""
        return self._body != b""

    def external_data(self, *, read_only: bool = False) -> Grant:
        """The guest memory that the packet describes, as memoryviews (VmbChannelPacketGetExternalData).

        The grant dies with `complete`. Asked for twice, it is the same grant, so the first call decides about
        `read_only`. Raises KmclError (DATA_ERROR) when the memory is not what the guest made reachable: complete the
        packet with an error of your protocol; INVALID_DEVICE_REQUEST when the packet has no external data.
        """
        if self._grant is not None:
            return self._grant
        where = f"packet {self.transaction} of channel {self.channel.name}"
        if self.done or not self._body:
            raise KmclError(f"{where} has no external data", Status.INVALID_DEVICE_REQUEST)
        memory = self.channel.memory_of(self._generation)
        if memory is None:
            raise KmclError(f"{where}: the channel was closed", Status.CANCELLED)
        try:
            ranges = parse_gpa_direct(self._body, max_bytes=self.channel.maximum_external_data)
            extents = [extent for one in ranges for extent in one.extents()]
            self._grant = memory.grant(extents, writable=not read_only)
        except (PacketError, MemoryFault) as error:
            raise KmclError(f"external data of {where}: {error}", Status.DATA_ERROR) from error
        return self._grant

    def complete(self, reply: bytes = b"") -> None:
        """Finish the packet (VmbChannelPacketComplete): its external data is given back, and a completion packet with
        `reply` is sent if the sender asked for one; queued in order when the ring is full.

        Does nothing more when the channel has been closed meanwhile. Raises ChannelStateError when called twice.
        """
        if self.done:
            raise ChannelStateError(
                f"packet {self.transaction} of channel {self.channel.name} was completed already; "
                "each incoming packet is completed exactly once",
                Status.INVALID_DEVICE_REQUEST,
            )
        self.done = True
        if self._grant is not None:
            self._grant.release()
        self.channel.complete_incoming(self, self._generation, reply)

    def fail(self, reason: str) -> None:
        """The packet is malformed beyond recovery (VmbChannelPacketFail): the channel is closed."""
        self.done = True
        if self._grant is not None:
            self._grant.release()
        self.channel.fail(f"packet {self.transaction}: {reason}")
