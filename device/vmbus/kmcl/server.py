"""The server endpoint (VSP): offers a channel. How it saves and restores its packets is in `vmbus.kmcl.saving`."""

from collections.abc import Callable
from threading import get_ident
from typing import Protocol, cast
from uuid import UUID

from vmbus.errors import PeerError
from vmbus.kmcl.channel import DEFAULT_TIMEOUT
from vmbus.kmcl.lifecycle import ChannelEvent, ChannelState
from vmbus.kmcl.saving import SavingChannel
from vmbus.kmcl.status import ChannelStateError, Status
from vmbus.kmcl.threads import own_thread
from vmbus.memory.guest import Grant, Window
from vmbus.wire.messages import OfferFlag

SERVER_FLAG_LOOPBACK_OFFER = 0x1
SERVER_FLAG_ENUMERATE_DEVICE_INTERFACE = 0x2
SERVER_FLAG_OFFER_AS_PIPE = 0x4
SERVER_FLAG_FORCE_NEW_CHANNEL = 0x8
SERVER_FLAG_TLNPI_PROVIDER_OFFER = 0x10
SERVER_FLAGS = 0x1F
_WIRE_FLAGS = {
    SERVER_FLAG_LOOPBACK_OFFER: OfferFlag.LOOPBACK_OFFER,
    SERVER_FLAG_ENUMERATE_DEVICE_INTERFACE: OfferFlag.ENUMERATE_DEVICE_INTERFACE,
    SERVER_FLAG_OFFER_AS_PIPE: OfferFlag.NAMED_PIPE_MODE,
    SERVER_FLAG_TLNPI_PROVIDER_OFFER: OfferFlag.TLNPI_PROVIDER_OFFER,
}

NIL = UUID(int=0)  # an interface id that has not been set


class HostLink(Protocol):
    """What a server channel needs of its link beyond `vmbus.kmcl.channel.Link`. All raise PeerError."""

    def map_gpadl(self, handle: int, read_only: bool) -> Grant:
        """The memory of a GPADL of this channel."""

    def open_gpadl(self, handle: int, most: int) -> Window:
        """The same as one window of at most `most` bytes."""

    def unmap_gpadl(self, handle: int) -> None:
        """End the mapping."""


class ServerChannel(SavingChannel):
    """A channel that is offered to the guest as (`interface_type`, `interface_instance`).

    Attributes:
        subchannel_index: 0 for the primary channel of an instance.
        offer_flags: bits of `vmbus.wire.messages.OfferFlag`.
        user_defined: up to 120 bytes that travel in the offer.
        force_new_channel: after a restore of the VM, this channel is rescinded, and offered anew if its owner makes it
            again; its packets are gone.
        loopback_offer: offered inside this process instead of to the guest.
        mmio_megabytes, mmio_megabytes_optional: travel in the offer; nothing here provides such memory.
    """

    def __init__(
        self,
        interface_type: UUID = NIL,
        interface_instance: UUID = NIL,
        *,
        name: str = "",
        subchannel_index: int = 0,
    ) -> None:
        super().__init__(name or str(interface_instance))
        self.interface_type = interface_type
        self.interface_instance = interface_instance
        self.subchannel_index = subchannel_index
        self.offer_flags = 0
        self.user_defined = b""
        self.loopback_offer = False
        self.mmio_megabytes = 0
        self.mmio_megabytes_optional = 0
        self._on_enable: Callable[[ServerChannel], None] | None = None
        self._on_disable: Callable[[ServerChannel], None] | None = None

    def set_server_flags(self, flags: int) -> None:
        """How the channel is offered, SERVER_FLAG bits (VmbServerChannelInitSetFlags)."""
        self._require_disabled("set_server_flags")
        if flags & ~SERVER_FLAGS:
            raise self.refuse(f"server flags {flags:#x}; {SERVER_FLAGS:#x} exist", Status.INVALID_PARAMETER_2)
        self.offer_flags = sum(wire for flag, wire in _WIRE_FLAGS.items() if flags & flag)
        self.force_new_channel = bool(flags & SERVER_FLAG_FORCE_NEW_CHANNEL)
        self.loopback_offer = bool(flags & SERVER_FLAG_LOOPBACK_OFFER)

    def set_mmio_megabytes(self, megabytes: int, optional: int = 0) -> None:
        """Memory-mapped I/O space that the guest should set aside (VmbServerChannelInitSetMmioMegabytes)."""
        self._require_disabled("set_mmio_megabytes")
        both = (megabytes, optional)
        if not any(both) or min(both) < 0 or max(both) > 0xFFFF:
            raise self.refuse(f"{megabytes} and {optional} MB of MMIO space", Status.INVALID_PARAMETER)
        self.mmio_megabytes = megabytes
        self.mmio_megabytes_optional = optional

    def set_target_interface_id(self, interface_type: UUID, interface_instance: UUID) -> None:
        """What the channel is offered as (VmbServerChannelInitSetTargetInterfaceId)."""
        self._require_disabled("set_target_interface_id")
        self.interface_type = interface_type
        self.interface_instance = interface_instance

    def set_target_vtl(self, vtl: int) -> None:
        """Only 0: there are no virtual trust levels here (VmbServerChannelInitSetTargetVtl)."""
        self._require_disabled("set_target_vtl")
        if vtl:
            raise self.refuse(f"target VTL {vtl}; only VTL 0 exists here", Status.INVALID_PARAMETER_2)

    def bind(self, on_enable: Callable[["ServerChannel"], None], on_disable: Callable[["ServerChannel"], None]) -> None:
        """Tie the channel to one VM's bus (VmbServerChannelInitSetVmbusHandle): who offers it, who withdraws it."""
        self.flow.thread = get_ident()  # from here on this is the channel's own thread
        self._require_disabled("bind")
        self._on_enable = on_enable
        self._on_disable = on_disable

    @own_thread
    def enable(self) -> None:
        """Offer the channel (VmbChannelEnable). The guest opens it whenever it likes."""
        self._require_usable("enable")
        if NIL in (self.interface_type, self.interface_instance):
            raise ChannelStateError(f"channel {self.name} has no interface ids; set_target_interface_id() first")
        if self._on_enable is None:
            raise ChannelStateError(f"channel {self.name} is bound to no bus; bind() it first")
        self._move(ChannelEvent.ENABLE)
        try:
            self._on_enable(self)
        except BaseException:
            if self.state is ChannelState.CLOSED:
                self._move(ChannelEvent.DISABLE)
            raise

    @own_thread
    def disable(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Withdraw the offer (VmbChannelDisable): waits for incoming packets that are held, then closes the channel.

        Raises WaitTimeout naming the packets (the channel is then paused), ChannelStateError in a state callback.
        """
        self._refuse_in_state_callback("disable")
        if self.state in (ChannelState.OPENED, ChannelState.ACTIVE, ChannelState.CLOSING):
            wish = self.started
            self.pause(timeout)
            self.started = wish
        # Withdrawing closes an open channel: the guest is told that it is gone.
        if self._on_disable is not None and self.state is not ChannelState.DISABLED:
            self._on_disable(self)
        self._move(ChannelEvent.DISABLE)

    # ---- GPADLs ------------------------------------------------------------------------------------------------

    def map_gpadl(self, handle: int, *, read_only: bool = False) -> Grant:
        """The memory of a GPADL that the guest created on this channel, as memoryviews (VmbChannelMapGpadl).

        One mapping of a GPADL at a time. With `read_only` the views cannot be written, and the memory is not in the
        dirty log. Raises KmclError (INVALID_PARAMETER) for a handle that does not exist or is mapped already.
        """
        try:
            return self._host_link("map_gpadl").map_gpadl(handle, read_only)
        except PeerError as error:
            raise self.refuse(f"GPADL {handle:#x}: {error}", Status.INVALID_PARAMETER) from error

    def open_gpadl(self, handle: int, most: int) -> Window:
        """The same memory as one window from offset 0, for mappings that last: all writes go through the window's
        `write`, so that a migration copies the pages that were written, and not all of them. The window is revoked when
        the guest unmaps any of it, or with `unmap_gpadl`; each access then raises MemoryRevoked. Raises as
        `map_gpadl`, also for more than `most` bytes (to open a window takes the time of its pages), and for memory that
        is not aligned to 8 bytes."""
        try:
            return self._host_link("open_gpadl").open_gpadl(handle, most)
        except PeerError as error:
            raise self.refuse(f"GPADL {handle:#x}: {error}", Status.INVALID_PARAMETER) from error

    def unmap_gpadl(self, handle: int) -> None:
        """End a mapping (VmbChannelUnmapGpadl); a guest that waits to take its memory back goes on. At the latest in
        the closed callback. Raises KmclError (INVALID_PARAMETER) for a handle that is not mapped."""
        try:
            self._host_link("unmap_gpadl", closing=True).unmap_gpadl(handle)
        except PeerError as error:
            raise self.refuse(f"GPADL {handle:#x}: {error}", Status.INVALID_PARAMETER) from error

    def _host_link(self, call: str, *, closing: bool = False) -> HostLink:
        return cast(HostLink, self.open_link(call, closing=closing))
