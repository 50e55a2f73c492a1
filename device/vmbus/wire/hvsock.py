"""hv_sock: how AF_VSOCK connections look on VMBus.

One channel is one connection, a stream of bytes in each direction. The channel's interface type is the service that is
connected to, which says the listener's port; its instance says the port of the other end. There are no addresses and no
credits on the wire: each packet is a pipe packet with some bytes, and one without any is the end of that direction.
"""

from struct import Struct
from uuid import UUID

from vmbus.errors import PeerError, UsageError

HEADER = Struct("<II")
TYPE_DATA = 1
MAX_DATA = 16384
"""Most bytes of data in one packet that Linux takes."""
MAX_PORT = 0xFFFFFFFF

# The fixed part of a service's GUID; the port is in front.
_SERVICE = UUID("00000000-facb-11e6-bd58-64006a7986d3").bytes_le[4:]
_OFFER = Struct("<IBB")
_BYTE_PIPE = 0


class HvSockError(PeerError):
    """A packet that is none of a connection's."""


def service_of(port: int) -> UUID:
    """The interface type of a port, 0 to 0xFFFFFFFF. Raises UsageError for another one."""
    if not 0 <= port <= MAX_PORT:
        raise UsageError(f"port {port}: ports are 0 to {MAX_PORT}")
    return UUID(bytes_le=port.to_bytes(4, "little") + _SERVICE)


def port_of(service: UUID) -> int | None:
    """The port of an interface type, None for one that is no socket's."""
    wire = service.bytes_le
    return int.from_bytes(wire[:4], "little") if wire[4:] == _SERVICE else None


def peer_port(instance: UUID) -> int:
    return instance.time_low


def offer_data(*, from_host: bool) -> bytes:
    """The part of an offer that is the sockets' own. `from_host`: the host connects, and a guest's listener is to
    accept it; else it is for a socket of the guest's that is connecting."""
    return _OFFER.pack(_BYTE_PIPE, from_host, 0)


def is_from_host(user_defined: bytes) -> bool:
    """The same, of an offer."""
    return bool(_OFFER.unpack_from(user_defined)[1])


def pack(data: bytes) -> bytes:
    """The payload of one packet, 1 to MAX_DATA bytes of data."""
    return HEADER.pack(TYPE_DATA, len(data)) + data


FIN = HEADER.pack(TYPE_DATA, 0)
"""The payload of the packet that ends a direction."""


def unpack(payload: bytes) -> bytes:
    """The data of one packet; none: the direction has ended. Raises HvSockError."""
    if len(payload) < HEADER.size:
        raise HvSockError(f"a packet of {len(payload)} bytes has no header")
    kind, size = HEADER.unpack_from(payload)
    if kind != TYPE_DATA or size > len(payload) - HEADER.size or size > MAX_DATA:
        raise HvSockError(f"a packet of type {kind} with {size} bytes of data in a payload of {len(payload)}")
    return payload[HEADER.size : HEADER.size + size]
