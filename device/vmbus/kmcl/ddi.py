"""KMCL under its own names: the functions and callbacks of `VmbusKernelModeClientLibApi.h`, as thin functions over the
Pythonic API, so that a VSP or a VSC can be carried over line by line.

Handles are the library's own objects, so both faces can be mixed:

    VMBCHANNEL            `ServerChannel` or `ClientChannel`
    VMBPACKET             `Packet`
    VMBPACKETCOMPLETION   `Completion`
    PMDL, handed in       a chain of (I/O address, length in bytes) pairs
    PMDL, handed out      `Grant`: the memory as memoryviews
    VMBus handle          what has `add_channel`: a provider's `Host`, a `Device`
    parent of a client    what has `attach`: the guest's driver, a `LoopbackBus`

What became of C:

* A function that returns NTSTATUS returns a `Status`; its out-parameters follow in a tuple, in the header's order, 0 or
  None after a failure. The text of a failure goes to this module's log at level INFO.
* A buffer knows its size, so sizes of buffers are no parameters. Callbacks do get them, as in C.
* A function that returns nothing in C can only fail by misuse, which raises (`ChannelStateError` names the channel, the
  packet and the call that was expected). Where a wait is bounded here and endless there, it returns a `Status` instead.
* No failure that the contract documents leaves as an exception. Damaged state is DATA_ERROR, a wait that ran out
  CANCELLED. A server's function on a client channel, or the reverse, is INVALID_PARAMETER_1.

`FUNCTIONS` and `CALLBACKS` list everything, with the Pythonic counterpart and the deviations.

Source: the public WDK pages of the header.
"""

# The header's names are kept, also where they are not Python's style.

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast
from uuid import UUID

from vmbus.complaints import bounded_log
from vmbus.errors import StateError, WaitTimeout
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import NIL, ClientChannel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.status import ChannelStateError, KmclError, Status
from vmbus.memory import Grant
from vmbus.wire.gpa import PAGE_SIZE, GpaRange

if TYPE_CHECKING:
    # The server endpoint saves, for which it needs msgspec; a guest need not have that.
    from vmbus.kmcl.server import ServerChannel

log = bounded_log(__name__)

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

_WAIT = VMBUS_CHANNEL_FORMAT_FLAG_WAIT_FOR_COMPLETION
_SEND_FLAGS = _WAIT | VMBUS_CHANNEL_FORMAT_FLAG_FORCE_MDL_LENGTH | VMBUS_CHANNEL_FORMAT_FLAG_PAGED_BUFFER

VMB_CHANNEL_STATE_CHANGE_CALLBACKS_VERSION = 1
VMB_CHANNEL_STATE_CHANGE_CALLBACKS_SIZE = 48  # two 32-bit words and five pointers

_TICKS_PER_SECOND = 10_000_000


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
    callbacks.Version = VMB_CHANNEL_STATE_CHANGE_CALLBACKS_VERSION
    callbacks.Size = VMB_CHANNEL_STATE_CHANGE_CALLBACKS_SIZE
    callbacks.EvtChannelOpened = None
    callbacks.EvtChannelClosed = None
    callbacks.EvtChannelSuspend = None
    callbacks.EvtChannelStarted = None
    callbacks.EvtChannelPostStarted = None


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


# ---- the table -------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One function or callback. `endpoint`: S server only, C client only, B both."""

    name: str
    endpoint: str
    counterpart: str
    deviation: str


FUNCTIONS: dict[str, Entry] = {}

CALLBACKS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("EvtVmbChannelOpened", "B", "Channel.set_state_change_callbacks", ""),
        Entry("EvtVmbChannelClosed", "B", "Channel.set_state_change_callbacks", ""),
        Entry("EvtVmbChannelSuspend", "B", "Channel.set_state_change_callbacks", ""),
        Entry("EvtVmbChannelStarted", "B", "Channel.set_state_change_callbacks", ""),
        Entry("EvtVmbChannelPostStarted", "B", "Channel.set_state_change_callbacks", ""),
        Entry("EvtVmbChannelPnpFailure", "C", "ClientChannel.set_target_pnp", ""),
        Entry(
            "EvtVmbChannelProcessPacket",
            "B",
            "Channel.set_process_packet_callbacks",
            "Called on the channel's one thread, at no IRQL; an exception fails the channel.",
        ),
        Entry("EvtVmbChannelProcessingComplete", "B", "Channel.set_process_packet_callbacks", ""),
        Entry(
            "EvtVmbChannelSavePacket",
            "S",
            "ServerChannel.set_save_restore_packet_callbacks",
            "Returns (status, bytes needed). The second buffer has exactly the size asked for and is saved whole; a "
            "first call that fails and needs 0 bytes fails the save.",
        ),
        Entry("EvtVmbChannelRestorePacket", "S", "ServerChannel.set_save_restore_packet_callbacks", ""),
        Entry("EvtVmbPacketCompletionRoutine", "B", "Packet.completion_routine", ""),
    )
}

P = ParamSpec("P")
R = TypeVar("R")


def _status_of(error: Exception) -> Status:
    if isinstance(error, KmclError):
        return error.status
    return Status.DATA_ERROR if isinstance(error, StateError) else Status.CANCELLED


def _listed(endpoint: str, counterpart: str, deviation: str = "") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function of the table whose failures are misuse, and raise."""

    def enter(function: Callable[P, R]) -> Callable[P, R]:
        FUNCTIONS[function.__name__] = Entry(function.__name__, endpoint, counterpart, deviation)
        return function

    return enter


def _ddi(
    endpoint: str, counterpart: str, deviation: str = "", *, failed: Callable[[Status], Any] = lambda status: status
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function of the table whose failures become its status; `failed` gives the whole result."""

    def enter(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        FUNCTIONS[name] = Entry(name, endpoint, counterpart, deviation)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except (KmclError, StateError, WaitTimeout) as error:
                log.info("%s: %s", name, error)
                return cast(R, failed(_status_of(error)))

        return call

    return enter


def _with_zero(status: Status) -> tuple[Status, int]:
    return status, 0


def _with_none(status: Status) -> tuple[Status, None]:
    return status, None


def _server(channel: Channel) -> ServerChannel:
    if isinstance(channel, ClientChannel):
        raise ChannelStateError(
            f"channel {channel.name} is a client's: this call is the server's", Status.INVALID_PARAMETER_1
        )
    return cast("ServerChannel", channel)


def _client(channel: Channel) -> ClientChannel:
    if not isinstance(channel, ClientChannel):
        raise ChannelStateError(
            f"channel {channel.name} is a server's: this call is the client's", Status.INVALID_PARAMETER_1
        )
    return channel


def _endpoint(channel: Channel) -> ServerChannel | ClientChannel:
    return channel if isinstance(channel, ClientChannel) else cast("ServerChannel", channel)


def _known_flags(flags: int, known: int, what: str, status: Status) -> None:
    if flags & ~known:
        raise KmclError(f"flags {flags:#x} of {what}: only {known:#x} exist", status)


def _failure(status: int) -> Status:
    """The status of a callback that failed, as one of ours."""
    try:
        return Status(status)
    except ValueError:
        return Status.UNSUCCESSFUL


# ---- set-up, while disabled ------------------------------------------------------------------------------------------


@_ddi(
    "B",
    "ServerChannel / ClientChannel",
    "Parent is no device object. A client's has `attach`, or is None when something else opens the channel; a server's "
    "is not looked at: VmbServerChannelInitSetVmbusHandle binds it.",
    failed=_with_none,
)
def VmbChannelAllocate(parent: ClientParent | None, is_server: bool) -> tuple[Status, Channel | None]:
    """A disabled channel: `(status, channel)`."""
    if is_server:
        from vmbus.kmcl.server import ServerChannel

        return Status.SUCCESS, ServerChannel()
    client = ClientChannel()
    if parent is not None:
        parent.attach(client)
    return Status.SUCCESS, client


@_ddi("B", "Channel.set_flags")
def VmbChannelInitSetFlags(channel: Channel, flags: int) -> Status:
    """IS_PIPE or nothing. INVALID_PARAMETER_1: not disabled; _2: unknown bits."""
    channel.set_flags(flags)
    return Status.SUCCESS


@_ddi("B", "Channel.set_maximum_packet_size", "The size of the rings is the client's to choose and is not derived.")
def VmbChannelInitSetMaximumPacketSize(channel: Channel, maximum_packet_size: int) -> Status:
    """Largest payload in bytes. INVALID_PARAMETER_1: not disabled; _2: 0."""
    channel.set_maximum_packet_size(maximum_packet_size)
    return Status.SUCCESS


@_ddi("B", "Channel.set_maximum_external_data")
def VmbChannelInitSetMaximumExternalData(
    channel: Channel, maximum_external_data_size: int, maximum_external_data_chain_length: int
) -> Status:
    """Most bytes and most ranges that one packet describes. INVALID_PARAMETER_1: not disabled; _2: no bytes; _3: no
    ranges."""
    channel.set_maximum_external_data(maximum_external_data_size, maximum_external_data_chain_length)
    return Status.SUCCESS


@_ddi("B", "Channel.set_client_context_size", "The scratch area is `context` of the completion, a bytearray.")
def VmbChannelInitSetClientContextSize(channel: Channel, client_context_size: int) -> Status:
    """Scratch bytes on every incoming packet. INVALID_PARAMETER_1: not disabled."""
    channel.set_client_context_size(client_context_size)
    return Status.SUCCESS


@_ddi("B", "Channel.set_process_packet_callbacks")
def VmbChannelInitSetProcessPacketCallbacks(
    channel: Channel,
    process_packet: EvtVmbChannelProcessPacket,
    processing_complete: EvtVmbChannelProcessingComplete | None = None,
) -> Status:
    """Who gets incoming packets, and who learns of the end of a batch. INVALID_PARAMETER_1: not disabled."""

    def process(channel: Channel, completion: Completion, payload: bytes) -> None:
        flags = VMBUS_CHANNEL_PROCESS_PACKET_FLAG_EXTERNAL_DATA if completion.has_external_data else 0
        process_packet(channel, completion, payload, len(payload), flags)

    channel.set_process_packet_callbacks(process, processing_complete)
    return Status.SUCCESS


@_ddi("B", "Channel.set_state_change_callbacks")
def VmbChannelInitSetStateChangeCallbacks(channel: Channel, callbacks: VMB_CHANNEL_STATE_CHANGE_CALLBACKS) -> Status:
    """Who learns of state changes; the structure is copied. INVALID_PARAMETER_1: not disabled; _2: its version or size
    is not ours."""
    if (callbacks.Version, callbacks.Size) != (
        VMB_CHANNEL_STATE_CHANGE_CALLBACKS_VERSION,
        VMB_CHANNEL_STATE_CHANGE_CALLBACKS_SIZE,
    ):
        raise KmclError(
            f"channel {channel.name}: state callbacks of version {callbacks.Version} and size {callbacks.Size}; "
            "VMB_CHANNEL_STATE_CHANGE_CALLBACKS_INIT sets both",
            Status.INVALID_PARAMETER_2,
        )
    on_opened = callbacks.EvtChannelOpened

    def opened(channel: Channel) -> None:
        assert on_opened is not None
        status = on_opened(channel)
        if not NT_SUCCESS(status):
            raise KmclError(f"EvtVmbChannelOpened of channel {channel.name} refused: {status:#010x}", _failure(status))

    channel.set_state_change_callbacks(
        opened=None if on_opened is None else opened,
        closed=callbacks.EvtChannelClosed,
        suspend=callbacks.EvtChannelSuspend,
        started=callbacks.EvtChannelStarted,
        post_started=callbacks.EvtChannelPostStarted,
    )
    return Status.SUCCESS


@_ddi("B", "Channel.set_friendly_name")
def VmbChannelInitSetFriendlyName(channel: Channel, friendly_name: str) -> Status:
    """The name in logs, errors and counters. INVALID_PARAMETER_1: not disabled."""
    channel.set_friendly_name(friendly_name)
    return Status.SUCCESS


@_ddi("S", "ServerChannel.set_server_flags")
def VmbServerChannelInitSetFlags(channel: Channel, flags: int) -> Status:
    """VMBUS_SERVER_CHANNEL_INIT_FLAG_* bits. INVALID_PARAMETER_1: not disabled; _2: unknown bits."""
    _server(channel).set_server_flags(flags)
    return Status.SUCCESS


@_ddi(
    "S",
    "ServerChannel.set_mmio_megabytes",
    "Travels in the offer; the guest has no MMIO space to give, so nothing is reserved.",
)
def VmbServerChannelInitSetMmioMegabytes(
    channel: Channel, mmio_megabytes: int, mmio_megabytes_optional: int = 0
) -> Status:
    """MMIO space that the guest is asked for. INVALID_PARAMETER_1: not disabled; INVALID_PARAMETER: both 0."""
    _server(channel).set_mmio_megabytes(mmio_megabytes, mmio_megabytes_optional)
    return Status.SUCCESS


@_ddi("S", "ServerChannel.set_target_interface_id")
def VmbServerChannelInitSetTargetInterfaceId(
    channel: Channel, interface_type: UUID, interface_instance: UUID
) -> Status:
    """The GUIDs of the offer. INVALID_PARAMETER_1: not disabled."""
    _server(channel).set_target_interface_id(interface_type, interface_instance)
    return Status.SUCCESS


@_ddi("S", "ServerChannel.set_target_vtl", "There are no virtual trust levels: only 0 is taken.")
def VmbServerChannelInitSetTargetVtl(channel: Channel, target_vtl: int) -> Status:
    """The trust level that sees the offer. INVALID_PARAMETER_1: not disabled; _2: any but 0."""
    _server(channel).set_target_vtl(target_vtl)
    return Status.SUCCESS


@_ddi("S", "ServerChannel.set_save_restore_packet_callbacks")
def VmbServerChannelInitSetSaveRestorePacketCallbacks(
    channel: Channel, save_packet: EvtVmbChannelSavePacket, restore_packet: EvtVmbChannelRestorePacket
) -> Status:
    """Who saves and rebuilds packets. INVALID_PARAMETER_1: not disabled."""

    def save(channel: Channel, packet: Packet, buffer: memoryview) -> int:
        size = len(buffer)
        status, needed = save_packet(channel, packet, buffer, size)
        if NT_SUCCESS(status):
            return size
        if size == 0 and needed > 0:
            return needed
        raise KmclError(
            f"EvtVmbChannelSavePacket of channel {channel.name} failed with {status:#010x} for packet "
            f"{packet.transaction} and a buffer of {size} bytes",
            _failure(status),
        )

    def restore(channel: Channel, lib_buf: bytes, save_buf: bytes) -> None:
        status = restore_packet(channel, lib_buf, len(lib_buf), save_buf, len(save_buf))
        if not NT_SUCCESS(status):
            raise KmclError(
                f"EvtVmbChannelRestorePacket of channel {channel.name} failed with {status:#010x}", _failure(status)
            )

    _server(channel).set_save_restore_packet_callbacks(save, restore)
    return Status.SUCCESS


@_ddi("S", "ServerChannel.bind", "The handle is an object with `add_channel`, such as a provider's host.")
def VmbServerChannelInitSetVmbusHandle(channel: Channel, vmbus_handle: VmbusHandle) -> Status:
    """Tie the channel to one VM's bus. INVALID_PARAMETER_1: not disabled; _2: not a bus."""
    server = _server(channel)
    if not hasattr(vmbus_handle, "add_channel"):
        raise KmclError(f"channel {channel.name}: {vmbus_handle!r} is no VMBus handle", Status.INVALID_PARAMETER_2)
    vmbus_handle.add_channel(server)
    return Status.SUCCESS


@_ddi(
    "S",
    "ServerChannel.bind",
    "There is no user mode to come from: the handle itself is returned.",
    failed=_with_none,
)
def VmbConvertVmbusHandleToKernelHandle(vmbus_handle: VmbusHandle) -> tuple[Status, VmbusHandle | None]:
    """`(status, handle)`. INVALID_PARAMETER_1: not a bus."""
    if not hasattr(vmbus_handle, "add_channel"):
        raise KmclError(f"{vmbus_handle!r} is no VMBus handle", Status.INVALID_PARAMETER_1)
    return Status.SUCCESS, vmbus_handle


@_ddi("C", "ClientChannel.set_target_pnp")
def VmbClientChannelInitSetTargetPnp(
    channel: Channel,
    interface_type: UUID,
    interface_instance: UUID | None = None,
    pnp_failure_callback: EvtVmbChannelPnpFailure | None = None,
) -> Status:
    """Which offer to accept; without an instance any of the type. INVALID_PARAMETER_1: not disabled."""
    _client(channel).set_target_pnp(interface_type, interface_instance, pnp_failure_callback)
    return Status.SUCCESS


@_ddi("C", "ClientChannel.set_ring_buffer_page_count")
def VmbClientChannelInitSetRingBufferPageCount(
    channel: Channel, incoming_page_count: int, outgoing_page_count: int
) -> Status:
    """Data pages (4096 bytes) of the two rings. INVALID_PARAMETER_1: not disabled; INVALID_PARAMETER: none."""
    _client(channel).set_ring_buffer_page_count(incoming_page_count, outgoing_page_count)
    return Status.SUCCESS


# ---- life ------------------------------------------------------------------------------------------------------------


@_ddi("B", "Channel.enable")
def VmbChannelEnable(channel: Channel) -> Status:
    """Offer the channel, or wait for its offer. Returns at once. INVALID_DEVICE_STATE: not disabled, or not set up."""
    _endpoint(channel).enable()
    return Status.SUCCESS


@_ddi("B", "Channel.disable", "Void in C, with an endless wait. The wait is bounded: CANCELLED when it ran out.")
def VmbChannelDisable(channel: Channel) -> Status:
    """Take the channel away, and wait until it is closed."""
    _endpoint(channel).disable()
    return Status.SUCCESS


@_ddi("B", "Channel.start", "Void in C. INVALID_DEVICE_STATE where the contract forbids the call.")
def VmbChannelStart(channel: Channel) -> Status:
    """Take and send packets whenever the channel is open."""
    channel.start()
    return Status.SUCCESS


@_ddi(
    "B",
    "Channel.pause",
    "Void in C, with an endless wait. The wait is bounded: CANCELLED when it ran out (the log names the packets that "
    "were not completed; the channel stays paused). INVALID_DEVICE_STATE where the contract forbids the call.",
)
def VmbChannelPause(channel: Channel) -> Status:
    """Stop taking and sending packets, and wait until every incoming packet has been completed. On a disabled channel:
    come up paused."""
    channel.pause()
    return Status.SUCCESS


@_ddi("B", "Channel.cleanup", "Void in C. INVALID_DEVICE_STATE when the channel is not disabled.")
def VmbChannelCleanup(channel: Channel) -> Status:
    """Give a disabled channel up."""
    channel.cleanup()
    return Status.SUCCESS


@_listed("B", "Channel.pointer")
def VmbChannelSetPointer(channel: Channel, pointer: object) -> None:
    """The caller's context, never looked at."""
    channel.pointer = pointer


@_listed("B", "Channel.pointer")
def VmbChannelGetPointer(channel: Channel) -> Any:
    """The context of VmbChannelSetPointer, None before."""
    return channel.pointer


@_ddi(
    "C",
    "ClientChannel.set_interrupt_latency",
    "Signals are never held back here, so the value is kept and has no effect.",
    failed=_with_zero,
)
def VmbChannelSetInterruptLatency(channel: Channel, latency_in_100ns_units: int) -> tuple[Status, int]:
    """`(status, old latency)`. INVALID_DEVICE_STATE: not between Opened and Closed."""
    return Status.SUCCESS, _client(channel).set_interrupt_latency(latency_in_100ns_units)


@_ddi("B", "Channel.set_transaction_quota")
def VmbChannelSetTransactionQuota(channel: Channel, quota: int) -> Status:
    """Most incoming packets that may be outstanding. INVALID_PARAMETER_2: 0."""
    channel.set_transaction_quota(quota)
    return Status.SUCCESS


@_ddi("B", "Channel.set_incoming_processing_at_passive")
def VmbChannelSetIncomingProcessingAtPassive(channel: Channel, process_at_passive: bool) -> Status:
    """Hand packets over from a worker instead of inline."""
    channel.set_incoming_processing_at_passive(process_at_passive)
    return Status.SUCCESS


@_ddi("B", "Channel.interface_instance", failed=_with_none)
def VmbChannelGetInterfaceInstance(channel: Channel) -> tuple[Status, UUID | None]:
    """`(status, GUID)`. INVALID_DEVICE_STATE: none is known yet."""
    instance: UUID | None = getattr(channel, "interface_instance", None)
    if instance is None or instance == NIL:
        raise ChannelStateError(f"channel {channel.name} has no interface instance yet")
    return Status.SUCCESS, instance


@_listed("B", "Packet", "Python owns all memory: the size is a figure to pass to VmbPacketInitialize.")
def VmbChannelSizeofPacket(channel: Channel) -> int:
    """Bytes that VmbPacketInitialize needs for a packet of this channel."""
    return Packet.__basicsize__ + (channel.maximum_packet_size + 7 & ~7)


# ---- sending ---------------------------------------------------------------------------------------------------------


@_listed("B", "Channel.allocate_packet", "Never NULL.")
def VmbPacketAllocate(channel: Channel) -> Packet:
    """A packet that frees itself when it is complete."""
    return channel.allocate_packet()


@_ddi(
    "B",
    "Packet",
    "No memory is handed in, only its size; the packet is an out-parameter.",
    failed=_with_none,
)
def VmbPacketInitialize(channel: Channel, byte_count: int) -> tuple[Status, Packet | None]:
    """`(status, packet)`: a packet whose owner must set a completion routine before a send. INVALID_PARAMETER_3: fewer
    bytes than VmbChannelSizeofPacket says."""
    if byte_count < VmbChannelSizeofPacket(channel):
        raise KmclError(
            f"channel {channel.name}: {byte_count} bytes for a packet that takes {VmbChannelSizeofPacket(channel)}",
            Status.INVALID_PARAMETER_3,
        )
    return Status.SUCCESS, Packet(channel, owned_by_caller=True)


@_listed("B", "Packet.free")
def VmbPacketFree(packet: Packet) -> None:
    """Give a packet up; raises while it is in use."""
    packet.free()


@_listed("B", "Packet.pointer")
def VmbPacketSetPointer(packet: Packet, pointer: object) -> None:
    """The caller's context, never looked at."""
    packet.pointer = pointer


@_listed("B", "Packet.pointer")
def VmbPacketGetPointer(packet: Packet) -> Any:
    """The context of VmbPacketSetPointer, None before."""
    return packet.pointer


@_listed("B", "Packet.channel")
def VmbPacketGetChannel(packet: Packet) -> Channel:
    """The channel that the packet belongs to."""
    return packet.channel


@_listed("B", "Packet.completion_routine")
def VmbPacketSetCompletionRoutine(packet: Packet, completion_routine: EvtVmbPacketCompletionRoutine) -> None:
    """Who is told when the packet is complete."""

    def complete(packet: Packet, status: int, reply: bytes) -> None:
        completion_routine(packet, status, reply, len(reply))

    packet.completion_routine = complete


@_ddi("B", "Packet.send", "PAGED_BUFFER is taken and has no meaning: the buffer is always copied.")
def VmbPacketSend(packet: Packet, buffer: Buffer, external_data_mdl: Mdl | None = None, flags: int = 0) -> Status:
    """Send; queued in order when the ring is full. INVALID_DEVICE_STATE: not open; INVALID_DEVICE_REQUEST: the packet
    is in use, freed, or without a completion routine; INVALID_PARAMETER: too long, external data without
    WAIT_FOR_COMPLETION, either of the two on a pipe, or unknown flags."""
    _known_flags(flags, _SEND_FLAGS, "VmbPacketSend", Status.INVALID_PARAMETER)
    packet.send(bytes(buffer), external=external_data_mdl, wait_for_completion=flags & _WAIT != 0)
    return Status.SUCCESS


def _part(mdl: Mdl, offset: int, length: int) -> list[tuple[int, int]]:
    """`length` bytes (0: all the rest) of a chain from `offset` on."""
    total = sum(size for _, size in mdl)
    if offset < 0 or length < 0 or offset + length > total:
        raise KmclError(f"{length} bytes from {offset} on of an MDL chain of {total} bytes", Status.INVALID_PARAMETER)
    left = length or total - offset
    part = []
    for address, size in mdl:
        take = min(size - offset, left)
        if take > 0:
            part.append((address + offset, take))
            left -= take
        offset = max(0, offset - size)
    return part


def _forced(mdl: Mdl, offset: int, length: int) -> list[tuple[int, int]]:
    """FORCE_MDL_LENGTH: of the first MDL of the chain alone, and up to the end of its last page."""
    address, size = mdl[0]
    end = -(-(address + size) // PAGE_SIZE) * PAGE_SIZE
    if offset < 0 or length <= 0 or address + offset + length > end:
        raise KmclError(
            f"{length} bytes from {offset} on are forced out of an MDL whose pages end {end - address} bytes after its "
            "beginning",
            Status.INVALID_PARAMETER,
        )
    return [(address + offset, length)]


@_ddi("B", "Packet.send", "Only the guest's end can describe memory: INVALID_DEVICE_REQUEST on a server channel.")
def VmbPacketSendWithExternalMdl(
    packet: Packet, buffer: Buffer, external_data_mdl: Mdl, mdl_offset: int, mdl_length: int, flags: int
) -> Status:
    """Send with part of an MDL chain (`mdl_length` 0: all from the offset on). INVALID_PARAMETER: WAIT_FOR_COMPLETION
    is missing, unknown flags, or a part that is not in the chain."""
    _known_flags(flags, _SEND_FLAGS, "VmbPacketSendWithExternalMdl", Status.INVALID_PARAMETER)
    if not external_data_mdl:
        raise KmclError("VmbPacketSendWithExternalMdl with an empty MDL chain", Status.INVALID_PARAMETER)
    cut = _forced if flags & VMBUS_CHANNEL_FORMAT_FLAG_FORCE_MDL_LENGTH else _part
    part = cut(external_data_mdl, mdl_offset, mdl_length)
    packet.send(bytes(buffer), external=part, wait_for_completion=flags & _WAIT != 0)
    return Status.SUCCESS


@_ddi("B", "Packet.send", "Only the guest's end can describe memory: INVALID_DEVICE_REQUEST on a server channel.")
def VmbPacketSendWithExternalPfns(
    packet: Packet, buffer: Buffer, external_data_pfns: Sequence[int], pfn_count: int, flags: int
) -> Status:
    """Send with whole pages by their page numbers (I/O address / 4096). INVALID_PARAMETER: WAIT_FOR_COMPLETION is
    missing, unknown flags, or not that many pages."""
    _known_flags(flags, _SEND_FLAGS, "VmbPacketSendWithExternalPfns", Status.INVALID_PARAMETER)
    if not 0 < pfn_count <= len(external_data_pfns):
        raise KmclError(f"{pfn_count} of {len(external_data_pfns)} page numbers", Status.INVALID_PARAMETER)
    pages = GpaRange(pfn_count * PAGE_SIZE, 0, tuple(external_data_pfns[:pfn_count]))
    packet.send(bytes(buffer), external_ranges=[pages], wait_for_completion=flags & _WAIT != 0)
    return Status.SUCCESS


@_ddi(
    "B",
    "Channel.send_synchronous_request",
    "A timeout is None (a minute), 0, or negative: relative, in 100 ns. An absolute one is INVALID_PARAMETER. The "
    "completion size is that of the buffer; BUFFER_TOO_SMALL and the size needed when an answer is longer.",
    failed=_with_zero,
)
def VmbChannelSendSynchronousRequest(
    channel: Channel,
    buffer: Buffer,
    external_data_mdl: Mdl | None = None,
    flags: int = 0,
    completion_buffer: bytearray | memoryview | None = None,
    timeout: int | None = None,
) -> tuple[Status, int]:
    """Send, and wait for the answer: `(status, bytes written into the completion buffer)`. BUFFER_OVERFLOW: no room and
    not queued; CANCELLED: timed out; DEVICE_REMOVED: the channel is going away; INVALID_PARAMETER: the completion
    buffer is no multiple of 8 bytes."""
    _known_flags(flags, _SEND_FLAGS, "VmbChannelSendSynchronousRequest", Status.INVALID_PARAMETER)
    if timeout is not None and timeout > 0:
        raise KmclError(f"an absolute timeout ({timeout}); only relative ones are taken", Status.INVALID_PARAMETER)
    view = memoryview(bytearray() if completion_buffer is None else completion_buffer).cast("B")
    if len(view) % 8:
        raise KmclError(
            f"channel {channel.name}: a completion buffer of {len(view)} bytes, which is no multiple of 8",
            Status.INVALID_PARAMETER,
        )
    reply = channel.send_synchronous_request(
        bytes(buffer),
        external=external_data_mdl,
        wait_for_completion=flags & _WAIT != 0,
        timeout=None if timeout is None else -timeout / _TICKS_PER_SECOND,
    )
    if len(reply) > len(view):
        return Status.BUFFER_TOO_SMALL, len(reply)
    view[: len(reply)] = reply
    return Status.SUCCESS, len(reply)


@_ddi("S", "ServerChannel.restore_packet")
def VmbPacketRestore(packet: Packet, buffer: Buffer) -> Status:
    """Give a fresh packet the library's saved state, inside EvtVmbChannelRestorePacket. INVALID_PARAMETER_1: a packet
    in use or of another channel; INVALID_DEVICE_REQUEST: outside of the callback; DATA_ERROR: damaged, or restored
    before."""
    _server(packet.channel).restore_packet(packet, bytes(buffer))
    return Status.SUCCESS


# ---- receiving -------------------------------------------------------------------------------------------------------


@_listed("B", "Completion.complete")
def VmbChannelPacketComplete(completion: Completion, buffer: Buffer = b"") -> None:
    """Finish an incoming packet, with an answer if the sender asked for one; raises when it was finished before."""
    completion.complete(bytes(buffer))


@_listed("B", "Completion.fail")
def VmbChannelPacketFail(completion: Completion) -> None:
    """The packet is malformed beyond recovery: the channel's queue stops."""
    completion.fail("VmbChannelPacketFail")


@_ddi(
    "B",
    "Completion.defer_to_passive",
    "Void in C. INVALID_DEVICE_REQUEST when called from elsewhere than inline in EvtVmbChannelProcessPacket.",
)
def VmbChannelPacketDeferToPassive(completion: Completion) -> Status:
    """Have the packet handed over again from a worker."""
    completion.defer_to_passive()
    return Status.SUCCESS


@_ddi(
    "B",
    "Completion.external_data",
    "Never PENDING: guest memory is always present. DATA_ERROR when the guest described memory that it did not make "
    "reachable.",
    failed=_with_none,
)
def VmbChannelPacketGetExternalData(completion: Completion, flags: int = 0) -> tuple[Status, Grant | None]:
    """`(status, memory)`: what the packet describes, until the packet is completed. INVALID_PARAMETER_2: unknown flags;
    INVALID_DEVICE_REQUEST: the packet describes nothing."""
    known = VMBUS_CHANNEL_PACKET_EXTERNAL_DATA_FLAG_READ_ONLY
    _known_flags(flags, known, "VmbChannelPacketGetExternalData", Status.INVALID_PARAMETER_2)
    return Status.SUCCESS, completion.external_data(read_only=flags & known != 0)


# ---- GPADLs ----------------------------------------------------------------------------------------------------------


def _create_gpadl(channel: Channel, flags: int, extents: list[tuple[int, int]]) -> tuple[Status, int]:
    known = VMBUS_CHANNEL_GPADL_FLAG_READ_ONLY
    _known_flags(flags, known, "a GPADL", Status.INVALID_PARAMETER_2)
    return Status.SUCCESS, _client(channel).create_gpadl(extents, read_only=flags & known != 0)


@_ddi(
    "C",
    "ClientChannel.create_gpadl",
    "The buffer is one of the driver's, which knows its I/O address.",
    failed=_with_zero,
)
def VmbChannelCreateGpadlFromBuffer(channel: Channel, flags: int, buffer: DmaMemory, length: int) -> tuple[Status, int]:
    """`(status, handle)`, once the server knows it: the first `length` bytes of a buffer. INVALID_PARAMETER_2: unknown
    flags; INVALID_PARAMETER: not so long."""
    return _create_gpadl(_client(channel), flags, _part([(buffer.iova, buffer.size)], 0, _some(length)))


@_ddi("C", "ClientChannel.create_gpadl", failed=_with_zero)
def VmbChannelCreateGpadlFromMdl(
    channel: Channel, flags: int, mdl: Mdl, mdl_offset: int, length: int
) -> tuple[Status, int]:
    """`(status, handle)`, once the server knows it: part of an MDL chain. INVALID_PARAMETER_2: unknown flags;
    INVALID_PARAMETER: not in the chain."""
    return _create_gpadl(_client(channel), flags, _part(mdl, mdl_offset, _some(length)))


def _some(length: int) -> int:
    if length <= 0:
        raise KmclError(f"a GPADL of {length} bytes", Status.INVALID_PARAMETER)
    return length


@_ddi(
    "C",
    "ClientChannel.delete_gpadl",
    "Void in C, with an endless wait. CANCELLED when the bounded wait ran out: the GPADL then goes when the server "
    "unmaps it.",
)
def VmbChannelDeleteGpadl(channel: Channel, gpadl: int) -> Status:
    """Take a GPADL back; waits while the server has it mapped. INVALID_PARAMETER: there is no such GPADL."""
    _client(channel).delete_gpadl(gpadl)
    return Status.SUCCESS


@_ddi("S", "ServerChannel.map_gpadl", failed=_with_none)
def VmbChannelMapGpadl(channel: Channel, flags: int, gpadl: int) -> tuple[Status, Grant | None]:
    """`(status, memory)`, one mapping at a time; with READ_ONLY its pages stay out of the dirty log.
    INVALID_PARAMETER_2: unknown flags."""
    known = VMBUS_CHANNEL_GPADL_FLAG_READ_ONLY
    server = _server(channel)
    _known_flags(flags, known, "VmbChannelMapGpadl", Status.INVALID_PARAMETER_2)
    return Status.SUCCESS, server.map_gpadl(gpadl, read_only=flags & known != 0)


@_ddi("S", "ServerChannel.unmap_gpadl", "Void in C.")
def VmbChannelUnmapGpadl(channel: Channel, gpadl: int) -> Status:
    """End a mapping; its memory is not to be touched any more."""
    _server(channel).unmap_gpadl(gpadl)
    return Status.SUCCESS


# ---- save and restore ------------------------------------------------------------------------------------------------


@_ddi("S", "ServerChannel.save_begin")
def VmbChannelSaveBegin(channel: Channel) -> Status:
    """Set up a save. INVALID_DEVICE_STATE: active, incoming packets not completed, or a save has begun already."""
    _server(channel).save_begin()
    return Status.SUCCESS


def _save_failed(status: Status) -> tuple[Status, int, int]:
    return status, 0, 0


@_ddi("S", "ServerChannel.save_continue", failed=_save_failed)
def VmbChannelSaveContinue(channel: Channel, save_buffer: bytearray | memoryview) -> tuple[Status, int, int]:
    """`(status, bytes filled, bytes required)`: a whole number of chunks. SUCCESS: that was all; BUFFER_OVERFLOW: more
    follow, the next one of so many bytes; BUFFER_TOO_SMALL: not one fitted. INVALID_DEVICE_STATE: no save has begun."""
    view = memoryview(save_buffer).cast("B")
    step = _server(channel).save_continue(len(view))
    view[: len(step.data)] = step.data
    if not step.more:
        return Status.SUCCESS, len(step.data), 0
    return (
        Status.BUFFER_OVERFLOW if step.data else Status.BUFFER_TOO_SMALL,
        len(step.data),
        step.required,
    )


@_ddi("S", "ServerChannel.save_end", "Void in C.")
def VmbChannelSaveEnd(channel: Channel) -> Status:
    """End a save, finished or not."""
    _server(channel).save_end()
    return Status.SUCCESS


@_ddi("S", "ServerChannel.restore_from_buffer", "Damaged chunks are DATA_ERROR.")
def VmbChannelRestoreFromBuffer(channel: Channel, buffer: Buffer) -> Status:
    """Take whole chunks. SUCCESS: restored; MORE_PROCESSING_REQUIRED: more are to come; else failed."""
    complete = _server(channel).restore_from_buffer(bytes(buffer))
    return Status.SUCCESS if complete else Status.MORE_PROCESSING_REQUIRED
