"""KMCL: channels and packets, as the VMBus Kernel Mode Client Library of Windows promises them, for both endpoints.

A provider (VSP) works with `ServerChannel`, a guest's client (VSC) with `ClientChannel`; both send `Packet` objects
and complete `Completion` handles. The core does no I/O: a `Link` connects a channel to whatever carries it.

    lifecycle.py   the channel's state machine, as one table
    status.py      NTSTATUS values and the exceptions that carry them
    settings.py    what is set on a channel while it is disabled
    endpoint.py    the life of a channel's end: opened, started, paused, closed, failed
    channel.py     a channel: its life, its packets, its turns
    packet.py      outgoing packets
    outgoing.py    on their way to the other end: queue, staging, sent; back to their owner
    completion.py  incoming packets
    incoming.py    on their way to their owner: the one delivery path, turns, limits
    flow.py        the part of both that is touched for every packet: in C, or `flow_pure`
    allowance.py   what the channels of a device may hold for its guest together
    requests.py    synchronous requests
    threads.py     calls from other threads than a channel's own
    observer.py    who looks on: audit records and captures
    turns.py       giving channels their turns
    server.py      the server endpoint: offers
    saving.py      how it saves and restores itself (server only: needs msgspec)
    client.py      the client endpoint
    saved.py       the saved form of a channel (server only)
"""

from vmbus.kmcl.channel import Channel, Link
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.completion import Completion
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.packet import Packet, PacketState
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
