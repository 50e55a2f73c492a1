"""Packets of the protocols that Linux's own drivers speak, in the protocol's words, for people who look at them.

seen.py          a packet, as far as it is known to somebody who looks
scsi.py          hv_storvsc
network.py       hv_netvsc
sockets.py       hv_sock
integration.py   hv_utils

Nothing is checked, decided or remembered: the same bytes give the same text, and any bytes give one.
"""

from collections.abc import Callable
from struct import error as StructError
from uuid import UUID

from vmbus.errors import PeerError
from vmbus.observe.words import integration, network, scsi, sockets
from vmbus.observe.words.seen import Seen, clean
from vmbus.wire.linux import NETVSC, SOCK, STORVSC, UTILS, driver_of
from vmbus.wire.packet import PacketType

_WORDS: dict[str, Callable[[Seen], str]] = {
    STORVSC: scsi.words,
    NETVSC: network.words,
    SOCK: sockets.words,
    UTILS: integration.words,
}


def describe(interface_type: UUID, packet: Seen) -> str:
    """One packet of a channel of that type, in at most `seen.LONGEST` printable characters; "" for other protocols."""
    driver = driver_of(interface_type)
    if driver is None:
        return ""
    try:
        text = _WORDS[driver](packet)
    except (PeerError, StructError, ValueError, IndexError, OverflowError):
        text = ""
    if not text:
        what = "completion" if packet.kind == PacketType.COMPLETION else "packet"
        text = f"a {what} of {len(packet.payload)} bytes that {driver[3:]} does not have"
    return clean(text)


__all__ = ["Seen", "clean", "describe"]
