"""What is asked of a disk, and how it ends."""

from enum import IntEnum, IntFlag
from typing import NamedTuple


class Op(IntEnum):
    READ = 1
    WRITE = 2
    FLUSH = 3
    DISCARD = 4
    WRITE_ZEROES = 5


class Flag(IntFlag):
    FUA = 1  # WRITE, WRITE_ZEROES: on stable storage before it completes
    MAY_UNMAP = 2  # WRITE_ZEROES: storage may be given back


class Status(IntEnum):
    """How a request ended."""

    OK = 0
    IO_ERROR = 1
    NO_SPACE = 2
    READ_ONLY = 3
    INVALID = 4  # outside of the disk, not aligned, or too long


class Request(NamedTuple):
    """`offset` and `length` in bytes; both 0 for FLUSH."""

    op: int
    flags: int
    offset: int
    length: int
