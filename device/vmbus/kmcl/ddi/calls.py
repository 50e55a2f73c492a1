"""Functions that convert something on the way: buffers, flags, callbacks, chains of memory."""

# ruff: noqa: F403, F405 - the header is included, as in C; mypy finds a name that is not there

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import NIL, ClientChannel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.ddi.header import *
from vmbus.kmcl.ddi.table import listed, returns_status, the_client, the_server
from vmbus.kmcl.packet import Packet
from vmbus.kmcl.status import ChannelStateError, KmclError, Status
from vmbus.memory.guest import Grant
from vmbus.wire.gpa import PAGE_SIZE, GpaRange

_WAIT = VMBUS_CHANNEL_FORMAT_FLAG_WAIT_FOR_COMPLETION
_SEND_FLAGS = _WAIT | VMBUS_CHANNEL_FORMAT_FLAG_FORCE_MDL_LENGTH | VMBUS_CHANNEL_FORMAT_FLAG_PAGED_BUFFER
_TICKS_PER_SECOND = 10_000_000


def _known_flags(flags: int, known: int, what: str, status: Status) -> int:
    if flags & ~known:
        raise KmclError(f"flags {flags:#x} of {what}: only {known:#x} exist", status)
    return flags


def _waits(flags: int, what: str) -> bool:
    return _known_flags(flags, _SEND_FLAGS, what, Status.INVALID_PARAMETER) & _WAIT != 0


def _read_only(flags: int, what: str) -> bool:
    return _known_flags(flags, VMBUS_CHANNEL_GPADL_FLAG_READ_ONLY, what, Status.INVALID_PARAMETER_2) != 0


def _failure(status: int) -> Status:
    """The status of a callback that failed, as one of ours."""
    try:
        return Status(status)
    except ValueError:
        return Status.UNSUCCESSFUL


# ---- set-up, while disabled ------------------------------------------------------------------------------------------


@returns_status(
    "B",
    "ServerChannel / ClientChannel",
    "Parent is no device object. A client's has `attach`, or is None when something else opens the channel; a server's "
    "is not looked at: VmbServerChannelInitSetVmbusHandle binds it.",
    failed=(None,),
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


@returns_status("B", "Channel.set_process_packet_callbacks")
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


@returns_status("B", "Channel.set_state_change_callbacks")
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


@returns_status("S", "ServerChannel.set_save_restore_packet_callbacks")
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

    the_server(channel).set_save_restore_packet_callbacks(save, restore)
    return Status.SUCCESS


@returns_status("S", "ServerChannel.bind", "The handle is an object with `add_channel`, such as a provider's host.")
def VmbServerChannelInitSetVmbusHandle(channel: Channel, vmbus_handle: VmbusHandle) -> Status:
    """Tie the channel to one VM's bus. INVALID_PARAMETER_1: not disabled; _2: not a bus."""
    server = the_server(channel)
    if not hasattr(vmbus_handle, "add_channel"):
        raise KmclError(f"channel {channel.name}: {vmbus_handle!r} is no VMBus handle", Status.INVALID_PARAMETER_2)
    vmbus_handle.add_channel(server)
    return Status.SUCCESS


@returns_status(
    "S", "ServerChannel.bind", "There is no user mode to come from: the handle itself is returned.", failed=(None,)
)
def VmbConvertVmbusHandleToKernelHandle(vmbus_handle: VmbusHandle) -> tuple[Status, VmbusHandle | None]:
    """`(status, handle)`. INVALID_PARAMETER_1: not a bus."""
    if not hasattr(vmbus_handle, "add_channel"):
        raise KmclError(f"{vmbus_handle!r} is no VMBus handle", Status.INVALID_PARAMETER_1)
    return Status.SUCCESS, vmbus_handle


# ---- life ------------------------------------------------------------------------------------------------------------


@returns_status(
    "C",
    "ClientChannel.set_interrupt_latency",
    "Signals are never held back here, so the value is kept and has no effect.",
    failed=(0,),
)
def VmbChannelSetInterruptLatency(channel: Channel, latency_in_100ns_units: int) -> tuple[Status, int]:
    """`(status, old latency)`. INVALID_DEVICE_STATE: not between Opened and Closed."""
    return Status.SUCCESS, the_client(channel).set_interrupt_latency(latency_in_100ns_units)


@returns_status(
    "C",
    "ClientChannel.get_mmio_space",
    "Void in C. There is no MMIO space besides the device's own registers, whatever the offer asks for: "
    "INSUFFICIENT_RESOURCES on an open channel.",
    failed=(0, 0),
)
def VmbChannelGetMmioSpace(channel: Channel) -> tuple[Status, int, int]:
    """`(status, address, size in bytes)`. INVALID_DEVICE_STATE: not between Opened and Closed."""
    return Status.SUCCESS, *the_client(channel).get_mmio_space()


@returns_status("B", "Channel.interface_instance", failed=(None,))
def VmbChannelGetInterfaceInstance(channel: Channel) -> tuple[Status, UUID | None]:
    """`(status, GUID)`. INVALID_DEVICE_STATE: none is known yet."""
    instance: UUID | None = getattr(channel, "interface_instance", None)
    if instance is None or instance == NIL:
        raise ChannelStateError(f"channel {channel.name} has no interface instance yet")
    return Status.SUCCESS, instance


@listed("B", "Packet", "Python owns all memory: the size is a figure to pass to VmbPacketInitialize.")
def VmbChannelSizeofPacket(channel: Channel) -> int:
    """Bytes that VmbPacketInitialize needs for a packet of this channel."""
    return Packet.__basicsize__ + (channel.maximum_packet_size + 7 & ~7)


# ---- sending ---------------------------------------------------------------------------------------------------------


@returns_status("B", "Packet", "No memory is handed in, only its size; the packet is an out-parameter.", failed=(None,))
def VmbPacketInitialize(channel: Channel, byte_count: int) -> tuple[Status, Packet | None]:
    """`(status, packet)`: a packet whose owner must set a completion routine before a send. INVALID_PARAMETER_3: fewer
    bytes than VmbChannelSizeofPacket says."""
    if byte_count < VmbChannelSizeofPacket(channel):
        raise KmclError(
            f"channel {channel.name}: {byte_count} bytes for a packet that takes {VmbChannelSizeofPacket(channel)}",
            Status.INVALID_PARAMETER_3,
        )
    return Status.SUCCESS, Packet(channel, owned_by_caller=True)


@listed("B", "Packet.completion_routine")
def VmbPacketSetCompletionRoutine(packet: Packet, completion_routine: EvtVmbPacketCompletionRoutine) -> None:
    """Who is told when the packet is complete."""

    def complete(packet: Packet, status: int, reply: bytes) -> None:
        completion_routine(packet, status, reply, len(reply))

    packet.completion_routine = complete


@returns_status("B", "Packet.send", "PAGED_BUFFER is taken and has no meaning: the buffer is always copied.")
def VmbPacketSend(packet: Packet, buffer: Buffer, external_data_mdl: Mdl | None = None, flags: int = 0) -> Status:
    """Send; queued in order when the ring is full. INVALID_DEVICE_STATE: not open; INVALID_DEVICE_REQUEST: the packet
    is in use, freed, or without a completion routine; INVALID_PARAMETER: too long, external data without
    WAIT_FOR_COMPLETION, either of the two on a pipe, or unknown flags."""
    packet.send(bytes(buffer), external=external_data_mdl, wait_for_completion=_waits(flags, "VmbPacketSend"))
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


@returns_status(
    "B", "Packet.send", "Only the guest's end can describe memory: INVALID_DEVICE_REQUEST on a server channel."
)
def VmbPacketSendWithExternalMdl(
    packet: Packet, buffer: Buffer, external_data_mdl: Mdl, mdl_offset: int, mdl_length: int, flags: int
) -> Status:
    """Send with part of an MDL chain (`mdl_length` 0: all from the offset on). INVALID_PARAMETER: WAIT_FOR_COMPLETION
    is missing, unknown flags, or a part that is not in the chain."""
    wait = _waits(flags, "VmbPacketSendWithExternalMdl")
    if not external_data_mdl:
        raise KmclError("VmbPacketSendWithExternalMdl with an empty MDL chain", Status.INVALID_PARAMETER)
    cut = _forced if flags & VMBUS_CHANNEL_FORMAT_FLAG_FORCE_MDL_LENGTH else _part
    packet.send(bytes(buffer), external=cut(external_data_mdl, mdl_offset, mdl_length), wait_for_completion=wait)
    return Status.SUCCESS


@returns_status(
    "B", "Packet.send", "Only the guest's end can describe memory: INVALID_DEVICE_REQUEST on a server channel."
)
def VmbPacketSendWithExternalPfns(
    packet: Packet, buffer: Buffer, external_data_pfns: Sequence[int], pfn_count: int, flags: int
) -> Status:
    """Send with whole pages by their page numbers (I/O address / 4096). INVALID_PARAMETER: WAIT_FOR_COMPLETION is
    missing, unknown flags, or not that many pages."""
    wait = _waits(flags, "VmbPacketSendWithExternalPfns")
    if not 0 < pfn_count <= len(external_data_pfns):
        raise KmclError(f"{pfn_count} of {len(external_data_pfns)} page numbers", Status.INVALID_PARAMETER)
    pages = GpaRange(pfn_count * PAGE_SIZE, 0, tuple(external_data_pfns[:pfn_count]))
    packet.send(bytes(buffer), external_ranges=[pages], wait_for_completion=wait)
    return Status.SUCCESS


@returns_status(
    "B",
    "Channel.send_synchronous_request",
    "A timeout is None (a minute), 0, or negative: relative, in 100 ns. An absolute one is INVALID_PARAMETER. The "
    "completion size is that of the buffer; BUFFER_TOO_SMALL and the size needed when an answer is longer.",
    failed=(0,),
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
    wait = _waits(flags, "VmbChannelSendSynchronousRequest")
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
        wait_for_completion=wait,
        timeout=None if timeout is None else -timeout / _TICKS_PER_SECOND,
    )
    if len(reply) > len(view):
        return Status.BUFFER_TOO_SMALL, len(reply)
    view[: len(reply)] = reply
    return Status.SUCCESS, len(reply)


@returns_status("S", "ServerChannel.restore_packet")
def VmbPacketRestore(packet: Packet, buffer: Buffer) -> Status:
    """Give a fresh packet the library's saved state, inside EvtVmbChannelRestorePacket. INVALID_PARAMETER_1: a packet
    in use or of another channel; INVALID_DEVICE_REQUEST: outside of the callback; DATA_ERROR: damaged, or restored
    before."""
    the_server(packet.channel).restore_packet(packet, bytes(buffer))
    return Status.SUCCESS


# ---- receiving -------------------------------------------------------------------------------------------------------


@listed("B", "Completion.complete")
def VmbChannelPacketComplete(completion: Completion, buffer: Buffer = b"") -> None:
    """Finish an incoming packet, with an answer if the sender asked for one; raises when it was finished before."""
    completion.complete(bytes(buffer))


@listed("B", "Completion.fail")
def VmbChannelPacketFail(completion: Completion) -> None:
    """The packet is malformed beyond recovery: the channel's queue stops."""
    completion.fail("VmbChannelPacketFail")


@returns_status(
    "B",
    "Completion.external_data",
    "Never PENDING: guest memory is always present. DATA_ERROR when the guest described memory that it did not make "
    "reachable.",
    failed=(None,),
)
def VmbChannelPacketGetExternalData(completion: Completion, flags: int = 0) -> tuple[Status, Grant | None]:
    """`(status, memory)`: what the packet describes, until the packet is completed. INVALID_PARAMETER_2: unknown flags;
    INVALID_DEVICE_REQUEST: the packet describes nothing."""
    return Status.SUCCESS, completion.external_data(read_only=_read_only(flags, "VmbChannelPacketGetExternalData"))


# ---- GPADLs ----------------------------------------------------------------------------------------------------------


@returns_status(
    "C", "ClientChannel.create_gpadl", "The buffer is one of the driver's, which knows its I/O address.", failed=(0,)
)
def VmbChannelCreateGpadlFromBuffer(channel: Channel, flags: int, buffer: DmaMemory, length: int) -> tuple[Status, int]:
    """`(status, handle)`, once the server knows it: the first `length` bytes of a buffer. INVALID_PARAMETER_2: unknown
    flags; INVALID_PARAMETER: not so long."""
    return VmbChannelCreateGpadlFromMdl(channel, flags, [(buffer.iova, buffer.size)], 0, length)


@returns_status("C", "ClientChannel.create_gpadl", failed=(0,))
def VmbChannelCreateGpadlFromMdl(
    channel: Channel, flags: int, mdl: Mdl, mdl_offset: int, length: int
) -> tuple[Status, int]:
    """`(status, handle)`, once the server knows it: part of an MDL chain. INVALID_PARAMETER_2: unknown flags;
    INVALID_PARAMETER: not in the chain."""
    client = the_client(channel)
    if length <= 0:
        raise KmclError(f"channel {channel.name}: a GPADL of {length} bytes", Status.INVALID_PARAMETER)
    part = _part(mdl, mdl_offset, length)
    return Status.SUCCESS, client.create_gpadl(part, read_only=_read_only(flags, "a GPADL"))


@returns_status("S", "ServerChannel.map_gpadl", failed=(None,))
def VmbChannelMapGpadl(channel: Channel, flags: int, gpadl: int) -> tuple[Status, Grant | None]:
    """`(status, memory)`, one mapping at a time; with READ_ONLY its pages stay out of the dirty log.
    INVALID_PARAMETER_2: unknown flags."""
    return Status.SUCCESS, the_server(channel).map_gpadl(gpadl, read_only=_read_only(flags, "VmbChannelMapGpadl"))


# ---- save and restore ------------------------------------------------------------------------------------------------


@returns_status("S", "ServerChannel.save_continue", failed=(0, 0))
def VmbChannelSaveContinue(channel: Channel, save_buffer: bytearray | memoryview) -> tuple[Status, int, int]:
    """`(status, bytes filled, bytes required)`: a whole number of chunks. SUCCESS: that was all; BUFFER_OVERFLOW: more
    follow, the next one of so many bytes; BUFFER_TOO_SMALL: not one fitted. INVALID_DEVICE_STATE: no save has begun."""
    view = memoryview(save_buffer).cast("B")
    step = the_server(channel).save_continue(len(view))
    view[: len(step.data)] = step.data
    if not step.more:
        return Status.SUCCESS, len(step.data), 0
    return Status.BUFFER_OVERFLOW if step.data else Status.BUFFER_TOO_SMALL, len(step.data), step.required


@returns_status("S", "ServerChannel.restore_from_buffer", "Damaged chunks are DATA_ERROR.")
def VmbChannelRestoreFromBuffer(channel: Channel, buffer: Buffer) -> Status:
    """Take whole chunks. SUCCESS: restored; MORE_PROCESSING_REQUIRED: more are to come; else failed."""
    complete = the_server(channel).restore_from_buffer(bytes(buffer))
    return Status.SUCCESS if complete else Status.MORE_PROCESSING_REQUIRED
