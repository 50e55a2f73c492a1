"""KMCL: channels and packets, as the VMBus Kernel Mode Client Library of Windows promises them, for both endpoints.

A provider (VSP) works with `ServerChannel`, a guest's client (VSC) with `ClientChannel`; both send `Packet` objects
and complete `Completion` handles. The core does no I/O: a `Link` connects a channel to whatever carries it.

    states.py      the channel's state machine, as one table
    status.py      NTSTATUS values and the exceptions that carry them
    channel.py     what both endpoints share: sending, receiving, queueing, completing
    packet.py      outgoing packets
    completion.py  incoming packets
    turns.py       giving channels their turns
    server.py      the server endpoint: offers
    saving.py      how it saves and restores itself (server only: needs msgspec)
    client.py      the client endpoint
    saved.py       the saved form of a channel (server only)
"""

from vmbus.kmcl.channel import Channel, Link
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.packet import Packet, PacketState
from vmbus.kmcl.states import ChannelState
from vmbus.kmcl.status import ChannelStateError, KmclError, Status

__all__ = [
    "Channel",
    "ChannelState",
    "ChannelStateError",
    "ClientChannel",
    "Completion",
    "KmclError",
    "Link",
    "Packet",
    "PacketState",
    "Status",
]
