"""Packets of a connection of hv_sock."""

from vmbus.observe.words.seen import Seen, counted
from vmbus.wire.hvsock import unpack
from vmbus.wire.packet import PacketType


def words(packet: Seen) -> str:
    """See `vmbus.observe.words.describe`."""
    if packet.kind == PacketType.COMPLETION:
        return "taken" if not packet.payload else ""
    data = unpack(packet.payload)
    whose = "the host's" if packet.to_guest else "the guest's"
    return f"{counted(len(data), 'byte')} of {whose} stream" if data else f"FIN, the end of {whose} stream"
