"""What a command block asks of a disk, and what it is answered. No I/O.

A command comes to one of three: data for the guest (none, for those that only succeed), a refusal with its sense, or
requests to the disk. READ and WRITE, which are nearly all there is, have a way of their own (`transfer`).
"""

from collections.abc import Callable
from typing import NamedTuple

from vmbus.providers.disk.request import Flag, Op, Request, Status
from vmbus.wire import scsi
from vmbus.wire.scsi import Extent, Limits, Opcode, Sense

MOST_DESCRIPTORS = 64
"""Extents that one UNMAP may name."""
MOST_PARAMETERS = scsi.UNMAP_HEADER + MOST_DESCRIPTORS * scsi.UNMAP_DESCRIPTOR
"""Bytes of a guest's parameter list that are looked at."""
_GRANULARITY = 4096  # bytes that storage is best given back in

READS = frozenset({Opcode.READ_6, Opcode.READ_10, Opcode.READ_12, Opcode.READ_16})
WRITES = frozenset({Opcode.WRITE_6, Opcode.WRITE_10, Opcode.WRITE_12, Opcode.WRITE_16})
_FUA_FREE = frozenset({Opcode.READ_6, Opcode.WRITE_6})  # their byte 1 has a part of the address there


class Facts(NamedTuple):
    """What a logical unit is. `size` and `maximum_range` in bytes."""

    size: int
    block_size: int
    read_only: bool
    identity: bytes
    maximum_transfer: int
    maximum_range: int

    @property
    def blocks(self) -> int:
        """How many there are."""
        return self.size // self.block_size

    @property
    def limits(self) -> Limits:
        """For the page of block limits."""
        size = self.block_size
        return Limits(
            transfer=self.maximum_transfer // size,
            unmap=self.maximum_range // size,
            unmap_descriptors=MOST_DESCRIPTORS,
            granularity=max(_GRANULARITY // size, 1),
            write_same=self.maximum_range // size,
        )


class Command(NamedTuple):
    """What is known of a command beside its block of 16 bytes: `luns` of its target, and `parameters`, which copies at
    most so many bytes of the data that comes with it."""

    cdb: bytes
    facts: Facts
    luns: list[int]
    parameters: Callable[[int], bytes]


class Data(NamedTuple):
    """It succeeds, with this for the guest: as much of it as there is room for."""

    data: bytes = b""


class Work(NamedTuple):
    """The disk has to do all of these, in any order; with none of them it succeeds."""

    requests: list[Request]


Verdict = Data | Sense | Work


def transfer(cdb: bytes, block_size: int, maximum: int) -> Request | Sense:
    """What a READ or WRITE asks for, `maximum` bytes at most; of no bytes if it names no blocks."""
    opcode = cdb[0]
    first, count = scsi.parse_extent(cdb)
    length = count * block_size
    if length > maximum:
        return scsi.INVALID_FIELD_IN_CDB
    if opcode in READS:
        return Request(Op.READ, 0, first * block_size, length)
    flags = Flag.FUA if cdb[1] & scsi.FUA and opcode not in _FUA_FREE else 0
    return Request(Op.WRITE, flags, first * block_size, length)


def decide(command: Command) -> Verdict:
    handler = _HANDLERS.get(command.cdb[0])
    return scsi.INVALID_OPERATION if handler is None else handler(command)


def absent(command: Command) -> Data | None:
    """What is answered where there is no logical unit; None: that there is none."""
    cdb = command.cdb
    if cdb[0] == Opcode.INQUIRY:
        return Data(scsi.standard_inquiry(False)[: int.from_bytes(cdb[3:5], "big")])
    if cdb[0] == Opcode.REPORT_LUNS:
        return _report_luns(command)
    return None


# ---- handlers --------------------------------------------------------------------------------------------------------


def _good(_: Command) -> Data:
    return Data()


def _request_sense(command: Command) -> Data:
    return Data(scsi.NO_SENSE.pack()[: command.cdb[4]])


def _inquiry(command: Command) -> Verdict:
    cdb, facts = command.cdb, command.facts
    room = int.from_bytes(cdb[3:5], "big")
    if cdb[1] & 1:
        page = scsi.vpd_page(cdb[2], facts.identity, facts.limits, thin=not facts.read_only)
        return scsi.INVALID_FIELD_IN_CDB if page is None else Data(page[:room])
    if cdb[2] or cdb[1]:
        return scsi.INVALID_FIELD_IN_CDB
    return Data(scsi.standard_inquiry(True)[:room])


def _mode_sense(command: Command) -> Verdict:
    cdb = command.cdb
    found = scsi.mode_sense(cdb, read_only=command.facts.read_only)
    if isinstance(found, Sense):
        return found
    return Data(found[: cdb[4] if cdb[0] == Opcode.MODE_SENSE_6 else int.from_bytes(cdb[7:9], "big")])


def _read_capacity_10(command: Command) -> Verdict:
    return Data(scsi.read_capacity_10(command.facts.blocks, command.facts.block_size))


def _service_action_in(command: Command) -> Verdict:
    cdb, facts = command.cdb, command.facts
    if cdb[1] & 0x1F != scsi.READ_CAPACITY_16:
        return scsi.INVALID_OPERATION
    data = scsi.read_capacity_16(facts.blocks, facts.block_size, thin=not facts.read_only)
    return Data(data[: int.from_bytes(cdb[10:14], "big")])


def _report_luns(command: Command) -> Data:
    return Data(scsi.report_luns(command.luns)[: int.from_bytes(command.cdb[6:10], "big")])


def _synchronize_cache(_: Command) -> Work:
    return Work([Request(Op.FLUSH, 0, 0, 0)])  # all of it, whatever part is named


def _unmap(command: Command) -> Verdict:
    cdb, facts = command.cdb, command.facts
    if cdb[1] & 1:
        return scsi.INVALID_FIELD_IN_CDB  # ANCHOR
    length = int.from_bytes(cdb[7:9], "big")
    extents = scsi.parse_unmap(command.parameters(min(length, MOST_PARAMETERS)), MOST_DESCRIPTORS)
    if isinstance(extents, Sense):
        return extents
    if sum(extent.blocks for extent in extents) * facts.block_size > facts.maximum_range:
        return scsi.INVALID_FIELD_IN_PARAMETERS
    return Work([_on_blocks(Op.DISCARD, 0, extent, facts) for extent in extents])


def _write_same(command: Command) -> Verdict:
    """Of zeroes alone: that is what Linux uses it for."""
    cdb, facts = command.cdb, command.facts
    extent = scsi.parse_extent(cdb)
    if cdb[1] & scsi.ANCHOR_BIT or not 0 < extent.blocks * facts.block_size <= facts.maximum_range:
        return scsi.INVALID_FIELD_IN_CDB
    if not (cdb[0] == Opcode.WRITE_SAME_16 and cdb[1] & scsi.NO_DATA_BIT):
        data = command.parameters(facts.block_size)
        if len(data) < facts.block_size or any(data):
            return scsi.INVALID_FIELD_IN_CDB
    return Work([_on_blocks(Op.WRITE_ZEROES, Flag.MAY_UNMAP if cdb[1] & scsi.UNMAP_BIT else 0, extent, facts)])


def _on_blocks(op: Op, flags: int, extent: Extent, facts: Facts) -> Request:
    return Request(op, flags, extent.first * facts.block_size, extent.blocks * facts.block_size)


_HANDLERS: dict[int, Callable[[Command], Verdict]] = {
    Opcode.TEST_UNIT_READY: _good,
    Opcode.REQUEST_SENSE: _request_sense,
    Opcode.INQUIRY: _inquiry,
    Opcode.MODE_SENSE_6: _mode_sense,
    Opcode.MODE_SENSE_10: _mode_sense,
    Opcode.START_STOP_UNIT: _good,
    Opcode.PREVENT_ALLOW_REMOVAL: _good,
    Opcode.READ_CAPACITY_10: _read_capacity_10,
    Opcode.SERVICE_ACTION_IN_16: _service_action_in,
    Opcode.REPORT_LUNS: _report_luns,
    Opcode.SYNCHRONIZE_CACHE_10: _synchronize_cache,
    Opcode.SYNCHRONIZE_CACHE_16: _synchronize_cache,
    Opcode.UNMAP: _unmap,
    Opcode.WRITE_SAME_10: _write_same,
    Opcode.WRITE_SAME_16: _write_same,
}

REPORTS_NO_ATTENTION = frozenset({Opcode.INQUIRY, Opcode.REPORT_LUNS, Opcode.REQUEST_SENSE})
"""Commands that are answered although the guest has to be told of a change first."""
WITH_PARAMETERS = frozenset({Opcode.UNMAP, Opcode.WRITE_SAME_10, Opcode.WRITE_SAME_16})
"""Commands with data of the guest's that is looked at here."""


# ---- what became of it -----------------------------------------------------------------------------------------------

_ERRORS = {
    Op.READ: scsi.UNRECOVERED_READ_ERROR,
    Op.FLUSH: scsi.INTERNAL_TARGET_FAILURE,
}
_SENSES = {
    Status.NO_SPACE: scsi.SPACE_ALLOCATION_FAILED,
    Status.READ_ONLY: scsi.WRITE_PROTECTED,
    Status.INVALID: scsi.LBA_OUT_OF_RANGE,
}


def sense_of(op: int, status: Status) -> Sense:
    """Why a request to the disk failed, in SCSI's words."""
    return _SENSES.get(status) or _ERRORS.get(Op(op), scsi.WRITE_ERROR)
