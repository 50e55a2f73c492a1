"""How frames for the guest are spread over its queues: receive-side scaling (RSS), as the guest has set it. Sans-I/O.

The hash is Toeplitz', with the guest's key, over what its hash types name of a packet: so the guest can foretell which
queue a flow has. A frame that they do not name goes to the first queue.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmbus.wire.ethernet import ETHERNET_SIZE, OFFLOAD_SIZE

KEY_LIMIT = 40
"""Bytes of a key."""
FLOWS_KNOWN = 4096
"""Flows whose queue is remembered; with one more, all are forgotten."""
DEFAULT_KEY = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
"""For a guest that sends none."""

IPV4, TCP4, UDP4 = 0x100, 0x200, 0x4000
IPV6, TCP6, UDP6 = 0x400 | 0x800, 0x1000 | 0x2000, 0x8000 | 0x10000
"""Hash types; those of packets with extension headers count as those of the others."""

_ETHERTYPES = {b"\x08\x00": 4, b"\x86\xdd": 6}
_TCP, _UDP = 6, 17
_START = OFFLOAD_SIZE + ETHERNET_SIZE
_ENOUGH = _START + 4 + 60 + 4


class Spread:
    """See the module's text.

    Attributes:
        table: queues by the hash; none: all frames go to the first queue. key, types: of the hash.
        queues: those in the table.
    """

    def __init__(self, table: Sequence[int] = (), key: bytes = DEFAULT_KEY, types: int = 0) -> None:
        self.table = tuple(table)
        self.key = key
        self.types = types
        self.queues = sorted({*table}) or [0]
        self._known: dict[bytes, int] = {}

    def queue_of(self, frame: bytes) -> int:
        """For a frame with its offload header."""
        table = self.table
        if not table:
            return 0
        flow = flow_of(frame, self.types)
        found = self._known.get(flow)
        if found is None:
            if len(self._known) >= FLOWS_KNOWN:
                self._known.clear()
            found = self._known[flow] = table[toeplitz(self.key, flow) % len(table)] if flow else 0
        return found


def toeplitz(key: bytes, data: bytes) -> int:
    """The hash of `data`, 32 bits."""
    width = 8 * max(len(key), len(data) + 4)
    windows = int.from_bytes(key, "big") << (width - 8 * len(key))
    found = 0
    for at, byte in enumerate(data):
        for bit in range(8):
            if byte & 0x80 >> bit:
                found ^= windows >> (width - 32 - 8 * at - bit)
    return found & 0xFFFFFFFF


def flow_of(frame: bytes, types: int) -> bytes:
    """What is hashed of a frame: addresses, and with TCP or UDP the ports; empty: nothing that the types name."""
    frame, at = frame[:_ENOUGH], _START
    version = _ETHERTYPES.get(frame[at - 2 : at])
    if frame[at - 2 : at] == b"\x81\x00":
        at += 4
        version = _ETHERTYPES.get(frame[at - 2 : at])
    if version == 4 and len(frame) >= at + 20:
        addresses, ports = frame[at + 12 : at + 20], at + 4 * (frame[at] & 15)
        whole = not (frame[at + 6] & 0x3F or frame[at + 7])  # no fragment
        protocol, plain, tcp, udp = frame[at + 9], IPV4, TCP4, UDP4
    elif version == 6 and len(frame) >= at + 40:
        addresses, ports, whole = frame[at + 8 : at + 40], at + 40, True
        protocol, plain, tcp, udp = frame[at + 6], IPV6, TCP6, UDP6
    else:
        return b""
    wanted = tcp if protocol == _TCP else udp if protocol == _UDP else 0
    if types & wanted and whole and len(frame) >= ports + 4:
        return addresses + frame[ports : ports + 4]
    return addresses if types & plain else b""
