"""Packets between hv_storvsc and a SCSI controller."""

import re

from vmbus.observe.words.seen import Seen, counted
from vmbus.wire import scsi
from vmbus.wire.packet import PacketType
from vmbus.wire.scsi import Opcode, Sense
from vmbus.wire.storvsp import (
    PACKET_SIZE,
    Operation,
    Srb,
    SrbStatus,
    Status,
    parse_head,
    parse_srb,
    parse_u16,
)

_SRB_STATUS = 0x3F  # without the bits that go with it
_UNMAP_SHOWN = 1 << 16
_SENSES = {sense: name.lower().replace("_", " ") for name, sense in vars(scsi).items() if isinstance(sense, Sense)}
_EXTENTS = frozenset(
    {
        Opcode.READ_6,
        Opcode.WRITE_6,
        Opcode.READ_10,
        Opcode.WRITE_10,
        Opcode.READ_12,
        Opcode.WRITE_12,
        Opcode.READ_16,
        Opcode.WRITE_16,
        Opcode.WRITE_SAME_10,
        Opcode.WRITE_SAME_16,
    }
)
_SAME = frozenset({Opcode.WRITE_SAME_10, Opcode.WRITE_SAME_16})


def _title(code: int) -> str:
    try:
        name = Opcode(code).name
    except ValueError:
        return f"command {code:#04x}"
    return re.sub(r"_(\d+)$", r"(\1)", name).replace("_", " ")


def command(cdb: bytes, parameters: bytes = b"") -> str:
    """A command block of 16 bytes, and the data that goes with it to the device, as far as it is known."""
    code = cdb[0]
    name = _title(code)
    if code in _EXTENTS:
        first, blocks = scsi.parse_extent(cdb)
        text = f"{name} lba {first}, {counted(blocks, 'block')}"
        if code in _SAME:
            return text + (", unmap" if cdb[1] & scsi.UNMAP_BIT else "")
        return text + (", FUA" if cdb[1] & scsi.FUA and code not in (Opcode.READ_6, Opcode.WRITE_6) else "")
    if code == Opcode.SERVICE_ACTION_IN_16:
        action = cdb[1] & 0x1F
        return "READ CAPACITY(16)" if action == scsi.READ_CAPACITY_16 else f"{name} action {action:#04x}"
    if code == Opcode.INQUIRY:
        page = f" page {cdb[2]:#04x}," if cdb[1] & 1 else ""
        return f"{name}{page} {int.from_bytes(cdb[3:5], 'big')} bytes"
    if code in (Opcode.MODE_SENSE_6, Opcode.MODE_SENSE_10):
        return f"{name} page {cdb[2] & 0x3F:#04x}"
    if code == Opcode.UNMAP:
        extents = scsi.parse_unmap(parameters, _UNMAP_SHOWN) if parameters else []
        if isinstance(extents, list) and extents:
            more = f" and {len(extents) - 1} more" if len(extents) > 1 else ""
            return f"{name} lba {extents[0].first}, {counted(extents[0].blocks, 'block')}{more}"
        return f"{name} {int.from_bytes(cdb[7:9], 'big')} bytes of list"
    return name


def _place(srb: Srb) -> str:
    where = f"path {srb.path}, target {srb.target}, " if srb.path or srb.target else ""
    return f"{where}lun {srb.lun}"


def _request(packet: Seen) -> str:
    operation, _, _ = parse_head(packet.payload)
    name = Operation(operation).name
    if operation == Operation.EXECUTE_SRB:
        srb = parse_srb(packet.payload)
        cdb = srb.command
        said = f"a command block of {srb.cdb_length} bytes" if cdb is None else command(cdb, packet.external)
        return f"{said}, {_place(srb)}, tag {packet.transaction}"
    if operation == Operation.QUERY_PROTOCOL_VERSION:
        version = parse_u16(packet.payload)
        return f"{name} {version >> 8}.{version & 0xFF}"
    if operation == Operation.CREATE_SUB_CHANNELS:
        return f"{name}, {parse_u16(packet.payload)} of them"
    return name


def _sense(srb: Srb) -> str:
    sense = Sense(srb.cdb[2] & 0xF, srb.cdb[12], srb.cdb[13])
    name = _SENSES.get(sense, "")
    return f"sense {sense.key:x}/{sense.asc:02x}/{sense.ascq:02x}" + (f" {name}" if name else "")


def _answer(packet: Seen) -> str:
    _, _, status = parse_head(packet.payload)
    srb = parse_srb(packet.payload)
    if not srb.length:  # an answer to a step of the handshake
        try:
            return Status(status).name
        except ValueError:
            return f"status {status:#x}"
    number = srb.srb_status & _SRB_STATUS
    try:
        name = SrbStatus(number).name.replace("_", " ").lower()
    except ValueError:
        name = f"SRB status {number:#04x}"
    if srb.srb_status & 0x80:
        return f"{name}, {_sense(srb)}, {_place(srb)}, tag {packet.transaction}"
    cdb = srb.command
    what = f"{_title(cdb[0])} " if cdb is not None else ""
    return f"{what}{name}, {counted(srb.data_length, 'byte')}, {_place(srb)}, tag {packet.transaction}"


def words(packet: Seen) -> str:
    """See `vmbus.observe.words.describe`."""
    if len(packet.payload) < PACKET_SIZE:
        return ""
    return _answer(packet) if packet.kind == PacketType.COMPLETION else _request(packet)
