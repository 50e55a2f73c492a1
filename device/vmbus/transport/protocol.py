"""vfio-user messages, as far as our client needs them.

Source: the vfio-user protocol specification (version 0.9 and later; libvfio-user's docs/vfio-user.rst). All numbers
are little-endian, nothing is aligned. Every message starts with a 16-byte header.
"""

from __future__ import annotations

import enum
import json
import struct
from dataclasses import dataclass
from typing import Any

HEADER = struct.Struct("<HHIII")
"""Message id, command, size in bytes with this header, flags, errno."""
TYPE_MASK = 0xF
TYPE_COMMAND = 0
TYPE_REPLY = 1
FLAG_NO_REPLY = 0x10
FLAG_ERROR = 0x20

VERSION_PREFIX = struct.Struct("<HH")  # major, minor; JSON with a NUL follows
DEVICE_INFO = struct.Struct("<IIII")  # argsz, flags, regions, interrupt types
REGION_INFO = struct.Struct("<IIIIQQ")  # argsz, flags, index, capability offset, size, offset in the fd
IRQ_INFO = struct.Struct("<IIII")  # argsz, flags, index, count
SET_IRQS = struct.Struct("<IIIII")  # argsz, flags, index, start, count
DMA_MAP = struct.Struct("<IIQQQ")  # argsz, flags, offset in the fd, address, size
DMA_UNMAP = struct.Struct("<IIQQ")  # argsz, flags, address, size
REGION_ACCESS = struct.Struct("<QII")  # offset, region, count
DMA_ACCESS = struct.Struct("<QQ")  # address, count
FEATURE = struct.Struct("<II")  # argsz, flags: the number of the feature and what is asked about it; data follows
DEVICE_STATE = struct.Struct("<II")  # state, descriptor (unused here)
LOGGING_CONTROL = struct.Struct("<QII")  # page size, ranges that follow, reserved
LOGGING_REPORT = struct.Struct("<QQQ")  # address, size, page size; in the answer a bitmap follows
MIGRATION_DATA = struct.Struct("<II")  # argsz, size; data follows
DIRTY_BITMAP = struct.Struct("<QQ")  # page size, bytes of the bitmap, which follows

IRQ_DATA_NONE = 1
IRQ_DATA_EVENTFD = 4
IRQ_ACTION_TRIGGER = 0x20
DMA_READ_FLAG = 1
DMA_WRITE_FLAG = 2
DMA_UNMAP_GET_DIRTY = 1
DMA_UNMAP_ALL = 2

FEATURE_NUMBER_MASK = 0xFFFF
FEATURE_GET = 1 << 16
FEATURE_SET = 1 << 17
FEATURE_PROBE = 1 << 18
MIGRATION_STOP_COPY = 1
MIGRATION_PRE_COPY = 4
LOGGED_PAGE = 4096
"""Bytes in each page of a dirty log; the only size that the server takes."""


class Command(enum.IntEnum):
    """Command numbers."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    GET_INFO = 4
    GET_REGION_INFO = 5
    GET_REGION_IO_FDS = 6
    GET_IRQ_INFO = 7
    SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    RESET = 13
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class Feature(enum.IntEnum):
    """What a DEVICE_FEATURE command is about."""

    MIGRATION = 1
    DEVICE_STATE = 2
    LOGGING_START = 6
    LOGGING_STOP = 7
    LOGGING_REPORT = 8


class DeviceState(enum.IntEnum):
    """Migration states as they are on the wire."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    PRE_COPY = 6


@dataclass(frozen=True)
class Message:
    """One received message: header fields and what follows."""

    message_id: int
    command: int
    flags: int
    error: int
    body: bytes

    @property
    def is_reply(self) -> bool:
        """Whether this answers a command."""
        return self.flags & TYPE_MASK == TYPE_REPLY


def encode(message_id: int, command: int, body: bytes, *, flags: int = TYPE_COMMAND, error: int = 0) -> bytes:
    return HEADER.pack(message_id, command, HEADER.size + len(body), flags, error) + body


def bitmap_size(size: int, page_size: int = LOGGED_PAGE) -> int:
    """Bytes of the bitmap for `size` bytes of memory: a bit for each page, in whole 64-bit words."""
    pages = -(-size // page_size)
    return -(-pages // 64) * 8


def bitmap_pages(bitmap: bytes) -> list[int]:
    """Numbers of the pages whose bits are set, in order."""
    return [index * 8 + bit for index, byte in enumerate(bitmap) if byte for bit in range(8) if byte >> bit & 1]


def version_body(capabilities: dict[str, Any], *, major: int = 0, minor: int = 0) -> bytes:
    """The body of a VERSION command that announces `capabilities`."""
    text = json.dumps({"capabilities": capabilities}, separators=(",", ":")).encode()
    return VERSION_PREFIX.pack(major, minor) + text + b"\0"
