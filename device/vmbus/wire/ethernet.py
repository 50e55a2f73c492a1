"""Ethernet frames with an offload header in front, as they go between a card and the host's interface.

The offload header is that of virtio's specification: what the kernel, or the other side, is still to do with the frame.
"""

from struct import Struct
from struct import pack as pack_struct

MTU_MINIMUM = 68
MTU_MAXIMUM = 9000
QUEUES_MAXIMUM = 16
"""Queues of a card."""

MAC_SIZE = 6
ETHERNET_SIZE = 14
ETHERNET_SLACK = 22
"""Bytes of a frame beside its packet: the Ethernet header, and up to two VLAN tags."""
OFFLOAD = Struct("<BBHHHH")  # flags, gso type, header length, gso size, checksum from, checksum at
OFFLOAD_SIZE = OFFLOAD.size
NO_OFFLOAD = bytes(OFFLOAD_SIZE)
NEEDS_CHECKSUM = 1
GSO_TCP4 = 1
GSO_TCP6 = 4
_GSO_TCP = frozenset({GSO_TCP4, GSO_TCP6, 0x80 | GSO_TCP4, 0x80 | GSO_TCP6})  # the same with ECN


def frame_limit(mtu: int, offload: int) -> int:
    """Bytes of the longest frame, with its header."""
    return OFFLOAD_SIZE + ETHERNET_SLACK + (1 << 16 if offload else mtu)


def check_frame(frame: bytes | memoryview, mtu: int, offload: int) -> str:
    """What is wrong with a frame that came from the other side; "" if nothing is.

    The kernel that gets it checks it as well. This is about what was agreed upon.
    """
    size = len(frame) - OFFLOAD_SIZE
    if size < ETHERNET_SIZE:
        return f"a frame of {max(size, 0)} bytes; at least {ETHERNET_SIZE}"
    if frame[:OFFLOAD_SIZE] == NO_OFFLOAD:
        return "" if size <= mtu + ETHERNET_SLACK else f"a frame of {size} bytes, and the MTU is {mtu}"
    if not offload:
        return "an offload that was not agreed upon"
    flags, kind, header, segment, start, at = OFFLOAD.unpack_from(frame)
    if header > size or (flags & NEEDS_CHECKSUM and start + at + 2 > size):
        return f"an offload of bytes beyond the frame's {size}"
    if not kind:
        return "" if size <= mtu + ETHERNET_SLACK else f"a frame of {size} bytes, and the MTU is {mtu}"
    if kind not in _GSO_TCP or not flags & NEEDS_CHECKSUM:
        return f"an offload of kind {kind:#x} with flags {flags:#x}"
    if not 0 < segment <= mtu or size > ETHERNET_SLACK + (1 << 16):
        return f"a frame of {size} bytes to be cut into {segment}, and the MTU is {mtu}"
    return ""


def announcement(mac: bytes) -> bytes:
    """A frame from which switches learn where `mac` is now: a RARP request for its own address, with its header."""
    arp = pack_struct("!HHBBH6s4s6s4s", 1, 0x0800, MAC_SIZE, 4, 3, mac, bytes(4), mac, bytes(4))
    return NO_OFFLOAD + (b"\xff" * MAC_SIZE + mac + b"\x80\x35" + arp).ljust(60, b"\0")


def introduction(address: bytes, mac: bytes) -> bytes:
    """A frame from which those who know the IPv4 `address` learn that it is at `mac` now: an ARP request for itself
    (RFC 5227 calls it an announcement), with its header."""
    arp = pack_struct("!HHBBH6s4s6s4s", 1, 0x0800, MAC_SIZE, 4, 1, mac, address, bytes(MAC_SIZE), address)
    return NO_OFFLOAD + (b"\xff" * MAC_SIZE + mac + b"\x08\x06" + arp).ljust(60, b"\0")


def parse_mac(text: str) -> bytes:
    """A station's address from "52:54:00:12:34:56". Raises ValueError; also for a group's address, and for zero."""
    parts = text.split(":")
    if len(parts) != MAC_SIZE or any(len(part) != 2 for part in parts):
        raise ValueError(f"not an Ethernet address: {text!r}")
    mac = bytes(int(part, 16) for part in parts)
    if mac[0] & 1 or not any(mac):
        raise ValueError(f"not the address of a single station: {text!r}")
    return mac


def format_mac(mac: bytes) -> str:
    return mac.hex(":")
