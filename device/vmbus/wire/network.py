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

from vmbus.wire.ethernet import MTU_MAXIMUM, MTU_MINIMUM, QUEUES_MAXIMUM

NETWORK_TYPE = UUID("5a2f2c7e-3d0e-4c43-9b58-6f0d2f1e0020")
VERSION = 1

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
