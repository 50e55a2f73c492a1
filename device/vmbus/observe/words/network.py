"""Packets between hv_netvsc and a network card: NVSP, and as far as they are known the RNDIS messages in them."""

from itertools import islice
from struct import error as StructError
from struct import unpack_from

from vmbus.errors import PeerError
from vmbus.observe.words.seen import Seen, counted
from vmbus.wire import nvsp, rndis
from vmbus.wire.packet import PacketType, parse_gpa_direct, parse_transfer_pages

_ANY_SIZE = 1 << 32
_MOST = 64  # messages that are looked at; a well-behaved guest sends `rndis.PACKETS_PER_MESSAGE`


def words(packet: Seen) -> str:
    """See `vmbus.observe.words.describe`."""
    if packet.kind == PacketType.COMPLETION or packet.to_guest:
        return _from_host(packet)
    message = nvsp.parse(packet.payload)
    match message:
        case None:
            return ""
        case nvsp.Init(lowest, highest):
            return f"INIT, versions {lowest:#x} to {highest:#x}"
        case nvsp.NdisVersion(major, minor):
            return f"NDIS_VERSION {major}.{minor}"
        case nvsp.NdisConfig(mtu, capabilities):
            return f"NDIS_CONFIG, MTU {mtu}, capabilities {capabilities:#x}"
        case nvsp.ReceiveBuffer(gpadl, _):
            return f"RECEIVE_BUFFER in GPADL {gpadl:#x}"
        case nvsp.SendBuffer(gpadl, _):
            return f"SEND_BUFFER in GPADL {gpadl:#x}"
        case nvsp.RevokeReceiveBuffer():
            return "REVOKE_RECEIVE_BUFFER"
        case nvsp.RevokeSendBuffer():
            return "REVOKE_SEND_BUFFER"
        case nvsp.SubChannels(_, wanted):
            return f"SUB_CHANNELS, {wanted} wanted"
        case nvsp.PdApi(operation):
            return f"PD_API, operation {operation}"
        case nvsp.Rndis(channel, section, size):
            return _rndis_from_guest(packet, channel, section, size)
        case nvsp.Other(kind):
            return kind.name


def _title(channel: int) -> str:
    return "RNDIS data" if channel == nvsp.DATA_CHANNEL else "RNDIS control"


def _rndis_from_guest(packet: Seen, channel: int, section: int, size: int) -> str:
    parts = []
    if known := _message(packet.external):
        return f"{_title(channel)}, {known}"
    if section != nvsp.NO_SECTION:
        parts.append(f"{counted(size, 'byte')} in section {section}")
    if packet.kind == PacketType.GPA_DIRECT:
        try:
            ranges = parse_gpa_direct(packet.body, max_bytes=_ANY_SIZE)
            length = sum(one.byte_count for one in ranges)
            parts.append(f"{counted(length, 'byte')} in {counted(len(ranges), 'range')} of memory")
        except PeerError:
            parts.append("malformed ranges")
    return ", ".join([_title(channel), *parts])


def _message(data: bytes) -> str:
    """The RNDIS messages at the beginning of some bytes, which may be cut; "" if they cannot be told."""
    try:
        found = [rndis.parse(one) for one in islice(rndis.messages(data), _MOST)]
    except PeerError:
        return ""
    if not found:
        return ""
    first = found[0]
    match first:
        case rndis.Packet(frame, _):
            if len(found) == 1:
                return f"a frame of {counted(len(frame), 'byte')}"
            total = sum(len(one.frame) for one in found if isinstance(one, rndis.Packet))
            return f"{len(found)} frames of {total} bytes"
        case rndis.Query(request, oid, _) | rndis.Set(request, oid, _):
            return f"{type(first).__name__.upper()} OID {oid:#010x}, request {request}"
        case rndis.Reset():
            return "RESET"
        case _:
            return f"{type(first).__name__.upper()}, request {first.request}"


def _reply(data: bytes) -> str:
    """A control message of the host's, likewise."""
    try:
        kind, _, number = unpack_from("<3I", data)
        name = rndis.Type(kind).name
        if kind == rndis.Type.INDICATE:
            return f"{name} {rndis.Status(number).name}"
        return f"{name}, request {number}" if kind != rndis.Type.RESET_COMPLETE else name
    except (StructError, ValueError):
        return ""


def _from_host(packet: Seen) -> str:
    kind, values = nvsp.parse_answer(packet.payload)
    name = nvsp.Type(kind).name
    answers = packet.kind == PacketType.COMPLETION
    if kind == nvsp.Type.RNDIS and packet.kind == PacketType.TRANSFER_PAGES:
        ranges = parse_transfer_pages(packet.body).ranges
        total = sum(length for _, length in ranges)
        first = min(offset for offset, _ in ranges)
        known = _message(packet.external) if values[0] == nvsp.DATA_CHANNEL else _reply(packet.external)
        what = known or f"{counted(len(ranges), 'message')}, {total} bytes"
        return f"{_title(values[0])}, {what} at {first:#x} of the receive buffer"
    if kind == nvsp.Type.INDIRECTION_TABLE:
        return f"{name}, {counted(values[0], 'entry').replace('entrys', 'entries')}"
    if not answers:
        return name
    if kind == nvsp.Type.INIT_COMPLETE:
        return f"{name} {_status(values[2])}, version {values[0]:#x}"
    if kind == nvsp.Type.RECEIVE_BUFFER_COMPLETE:
        return f"{name} {_status(values[0])}, {counted(values[4], 'section')} of {values[3]} bytes"
    if kind == nvsp.Type.SEND_BUFFER_COMPLETE:
        return f"{name} {_status(values[0])}, sections of {values[1]} bytes"
    if kind == nvsp.Type.SUB_CHANNELS:
        return f"SUB_CHANNELS {_status(values[0])}, {values[1]} granted"
    if kind == nvsp.Type.PD_API:
        return f"{name} {_status(values[1])}, operation {values[0]}"
    return f"{name} {_status(values[0])}"


def _status(number: int) -> str:
    try:
        return nvsp.Status(number).name.lower()
    except ValueError:
        return f"status {number}"
