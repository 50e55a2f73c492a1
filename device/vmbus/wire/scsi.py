"""SCSI: command blocks, and the data and sense of a disk's answers (SPC-3, SBC-3). Big-endian; lengths in blocks."""

from collections.abc import Callable
from enum import IntEnum
from struct import Struct, unpack_from
from typing import NamedTuple


class Opcode(IntEnum):
    """The first byte of a command block."""

    TEST_UNIT_READY = 0x00
    REQUEST_SENSE = 0x03
    READ_6 = 0x08
    WRITE_6 = 0x0A
    INQUIRY = 0x12
    MODE_SENSE_6 = 0x1A
    START_STOP_UNIT = 0x1B
    PREVENT_ALLOW_REMOVAL = 0x1E
    READ_CAPACITY_10 = 0x25
    READ_10 = 0x28
    WRITE_10 = 0x2A
    SYNCHRONIZE_CACHE_10 = 0x35
    WRITE_SAME_10 = 0x41
    UNMAP = 0x42
    MODE_SENSE_10 = 0x5A
    READ_16 = 0x88
    WRITE_16 = 0x8A
    SYNCHRONIZE_CACHE_16 = 0x91
    WRITE_SAME_16 = 0x93
    SERVICE_ACTION_IN_16 = 0x9E
    REPORT_LUNS = 0xA0
    READ_12 = 0xA8
    WRITE_12 = 0xAA


READ_CAPACITY_16 = 0x10
"""Service action of SERVICE_ACTION_IN_16."""


class Sense(NamedTuple):
    """Why a command failed: sense key, additional sense code and its qualifier."""

    key: int
    asc: int
    ascq: int = 0

    def pack(self) -> bytes:
        """In the fixed format, 18 bytes."""
        return _SENSE.pack(0x70, 0, self.key, 0, 10, 0, self.asc, self.ascq, 0)


_SENSE = Struct(">BBBIBIBBI")

NO_SENSE = Sense(0x0, 0x00)
WRITE_ERROR = Sense(0x3, 0x0C)
UNRECOVERED_READ_ERROR = Sense(0x3, 0x11)
INTERNAL_TARGET_FAILURE = Sense(0x4, 0x44)
PARAMETER_LIST_LENGTH_ERROR = Sense(0x5, 0x1A)
INVALID_OPERATION = Sense(0x5, 0x20)
LBA_OUT_OF_RANGE = Sense(0x5, 0x21)
INVALID_FIELD_IN_CDB = Sense(0x5, 0x24)
INVALID_FIELD_IN_PARAMETERS = Sense(0x5, 0x26)
SAVING_NOT_SUPPORTED = Sense(0x5, 0x39)
CAPACITY_HAS_CHANGED = Sense(0x6, 0x2A, 0x09)
WRITE_PROTECTED = Sense(0x7, 0x27)
SPACE_ALLOCATION_FAILED = Sense(0x7, 0x27, 0x07)

FUA = 0x08
"""In byte 1 of READ and WRITE."""
UNMAP_BIT = 0x08
ANCHOR_BIT = 0x10
NO_DATA_BIT = 0x01
"""In byte 1 of WRITE SAME: UNMAP, ANCHOR, and (16 only) NDOB."""

_TEN, _TWELVE, _SIXTEEN = Struct(">xxIxHxxxxxxx").unpack, Struct(">xxIIxxxxxx").unpack, Struct(">xxQIxx").unpack
_READERS: dict[int, Callable[[bytes], tuple[int, ...]]] = {
    Opcode.READ_10: _TEN,
    Opcode.WRITE_10: _TEN,
    Opcode.WRITE_SAME_10: _TEN,
    Opcode.READ_12: _TWELVE,
    Opcode.WRITE_12: _TWELVE,
    Opcode.READ_16: _SIXTEEN,
    Opcode.WRITE_16: _SIXTEEN,
    Opcode.WRITE_SAME_16: _SIXTEEN,
}


class Extent(NamedTuple):
    """`blocks` of them, from number `first` on."""

    first: int
    blocks: int


def parse_extent(cdb: bytes) -> Extent:
    """The blocks that a READ, WRITE or WRITE SAME of 16 bytes of command block names."""
    read = _READERS.get(cdb[0])
    if read is not None:
        return Extent._make(read(cdb))
    # READ(6) and WRITE(6): 0 stands for 256.
    return Extent(int.from_bytes(cdb[1:4], "big") & 0x1F_FFFF, cdb[4] or 256)


# ---- INQUIRY ---------------------------------------------------------------------------------------------------------

VENDOR = b"Msft    "
PRODUCT = b"Virtual Disk    "
REVISION = b"1.0 "
ABSENT = 0x7F
"""Peripheral qualifier and type of a logical unit that is not there. Linux takes a failed INQUIRY for success: so this
is how it learns that."""


def standard_inquiry(present: bool) -> bytes:
    """36 bytes: a direct-access device of SPC-3 with tagged queuing."""
    return bytes([0 if present else ABSENT, 0, 5, 2, 31, 0, 0, 2]) + VENDOR + PRODUCT + REVISION


class Limits(NamedTuple):
    """What the page of block limits says, in blocks."""

    transfer: int
    unmap: int
    unmap_descriptors: int
    granularity: int
    write_same: int


class VpdPage(IntEnum):
    """Pages of vital product data that a disk has."""

    SUPPORTED = 0x00
    SERIAL = 0x80
    IDENTIFICATION = 0x83
    BLOCK_LIMITS = 0xB0
    CHARACTERISTICS = 0xB1
    PROVISIONING = 0xB2


def vpd_page(page: int, identity: bytes, limits: Limits, *, thin: bool) -> bytes | None:
    """A page with its header; None for one that there is not. `identity`: 16 bytes that stay the disk's."""
    body: bytes
    if page == VpdPage.SUPPORTED:
        body = bytes(VpdPage)
    elif page == VpdPage.SERIAL:
        body = identity.hex().encode()
    elif page == VpdPage.IDENTIFICATION:
        # A T10 vendor identifier, and an NAA of type 3, "locally assigned".
        vendor = VENDOR + identity.hex().encode()
        naa = bytes([0x30 | identity[0] & 0x0F]) + identity[1:8]
        body = bytes([2, 1, 0, len(vendor)]) + vendor + bytes([1, 3, 0, len(naa)]) + naa
    elif page == VpdPage.BLOCK_LIMITS:
        unmap = (limits.unmap, limits.unmap_descriptors) if thin else (0, 0)
        body = _BLOCK_LIMITS.pack(
            1, 0, limits.granularity, limits.transfer, 0, 0, *unmap, limits.granularity, 0, limits.write_same
        ).ljust(60, b"\0")
    elif page == VpdPage.CHARACTERISTICS:
        body = b"\0\1".ljust(60, b"\0")  # does not rotate
    elif page == VpdPage.PROVISIONING:
        body = bytes([0, 0xE0 if thin else 0, 2 if thin else 0, 0])
    else:
        return None
    return bytes([0, page]) + len(body).to_bytes(2, "big") + body


_BLOCK_LIMITS = Struct(">BBHIIIIIIIQ")


# ---- other data ------------------------------------------------------------------------------------------------------


def read_capacity_10(blocks: int, block_size: int) -> bytes:
    """8 bytes; a disk that is too large for it says so."""
    return min(blocks - 1, 0xFFFF_FFFF).to_bytes(4, "big") + block_size.to_bytes(4, "big")


def read_capacity_16(blocks: int, block_size: int, *, thin: bool) -> bytes:
    """32 bytes."""
    head = (blocks - 1).to_bytes(8, "big") + block_size.to_bytes(4, "big")
    return (head + bytes([0, 0, 0x80 if thin else 0, 0])).ljust(32, b"\0")


def report_luns(luns: list[int]) -> bytes:
    """The logical units of one target, by their numbers up to 255."""
    return (8 * len(luns)).to_bytes(4, "big") + bytes(4) + b"".join(bytes([0, lun, 0, 0, 0, 0, 0, 0]) for lun in luns)


CACHING = 0x08
CONTROL = 0x0A
ALL_PAGES = 0x3F
_MODE_PAGES = {CACHING: (18, 0x04), CONTROL: (10, 0)}  # length, and the third byte: a write cache that is on
CHANGEABLE, SAVED = 1, 3
"""Which values MODE SENSE asks for, beside the current (0) and the default ones (2)."""


def mode_sense(cdb: bytes, *, read_only: bool) -> bytes | Sense:
    """The answer to MODE SENSE(6) or (10)."""
    page, control, sub_page = cdb[2] & 0x3F, cdb[2] >> 6, cdb[3]
    if control == SAVED:
        return SAVING_NOT_SUPPORTED
    if sub_page not in (0, 0xFF) or page not in (*_MODE_PAGES, ALL_PAGES):
        return INVALID_FIELD_IN_CDB
    data = b""
    for number, (length, third) in _MODE_PAGES.items():
        if page in (number, ALL_PAGES):
            value = 0 if control == CHANGEABLE or read_only else third
            data += bytes([number, length, value]).ljust(2 + length, b"\0")
    device = 0x80 if read_only else 0x10  # write-protected, or FUA and a write cache
    if cdb[0] == Opcode.MODE_SENSE_6:
        return bytes([3 + len(data), 0, device, 0]) + data
    return (6 + len(data)).to_bytes(2, "big") + bytes([0, device, 0, 0, 0, 0]) + data


UNMAP_HEADER = 8
UNMAP_DESCRIPTOR = 16


def parse_unmap(data: bytes, most: int) -> list[Extent] | Sense:
    """The extents in an UNMAP's parameter list, at most `most`; those of no blocks are left out."""
    if len(data) < UNMAP_HEADER:
        return PARAMETER_LIST_LENGTH_ERROR if data else []
    length = int.from_bytes(data[2:4], "big")
    if length % UNMAP_DESCRIPTOR or UNMAP_HEADER + length > len(data):
        return PARAMETER_LIST_LENGTH_ERROR
    if length // UNMAP_DESCRIPTOR > most:
        return INVALID_FIELD_IN_PARAMETERS
    starts = range(UNMAP_HEADER, UNMAP_HEADER + length, UNMAP_DESCRIPTOR)
    extents = [Extent._make(unpack_from(">QI", data, at)) for at in starts]
    return [extent for extent in extents if extent.blocks]


def pack_unmap(extents: list[Extent]) -> bytes:
    """The parameter list of an UNMAP."""
    length = UNMAP_DESCRIPTOR * len(extents)
    head = (6 + length).to_bytes(2, "big") + length.to_bytes(2, "big") + bytes(4)
    return head + b"".join(
        extent.first.to_bytes(8, "big") + extent.blocks.to_bytes(4, "big") + bytes(4) for extent in extents
    )
