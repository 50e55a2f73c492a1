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

IRQ_DATA_NONE = 1
IRQ_DATA_EVENTFD = 4
IRQ_ACTION_TRIGGER = 0x20
DMA_READ_FLAG = 1
DMA_WRITE_FLAG = 2
DMA_UNMAP_ALL = 2


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
    """Header and body of one message."""
    return HEADER.pack(message_id, command, HEADER.size + len(body), flags, error) + body


def version_body(capabilities: dict[str, Any], *, major: int = 0, minor: int = 0) -> bytes:
    """The body of a VERSION command that announces `capabilities`."""
    text = json.dumps({"capabilities": capabilities}, separators=(",", ":")).encode()
    return VERSION_PREFIX.pack(major, minor) + text + b"\0"
