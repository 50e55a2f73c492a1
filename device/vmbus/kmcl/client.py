"""The client endpoint (VSC): the guest's end of a channel. It donates the rings and starts active by itself."""

from uuid import UUID

from vmbus.kmcl.channel import Channel
from vmbus.kmcl.states import ChannelEvent
from vmbus.kmcl.status import KmclError, Status


class ClientChannel(Channel):
    """A channel that accepts an offer of `interface_type`, of `interface_instance` if given.

    `ring_pages_in` and `ring_pages_out` are the data pages (4096 bytes each) of the two rings that the guest donates.
    """

    def __init__(
        self,
        interface_type: UUID,
        interface_instance: UUID | None = None,
        *,
        ring_pages_in: int = 16,
        ring_pages_out: int = 16,
        name: str = "",
    ) -> None:
        super().__init__(name or str(interface_type))
        self.can_describe_memory = True
        self.interface_type = interface_type
        self.interface_instance = interface_instance
        self.set_ring_buffer_page_count(ring_pages_in, ring_pages_out)

    def set_ring_buffer_page_count(self, pages_in: int, pages_out: int) -> None:
        """Data pages of the incoming and outgoing ring (VmbClientChannelInitSetRingBufferPageCount)."""
        self._require_disabled("set_ring_buffer_page_count")
        if pages_in < 1 or pages_out < 1:
            raise KmclError(
                f"channel {self.name}: rings of {pages_in} and {pages_out} data pages", Status.INVALID_PARAMETER
            )
        self.ring_pages_in = pages_in
        self.ring_pages_out = pages_out

    def enable(self) -> None:
        """Ready to be opened (VmbChannelEnable); whoever drives the bus then opens it."""
        self._move(ChannelEvent.ENABLE)
        self.started = True

    def disable(self) -> None:
        """Back to disabled, once closed (VmbChannelDisable)."""
        self._move(ChannelEvent.DISABLE)
