"""The client endpoint (VSC): the guest's end of a channel. It donates the rings and starts active by itself."""

from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Protocol, cast
from uuid import UUID

from vmbus.errors import PeerError
from vmbus.kmcl.channel import DEFAULT_TIMEOUT, Channel
from vmbus.kmcl.lifecycle import ChannelEvent, ChannelState
from vmbus.kmcl.status import ChannelStateError, KmclError, Status
from vmbus.kmcl.threads import own_thread

NIL = UUID(int=0)  # an interface type that has not been set

PnpFailure = Callable[["ClientChannel", int], None]


class GuestLink(Protocol):
    """What a client channel needs of its link beyond `vmbus.kmcl.channel.Link`. All of these wait."""

    def create_gpadl(self, extents: Sequence[tuple[int, int]], read_only: bool) -> int:
        """Describe memory to the host; the handle, once the host has accepted it. Raises PeerError if it refuses."""

    def delete_gpadl(self, handle: int) -> None:
        """Take memory back; returns when the host has let go of it."""

    def close_channel(self, timeout: float) -> None:
        """Close the channel this is the link of, and take the rings back."""


class ClientChannel(Channel):
    """A channel that accepts an offer of `interface_type`, of `interface_instance` if given.

    `ring_pages_in` and `ring_pages_out` are the data pages (4096 bytes each) of the two rings that the guest donates.
    `subchannel_index` 0 is the primary channel of an instance.
    """

    def __init__(
        self,
        interface_type: UUID = NIL,
        interface_instance: UUID | None = None,
        *,
        ring_pages_in: int = 16,
        ring_pages_out: int = 16,
        name: str = "",
        subchannel_index: int = 0,
    ) -> None:
        super().__init__(name or str(interface_type))
        self.can_describe_memory = True
        self.flow.lends = True
        self.interface_type = interface_type
        self.interface_instance = interface_instance
        self.subchannel_index = subchannel_index
        self._pnp_failure: PnpFailure | None = None
        self._on_enable: Callable[[ClientChannel], None] | None = None
        self._interrupt_latency = 0
        self._come_up_paused = False
        self.set_ring_buffer_page_count(ring_pages_in, ring_pages_out)

    # ---- set-up --------------------------------------------------------------------------------------------------

    def set_target_pnp(
        self, interface_type: UUID, interface_instance: UUID | None = None, pnp_failure: PnpFailure | None = None
    ) -> None:
        """Which offer to accept (VmbClientChannelInitSetTargetPnp); without an instance, any of the type.

        `pnp_failure(channel, status)` (EvtChannelPnpFailure) is called when an offer exists and cannot be opened.
        """
        self._require_disabled("set_target_pnp")
        self.interface_type = interface_type
        self.interface_instance = interface_instance
        self._pnp_failure = pnp_failure

    def set_ring_buffer_page_count(self, pages_in: int, pages_out: int) -> None:
        """Data pages of the incoming and outgoing ring (VmbClientChannelInitSetRingBufferPageCount)."""
        self._require_disabled("set_ring_buffer_page_count")
        if pages_in < 1 or pages_out < 1:
            raise self.refuse(f"rings of {pages_in} and {pages_out} data pages", Status.INVALID_PARAMETER)
        self.ring_pages_in = pages_in
        self.ring_pages_out = pages_out

    # ---- life ----------------------------------------------------------------------------------------------------

    def bind(self, on_enable: Callable[["ClientChannel"], None]) -> None:
        """Tie the channel to a driver: who opens it once it is enabled and its offer is there."""
        self.flow.thread = get_ident()  # from here on this is the channel's own thread
        self._require_disabled("bind")
        self._on_enable = on_enable

    @own_thread
    def enable(self) -> None:
        """Accept the offer when it is there (VmbChannelEnable); whoever drives the bus opens the channel."""
        self._require_usable("enable")
        if self.interface_type == NIL:
            raise ChannelStateError(f"channel {self.name} has no interface type; set_target_pnp() first")
        self._move(ChannelEvent.ENABLE)
        self.started = not self._come_up_paused
        self._come_up_paused = False
        if self._on_enable is not None:
            try:
                self._on_enable(self)
            except BaseException:
                if self.state is ChannelState.CLOSED:
                    self._move(ChannelEvent.DISABLE)
                raise

    @own_thread
    def begin_pause(self) -> None:
        """`pause` without the wait; while disabled: come up paused, once."""
        self._come_up_paused = self.state is ChannelState.DISABLED
        super().begin_pause()

    @own_thread
    def disable(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Close the channel if it is open, and forget the offer (VmbChannelDisable)."""
        self._refuse_in_state_callback("disable")
        if self.state in (ChannelState.OPENED, ChannelState.ACTIVE):
            self._guest_link("disable").close_channel(timeout)
        if self.state is not ChannelState.DISABLED:
            self._move(ChannelEvent.DISABLE)

    def connection_failed(self, status: int) -> None:
        """For the driver: the offer was there, and opening it failed with `status`."""
        if self._pnp_failure is not None:
            self._pnp_failure(self, status)

    @own_thread
    def set_interrupt_latency(self, latency_100ns: int) -> int:
        """How late an interrupt may come, in units of 100 ns; returns the old value (VmbChannelSetInterruptLatency).

        A hint: the host signals at once. Raises ChannelStateError unless open.
        """
        if self.state not in (ChannelState.OPENED, ChannelState.ACTIVE, ChannelState.CLOSING):
            raise ChannelStateError(f"channel {self.name} is {self.state.value}: it has no interrupt latency")
        if latency_100ns < 0:
            raise self.refuse(f"an interrupt latency of {latency_100ns}", Status.INVALID_PARAMETER_2)
        old, self._interrupt_latency = self._interrupt_latency, latency_100ns
        return old

    def get_mmio_space(self) -> tuple[int, int]:
        """Address and bytes of the memory-mapped I/O space that came with the channel (VmbChannelGetMmioSpace).

        There is none here, whatever the offer asks for: raises KmclError (INSUFFICIENT_RESOURCES), ChannelStateError
        unless open.
        """
        if self.state not in (ChannelState.OPENED, ChannelState.ACTIVE, ChannelState.CLOSING):
            raise ChannelStateError(f"channel {self.name} is {self.state.value}: it has no MMIO space")
        raise KmclError(f"channel {self.name} has no MMIO space; use a GPADL instead", Status.INSUFFICIENT_RESOURCES)

    # ---- GPADLs --------------------------------------------------------------------------------------------------

    def _guest_link(self, call: str, *, closing: bool = False) -> GuestLink:
        return cast(GuestLink, self.open_link(call, closing=closing))

    def create_gpadl(self, extents: Sequence[tuple[int, int]], *, read_only: bool = False) -> int:
        """Lend memory to the server, (I/O address, length) pairs; returns the handle once the server has accepted it
        (VmbChannelCreateGpadlFromBuffer, -FromMdl). `read_only` is a hint, not protection.

        Raises KmclError (INSUFFICIENT_RESOURCES) when the server refuses it.
        """
        try:
            return self._guest_link("create_gpadl").create_gpadl(extents, read_only)
        except PeerError as error:
            raise KmclError(f"channel {self.name}: {error}", Status.INSUFFICIENT_RESOURCES) from error

    def delete_gpadl(self, handle: int) -> None:
        """Take the memory back (VmbChannelDeleteGpadl); waits while the server has it mapped. At the latest in the
        closed callback. Raises KmclError (INVALID_PARAMETER) for a handle that does not exist, WaitTimeout."""
        try:
            self._guest_link("delete_gpadl", closing=True).delete_gpadl(handle)
        except PeerError as error:
            raise self.refuse(f"GPADL {handle:#x}: {error}", Status.INVALID_PARAMETER) from error
