"""The messages of the network device, shared by its provider and the guest's service; see docs/provider-network.md.

The guest sends HELLO first, on the primary channel, and the completion packet carries the answer. Frames go both ways
on every channel, several in one packet, which is completed when they have been handed on. Little-endian; every length
is in the message, since payloads are padded on their way.
"""

from collections.abc import Sequence
from enum import IntEnum, IntFlag
from struct import Struct, error, unpack_from
from struct import pack as pack_struct
from typing import NamedTuple
from uuid import UUID
from zlib import crc32

NETWORK_TYPE = UUID("5a2f2c7e-3d0e-4c43-9b58-6f0d2f1e0020")
VERSION = 1

MTU_MINIMUM = 68
MTU_MAXIMUM = 9000
QUEUES_MAXIMUM = 16

MAC_SIZE = 6
ETHERNET_SIZE = 14
ETHERNET_SLACK = 22
"""Bytes of a frame beside its packet: the Ethernet header, and up to two VLAN tags."""
OFFLOAD_SIZE = 10
FRAMES_MAXIMUM = 256
"""Frames in one message."""
BATCH_BYTES = 64 << 10
"""Bytes of one message with several frames; one with a single frame may be longer."""
MESSAGE_LIMIT = BATCH_BYTES + (8 << 10)

_HELLO = Struct("<6I")  # op, version, features, mtu, queues, 0
_NIC = Struct("<6I6sBB16s4s4s")
_QUEUES = Struct("<II")  # op, count
_LINK = Struct("<II")  # op, up
_FRAMES = Struct("<II")  # op, count; then the lengths, u32 each, then the frames
_REPLY = Struct("<II")  # status, frames that were handed on
_OFFLOAD = Struct("<BBHHHH")  # flags, gso type, header length, gso size, checksum from, checksum at

_NEEDS_CHECKSUM = 1
_GSO_TCP = frozenset({1, 4, 0x81, 0x84})  # over IPv4, IPv6; the same with ECN
_NO_OFFLOAD = bytes(OFFLOAD_SIZE)


class Op(IntEnum):
    """What a message is."""

    HELLO = 1
    QUEUES = 2
    FRAMES = 3
    LINK = 4


class Feature(IntFlag):
    """What both sides can do."""

    OFFLOAD = 1  # frames may be longer than the MTU (TCP data, to be cut) and lack their checksums


class Status(IntEnum):
    """How a message was taken."""

    OK = 0
    INVALID = 1
    UNSUPPORTED = 2  # a version, or a message, that is not known
    NO_HELLO = 3
    RING_TOO_SMALL = 4  # for one frame of the MTU
    NO_LINK = 5  # the frames were dropped


class Hello(NamedTuple):
    """The guest's first message: the newest version it knows, and what it wants; `mtu` 0 for as much as there is."""

    version: int = VERSION
    features: int = int(Feature.OFFLOAD)
    mtu: int = 0
    queues: int = 1

    def pack(self) -> bytes:
        """The message."""
        return _HELLO.pack(Op.HELLO, self.version, self.features, self.mtu, self.queues, 0)


class Nic(NamedTuple):
    """The host's answer to it.

    `queues` is the number of channels, the primary included, that the guest may use. `interface` is what the
    guest's interface is to be called. `address`, with `prefix`, and `gateway` are proposals for it; empty if there are
    none.
    """

    version: int
    features: int
    mtu: int
    queues: int
    link: bool
    mac: bytes
    interface: str
    address: bytes = b""
    prefix: int = 0
    gateway: bytes = b""

    def pack(self) -> bytes:
        """The reply."""
        name = self.interface.encode()
        return _NIC.pack(
            Status.OK,
            self.version,
            self.features,
            self.mtu,
            self.queues,
            self.link,
            self.mac,
            self.prefix,
            0,
            name,
            self.address,
            self.gateway,
        )


def parse_nic(reply: bytes) -> Nic | None:
    """The host's answer to HELLO; None when it refused, or makes no sense."""
    if parse_status(reply) != Status.OK or len(reply) < _NIC.size:
        return None
    _, version, features, mtu, queues, link, mac, prefix, _, name, address, gateway = _NIC.unpack_from(reply)
    if not (MTU_MINIMUM <= mtu <= MTU_MAXIMUM and 1 <= queues <= QUEUES_MAXIMUM and prefix <= 32):
        return None
    try:
        interface = name.rstrip(b"\0").decode("ascii")
    except UnicodeDecodeError:
        return None
    found = address if any(address) else b""
    return Nic(
        version, features, mtu, queues, bool(link), mac, interface, found, prefix, gateway if any(gateway) else b""
    )


class Queues(NamedTuple):
    """The guest has so many channels open, the primary included: the host spreads its frames over them."""

    number: int

    def pack(self) -> bytes:
        """The message."""
        return _QUEUES.pack(Op.QUEUES, self.number)


class Link(NamedTuple):
    """The host's word on the link."""

    up: bool

    def pack(self) -> bytes:
        """The message."""
        return _LINK.pack(Op.LINK, self.up)


class Frames(NamedTuple):
    """Ethernet frames, each with its offload header in front."""

    frames: list[memoryview]


Message = Hello | Queues | Frames | Link


def pack_frames(frames: Sequence[bytes]) -> bytes:
    """A message with frames, each with its header."""
    count = len(frames)
    if count == 1:
        return pack_struct("<III", Op.FRAMES, 1, len(frames[0])) + frames[0]
    return b"".join((pack_struct(f"<{count + 2}I", Op.FRAMES, count, *map(len, frames)), *frames))


def message_size(count: int, size: int) -> int:
    """Bytes of a message with `count` frames of `size` bytes in all."""
    return _FRAMES.size + 4 * count + size


def parse(payload: bytes) -> Message | None:
    """A message, whose frames were not looked at; None when it makes no sense."""
    try:
        (op,) = _OP(payload)
        if op == Op.FRAMES:
            return _parse_frames(payload)
        if op == Op.HELLO:
            _, version, features, mtu, queues, _ = _HELLO.unpack_from(payload)
            return Hello(version, features, mtu, queues)
        if op == Op.QUEUES:
            return Queues(_QUEUES.unpack_from(payload)[1])
        if op == Op.LINK:
            return Link(bool(_LINK.unpack_from(payload)[1]))
    except error:
        pass
    return None


_OP = Struct("<I").unpack_from


def _parse_frames(payload: bytes) -> Frames | None:
    _, count = _FRAMES.unpack_from(payload)
    if not 0 < count <= FRAMES_MAXIMUM:
        return None
    lengths = unpack_from(f"<{count}I", payload, _FRAMES.size)
    start = _FRAMES.size + 4 * count
    # Padding makes it at most 7 bytes longer.
    if not 0 <= len(payload) - start - sum(lengths) < 8:
        return None
    view = memoryview(payload)
    frames = []
    for length in lengths:
        frames.append(view[start : start + length])
        start += length
    return Frames(frames)


def pack_reply(status: int, count: int = 0) -> bytes:
    """The completion of any message but a good HELLO."""
    return _REPLY.pack(status, count)


def parse_status(reply: bytes) -> int:
    """The status of a completion; INVALID when it has none."""
    return int.from_bytes(reply[:4], "little") if len(reply) >= 4 else int(Status.INVALID)


# ---- frames ----------------------------------------------------------------------------------------------------------


def frame_limit(mtu: int, features: int) -> int:
    """Bytes of the longest frame, with its header."""
    return OFFLOAD_SIZE + ETHERNET_SLACK + (1 << 16 if features & Feature.OFFLOAD else mtu)


def check_frame(frame: bytes | memoryview, mtu: int, features: int) -> str:
    """What is wrong with a frame that came from the other side; "" if nothing is.

    The kernel that gets it checks it as well. This is about what was agreed upon.
    """
    size = len(frame) - OFFLOAD_SIZE
    if size < ETHERNET_SIZE:
        return f"a frame of {max(size, 0)} bytes; at least {ETHERNET_SIZE}"
    if frame[:OFFLOAD_SIZE] == _NO_OFFLOAD:
        return "" if size <= mtu + ETHERNET_SLACK else f"a frame of {size} bytes, and the MTU is {mtu}"
    if not features & Feature.OFFLOAD:
        return "an offload that was not agreed upon"
    flags, kind, header, segment, start, at = _OFFLOAD.unpack_from(frame)
    if header > size or (flags & _NEEDS_CHECKSUM and start + at + 2 > size):
        return f"an offload of bytes beyond the frame's {size}"
    if not kind:
        return "" if size <= mtu + ETHERNET_SLACK else f"a frame of {size} bytes, and the MTU is {mtu}"
    if kind not in _GSO_TCP or not flags & _NEEDS_CHECKSUM:
        return f"an offload of kind {kind:#x} with flags {flags:#x}"
    if not 0 < segment <= mtu or size > ETHERNET_SLACK + (1 << 16):
        return f"a frame of {size} bytes to be cut into {segment}, and the MTU is {mtu}"
    return ""


def flow_hash(frame: bytes | memoryview) -> int:
    """A number that is the same for all frames of a flow, in both directions; 32 bits.

    Of TCP and UDP: addresses and ports. Of other IP, and of fragments: addresses. Of the rest: Ethernet addresses.
    """
    at = OFFLOAD_SIZE + ETHERNET_SIZE
    frame = bytes(frame[: at + 4 + 60 + 4])
    kind = frame[at - 2 : at]
    if kind == b"\x81\x00":
        at += 4
        kind = frame[at - 2 : at]
    if kind == b"\x08\x00" and len(frame) >= at + 20:
        one, other = frame[at + 12 : at + 16], frame[at + 16 : at + 20]
        ports = at + 4 * (frame[at] & 15)
        whole = not (frame[at + 6] & 0x3F or frame[at + 7])
        protocol = frame[at + 9]
    elif kind == b"\x86\xdd" and len(frame) >= at + 40:
        one, other = frame[at + 8 : at + 24], frame[at + 24 : at + 40]
        ports = at + 40
        whole = True
        protocol = frame[at + 6]
    else:
        one, other = frame[OFFLOAD_SIZE : OFFLOAD_SIZE + MAC_SIZE], frame[OFFLOAD_SIZE + 6 : OFFLOAD_SIZE + 12]
        whole, protocol, ports = False, 0, 0
    if whole and protocol in (6, 17) and len(frame) >= ports + 4:
        one += frame[ports : ports + 2]
        other += frame[ports + 2 : ports + 4]
    return crc32(one + other) if one <= other else crc32(other + one)


def announcement(mac: bytes) -> bytes:
    """A frame from which switches learn where `mac` is now: a RARP request for its own address, with its header."""
    arp = pack_struct("!HHBBH6s4s6s4s", 1, 0x0800, MAC_SIZE, 4, 3, mac, bytes(4), mac, bytes(4))
    return _NO_OFFLOAD + (b"\xff" * MAC_SIZE + mac + b"\x80\x35" + arp).ljust(60, b"\0")


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
    """As people write it."""
    return mac.hex(":")
