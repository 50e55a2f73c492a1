"""Functions that only forward. A row: the method, what the function is for and its statuses, and the deviation."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.ddi.table import CHANNEL, CLIENT, COMPLETION, PACKET, SERVER, enter
from vmbus.kmcl.packet import Packet

if TYPE_CHECKING:
    from vmbus.kmcl.server import ServerChannel
else:

    class _ByName:
        """Methods by their names alone: the server endpoint needs msgspec, which a guest need not have."""

        def __getattr__(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(__name__=name)

    ServerChannel = _ByName()

# ---- set-up, while disabled ------------------------------------------------------------------------------------------

VmbChannelInitSetFlags = CHANNEL.does(
    Channel.set_flags, "IS_PIPE or nothing. INVALID_PARAMETER_1: not disabled; _2: unknown bits."
)
VmbChannelInitSetMaximumPacketSize = CHANNEL.does(
    Channel.set_maximum_packet_size,
    "Largest payload in bytes. INVALID_PARAMETER_1: not disabled; _2: 0.",
    "The size of the rings is the client's to choose and is not derived.",
)
VmbChannelInitSetMaximumExternalData = CHANNEL.does(
    Channel.set_maximum_external_data,
    "Most bytes and most ranges that one packet describes. INVALID_PARAMETER_1: not disabled; _2: no bytes; _3: no "
    "ranges.",
)
VmbChannelInitSetClientContextSize = CHANNEL.does(
    Channel.set_client_context_size,
    "Scratch bytes on every incoming packet. INVALID_PARAMETER_1: not disabled.",
    "The scratch area is `context` of the completion, a bytearray.",
)
VmbChannelInitSetFriendlyName = CHANNEL.does(
    Channel.set_friendly_name, "The name in logs, errors and counters. INVALID_PARAMETER_1: not disabled."
)
VmbServerChannelInitSetFlags = SERVER.does(
    ServerChannel.set_server_flags,
    "VMBUS_SERVER_CHANNEL_INIT_FLAG_* bits. INVALID_PARAMETER_1: not disabled; _2: unknown bits.",
)
VmbServerChannelInitSetMmioMegabytes = SERVER.does(
    ServerChannel.set_mmio_megabytes,
    "MMIO space that the guest is asked for. INVALID_PARAMETER_1: not disabled; INVALID_PARAMETER: both 0.",
    "Travels in the offer; the guest has no MMIO space to give, so nothing is reserved.",
)
VmbServerChannelInitSetTargetInterfaceId = SERVER.does(
    ServerChannel.set_target_interface_id, "The GUIDs of the offer. INVALID_PARAMETER_1: not disabled."
)
VmbServerChannelInitSetTargetVtl = SERVER.does(
    ServerChannel.set_target_vtl,
    "The trust level that sees the offer. INVALID_PARAMETER_1: not disabled; _2: any but 0.",
    "There are no virtual trust levels: only 0 is taken.",
)
VmbClientChannelInitSetTargetPnp = CLIENT.does(
    ClientChannel.set_target_pnp,
    "Which offer to accept; without an instance any of the type. INVALID_PARAMETER_1: not disabled.",
)
VmbClientChannelInitSetRingBufferPageCount = CLIENT.does(
    ClientChannel.set_ring_buffer_page_count,
    "Data pages (4096 bytes) of the two rings. INVALID_PARAMETER_1: not disabled; INVALID_PARAMETER: none.",
)

# ---- life ------------------------------------------------------------------------------------------------------------

VmbChannelEnable = CHANNEL.does(
    Channel.enable,
    "Offer the channel, or wait for its offer. Returns at once. INVALID_DEVICE_STATE: not disabled, or not set up.",
)
VmbChannelDisable = CHANNEL.does(
    Channel.disable,
    "Take the channel away, and wait until it is closed.",
    "Void in C, with an endless wait. The wait is bounded: CANCELLED when it ran out.",
)
VmbChannelStart = CHANNEL.does(
    Channel.start,
    "Take and send packets whenever the channel is open.",
    "Void in C. INVALID_DEVICE_STATE where the contract forbids the call.",
)
VmbChannelPause = CHANNEL.does(
    Channel.pause,
    "Stop taking and sending packets, and wait until every incoming packet has been completed. On a disabled channel: "
    "come up paused.",
    "Void in C, with an endless wait. The wait is bounded: CANCELLED when it ran out (the log names the packets that "
    "were not completed; the channel stays paused). INVALID_DEVICE_STATE where the contract forbids the call.",
)
VmbChannelCleanup = CHANNEL.does(
    Channel.cleanup,
    "Give a disabled channel up.",
    "Void in C. INVALID_DEVICE_STATE when the channel is not disabled.",
)
VmbChannelSetPointer = CHANNEL.sets("pointer", "The caller's context, never looked at.")
VmbChannelGetPointer = CHANNEL.reads("pointer", "The context of VmbChannelSetPointer, None before.")
VmbChannelSetTransactionQuota = CHANNEL.does(
    Channel.set_transaction_quota, "Most incoming packets that may be outstanding. INVALID_PARAMETER_2: 0."
)
VmbChannelSetIncomingProcessingAtPassive = CHANNEL.does(
    Channel.set_incoming_processing_at_passive, "Hand packets over from a worker instead of inline."
)

# ---- packets ---------------------------------------------------------------------------------------------------------

VmbPacketAllocate = CHANNEL.plainly(
    Channel.allocate_packet, "A packet that frees itself when it is complete.", "Never NULL."
)
VmbPacketFree = PACKET.plainly(Packet.free, "Give a packet up; raises while it is in use.")
VmbPacketSetPointer = PACKET.sets("pointer", "The caller's context, never looked at.")
VmbPacketGetPointer = PACKET.reads("pointer", "The context of VmbPacketSetPointer, None before.")
VmbPacketGetChannel: Callable[[Packet], Channel] = PACKET.reads("channel", "The channel that the packet belongs to.")
VmbChannelPacketDeferToPassive = COMPLETION.does(
    Completion.defer_to_passive,
    "Have the packet handed over again from a worker.",
    "Void in C. INVALID_DEVICE_REQUEST when called from elsewhere than inline in EvtVmbChannelProcessPacket.",
)

# ---- GPADLs, save and restore ----------------------------------------------------------------------------------------

VmbChannelDeleteGpadl = CLIENT.does(
    ClientChannel.delete_gpadl,
    "Take a GPADL back; waits while the server has it mapped. INVALID_PARAMETER: there is no such GPADL.",
    "Void in C, with an endless wait. CANCELLED when the bounded wait ran out: the GPADL then goes when the server "
    "unmaps it.",
)
VmbChannelUnmapGpadl = SERVER.does(
    ServerChannel.unmap_gpadl, "End a mapping; its memory is not to be touched any more.", "Void in C."
)
VmbChannelSaveBegin = SERVER.does(
    ServerChannel.save_begin,
    "Set up a save. INVALID_DEVICE_STATE: active, incoming packets not completed, or a save has begun already.",
)
VmbChannelSaveEnd = SERVER.does(ServerChannel.save_end, "End a save, finished or not.", "Void in C.")

enter(globals())
