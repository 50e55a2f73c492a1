"""What is left to do with a frame: as a guest says it (per-packet information), and as a kernel (offload header)."""

from __future__ import annotations

from struct import pack_into

from vmbus.wire.ethernet import (
    ETHERNET_SIZE,
    GSO_TCP4,
    GSO_TCP6,
    NEEDS_CHECKSUM,
    NO_OFFLOAD,
    OFFLOAD,
    OFFLOAD_SIZE,
)
from vmbus.wire.rndis import (
    RECEIVED_TCP_GOOD,
    RECEIVED_UDP_GOOD,
    Checksum,
    Packet,
    Ppi,
    RndisError,
    packet_header,
    ppi,
)

_AT_TCP, _AT_UDP = 16, 6  # where the sum is in the header
_IPV4, _IPV6, _VLAN = b"\x08\x00", b"\x86\xdd", b"\x81\x00"
_TCP = 6
_ECN = 0x80


def ones_sum(data: bytes | bytearray | memoryview) -> int:
    """The sum of 16-bit words that IP's checksums are made of, 0 to 0xfffe."""
    number = int.from_bytes(data, "big")
    return (number << 8 if len(data) & 1 else number) % 0xFFFF


# ---- from the guest --------------------------------------------------------------------------------------------------


def to_host(packet: Packet, offload: bool) -> bytes:
    """The frame with its offload header, for `vmbus.wire.ethernet.check_frame`. Raises RndisError for information that
    does not go with it, or for an offload where none was offered."""
    frame, information = packet
    if len(frame) < ETHERNET_SIZE:
        raise RndisError(f"a frame of {len(frame)} bytes")
    if not information:
        return NO_OFFLOAD + frame
    header = NO_OFFLOAD
    content: bytes | bytearray = bytes(frame)
    wish, segments = information.get(Ppi.CHECKSUM, 0), information.get(Ppi.LSO)
    if segments is not None or wish:
        if not offload:
            raise RndisError("an offload that was not offered")
        if segments is not None:
            header, content = _segments(bytearray(frame), segments)
        else:
            header, content = _sums(bytearray(frame), wish)
    tag = information.get(Ppi.VLAN)
    if tag is None:
        return header + content
    number = (tag & 7) << 13 | (tag >> 3 & 1) << 12 | tag >> 4 & 0xFFF
    if header != NO_OFFLOAD:
        flags, kind, length, size, start, at = OFFLOAD.unpack(header)
        header = OFFLOAD.pack(flags, kind, length + 4 if kind else length, size, start + 4, at)
    return header + content[:12] + _VLAN + number.to_bytes(2, "big") + content[12:]


def _sums(frame: bytearray, wish: int) -> tuple[bytes, bytearray]:
    """The guest has put the sum of the pseudo header where the checksum belongs."""
    if wish & Checksum.IP_HEADER and wish & Checksum.IPV4:
        _sum_ip(frame, _network_layer(frame, _IPV4))
    if not wish & (Checksum.TCP | Checksum.UDP):
        return NO_OFFLOAD, frame
    start, at = wish >> 16 & 0x3FF, _AT_TCP if wish & Checksum.TCP else _AT_UDP
    if start < ETHERNET_SIZE or start + at + 2 > len(frame):
        raise RndisError(f"a checksum from {start} on in a frame of {len(frame)} bytes")
    return OFFLOAD.pack(NEEDS_CHECKSUM, 0, 0, 0, start, at), frame


def _segments(frame: bytearray, value: int) -> tuple[bytes, bytearray]:
    """TCP data to be cut. The guest leaves out what depends on the length; the kernel wants it for the whole."""
    size, start = value & 0xFFFFF, value >> 20 & 0x3FF
    six = bool(value >> 31)
    if not value >> 30 & 1 or not 0 < size <= 0xFFFF:
        raise RndisError(f"segments of {size} bytes, or of an offload that was not offered")
    ip = _network_layer(frame, _IPV6 if six else _IPV4)
    if start + 20 > len(frame) or start < ip + (40 if six else 20):
        raise RndisError(f"TCP at {start} of a frame of {len(frame)} bytes")
    headers = start + (frame[start + 12] >> 4) * 4
    if not start + 20 <= headers <= len(frame) or len(frame) - ip > 0xFFFF:
        raise RndisError(f"TCP headers up to {headers} of a frame of {len(frame)} bytes")
    if six:
        pack_into("!H", frame, ip + 4, len(frame) - ip - 40)
        addresses = frame[ip + 8 : ip + 40]
    else:
        pack_into("!H", frame, ip + 2, len(frame) - ip)
        _sum_ip(frame, ip)
        addresses = frame[ip + 12 : ip + 20]
    pack_into("!H", frame, start + _AT_TCP, (ones_sum(addresses) + _TCP + len(frame) - start) % 0xFFFF)
    kind = (GSO_TCP6 if six else GSO_TCP4) | (_ECN if frame[start + 13] & 0x80 else 0)
    return OFFLOAD.pack(NEEDS_CHECKSUM, kind, headers, size, start, _AT_TCP), frame


def _network_layer(frame: bytearray, wanted: bytes) -> int:
    """Where the IP header is. Raises RndisError when it is not that of the protocol wanted."""
    at = ETHERNET_SIZE
    if frame[12:14] == _VLAN:
        at += 4
    if frame[at - 2 : at] != wanted or len(frame) < at + (40 if wanted == _IPV6 else 20):
        raise RndisError("an offload for a frame of another protocol")
    return at


def _sum_ip(frame: bytearray, ip: int) -> None:
    size = (frame[ip] & 15) * 4
    if not 20 <= size <= len(frame) - ip:
        raise RndisError(f"an IP header of {size} bytes in a frame of {len(frame)}")
    frame[ip + 10 : ip + 12] = b"\0\0"
    pack_into("!H", frame, ip + 10, 0xFFFF - ones_sum(frame[ip : ip + size]))


# ---- to the guest ----------------------------------------------------------------------------------------------------

_GOOD = {_AT_TCP: ppi(Ppi.CHECKSUM, RECEIVED_TCP_GOOD), _AT_UDP: ppi(Ppi.CHECKSUM, RECEIVED_UDP_GOOD)}


def to_guest(frame: bytes) -> bytes:
    """The packet message for a frame with its offload header, as a kernel has handed it out.

    A sum that is left to do is done here, and the guest told that it is right. One of long TCP data that is not cut is
    only told so: a guest takes such frames (RSC) while it forwards none.
    """
    if frame.startswith(NO_OFFLOAD):
        return packet_header(len(frame) - OFFLOAD_SIZE) + frame[OFFLOAD_SIZE:]
    flags, kind, _, _, start, at = OFFLOAD.unpack_from(frame)
    content: bytes | bytearray = frame[OFFLOAD_SIZE:]
    information = b""
    if flags & NEEDS_CHECKSUM and start + at + 2 <= len(content):
        information = _GOOD.get(at, b"")
        if not kind:
            content = bytearray(content)
            pack_into("!H", content, start + at, 0xFFFF - ones_sum(content[start:]))
    return packet_header(len(content), information) + content
