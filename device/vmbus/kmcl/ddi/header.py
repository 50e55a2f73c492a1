"""What the header declares: flags, callbacks and structures, under its names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

from vmbus.kmcl.channel import Channel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet

if TYPE_CHECKING:
    from vmbus.kmcl.client import ClientChannel

Buffer = bytes | bytearray | memoryview
Mdl = Sequence[tuple[int, int]]

# ---- flags -----------------------------------------------------------------------------------------------------------

VMBUS_CHANNEL_INIT_FLAG_IS_PIPE = 0x1

VMBUS_SERVER_CHANNEL_INIT_FLAG_LOOPBACK_OFFER = 0x1
VMBUS_SERVER_CHANNEL_INIT_FLAG_ENUMERATE_DEVICE_INTERFACE = 0x2
VMBUS_SERVER_CHANNEL_INIT_FLAG_OFFER_AS_PIPE = 0x4
VMBUS_SERVER_CHANNEL_INIT_FLAG_FORCE_NEW_CHANNEL = 0x8
VMBUS_SERVER_CHANNEL_INIT_FLAG_TLNPI_PROVIDER_OFFER = 0x10

VMBUS_CHANNEL_FORMAT_FLAG_WAIT_FOR_COMPLETION = 0x1
VMBUS_CHANNEL_FORMAT_FLAG_FORCE_MDL_LENGTH = 0x2
VMBUS_CHANNEL_FORMAT_FLAG_PAGED_BUFFER = 0x4

VMBUS_CHANNEL_PROCESS_PACKET_FLAG_EXTERNAL_DATA = 0x1
VMBUS_CHANNEL_PACKET_EXTERNAL_DATA_FLAG_READ_ONLY = 0x1
VMBUS_CHANNEL_GPADL_FLAG_READ_ONLY = 0x1

VMB_CHANNEL_STATE_CHANGE_CALLBACKS_VERSION = 1
VMB_CHANNEL_STATE_CHANGE_CALLBACKS_SIZE = 48  # two 32-bit words and five pointers


def NT_SUCCESS(status: int) -> bool:
    """Whether a status means success (or is informational), as the WDK's macro of that name tells."""
    return 0 <= status < 0x80000000


# ---- callbacks -------------------------------------------------------------------------------------------------------

EvtVmbChannelOpened = Callable[[Channel], int]
"""`(channel) -> status`: the guest opens the channel; a failure status rolls the open back and goes to the guest."""
EvtVmbChannelClosed = Callable[[Channel], None]
"""`(channel)`: closed; every packet has come back, GPADLs have to be gone when it returns."""
EvtVmbChannelSuspend = Callable[[Channel], None]
"""`(channel)`: no packet comes until the next Started; complete all that is held."""
EvtVmbChannelStarted = Callable[[Channel], None]
"""`(channel)`: sends may be queued; it must not wait for incoming packets."""
EvtVmbChannelPostStarted = Callable[[Channel], None]
"""`(channel)`: packets come; synchronous requests are fine here."""
EvtVmbChannelPnpFailure = Callable[[Channel, int], None]
"""`(channel, status)`: a client could not connect to an offer that exists."""
EvtVmbChannelProcessPacket = Callable[[Channel, Completion, bytes, int, int], None]
"""`(channel, completion, buffer, buffer length, flags)`: one incoming packet, to be completed exactly once."""
EvtVmbChannelProcessingComplete = Callable[[Channel, int], None]
"""`(channel, packets processed)`: a batch ended."""
EvtVmbChannelSavePacket = Callable[[Channel, Packet, memoryview, int], tuple[int, int]]
"""`(channel, packet, save buffer, its size) -> (status, bytes needed)`. First with a size of 0: success means that
there is nothing to save, a failure with bytes needed asks for a second call with a buffer of that size."""
EvtVmbChannelRestorePacket = Callable[[Channel, bytes, int, bytes, int], int]
"""`(channel, library's buffer, its size, save buffer, its size) -> status`: allocate a packet, pass the library's
buffer to VmbPacketRestore, rebuild the rest from the save buffer."""
EvtVmbPacketCompletionRoutine = Callable[[Packet, int, bytes, int], None]
"""`(packet, status, buffer, length)`: the packet is its owner's again; the buffer is the other end's answer."""


@dataclass
class VMB_CHANNEL_STATE_CHANGE_CALLBACKS:
    """State callbacks; `VMB_CHANNEL_STATE_CHANGE_CALLBACKS_INIT` fills in version and size."""

    Version: int = 0
    Size: int = 0
    EvtChannelOpened: EvtVmbChannelOpened | None = None
    EvtChannelClosed: EvtVmbChannelClosed | None = None
    EvtChannelSuspend: EvtVmbChannelSuspend | None = None
    EvtChannelStarted: EvtVmbChannelStarted | None = None
    EvtChannelPostStarted: EvtVmbChannelPostStarted | None = None


def VMB_CHANNEL_STATE_CHANGE_CALLBACKS_INIT(callbacks: VMB_CHANNEL_STATE_CHANGE_CALLBACKS) -> None:
    """Set version and size, and no callback at all."""
    for field in fields(callbacks):
        setattr(callbacks, field.name, field.default)
    callbacks.Version = VMB_CHANNEL_STATE_CHANGE_CALLBACKS_VERSION
    callbacks.Size = VMB_CHANNEL_STATE_CHANGE_CALLBACKS_SIZE


class VmbusHandle(Protocol):
    """One VM's bus instance."""

    def add_channel(self, channel: Any) -> None:
        """Tie a disabled channel to this bus."""


class ClientParent(Protocol):
    """What opens client channels."""

    def attach(self, client: ClientChannel) -> None:
        """Tie a disabled client channel to a driver: once enabled it is opened, when its offer is there."""


class DmaMemory(Protocol):
    """A guest's buffer that the device can reach: `size` bytes, contiguous from I/O address `iova`."""

    @property
    def iova(self) -> int: ...
    @property
    def size(self) -> int: ...
